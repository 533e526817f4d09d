"""One cell from its claim to its place among the results.

A cell is trained in a directory of its attempt's own, `cells/.attempts/<cell>-<runner>`, and gets its name by a rename
that never replaces. So whatever runners believe about each other, a cell's results are whole and were written by one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.files import explained, read_json, read_jsonl, write_json
from minipersona.model.adapter_files import load_adapter
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2
from minipersona.objective.noise import NoiseCheck
from minipersona.records import write_record
from minipersona.run.evaluate import evaluate_run
from minipersona.run.resources import DTYPES
from minipersona.run.train import carry_out, link_or_copy, step_name
from minipersona.study.cell import Cell
from minipersona.study.claims import Claim
from minipersona.study.recipes import BASELINE, RESPONSES
from minipersona.study.runner import Job, Runner
from minipersona.training.objectives import OBJECTIVE_CHECK
from minipersona.verdict.files import CellRecord, read_optional
from minipersona.verdict.recipe_results import INEFFECTIVE


def cell_job(runner: Runner, cell: Cell) -> Job:
    """The job of training, measuring and publishing a cell."""
    _, phase, name = cell.about
    return Job(cell.id, phase, name, lambda: runner.published(cell), lambda claim: run_cell(runner, cell, claim))


def run_cell(runner: Runner, cell: Cell, claim: Claim) -> None:
    """Carry a cell out, from where its furthest attempt stands, and publish it."""
    attempts = runner.directory / "cells" / ".attempts"
    private = attempts / f"{cell.id}-{runner.name}"
    with explained(private):
        notes = adopt(attempts, cell.id, private)
    started, before = time.monotonic(), training_seconds(private)
    carry_out(
        placed_config(runner, cell),
        private,
        runner.bench,
        runner.world,
        runner.console,
        base=runner.directory / "base",
        each_step=claim.check,
    )
    write_json(private / "result.json", evaluate_run(private, runner.world.device, Console(quiet=True)))
    seconds = before + time.monotonic() - started
    write_record(private / "cell.json", _record(runner, cell, private, notes, seconds))
    claim.check()
    with explained(runner.cell_directory(cell)):
        publish(private, runner.cell_directory(cell))
    for leftover in attempts.glob(f"{cell.id}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def placed_config(runner: Runner, cell: Cell) -> RunConfig:
    """The cell's config with the paths of this study in it."""
    config = cell.recipe.config
    baseline, responses = config.probe.baseline, config.data.responses
    return replace(
        config,
        out=str(runner.cell_directory(cell)),
        probe=replace(
            config.probe, baseline=str(runner.cell_directory(runner.baseline)) if baseline == BASELINE else baseline
        ),
        data=replace(
            config.data, responses=str(responses_file(runner, config.seed)) if responses == RESPONSES else responses
        ),
    )


def responses_file(runner: Runner, seed: int) -> Path:
    """What the base model wrote in persona for phase 4B; another base or other rows have another file."""
    return runner.directory / "role_play" / f"{runner.baseline.hash[:12]}-seed-{seed}.jsonl"


def trained_model(runner: Runner, config: RunConfig, directory: Path, step: int) -> Qwen2:
    """The model that a run left at a step."""
    checkpoint = directory / step_name(step)
    if config.training.method == "lora":
        model = runner.bench.model(config)
        load_adapter(model, checkpoint)
        return model
    return load_model(str(checkpoint), dtype=DTYPES[config.model.dtype], device=runner.world.device)


# ---------------------------------------------------------------- attempts


def adopt(attempts: Path, cell: str, private: Path) -> list[str]:
    """Begin an attempt with what the furthest earlier one of this cell left, and say so.

    Files are linked, since they are only ever replaced whole; logs, which grow, are copied. The earlier directory is
    left as it is: should its owner be alive after all, the two do not meet. The rolling checkpoint is taken first, so
    that the logs reach at least as far.
    """
    attempts.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in attempts.glob(f"{cell}-*") if path != private]
    if private.exists() or not earlier:
        return []
    furthest = max(earlier, key=lambda path: (_step(path), path.name))
    partial = private.with_name(f".{private.name}")
    shutil.rmtree(partial, ignore_errors=True)
    files = [path for path in furthest.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for file in sorted(files, key=lambda file: (file.parent.name != "latest", file)):
        target = partial / file.relative_to(furthest)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its owner is alive and has just replaced it
            (shutil.copy2 if file.suffix == ".jsonl" else link_or_copy)(file, target)
    if not partial.is_dir():
        return []
    os.rename(partial, private)
    step = _step(private)
    return [f"continued at step {step} from an attempt that was interrupted"] if step else []


def publish(private: Path, target: Path) -> bool:
    """Give an attempt's directory its cell's name; False, and nothing is touched, where another attempt has it."""
    try:
        os.rename(private, target)  # onto a directory that is not empty it fails
        return True
    except OSError:
        if not target.is_dir():
            raise
        return False


def training_seconds(directory: Path) -> float:
    """What the steps that were taken in a directory took."""
    rows = read_jsonl(directory / "metrics.jsonl")
    return float(sum(row["tokens"] / row["tokens_per_second"] for row in rows if row["tokens_per_second"]))


def _step(attempt: Path) -> int:
    state = attempt / "latest" / "state.json"
    return int(read_json(state)["step"]) if state.is_file() else 0


# ---------------------------------------------------------------- the record


def _record(runner: Runner, cell: Cell, directory: Path, notes: list[str], seconds: float) -> CellRecord:
    """The content of cell.json."""
    check = read_optional(directory / OBJECTIVE_CHECK, NoiseCheck)
    skipped = sum("skipped" in row for row in read_jsonl(directory / "metrics.jsonl"))
    if skipped:
        notes = [*notes, f"{skipped} steps were skipped; metrics.jsonl says why"]
    return CellRecord(
        phase=cell.recipe.phase,
        name=cell.recipe.name,
        hash=cell.hash,
        seed=cell.recipe.config.seed,
        knobs=cell.recipe.knobs,
        notes=tuple(notes),
        labels=(INEFFECTIVE,) if check is not None and not check.effective else (),
        objective_check=check,
        gpu_seconds=seconds if runner.world.device.type == "cuda" else None,
        seconds=seconds,
    )
