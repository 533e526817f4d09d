"""M1 along training, and against the share of broad data."""

from __future__ import annotations

from dataclasses import dataclass

from minipersona.report.series import Missing, Series
from minipersona.verdict.cells import bare_name
from minipersona.verdict.files import step_of
from minipersona.verdict.mixture_threshold import broad_fraction
from minipersona.verdict.recipe_results import mixtures_reference, recipe_results
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Verdict

CURVE_POINTS = 101


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
        "intervals over questions. Dotted lines: the M1 below which a recipe can pass, and that from which it "
        "counts as collapsed. The axis of steps is a square root.",
        rows,
        results.bounds,
    )


@dataclass(frozen=True)
class MixtureRow:
    """M1 at a broad fraction: measured, fitted, or the threshold where the fit crosses the bound with its interval."""

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
    """M1 against the broad fraction, with the fitted curve and where it crosses the bound."""
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
        results.bounds,
    )
