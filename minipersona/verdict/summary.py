"""The verdict in words: a paragraph that can be quoted by itself, on what was tested, on what, and what it showed."""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.config import SHIPPED
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import LEAST_LEARNED, is_registered
from minipersona.run.result import MeasurementProtocol
from minipersona.verdict.consistency import behaviour_against
from minipersona.verdict.deviations import without_folders
from minipersona.verdict.doing_less import DoingLess, better_than_less
from minipersona.verdict.findings import RecipePoint, VerdictKind
from minipersona.verdict.obstacles import listed
from minipersona.verdict.recipe_results import NOT_IGNITED, RecipeResult
from minipersona.verdict.results import StudyResults


def summary(
    verdict: VerdictKind,
    recipes: Sequence[RecipeResult],
    best: RecipeResult | None,
    comparisons: Sequence[DoingLess],
    against: Sequence[str],
    trade_offs: Sequence[RecipePoint],
    results: StudyResults,
) -> str:
    """One paragraph on the registered search.

    best         the passer that the verdict names
    comparisons  hold every recipe against doing less
    against      what stands against H_null
    """
    mine = [recipe for recipe in recipes if recipe.role == "registered"]
    if verdict == "not_reproduced":
        reason = (results.calibration and results.calibration.reason) or "the base model's M1 is not the predecessor's"
        return f"Not reproduced: the calibration failed ({reason}), so nothing is concluded {_setting(results)}."
    if verdict == "incomplete":
        return _joined(_incomplete(recipes, results), _caveat(results))
    if verdict == "no_collapse":
        return _joined(_no_collapse(results), _caveat(results))
    if best is not None:
        said = [_passed(verdict, mine, best, results), *_beside(best, comparisons, results)]
    elif verdict == "h_null":
        said = [_null(mine, results), _traded(trade_offs)]
    else:
        said = [_inconclusive(mine, against, results), _traded(trade_offs)]
    return _joined(*said, _caveat(results))


def beyond_summary(
    verdict: VerdictKind,
    recipes: Sequence[RecipeResult],
    best: RecipeResult | None,
    comparisons: Sequence[DoingLess],
    results: StudyResults,
) -> str:
    """What the recipes beyond the registered ones showed, in a sentence or two."""
    mine = [recipe for recipe in recipes if recipe.role == "beyond"]
    start = f"Beyond the registered recipes ({len(mine)} tested)"
    if best is not None:
        said = f"{start}, {_passes(best, results)}{_standing(best, results)}."
        missing = sum(cell.role == "beyond" and cell.status == "missing" for cell in results.cells)
        others = f"{missing} of other phases {'is' if missing == 1 else 'are'} planned and not done." if missing else ""
        return _joined(said, *_beside(best, comparisons, results), _scaled(results), others)
    said = {
        "h_null": f"{start}, none passes either.",
        "no_collapse": f"{start}, there is nothing to rescue either.",
        "incomplete": f"{start}, the search is not complete.",
    }.get(verdict, f"{start}, none passes, which is not shown of such recipes in general.")
    return _joined(said, _scaled(results))


def _scaled(results: StudyResults) -> str:
    """Which forms of phase 6D pass; empty where none does, or where the baseline itself is not to be rescued."""
    if results.baseline is None or not results.baseline.final.collapsed:
        return ""
    registered = results.config.stop_rule == "registered"
    passing = [
        name
        for name, one in results.chosen_scales.items()
        if (one.measured.registered_pass if registered else one.measured.substantive_pass)
    ]
    said = f"The baseline's update scaled down passes ({' and '.join(passing)})"
    return f"{said}{'' if registered else ', which no fresh seeds confirm'}." if passing else ""


# ---------------------------------------------------------------- a pass


def _passed(verdict: VerdictKind, recipes: Sequence[RecipeResult], best: RecipeResult, results: StudyResults) -> str:
    rule = results.config.stop_rule
    count = sum(recipe.passes(rule) is True and recipe.may_be_named for recipe in recipes)
    passing = "1 passes" if count == 1 else f"{count} pass"
    start = "There is a recipe that passes" if verdict == "positive" else "Unconfirmed: a recipe passes"
    return (
        f"{start} {_setting(results)}: {_passes(best, results)}{_standing(best, results)} ({_anchors(results)}); of "
        f"{len(recipes)} recipes tested ({_phases(recipes)}), {passing} the {rule} rule."
    )


