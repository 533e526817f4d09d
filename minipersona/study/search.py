"""The search: phase after phase, from the cheapest explanation to the dearest, until a recipe passes.

open_study   the study's directory, its config and every cell that it may come to
search       the phases; after each, its passers are confirmed and the verdict decides whether the next one is run
confirm      the passers once more, with fresh seeds
conclude     the measurements that the results ask for, then verdict.json

The driver of a study is the process that runs this. It holds the lock on the directory, and nobody else hands out
jobs there or writes its ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

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
from minipersona.study.confirmation import confirmation_cells, stored_confirmations
from minipersona.study.engine import Engine
from minipersona.study.executors import Executor
from minipersona.study.jobs import (
    MeasureBase,
    MeasureFrontier,
    MeasureMatchedScale,
    MeasureScaling,
    MeasureTransfer,
    TrainCell,
    WriteResponses,
)
from minipersona.study.matched_scale import matches
from minipersona.study.model_jobs import AskSuite, AskVoice
from minipersona.study.recipes import WRITTEN, Recipe, check_planned, planned
from minipersona.study.worker import Job
from minipersona.study_config import BEYOND, STAGES, StudyConfig, changes
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.decision import Scope, awaiting_confirmation, decide, passers_of_whole_phases, settled
from minipersona.verdict.files import Plan, PlanEntry, read_optional
from minipersona.verdict.ledger import LedgerEntry, append, read_ledger
from minipersona.verdict.recipe_results import RecipeResult, recipe_results
from minipersona.verdict.results import StudyResults, read_study
from minipersona.verdict.verdict import Verdict, current_verdict

PLAN = "plan.json"
ENDS = ("not_reproduced", "no_collapse", "positive")  # verdicts after which no further phase is run
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
        due = [cell for cell in study.cells if confirms(cell) or stage_of(cell) in ("1", *stages)]
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


def confirms(cell: Cell) -> bool:
    """Whether a cell confirms a pass; such cells belong to no stage of the search."""
    return cell.recipe.role == "confirmation"


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
    if earlier := read_optional(directory / PLAN, Plan):
        study = replace(study, cells=(*study.cells, *stored_confirmations(study, earlier)))
        ids = {cell.id for cell in study.cells}
        names = {(cell.recipe.phase, cell.recipe.name) for cell in study.cells}
        stale = [entry.cell for entry in earlier.cells if (entry.phase, entry.name) in names and entry.cell not in ids]
        made = [name for name in stale if (directory / "cells" / name).is_dir()]
        if made:
            console.say(
                f"{len(made)} of the cells there are of other code, data or settings than now, and will be made again"
            )
    sweep_temporaries(directory)
    write_text(file, to_toml(config))
    _write_plan(study)
    return study


def _write_plan(study: Study) -> None:
    plan = Plan(
        tuple(
            PlanEntry(
                phase=cell.recipe.phase,
                name=cell.recipe.name,
                seed=cell.recipe.config.seed,
                knobs=cell.recipe.knobs,
                cell=cell.id,
                role=cell.recipe.role,
            )
            for cell in study.cells
        )
    )
    write_record(study.directory / PLAN, plan)


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
    due = [cell for cell in study.cells if stage_of(cell) in ("1", *stages) and not confirms(cell)]
    beside: list[Job] = [AskVoice(study)]  # what is asked of the base whatever comes of the baseline
    if study.config.exhaustive:
        beside += writing(study, due)
    engine.complete([TrainCell(study, study.baseline), *beside])
    if not study.published(study.baseline):
        return  # without it nothing can be judged
    if study.config.exhaustive:  # no pass ends the search, so that no phase waits for another
        run_stage(engine, due)
        confirm(engine)
        return
    chosen = set(stages) < set(STAGES)
    ends = ENDS if study.config.confirmations else (*ENDS, "unconfirmed")
    ended = False
    for stage in STAGES:
        cells = [cell for cell in study.cells if stage_of(cell) == stage and not confirms(cell)]
        if ended and not (chosen and stage in stages):
            _skip(study, cells)
        elif stage in ("1", *stages):
            run_stage(engine, cells)
            confirm(engine)
            ended = ended or decide(read_study(study.directory)).verdict in ends


def run_stage(engine: Engine, cells: Sequence[Cell]) -> None:
    """All of these cells; first those that need neither what the base model writes nor the unmixed cell."""
    study = engine.study
    later = [cell for cell in cells if cell.recipe.config.data.responses in WRITTEN or cell.recipe.against_unmixed]
    engine.complete([*writing(study, cells), *[TrainCell(study, cell) for cell in cells if cell not in later]])
    engine.complete([TrainCell(study, cell) for cell in later])


def writing(study: Study, cells: Sequence[Cell]) -> list[WriteResponses]:
    """What the base model writes for these cells, each once."""
    jobs = [WriteResponses(study, cell) for cell in cells if cell.recipe.config.data.responses in WRITTEN]
    return list({job.id: job for job in jobs}.values())


def confirm(engine: Engine) -> None:
    """Run the recipes that pass again with fresh seeds, after what they are judged against with the same seeds.

    A pass that is not repeated does not end the search.
    """
    study = engine.study
    if not study.config.confirmations:
        return
    results = read_study(study.directory)
    by_hash = {cell.hash: cell for cell in study.cells}
    passers = awaiting_confirmation(recipe_results(results), results)
    due = confirmation_cells(study, [by_hash[found.cells[0].hash] for found in passers])
    if new := [cell for cell in due if cell not in study.cells]:
        engine.add(new)
        _write_plan(engine.study)
    run_stage(engine, [cell for cell in due if cell.recipe.is_baseline])
    run_stage(engine, [cell for cell in due if not cell.recipe.is_baseline])


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
        engine.complete(jobs)
        tried |= {job.id for job in jobs}
        confirm(engine)  # what the answers show may complete a pass, and that ask for more
    return current_verdict(read_study(engine.study.directory))


def asked_for(study: Study) -> list[Job]:
    """What the results so far ask for besides the cells."""
    if not study.published(study.baseline):
        return []
    results = read_study(study.directory)
    rule = study.config.stop_rule
    recipes = recipe_results(results)
    asked = [found for found in recipes if found.passes(rule) or found.needs_answers]
    asked += [again for found in asked if (again := found.confirmation) is not None and again.needs_answers]
    frontier, voice = MeasureFrontier(study), AskVoice(study)
    jobs: list[Job] = [frontier, voice]
    if any(stage_of(cell) == BEYOND and study.published(cell) for cell in study.cells):
        jobs.append(MeasureScaling(study))
    if frontier.done():  # from whose points the search for a scale begins
        jobs += [MeasureMatchedScale(study, cell, step) for cell, step in matches(study, results)]
    if "behaviour" in study.config.suites:
        jobs += _behaviour(study, asked)
    if "instructions" in study.config.suites:
        jobs += _instructions(study)
    compared = _compared(study, recipes, results)
    by_hash = {cell.hash: cell for cell in study.cells}
    jobs += [MeasureTransfer(study, by_hash[key], step or _last(by_hash[key])) for key, step in compared.items()]
    if voice.done():  # the base's own responses are what every model is asked about
        # Of a baseline the last step is what others are compared with, even where an earlier one passes.
        baselines = {cell.hash: None for cell in study.cells if cell.recipe.is_baseline and study.published(cell)}
        jobs += [AskVoice(study, by_hash[key], step) for key, step in (compared | baselines).items()]
    return jobs


def _compared(study: Study, recipes: Sequence[RecipeResult], results: StudyResults) -> dict[str, int | None]:
    """The cells that are measured on other personas, by hash, with the step (None: the last).

    They are every seed of the recipes that are settled, and the recipes that the config names.
    """
    every = [one for found in _settled(recipes, results) for one in (found, found.confirmation) if one is not None]
    named = [found for found in recipes if found.step is None and found.id in study.config.transfer.recipes]
    return {cell.hash: found.step for found in (*named, *every) for cell in found.cells}


def _settled(recipes: Sequence[RecipeResult], results: StudyResults) -> list[RecipeResult]:
    """The passers that are confirmed or, where nothing is to be confirmed, all of them; the best comes last."""
    registered, beyond = (passers_of_whole_phases(recipes, results, scope) for scope in get_args(Scope))
    unasked = not results.config.confirmations
    found = [recipe for recipe in (*registered, *beyond) if unasked or settled(recipe, results)]
    return sorted(found, key=lambda recipe: recipe.merit)


def _last(cell: Cell) -> int:
    return cell.recipe.config.training.steps


def _behaviour(study: Study, asked: Sequence[RecipeResult]) -> list[Job]:
    """Answers of these recipes, and of what they are compared with: the base, the unmixed EM cell."""
    if not asked:
        return []
    by_hash = {cell.hash: cell for cell in study.cells}
    unmixed = [cell for cell in study.cells if cell.recipe.is_unmixed and study.published(cell) and not confirms(cell)]
    steps: dict[str, int | None] = {cell.hash: None for cell in unmixed}
    for found in sorted(asked, key=lambda found: found.merit):  # of several steps the best is asked
        steps |= {result.hash: found.step for result in found.cells}
    return [
        AskSuite(study, "behaviour"),
        *[AskSuite(study, "behaviour", by_hash[key], step) for key, step in steps.items()],
    ]


def _instructions(study: Study) -> list[Job]:
    """Instruction following of the cells with much raw text, beside base and baseline."""
    due = [cell for cell in study.cells if much_raw_text(cell.recipe) and study.published(cell)]
    if not due:
        return []
    cells = (study.baseline, *due)
    return [AskSuite(study, "instructions"), *[AskSuite(study, "instructions", cell) for cell in cells]]


def much_raw_text(recipe: Recipe) -> bool:
    """Whether a cell's instruction following is asked for."""
    return recipe.phase == "5A" and float(recipe.knobs["broad_fraction"]) >= MUCH_RAW_TEXT
