"""verdict.json: the verdict on a study with everything that it rests on. `decision.py` has its rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from minipersona.behaviour.hidden import BehaviourComparison
from minipersona.errors import UserError
from minipersona.records import read_record, write_record
from minipersona.run.judgement import LEAST_LEARNED, TRADE_OFF_LEARNED, Bounds
from minipersona.study_config import PHASES
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.cells import CellResult
from minipersona.verdict.consistency import behaviour_against
from minipersona.verdict.decision import (
    Decision,
    Scope,
    best_passer,
    beyond,
    decision,
    due_cells,
    obstacles_to_null,
    overall,
    skipped_phases,
)
from minipersona.verdict.deviations import deviations
from minipersona.verdict.doing_less import DoingLess, against_doing_less, bootstrap_of
from minipersona.verdict.files import ChosenScales
from minipersona.verdict.findings import Finding, Nothing, RecipePoint, VerdictKind
from minipersona.verdict.hypotheses import Hypothesis, hypotheses
from minipersona.verdict.mixture_threshold import Threshold, mixture_threshold
from minipersona.verdict.obstacles import obstacles
from minipersona.verdict.personas import Personas, by_persona
from minipersona.verdict.phase_five import MIXTURES, Mixture, Question, phase_five
from minipersona.verdict.recipe_results import RecipeResult, RecipeSummary, Rule, recipe_results
from minipersona.verdict.results import StudyResults
from minipersona.verdict.summary import beyond_summary, summary

VERDICTS: tuple[VerdictKind, ...] = get_args(VerdictKind)


@dataclass(frozen=True)
class Passers:
    """The recipes that pass a rule."""

    passers: tuple[RecipeSummary, ...]


@dataclass(frozen=True)
class PhaseResult:
    """What became of a planned phase, and what it showed by itself."""

    phase: str
    status: Literal["complete", "incomplete", "not run", "skipped"]
    cells: tuple[str, ...]
    passers: tuple[str, ...]  # by the stop rule
    outcome: Literal["passed", "h_null", "inconclusive", "incomplete", "skipped", "reference"]


@dataclass(frozen=True)
class Indecisive:
    """A recipe that is evidence neither for a positive verdict nor for H_null, and why."""

    cell: str
    m1: float
    learned: float | None
    why: str


@dataclass(frozen=True)
class OpenPass:
    """A recipe whose pass is open though nothing is awaited."""

    cell: str
    reason: str


@dataclass(frozen=True)
class FailedCell:
    """A cell without a result."""

    cell: str
    error: str | None


@dataclass(frozen=True)
class Beyond(Decision):
    """The verdict on the recipes beyond the registered ones, by the same rules."""

    sentence: str = ""
    passers: tuple[RecipeSummary, ...] = ()  # by the stop rule


@dataclass(frozen=True, kw_only=True)
class Verdict(Decision):
    """verdict.json. Cells and recipes are named by their ids."""

    results_digest: str  # of the results that it is about
    stop_rule: Rule
    bounds: Bounds
    registered: Passers
    substantive: Passers
    personas: dict[str, Personas]  # of every recipe that passes a rule, and counts
    trade_offs: tuple[RecipePoint, ...]  # M1 below the bound, learned between 0.5 and 0.9; scaled baselines too
    sentence: str  # the verdict in one paragraph
    beyond: Beyond | None
    hypotheses: dict[Hypothesis, Finding]
    phase5: dict[Question, Finding]
    phases: tuple[PhaseResult, ...]
    scaling: dict[str, ChosenScales]  # phase 6D: judged, but neither confirmed nor named, since these are not cells
    frontier: tuple[DoingLess, ...]  # every recipe against doing less
    threshold: dict[Mixture, Threshold]
    calibration: Calibration | Nothing
    hidden: tuple[BehaviourComparison | None, ...] | None  # of the named recipe, seed by seed
    deviations: tuple[str, ...]
    obstacles: tuple[str, ...]  # what stands against H_null; empty where it was not asked
    close: tuple[Indecisive, ...]
    pending: tuple[str, ...]  # recipes whose pass waits for answers
    undecided: tuple[OpenPass, ...]
    missing: tuple[str, ...]
    failed: tuple[FailedCell, ...]
    gpu_hours: float | None


def judge_study(results: StudyResults) -> Verdict:
    """The verdict on a study, finished or not. Deterministic: equal directories give equal verdicts.

    It reads the vectors of every cell, about a second each at the size of the 7B.
    """
    recipes, rule = recipe_results(results), results.config.stop_rule
    bootstrap = bootstrap_of(results)
    comparisons = against_doing_less(recipes, results, bootstrap)
    kind = overall(recipes, results, lambda: comparisons)
    decided = decision(kind, recipes, results)
    best = best_passer(recipes, results) if decided.recipe is not None else None
    against = obstacles_to_null(recipes, results, comparisons) if kind in ("h_null", "inconclusive") else []
    trade_offs = _trade_offs(recipes, results)
    apart = _beyond(recipes, results, comparisons)
    further = {*(recipe.id for recipe in recipes if recipe.role == "beyond"), *results.chosen_scales}
    own_trade_offs = [point for point in trade_offs if point.cell not in further]
    said = summary(kind, recipes, best, comparisons, against, own_trade_offs, results)
    return Verdict(
        verdict=kind,
        recipe=decided.recipe,
        confirmed=decided.confirmed,
        results_digest=results.digest,
        stop_rule=rule,
        bounds=results.bounds,
        registered=_passers(recipes, results, "registered"),
        substantive=_passers(recipes, results, "substantive"),
        personas=by_persona(recipes, results),
        trade_offs=tuple(trade_offs),
        sentence=said if apart is None else f"{said} {apart.sentence}",
        beyond=apart,
        hypotheses=hypotheses(recipes, results, comparisons, bootstrap),
        phase5=phase_five(recipes, results, bootstrap),
        phases=_phase_results(recipes, results, comparisons),
        scaling=results.chosen_scales,
        frontier=tuple(comparisons),
        threshold={phase: mixture_threshold(recipes, phase, results, bootstrap) for phase in MIXTURES},
        calibration=results.calibration or Nothing(),
        hidden=None if best is None else tuple(behaviour_against(cell, results) for cell in best.cells),
        deviations=tuple(deviations(results)),
        obstacles=tuple(against),
        close=tuple(row for recipe in recipes if (row := _indecisive(recipe, results))),
        pending=tuple(recipe.id for recipe in recipes if recipe.awaits_behaviour(rule)),
        undecided=tuple(OpenPass(r.id, why) for r in recipes if (why := r.undecided(rule))),
        missing=tuple(cell.id for cell in due_cells(recipes, results) if cell.status == "missing"),
        failed=tuple(FailedCell(cell.id, cell.error) for cell in results.cells if cell.status == "failed"),
        gpu_hours=_gpu_hours(results.cells),
    )


def current_verdict(results: StudyResults) -> Verdict:
    """verdict.json of these results, judged and written anew where it is missing or about others."""
    file = results.directory / "verdict.json"
    try:
        written = read_record(file, Verdict, "run the study again")
        if written.results_digest == results.digest:
            return written
    except UserError:
        pass  # missing, or of another version
    verdict = judge_study(results)
    write_record(file, verdict)
    return verdict


# ---------------------------------------------------------------- its parts


def _passers(recipes: Sequence[RecipeResult], results: StudyResults, rule: Rule) -> Passers:
    """The registered recipes that pass, whether that counts or not: their labels say so."""
    found = [recipe for recipe in recipes if recipe.role == "registered" and recipe.passes(rule)]
    return Passers(tuple(recipe.summary() for recipe in found))


def _beyond(recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]) -> Beyond | None:
    kind = beyond(recipes, results, comparisons)
    if kind is None:
        return None
    scope: Scope = "beyond"
    best = best_passer(recipes, results, scope) if kind in ("positive", "unconfirmed") else None
    passers = [r for r in recipes if r.role == scope and r.passes(results.config.stop_rule)]
    return Beyond(
        verdict=kind,
        recipe=None if best is None else best.summary(),
        confirmed=None if best is None else best.confirmed,
        sentence=beyond_summary(kind, recipes, best, comparisons, results),
        passers=tuple(recipe.summary() for recipe in passers),
    )


def _trade_offs(recipes: Sequence[RecipeResult], results: StudyResults) -> list[RecipePoint]:
    found = [RecipePoint(r.id, r.m1, r.learned) for r in recipes if r.trade_off and r.may_be_named]
    for point in results.frontier:
        learned = point.learned
        if point.m1_ci95[1] < results.bounds.passing and learned and TRADE_OFF_LEARNED <= learned < LEAST_LEARNED:
            found.append(RecipePoint(f"the baseline's update scaled by {point.scale:g}", point.m1, learned))
    for name, one in results.chosen_scales.items():
        if one.measured.trade_off:
            found.append(RecipePoint(name, one.measured.m1, one.measured.learned))
    return sorted(found, key=lambda point: -(point.learned or 0.0))


def _phase_results(
    recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]
) -> tuple[PhaseResult, ...]:
    """Every planned phase."""
    skipped = skipped_phases(recipes, results)
    return tuple(
        _phase_result(phase, recipes, results, comparisons, phase in skipped)
        for phase in PHASES
        if results.of_phase(phase) or phase in results.skipped_phases
    )


def _phase_result(
    phase: str,
    recipes: Sequence[RecipeResult],
    results: StudyResults,
    comparisons: Sequence[DoingLess],
    skipped: bool,
) -> PhaseResult:
    rule = results.config.stop_rule
    cells = [cell for cell in results.of_phase(phase) if cell.role != "confirmation"]
    judged = [recipe for recipe in recipes if recipe.phase == phase]
    passers = tuple(recipe.id for recipe in judged if recipe.may_be_named and recipe.passes(rule))
    ids = tuple(cell.id for cell in cells)
    missing = sum(cell.status == "missing" for cell in cells)
    if skipped:
        return PhaseResult(phase, "skipped", ids, passers, "skipped")
    if missing or not cells:
        return PhaseResult(phase, "incomplete" if missing < len(cells) else "not run", ids, passers, "incomplete")
    if phase == "EM":
        return PhaseResult(phase, "complete", ids, passers, "reference")
    if passers:
        return PhaseResult(phase, "complete", ids, passers, "passed")
    if any(recipe.awaits_behaviour(rule) for recipe in judged):
        return PhaseResult(phase, "complete", ids, passers, "incomplete")
    witnesses = [] if phase == "1" else [(phase,)]
    against = obstacles(judged, cells, witnesses, results, comparisons)
    return PhaseResult(phase, "complete", ids, passers, "inconclusive" if against else "h_null")


def _indecisive(recipe: RecipeResult, results: StudyResults) -> Indecisive | None:
    """A recipe between pass and collapse, or one with a low M1 that does not pass; None for any other."""
    bounds = results.bounds
    if bounds.passing <= recipe.m1 < bounds.collapsed:
        why = f"M1 lies between {bounds.passing:.4g} and {bounds.collapsed:.4g}"
    elif any(row.mean_growth for row in recipe.rows):
        why = "M1 rises, but only because the mean that all personas share grows"
    elif recipe.m1 < bounds.passing and recipe.learned is not None and not recipe.teaches:
        why = f"M1 is below {bounds.passing:.4g}, but learned is below {LEAST_LEARNED:g}"
    else:
        return None
    return Indecisive(recipe.id, recipe.m1, recipe.learned, why)


def _gpu_hours(cells: Sequence[CellResult]) -> float | None:
    seconds = [cell.gpu_seconds for cell in cells if cell.status == "done"]
    known = [value for value in seconds if value is not None]
    return sum(known) / 3600 if known and len(known) == len(seconds) else None
