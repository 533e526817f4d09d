"""The verdict in one paragraph that can be quoted by itself: what was tested, on what, and what it showed."""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.config import SHIPPED
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1
from minipersona.verdict.calibration import calibration_due
from minipersona.verdict.doing_less import better_than_less
from minipersona.verdict.recipe_results import FULLY_LEARNED, RecipeResult, behaviour_against
from minipersona.verdict.results import StudyResults, Table
from minipersona.verdict.wording import without_folders


def sentence(
    verdict: str,
    found: Sequence[RecipeResult],
    recipe: RecipeResult | None,
    placed: Sequence[Table],
    results: StudyResults,
) -> str:
    """One paragraph; `recipe` is the passer that a positive verdict names, `placed` the recipes against doing less."""
    if verdict == "not_reproduced":
        reason = results.calibration.get("reason") or "the base model's M1 is not the predecessor's"
        return f"Not reproduced: the calibration failed ({reason}), so nothing is concluded {_setting(results)}."
    body = {"positive": _positive, "h_null": _null, "inconclusive": _inconclusive, "incomplete": _incomplete}[verdict]
    return " ".join(part for part in (body(found, recipe, placed, results), _caveat(results)) if part)


def _positive(
    found: Sequence[RecipeResult], recipe: RecipeResult | None, placed: Sequence[Table], results: StudyResults
) -> str:
    assert recipe is not None
    learned = "an undefined share" if recipe.learned is None else f"{recipe.learned:.2f}"
    passers = sum(c.passes(results.stop_rule) is True for c in found)
    said = (
        f"There is a recipe that passes {_setting(results)}: {recipe.id} keeps M1 at {recipe.m1:.4f}, below "
        f"{PASS_M1:g}, and learns {learned} of what the baseline learns ({_anchors(results)}); of {len(found)} recipes "
        f"tested ({_phases(found)}), {passers} pass the {results.stop_rule} rule and this one learned the most."
    )
    better = better_than_less(recipe, placed)
    if not recipe.passes("substantive"):
        said += f" It does not pass the substantive rule (learned >= {LEAST_LEARNED:g}), so this shows little."
    elif recipe.phase == "1" and recipe.rows[0] is recipe.cells[0].checkpoints[-1]:
        said += " It is the baseline itself: ordinary fine-tuning does not collapse the personas here."
    elif better:
        said += " Its M1 lies below that of the baseline's scaled update at equal learning: it is more than doing less."
    elif better is False:
        said += " Its M1 is not below that of the baseline's scaled update at equal learning: doing less does as well."
    else:
        reasons = {row["reason"] for row in placed if row["recipe"] == recipe.id and row["reason"]}
        said += f" Whether it is more than doing less cannot be said: {' and '.join(sorted(reasons))}."
    answers = [behaviour_against(cell, results) for cell in recipe.cells]
    if any(found is not None and found["consistent"] is False for found in answers):
        said += " Under the multi-prompt evaluation it is more often misaligned than the base."
    elif opened := [found["reason"] for found in answers if found is not None and found["consistent"] is None]:
        said += f" Whether misalignment hides in it is not known: {opened[0]}."
    elif None in answers:
        said += " Whether misalignment hides in it is not known: its answers or the base's are not in."
    return said


def _null(
    found: Sequence[RecipeResult], recipe: RecipeResult | None, placed: Sequence[Table], results: StudyResults
) -> str:
    learned = [c for c in found if c.fully_learned]
    lowest = min(learned, key=lambda c: c.m1)
    return (
        f"H_null holds within the tested space {_setting(results)}: of {len(found)} recipes ({_phases(found)}), all "
        f"{len(learned)} that learned at least {FULLY_LEARNED:g} of what the baseline learns have "
        f"M1 >= {COLLAPSED_M1:g} ({_anchors(results)}; the lowest is {lowest.m1:.4f}, {lowest.id}). As far as these "
        "recipes go the collapse is a property of SFT itself; other recipes, models and data were not tested."
    )


