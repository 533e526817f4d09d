"""The verdict as blocks: on the registered search by itself, then beyond it; and the findings on each hypothesis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minipersona.report.blocks import Block, Bullets, Callout, Facts, Finding, Paragraph, Tone
from minipersona.report.tables import number
from minipersona.verdict.findings import Answer, VerdictKind
from minipersona.verdict.findings import Finding as Judged
from minipersona.verdict.hypotheses import Hypothesis
from minipersona.verdict.phase_five import Question
from minipersona.verdict.recipe_results import RecipeSummary, recipe_results
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Beyond, Passers, Verdict

VERDICTS: Mapping[VerdictKind, tuple[str, Tone, str]] = {
    "positive": (
        "Positive: a recipe passes",
        "good",
        "The verdict holds for this model, these data and this measure. The section Doing less says whether the recipe "
        "does more than a smaller dose of the baseline.",
    ),
    "h_null": (
        "H_null: no tested recipe keeps the personas apart",
        "bad",
        "H_null holds for the tested space: the recipes in the table below, on one model, its data and its measure. "
        "It says that every phase has a recipe that learned enough, that all of these have collapsed, and that none "
        "that learned less keeps more than doing less would. It does not say that no recipe exists.",
    ),
    "inconclusive": (
        "Inconclusive",
        "open",
        "Neither a pass nor H_null: a phase has no recipe that learned enough and whose own ingredient had an effect, "
        "or some recipes lie between the two bounds, learned too little, or failed.",
    ),
    "no_collapse": (
        "No collapse: there is nothing to rescue",
        "open",
        "The baseline itself has not collapsed, so that the search cannot show what protects the personas.",
    ),
    "unconfirmed": (
        "Unconfirmed: a recipe passes, and fresh seeds have not confirmed it",
        "open",
        "The best of many recipes may pass by chance. A pass is a result once it passes with fresh seeds as well.",
    ),
    "not_reproduced": (
        "Not reproduced",
        "bad",
        "M1 of the untrained model differs from the predecessor's, so nothing can be concluded from the numbers below.",
    ),
    "incomplete": (
        "Incomplete",
        "open",
        "The search is not finished. The numbers below are those measured so far, and they may change.",
    ),
}
FINDING_TONES: Mapping[Answer, Tone] = {"supported": "good", "refuted": "bad"}
QUESTIONS = {
    "recovers_0.90": "Does any mixture recover 0.90?",
    "beats_steering": "Does any mixture beat preventative steering?",
    "mixin_beats_none": "Does mixing beat no mixing, where both pass on loss?",
}


def verdict_blocks(results: StudyResults, verdict: Verdict) -> Iterator[Block]:
    """The sentences, then what they count, and the recipes that decide nothing."""
    title, tone, framing = VERDICTS[verdict.verdict]
    beyond = verdict.beyond
    registered = verdict.sentence if beyond is None else verdict.sentence.removesuffix(f" {beyond.sentence}")
    yield Callout(title, registered, tone)
    if beyond is not None:
        apart, its_tone, _ = VERDICTS[beyond.verdict]
        yield Callout(f"Beyond the registered recipes. {apart}", beyond.sentence, its_tone)
    yield Paragraph(framing)
    counts = {status: sum(cell.status == status for cell in results.cells) for status in ("done", "failed", "missing")}
    gpu_hours, rule = verdict.gpu_hours, results.config.stop_rule
    yield Facts(
        [
            ("Cells", ", ".join(f"{count} {status}" for status, count in counts.items())),
            ("Recipes judged", _judged(results)),
            ("Stop rule", rule + (", but every phase is run" if results.config.exhaustive else "")),
            ("Passing the registered rule", _passers(verdict.registered)),
            ("Passing the substantive rule", _passers(verdict.substantive)),
            *([] if beyond is None else [("Passing beyond the registered recipes", _passers(beyond))]),
            ("Trade-offs", _trade_offs(verdict)),
            ("GPU hours of the cells", "not on a GPU, or not recorded" if gpu_hours is None else f"{gpu_hours:.2f}"),
        ]
    )
    close: dict[str, list[str]] = {}
    for row in verdict.close:
        close.setdefault(row.why, []).append(row.cell)
    if close:
        yield Paragraph("Recipes that decide nothing by themselves:")
        yield Bullets([f"{why}: {', '.join(cells)}" for why, cells in close.items()])


def _judged(results: StudyResults) -> str:
    """Why there are more recipes than cells: each checkpoint of phase 1 is one."""
    found = recipe_results(results)
    doses = sum(recipe.phase == "1" for recipe in found)
    if not found:
        return "none yet"
    others = f" and {len(found) - doses} other recipes at their last step" if doses < len(found) else ""
    return f"{len(found)}: the baseline at each of its {doses} checkpoints{others}"


def _passers(found: Passers | Beyond) -> str:
    return "; ".join(recipe.cell + _doubt(recipe) for recipe in found.passers) or "none"


def _doubt(recipe: RecipeSummary) -> str:
    said = [*recipe.labels, *(["confirmed"] if recipe.confirmed else [])]
    return f" ({', '.join(said)})" if said else ""


def _trade_offs(verdict: Verdict) -> str:
    said = (f"{point.cell} (M1 {point.m1:.4f}, learned {number(point.learned, '.2f')})" for point in verdict.trade_offs)
    return "; ".join(said) or "none"


def finding_blocks(found: Mapping[Hypothesis, Judged] | Mapping[Question, Judged]) -> Iterator[Block]:
    """Each claim with the verdict on it."""
    for name, judged in found.items():
        claim = f"{QUESTIONS.get(name, name + ':')} {judged.claim}"
        tone = FINDING_TONES.get(judged.verdict, "open")
        yield Finding(claim, judged.verdict, tone, judged.evidence, judged.implication)
