"""The jobs of a study: what each leaves behind, and how it is done.

    MeasureBase         the untouched model's measurement, which every cell takes over, and the calibration on it
    TrainCell           a cell: trained, measured, judged and published
    WriteResponses      the responses that cells are trained on where the base model writes them
    MeasureFrontier     the baseline's own update, scaled down
    MeasureScaling      the same by scales that are chosen on training personas
    MeasureMatchedScale the same at the scale that has a recipe's held-out loss
    MeasureTransfer     M1 of a confirmed recipe on every persona set at every layer, beside base and baseline

Files that belong to the study as a whole, those of the base among them, hold the baseline's hash: where it is another,
they are made again.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minipersona.behaviour.roleplay import rewrite_responses, write_roleplay
from minipersona.console import Console
from minipersona.corpus.mixtures import training_personas
from minipersona.corpus.sources import read_source
from minipersona.errors import require
from minipersona.files import explained, read_jsonl, rewrite_jsonl, write_json
from minipersona.objective import OBJECTIVE_CHECK
from minipersona.objective.noise_check import NoiseCheck
from minipersona.records import to_dict, write_record
from minipersona.run.directory import METRICS, PROBES, losses_file, training_seconds, vectors_file
from minipersona.run.evaluate import evaluate_run
from minipersona.run.measurement import measure
from minipersona.run.resources import kind_of
from minipersona.run.train import carry_out
from minipersona.study.cell import Cell
from minipersona.study.frontier import measure_frontier
from minipersona.study.matched_scale import measure_matched_scale
from minipersona.study.recipes import RESPONSES_PLACEHOLDER
from minipersona.study.scaling import anchor_digests, measure_scaling
from minipersona.study.transfer import covers_every_set, measure_transfer
from minipersona.study.worker import Job, Title, Worker
from minipersona.training.checkpoint import stored_position
from minipersona.verdict.calibration import Calibration, calibrate
from minipersona.verdict.files import (
    CellRecord,
    Frontier,
    MatchedScale,
    Scaling,
    Transfer,
    matched_file,
    read_optional,
)
from minipersona.verdict.recipe_results import INEFFECTIVE, INERT, LEAKS, LEAST_PENALTY_RATIO

# ---------------------------------------------------------------- a cell


@dataclass(frozen=True)
class TrainCell(Job):
    """A cell. It is made in a directory of its own, from where an earlier attempt stopped, and then gets its name."""

    cell: Cell

    @property
    def title(self) -> Title:
        return Title(self.cell.id, self.cell.recipe.phase, self.cell.recipe.name)

    @property
    def kind(self) -> str:
        return repr(kind_of(self.cell.recipe.config))

    def done(self) -> bool:
        return self.study.published(self.cell)

    def carry_out(self, worker: Worker) -> None:
        study, directory = self.study, self.study.attempts / self.cell.id
        published = study.cell_directory(self.cell)
        require(
            self.done() or not published.exists(), f"{published}: has no cell.json; delete it and continue the study"
        )
        began_at = stored_position(directory).step
        started, before = time.monotonic(), training_seconds(directory)
        config = study.placed_config(self.cell)
        carry_out(config, directory, worker.resources, worker.distributed, worker.console, base=study.base)
        write_record(directory / "result.json", evaluate_run(directory, worker.distributed.device, Console(quiet=True)))
        seconds = before + time.monotonic() - started
        on_gpu = worker.distributed.device.type == "cuda"
        write_record(directory / "cell.json", cell_record(self.cell, directory, began_at, seconds, on_gpu))
        publish(directory, published)


def publish(private: Path, target: Path) -> None:
    """Give an attempt's directory its cell's name. UserError where another directory has it: nothing is replaced."""
    with explained(target):
        os.rename(private, target)  # onto a directory that is not empty it fails


def cell_record(cell: Cell, directory: Path, began_at: int, seconds: float, on_gpu: bool) -> CellRecord:
    """The content of cell.json; `began_at` is the step of the rolling checkpoint that the last attempt began with."""
    check = read_optional(directory / OBJECTIVE_CHECK, NoiseCheck)
    notes = [f"continued at step {began_at} from an attempt that was interrupted"] if began_at else []
    if skipped := sum("skipped" in row for row in read_jsonl(directory / METRICS)):
        notes.append(f"{skipped} steps were skipped; metrics.jsonl says why")
    ratio = mean_penalty_ratio(directory)
    labels = {
        INEFFECTIVE: check is not None and not check.effective,
        INERT: ratio is not None and ratio < LEAST_PENALTY_RATIO,
        LEAKS: cell.recipe.config.steering.leaks,
    }
    return CellRecord(
        phase=cell.recipe.phase,
        name=cell.recipe.name,
        hash=cell.hash,
        seed=cell.recipe.config.seed,
        knobs=cell.recipe.knobs,
        notes=tuple(notes),
        labels=tuple(label for label, holds in labels.items() if holds),
        objective_check=check,
        penalty_ratio=ratio,
        gpu_seconds=seconds if on_gpu else None,
        seconds=seconds,
        role=cell.recipe.role,
    )


def mean_penalty_ratio(directory: Path) -> float | None:
    """The mean over the steps at which a run took it (`training/penalty.py`); None where it took none."""
    ratios = [row["penalty_ratio"] for row in read_jsonl(directory / METRICS) if "penalty_ratio" in row]
    return sum(ratios) / len(ratios) if ratios else None


@dataclass(frozen=True)
class WriteResponses(Job):
    """The base model's responses, in persona or written anew, for this cell and others that ask for the same."""

    cell: Cell

    @property
    def file(self) -> Path:
        """What is written, line by line; its report, beside it, comes last."""
        return self.study.responses_file(self.cell.recipe.config)

    @property
    def title(self) -> Title:
        return Title(f"{self.file.parent.name}-{self.file.stem}", self.cell.recipe.phase, "writing responses")

    def done(self) -> bool:
        return self.file.with_suffix(".json").is_file()

    def carry_out(self, worker: Worker) -> None:
        config, section = self.cell.recipe.config, self.study.config.role_play
        write: Callable[..., dict[str, Any]] = rewrite_responses
        if config.data.responses == RESPONSES_PLACEHOLDER:
            write = functools.partial(write_roleplay, personas=training_personas())
        report = write(
            worker.resources.base(config),
            worker.resources.tokenizer(config),
            read_source(config.data.train),
            path=self.file,
            console=worker.console,
            seed=config.seed,
            max_new_tokens=section.max_new_tokens,
            max_prompt_tokens=config.data.max_tokens,
            temperature=section.temperature,
            batch=self.study.config.behaviour.batch,
        )
        write_json(self.file.with_suffix(".json"), report)