def _inconclusive(
    found: Sequence[RecipeResult], recipe: RecipeResult | None, placed: Sequence[Table], results: StudyResults
) -> str:
    between = [c.id for c in found if PASS_M1 <= c.m1 < COLLAPSED_M1]
    hollow = [c.id for c in found if c.m1 < PASS_M1 and not c.teaches()]
    undecided = [(c.id, reason) for c in found if (reason := c.undecided(results.stop_rule))]
    judged = [c for c in found if c.m1 < PASS_M1 and c.teaches() and not c.undecided(results.stop_rule)]
    unstable = [c.id for c in judged if c.passes("substantive") is not True]
    failed = [cell.id for cell in results.cells if cell.status == "failed"]
    reasons = [
        f"M1 lies between {PASS_M1:g} and {COLLAPSED_M1:g}: {_listed(between)}" if between else "",
        f"M1 is below {PASS_M1:g}, but too little was learned: {_listed(hollow)}" if hollow else "",
        f"M1 is below {PASS_M1:g}, but loss, consistency or a seed fails: {_listed(unstable)}" if unstable else "",
        f"the multi-prompt evaluation leaves the pass open of {_listed([name for name, _ in undecided])}, since "
        f"{undecided[0][1]}"
        if undecided
        else "",
        f"no result: {_listed(failed)}" if failed else "",
    ]
    said = "; ".join(reason for reason in reasons if reason) or "no recipe learned enough to decide"
    return (
        f"Inconclusive {_setting(results)}: of {len(found)} recipes ({_phases(found)}) none passes the "
        f"{results.stop_rule} rule, yet H_null is not shown either ({_anchors(results)}). {said[0].upper() + said[1:]}."
    )


def _incomplete(
    found: Sequence[RecipeResult], recipe: RecipeResult | None, placed: Sequence[Table], results: StudyResults
) -> str:
    missing = sum(cell.status == "missing" for cell in results.cells)
    pending = [c.id for c in found if c.awaits_behaviour(results.stop_rule)]
    lacks = [
        f"{missing} of {len(results.cells)} planned cells are not done" if missing else "",
        f"phases {', '.join(results.skipped_phases)} were skipped under another rule" if results.skipped_phases else "",
        "the baseline failed" if any(c.phase == "1" and c.status == "failed" for c in results.cells) else "",
        f"the answers of the multi-prompt evaluation are not in for {_listed(pending)}" if pending else "",
        "the calibration is not in" if calibration_due(results) and results.calibration.get("passed") is None else "",
    ]
    said = "; ".join(lack for lack in lacks if lack) or "nothing is measured"
    return f"Incomplete: nothing is concluded yet {_setting(results)}, since {said}. Run the study again to go on."


def _setting(results: StudyResults) -> str:
    """What was tested on what, in words."""
    protocol, config = results.protocol, results.config
    if not protocol:
        return f"on {without_folders(config.get('model', {}).get('name', 'the model'))}"
    data = without_folders(config.get("data", {}).get("train", "the narrow data"))
    narrow = ", in phase 5 on emergent-misalignment data" if results.narrow == "em" else ""
    return (
        f"on {without_folders(str(protocol.get('model')))} (layer {protocol.get('layer')}, Method "
        f"{protocol.get('method')}, {_sets(protocol)}, fine-tuned on {data}{narrow})"
    )


def _sets(protocol: Table) -> str:
    personas, questions = (str(protocol.get(f"{what}_set")) for what in ("persona", "question"))
    if personas == questions and personas in (SHIPPED, REGISTERED):
        return f"the {personas} personas and questions"
    return " and ".join(
        f"the {name} {what}" if name in (SHIPPED, REGISTERED) else f"the {what} of {without_folders(name)}"
        for name, what in ((personas, "personas"), (questions, "questions"))
    )


def _phases(found: Sequence[RecipeResult]) -> str:
    stages = sorted({c.phase[0] for c in found})
    return f"phase {stages[0]}" if len(stages) == 1 else f"phases {', '.join(stages[:-1])} and {stages[-1]}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _anchors(results: StudyResults) -> str:
    said = f"base {results.base['m1']:.4f}"
    if results.baseline is not None:
        said += f", baseline {results.baseline.final['m1']:.4f}"
    return said


def _caveat(results: StudyResults) -> str:
    if str(results.protocol.get("model")).startswith(("tiny", "random:")):
        return "This model stands in for a real one: it tests the tool and is no evidence about large models."
    return ""
