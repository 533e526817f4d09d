"""The ledger of a study, ledger.jsonl: what happened to each cell, in order. Only the driver of the study writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minipersona.errors import UserError, require
from minipersona.files import append_jsonl, read_jsonl
from minipersona.records import from_dict, may_be_missing, to_dict
from minipersona.study_config import PHASES

LEDGER = "ledger.jsonl"
Event = Literal["started", "done", "failed", "skipped"]


@dataclass(frozen=True)
class LedgerEntry:
    """One line: what became of a cell, or of another job of the study, at a time in seconds since 1970."""

    time: float
    cell: str  # its id
    phase: str
    name: str
    event: Event
    attempt: int  # counted from 1; 0 where nothing was attempted
    error: str | None = may_be_missing()  # of a failure

    def __post_init__(self) -> None:
        require(self.phase in PHASES, f"phase = {self.phase[:80]!r}: must be one of {', '.join(PHASES)}")


def append(directory: Path, entry: LedgerEntry) -> None:
    """Add an entry to the ledger of the study in `directory`. It is on the disk when this returns."""
    append_jsonl(directory / LEDGER, to_dict(entry), ascii=True)  # an error may hold half of a surrogate pair


def read_entries(directory: Path) -> list[LedgerEntry]:
    """All entries in the order in which they were written. A torn last line is left out.

    UserError, with the number of the line, where one is not an entry.
    """
    path = directory / LEDGER
    entries = []
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            require(isinstance(line, dict), "not a table")
            entries.append(from_dict(LedgerEntry, line, what="ledger entry"))
        except UserError:
            raise UserError(f"{path}: line {number} is not a ledger entry; delete it") from None
    return entries


def read_ledger(directory: Path) -> dict[str, LedgerEntry]:
    """The newest entry of each cell, by the cell's id."""
    return {entry.cell: entry for entry in read_entries(directory)}
