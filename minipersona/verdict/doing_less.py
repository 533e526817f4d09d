"""Is a recipe better than simply doing less? Its M1 beside that of the baseline's scaled update at equal loss.

Any recipe that learns less keeps more of the geometry, so a low M1 alone is not a merit. The baseline's own update,
scaled down, is a recipe like any other and costs nothing. The scale with a recipe's held-out loss is found by bisection
and measured: M1 is convex in learned, so a chord between two scales lies above the curve and would call the curve
better than itself. The difference at equal loss is

    d = M1 - M1_scaled - slope (L - L_scaled)        slope = dM1 / dL of the scaled update there

and its noise comes from a bootstrap that resamples questions and held-out rows, the same ones for both models: how much
was learned is as uncertain as M1. A recipe is better where d lies below -1e-4 by a one-sided test, whose p-values are
Holm's at 0.05 over all recipes of the study. Of several seeds the largest p counts.

A recipe that learned more than the baseline is compared with the whole baseline; only a loss above the baseline's, as
in some of the resamples, is corrected for. One that learned nothing does no more than the base, which costs less.

Shapes: P = personas, Q = questions, D = width, R = resamples. Of a file an estimate and its (R,) resamples are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_interval, question_weights, resampled_m1
from minipersona.geometry.vectors import load_vectors
from minipersona.run.directory import losses_file, vectors_file
from minipersona.run.judgement import all_of
from minipersona.run.losses import load_losses
from minipersona.run.result import Checkpoint
from minipersona.significance import LEVEL, Interval, holm
from minipersona.verdict.cells import CellResult
from minipersona.verdict.files import matched_file, step_of
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults

RESAMPLES = 1000
ROWS_SEED = 43  # of the resampled rows; questions have their own
RESOLUTION = 1e-4  # of M1: bisection and rounding leave differences of this size between equal models
MEND = "delete its cell and continue the study"


@dataclass(frozen=True)
class Resampled:
    """A number of one model: the estimate and its (R,) fp64 values under resampling."""

    estimate: float
    values: Tensor

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.estimate - other.estimate, self.values - other.values)

    def __mul__(self, factor: float) -> Resampled:
        return Resampled(factor * self.estimate, factor * self.values)

    def positive(self) -> Resampled:
        """The part above zero."""
        return Resampled(max(0.0, self.estimate), self.values.clamp(min=0))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The bootstrap interval of the estimate."""
        return bootstrap_interval(self.values, self.estimate, level)

    def p_below(self, bound: float) -> float:
        """The p-value of "it lies below the bound", one-sided, by the normal with the resamples' deviation."""
        deviation = float(self.values.std())
        if deviation == 0:
            return 0.0 if self.estimate < bound else 1.0
        return NormalDist().cdf((self.estimate - bound) / deviation)


