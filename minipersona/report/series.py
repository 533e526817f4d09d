"""The numbers of each figure. A figure is drawn from its rows alone, and the CSV beside it holds the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from minipersona.errors import UserError
from minipersona.geometry import measures
from minipersona.geometry.vectors import load_vectors
from minipersona.report.blocks import plain
from minipersona.run.directory import vectors_file
from minipersona.run.result import Checkpoint
from minipersona.verdict.cells import CellResult, bare_name
from minipersona.verdict.files import step_of
from minipersona.verdict.mixture_threshold import broad_fraction
from minipersona.verdict.recipe_results import RecipeResult, mixtures_reference, recipe_results
from minipersona.verdict.results import JudgedPoint, StudyResults
from minipersona.verdict.verdict import Verdict

CURVE_POINTS = 101
Name = tuple[str, str, int | None]
"""The phase, recipe and seed of a point."""


@dataclass(frozen=True)
class Series:
    """What a figure shows. `rows` holds at least one row, all of one of the dataclasses below."""

    name: str
    title: str
    caption: str
    rows: Sequence[Any]

    def to_csv(self) -> str:
        """The rows as CSV, one column a field; numbers in full precision, nothing for None."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(self.rows[0]))
        for row in self.rows:
            writer.writerow(plain(value) if isinstance(value, str) else value for value in astuple(row))
        return text.getvalue()


class Missing(Exception):
    """A figure that cannot be drawn, and why; the report says so in its place."""


def all_series(results: StudyResults, verdict: Verdict) -> tuple[list[Series], dict[str, str]]:
    """The series of every figure that has its data, and by name the reason of every one that does not."""
    named = None if verdict.recipe is None else verdict.recipe.cell
    shown = shown_recipe(results, named)
    builders: dict[str, Callable[[], Series]] = {
        "m1_against_learned": lambda: m1_against_learned(results, shown),
        "m1_by_step": lambda: m1_by_step(results),
        "cosines": lambda: cosines(results, shown, named),
        "decomposition": lambda: decomposition(results),
        "mixture": lambda: mixture(results, verdict),
    }
    series, missing = [], {}
    for name, build in builders.items():
        try:
            series.append(build())
        except Missing as reason:
            missing[name] = str(reason)
    return series, missing


def shown_recipe(results: StudyResults, named: str | None) -> RecipeResult | None:
    """The recipe that stands for the search: the `named` one, or the one of lowest M1 that learned enough."""
    found = [c for c in recipe_results(results) if c.rows[0] is not (results.baseline and results.baseline.final)]
    learned = [c for c in found if c.teaches]
    return next((c for c in found if c.id == named), min(learned, key=lambda c: c.m1, default=None))


# ---------------------------------------------------------------- M1


@dataclass(frozen=True)
class TradeOffRow:
    """A point of M1 against learned. `dose` is a step or, of the scaled baseline, the scale."""

    kind: str  # base, baseline, recipe; baseline or recipe "on the way"; scaled baseline
    phase: str
    recipe: str
    seed: int | None
    dose: float
    learned: float
    m1: float
    m1_low: float
    m1_high: float
    registered: bool | None
    substantive: bool | None
    label: str  # beside the point; empty for most


