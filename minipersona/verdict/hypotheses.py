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
from typing import Any

from minipersona.run.judgement import LEAST_LEARNED, PASS_M1
from minipersona.verdict.doing_less import better_than_less
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults, Table

EARLY = 25 / 375  # of the steps: the registered step 25, on any schedule


def finding(claim: str, verdict: str, evidence: str, implication: str, numbers: dict[str, Any] | None = None) -> Table:
    """One entry of verdict.json."""
    assert verdict in ("supported", "refuted", "undecided", "not tested")
    return {
        "claim": claim,
        "verdict": verdict,
        "evidence": evidence,
        "implication": implication,
        "numbers": numbers or {},
    }


def hypotheses(found: Sequence[RecipeResult], results: StudyResults, placed: Sequence[Table]) -> dict[str, Table]:
    """H1 to H5; `placed` says which recipes are better than doing less."""
    return {"H1": _dose(results)} | {name: _family(family, found, results, placed) for name, family in FAMILIES.items()}


# ---------------------------------------------------------------- H1


def _dose(results: StudyResults) -> Table:
    claim = (
        "Collapse is monotone in training steps, and M1 is still below 0.95 at step 25 of 375 (the same share of "
        "another schedule)."
    )
    cell = results.baseline
    if cell is None:
        return finding(claim, "not tested", "The baseline is not done.", "None yet.")
    rows = [{**results.base, "step": 0}, *cell.checkpoints]
    first, last = rows[0], rows[-1]
    early = [row for row in rows[1:] if row["step"] <= EARLY * last["step"]]
    rises = last["m1_ci95"][0] > first["m1_ci95"][1]
    falls = [
        (before, after)
        for number, before in enumerate(rows)
        for after in rows[number + 1 :]
        if after["m1_ci95"][1] < before["m1_ci95"][0]
    ]
    lost = [row for row in early if row["m1"] >= PASS_M1]
    curve = ", ".join(f"{row['m1']:.4f} at step {row['step']}" for row in rows)
    evidence = f"M1 is {curve}."
    if falls:
        before, after = falls[0]
        evidence += f" From step {before['step']} to step {after['step']} it falls by more than the 95% intervals."
    elif rises:
        evidence += " No later interval lies below an earlier one."
    numbers = {
        "steps": [row["step"] for row in rows],
        "m1": [row["m1"] for row in rows],
        "learned": [row["learned"] for row in rows],
        "falls": [[before["step"], after["step"]] for before, after in falls],
        "early_steps": [row["step"] for row in early],
    }
    if not rises:
        verdict = "refuted"
        implication = "Ordinary fine-tuning did not raise M1 here, so there is no collapse to avoid."
    elif falls:
        verdict = "refuted"
        implication = "More training does not always mean more collapse: choose a checkpoint by measuring it."
    elif lost:
        verdict = "refuted"
        implication = "The personas are lost within the first steps, so stopping early does not save them."
    elif not early:
        verdict, implication = "undecided", "Measure a checkpoint within the first fifteenth of the schedule."
    else:
        verdict = "supported"
        learned = early[-1]["learned"]
        share = "an undefined share" if learned is None else f"{learned:.2f}"
        implication = f"Stopping early limits the collapse, but at step {early[-1]['step']} learned is {share}."
    return finding(claim, verdict, evidence, implication, numbers)


# ---------------------------------------------------------------- H2 to H5


@dataclass(frozen=True)
class Family:
    """A hypothesis about one kind of recipe, and what follows where no setting of it passes."""

    claim: str
    phases: tuple[str, ...]
    what: str
    refuted: str


FAMILIES = {
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
        "The collapse needs no more than a few directions a matrix, so a small adapter is no protection.",
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
        "Broad data in these shares does not hold the personas apart; more of it is another, dearer recipe.",
    ),
}


def _family(family: Family, found: Sequence[RecipeResult], results: StudyResults, placed: Sequence[Table]) -> Table:
    cells = results.of_phase(*family.phases)
    measured = [candidate for candidate in found if candidate.phase in family.phases]
    counted = [candidate for candidate in measured if not candidate.ineffective]
    if not measured and not any(cell.status == "failed" for cell in cells):
        return finding(family.claim, "not tested", "No cell of it is done.", "None yet.")
    passers = [candidate for candidate in counted if candidate.passes("substantive")]
    untested = [phase for phase in family.phases if not any(candidate.phase == phase for candidate in counted)]
    lacking = [cell.id for cell in cells if cell.status != "done"]
    pending = [candidate.id for candidate in counted if candidate.passes("substantive") is None]
    better = [candidate.id for candidate in counted if better_than_less(candidate, placed)]
    teaching = [candidate for candidate in counted if candidate.teaches()]
    if passers:
        verdict = "supported"
        implication = _advice(max(passers, key=_learned), better)
    elif untested or lacking or pending:
        verdict, implication = "undecided", f"Nothing yet: {_lack(untested, lacking, pending)}."
    else:
        verdict, implication = "refuted", _lesson(family, teaching)
    evidence = _evidence(family, counted, passers, results) + _left_out(measured, counted, lacking)
    numbers = {
        "settings": len({(cell.phase, cell.name) for cell in cells}),
        "counted": len(counted),
        "ineffective": [candidate.id for candidate in measured if candidate.ineffective],
        "passers": [candidate.id for candidate in passers],
        "lowest_m1": _brief(min(counted, key=_m1, default=None)),
        "lowest_m1_that_teaches": _brief(min(teaching, key=_m1, default=None)),
        "baseline_m1": None if results.baseline is None else results.baseline.final["m1"],
        "better_than_less": better,
    }
    return finding(family.claim, verdict, evidence, implication, numbers)


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
    if any(candidate.m1 < PASS_M1 for candidate in teaching):
        return "A setting keeps M1 below 0.95, but it fails by its loss, its answers or one of its seeds."
    return family.refuted


def _evidence(
    family: Family, counted: Sequence[RecipeResult], passers: Sequence[RecipeResult], results: StudyResults
) -> str:
    if not counted:
        return f"No {family.what} setting counts."
    teaching = [candidate for candidate in counted if candidate.teaches()]
    said = f"{len(passers)} of {len(counted)} {family.what} settings pass (M1 < 0.95 and learned >= {LEAST_LEARNED:g})"
    if teaching:
        best = min(teaching, key=_m1)
        said += f"; of those that learned enough the lowest M1 is {best.m1:.4f}, {best.id}, learned {best.learned:.2f}"
    else:
        said += "; none learned enough"
    if results.baseline is not None:
        said += f"; the baseline's is {results.baseline.final['m1']:.4f}"
    return said + "."


def _left_out(measured: Sequence[RecipeResult], counted: Sequence[RecipeResult], lacking: Sequence[str]) -> str:
    said = ""
    if len(measured) > len(counted):
        said += f" Left out as ineffective: {', '.join(c.id for c in measured if c.ineffective)}."
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


def _brief(candidate: RecipeResult | None) -> Table | None:
    return None if candidate is None else {"cell": candidate.id, "m1": candidate.m1, "learned": candidate.learned}


def _m1(candidate: RecipeResult) -> float:
    return candidate.m1


def _learned(candidate: RecipeResult) -> float:
    assert candidate.learned is not None
    return candidate.learned
