"""Is a recipe better than simply doing less? Its M1 is compared with the baseline's at equal `learned`.

Any recipe that learns less keeps more of the geometry, so a low M1 alone is not a merit. Two curves say what doing less
gives: the frontier, the baseline's own update scaled by 0, 0.1 ... 1, and the dose curve, the baseline's
checkpoints. On each, M1 is interpolated linearly in `learned` between two neighbouring points, and a recipe is
better where its M1 lies below the curve by more than the noise of the questions: the 95% interval of the difference,
from a bootstrap in which recipe and curve see the same resampled questions, excludes zero.

Shapes: P = personas, Q = questions, D = width, R = resamples. A vectors file is read once, and what is kept of it
is its M1 and its (R,) resampled M1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_interval, question_weights, resampled_m1
from minipersona.geometry.vectors import load_vectors
from minipersona.run.directory import vectors_file
from minipersona.run.result import Checkpoint, Interval
from minipersona.verdict.files import frontier_vectors, step_of
from minipersona.verdict.recipe_results import RecipeResult, all_of
from minipersona.verdict.results import CellResult, StudyResults

RESAMPLES = 1000
ROUNDING = 1e-6  # a smaller difference of two M1 may be that of fp32
AGREE = 1e-4  # M1 of a file and of its row: the same number but for the device's rounding
MEND = "delete its cell and continue the study"


@dataclass(frozen=True)
class Resampled:
    """M1 of one vectors file: the estimate and the (R,) fp64 values under resampled questions."""

    m1: float
    values: Tensor

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.m1 - other.m1, self.values - other.values)

    def towards(self, other: Resampled, share: float) -> Resampled:
        """The point `share` of the way to `other`."""
        return Resampled(self.m1 + share * (other.m1 - self.m1), self.values + share * (other.values - self.values))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The bootstrap interval of the estimate."""
        return bootstrap_interval(self.values, self.m1, level)


class Bootstrap:
    """The resampled M1 of vectors files at the deciding layer, all under the same resampled questions."""

    def __init__(self, layer: int, resamples: int = RESAMPLES) -> None:
        self.layer, self.resamples = layer, resamples
        self._weights: Tensor | None = None  # (R, Q)
        self._read: dict[Path, Resampled] = {}

    def of_file(self, path: Path, expected: float) -> Resampled | None:
        """M1 of a vectors file, None where there is none. UserError where it is not the `expected` M1 of its row."""
        if not path.is_file():
            return None
        if path not in self._read:
            self._read[path] = self._resampled(path)
        resampled = self._read[path]
        if abs(resampled.m1 - expected) > AGREE:
            raise UserError(f"{path}: its M1 is {resampled.m1:.4f}, its row says {expected:.4f}; {MEND}")
        return resampled

    def of_checkpoint(self, cell: CellResult, row: Checkpoint) -> Resampled | None:
        """M1 of a checkpoint of a cell, or of the base (step 0) as that cell measured it."""
        assert cell.directory is not None
        return self.of_file(vectors_file(cell.directory, step_of(row)), row.m1)

    def _resampled(self, path: Path) -> Resampled:
        try:
            samples = load_vectors(path, layer=self.layer).at(self.layer)  # (P, Q, D)
        except UserError as error:
            raise UserError(f"{error}; {MEND}") from None
        questions = samples.shape[1]
        if self._weights is None:
            self._weights = question_weights(questions, self.resamples)
        if questions != self._weights.shape[1]:
            raise UserError(f"{path}: has {questions} questions, other cells {self._weights.shape[1]}; {MEND}")
        return Resampled(m1(persona_vectors(samples)), resampled_m1(samples, self._weights))


def bootstrap_of(results: StudyResults) -> Bootstrap:
    """A bootstrap at the layer by which the study is judged."""
    return Bootstrap(0 if results.protocol is None else results.protocol.layer)


# ---------------------------------------------------------------- the curves


@dataclass(frozen=True)
class Point:
    """One point of a curve; `resampled` is None where its vectors are missing."""

    learned: float
    m1: float
    resampled: Resampled | None