def m1_against_learned(results: StudyResults, shown: RecipeResult | None) -> Series:
    """Every recipe at its last step, every checkpoint before it, and the baseline's own update scaled down."""
    rows: list[TradeOffRow] = []

    def add(kind: str, name: Name, dose: float, row: Checkpoint | JudgedPoint, label: str = "") -> None:
        if row.learned is not None:
            passes = (row.registered_pass, row.substantive_pass if isinstance(row, Checkpoint) else None)
            rows.append(TradeOffRow(kind, *name, dose, row.learned, row.m1, *row.m1_ci95, *passes, label))

    if results.base is not None and results.baseline is not None:
        add("base", ("", "base", None), 0, replace(results.base, learned=0.0), "untrained base")
    for cell in results.cells:
        kind = "baseline" if cell is results.baseline else "recipe"
        for row in cell.checkpoints:
            last = row is cell.final
            label = "baseline" if last and kind == "baseline" else ""
            label = shown.id if shown is not None and row is shown.rows[0] else label
            add(kind if last else f"{kind} on the way", _name(cell), step_of(row), row, label)
    for point in results.frontier:
        add("scaled baseline", ("1", "scaled baseline", None), point.scale, point)
    if not any(row.kind in ("baseline", "recipe") for row in rows):
        raise Missing("no recipe has a learned share, which needs a baseline and held-out losses")
    return Series(
        "m1_against_learned",
        "What a recipe learns and what it does to the personas",
        "Lower right is better: the recipe learned the task and kept the personas apart. Each point is a recipe at its "
        "last step, with one seed; bars are 95% bootstrap intervals over questions. Shaded: M1 < 0.95 and learned at "
        "least 0.9, where the substantive rule can pass. Solid black: the baseline at its checkpoints. Dashed grey: "
        "the baseline's last update scaled by 0 to 1. Both lines show what doing less gives, so a recipe below both "
        "keeps more than doing less would.",
        rows,
    )


@dataclass(frozen=True)
class StepRow:
    """M1 of a cell at a checkpoint; step 0 is the base."""

    phase: str
    recipe: str
    seed: int
    step: int
    m1: float
    m1_low: float
    m1_high: float


def m1_by_step(results: StudyResults) -> Series:
    """M1 at every checkpoint of every cell."""
    rows = [
        StepRow(cell.phase, bare_name(cell), cell.seed, step_of(row), row.m1, *row.m1_ci95)
        for cell in results.cells
        for row in cell.curve
    ]
    if not rows:
        raise Missing("no cell is done")
    return Series(
        "m1_by_step",
        "M1 along training",
        "Each panel shows a phase's recipes beside the unregularised baseline (black). Bands are 95% bootstrap "
        "intervals over questions. Dotted lines: M1 = 0.95, below which a recipe can pass, and M1 = 0.97, from which "
        "it counts as collapsed. The axis of steps is a square root.",
        rows,
    )


def _name(cell: CellResult) -> Name:
    return cell.phase, bare_name(cell), cell.seed


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class CosineRow:
    """The cosine of two personas' vectors in one model; `m1` is the model's."""

    model: str
    m1: float
    persona: str
    other: str
    cosine: float


def cosines(results: StudyResults, shown: RecipeResult | None, named: str | None) -> Series:
    """The cosine of every pair of personas, for the base, the baseline and the recipe that is shown."""
    baseline, protocol = results.baseline, results.protocol
    if baseline is None or protocol is None:
        raise Missing("the baseline is not done")
    models = [("base", baseline, baseline.curve[0]), ("baseline", baseline, baseline.final)]
    if shown is not None:
        models.append((shown.id, shown.cells[0], shown.rows[0]))
    third = ". No recipe learned enough to stand beside them."
    if shown is not None:
        lowest = "search found with the lowest M1 among those that learned at least 0.9"
        third = f", and the recipe that the {'verdict names' if shown.id == named else lowest}."
    return Series(
        "cosines",
        "Cosines between persona vectors",
        f"Raw cosines at layer {protocol.layer} on one scale: the untrained base, the baseline after its last step"
        + third,
        [CosineRow(name, row.m1, *pair) for name, cell, row in models
         for pair in _pairs(cell, protocol.layer, step_of(row))],
    )  # fmt: skip


def _pairs(cell: CellResult, layer: int, step: int) -> list[tuple[str, str, float]]:
    assert cell.directory is not None
    file = vectors_file(cell.directory, step)
    if not file.is_file():
        raise Missing(f"there is no {file.parent.parent.name}/{file.parent.name}/{file.name}")
    try:
        vectors = load_vectors(file, layer)
        matrix = measures.cosines(vectors.mean(layer)).tolist()  # (P, P)
    except UserError as error:
        raise Missing(str(error).replace(str(cell.directory.parent) + "/", "")) from None
    names = vectors.personas
    return [(a, b, matrix[i][j]) for i, a in enumerate(names) for j, b in enumerate(names)]


