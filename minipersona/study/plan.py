"""What a study will take, said before it starts: every recipe with its parameters, tokens, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from minipersona.config import RunConfig
from minipersona.run.plan import (
    GIB,
    disk_lines,
    duration,
    kept_bytes,
    plan_device,
    rolling_bytes,
    vectors_bytes,
)
from minipersona.run.resources import Kind, kind_of, resolve
from minipersona.run.times import Times
from minipersona.settings import flatten, to_toml
from minipersona.study.estimate import Comparison, Cost, Estimate
from minipersona.study.frontier import SCALES
from minipersona.study.recipes import Recipe, check_planned, planned, standard_config
from minipersona.study.scaling import measurements
from minipersona.study_config import BEYOND, STAGES, StudyConfig

SMALL = 1 / 6  # what a measurement that chooses scales takes of a whole one; so it is with its prompts
PATHS = ("out", "probe.baseline")


def study_plan(study: StudyConfig, stages: Sequence[str], devices: Sequence[str] = ()) -> str:
    """The text of ``study.py --plan``. Reads data and tokenizer where they are at hand, and writes nothing.

    devices  of the processes that carry it out, as `Processes` has them; one process where none is named

    UserError where a cell could not be carried out, as `check_planned` knows it.
    """
    check_planned(study)
    device = plan_device(study.execution)
    study = replace(study, model=resolve(RunConfig(study.data, model=study.model), torch.device(device)).model)
    recipes = planned(study)
    estimate = Estimate(study, recipes[0].config, device)
    lines: list[str] = []
    asked: list[Recipe] = []
    asked_costs: list[Cost] = []
    timed: list[list[tuple[Kind, Times]]] = []  # by phase, the baseline first
    disk = rolling_bytes(estimate.sizes, recipes[0].config)
    for stage, phases in STAGES.items():
        chosen = [recipe for recipe in recipes if recipe.phase in phases]
        if not chosen:
            continue
        costs = [estimate.of(recipe.config) for recipe in chosen]
        due = stage in ("1", *stages)
        lines.append(
            f"# phase {stage}: {len(chosen)} cell{'s' * (len(chosen) != 1)}, "
            f"{duration(sum(cost.times.each for cost in costs))}" + ("" if due else "; not asked for by --phases")
        )
        lines += [_line(recipe, cost, study) for recipe, cost in zip(chosen, costs, strict=True)]
        asked += chosen * due
        asked_costs += costs * due
        kinds = [kind_of(recipe.config) for recipe in chosen]
        timed += [[(kind, cost.times) for kind, cost in zip(kinds, costs, strict=True)]] * due
        disk += due * sum(kept_bytes(estimate.sizes, recipe.config) for recipe in chosen)
    scaled = len(SCALES) - 2
    matched = len(asked) + len(study.seeds) * (len(study.training.checkpoints) - 2)  # not to the baseline's own end
    one_measurement = asked_costs[0].times.measurement
    measured = (scaled + matched) * one_measurement
    disk += matched * vectors_bytes(estimate.sizes, recipes[0].config)
    beyond = any(recipe.phase in STAGES[BEYOND] for recipe in asked)
    small = beyond * measurements(estimate.sizes.num_hidden_layers)
    choosing = beyond * (2 + SMALL * small) * one_measurement
    comparison = estimate.comparison(study, recipes[0].config)
    comparing_line, comparing = compared(study, asked, comparison)
    answers = estimate.answers(study, asked)
    answered = sum(seconds for _, seconds in answers)
    if study.exhaustive:  # no phase waits for another
        every = [cell for phase in timed for cell in phase]
        timed = [phase for phase in (every[:1], every[1:]) if phase]
    total = one_measurement + wall_seconds(timed, devices)
    total += (measured + choosing + comparing + answered) / max(1, len(set(devices)))
    whatever = study.exhaustive or set(stages) < set(STAGES)
    after_pass = "skips no phase," if whatever else "ends the search after its phase,"
    head = [to_toml(study).rstrip(), "", *estimate.basis(), "#"]
    lines = [
        *head,
        f"# the base, measured before all cells: {duration(one_measurement)}",
        *lines,
        f"# doing less: the baseline's update at {scaled} scales, and at the one with the loss of each of {matched} "
        f"recipes, {duration(measured)}",
        *[f"# scales chosen on training personas, in {small} small measurements: {duration(choosing)}"] * beyond,
        comparing_line,
        passer(study, asked, asked_costs, comparison),
        *(f"# {line}" for line, _ in answers),
        f"# in all {duration(total)} {_where(devices, device)}, {duration(answered)} of them for answers; a pass "
        f"{after_pass}",
        "# and n devices take about 1/n; loading, compiling and recording CUDA graphs are in it",
        *disk_lines(disk, study.out),
    ]
    return "\n".join(lines) + "\n"


def wall_seconds(phases: Sequence[Sequence[tuple[Kind, Times]]], devices: Sequence[str]) -> float:
    """Seconds until the cells of all phases are done, one phase after another, in a process for each of `devices`.

    phases  none of them empty; of each cell its kind and its times

    Processes that share a device wait for what it computes, and for nothing else of each other. Each of them starts,
    loads the model, and compiles, records and has the base respond to what it has not met before.
    """
    first = phases[0][0][1]
    total, compiled, recorded = first.starting + first.loading, set(), set()
    for cells in phases:
        processes = min(max(1, len(devices)), len(cells))
        new = []  # of each cell: what no cell before it has compiled or recorded
        for kind, times in cells:
            compiling = times.compiling * (kind.compiled not in compiled)
            new.append(compiling + (times.recording + times.anchoring) * (kind.recorded not in recorded))
            compiled.add(kind.compiled)
            recorded.add(kind.recorded)
        total += sum(sorted(new, reverse=True)[: -(-len(cells) // processes)])
        computed = sum(times.device for _, times in cells) / min(max(1, len(set(devices))), processes)
        each = [times.each for _, times in cells]
        total += max(computed, sum(each) / processes, max(each))
    return total


def _where(devices: Sequence[str], device: str) -> str:
    count, each = len(set(devices)), len(devices)
    if each < 2:
        return f"on one {device} device"
    return f"in {each} processes on {count} {device} device{'s' * (count != 1)}"


def compared(study: StudyConfig, asked: Sequence[Recipe], each: Comparison) -> tuple[str, float]:
    """What recipes are compared with whether one of them passes or not: a line, and its seconds."""
    named, baselines = _named(study, asked), sum(recipe.is_baseline for recipe in asked)
    voices = 1 + baselines + len(named)  # the base's first
    on_sets = 1 + len({recipe.config.seed for recipe in named}) + len(named) if named else 0
    seconds = each.responding + voices * each.voice + on_sets * each.transfer
    if not named:
        return f"# voice of base and baseline: {duration(seconds)}", seconds
    cells = f"{len(named)} cell{'s' * (len(named) != 1)} of transfer.recipes"
    return f"# voice, and M1 on every persona set, of base, baseline and {cells}: {duration(seconds)}", seconds


def passer(study: StudyConfig, asked: Sequence[Recipe], costs: Sequence[Cost], each: Comparison) -> str:
    """What comes on top where a recipe passes; the first cost is the baseline's, and the mean stands for a recipe's."""
    again, seeds = study.confirmations, len(study.seeds)
    models = seeds + 2 * again  # the recipe with every seed, and the baseline with the fresh ones
    beside = 0 if _named(study, asked) else 1 + seeds  # the base and the other baselines, unless `compared` has them
    comparing = duration(models * each.voice + (models + beside) * each.transfer)
    if not again:
        return f"# a passer: {comparing} more for voice and M1 on every persona set"
    recipe = sum(cost.times.each for cost in costs) / len(costs)
    seconds = again * (costs[0].times.each + recipe)
    return (
        f"# confirmation of a passer: {again} seeds of it and of the baseline, {duration(seconds)} more, and "
        f"{comparing} for voice and M1 on every persona set"
    )


def _named(study: StudyConfig, asked: Sequence[Recipe]) -> list[Recipe]:
    """The cells that transfer.recipes names."""
    return [recipe for recipe in asked if f"{recipe.phase} {recipe.bare_name}" in study.transfer.recipes]


def _line(recipe: Recipe, cost: Cost, study: StudyConfig) -> str:
    mine, plain = flatten(recipe.config), flatten(standard_config(study, recipe.config.seed))
    left_out = PATHS if recipe.phase != "1" else (*PATHS, "training.checkpoints")
    varied = [f"{key} = {value}" for key, value in mine.items() if value != plain[key] and key not in left_out]
    role = f"{recipe.role}: " if recipe.role in ("reference", "control") else ""
    return (
        f"#   {recipe.phase:<2} {recipe.name:<20} {cost.tokens / 1e6:5.2f} M tokens {cost.memory / GIB:6.1f} GiB "
        f"{duration(cost.times.each):>12}   {role}{', '.join(varied) or 'the standard recipe'}"
    )
