"""What a report is made of. The blocks hold plain text; each renderer escapes it in its own way, in one place.

Names, errors and model text come from elsewhere and may hold anything: markup, control characters, half a
surrogate pair. `plain` is what both renderers apply first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from minipersona.console import printable

Tone = Literal["", "good", "bad", "open"]


def plain(text: object) -> str:
    """`text` with everything invisible or not valid Unicode written out as an escape."""
    return printable(str(text).encode("utf-8", "backslashreplace").decode("utf-8"))


def one_line(text: object) -> str:
    """The same with every run of white space one space."""
    return " ".join(plain(text).split())


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Callout:
    """The one thing that a reader takes away."""

    title: str
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it."""

    claim: str
    verdict: str
    tone: Tone
    evidence: str
    implication: str


@dataclass(frozen=True)
class Verbatim:
    """Text shown letter by letter: commands, settings, what a model or a traceback said."""

    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `key` is what it sorts by, where that is not its text. An empty text sorts last."""

    text: str
    key: float | None = None
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. The first `pinned` rows stay on top however it is sorted."""

    name: str  # its anchor, and what an address sorts it by
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    pinned: int = 0

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name


@dataclass(frozen=True)
class Image:
    """A figure of the report, `figures/<name>.png`, its numbers beside it in `figures/<name>.csv`."""

    name: str
    title: str
    caption: str


Block = Paragraph | Callout | Bullets | Facts | Finding | Verbatim | Table | Image


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    anchor: str
    blocks: Sequence[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: Sequence[Section]
