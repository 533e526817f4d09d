"""Which rows of a source are meant: stored indices, written and counted as Python's slices are."""

from __future__ import annotations

from minipersona.errors import UserError


def within(wanted: slice, rows: int, name: str) -> range:
    """The indices that `wanted` means among so many rows; UserError where it asks for none, or for more."""
    stop = rows if wanted.stop is None else wanted.stop
    if not wanted.start < stop <= rows:
        raise UserError(f"source {name} has {rows:,} rows; choose a range within them")
    return range(wanted.start, stop, wanted.step)


def overlap(chosen: range, start: int, stop: int) -> range:
    """Those of `chosen` (rising) that lie in [start, stop)."""
    below, above = (max(0, -((chosen.start - bound) // chosen.step)) for bound in (start, stop))  # rounded up
    return chosen[below:above]