# ---------------------------------------------------------------- of the study as a whole


@dataclass(frozen=True)
class StudyFile(Job):
    """A job that leaves a JSON file in the study's directory: a record that holds the baseline's hash."""

    file: ClassVar[str]
    name: ClassVar[str]
    record: ClassVar[type[Calibration] | type[Frontier] | type[Scaling]]

    @property
    def path(self) -> Path:
        """The file, which is written last."""
        return self.study.directory / self.file

    @property
    def title(self) -> Title:
        return Title(f"{self.path.stem}-{self.study.baseline.hash[:12]}", "1", self.name)

    def done(self) -> bool:
        stored = read_optional(self.path, self.record)
        return stored is not None and stored.baseline == self.study.baseline.hash


@dataclass(frozen=True)
class MeasureBase(StudyFile):
    """Writes base/probes.jsonl, base/vectors/, base/losses/ and calibration.json."""

    file = "calibration.json"
    record = Calibration
    name = "base"

    def carry_out(self, worker: Worker) -> None:
        config, directory = self.study.baseline.recipe.config, self.study.base
        instruments, model = worker.resources.instruments(config), worker.resources.base(config)
        protocol = instruments.protocol(model)
        metrics, vectors, losses = measure(model, instruments, worker.console)
        vectors.save(vectors_file(directory, 0))
        if losses is not None:
            losses.save(losses_file(directory, 0))
        rewrite_jsonl(directory / PROBES, [to_dict(metrics.at_step(0, protocol.digest))])
        write_record(self.path, calibrate(protocol, metrics.m1_by_layer, self.study.baseline.hash))


@dataclass(frozen=True)
class MeasureFrontier(StudyFile):
    """Writes frontier.json, and the vectors of its points."""

    file = "frontier.json"
    record = Frontier
    name = "frontier"

    def carry_out(self, worker: Worker) -> None:
        measure_frontier(self.study, worker)


@dataclass(frozen=True)
class MeasureScaling(StudyFile):
    """Writes scaling.json, and the vectors and losses of both forms."""

    file = "scaling.json"
    record = Scaling
    name = "scales chosen on training personas"

    def done(self) -> bool:
        stored = read_optional(self.path, Scaling)
        return super().done() and stored is not None and stored.anchors == anchor_digests(self.study)

    def carry_out(self, worker: Worker) -> None:
        measure_scaling(self.study, worker)


@dataclass(frozen=True)
class MeasureMatchedScale(Job):
    """Writes matched/, for a cell at one of its steps; it begins from the frontier's points."""

    cell: Cell
    step: int

    @property
    def title(self) -> Title:
        recipe = self.cell.recipe
        return Title(
            f"{self.path.stem}-matched", recipe.phase, f"the scale that matches {recipe.name} step {self.step}"
        )

    @property
    def path(self) -> Path:
        """The record, which is written last."""
        return matched_file(self.study.directory, self.cell.id, self.step)

    def done(self) -> bool:
        stored = read_optional(self.path, MatchedScale)
        return stored is not None and stored.cell == self.cell.hash

    def carry_out(self, worker: Worker) -> None:
        measure_matched_scale(self.study, self.cell, self.step, worker)


@dataclass(frozen=True)
class MeasureTransfer(Job):
    """Writes transfer.json, for a recipe by its first cell and the step at which it passed."""

    cell: Cell
    step: int

    @property
    def title(self) -> Title:
        recipe = self.cell.recipe
        name = f"{recipe.name} step {self.step} on every set and layer"
        return Title(f"{self.cell.id}+transfer-{self.step}", recipe.phase, name)

    @property
    def path(self) -> Path:
        """The file."""
        return self.study.cell_directory(self.cell) / "transfer.json"

    def done(self) -> bool:
        stored = read_optional(self.path, Transfer)
        if stored is None or (stored.cell, stored.step) != (self.cell.hash, self.step):
            return False
        return covers_every_set(self.study, stored)  # a study that goes on may name more of them

    def carry_out(self, worker: Worker) -> None:
        write_record(self.path, measure_transfer(self.study, self.cell, self.step, worker))