@dataclass(frozen=True)
class DecompositionRow:
    """The parts of a model's geometry; the last two are multiples of the base's variances."""

    phase: str
    recipe: str
    shared_mean_share: float | None
    between_variance: float | None
    within_variance: float | None
    between_of_base: float | None
    within_of_base: float | None


def decomposition(results: StudyResults) -> Series:
    """The shared mean's share and the variances of the base and of every recipe at its last step."""
    base = results.base
    judged = [] if base is None else [("", "base", base)]
    judged += [(cell.phase, cell.name, cell.final) for cell in results.cells if cell.result is not None]
    rows = [
        DecompositionRow(
            phase,
            name,
            row.shared_mean_share,
            row.between_variance,
            row.within_variance,
            None if base is None else _multiple(row.between_variance, base.between_variance),
            None if base is None else _multiple(row.within_variance, base.within_variance),
        )
        for phase, name, row in judged
    ]
    if len(rows) < 2 or all(row.shared_mean_share is None for row in rows):
        raise Missing("no recipe has the measures that it shows")
    return Series(
        "decomposition",
        "What the collapse consists of",
        "A raw cosine rises where the mean that all personas share grows (left; its share of the mean squared norm) "
        "or where they move together (middle; variance between personas, as a multiple of the base's). Right: how far "
        "one persona's vector moves from question to question, as a multiple of the base's. Vertical lines: the base "
        "(grey) and the baseline (black). Each recipe at its last step.",
        rows,
    )


def _multiple(own: float | None, base: float | None) -> float | None:
    return own / base if own is not None and base else None


# ---------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class MixtureRow:
    """M1 at a broad fraction: measured, fitted, or the threshold where the fit crosses 0.95 with its interval."""

    phase: str
    kind: str  # measured, fit, threshold
    recipe: str | None
    seed: int | None
    fraction: float
    m1: float
    m1_low: float | None = None  # of what is measured
    m1_high: float | None = None
    fraction_low: float | None = None
    fraction_high: float | None = None


def mixture(results: StudyResults, verdict: Verdict) -> Series:
    """M1 against the broad fraction, with the fitted curve and where it crosses 0.95."""
    reference = mixtures_reference(results)
    thresholds = {phase: found for phase, found in verdict.threshold.items() if found.points}
    mixtures = [recipe for recipe in recipe_results(results) if recipe.phase in thresholds]
    if reference is None or not mixtures:
        raise Missing("no mixture is done, or the recipe without a mixture is not done")
    rows: list[MixtureRow] = []
    for phase, found in thresholds.items():
        points = [(0.0, "nothing mixed in", reference)]
        points += [(broad_fraction(m), m.name, cell) for m in mixtures if m.phase == phase for cell in m.cells]
        for fraction, recipe, cell in points:
            final = cell.final
            rows.append(MixtureRow(phase, "measured", recipe, cell.seed, fraction, final.m1, *final.m1_ci95))
        if found.fit is not None and found.range is not None:
            low, high = found.range
            fractions = [low + (high - low) * k / (CURVE_POINTS - 1) for k in range(CURVE_POINTS)]
            rows += [MixtureRow(phase, "fit", None, None, fraction, found.fit.at(fraction)) for fraction in fractions]
        if found.fraction is not None:
            ends = found.ci95 or (None, None)
            rows.append(
                MixtureRow(phase, "threshold", None, None, found.fraction, results.bounds.passing, None, None, *ends)
            )
    return Series(
        "mixture",
        "How much broad data it takes",
        "M1 against the share of rows that broad data takes: raw text (5A) or other instructions (5B); at 0% nothing "
        "is mixed in. Of several seeds a curve m_inf + (m_0 - m_inf) exp(-f / f_0) is fitted by least "
        "squares. Where it crosses the bound, the fraction is marked with its 95% interval over questions and seeds.",
        rows,
    )