class Bootstrap:
    """Resampled M1 at the deciding layer and resampled losses, of all files under the same questions and rows."""

    def __init__(self, layer: int, resamples: int = RESAMPLES) -> None:
        self.layer, self.resamples = layer, resamples
        self._weights: dict[tuple[str, int], Tensor] = {}  # (R, Q), and (R, rows)
        self._read: dict[Path, Resampled] = {}

    def m1(self, path: Path, expected: float) -> Resampled | None:
        """M1 of a vectors file, None where there is none. UserError where it is not the `expected` M1 of its row."""
        if path.is_file() and path not in self._read:
            try:
                samples = load_vectors(path, layer=self.layer).at(self.layer)  # (P, Q, D)
            except UserError as error:
                raise UserError(f"{error}; {MEND}") from None
            weights = self._same_weights("questions", samples.shape[1], path)
            self._read[path] = Resampled(m1(persona_vectors(samples)), resampled_m1(samples, weights))
        return self._checked(path, "M1", expected)

    def loss(self, path: Path, expected: float) -> Resampled | None:
        """The held-out loss of a file of losses by row, likewise."""
        if path.is_file() and path not in self._read:
            try:
                losses = load_losses(path)
            except UserError as error:
                raise UserError(f"{error}; {MEND}") from None
            weights = self._same_weights("rows", len(losses.nats), path)
            values = (weights @ losses.nats) / (weights @ losses.tokens.double())
            self._read[path] = Resampled(losses.eval_loss, values)
        return self._checked(path, "loss", expected)

    def m1_of(self, cell: CellResult, row: Checkpoint) -> Resampled | None:
        """M1 of a checkpoint of a cell."""
        assert cell.directory is not None
        return self.m1(vectors_file(cell.directory, step_of(row)), row.m1)

    def loss_of(self, cell: CellResult, row: Checkpoint) -> Resampled | None:
        """The held-out loss of a checkpoint of a cell."""
        assert cell.directory is not None and row.eval_loss is not None
        return self.loss(losses_file(cell.directory, step_of(row)), row.eval_loss)

    def _same_weights(self, what: str, number: int, path: Path) -> Tensor:
        """The weights of the files read so far; UserError where this one has another number of questions or rows."""
        other = next((n for kind, n in self._weights if kind == what), number)
        if number != other:
            raise UserError(f"{path}: has {number} {what}, other cells {other}; {MEND}")
        if (what, number) not in self._weights:
            seed = {} if what == "questions" else {"seed": ROWS_SEED}
            self._weights[what, number] = question_weights(number, self.resamples, **seed)
        return self._weights[what, number]

    def _checked(self, path: Path, what: str, expected: float) -> Resampled | None:
        found = self._read.get(path)
        if found is not None and abs(found.estimate - expected) > RESOLUTION:
            raise UserError(f"{path}: its {what} is {found.estimate:.4f}, its row says {expected:.4f}; {MEND}")
        return found


def bootstrap_of(results: StudyResults) -> Bootstrap:
    """A bootstrap at the layer by which the study is judged."""
    return Bootstrap(0 if results.protocol is None else results.protocol.layer)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class DoingLess:
    """One seed of a recipe against the scaled baseline with its loss: a difference below zero is in its favour.

    `better` is said of all seeds of the recipe together, after Holm's correction; None, with the reason, where it
    cannot be said.
    """

    cell: str
    recipe: str
    m1: float
    learned: float | None
    scale: float | None  # of the baseline's update
    difference: float | None
    ci95: Interval | None
    p: float | None
    better: bool | None
    reason: str | None


def against_doing_less(recipes: Sequence[RecipeResult], results: StudyResults, bootstrap: Bootstrap) -> list[DoingLess]:
    """Every recipe but the baseline itself, seed by seed."""
    compared = [recipe for recipe in recipes if not is_baseline(recipe, results)]
    found = {
        recipe.id: [_against(*pair, results, bootstrap) for pair in zip(recipe.cells, recipe.rows, strict=True)]
        for recipe in compared
    }
    p_values = {name: [row.p for row in rows if row.p is not None] for name, rows in found.items()}
    tested = {name: max(values) for name, values in p_values.items() if len(values) == len(found[name])}
    better = holm(tested, LEVEL)
    rows = []
    for recipe in compared:
        decided = better.get(recipe.id, all_of(one.better for one in found[recipe.id]))
        for cell, row, one in zip(recipe.cells, recipe.rows, found[recipe.id], strict=True):
            name = recipe.id + (f" seed={cell.seed}" if len(recipe.cells) > 1 else "")
            rows.append(
                DoingLess(name, recipe.id, row.m1, row.learned, one.scale, one.difference, one.ci95, one.p, decided,
                          one.reason)
            )  # fmt: skip
    return rows


def is_baseline(recipe: RecipeResult, results: StudyResults) -> bool:
    """Whether it is the baseline's last step, which every other recipe is held against."""
    return recipe.phase == "1" and results.baseline is not None and recipe.step == results.baseline.final.step


