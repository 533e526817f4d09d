"""What the report says, in its order: the verdict first, then what it rests on, then how to make it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from minipersona.files import read_json
from minipersona.report.blocks import (
    Block,
    Bullets,
    Callout,
    Document,
    Facts,
    Finding,
    Image,
    Paragraph,
    Section,
    Tone,
    Verbatim,
)
from minipersona.report.names import Row, number, phase_title
from minipersona.report.series import Series
from minipersona.report.tables import (
    behaviour_table,
    calibration_table,
    frontier_table,
    instruction_table,
    recipe_table,
    seed_table,
    sweep_table,
)
from minipersona.verdict.findings import Finding as VerdictFinding
from minipersona.verdict.hypotheses import Hypothesis
from minipersona.verdict.phase_five import Question
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Passers, Verdict

VERDICTS: dict[str, tuple[str, Tone, str]] = {
    "positive": (
        "Positive: a recipe passes",
        "good",
        "The verdict is about this model, these data and this measure. Whether the recipe is more than doing less is "
        "a question of its own, answered under Doing less.",
    ),
    "h_null": (
        "H_null: no tested recipe keeps the personas apart",
        "bad",
        "H_null speaks of the tested space: the recipes in the table below, on one model, its data and its measure. "
        "It says that whatever learned there collapsed, not that no recipe exists.",
    ),
    "inconclusive": (
        "Inconclusive",
        "open",
        "Neither a pass nor H_null: some recipes lie between the two bounds, learned too little, or failed.",
    ),
    "not_reproduced": (
        "Not reproduced",
        "bad",
        "The untouched model does not measure as it did for the predecessor, so no number below decides anything.",
    ),
    "incomplete": (
        "Incomplete",
        "open",
        "The search is not over. Everything below is what has been measured so far and may change.",
    ),
}
NARROW = {"tulu": "the rows of phase 1", "em": "the emergent-misalignment rows"}
FINDING_TONES: Mapping[str, Tone] = {"supported": "good", "refuted": "bad"}
QUESTIONS = {
    "recovers_0.90": "Does any mixture recover 0.90?",
    "beats_steering": "Does any mixture beat preventative steering?",
    "mixin_beats_none": "Does mixing beat no mixing, where both pass on loss?",
}


def document(
    results: StudyResults, verdict: Verdict, series: Iterable[Series], missing: Mapping[str, str], drawn: bool
) -> Document:
    """The whole report; `series` are the figures that have their data, and `drawn` says whether they were drawn."""
    images: dict[str, Block] = {
        one.name: Image(one.name, one.title, one.caption)
        if drawn
        else Paragraph(f"{one.title}: not drawn; its numbers are in figures/{one.name}.csv.")
        for one in series
    }
    images |= {name: Paragraph(f"The figure {name} is left out: {reason}.") for name, reason in missing.items()}
    sections = [
        Section("Verdict", "verdict", [*_verdict(results, verdict), *([] if drawn else [NOT_DRAWN])]),
        Section("What was measured", "measured", [Facts(_facts(results))]),
        Section("Declared deviations", "deviations", _list(verdict.deviations, "None.")),
        Section(
            "All recipes",
            "all-recipes",
            [recipe_table(results, verdict), images["m1_against_learned"], images["m1_by_step"]],
        ),
        Section("Hypotheses", "hypotheses", list(_findings(verdict.hypotheses, {}))),
        Section(
            "Phase 5: three questions",
            "phase-5",
            [*_findings(verdict.phase5, QUESTIONS), images["mixture"]],
        ),
        Section("Geometry", "geometry", [images["cosines"], images["decomposition"]]),
        Section("Doing less", "doing-less", [frontier_table(verdict) or Paragraph("Nothing to compare yet.")]),
        *_suites(results),
        Section("Calibration", "calibration-check", _calibration(results)),
        Section("Spread over seeds", "spread", _seeds(results)),
        Section("What was not run, and why", "not-run", _not_run(results, verdict)),
        Section("How to reproduce", "reproduce", _reproduce(results)),
    ]
    sweep = sweep_table(results)
    if sweep is not None:
        sections.insert(7, Section("Every layer", "every-layer", [sweep]))
    model = "no model measured yet" if results.protocol is None else results.protocol.model
    return Document(f"Persona geometry under fine-tuning: {model}", sections)


NOT_DRAWN = Paragraph(
    "The figures are left out because matplotlib is not installed. Install it with pip install 'minipersona[report]' "
    "and run python study.py report DIR again; their numbers are in figures/*.csv."
)


# ---------------------------------------------------------------- the verdict


def _verdict(results: StudyResults, verdict: Verdict) -> Iterator[Block]:
    title, tone, framing = VERDICTS[verdict.verdict]
    yield Callout(title, verdict.sentence, tone)
    yield Paragraph(framing)
    counts = {status: sum(cell.status == status for cell in results.cells) for status in ("done", "failed", "missing")}
    gpu_hours, config = verdict.gpu_hours, results.config
    facts = [
        ("Cells", ", ".join(f"{count} {status}" for status, count in counts.items())),
        ("Stop rule", f"{config.stop_rule}" + (", every phase run whatever passes" if config.exhaustive else "")),
        ("Passers, registered rule", _passers(verdict.registered)),
        ("Passers, substantive rule", _passers(verdict.substantive)),
        ("GPU hours of the cells", "not on a GPU, or not recorded" if gpu_hours is None else f"{gpu_hours:.2f}"),
    ]
    yield Facts(facts)
    close: dict[str, list[str]] = {}
    for row in verdict.close:
        close.setdefault(row.why, []).append(row.cell)
    if close:
        yield Paragraph("Recipes that decide nothing by themselves:")
        yield Bullets([f"{why}: {', '.join(cells)}" for why, cells in close.items()])


def _passers(found: Passers) -> str:
    return ", ".join(recipe.cell for recipe in found.passers) or "none"


def _findings(
    found: Mapping[Hypothesis, VerdictFinding] | Mapping[Question, VerdictFinding], titles: Mapping[str, str]
) -> Iterator[Block]:
    for name, row in found.items():
        claim = f"{titles[name]} {row.claim}" if name in titles else f"{name}: {row.claim}"
        tone = FINDING_TONES.get(row.verdict, "open")
        yield Finding(claim, row.verdict, tone, row.evidence, row.implication)


def _list(items: Sequence[str], otherwise: str) -> list[Block]:
    return [Bullets(items)] if items else [Paragraph(otherwise)]


# ---------------------------------------------------------------- what was measured, and with what


def _facts(results: StudyResults) -> list[tuple[str, str]]:
    protocol = results.protocol
    if protocol is None or results.base is None:
        return [("Measured", "nothing yet")]
    made = _provenance(results)
    base = results.base.eval_loss
    last = results.baseline.final.eval_loss if results.baseline else None
    return [
        (
            "Model",
            f"{protocol.model}, revision {protocol.revision or 'none'}, computed in {protocol.compute_dtype}",
        ),
        ("M1", f"mean raw cosine of persona vectors at layer {protocol.layer}, Method {protocol.method}"),
        ("Layer", f"{protocol.layer}: {protocol.layer_convention}"),
        ("Personas", f"{protocol.persona_set}, SHA-256 {protocol.persona_digest}"),
        ("Questions", f"{protocol.question_set}, SHA-256 {protocol.question_digest}"),
        ("Held-out rows", f"{protocol.heldout}, SHA-256 {protocol.heldout_digest}"),
        ("Held-out loss", f"{number(base)} nats per supervised token untrained, {number(last)} after the baseline"),
        ("Narrow data of phase 5", NARROW[results.config.narrow]),
        ("Data", _distinct(_source(row) for one in made for row in one.get("data", []))),
        ("Hardware", _distinct(_hardware(one.get("hardware", {})) for one in made)),
        ("Versions", _distinct(_versions(one) for one in made)),
        ("Commit", _distinct(one.get("commit") or "not recorded" for one in made)),
        ("Code digest", _distinct(one.get("code_digest", "not recorded") for one in made)),
    ]


def _provenance(results: StudyResults) -> list[Row]:
    files = [cell.directory / "provenance.json" for cell in results.cells if cell.directory is not None]
    return [read_json(file) for file in files if file.is_file()]


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts)) or "not recorded"


def _source(row: Row) -> str:
    digest = row.get("digest") or row.get("sha256")
    return f"{row.get('source')}" + (f", SHA-256 {digest}" if digest else "")


def _hardware(row: Row) -> str:
    device = row.get("cuda_device") or f"CPU ({row.get('machine')})"
    return f"{row.get('processes')} x {device}" + (f", CUDA {row['cuda']}" if row.get("cuda_device") else "")


def _versions(made: Row) -> str:
    versions = {"minipersona": made.get("minipersona"), **made.get("versions", {})}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# ---------------------------------------------------------------- checks

UNSCORED = (
    "The judge gave a score to {scored:,} of {answers:,} answers, which decides nothing. Name another judge in the "
    'section [behaviour] of the study\'s config, such as judge = "endpoint", and run the same command again: the '
    "answers are kept, and only they are judged anew."
)


def _suites(results: StudyResults) -> Iterator[Section]:
    behaviour, instructions = behaviour_table(results), instruction_table(results)
    if behaviour is not None:
        suites = [results.base_behaviour, *(cell.behaviour for cell in results.cells)]
        judges = _distinct(_named(suite.judge) for suite in suites if suite)
        blocks: list[Block] = [behaviour, Paragraph(f"Judge: {judges}.")]
        rows = [row for suite in suites if suite for row in suite.sets.values()]
        scored, answers = sum(row.scored for row in rows), sum(row.answers for row in rows)
        if 2 * scored < answers:
            blocks.append(Paragraph(UNSCORED.format(scored=scored, answers=answers)))
        yield Section("Emergent and hidden misalignment", "misalignment", blocks)
    if instructions is not None:
        yield Section("Instruction following", "instruction-following", [instructions])


def _named(judge: Mapping[str, str | None]) -> str:
    return ", ".join(f"{key} {value}" for key, value in judge.items() if value not in (None, ""))


def _calibration(results: StudyResults) -> list[Block]:
    found = results.calibration
    if found is None:
        return [Paragraph("No calibration is recorded.")]
    said = {True: "Passed", False: "Failed", None: "Not decided"}[found.passed]
    if not found.due:
        said = "Not due"
    table = calibration_table(results)
    return [Paragraph(f"{said}: {found.reason}."), *([table] if table else [])]


def _seeds(results: StudyResults) -> list[Block]:
    table = seed_table(results)
    if table is not None:
        return [table]
    seeds = ", ".join(sorted({str(cell.seed) for cell in results.cells}))
    return [
        Paragraph(
            f"Every finished recipe ran with one seed ({seeds or 'none yet'}), so how far another seed would move it "
            "is not known. The intervals of this report are over questions."
        )
    ]


def _not_run(results: StudyResults, verdict: Verdict) -> list[Block]:
    blocks: list[Block] = []
    skipped = {row.phase for row in verdict.phases if row.status == "skipped"} | set(results.skipped_phases)
    if skipped:
        names = "; ".join(phase_title(phase) for phase in sorted(skipped))
        blocks.append(Paragraph(f"Skipped, because an earlier phase has a passer: {names}."))
    missing = [cell.id for cell in results.cells if cell.status == "missing" and cell.phase not in skipped]
    if missing:
        blocks.append(Paragraph(f"Planned and not there yet: {', '.join(missing)}."))
    for cell in results.cells:
        if cell.status == "failed":
            blocks += [Paragraph(f"{cell.id} failed:"), Verbatim(cell.error or "no reason was recorded")]
    return blocks or [Paragraph("Every planned cell is done.")]


def _reproduce(results: StudyResults) -> list[Block]:
    config = (results.directory / "study.toml").read_text(encoding="utf-8", errors="backslashreplace")
    return [
        Paragraph("The search is its config, below in full. The same command continues a study that was interrupted."),
        Verbatim(
            "pip install -e '.[data,report]'\npython study.py --config study.toml --out DIR\npython study.py report DIR"
        ),
        Verbatim(config),
    ]
