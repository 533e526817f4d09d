"""The five hypotheses, each with a verdict, its evidence and what it implies.

H1 is about the shape of the dose curve (`dose.py`). H2 to H5 each say that one kind of change to the recipe keeps
persona geometry while it still teaches, so they are judged by the substantive rule whatever the stop rule is:

    supported    a setting passes and is confirmed by fresh seeds
    refuted      every setting is measured and effective enough to count, and none passes, or fresh seeds refute it
    undecided    something failed, is missing or waits, a pass is not confirmed, or a phase has no effective cell
    not tested   nothing of it is measured

H3 compares each low rank with the registered rank 32 at the same learning rate, whose cells are the baseline and the
references: a pass that rank 32 shares at its rate is not the rank's doing, so H3 also needs an M1 below that one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minipersona.run.judgement import LEAST_LEARNED
from minipersona.verdict.calibration import reproduced_recipe
from minipersona.verdict.cells import CellResult
from minipersona.verdict.doing_less import Bootstrap, DoingLess, better_than_less
from minipersona.verdict.dose import dose
from minipersona.verdict.findings import Answer, Difference, FamilyNumbers, Finding, RecipePoint
from minipersona.verdict.paired import difference
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults

Hypothesis = Literal["H1", "H2", "H3", "H4", "H5"]
ROLES = ("registered", "beyond")  # also what a phase runs beside its registered cells, such as R3F at other strengths


def hypotheses(
    recipes: Sequence[RecipeResult],
    results: StudyResults,
    comparisons: Sequence[DoingLess],
    bootstrap: Bootstrap,
) -> dict[Hypothesis, Finding]:
    """H1 to H5; `comparisons` are the recipes against doing less."""
    findings: dict[Hypothesis, Finding] = {"H1": dose(results)}
    for name, family in FAMILIES.items():
        findings[name] = _family(family, recipes, results, comparisons, bootstrap)
    return findings


# ---------------------------------------------------------------- H2 to H5


@dataclass(frozen=True)
class Family:
    """A hypothesis about one kind of recipe, and what follows where no setting of it passes."""

    claim: str
    phases: tuple[str, ...]
    what: str
    refuted: str


FAMILIES: dict[Hypothesis, Family] = {
    "H2": Family(
        "A regulariser, KL to the base or R3F's noise, keeps M1 below its bound while the recipe still teaches.",
        ("2A", "2B"),
        "regularised",
        "At these strengths a penalty on outputs does not hold the personas apart, so do not rely on one for that.",
    ),
    "H3": Family(
        "A lower rank keeps M1 below its bound while the recipe still teaches.",
        ("3",),
        "low-rank",
        "The collapse needs only a few directions of each matrix, so a small adapter does not prevent it.",
    ),
    "H4": Family(
        "Training on persona-conditioned data keeps M1 below its bound while the recipe still teaches.",
        ("4A", "4B"),
        "role-play",
        "Showing other personas in training does not hold the measured ones apart.",
    ),
    "H5": Family(
        "Rehearsal, broad data mixed into the narrow, keeps M1 below its bound while the recipe still teaches.",
        ("5A", "5B"),
        "rehearsal",
        "Broad data in these shares does not hold the personas apart; more of it is another, more expensive recipe.",
    ),
}


def _family(
    family: Family,
    recipes: Sequence[RecipeResult],
    results: StudyResults,
    comparisons: Sequence[DoingLess],
    bootstrap: Bootstrap,
) -> Finding:
    cells = [cell for cell in results.of_phase(*family.phases) if cell.role in ROLES]
    measured = [recipe for recipe in recipes if recipe.phase in family.phases and recipe.role in ROLES]
    counted = [recipe for recipe in measured if recipe.effective]
    if not measured and not any(cell.status == "failed" for cell in cells):
        return Finding(family.claim, "not tested", "None of its cells is done.", "None yet.")
    same_rate = _same_rate(counted, results, bootstrap) if family.phases == ("3",) else ()
    passers = [recipe for recipe in counted if recipe.passes("substantive")]
    confirmed = [recipe for recipe in passers if recipe.confirmed]
    better = [recipe.id for recipe in counted if better_than_less(recipe, comparisons)]
    teaching = [recipe for recipe in counted if recipe.teaches]
    lacks = _lacks(family, cells, counted)
    own = {row.cell: row.lower for row in same_rate}
    credited = [recipe for recipe in confirmed if family.phases != ("3",) or own.get(recipe.id)]
    verdict: Answer = "refuted"
    if credited:
        verdict, implication = "supported", _advice(max(credited, key=lambda recipe: recipe.merit), better)
    elif lacks or any(own.get(recipe.id) is None for recipe in confirmed):
        lacks = lacks or ["rank 32 at the same learning rate is not measured"]
        verdict, implication = "undecided", f"Nothing yet: {', '.join(lacks)}."
    elif confirmed:
        implication = "A low rank passes, but not because of the rank: rank 32 keeps as much at the same learning rate."
    else:
        implication = _lesson(family, teaching, results)
    evidence = _evidence(family, counted, passers, results) + _left_out(measured, cells) + _beside(same_rate, results)
    numbers = FamilyNumbers(
        settings=len({(cell.phase, cell.name) for cell in cells}),
        counted=len(counted),
        ineffective=tuple(recipe.id for recipe in measured if not recipe.effective),
        passers=tuple(recipe.id for recipe in passers),
        confirmed=tuple(recipe.id for recipe in confirmed),
        lowest_m1=_point(min(counted, key=_m1, default=None)),
        lowest_m1_that_teaches=_point(min(teaching, key=_m1, default=None)),
        baseline_m1=None if results.baseline is None else results.baseline.final.m1,
        better_than_less=tuple(better),
        against_same_rate=tuple(same_rate),
    )
    return Finding(family.claim, verdict, evidence, implication, numbers)


def _lacks(family: Family, cells: Sequence[CellResult], counted: Sequence[RecipeResult]) -> list[str]:
    """Why nothing can be refuted yet."""
    untested = [phase for phase in family.phases if not any(recipe.phase == phase for recipe in counted)]
    lacking = sum(cell.status != "done" for cell in cells)
    opened = [recipe.id for recipe in counted if recipe.passes("substantive") is None]
    passing = [recipe.id for recipe in counted if recipe.passes("substantive") and recipe.confirmed is None]
    said = [
        f"phase {' and '.join(untested)} has no cell that counts" if untested else "",
        f"{lacking} cells are not done" if lacking else "",
        f"{', '.join(opened)} cannot be judged yet" if opened else "",
        f"the pass of {', '.join(passing)} is not confirmed by fresh seeds" if passing else "",
    ]
    return [part for part in said if part]


def _advice(best: RecipeResult, better: Sequence[str]) -> str:
    advice = (
        f"{best.id} protects the personas (M1 {best.m1:.4f}) and learns {best.learned:.2f} of what the baseline does"
    )
    if best.id in better:
        return advice + ", with M1 below what simply doing less gives at equal loss: worth its cost."
    return advice + ", but it has not been shown to be better than simply doing less, which costs nothing."


def _lesson(family: Family, teaching: Sequence[RecipeResult], results: StudyResults) -> str:
    """What follows where every setting fails, which depends on what it fails by."""
    if not teaching:
        return "These settings learn too little to show what they would do to the personas; train them for longer."
    if any(recipe.m1 < results.bounds.passing for recipe in teaching):
        return "A setting keeps M1 below its bound, but it fails by another condition, its answers or one of its seeds."
    return family.refuted


def _evidence(
    family: Family, counted: Sequence[RecipeResult], passers: Sequence[RecipeResult], results: StudyResults
) -> str:
    if not counted:
        return f"No {family.what} setting counts."
    teaching = [recipe for recipe in counted if recipe.teaches]
    said = f"{len(passers)} of {len(counted)} {family.what} settings pass"
    if teaching:
        best = min(teaching, key=_m1)
        said += f"; of those that learned at least {LEAST_LEARNED:g} the lowest M1 is {best.m1:.4f}, {best.id}"
    else:
        said += f"; none learned at least {LEAST_LEARNED:g}"
    if results.baseline is not None:
        said += f"; the baseline's is {results.baseline.final.m1:.4f}"
    return said + "."


def _left_out(measured: Sequence[RecipeResult], cells: Sequence[CellResult]) -> str:
    said = ""
    if without := [f"{recipe.id} ({', '.join(recipe.labels)})" for recipe in measured if not recipe.effective]:
        said += f" Left out, since the ingredient had no effect: {', '.join(without)}."
    if lacking := [cell.id for cell in cells if cell.status != "done"]:
        said += f" Not done: {', '.join(lacking)}."
    return said


# ---------------------------------------------------------------- H3: at the same learning rate


def _same_rate(counted: Sequence[RecipeResult], results: StudyResults, bootstrap: Bootstrap) -> list[Difference]:
    """Each low rank's M1 less that of the registered rank at its learning rate, as far as that was run."""
    rows = []
    for recipe in counted:
        rivals = [cell for cell in _full_rank(results) if _rate(cell, results) == _rate(recipe.cells[0], results)]
        if rivals:
            rows.append(difference(recipe, rivals, bootstrap, 1 - 0.05 / len(counted)))
    return rows


