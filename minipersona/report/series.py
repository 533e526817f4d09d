"""The numbers of a figure: it is drawn from these rows and the bounds on M1, and its CSV holds the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from minipersona.report.blocks import plain
from minipersona.run.judgement import ABSOLUTE, Bounds


@dataclass(frozen=True)
class Series:
    """What a figure shows. `rows` holds at least one row, all of one dataclass."""

    name: str
    title: str
    caption: str
    rows: Sequence[Any]
    bounds: Bounds = ABSOLUTE

    def to_csv(self) -> str:
        """The rows as CSV, one column a field; numbers in full precision, nothing for None."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(self.rows[0]))
        for row in self.rows:
            writer.writerow(plain(value) if isinstance(value, str) else value for value in astuple(row))
        return text.getvalue()


class Missing(Exception):
    """A figure that cannot be drawn, and why; the report says so in its place."""