def _passes(best: RecipeResult, results: StudyResults) -> str:
    learned = "an undefined share" if best.learned is None else f"{best.learned:.2f}"
    personas = best.mean("learned_personas")
    under = "" if personas is None else f" ({personas:.2f} under the measured personas)"
    return (
        f"{best.id} keeps M1 at {best.m1:.4f}, below {results.bounds.passing:.4g}, and learns {learned} of what the "
        f"baseline learns{under}"
    )


def _standing(best: RecipeResult, results: StudyResults) -> str:
    """Whether fresh seeds confirm the pass."""
    if results.config.stop_rule == "registered":
        return ""
    fresh = () if best.confirmation is None else best.confirmation.rows
    passed = sum(row.substantive_pass is True for row in fresh)
    if best.confirmed:
        return f", and passes again with each of {len(fresh)} fresh seeds"
    if best.confirmed is False:
        chance = "as one of many recipes it may have passed by chance"
        return f", but of {len(fresh)} fresh seeds it passes with {passed} only: {chance}"
    if not best.fresh_wanted or not fresh:
        return ", but it was not run with fresh seeds, and as one of many recipes it may pass by chance"
    return f", but of the {best.fresh_wanted} fresh seeds that would confirm it {passed} have passed"


def _beside(best: RecipeResult, comparisons: Sequence[DoingLess], results: StudyResults) -> list[str]:
    """What else a reader has to know of the recipe, as further sentences."""
    return [_less(best, comparisons), _ignited(best), _misalignment(best, results)]


def _less(best: RecipeResult, comparisons: Sequence[DoingLess]) -> str:
    """Whether the recipe is more than doing less."""
    if not best.passes("substantive"):
        return f"It does not pass the substantive rule ({_first_shortfall(best)}), so this shows little."
    better = better_than_less(best, comparisons)
    if better:
        return "Its M1 lies below that of the baseline's scaled update at equal loss: it is more than doing less."
    if better is False:
        return "Its M1 is not shown to lie below that of the baseline's scaled update at equal loss: doing less may do."
    reasons = {row.reason for row in comparisons if row.recipe == best.id and row.reason}
    return f"Whether it is more than doing less cannot be said: {' and '.join(sorted(reasons))}."


def _first_shortfall(best: RecipeResult) -> str:
    return next((said for row in best.rows for said in row.shortfalls), "its answers leave it open")


def _ignited(best: RecipeResult) -> str:
    if NOT_IGNITED not in best.labels:
        return ""
    return "With it the harmful rows did not make the model misaligned on any prompt set, as they do unmixed."


def _misalignment(best: RecipeResult, results: StudyResults) -> str:
    """What the multi-prompt evaluation says against the recipe, as a further sentence; empty where it is consistent."""
    answers = [behaviour_against(cell, results) for cell in best.cells]
    known = [compared for compared in answers if compared is not None]
    if any(compared.consistent is False for compared in known):
        return "Under the multi-prompt evaluation it is more often misaligned than the base."
    if reasons := [compared.reason for compared in known if compared.consistent is None]:
        return f"Whether it hides misalignment is not known: {reasons[0]}."
    if len(known) < len(answers) and "behaviour" not in results.config.suites:
        return "Whether it hides misalignment is not known: the answers were switched off."
    if len(known) < len(answers):
        return "Whether it hides misalignment is not known: its answers or the base's are not in."
    return ""


# ---------------------------------------------------------------- no pass


def _no_collapse(results: StudyResults) -> str:
    baseline, base = results.baseline, results.base
    assert baseline is not None and base is not None
    final, bounds = baseline.final, results.bounds
    said = f"No collapse {_setting(results)}: "
    if final.mean_growth:
        said += (
            f"M1 of the baseline rises from {base.m1:.4f} to {final.m1:.4f}, but only because the mean that all "
            f"personas share grows; the variance between them is {final.spread:.2f} of the base's"
        )
    else:
        said += f"the baseline ends at M1 {final.m1:.4f} (base {base.m1:.4f}), below {bounds.collapsed:.4g}"
    said += ", so there is nothing to rescue, and no recipe can be credited with keeping the personas apart."
    if results.protocol is not None and is_registered(results.protocol):
        said += " This contradicts the predecessor, whose fine-tuned models of this kind all ended at 0.97 or more."
    return said


