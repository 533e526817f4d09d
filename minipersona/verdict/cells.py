"""The cells of a study as its directory has them: every planned one, with its result where it is done.

    plan.json       what the study wants
    cells/<id>/     one published cell: cell.json, result.json, vectors/, perhaps behaviour.json, instructions.json
    ledger.jsonl    what happened to each cell: started, done, failed, skipped

A cell that is planned and neither published nor failed is missing. What is there and cannot be right is a UserError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minipersona.behaviour.instructions.suite import Instructions
from minipersona.behaviour.suite import Behaviour
from minipersona.errors import UserError
from minipersona.objective.noise_check import NoiseCheck
from minipersona.records import read_record
from minipersona.run.result import Checkpoint, RunResult
from minipersona.study_config import PHASES, SEED_SUFFIX
from minipersona.verdict.files import CellRecord, Knobs, Plan, PlanEntry, Role, Transfer, read_optional, read_result
from minipersona.verdict.ledger import LedgerEntry, read_ledger


@dataclass(frozen=True)
class CellResult:
    """One fine-tuning run of the study: done, failed or missing (planned, not there yet).

    `result` is result.json with its base and checkpoints judged against the study's baseline.
    """

    phase: str
    name: str
    hash: str
    seed: int
    knobs: Knobs
    status: Literal["done", "failed", "missing"]
    error: str | None = None
    directory: Path | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    result: RunResult | None = None
    behaviour: Behaviour | None = None
    instructions: Instructions | None = None
    transfer: Transfer | None = None
    objective_check: NoiseCheck | None = None
    gpu_seconds: float | None = None
    role: Role = "registered"
    penalty_ratio: float | None = None

    @property
    def id(self) -> str:
        """What tables and verdict.json call it."""
        return f"{self.phase} {self.name}"

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The judged checkpoints in the order of their steps; empty where the cell is not done."""
        return () if self.result is None else self.result.checkpoints

    @property
    def curve(self) -> tuple[Checkpoint, ...]:
        """The same from the base, step 0, on."""
        return () if self.result is None else (self.result.base, *self.result.checkpoints)

    @property
    def final(self) -> Checkpoint:
        """The judged last checkpoint, by which the cell is judged."""
        assert self.result is not None, f"{self.id} is {self.status}"
        return self.result.checkpoints[-1]


def bare_name(cell: CellResult) -> str:
    """The recipe's name without the seed."""
    return re.sub(SEED_SUFFIX, "", cell.name)


# ---------------------------------------------------------------- reading


def read_cells(directory: Path) -> tuple[tuple[CellResult, ...], tuple[str, ...]]:
    """Every planned cell in the order of the phases, and the phases all of whose cells were skipped."""
    newest = read_ledger(directory)
    cells: list[CellResult] = []
    skipped = set()
    for entry in sorted(_planned(directory, newest), key=lambda entry: PHASES.index(entry.phase)):
        event = newest.get(entry.cell)
        if entry.cell and (directory / "cells" / entry.cell / "cell.json").is_file():
            cells.append(_published(directory / "cells" / entry.cell, entry))
        elif event is not None and event.event == "skipped":
            skipped.add(entry.phase)
        elif event is not None and event.event == "failed":
            cells.append(_unpublished(entry, "failed", event.error or "no reason was recorded"))
        else:
            cells.append(_unpublished(entry, "missing", None))
    _check_unique(cells)
    left_out = skipped - {cell.phase for cell in cells}
    return tuple(cells), tuple(phase for phase in PHASES if phase in left_out)


def _planned(directory: Path, newest: Mapping[str, LedgerEntry]) -> Sequence[PlanEntry]:
    """The cells of plan.json or, without one, those that are there and those that the ledger names."""
    plan = read_optional(directory / "plan.json", Plan)
    if plan is not None:
        return plan.cells
    entries = []
    for file in sorted((directory / "cells").glob("*/cell.json")):
        cell = _cell_record(file.parent)
        entries.append(PlanEntry(cell.phase, cell.name, cell.seed, cell.knobs, file.parent.name, cell.role))
    for event in newest.values():
        if (event.phase, event.name) not in {(entry.phase, entry.name) for entry in entries}:
            entries.append(PlanEntry(event.phase, event.name, 42, {}, event.cell))
    return entries


def _cell_record(directory: Path) -> CellRecord:
    return read_record(directory / "cell.json", CellRecord, f"delete {directory} and continue the study")


def _published(directory: Path, entry: PlanEntry) -> CellResult:
    cell = _cell_record(directory)
    if (cell.phase, cell.name, cell.role) != (entry.phase, entry.name, entry.role):
        stored = f"{cell.phase} {cell.name}"[:200] + f" ({cell.role})"
        planned = f"{entry.phase} {entry.name} ({entry.role})"
        raise UserError(f"{directory}: is {stored}, but was planned as {planned}; delete it and continue the study")
    return CellResult(
        phase=cell.phase,
        name=cell.name,
        hash=cell.hash,
        seed=cell.seed,
        knobs=cell.knobs,
        status="done",
        directory=directory,
        labels=cell.labels,
        notes=cell.notes,
        result=read_result(directory),
        behaviour=read_optional(directory / "behaviour.json", Behaviour),
        instructions=read_optional(directory / "instructions.json", Instructions),
        transfer=read_optional(directory / "transfer.json", Transfer),
        objective_check=cell.objective_check,
        gpu_seconds=cell.gpu_seconds,
        role=entry.role,
        penalty_ratio=cell.penalty_ratio,
    )


def _unpublished(entry: PlanEntry, status: Literal["failed", "missing"], error: str | None) -> CellResult:
    hash_ = entry.cell.rsplit("-", 1)[-1]
    return CellResult(entry.phase, entry.name, hash_, entry.seed, entry.knobs, status, error, role=entry.role)


def _check_unique(cells: Iterable[CellResult]) -> None:
    seen: dict[tuple[str, str], CellResult] = {}
    for cell in cells:
        other = seen.setdefault((cell.phase, cell.name), cell)
        if other is not cell:
            one, two = other.directory or other.hash, cell.directory or cell.hash
            raise UserError(f"{one} and {two} are both {cell.id}; delete the stale one")
