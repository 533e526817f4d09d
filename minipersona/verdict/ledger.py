"""What happened in a study: ledger.jsonl, one line an event, appended by the study's driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minipersona.errors import UserError
from minipersona.files import append_jsonl, read_jsonl
from minipersona.records import from_dict, to_dict

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class LedgerEntry:
    """An event of a cell, or of another job of the study. `attempt` counts from 1; 0 where nothing was attempted."""

    time: float
    cell: str
    phase: str
    name: str
    event: Literal["started", "done", "failed", "skipped"]
    attempt: int = 0
    error: str | None = None


def append(directory: Path, entry: LedgerEntry) -> None:
    """Append an entry to the ledger of the study in `directory`."""
    append_jsonl(directory / LEDGER, to_dict(entry), ascii=True)  # an error may hold half a surrogate pair


def read_ledger(directory: Path) -> list[LedgerEntry]:
    """The entries in the order in which they were written; a torn last line is left out."""
    path = directory / LEDGER
    entries = []
    for line in read_jsonl(path):
        try:
            entries.append(from_dict(LedgerEntry, line, what="ledger"))
        except (UserError, AttributeError, TypeError):
            raise UserError(f"{path}: {str(line)[:80]} is not a ledger entry; delete that line") from None
    return entries
