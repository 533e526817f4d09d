"""The search: phase after phase, from the cheapest explanation to the dearest, until a recipe passes.

prepare      the study's directory, its config and every cell it may come to
search       the phases; after each, the verdict decides whether the next one runs
conclude     the guards that are due, then verdict.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import write_text
from minipersona.records import from_dict, write_record
from minipersona.run.train import resolve
from minipersona.settings import read_toml, to_toml
from minipersona.study.cell import Cell, identify
from minipersona.study.cells import cell_job
from minipersona.study.guards import base_job, behaviour_jobs, frontier_job, instruction_jobs, role_play_job, sweep_job
from minipersona.study.recipes import planned
from minipersona.study.runner import Job, Runner
from minipersona.study_config import STAGES, StudyConfig, changes
from minipersona.training.world import World
from minipersona.verdict.calibration import Calibration, check_layers_measured
from minipersona.verdict.files import Plan, PlanEntry, read_optional
from minipersona.verdict.ledger import read_ledger
from minipersona.verdict.recipe_results import recipe_results
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import Verdict, current_verdict, decide

ENDS = ("positive", "not_reproduced")  # verdicts after which no further phase is run


def study(
    config: StudyConfig,
    world: World,
    console: Console,
    *,
    stages: Sequence[str] = tuple(STAGES),
    share: tuple[int, int] = (1, 1),
) -> Verdict:
    """Carry out a study in ``config.out``, or continue it, alone or beside other runners; returns its verdict.

    UserError where the directory belongs to another study, the config names something amiss, or the baseline failed.
    """
    runner = prepare(config, world, console, share)
    search(runner, stages)
    verdict = conclude(runner)
    if error := runner.failed().get(runner.baseline.id):
        raise UserError(f"the baseline failed, so that nothing can be judged: {error}")
    return verdict


# ---------------------------------------------------------------- the directory


def prepare(config: StudyConfig, world: World, console: Console, share: tuple[int, int] = (1, 1)) -> Runner:
    """Claim the study's directory for this config: study.toml and plan.json."""
    check_layers_measured(config)
    directory = Path(config.out)
    config = replace(config, model=resolve(RunConfig(config.data, model=config.model), world.device).model)
    file = directory / "study.toml"
    if file.is_file():
        changed = changes(config, from_dict(StudyConfig, read_toml(file)))
        if changed:
            raise UserError(
                f"{directory} belongs to another study ({'; '.join(changed)}); choose another --out, or delete it"
            )
    cells = identify(planned(config))
    write_text(file, to_toml(config))
    _write_plan(directory, cells, console)
    return Runner(config, directory, cells, world, console, share)


def _write_plan(directory: Path, cells: Sequence[Cell], console: Console) -> None:
    entries = [
        PlanEntry(cell.recipe.phase, cell.recipe.name, cell.recipe.config.seed, cell.recipe.knobs, cell.id)
        for cell in cells
    ]
    file = directory / "plan.json"
    if earlier := read_optional(file, Plan):
        stale = {entry.cell for entry in earlier.cells} - {cell.id for cell in cells}
        made = [name for name in stale if (directory / "cells" / name).is_dir()]
        if made:
            console.say(f"{len(made)} cells are of another version of the code or the data, and will be made again")
    write_record(file, Plan(tuple(entries)))


# ---------------------------------------------------------------- the phases


def search(runner: Runner, stages: Sequence[str]) -> None:
    """Run the phases in order as far as they are due; the baseline is always one of them."""
    runner.complete([base_job(runner)])
    calibration = read_optional(runner.directory / "calibration.json", Calibration)
    if calibration is not None and calibration.passed is False:
        runner.console.say(f"calibration failed: {calibration.reason}")
        if not runner.config.exhaustive:
            return
    runner.complete([cell_job(runner, runner.baseline)])
    if not runner.published(runner.baseline):
        return  # without it nothing can be judged
    ended = False
    for stage, phases in STAGES.items():
        cells = [cell for cell in runner.cells if cell.recipe.phase in phases]
        if ended:
            _skip(runner, cells)
        elif stage in ("1", *stages):
            run_stage(runner, cells)
            ended = not runner.config.exhaustive and decide(read_study(runner.directory)).verdict in ENDS


def run_stage(runner: Runner, cells: Sequence[Cell]) -> None:
    """All cells of a phase; what the base model has to write for 4B beside the cells that do not need it."""
    written = [cell for cell in cells if cell.recipe.config.data.responses]
    writing = [role_play_job(runner, cell) for cell in written]
    runner.complete([*writing, *[cell_job(runner, cell) for cell in cells if cell not in written]])
    runner.complete([cell_job(runner, cell) for cell in written])


def _skip(runner: Runner, cells: Sequence[Cell]) -> None:
    """Say in the ledger that these are not run, because an earlier phase ended the search."""
    known = read_ledger(runner.directory)
    for cell in cells:
        if cell.id not in known:
            runner.note(*cell.about, "skipped")


# ---------------------------------------------------------------- the end


def conclude(runner: Runner) -> Verdict:
    """Run the guards that are due and write verdict.json."""
    tried: set[str] = set()
    while jobs := [job for job in due_guards(runner) if job.id not in tried]:
        runner.complete(jobs)  # what the answers show may make another guard due
        tried |= {job.id for job in jobs}
    return current_verdict(read_study(runner.directory))


def due_guards(runner: Runner) -> list[Job]:
    """The guards that the results so far ask for."""
    if not runner.published(runner.baseline):
        return []
    results = read_study(runner.directory)
    rule = runner.config.stop_rule
    asked = [c for c in recipe_results(results) if c.passes(rule) or c.needs_answers]
    jobs = [frontier_job(runner), *behaviour_jobs(runner, asked), *instruction_jobs(runner)]
    if recipe := decide(results).recipe:
        jobs.append(sweep_job(runner, recipe))
    return jobs