def better_than_less(recipe: RecipeResult, comparisons: Sequence[DoingLess]) -> bool | None:
    """Whether a recipe is better than doing less; None where that is open, or it was not compared."""
    return next((row.better for row in comparisons if row.recipe == recipe.id), None)


@dataclass(frozen=True)
class _Against:
    """One comparison before the correction; `better` only where no test is needed, `p` where there was one."""

    better: bool | None
    reason: str | None
    scale: float | None = None
    difference: float | None = None
    ci95: Interval | None = None
    p: float | None = None


def _against(cell: CellResult, row: Checkpoint, results: StudyResults, bootstrap: Bootstrap) -> _Against:
    if row.learned is None:
        return _Against(None, "learned is undefined")
    if row.learned <= 0:
        return _Against(False, "it learned nothing", scale=0.0)
    if row.learned >= 1:
        return _beyond(cell, row, results, bootstrap)
    matched = results.matched_to(cell, row)
    if matched is None:
        return _Against(None, "the scaled baseline with its loss was not measured")
    assert cell.directory is not None
    name, step = cell.directory.name, step_of(row)
    scaled_m1 = bootstrap.m1(matched_file(results.directory, name, step, ".vectors.safetensors"), matched.m1)
    scaled_loss = bootstrap.loss(matched_file(results.directory, name, step, ".losses.safetensors"), matched.eval_loss)
    own_m1, own_loss = bootstrap.m1_of(cell, row), bootstrap.loss_of(cell, row)
    if own_m1 is None or own_loss is None or scaled_m1 is None or scaled_loss is None:
        return _Against(None, "vectors or losses by row are missing", matched.scale)
    return _tested(difference_at_equal_loss(own_m1, own_loss, scaled_m1, scaled_loss, matched.slope), matched.scale)


def difference_at_equal_loss(
    own_m1: Resampled, own_loss: Resampled, scaled_m1: Resampled, scaled_loss: Resampled, slope: float
) -> Resampled:
    """The d of this file's head."""
    return (own_m1 - scaled_m1) - (own_loss - scaled_loss) * slope


def _beyond(cell: CellResult, row: Checkpoint, results: StudyResults, bootstrap: Bootstrap) -> _Against:
    """A recipe that learned at least as much as the baseline, against the whole of that."""
    baseline, slope = results.baseline_of(cell), _last_slope(results)
    assert baseline is not None  # else learned is undefined
    if row.m1 >= baseline.final.m1:
        return _Against(None, "it learned more than the baseline, and its M1 is not lower", 1.0)
    if slope is None or (baseline.phase, baseline.role) != ("1", "registered"):
        return _Against(None, "the baseline's scaled updates were not measured", 1.0)
    parts = [bootstrap.m1_of(cell, row), bootstrap.m1_of(baseline, baseline.final)]
    losses = [bootstrap.loss_of(cell, row), bootstrap.loss_of(baseline, baseline.final)]
    known = [part for part in (*parts, *losses) if part is not None]
    if len(known) < 4:
        return _Against(None, "vectors or losses by row are missing", 1.0)
    own_m1, other_m1, own_loss, other_loss = known
    return _tested((own_m1 - other_m1) - (own_loss - other_loss).positive() * slope, 1.0)


def _last_slope(results: StudyResults) -> float | None:
    """dM1 / dL of the baseline's update between its last two scales."""
    last = results.frontier[-2:]
    if len(last) < 2 or last[0].eval_loss is None or last[1].eval_loss is None:
        return None
    fall = last[1].eval_loss - last[0].eval_loss
    return (last[1].m1 - last[0].m1) / fall if fall < 0 else None


def _tested(difference: Resampled, scale: float) -> _Against:
    p = difference.p_below(-RESOLUTION)
    return _Against(None, None, scale, difference.estimate, difference.interval(), p)
