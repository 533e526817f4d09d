"""What a report is made of: blocks of plain text. Each renderer escapes them in its own way, in one place.

Names, errors and model text come from elsewhere and may hold anything: markup, control characters, a lone
surrogate. Both renderers apply `plain` or `one_line` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minipersona.console import printable

Tone = Literal["", "good", "bad", "open"]


def plain(text: object) -> str:
    """`text` with everything invisible or not valid Unicode written out as an escape."""
    return printable(str(text).encode("utf-8", "backslashreplace").decode("utf-8"))


def one_line(text: object) -> str:
    """The same with every run of white space replaced by one space."""
    return " ".join(plain(text).split())


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Callout:
    """The main result."""

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
    """A claim, the verdict on it, and the reasons."""

    claim: str
    verdict: str
    tone: Tone
    evidence: str
    implication: str


@dataclass(frozen=True)
class Verbatim:
    """Text shown character by character: commands, settings, a traceback."""

    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `key` is the number to sort by, None where the text is; an empty text sorts last."""

    text: str
    key: float | None = None
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. The first `pinned` rows stay on top however it is sorted."""

    name: str  # its anchor, which the page's address sorts it by
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    pinned: int = 0

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(row[i].key is not None for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Image:
    """A figure: `figures/<name>.png`, with its numbers in `figures/<name>.csv`."""

    name: str
    title: str
    caption: str


Block = Paragraph | Callout | Bullets | Facts | Finding | Verbatim | Table | Image


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: Sequence[Section]
