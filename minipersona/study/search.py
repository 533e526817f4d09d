"""The search: phase after phase, from the cheapest explanation to the dearest, until a recipe passes.

open_study   the study's directory, its config and every cell that it may come to
search       the phases; after each, the verdict decides whether the next one is run
conclude     the measurements that the results ask for, then verdict.json

The driver of a study is the process that runs this. It holds the lock on the directory, and nobody else hands out
jobs there or writes its ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import sweep_temporaries, write_text
from minipersona.locks import lock
from minipersona.records import from_dict, write_record
from minipersona.run.resources import resolve
from minipersona.settings import read_toml, to_toml
from minipersona.study.cell import Cell, Study, hash_cells
from minipersona.study.engine import Engine
from minipersona.study.executors import Executor
from minipersona.study.jobs import AskSuite, MeasureBase, MeasureEveryLayer, MeasureFrontier, TrainCell, WriteResponses
from minipersona.study.recipes import check_planned, planned
from minipersona.study.worker import Job
from minipersona.study_config import STAGES, StudyConfig, changes
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.files import Plan, PlanEntry, read_optional
from minipersona.verdict.ledger import LedgerEntry, append, read_ledger
from minipersona.verdict.recipe_results import RecipeResult, recipe_results
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import Verdict, current_verdict, decide

ENDS = ("positive", "not_reproduced")  # verdicts after which no further phase is run
MUCH_RAW_TEXT = 0.25  # of the rows; from here on a cell reports how well it follows instructions


def run_study(
    config: StudyConfig,
    executor: Executor,
    console: Console,
    *,
    stages: Sequence[str] = tuple(STAGES),
    report: Callable[[Path], object] = lambda directory: None,
) -> Verdict:
    """Carry out a study in ``config.out``, or continue it; returns its verdict.

    stages  the phases to run, the baseline beside them; of all, a pass ends the search
    report  writes the report of a study's directory, whatever the verdict is

    UserError where another process has the directory or it belongs to another study, where the config names something
    amiss, and where the baseline failed.
    """
    check_planned(config)
    with lock(Path(config.out)):
        study = open_study(config, executor.device_type, console)
        due = [cell for cell in study.cells if cell == study.baseline or stage_of(cell) in stages]
        engine = Engine(study, executor, console, due)
        search(engine, stages)
        verdict = conclude(engine)
        report(study.directory)
    if error := engine.failures.get(study.baseline.id):
        raise UserError(f"the baseline failed, so that nothing can be judged: {error}")
    return verdict


def stage_of(cell: Cell) -> str:
    """Which of the phases 1 to 6 a cell belongs to."""
    return next(stage for stage, phases in STAGES.items() if cell.recipe.phase in phases)


# ---------------------------------------------------------------- the directory


def open_study(config: StudyConfig, device_type: str, console: Console) -> Study:
    """Write study.toml and plan.json into the study's directory. UserError where it belongs to another study."""
    directory = Path(config.out)
    resolved = resolve(RunConfig(config.data, model=config.model), torch.device(device_type))
    config = replace(config, model=resolved.model)
    file = directory / "study.toml"
    if file.is_file():
        changed = changes(config, from_dict(StudyConfig, read_toml(file)))
        if changed:
            raise UserError(
                f"{directory} belongs to another study ({'; '.join(changed)}); choose another --out, or delete it"
            )
    study = Study(config, directory, hash_cells(planned(config)))
    sweep_temporaries(directory)
    write_text(file, to_toml(config))
    _write_plan(study, console)
    return study


def _write_plan(study: Study, console: Console) -> None:
    plan = Plan(
        tuple(
            PlanEntry(r.phase, r.name, r.config.seed, r.knobs, cell.id, r.role)
            for cell in study.cells
            for r in [cell.recipe]
        )
    )
    file = study.directory / "plan.json"
    if earlier := read_optional(file, Plan):
        ids, names = {entry.cell for entry in plan.cells}, {(entry.phase, entry.name) for entry in plan.cells}
        stale = [e.cell for e in earlier.cells if (e.phase, e.name) in names and e.cell not in ids]
        made = [name for name in stale if (study.directory / "cells" / name).is_dir()]
        if made:
            console.say(f"{len(made)} cells are of another version of the code or the data, and will be made again")
    write_record(file, plan)


# ---------------------------------------------------------------- the phases


