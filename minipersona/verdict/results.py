"""What a study's directory holds, finished or not: every planned cell, judged against the study's own baseline.

    plan.json       what the study wants
    cells/<id>/     one published cell: cell.json, result.json, vectors/, perhaps behaviour.json, instructions.json
    ledger.jsonl    what happened to each cell: started, done, failed, skipped

A cell that is planned and neither published nor failed is missing, and so is any file that has not been written
yet. What is there and cannot be right is a UserError. The flags that a cell's own result.json carries are not
trusted: `learned` and the passes are computed again from M1 and the losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Literal

from minipersona.errors import UserError
from minipersona.files import digest
from minipersona.objective.noise_check import NoiseCheck
from minipersona.records import read_record, to_dict
from minipersona.run.judgement import judge, judge_result, judge_row
from minipersona.run.result import Checkpoint, Protocol, RunResult
from minipersona.settings import load_config
from minipersona.study_config import PHASES, Role, StudyConfig
from minipersona.verdict.calibration import Calibration, is_due
from minipersona.verdict.files import (
    Behaviour,
    CellRecord,
    Frontier,
    FrontierPoint,
    Instructions,
    Knobs,
    Plan,
    PlanEntry,
    Sweep,
    read_optional,
    read_result,
    same_hash,
)
from minipersona.verdict.ledger import LedgerEntry, read_ledger

BASELINE = ("1", "baseline")  # its phase and name


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
    objective_check: NoiseCheck | None = None
    gpu_seconds: float | None = None
    role: Role = "registered"

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


@dataclass(frozen=True)
class JudgedPoint(FrontierPoint):
    """A point of the frontier, judged as a recipe would be."""

    registered_pass: bool | None
    substantive_pass: bool | None


@dataclass(frozen=True)
class StudyResults:
    """Everything that a verdict or a report is made from.

    `base` is None while nothing has been measured, `baseline` until it is done. The cells of `skipped_phases`, which
    the ledger says were not run because an earlier phase had a passer, are not among `cells`.
    """

    directory: Path
    config: StudyConfig
    base: Checkpoint | None
    baseline: CellResult | None
    cells: tuple[CellResult, ...]
    frontier: tuple[JudgedPoint, ...]
    calibration: Calibration | None
    base_behaviour: Behaviour | None
    base_instructions: Instructions | None
    sweep: Sweep | None
    skipped_phases: tuple[str, ...]

    @property
    def protocol(self) -> Protocol | None:
        """What was measured and with what; None while nothing has been measured."""
        return next((cell.result.protocol for cell in self.cells if cell.result is not None), None)

    @property
    def calibration_due(self) -> bool:
        """Whether the verdict waits for the calibration: as calibration.json says, or by what is measured."""
        if self.calibration is not None:
            return self.calibration.due
        return self.protocol is not None and is_due(self.protocol)

    @property
    def digest(self) -> str:
        """Of everything but the vectors, wherever the directory lies: equal ones have equal verdicts."""
        values = to_dict(replace(self, cells=(), baseline=None)) | {"directory": None}
        return digest([values, *({**to_dict(cell), "directory": None} for cell in self.cells)])

    def of_phase(self, *phases: str) -> tuple[CellResult, ...]:
        """The cells of these phases, in order."""
        return tuple(cell for cell in self.cells if cell.phase in phases)

    def registered(self, *phases: str) -> tuple[CellResult, ...]:
        """Those of them that are recipes of the registered search; of all phases where none is named."""
        return tuple(cell for cell in self.cells if cell.role == "registered" and cell.phase in (phases or PHASES))


def read_study(directory: Path) -> StudyResults:
    """Read a study's directory.

    The planned cells are those of plan.json or, without one, those that are there or in the ledger. UserError where
    the directory is not a study's or holds something that cannot be right.
    """
    directory = Path(directory)
    if not (directory / "study.toml").is_file():
        raise UserError(f"{directory}: is not a study directory (no study.toml); name one that study.py made")
    config = load_config(str(directory / "study.toml"), StudyConfig)
    cells, skipped = _read_cells(directory)
    _check_protocols(cells)
    baseline = _find_baseline(cells)
    first = baseline or next((cell for cell in cells if cell.status == "done"), None)
    base = None if first is None or first.result is None else first.result.base
    losses = (None if base is None else base.eval_loss, None if baseline is None else baseline.final.eval_loss)
    cells = tuple(_judged_cell(cell, *losses) for cell in cells)
    wanted = next((cell.hash for cell in cells if (cell.phase, cell.name) == BASELINE), "")
    frontier = read_optional(directory / "frontier.json", Frontier)
    points = frontier.points if base and frontier and same_hash(frontier.baseline, wanted) else ()
    calibration = read_optional(directory / "calibration.json", Calibration)
    return StudyResults(
        directory=directory,
        config=config,
        base=None if base is None else judge_row(base, *losses),
        baseline=_find_baseline(cells),
        cells=cells,
        frontier=tuple(_judged_point(point, *losses) for point in sorted(points, key=lambda point: point.scale)),
        calibration=calibration if calibration and same_hash(calibration.baseline, wanted) else None,
        base_behaviour=read_optional(directory / "base" / "behaviour.json", Behaviour),
        base_instructions=read_optional(directory / "base" / "instructions.json", Instructions),
        sweep=read_optional(directory / "sweep.json", Sweep),
        skipped_phases=skipped,
    )


# ---------------------------------------------------------------- cells


def _read_cells(directory: Path) -> tuple[tuple[CellResult, ...], tuple[str, ...]]:
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
    if (cell.phase, cell.name) != (entry.phase, entry.name):
        stored, planned = f"{cell.phase} {cell.name}"[:200], f"{entry.phase} {entry.name}"
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
        objective_check=cell.objective_check,
        gpu_seconds=cell.gpu_seconds,
        role=entry.role,
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


def _check_protocols(cells: Iterable[CellResult]) -> None:
    """M1 and losses are comparable only where they were measured in the same way."""
    done = [(cell, cell.result.protocol) for cell in cells if cell.result is not None]
    for cell, protocol in done[1:]:
        first, reference = done[0]
        for name in sorted(field.name for field in fields(Protocol) if field.name != "layers"):
            mine, theirs = getattr(protocol, name), getattr(reference, name)
            if mine != theirs:
                raise UserError(
                    f"{cell.directory}: its {name} is {brief(mine)}, but {brief(theirs)} in {first.id}; delete that "
                    "directory and continue the study"
                )


def _find_baseline(cells: Iterable[CellResult]) -> CellResult | None:
    return next((cell for cell in cells if (cell.phase, cell.name, cell.status) == (*BASELINE, "done")), None)


# ---------------------------------------------------------------- judging, by the losses of base and baseline


def _judged_cell(cell: CellResult, base: float | None, baseline: float | None) -> CellResult:
    return cell if cell.result is None else replace(cell, result=judge_result(cell.result, base, baseline))


def _judged_point(point: FrontierPoint, base: float | None, baseline: float | None) -> JudgedPoint:
    judgement = judge(point.m1, point.eval_loss, base, baseline)
    return JudgedPoint(
        scale=point.scale,
        m1=point.m1,
        m1_ci95=point.m1_ci95,
        eval_loss=point.eval_loss,
        learned=judgement.learned,
        delta_norm=point.delta_norm,
        registered_pass=judgement.registered_pass,
        substantive_pass=judgement.substantive_pass,
    )
