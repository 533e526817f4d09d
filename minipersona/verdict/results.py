"""What a study's directory holds, finished or not: every planned cell, judged against the study's own baseline.

    plan.json            what the study wants: {"cells": [{"phase", "name", "seed", "knobs", "cell": id}]}
    cells/<id>/          one published cell: cell.json, result.json, vectors/, perhaps behaviour.json, instructions.json
    ledger.jsonl         what happened to each cell: started, done, failed, skipped

A cell that is planned and neither published nor failed is missing, and so is any file that has not been written
yet. What is there and cannot be right is a UserError. The flags that a cell's own result.json carries are not
trusted: `learned` and the passes are computed again from M1 and the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief

from minipersona.errors import UserError
from minipersona.files import digest
from minipersona.run.judgement import judge
from minipersona.settings import read_toml
from minipersona.study_config import PHASES
from minipersona.verdict.files import (
    Table,
    newest_events,
    read_behaviour,
    read_frontier,
    read_instructions,
    read_optional,
    read_result,
    read_sweep,
    read_table,
)

STOP_RULES = ("substantive", "registered")


@dataclass(frozen=True)
class CellResult:
    """One fine-tuning run of the study. `status` is done, failed or missing (planned, not there yet).

    `result` is result.json with its base and checkpoint rows judged against the study's baseline.
    """

    phase: str
    name: str
    hash: str
    seed: int
    knobs: Table
    status: str
    error: str | None = None
    directory: Path | None = None
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: Table | None = None
    behaviour: Table | None = None
    instructions: Table | None = None
    objective_check: Table | None = None
    gpu_seconds: float | None = None

    @property
    def id(self) -> str:
        """What tables and verdict.json call it."""
        return f"{self.phase} {self.name}"

    @property
    def checkpoints(self) -> list[Table]:
        """The judged rows, one a checkpoint, in the order of steps; empty where the cell is not done."""
        return [] if self.result is None else list(self.result["checkpoints"])

    @property
    def final(self) -> Table:
        """The judged row of the last checkpoint, by which a cell stands or falls."""
        assert self.result is not None, f"{self.id} is {self.status}"
        row: Table = self.result["checkpoints"][-1]
        return row


@dataclass(frozen=True)
class StudyResults:
    """Everything a verdict or a report is made from.

    `base` is empty while nothing has been measured, `baseline` None until it is done. The cells of `skipped_phases`,
    which the ledger says were not run because an earlier phase had a passer, are not among `cells`.
    """

    directory: Path
    config: Table
    narrow: str
    stop_rule: str
    exhaustive: bool
    base: Table
    baseline: CellResult | None
    cells: list[CellResult]
    frontier: list[Table]
    calibration: Table
    base_behaviour: Table | None
    base_instructions: Table | None
    sweep: Table | None
    skipped_phases: list[str]

    @property
    def protocol(self) -> Table:
        """What was measured and with what; empty while nothing has been measured."""
        done = [cell.result for cell in self.cells if cell.result is not None]
        return dict(done[0]["protocol"]) if done else {}

    @property
    def digest(self) -> str:
        """Of everything but the vectors, wherever the directory lies: equal ones have equal verdicts."""
        values = asdict(replace(self, cells=[], baseline=None)) | {"directory": None}
        return digest([values, *({**asdict(cell), "directory": None} for cell in self.cells)])

    def of_phase(self, *phases: str) -> list[CellResult]:
        """The cells of these phases, in order."""
        return [cell for cell in self.cells if cell.phase in phases]


def read_study(directory: Path, planned: Sequence[tuple[str, str]] | None = None) -> StudyResults:
    """Read a study's directory.

    The planned cells are those of plan.json or, without one, the (phase, name) pairs given, and without either
    whatever cells are there. UserError where the directory is no study's or holds something that cannot be right.
    """
    directory = Path(directory)
    if not (directory / "study.toml").is_file():
        raise UserError(f"{directory}: is no study's directory (no study.toml); name one that study.py made")
    config = read_toml(directory / "study.toml")
    stop_rule = config.get("stop_rule", STOP_RULES[0])
    if stop_rule not in STOP_RULES:
        raise UserError(
            f"{directory / 'study.toml'}: stop_rule = {brief(stop_rule)}; must be one of {', '.join(STOP_RULES)}"
        )
    events = newest_events(directory)
    cells, skipped = _cells(directory, _entries(directory, events, planned), events)
    _check_protocols(cells)
    current = next((cell.hash for cell in cells if (cell.phase, cell.name) == ("1", "baseline")), "")
    unjudged = _find_baseline(cells)
    reference = unjudged or next((cell for cell in cells if cell.status == "done"), None)
    base: Table = {} if reference is None or reference.result is None else reference.result["base"]
    judged = _judge_against(base, unjudged)
    cells = [_judged(cell, judged) for cell in cells]
    return StudyResults(
        directory=directory,
        config=config,
        narrow=str(config.get("narrow", "tulu")),
        stop_rule=stop_rule,
        exhaustive=bool(config.get("exhaustive", False)),
        base=judged(base) if base else {},
        baseline=_find_baseline(cells),
        cells=cells,
        frontier=[judged(point) for point in read_frontier(directory / "frontier.json", current)] if base else [],
        calibration=read_optional(directory / "calibration.json", current) or {},
        base_behaviour=read_behaviour(directory / "base" / "behaviour.json"),
        base_instructions=read_instructions(directory / "base" / "instructions.json"),
        sweep=read_sweep(directory / "sweep.json"),
        skipped_phases=skipped,
    )


# ---------------------------------------------------------------- cells


def _cells(directory: Path, entries: Sequence[Table], events: dict[str, Table]) -> tuple[list[CellResult], list[str]]:
    """Every planned cell in the order of the phases, and the phases all of whose cells were skipped."""
    found, skipped = [], set()
    for entry in sorted(entries, key=lambda entry: PHASES.index(entry["phase"])):
        event = events.get(entry["cell"], {})
        if entry["cell"] and (directory / "cells" / entry["cell"] / "cell.json").is_file():
            found.append(_published(directory / "cells" / entry["cell"], entry))
        elif event.get("event") == "skipped":
            skipped.add(entry["phase"])
        elif event.get("event") == "failed":
            found.append(_unpublished(entry, "failed", event.get("error") or "no reason was recorded"))
        else:
            found.append(_unpublished(entry, "missing", None))
    _check_unique(found)
    return found, [phase for phase in PHASES if phase in skipped - {cell.phase for cell in found}]


def _entries(directory: Path, events: dict[str, Table], planned: Sequence[tuple[str, str]] | None) -> list[Table]:
    """What is planned: plan.json or, without one, what is there, what the ledger names and the pairs given."""
    path = directory / "plan.json"
    if path.is_file():
        entries = read_table(path, ("cells",))["cells"]
        if not isinstance(entries, list):
            raise UserError(f"{path}: cells must be a list; delete the file and continue the study")
    else:
        entries = [
            {**read_table(file, ("phase", "name")), "cell": file.parent.name}
            for file in sorted((directory / "cells").glob("*/cell.json"))
        ]
        pairs = [(event["phase"], event["name"], event["cell"]) for event in events.values()]
        pairs += [(phase, name, "") for phase, name in planned or ()]
        for phase, name, cell in pairs:
            if (phase, name) not in {(entry["phase"], entry["name"]) for entry in entries}:
                entries.append({"phase": phase, "name": name, "cell": cell})
        order = {pair: number for number, pair in enumerate(planned or ())}
        entries.sort(key=lambda entry: order.get((entry["phase"], entry["name"]), len(order)))
    for entry in entries:
        words = [entry.get(key) for key in ("phase", "name", "cell")] if isinstance(entry, dict) else [None]
        if not all(isinstance(word, str) and len(word) < 200 for word in words) or words[0] not in PHASES:
            raise UserError(f"{path}: {str(entry)[:80]} is no planned cell; delete the file and continue the study")
    return list(entries)


def _published(directory: Path, entry: Table) -> CellResult:
    cell = read_table(directory / "cell.json", ("phase", "name", "hash", "seed", "knobs"))
    if (cell["phase"], cell["name"]) != (entry["phase"], entry["name"]):
        found, planned = f"{cell['phase']} {cell['name']}"[:200], f"{entry['phase']} {entry['name']}"
        raise UserError(f"{directory}: is {found}, planned as {planned}; delete it and continue the study")
    for key in ("labels", "notes"):
        if not isinstance(cell.get(key) or [], list):
            raise UserError(f"{directory}: {key} of its cell.json is no list; delete it and continue the study")
    return CellResult(
        phase=cell["phase"],
        name=cell["name"],
        hash=str(cell["hash"]),
        seed=cell["seed"],
        knobs=cell["knobs"],
        status="done",
        directory=directory,
        labels=list(cell.get("labels") or []),
        notes=list(cell.get("notes") or []),
        result=read_result(directory / "result.json"),
        behaviour=read_behaviour(directory / "behaviour.json"),
        instructions=read_instructions(directory / "instructions.json"),
        objective_check=cell.get("objective_check"),
        gpu_seconds=cell.get("gpu_seconds"),
    )


def _unpublished(entry: Table, status: str, error: str | None) -> CellResult:
    return CellResult(
        phase=entry["phase"],
        name=entry["name"],
        hash=entry["cell"].rsplit("-", 1)[-1],
        seed=entry.get("seed", 42),
        knobs=entry.get("knobs", {}),
        status=status,
        error=error,
    )


def _check_unique(cells: Iterable[CellResult]) -> None:
    seen: dict[tuple[str, str], CellResult] = {}
    for cell in cells:
        other = seen.setdefault((cell.phase, cell.name), cell)
        if other is not cell:
            one, two = other.directory or other.hash, cell.directory or cell.hash
            raise UserError(f"{one} and {two} are both {cell.id}; delete the stale one")


# ---------------------------------------------------------------- judging


def _check_protocols(cells: Sequence[CellResult]) -> None:
    """M1 and losses compare only where the same was measured with the same."""
    done = [(cell, cell.result["protocol"]) for cell in cells if cell.result is not None]
    for cell, protocol in done[1:]:
        first, reference = done[0]
        for key in sorted((reference.keys() | protocol.keys()) - {"layers"}):
            if protocol.get(key) != reference.get(key):
                mine, theirs = brief(protocol.get(key)), f"{brief(reference.get(key))} in {first.id}"
                raise UserError(
                    f"{cell.directory}: its {key[:80]} is {mine}, but {theirs}; delete that directory and continue "
                    "the study"
                )


def _find_baseline(cells: Iterable[CellResult]) -> CellResult | None:
    return next((cell for cell in cells if (cell.phase, cell.name, cell.status) == ("1", "baseline", "done")), None)


def _judge_against(base: Table, baseline: CellResult | None) -> Callable[[Table], Table]:
    """The function that judges a row, by the base's loss and the baseline's at its last step."""
    reference = None if baseline is None else baseline.final["eval_loss"]

    def judged(row: Table) -> Table:
        judgement = judge(row["m1"], row["eval_loss"], base["eval_loss"], reference)
        return {
            **row,
            "learned": judgement.learned,
            "registered_pass": judgement.registered_pass,
            "substantive_pass": judgement.substantive_pass,
            "collapsed": judgement.collapsed,
        }

    return judged


def _judged(cell: CellResult, judged: Callable[[Table], Table]) -> CellResult:
    """The cell with every row of its result judged."""
    if cell.result is None:
        return cell
    rows = [judged(row) for row in cell.result["checkpoints"]]
    passed = [row for row in rows if row["substantive_pass"]]
    best = max(passed, key=lambda row: row["learned"])["step"] if passed else None
    return replace(cell, result={**cell.result, "base": judged(cell.result["base"]), "checkpoints": rows, "best": best})