def search(engine: Engine, stages: Sequence[str]) -> None:
    """Run the phases in order as far as they are due; the baseline is always one of them.

    Of all, those after a passer are skipped. A choice of some is run whatever passes.
    """
    study = engine.study
    engine.complete([MeasureBase(study)])
    calibration = read_optional(study.directory / "calibration.json", Calibration)
    if calibration is not None and calibration.passed is False:
        engine.console.say(f"calibration failed: {calibration.reason}")
        if not study.config.exhaustive:
            return
    engine.complete([TrainCell(study, study.baseline)])
    if not study.published(study.baseline):
        return  # without it nothing can be judged
    chosen = set(stages) < set(STAGES)
    ended = False
    for stage in STAGES:
        cells = [cell for cell in study.cells if stage_of(cell) == stage]
        if ended and not (chosen and stage in stages):
            _skip(study, cells)
        elif stage in ("1", *stages):
            run_stage(engine, cells)
            if not study.config.exhaustive:
                ended = ended or decide(read_study(study.directory)).verdict in ENDS


def run_stage(engine: Engine, cells: Sequence[Cell]) -> None:
    """All cells of a phase; what the base model has to write for some beside those that do not need it."""
    written = [cell for cell in cells if cell.recipe.config.data.responses]
    writing = {job.id: job for job in (WriteResponses(engine.study, cell) for cell in written)}
    engine.complete([*writing.values(), *[TrainCell(engine.study, cell) for cell in cells if cell not in written]])
    engine.complete([TrainCell(engine.study, cell) for cell in written])


def _skip(study: Study, cells: Sequence[Cell]) -> None:
    """Say in the ledger that these are not run, because an earlier phase ended the search."""
    known = read_ledger(study.directory).keys()
    for cell in cells:
        if cell.id not in known:
            entry = LedgerEntry(time.time(), cell.id, cell.recipe.phase, cell.recipe.name, "skipped", 0)
            append(study.directory, entry)


# ---------------------------------------------------------------- the end


def conclude(engine: Engine) -> Verdict:
    """Measure what the results ask for and write verdict.json."""
    tried: set[str] = set()
    while jobs := [job for job in asked_for(engine.study) if job.id not in tried]:
        engine.complete(jobs)  # what the answers show may ask for more
        tried |= {job.id for job in jobs}
    return current_verdict(read_study(engine.study.directory))


def asked_for(study: Study) -> list[Job]:
    """What the results so far ask for besides the cells."""
    if not study.published(study.baseline):
        return []
    results = read_study(study.directory)
    rule = study.config.stop_rule
    asked = [found for found in recipe_results(results) if found.passes(rule) or found.needs_answers]
    jobs: list[Job] = [MeasureFrontier(study)]
    if "behaviour" in study.config.suites:
        jobs += _behaviour(study, asked)
    if "instructions" in study.config.suites:
        jobs += _instructions(study)
    if recipe := decide(results).recipe:
        cell = next(cell for cell in study.cells if cell.hash == recipe.hashes[0])
        jobs.append(MeasureEveryLayer(study, cell, recipe.step, recipe.name))
    return jobs


def _behaviour(study: Study, asked: Sequence[RecipeResult]) -> list[Job]:
    """Answers of these recipes, and of what they are compared with: the base, the unmixed EM cell."""
    if not asked:
        return []
    by_hash = {cell.hash: cell for cell in study.cells}
    unmixed = [cell for cell in study.cells if cell.recipe.phase == "EM" and study.published(cell)]
    steps: dict[str, int | None] = {cell.hash: None for cell in unmixed}
    for found in sorted(asked, key=lambda found: found.merit):  # of several steps the best is asked
        steps |= {result.hash: found.step for result in found.cells}
    return [
        AskSuite(study, "behaviour"),
        *[AskSuite(study, "behaviour", by_hash[key], step) for key, step in steps.items()],
    ]


def _instructions(study: Study) -> list[Job]:
    """Instruction following of the cells with much raw text, beside base and baseline."""
    due = [cell for cell in study.cells if _much_raw_text(cell) and study.published(cell)]
    if not due:
        return []
    cells = (study.baseline, *due)
    return [AskSuite(study, "instructions"), *[AskSuite(study, "instructions", cell) for cell in cells]]


def _much_raw_text(cell: Cell) -> bool:
    return cell.recipe.phase == "5A" and float(cell.recipe.knobs["broad_fraction"]) >= MUCH_RAW_TEXT
