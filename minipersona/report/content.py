"""What the report says, in its order: the verdict, then the evidence for it, then how to reproduce it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from minipersona.report.blocks import (
    Block,
    Bullets,
    Document,
    Facts,
    Image,
    Paragraph,
    Section,
    Table,
    Verbatim,
)
from minipersona.report.drawing import phase_title
from minipersona.report.geometry import voice_shares
from minipersona.report.passer_tables import (
    layer_table,
    passer_table,
    persona_table,
    separation_table,
    transfer_table,
)
from minipersona.report.series import Series
from minipersona.report.tables import (
    behaviour_table,
    calibration_table,
    doing_less_table,
    instruction_table,
    number,
    recipe_table,
    scaling_table,
    seed_table,
)
from minipersona.report.verdict_blocks import finding_blocks, verdict_blocks
from minipersona.run.directory import PROVENANCE
from minipersona.run.provenance import Hardware, Provenance, read_provenance
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Verdict

NARROW = {"tulu": "the rows of phase 1", "em": "the emergent-misalignment rows"}
NOT_DRAWN = Paragraph(
    "The figures are left out because matplotlib is not installed. Install it with pip install 'minipersona[report]' "
    "and run python study.py report DIR again; their numbers are in figures/*.csv."
)
REPRODUCE = "pip install -e '.[data,report]'\npython study.py --config study.toml --out DIR\npython study.py report DIR"


def document(
    results: StudyResults, verdict: Verdict, series: Iterable[Series], missing: Mapping[str, str], drawn: bool
) -> Document:
    """The whole report; `series` are the figures that have their data, and `drawn` says whether they were drawn."""
    images: dict[str, Block] = {
        name: Paragraph(f"The figure {name} is left out: {reason}.") for name, reason in missing.items()
    }
    for one in series:
        undrawn = Paragraph(f"{one.title}: not drawn; its numbers are in figures/{one.name}.csv.")
        images[one.name] = Image(one.name, one.title, one.caption) if drawn else undrawn
    seeds = seed_table(results, voice_shares(results))
    less = [doing_less_table(verdict) or Paragraph("Nothing to compare yet."), scaling_table(results)]
    sections = [
        Section("Verdict", "verdict",
                [images["m1_against_learned"], *verdict_blocks(results, verdict), *([] if drawn else [NOT_DRAWN])]),
        Section("What was measured", "measured", [Facts(_measured(results))]),
        Section("Declared deviations", "deviations",
                [Bullets(verdict.deviations) if verdict.deviations else Paragraph("None.")]),
        Section("All recipes", "all-recipes",
                [recipe_table(results, verdict), images["m1_by_step"]]),
        *_passing(results, verdict, images),
        Section("Hypotheses", "hypotheses", [*finding_blocks(verdict.hypotheses)]),
        Section("Phase 5: three questions", "phase-5", [*finding_blocks(verdict.phase5), images["mixture"]]),
        Section("Geometry", "geometry", [images["cosines"], images["decomposition"]]),
        Section("Voice", "voice", [images["voice"]]),
        Section("Doing less", "doing-less", [one for one in less if one is not None]),
        *_behaviour(results),
        *_optional("Instruction following", "instruction-following", instruction_table(results)),
        Section("Calibration", "calibration-check", [*_calibration(results)]),
        Section("Spread over seeds", "spread", [seeds or Paragraph(_one_seed(results))]),
        Section("What was not run, and why", "not-run", _not_run(results, verdict)),
        Section("How to reproduce", "reproduce", [*_reproduce(results)]),
    ]  # fmt: skip
    model = "no model measured yet" if results.protocol is None else results.protocol.model
    return Document(f"Persona geometry under fine-tuning: {model}", sections)


def _passing(results: StudyResults, verdict: Verdict, images: Mapping[str, Block]) -> Iterator[Section]:
    """What each pass rests on, and how far it reaches."""
    table = passer_table(results)
    if table is None:
        return
    found = [table, images["personas"], persona_table(results, verdict), separation_table(results)]
    yield Section("Recipes that pass", "passers", [one for one in found if one is not None])
    reach = [transfer_table(results), images["transfer"], layer_table(verdict, results)]
    yield Section("Other personas and layers", "transfer", [one for one in reach if one is not None])


def _optional(title: str, anchor: str, table: Table | None) -> list[Section]:
    return [] if table is None else [Section(title, anchor, [table])]


# ---------------------------------------------------------------- what was measured, and with what


def _measured(results: StudyResults) -> list[tuple[str, str]]:
    protocol = results.protocol
    if protocol is None or results.base is None:
        return [("Measured", "nothing yet")]
    loss = None if results.baseline is None else results.baseline.final.eval_loss
    return [
        ("Model", f"{protocol.model}, revision {protocol.revision or 'none'}, computed in {protocol.compute_dtype}"),
        ("M1", f"mean raw cosine of persona vectors at layer {protocol.layer}, Method {protocol.method}"),
        ("Layer", f"{protocol.layer}: {protocol.layer_convention}"),
        ("Personas", f"{protocol.persona_set}, SHA-256 {protocol.persona_digest}"),
        ("Questions", f"{protocol.question_set}, SHA-256 {protocol.question_digest}"),
        ("Held-out rows", f"{protocol.heldout}, SHA-256 {protocol.heldout_digest}"),
        (
            "Held-out loss",
            f"{number(results.base.eval_loss)} nats per supervised token untrained, {number(loss)} after the baseline",
        ),
        ("Narrow data of phase 5", NARROW[results.config.narrow]),
        *_provenance(results),
    ]


def _provenance(results: StudyResults) -> list[tuple[str, str]]:
    """What made the cells, each value once."""
    directories = [cell.directory for cell in results.cells if cell.directory is not None]
    made = [read_provenance(directory) for directory in directories if (directory / PROVENANCE).is_file()]
    return [
        ("Data", _distinct(f"{row.source}, SHA-256 {row.digest}" for one in made for row in one.data)),
        ("Hardware", _distinct(_hardware(one.hardware) for one in made)),
        ("Versions", _distinct(_versions(one) for one in made)),
        ("Commit", _distinct(one.commit or "not recorded" for one in made)),
        ("Code digest", _distinct(one.code_digest for one in made)),
    ]


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts)) or "not recorded"


def _hardware(hardware: Hardware) -> str:
    device = hardware.cuda_device or f"CPU ({hardware.machine})"
    return f"{hardware.processes} x {device}" + (f", CUDA {hardware.cuda}" if hardware.cuda_device else "")


def _versions(made: Provenance) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in {"minipersona": made.minipersona, **made.versions}.items()
    )


# ---------------------------------------------------------------- checks

UNSCORED = (
    "The judge scored {scored} of {answers:,} answers of {models} models, which decides nothing. Name another judge in "
    'the section [behaviour] of the study\'s config, such as judge = "endpoint", and run the same command again: the '
    "answers are kept, and only the judging is repeated."
)


def _behaviour(results: StudyResults) -> Iterator[Section]:
    """The table of misaligned answers; a sentence in its place where the judge scored none."""
    suites = [suite for suite in (results.base_behaviour, *(cell.behaviour for cell in results.cells)) if suite]
    rows = [row for suite in suites for row in suite.sets.values()]
    scored, answers = sum(row.scored for row in rows), sum(row.answers for row in rows)
    table = behaviour_table(results)
    if table is None:
        return
    blocks: list[Block] = [table] if scored else []
    if 2 * scored < answers or not scored:
        said = UNSCORED.format(scored=f"{scored:,}" if scored else "none", answers=answers, models=len(suites))
        blocks.append(Paragraph(said))
    blocks.append(Paragraph(f"Judge: {_distinct(_judge(suite.judge) for suite in suites)}."))
    yield Section("Emergent and hidden misalignment", "misalignment", blocks)


def _judge(judge: Mapping[str, str | None]) -> str:
    return ", ".join(f"{key} {value}" for key, value in judge.items() if value)


def _calibration(results: StudyResults) -> Iterator[Block]:
    found = results.calibration
    if found is None:
        yield Paragraph("No calibration is recorded.")
        return
    said = {True: "Passed", False: "Failed", None: "Not decided"}[found.passed] if found.due else "Not due"
    yield Paragraph(f"{said}: {found.reason.removeprefix('not due: ')}.")
    if table := calibration_table(results):
        yield table


def _one_seed(results: StudyResults) -> str:
    seeds = ", ".join(sorted({str(cell.seed) for cell in results.cells}))
    return (
        f"Every finished recipe ran with one seed ({seeds or 'none yet'}), so how much the seed matters is not known. "
        "The intervals of this report are over questions."
    )


def _not_run(results: StudyResults, verdict: Verdict) -> list[Block]:
    blocks: list[Block] = []
    skipped = {row.phase for row in verdict.phases if row.status == "skipped"}
    skipped |= set(results.skipped_phases)
    if skipped:
        names = "; ".join(phase_title(phase) for phase in sorted(skipped))
        blocks.append(Paragraph(f"Skipped, because an earlier phase ended the search: {names}."))
    missing = [cell.id for cell in results.cells if cell.status == "missing" and cell.phase not in skipped]
    if missing:
        blocks.append(Paragraph(f"Planned, but not done yet: {', '.join(missing)}."))
    for cell in results.cells:
        if cell.status == "failed":
            blocks += [Paragraph(f"{cell.id} failed:"), Verbatim(cell.error or "no reason was recorded")]
    return blocks or [Paragraph("Every planned cell is done.")]


def _reproduce(results: StudyResults) -> Iterator[Block]:
    yield Paragraph("The config below describes the whole search. The same command continues an interrupted study.")
    yield Verbatim(REPRODUCE)
    config = results.directory / "study.toml"
    yield Verbatim(config.read_text(encoding="utf-8", errors="backslashreplace"))
