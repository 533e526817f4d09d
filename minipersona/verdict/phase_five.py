"""The three questions that phase 5 is asked besides its passes, over the mixtures of 5A and 5B.

    recovers_0.90      does any mixture bring M1 back to 0.90, where the 7B's base is?
    beats_steering     is any mixture's M1 below that of preventative steering (5C)?
    mixin_beats_none   is any mixture's M1 below that of the same recipe with nothing mixed in, where both pass on loss?

Two recipes are compared by a paired bootstrap over questions. Each question asks for any of n mixtures, so each
interval is at the level 1 - 0.05 / n (Bonferroni): n looks must not find an exception by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from minipersona.run.judgement import MOST_LOSS_RATIO
from minipersona.verdict.doing_less import Bootstrap
from minipersona.verdict.findings import (
    Difference,
    DifferenceNumbers,
    Finding,
    Nothing,
    Numbers,
    RecoveryNumbers,
)
from minipersona.verdict.paired import difference
from minipersona.verdict.recipe_results import LEAKS, RecipeResult, mixtures_reference
from minipersona.verdict.results import StudyResults

RECOVERED = 0.90
Question = Literal["recovers_0.90", "beats_steering", "mixin_beats_none"]
Mixture = Literal["5A", "5B"]
MIXTURES: tuple[Mixture, ...] = ("5A", "5B")


def phase_five(recipes: Sequence[RecipeResult], results: StudyResults, bootstrap: Bootstrap) -> dict[Question, Finding]:
    """The three questions, each in the form of a hypothesis."""
    registered = [recipe for recipe in recipes if recipe.role == "registered"]
    mixtures = [recipe for recipe in registered if recipe.phase in MIXTURES]
    steering = [recipe for recipe in recipes if recipe.phase == "5C" and recipe.role in ("registered", "beyond")]
    complete = all(cell.status == "done" for cell in results.registered(*MIXTURES))
    return {
        "recovers_0.90": _recovers(mixtures, results, complete),
        "beats_steering": _beats_steering(mixtures, steering, results, bootstrap, complete),
        "mixin_beats_none": _beats_none(mixtures, results, bootstrap, complete),
    }


def _recovers(mixtures: Sequence[RecipeResult], results: StudyResults, complete: bool) -> Finding:
    claim = "Some mixture that learns at least 0.9 of what the baseline does brings M1 back to 0.90."
    if not mixtures or results.base is None:
        return _not_tested(claim)
    target = max(RECOVERED, results.base.m1)  # no recipe is expected to fall below the base
    recovered = [c.id for c in mixtures if c.teaches and min(row.m1_ci95[0] for row in c.rows) <= target]
    lowest = min(mixtures, key=lambda c: c.m1)
    evidence = f"The lowest M1 of {len(mixtures)} mixtures is {lowest.m1:.4f}, {lowest.id}; {_learned(lowest)}"
    evidence += f"; the base's is {results.base.m1:.4f}."
    if recovered:
        evidence += f" At {target:.4f} or below, or not distinguishable from it: {', '.join(recovered)}."
    numbers = RecoveryNumbers(target=target, lowest=lowest.id, lowest_m1=lowest.m1, recovered=tuple(recovered))
    complete = complete and any(c.teaches for c in mixtures)
    yes, no = "Mixing restores the geometry of the base.", "Mixing preserves at best a part of what is lost."
    return _answer(claim, bool(recovered), complete, evidence, yes, no, numbers)


def _beats_steering(
    mixtures: Sequence[RecipeResult],
    steering: Sequence[RecipeResult],
    results: StudyResults,
    bootstrap: Bootstrap,
    complete: bool,
) -> Finding:
    claim = "Some mixture that learns at least 0.9 of what the baseline does has a lower M1 than preventative steering."
    if not mixtures or not steering:
        return _not_tested(claim)
    complete = complete and all(cell.status == "done" for cell in results.registered("5C"))
    complete = complete and any(c.teaches for c in steering)  # steering that learned nothing is not a rival
    rival = min([c for c in steering if c.teaches] or steering, key=lambda c: c.m1)
    leaks = " (made from what is measured, an advantage)" if LEAKS in rival.labels else ""
    able = [c for c in mixtures if c.teaches]
    rows = [difference(c, rival.cells, bootstrap, 1 - 0.05 / len(able)) for c in able]
    return _comparison(
        claim,
        rows,
        f"the best steering, {rival.id}{leaks}, with M1 {rival.m1:.4f}; {_learned(rival)}",
        complete,
        "Broad data protects better than steering, at the price of the data.",
        "Steering needs no further data and keeps the personas at least as far apart as the mixtures do.",
    )


def _beats_none(
    mixtures: Sequence[RecipeResult], results: StudyResults, bootstrap: Bootstrap, complete: bool
) -> Finding:
    claim = "Some mixture has a lower M1 than the same recipe with nothing mixed in, where both pass on loss."
    reference = mixtures_reference(results)
    if not mixtures or reference is None:
        return _not_tested(claim)
    bound = _loss_bound(mixtures[0], results)
    able = [c for c in mixtures if _passes_on_loss([row.eval_loss for row in c.rows], bound)]
    if not _passes_on_loss([reference.final.eval_loss], bound):
        able = []
    rows = [difference(c, (reference,), bootstrap, 1 - 0.05 / len(able)) for c in able]
    return _comparison(
        claim,
        rows,
        f"nothing mixed in, {reference.id}, with M1 {reference.final.m1:.4f}",
        complete,
        "Mixing lowers M1 also among recipes that the bound on the loss does not distinguish.",
        "Where both pass on loss, mixing does not improve the geometry.",
    )


def _comparison(claim: str, rows: Sequence[Difference], rival: str, complete: bool, yes: str, no: str) -> Finding:
    lower = [row for row in rows if row.lower]
    if rows:
        best = min(rows, key=lambda row: row.difference)
        evidence = f"{len(lower)} of {len(rows)} mixtures lie below {rival}; the lowest difference is "
        evidence += f"{best.difference:+.4f}{_interval(best)}, {best.cell}."
    else:
        evidence = f"No mixture can be compared with {rival}: none learned enough or passes on loss."
    complete = complete and bool(rows) and all(row.lower is not None for row in rows)
    return _answer(claim, bool(lower), complete, evidence, yes, no, DifferenceNumbers(tuple(rows)))


def _passes_on_loss(losses: Sequence[float | None], bound: float | None) -> bool:
    return bound is not None and all(loss is not None and loss <= bound for loss in losses)


def _loss_bound(mixture: RecipeResult, results: StudyResults) -> float | None:
    """Twice the loss of the baseline on the rows by which mixtures are judged."""
    baseline = results.baseline_of(mixture.cells[0])
    loss = None if baseline is None else baseline.final.eval_loss
    return None if loss is None else MOST_LOSS_RATIO * loss


def _answer(claim: str, yes: bool, complete: bool, evidence: str, if_yes: str, if_no: str, numbers: Numbers) -> Finding:
    """One mixture is enough for a yes; a no needs every cell, and something to compare."""
    if yes:
        return Finding(claim, "supported", evidence, if_yes, numbers)
    if complete:
        return Finding(claim, "refuted", evidence, if_no, numbers)
    implication = "Nothing yet: what is to be compared is not measured, or learned too little."
    return Finding(claim, "undecided", evidence, implication, numbers)


def _not_tested(claim: str) -> Finding:
    return Finding(claim, "not tested", "The cells that it would compare are not done.", "None yet.", Nothing())


def _learned(recipe: RecipeResult) -> str:
    return "learned undefined" if recipe.learned is None else f"learned {recipe.learned:.2f}"


def _interval(row: Difference) -> str:
    if row.interval is None:
        return " (vectors are missing)"
    low, high = row.interval
    return f" [{low:+.4f}, {high:+.4f}]"
