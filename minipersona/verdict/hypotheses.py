"""The five hypotheses and the three questions of phase 5, each with a verdict, its evidence and what it implies.

H1 is about the shape of the dose curve. H2 to H5 each say that one kind of change to the recipe keeps persona
geometry while it still teaches, so they are judged by the substantive rule whatever the stop rule is:

    supported    a setting passes
    refuted      every setting is measured and effective enough to count, and none passes
    undecided    something failed, is missing or waits for answers, or a phase has no effective cell
    not tested   nothing of it is measured
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minipersona.run.judgement import LEAST_LEARNED, PASS_M1
from minipersona.run.result import Checkpoint
from minipersona.verdict.doing_less import DoingLess, better_than_less
from minipersona.verdict.files import step_of
from minipersona.verdict.findings import Answer, DoseNumbers, FamilyNumbers, Finding, RecipePoint
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults

Hypothesis = Literal["H1", "H2", "H3", "H4", "H5"]
EARLY = 25 / 375  # of the steps: the registered step 25, on any schedule


def hypotheses(
    recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]
) -> dict[Hypothesis, Finding]:
    """H1 to H5; `comparisons` are the recipes against doing less."""
    findings: dict[Hypothesis, Finding] = {"H1": _dose(results)}
    for name, family in FAMILIES.items():
        findings[name] = _family(family, recipes, results, comparisons)
    return findings


# ---------------------------------------------------------------- H1


def _dose(results: StudyResults) -> Finding:
    claim = (
        "Collapse is monotone in training steps, and M1 is still below 0.95 at step 25 of 375 (the same share of "
        "another schedule)."
    )
    if results.baseline is None:
        return Finding(claim, "not tested", "The baseline is not done.", "None yet.")
    rows = results.baseline.curve
    early = [row for row in rows[1:] if step_of(row) <= EARLY * step_of(rows[-1])]
    rises = rows[-1].m1_ci95[0] > rows[0].m1_ci95[1]
    falls = [
        (step_of(before), step_of(after))
        for number, before in enumerate(rows)
        for after in rows[number + 1 :]
        if after.m1_ci95[1] < before.m1_ci95[0]
    ]
    curve = ", ".join(f"{row.m1:.4f} at step {row.step}" for row in rows)
    evidence = f"M1 is {curve}."
    if falls:
        evidence += f" From step {falls[0][0]} to step {falls[0][1]} it falls by more than the 95% intervals."
    elif rises:
        evidence += " No later interval lies below an earlier one."
    numbers = DoseNumbers(
        steps=tuple(map(step_of, rows)),
        m1=tuple(row.m1 for row in rows),
        learned=tuple(row.learned for row in rows),
        falls=tuple(falls),
        early_steps=tuple(map(step_of, early)),
    )
    verdict, implication = _dose_verdict(rises, bool(falls), early)
    return Finding(claim, verdict, evidence, implication, numbers)


def _dose_verdict(rises: bool, falls: bool, early: Sequence[Checkpoint]) -> tuple[Answer, str]:
    """The verdict on H1 and what it implies."""
    if not rises:
        return "refuted", "Ordinary fine-tuning did not raise M1 here, so there is no collapse to avoid."
    if falls:
        return "refuted", "More training does not always mean more collapse: choose a checkpoint by measuring it."
    if any(row.m1 >= PASS_M1 for row in early):
        return "refuted", "The personas are lost within the first steps, so stopping early does not save them."
    if not early:
        return "undecided", "Measure a checkpoint within the first fifteenth of the schedule."
    last = early[-1]
    share = "an undefined share" if last.learned is None else f"{last.learned:.2f}"
    return "supported", f"Stopping early limits the collapse, but at step {last.step} learned is {share}."


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
        "A regulariser, KL to the base or R3F's noise, keeps M1 below 0.95 while the recipe still teaches the task.",
        ("2A", "2B"),
        "regularised",
        "At these strengths a penalty on outputs does not hold the personas apart, so do not rely on one for that.",
    ),
    "H3": Family(
        "A lower rank keeps M1 below 0.95 while the recipe still teaches the task.",
        ("3",),
        "low-rank",
        "The collapse needs only a few directions of each matrix, so a small adapter does not prevent it.",
    ),
    "H4": Family(
        "Training on persona-conditioned data keeps M1 below 0.95 while the recipe still teaches the task.",
        ("4A", "4B"),
        "role-play",
        "Showing other personas in training does not hold the measured ones apart.",
    ),
    "H5": Family(
        "Rehearsal, broad data mixed into the narrow, keeps M1 below 0.95 while the recipe still teaches the task.",
        ("5A", "5B"),
        "rehearsal",
        "Broad data in these shares does not hold the personas apart; more of it is another, more expensive recipe.",
    ),
}


def _family(
    family: Family, recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]
) -> Finding:
    cells = results.registered(*family.phases)
    measured = [recipe for recipe in recipes if recipe.phase in family.phases]
    counted = [recipe for recipe in measured if not recipe.ineffective]
    if not measured and not any(cell.status == "failed" for cell in cells):
        return Finding(family.claim, "not tested", "None of its cells is done.", "None yet.")
    passers = [recipe for recipe in counted if recipe.passes("substantive")]
    untested = [phase for phase in family.phases if not any(recipe.phase == phase for recipe in counted)]
    lacking = [cell.id for cell in cells if cell.status != "done"]
    pending = [recipe.id for recipe in counted if recipe.passes("substantive") is None]
    better = [recipe.id for recipe in counted if better_than_less(recipe, comparisons)]
    teaching = [recipe for recipe in counted if recipe.teaches]
    verdict: Answer = "refuted"
    if passers:
        verdict, implication = "supported", _advice(max(passers, key=_learned), better)
    elif untested or lacking or pending:
        verdict, implication = "undecided", f"Nothing yet: {_lack(untested, lacking, pending)}."
    else:
        implication = _lesson(family, teaching)
    evidence = _evidence(family, counted, passers, results) + _left_out(measured, lacking)
    numbers = FamilyNumbers(
        settings=len({(cell.phase, cell.name) for cell in cells}),
        counted=len(counted),
        ineffective=tuple(recipe.id for recipe in measured if recipe.ineffective),
        passers=tuple(recipe.id for recipe in passers),
        lowest_m1=_point(min(counted, key=_m1, default=None)),
        lowest_m1_that_teaches=_point(min(teaching, key=_m1, default=None)),
        baseline_m1=None if results.baseline is None else results.baseline.final.m1,
        better_than_less=tuple(better),
    )
    return Finding(family.claim, verdict, evidence, implication, numbers)


def _advice(best: RecipeResult, better: Sequence[str]) -> str:
    advice = (
        f"{best.id} protects the personas (M1 {best.m1:.4f}) and learns {best.learned:.2f} of what the baseline does"
    )
    if best.id in better:
        return advice + ", with M1 below what simply doing less gives at equal learning: worth its cost."
    return advice + ", but it has not been shown to be better than simply doing less, which costs nothing."


def _lesson(family: Family, teaching: Sequence[RecipeResult]) -> str:
    """What follows where every setting fails, which depends on what it fails by."""
    if not teaching:
        return "These settings learn too little to show what they would do to the personas; train them for longer."
    if any(recipe.m1 < PASS_M1 for recipe in teaching):
        return "A setting keeps M1 below 0.95, but it fails by its loss, its answers or one of its seeds."
    return family.refuted


def _evidence(
    family: Family, counted: Sequence[RecipeResult], passers: Sequence[RecipeResult], results: StudyResults
) -> str:
    if not counted:
        return f"No {family.what} setting counts."
    teaching = [recipe for recipe in counted if recipe.teaches]
    said = f"{len(passers)} of {len(counted)} {family.what} settings pass (M1 < 0.95 and learned >= {LEAST_LEARNED:g})"
    if teaching:
        best = min(teaching, key=_m1)
        said += f"; of those that learned enough the lowest M1 is {best.m1:.4f}, {best.id}, learned {best.learned:.2f}"
    else:
        said += "; none learned enough"
    if results.baseline is not None:
        said += f"; the baseline's is {results.baseline.final.m1:.4f}"
    return said + "."


def _left_out(measured: Sequence[RecipeResult], lacking: Sequence[str]) -> str:
    said = ""
    if ineffective := [recipe.id for recipe in measured if recipe.ineffective]:
        said += f" Left out as ineffective: {', '.join(ineffective)}."
    if lacking:
        said += f" Not done: {', '.join(lacking)}."
    return said


def _lack(untested: Sequence[str], lacking: Sequence[str], pending: Sequence[str]) -> str:
    reasons = []
    if untested:
        reasons.append(f"phase {' and '.join(untested)} has no cell that counts")
    if lacking:
        reasons.append(f"{len(lacking)} cells are not done")
    if pending:
        reasons.append(f"{', '.join(pending)} cannot be judged yet")
    return ", ".join(reasons)


def _point(recipe: RecipeResult | None) -> RecipePoint | None:
    return None if recipe is None else RecipePoint(recipe.id, recipe.m1, recipe.learned)


def _m1(recipe: RecipeResult) -> float:
    return recipe.m1


def _learned(recipe: RecipeResult) -> float:
    assert recipe.learned is not None
    return recipe.learned
