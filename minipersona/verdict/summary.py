"""The verdict in words: one paragraph that can be quoted by itself, and where the study departs from its registration.

The paragraph says what was tested, on what, and what it showed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from minipersona.config import DEFAULT_MODEL, SHIPPED
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1
from minipersona.run.result import Protocol
from minipersona.settings import flatten, load_config
from minipersona.study_config import BEYOND, STAGES, StudyConfig
from minipersona.verdict.doing_less import DoingLess, better_than_less
from minipersona.verdict.findings import VerdictKind
from minipersona.verdict.recipe_results import FULLY_LEARNED, RecipeResult, behaviour_against
from minipersona.verdict.results import StudyResults


def summary(
    verdict: VerdictKind,
    recipes: Sequence[RecipeResult],
    best: RecipeResult | None,
    comparisons: Sequence[DoingLess],
    results: StudyResults,
) -> str:
    """One paragraph; `best` is the passer that a positive verdict names, `comparisons` hold it against doing less."""
    if verdict == "not_reproduced":
        reason = (results.calibration and results.calibration.reason) or "the base model's M1 is not the predecessor's"
        return f"Not reproduced: the calibration failed ({reason}), so nothing is concluded {_setting(results)}."
    if verdict == "positive":
        assert best is not None
        said = _positive(recipes, best, results) + _beside_doing_less(best, comparisons) + _misalignment(best, results)
    else:
        said = {"h_null": _null, "inconclusive": _inconclusive, "incomplete": _incomplete}[verdict](recipes, results)
    return " ".join(part for part in (said, _caveat(results)) if part)


def _positive(recipes: Sequence[RecipeResult], best: RecipeResult, results: StudyResults) -> str:
    rule = results.config.stop_rule
    learned = "an undefined share" if best.learned is None else f"{best.learned:.2f}"
    passers = sum(recipe.passes(rule) is True for recipe in recipes)
    passing = "1 passes" if passers == 1 else f"{passers} pass"
    return (
        f"There is a recipe that passes {_setting(results)}: {best.id} keeps M1 at {best.m1:.4f}, below "
        f"{PASS_M1:g}, and learns {learned} of what the baseline learns ({_anchors(results)}); of {len(recipes)} "
        f"recipes tested ({_phases(recipes)}), {passing} the {rule} rule and this one learned the most."
    )


def _beside_doing_less(best: RecipeResult, comparisons: Sequence[DoingLess]) -> str:
    """Whether the recipe is more than doing less, as a further sentence."""
    better = better_than_less(best, comparisons)
    if not best.passes("substantive"):
        return f" It does not pass the substantive rule (learned >= {LEAST_LEARNED:g}), so this shows little."
    if best.phase == "1" and best.rows[0] is best.cells[0].final:
        return " It is the baseline itself: ordinary fine-tuning does not collapse the personas here."
    if better:
        return " Its M1 lies below that of the baseline's scaled update at equal learning: it is more than doing less."
    if better is False:
        return " Its M1 is not below that of the baseline's scaled update at equal learning: doing less does as well."
    reasons = {row.reason for row in comparisons if row.recipe == best.id and row.reason}
    return f" Whether it is more than doing less cannot be said: {' and '.join(sorted(reasons))}."


def _misalignment(best: RecipeResult, results: StudyResults) -> str:
    """What the multi-prompt evaluation says against the recipe, as a further sentence; empty where it is consistent."""
    answers = [behaviour_against(cell, results) for cell in best.cells]
    known = [compared for compared in answers if compared is not None]
    if any(compared.consistent is False for compared in known):
        return " Under the multi-prompt evaluation it is more often misaligned than the base."
    if reasons := [compared.reason for compared in known if compared.consistent is None]:
        return f" Whether it hides misalignment is not known: {reasons[0]}."
    if len(known) < len(answers) and "behaviour" not in results.config.suites:
        return " Whether it hides misalignment is not known: the answers were switched off."
    if len(known) < len(answers):
        return " Whether it hides misalignment is not known: its answers or the base's are not in."
    return ""


def _null(recipes: Sequence[RecipeResult], results: StudyResults) -> str:
    learned = [recipe for recipe in recipes if recipe.fully_learned]
    lowest = min(learned, key=lambda recipe: recipe.m1)
    return (
        f"H_null holds within the tested space {_setting(results)}: of {len(recipes)} recipes ({_phases(recipes)}), "
        f"all {len(learned)} that learned at least {FULLY_LEARNED:g} of what the baseline learns have "
        f"M1 >= {COLLAPSED_M1:g} ({_anchors(results)}; the lowest is {lowest.m1:.4f}, {lowest.id}). As far as these "
        "recipes go the collapse is a property of SFT itself; other recipes, models and data were not tested."
    )


def _inconclusive(recipes: Sequence[RecipeResult], results: StudyResults) -> str:
    rule = results.config.stop_rule
    between = [recipe.id for recipe in recipes if PASS_M1 <= recipe.m1 < COLLAPSED_M1]
    hollow = [recipe.id for recipe in recipes if recipe.m1 < PASS_M1 and not recipe.teaches]
    undecided = [(recipe.id, reason) for recipe in recipes if (reason := recipe.undecided(rule))]
    judged = [r for r in recipes if r.m1 < PASS_M1 and r.teaches and not r.undecided(rule)]
    unstable = [recipe.id for recipe in judged if recipe.passes("substantive") is not True]
    failed = [cell.id for cell in results.cells if cell.status == "failed"]
    reasons = [
        f"M1 lies between {PASS_M1:g} and {COLLAPSED_M1:g}: {_listed(between)}" if between else "",
        f"M1 is below {PASS_M1:g}, but too little was learned: {_listed(hollow)}" if hollow else "",
        f"M1 is below {PASS_M1:g}, but loss, consistency or a seed fails: {_listed(unstable)}" if unstable else "",
        f"the multi-prompt evaluation leaves the pass of {_listed([name for name, _ in undecided])} open, since "
        f"{undecided[0][1]}"
        if undecided
        else "",
        f"no result: {_listed(failed)}" if failed else "",
    ]
    said = "; ".join(reason for reason in reasons if reason) or "no recipe learned enough to decide"
    return (
        f"Inconclusive {_setting(results)}: of {len(recipes)} recipes ({_phases(recipes)}) none passes the "
        f"{rule} rule, yet H_null is not shown either ({_anchors(results)}). {said[0].upper() + said[1:]}."
    )


def _incomplete(recipes: Sequence[RecipeResult], results: StudyResults) -> str:
    missing = sum(cell.status == "missing" for cell in results.cells)
    pending = [recipe.id for recipe in recipes if recipe.awaits_behaviour(results.config.stop_rule)]
    uncalibrated = results.calibration_due and (results.calibration is None or results.calibration.passed is None)
    lacks = [
        f"{missing} of {len(results.cells)} planned cells are not done" if missing else "",
        f"phases {', '.join(results.skipped_phases)} were skipped under another rule" if results.skipped_phases else "",
        "the baseline failed" if any(c.phase == "1" and c.status == "failed" for c in results.cells) else "",
        f"the answers of the multi-prompt evaluation are not in for {_listed(pending)}" if pending else "",
        "the calibration is not in" if uncalibrated else "",
    ]
    said = "; ".join(lack for lack in lacks if lack) or "nothing is measured"
    return f"Incomplete: nothing is concluded yet {_setting(results)}, since {said}. Run the study again to continue."


# ---------------------------------------------------------------- its parts


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


def _sets(protocol: Protocol) -> str:
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


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


# ---------------------------------------------------------------- deviations

# Settings with a sentence of their own, and those that are left to whoever runs the search.
TOLD_OTHERWISE = ("out", "narrow", "stop_rule", "exhaustive", "seeds", "model.", "execution.", "probe.personas",
                  "probe.questions", "rehearsal.em", "recipe")  # fmt: skip


def deviations(results: StudyResults) -> list[str]:
    """One sentence each."""
    said = []
    protocol, config = results.protocol, results.config
    if config.stop_rule == "substantive":
        hollow = ": the untrained base passes it" if results.base is not None and results.base.registered_pass else ""
        said.append(
            f"The search stops at a substantive pass, which asks for learned >= {LEAST_LEARNED:g} besides the "
            f"registered rule. A pass by that rule alone does not show that a recipe teaches{hollow}."
        )
    if protocol is not None and protocol.model != DEFAULT_MODEL:
        said.append(f"The model is {without_folders(str(protocol.model))}; {DEFAULT_MODEL} is registered.")
    if protocol is not None and {protocol.persona_set, protocol.question_set} != {REGISTERED}:
        said.append("The personas and questions are not both the registered ones.")
    seeds = sorted({cell.seed for cell in results.cells})
    if protocol is not None and seeds != [42]:
        listed = ", ".join(map(str, seeds))
        said.append(f"The seeds are {listed}; 42 is registered. A recipe passes where every seed of it passes.")
    if config.narrow == "em":
        said.append(
            "In phase 5 the narrow rows are the emergent-misalignment ones, while loss and learned are those on the "
            "held-out rows, as everywhere: learned says nothing about how well the narrow rows are learned."
        )
    if settings := changed_settings(config):
        said.append(f"Settings that are not the registered ones (in brackets): {', '.join(settings)}.")
    planned = {cell.phase for cell in results.cells} | set(results.skipped_phases)
    left_out = [stage for stage, phases in STAGES.items() if stage != BEYOND and not planned & set(phases)]
    if protocol is not None and left_out:
        said.append(f"Not part of this study: phase {', '.join(left_out)}.")
    return said


def changed_settings(config: StudyConfig) -> list[str]:
    """The settings that differ from the shipped study's, as ``key = value (registered)``."""
    mine = flatten(config)
    return [
        f"{key} = {_shown(mine[key])} ({_shown(value)})"
        for key, value in flatten(load_config("study", StudyConfig)).items()
        if not key.startswith(TOLD_OTHERWISE) and _shown(mine[key]) != _shown(value)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return without_folders(value) or '""' if isinstance(value, str) else str(value)


def without_folders(name: str) -> str:
    """A source or a model without the folders that it lies in: what is published does not say whose disk it was.

    ``jsonl:/data/rows.jsonl[0:9]`` -> ``rows.jsonl[0:9]``; a hub id, ``tiny`` or ``tulu[0:6000]`` stays as it is.
    """
    return re.sub(r"^(jsonl:|parquet:)(.*/)?|^(random:)?(?=[/.~]).*/", r"\3", name)
