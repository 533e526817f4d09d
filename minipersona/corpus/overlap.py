"""Held-out rows that are also trained on: their loss would say how much was memorised, not how much was learned."""

from __future__ import annotations

from typing import Any

from minipersona.corpus.mixtures import content_digest
from minipersona.corpus.sources import Rows, read_source
from minipersona.errors import UserError

MOST = 0.1  # the share of held-out rows up to which a run goes on


def overlap(training: Rows, heldout: Rows) -> int:
    """How many held-out rows are training rows by content: their turns or text, without system turns and ids."""
    trained = {_content(row) for row in training.rows}
    return sum(_content(row) in trained for row in heldout.rows)


def check_overlap(train: str, heldout: str) -> str:
    """What to say of held-out rows that are training rows, empty where there are none.

    UserError where more than a tenth of the held-out rows are. `train` and `heldout` are sources.
    """
    if not heldout:
        return ""
    rows = read_source(heldout)
    count = overlap(read_source(train), rows)
    found = f"{count:,} of {len(rows):,} rows of data.heldout {heldout} are also in data.train {train}"
    if count > MOST * len(rows):
        raise UserError(f"{found}; hold out other rows, since their loss would measure memory")
    return found if count else ""


def _content(row: dict[str, Any]) -> str:
    messages = row.get("messages")
    if not isinstance(messages, list):
        return content_digest(row)
    return content_digest({"messages": [turn for turn in messages if not _is_system(turn)]})


def _is_system(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") == "system"