@dataclass(frozen=True)
class Curve:
    """What doing less gives, from nothing to the whole baseline."""

    points: Sequence[Point] = ()

    def bracket(self, learned: float) -> tuple[Point, Point, float] | None:
        """The neighbours between which `learned` lies, and its share of the way between them; None beyond the ends.

        Where the curve reaches a value twice, the first time counts: it takes the least training.
        """
        for low, high in zip(self.points, self.points[1:], strict=False):
            if min(low.learned, high.learned) <= learned <= max(low.learned, high.learned):
                width = high.learned - low.learned
                return low, high, (learned - low.learned) / width if width else 0.0
        return None


def frontier_curve(results: StudyResults, bootstrap: Bootstrap) -> Curve:
    """The baseline's update scaled by 0, 0.1 ... 1, as far as measured."""
    points = []
    for row in results.frontier:
        if row.learned is not None:
            vectors = frontier_vectors(results.directory, row.scale)
            points.append(Point(row.learned, row.m1, bootstrap.of_file(vectors, row.m1)))
    return Curve(points)


def dose_curve(results: StudyResults, bootstrap: Bootstrap) -> Curve:
    """The base and the baseline's checkpoints."""
    points = []
    if results.baseline is not None:
        for row in results.baseline.curve:
            if row.learned is not None:
                points.append(Point(row.learned, row.m1, bootstrap.of_checkpoint(results.baseline, row)))
    return Curve(points)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Difference:
    """A recipe's M1 less a curve's at equal learned: below zero is better.

    `better` is None, with the reason, where that cannot be said.
    """

    m1_at_equal_learned: float | None
    difference: float | None
    ci95: Interval | None
    better: bool | None
    reason: str | None


@dataclass(frozen=True)
class DoingLess:
    """One seed of a recipe against both curves: the frontier and, with `dose_` before their names, the dose curve."""

    cell: str
    recipe: str
    m1: float
    learned: float | None
    m1_at_equal_learned: float | None
    difference: float | None
    ci95: Interval | None
    better: bool | None
    reason: str | None
    dose_m1_at_equal_learned: float | None
    dose_difference: float | None
    dose_ci95: Interval | None
    dose_better: bool | None
    dose_reason: str | None


def against_doing_less(recipe: RecipeResult, frontier: Curve, dose: Curve, bootstrap: Bootstrap) -> list[DoingLess]:
    """A recipe against both curves, seed by seed."""
    rows = []
    for cell, row in zip(recipe.cells, recipe.rows, strict=True):
        own = bootstrap.of_checkpoint(cell, row)
        scaled = _against(row, own, frontier)
        doses = _unknown("it is on the dose curve itself") if recipe.phase == "1" else _against(row, own, dose)
        rows.append(
            DoingLess(
                cell=recipe.id + (f" seed={cell.seed}" if len(recipe.cells) > 1 else ""),
                recipe=recipe.id,
                m1=row.m1,
                learned=row.learned,
                m1_at_equal_learned=scaled.m1_at_equal_learned,
                difference=scaled.difference,
                ci95=scaled.ci95,
                better=scaled.better,
                reason=scaled.reason,
                dose_m1_at_equal_learned=doses.m1_at_equal_learned,
                dose_difference=doses.difference,
                dose_ci95=doses.ci95,
                dose_better=doses.better,
                dose_reason=doses.reason,
            )
        )
    return rows


def better_than_less(recipe: RecipeResult, comparisons: Sequence[DoingLess]) -> bool | None:
    """Whether a recipe lies below the frontier with every seed; None where that is open, or it was not compared."""
    rows = [row for row in comparisons if row.recipe == recipe.id]
    return all_of(row.better for row in rows) if rows else None


def _against(row: Checkpoint, own: Resampled | None, curve: Curve) -> Difference:
    if not curve.points:
        return _unknown("the curve has not been measured")
    if row.learned is None:
        return _unknown("learned is undefined")
    bracket = curve.bracket(row.learned)
    if bracket is None:
        beyond = row.learned > max(point.learned for point in curve.points)
        return _unknown(f"it learned {'more' if beyond else 'less'} than any point of the curve")
    low, high, share = bracket
    there = low.m1 + share * (high.m1 - low.m1)
    if own is None or low.resampled is None or high.resampled is None:
        return Difference(there, row.m1 - there, None, None, "vectors are missing")
    interval = (own - low.resampled.towards(high.resampled, share)).interval()
    return Difference(there, row.m1 - there, interval, interval[1] < -ROUNDING, None)


def _unknown(reason: str) -> Difference:
    return Difference(None, None, None, None, reason)