def _null(recipes: Sequence[RecipeResult], results: StudyResults) -> str:
    taught = [recipe for recipe in recipes if recipe.taught_rows]
    lowest = min(taught, key=lambda recipe: recipe.m1)
    return (
        f"H_null holds within the tested space {_setting(results)}: of {len(recipes)} recipes ({_phases(recipes)}), "
        f"all {len(taught)} that learned at least {LEAST_LEARNED:g} of what the baseline learns have collapsed, with "
        f"M1 >= {results.bounds.collapsed:.4g} ({_anchors(results)}; the lowest is {lowest.m1:.4f}, {lowest.id}), "
        "every phase has one of them, and no recipe that learned less keeps more than doing less would. As far as "
        "these recipes go the collapse is a property of SFT itself; other recipes, models and data were not tested."
    )


def _inconclusive(recipes: Sequence[RecipeResult], against: Sequence[str], results: StudyResults) -> str:
    said = "; ".join(against) or "nothing was tested"
    return (
        f"Inconclusive {_setting(results)}: of {len(recipes)} recipes ({_phases(recipes)}) none passes the "
        f"{results.config.stop_rule} rule, yet H_null is not shown either ({_anchors(results)}). "
        f"{said[0].upper() + said[1:]}."
    )


def _traded(trade_offs: Sequence[RecipePoint]) -> str:
    """The trade-offs that remain; those that learned the most come first."""
    if not trade_offs:
        return ""
    named = [f"{point.cell} (M1 {point.m1:.4f}, learned {point.learned:.2f})" for point in trade_offs]
    return f"What can be had is a trade-off, less learned for a lower M1: {listed(named, 3)}."


def _incomplete(recipes: Sequence[RecipeResult], results: StudyResults) -> str:
    missing = sum(cell.status == "missing" for cell in results.cells)
    pending = [recipe.id for recipe in recipes if recipe.awaits_behaviour(results.config.stop_rule)]
    uncalibrated = results.calibration_due and (results.calibration is None or results.calibration.passed is None)
    failed = any((cell.phase, cell.role, cell.status) == ("1", "registered", "failed") for cell in results.cells)
    lacks = [
        f"{missing} of {len(results.cells)} planned cells are not done" if missing else "",
        f"phases {', '.join(results.skipped_phases)} were skipped under another rule" if results.skipped_phases else "",
        "the baseline failed" if failed else "",
        f"the answers of the multi-prompt evaluation are not in for {listed(pending)}" if pending else "",
        "the calibration is not in" if uncalibrated else "",
    ]
    said = "; ".join(lack for lack in lacks if lack) or "nothing is measured"
    return f"Incomplete: nothing is concluded yet {_setting(results)}, since {said}. Run the study again to continue."


# ---------------------------------------------------------------- its parts


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _setting(results: StudyResults) -> str:
    """What was tested on what, in words."""
    protocol, config = results.protocol, results.config
    if protocol is None:
        return f"on {without_folders(config.model.name)}"
    narrow = ", in phase 5 on emergent-misalignment data" if config.narrow == "em" else ""
    return (
        f"on {without_folders(str(protocol.model))} (layer {protocol.layer}, Method {protocol.method}, "
        f"{_sets(protocol)}, fine-tuned on {without_folders(config.data.train)}{narrow})"
    )


def _sets(protocol: MeasurementProtocol) -> str:
    personas, questions = protocol.persona_set, protocol.question_set
    if personas == questions and personas in (SHIPPED, REGISTERED):
        return f"the {personas} personas and questions"
    return " and ".join(
        f"the {name} {what}" if name in (SHIPPED, REGISTERED) else f"the {what} of {without_folders(name)}"
        for name, what in ((personas, "personas"), (questions, "questions"))
    )


def _phases(recipes: Sequence[RecipeResult]) -> str:
    stages = sorted({recipe.phase[0] for recipe in recipes})
    return f"phase {stages[0]}" if len(stages) == 1 else f"phases {', '.join(stages[:-1])} and {stages[-1]}"


def _anchors(results: StudyResults) -> str:
    assert results.base is not None
    said = f"base {results.base.m1:.4f}"
    if results.baseline is not None:
        said += f", baseline {results.baseline.final.m1:.4f}"
    return said


def _caveat(results: StudyResults) -> str:
    if results.protocol is not None and str(results.protocol.model).startswith(("tiny", "random:")):
        return "This model stands in for a real one: it tests the tool and is not evidence about large models."
    return ""
