"""The verdict on a study. The first of these that holds:

    not_reproduced   the calibration was due and failed: no number of the study is to be trusted
    incomplete       the baseline is missing, or a planned cell of a phase that was reached, or a fresh seed; or the
                     calibration is due and not in; or a pass waits for the answers of the multi-prompt evaluation
    no_collapse      the baseline itself has not collapsed, so that there is nothing to rescue
    positive         a recipe passes, and is confirmed by fresh seeds
    unconfirmed      a recipe passes, and is not
    h_null           nothing stands against it (`obstacles`)
    inconclusive     something does

With the registered stop rule a pass is one by that rule, to the letter, and asks for no confirmation. A phase is judged
when all of its cells are in. The phases after one that ended the search, by a pass or by a baseline that has not
collapsed, are not due, unless the search is exhaustive or they were begun. Recipes beyond the registered ones are
judged by the same rules apart from these, and never decide about them; of them a whole phase can be positive by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from minipersona.study_config import PHASES, STAGES
from minipersona.verdict.cells import CellResult
from minipersona.verdict.doing_less import DoingLess, against_doing_less, bootstrap_of
from minipersona.verdict.findings import VerdictKind
from minipersona.verdict.obstacles import obstacles
from minipersona.verdict.recipe_results import RecipeResult, RecipeSummary, recipe_results
from minipersona.verdict.results import StudyResults

Scope = Literal["registered", "beyond"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
WITNESSED = ("2", "3", "4", "5")  # the registered phases that must each bear witness for H_null


@dataclass(frozen=True)
class Decision:
    """How a study goes on: the verdict, the recipe that it names, and whether fresh seeds confirmed that."""

    verdict: VerdictKind
    recipe: RecipeSummary | None
    confirmed: bool | None = None


def decide(results: StudyResults) -> Decision:
    """The part of the verdict that says how a study goes on. It reads vectors only where nothing passes or lacks."""
    recipes = recipe_results(results)
    verdict = overall(recipes, results, lambda: against_doing_less(recipes, results, bootstrap_of(results)))
    return decision(verdict, recipes, results)


def decision(verdict: VerdictKind, recipes: Sequence[RecipeResult], results: StudyResults) -> Decision:
    """The verdict with the recipe that it names, if it is one that names one."""
    best = best_passer(recipes, results) if verdict in ("positive", "unconfirmed") else None
    return Decision(verdict, None) if best is None else Decision(verdict, best.summary(), best.confirmed)


def overall(
    recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Callable[[], Sequence[DoingLess]]
) -> VerdictKind:
    """The verdict on the registered search; `comparisons` are the recipes against doing less."""
    rule, baseline = results.config.stop_rule, results.baseline
    if results.calibration_due:
        passed = None if results.calibration is None else results.calibration.passed
        if passed is not True:
            return "incomplete" if passed is None else "not_reproduced"
    if baseline is None or (results.skipped_phases and not ended_in(recipes, results)):
        return "incomplete"  # skipped because of a passer that no longer passes
    if any(cell.status == "missing" and cell.role != "beyond" for cell in due_cells(recipes, results)):
        return "incomplete"
    if any(recipe.may_be_named and recipe.awaits_behaviour(rule) for recipe in recipes if recipe.role != "beyond"):
        return "incomplete"
    if not baseline.final.collapsed:
        return "no_collapse"
    if best := best_passer(recipes, results):
        return "positive" if settled(best, results) else "unconfirmed"
    return "inconclusive" if obstacles_to_null(recipes, results, comparisons()) else "h_null"


def beyond(
    recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]
) -> VerdictKind | None:
    """The same on the recipes beyond the registered ones; None where none of them was planned or begun.

    A pass in a phase that is in counts though a recipe of another phase is missing, as with `--phases 6`.
    """
    cells = [cell for cell in results.cells if cell.role == "beyond"]
    if all(cell.status == "missing" for cell in cells):
        return None
    mine = [recipe for recipe in recipes if recipe.role == "beyond"]
    waits = any(recipe.may_be_named and recipe.awaits_behaviour(results.config.stop_rule) for recipe in mine)
    best = best_passer(recipes, results, "beyond")
    lacks = best is None and any(cell.status == "missing" for cell in cells)
    if results.baseline is None or waits or lacks:
        return "incomplete"
    if not results.baseline.final.collapsed:
        return "no_collapse"
    if best is not None:
        return "positive" if settled(best, results) else "unconfirmed"
    phases = [(phase,) for phase in PHASES if any(cell.phase == phase for cell in cells)]
    against = obstacles(mine, cells, phases, results, comparisons, points=results.chosen_points)
    return "inconclusive" if against else "h_null"


def obstacles_to_null(
    recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]
) -> list[str]:
    """What stands against H_null in the registered search; nothing where it holds."""
    mine = [recipe for recipe in recipes if recipe.role != "beyond"]
    phases = [STAGES[stage] for stage in WITNESSED]
    return obstacles(mine, results.registered(), phases, results, comparisons, points=results.scaled)


# ---------------------------------------------------------------- passers


def passers_of_whole_phases(
    recipes: Sequence[RecipeResult], results: StudyResults, scope: Scope = "registered"
) -> list[RecipeResult]:
    """The passers by the stop rule that count, in phases of which no cell is missing: a phase is judged as a whole."""
    whole = [phase for phases in STAGES.values() if _whole(phases, results) for phase in phases]
    return [
        recipe
        for recipe in recipes
        if recipe.role == scope
        and recipe.phase in whole
        and recipe.may_be_named
        and recipe.passes(results.config.stop_rule)
    ]


def awaiting_confirmation(recipes: Sequence[RecipeResult], results: StudyResults) -> list[RecipeResult]:
    """The passers that are to be run with fresh seeds, or with more of them; those that fresh seeds refuted are not."""
    if results.config.stop_rule == "registered" or not results.config.confirmations:
        return []
    passers = [recipe for scope in SCOPES for recipe in passers_of_whole_phases(recipes, results, scope)]
    return [recipe for recipe in passers if recipe.confirmed is None]


def settled(recipe: RecipeResult, results: StudyResults) -> bool:
    """Whether its pass needs nothing more."""
    return results.config.stop_rule == "registered" or recipe.confirmed is True


def best_passer(
    recipes: Sequence[RecipeResult], results: StudyResults, scope: Scope = "registered"
) -> RecipeResult | None:
    """Of the passers a confirmed one, else one that fresh seeds did not refute; of these the one that learned most."""
    rank = {True: 2, None: 1, False: 0}
    passers = passers_of_whole_phases(recipes, results, scope)
    return max(passers, key=lambda recipe: (rank[recipe.confirmed], *recipe.merit), default=None)


# ---------------------------------------------------------------- which cells are due


def due_cells(recipes: Sequence[RecipeResult], results: StudyResults) -> list[CellResult]:
    """The planned cells except those of phases after the one that ended the search."""
    skipped = skipped_phases(recipes, results)
    return [cell for cell in results.cells if cell.phase not in skipped]


def skipped_phases(recipes: Sequence[RecipeResult], results: StudyResults) -> list[str]:
    """The phases after the one that ended the search of which nothing has been run."""
    last = ended_in(recipes, results)
    if last is None:
        return []
    skipped = list(results.skipped_phases)
    for stage, phases in STAGES.items():
        begun = any(cell.status != "missing" for cell in results.of_phase(*phases))
        if stage > last and not begun and not results.config.exhaustive:
            skipped += [phase for phase in phases if results.of_phase(phase)]
    return skipped


def ended_in(recipes: Sequence[RecipeResult], results: StudyResults) -> str | None:
    """The phase, 1 to 5, that ended the search; None where none did."""
    if results.baseline is not None and not results.baseline.final.collapsed:
        return "1"
    unasked = not results.config.confirmations
    ends = {r.phase for r in passers_of_whole_phases(recipes, results) if settled(r, results) or unasked}
    return next((stage for stage, phases in STAGES.items() if ends & set(phases)), None)


def _whole(phases: Sequence[str], results: StudyResults) -> bool:
    return all(cell.status != "missing" for cell in results.of_phase(*phases) if cell.role != "confirmation")
