"""The verdict on a study, from what its directory holds. The first of these that applies, in this order:

    not_reproduced   the calibration was due and failed: no number of the study is to be trusted
    positive         a recipe passes by the stop rule, in a phase all of whose cells are done or failed
    incomplete       the baseline is missing, or a planned cell of a phase that was reached; or the calibration is due
                     and not in; or a pass waits for the answers of the multi-prompt evaluation
    h_null           every recipe with learned >= 0.9 has M1 >= 0.97, there is one, no cell failed and no pass is open
    inconclusive     everything else

A pass is open where the answers are in but do not decide it, for example because the judge could not score them. A
failed cell is a recipe that was tried and has no result. It might have been the exception, so it rules h_null out, and
the next run of the study tries it again; where the baseline failed, nothing can be judged and the study is incomplete.
An ineffective cell is not evidence for h_null but can be evidence against it: its M1 and its loss are those of a
recipe all the same. Once a phase has a passer, the later phases are skipped, unless the search is exhaustive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from minipersona.errors import UserError
from minipersona.records import read_record, write_record
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1
from minipersona.study_config import PHASES, STAGES
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.doing_less import DoingLess, against_doing_less, bootstrap_of, dose_curve, frontier_curve
from minipersona.verdict.findings import Finding, Nothing, VerdictKind
from minipersona.verdict.hypotheses import Hypothesis, hypotheses
from minipersona.verdict.mixture_threshold import Threshold, mixture_threshold
from minipersona.verdict.phase_five import MIXTURES, Mixture, Question, phase_five
from minipersona.verdict.recipe_results import (
    BehaviourComparison,
    RecipeResult,
    RecipeSummary,
    Rule,
    behaviour_against,
    recipe_results,
)
from minipersona.verdict.results import CellResult, StudyResults
from minipersona.verdict.summary import deviations, summary

VERDICTS: tuple[VerdictKind, ...] = get_args(VerdictKind)

# ---------------------------------------------------------------- verdict.json


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
    outcome: Literal["positive", "h_null", "inconclusive", "incomplete", "skipped", "reference"]


@dataclass(frozen=True)
class Indecisive:
    """A recipe that is evidence neither for a positive verdict nor for H_null, and why."""

    cell: str
    m1: float
    learned: float | None
    why: str


@dataclass(frozen=True)
class OpenPass:
    """A recipe whose pass the answers, which are in, leave open."""

    cell: str
    reason: str


@dataclass(frozen=True)
class FailedCell:
    """A cell without a result."""

    cell: str
    error: str | None


@dataclass(frozen=True)
class Decision:
    """How a study goes on: the verdict, and the recipe that a positive one names."""

    verdict: VerdictKind
    recipe: RecipeSummary | None


@dataclass(frozen=True)
class Verdict(Decision):
    """verdict.json. Cells and recipes are named by their ids."""

    results_digest: str  # of the results that it is about
    stop_rule: Rule
    registered: Passers
    substantive: Passers
    sentence: str  # the verdict in one paragraph
    hypotheses: dict[Hypothesis, Finding]
    phase5: dict[Question, Finding]
    phases: tuple[PhaseResult, ...]
    frontier: tuple[DoingLess, ...]  # every recipe against doing less
    threshold: dict[Mixture, Threshold]
    calibration: Calibration | Nothing
    hidden: tuple[BehaviourComparison | None, ...] | None  # of the named recipe, seed by seed
    deviations: tuple[str, ...]
    close: tuple[Indecisive, ...]
    pending: tuple[str, ...]  # recipes whose pass waits for answers
    undecided: tuple[OpenPass, ...]
    missing: tuple[str, ...]
    failed: tuple[FailedCell, ...]
    gpu_hours: float | None


def decide(results: StudyResults) -> Decision:
    """The part of the verdict that says how a study goes on. It reads no vectors."""
    recipes = recipe_results(results)
    verdict = overall(recipes, results)
    best = best_passer(recipes, results) if verdict == "positive" else None
    return Decision(verdict, None if best is None else best.summary())


def judge_study(results: StudyResults) -> Verdict:
    """The verdict on a study, finished or not. Deterministic: equal directories give equal verdicts.

    It reads the vectors of every cell, about a second each at the size of the 7B.
    """
    recipes, rule = recipe_results(results), results.config.stop_rule
    verdict = overall(recipes, results)
    best = best_passer(recipes, results) if verdict == "positive" else None
    bootstrap = bootstrap_of(results)
    frontier, dose = frontier_curve(results, bootstrap), dose_curve(results, bootstrap)
    compared = [recipe for recipe in recipes if not _is_end_of_dose(recipe, results)]
    comparisons = [row for recipe in compared for row in against_doing_less(recipe, frontier, dose, bootstrap)]
    return Verdict(
        verdict=verdict,
        recipe=None if best is None else best.summary(),
        results_digest=results.digest,
        stop_rule=rule,
        registered=_passers(recipes, "registered"),
        substantive=_passers(recipes, "substantive"),
        sentence=summary(verdict, recipes, best, comparisons, results),
        hypotheses=hypotheses(recipes, results, comparisons),
        phase5=phase_five(recipes, results, bootstrap),
        phases=_phase_results(recipes, results),
        frontier=tuple(comparisons),
        threshold={phase: mixture_threshold(recipes, phase, results, bootstrap) for phase in MIXTURES},
        calibration=results.calibration or Nothing(),
        hidden=None if best is None else tuple(behaviour_against(cell, results) for cell in best.cells),
        deviations=tuple(deviations(results)),
        close=tuple(row for recipe in recipes if (row := _indecisive(recipe))),
        pending=tuple(recipe.id for recipe in recipes if recipe.awaits_behaviour(rule)),
        undecided=tuple(OpenPass(r.id, reason) for r in recipes if (reason := r.undecided(rule))),
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


# ---------------------------------------------------------------- the verdict


def overall(recipes: Sequence[RecipeResult], results: StudyResults) -> VerdictKind:
    """The verdict by the precedence at the head of this file."""
    rule = results.config.stop_rule
    if results.calibration_due:
        passed = None if results.calibration is None else results.calibration.passed
        if passed is not True:
            return "incomplete" if passed is None else "not_reproduced"
    if passers_of_whole_phases(recipes, results):
        return "positive"
    if results.baseline is None or results.skipped_phases:  # skipped because of a passer that no longer passes
        return "incomplete"
    if any(cell.status == "missing" for cell in results.registered()):
        return "incomplete"
    if any(recipe.awaits_behaviour(rule) for recipe in recipes):
        return "incomplete"
    return _null_or_open(recipes, results.registered(), rule)


def passers_of_whole_phases(recipes: Sequence[RecipeResult], results: StudyResults) -> list[RecipeResult]:
    """The passers by the stop rule in phases of which no cell is missing: a phase is judged as a whole."""
    whole = [phase for phases in STAGES.values() if _whole(phases, results) for phase in phases]
    return [recipe for recipe in recipes if recipe.phase in whole and recipe.passes(results.config.stop_rule)]


def best_passer(recipes: Sequence[RecipeResult], results: StudyResults) -> RecipeResult | None:
    """Of the passers, the one that learned the most."""
    return max(passers_of_whole_phases(recipes, results), key=lambda recipe: recipe.merit, default=None)


def due_cells(recipes: Sequence[RecipeResult], results: StudyResults) -> list[CellResult]:
    """The planned cells except those that a passer in an earlier phase made unnecessary."""
    skipped = _skipped(recipes, results)
    return [cell for cell in results.cells if cell.phase not in skipped]


def _skipped(recipes: Sequence[RecipeResult], results: StudyResults) -> list[str]:
    """The phases after the first passer of which nothing has been run."""
    passed = {recipe.phase for recipe in passers_of_whole_phases(recipes, results)}
    skipped = list(results.skipped_phases) if passed else []
    stopped = False
    for phases in STAGES.values():
        cells = results.of_phase(*phases)
        if stopped and not results.config.exhaustive and all(cell.status == "missing" for cell in cells):
            skipped += [phase for phase in phases if results.of_phase(phase)]
        stopped = stopped or bool(passed & set(phases))
    return skipped


def _whole(phases: Sequence[str], results: StudyResults) -> bool:
    return all(cell.status != "missing" for cell in results.of_phase(*phases))


def _null_or_open(
    recipes: Sequence[RecipeResult], cells: Sequence[CellResult], rule: Rule
) -> Literal["h_null", "inconclusive"]:
    """The verdict on the whole search, or on one phase, where no cell is missing and nothing passes."""
    witnesses = any(recipe.fully_learned and not recipe.ineffective for recipe in recipes)
    collapsed = all(row.m1 >= COLLAPSED_M1 for recipe in recipes for row in recipe.fully_learned)
    failed = any(cell.status == "failed" for cell in cells)
    undecided = any(recipe.undecided(rule) for recipe in recipes)
    return "h_null" if witnesses and collapsed and not failed and not undecided else "inconclusive"


# ---------------------------------------------------------------- its parts


def _passers(recipes: Sequence[RecipeResult], rule: Rule) -> Passers:
    return Passers(tuple(recipe.summary() for recipe in recipes if recipe.passes(rule)))


def _phase_results(recipes: Sequence[RecipeResult], results: StudyResults) -> tuple[PhaseResult, ...]:
    """Every planned phase."""
    skipped = _skipped(recipes, results)
    return tuple(
        _phase_result(phase, recipes, results, phase in skipped)
        for phase in PHASES
        if results.of_phase(phase) or phase in results.skipped_phases
    )


def _phase_result(phase: str, recipes: Sequence[RecipeResult], results: StudyResults, skipped: bool) -> PhaseResult:
    rule, cells = results.config.stop_rule, results.of_phase(phase)
    judged = [recipe for recipe in recipes if recipe.phase == phase]
    passers = tuple(recipe.id for recipe in judged if recipe.passes(rule))
    ids = tuple(cell.id for cell in cells)
    missing = sum(cell.status == "missing" for cell in cells)
    if skipped:
        return PhaseResult(phase, "skipped", ids, passers, "skipped")
    if missing or not cells:
        return PhaseResult(phase, "incomplete" if missing < len(cells) else "not run", ids, passers, "incomplete")
    if phase == "EM":
        return PhaseResult(phase, "complete", ids, passers, "reference")
    if passers:
        return PhaseResult(phase, "complete", ids, passers, "positive")
    if any(recipe.awaits_behaviour(rule) for recipe in judged):
        return PhaseResult(phase, "complete", ids, passers, "incomplete")
    return PhaseResult(phase, "complete", ids, passers, _null_or_open(judged, results.registered(phase), rule))


def _indecisive(recipe: RecipeResult) -> Indecisive | None:
    """A recipe between pass and collapse, or one that kept M1 low by learning too little; None for any other."""
    if PASS_M1 <= recipe.m1 < COLLAPSED_M1:
        why = f"M1 lies between {PASS_M1:g} and {COLLAPSED_M1:g}"
    elif recipe.m1 < PASS_M1 and recipe.learned is not None and recipe.learned < LEAST_LEARNED:
        why = f"M1 is below {PASS_M1:g}, but learned is below {LEAST_LEARNED:g}"
    else:
        return None
    return Indecisive(recipe.id, recipe.m1, recipe.learned, why)


def _is_end_of_dose(recipe: RecipeResult, results: StudyResults) -> bool:
    """Whether it is the baseline's last step, in which both curves end."""
    return recipe.phase == "1" and results.baseline is not None and recipe.step == results.baseline.final.step


def _gpu_hours(cells: Sequence[CellResult]) -> float | None:
    seconds = [cell.gpu_seconds for cell in cells if cell.status == "done"]
    known = [value for value in seconds if value is not None]
    return sum(known) / 3600 if known and len(known) == len(seconds) else None