def _full_rank(results: StudyResults) -> list[CellResult]:
    references = [cell for cell in results.cells if cell.role == "reference" and "learning_rate" in cell.knobs]
    baselines = [] if results.baseline is None else [results.baseline]
    return [*baselines, *(cell for cell in references if cell.status == "done")]


def _rate(cell: CellResult, results: StudyResults) -> float:
    return float(cell.knobs.get("learning_rate", results.config.training.learning_rate))


def _beside(rows: Sequence[Difference], results: StudyResults) -> str:
    said = ""
    if rows:
        best = min(rows, key=lambda row: row.difference)
        lower = sum(row.lower is True for row in rows)
        said += (
            f" Against rank {results.config.lora.rank} at the same learning rate {lower} of {len(rows)} have a lower "
            f"M1; the largest difference is {best.difference:+.4f}, {best.cell}."
        )
    if found := reproduced_recipe(results.cells):
        fits = "as" if found.within else "unlike"
        said += (
            f" Rank 32 at 1e-4, the predecessor's own recipe, ends at M1 {found.m1:.4f}, {fits} the predecessor's "
            f"{found.reference:.4f}."
        )
    return said


def _point(recipe: RecipeResult | None) -> RecipePoint | None:
    return None if recipe is None else RecipePoint(recipe.id, recipe.m1, recipe.learned)


def _m1(recipe: RecipeResult) -> float:
    return recipe.m1
