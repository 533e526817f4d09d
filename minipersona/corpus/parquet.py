"""Rows from Parquet files, of which only the row groups and columns that are needed are read.

A Parquet file is a sequence of row groups, each column of a group in one piece; a footer says where they lie. So a
range of rows costs the footers of the files up to it and the pieces that it touches, wherever the files are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from minipersona.corpus.ranges import overlap, within
from minipersona.errors import UserError

COLUMNS = ("messages", "text")  # the first of these that a file has is what its rows hold
LABEL = "source"  # and where there is one, which of a mixture's subsets each is from
MOST_ROWS = 2_000_000  # at once; each becomes Python objects, and so many fill the memory


class File(Protocol):
    """A Parquet file, here or elsewhere."""

    @property
    def name(self) -> str:
        """What an error calls it."""

    def open(self, most: bool) -> BinaryIO:
        """Open for reading anywhere in it; `most` says that nearly all of it will be read."""


@dataclass(frozen=True)
class LocalFile:
    """A Parquet file on disk."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def open(self, most: bool) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; it must be a readable Parquet file") from None


def require_pyarrow() -> Any:
    """The module pyarrow.parquet; UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet needs pyarrow; run pip install 'minipersona[data]'") from None
    return pyarrow.parquet


def read_parquet(files: Sequence[File], wanted: slice, name: str) -> tuple[int, Iterator[dict[str, Any]]]:
    """How many rows are meant, and these one at a time, as {"messages": ...} or {"text": ...}, with
    their "source" where the file says it.

    The files follow one another, and `wanted` counts through all of them. UserError where it exceeds them, or where
    a file is damaged or has neither column.
    """
    footers: list[Any] = []
    rows = 0
    for file in files:
        with file.open(most=False) as handle, _undamaged(file):
            footers.append(require_pyarrow().read_metadata(handle))
        rows += footers[-1].num_rows
        if wanted.stop is not None and rows >= wanted.stop:
            break  # the files after it need not even be opened
    chosen = within(wanted, rows, name)
    if len(chosen) > MOST_ROWS:
        raise UserError(f"source {name} has {rows:,} rows, too many to hold; add a range such as [0:10000]")
    return len(chosen), _read(files, footers, chosen, _columns(files[0], footers[0]))


def _columns(file: File, footer: Any) -> list[str]:
    """The column of the rows' content, then that of their label if there is one."""
    names = footer.schema.to_arrow_schema().names
    for column in COLUMNS:
        if column in names:
            return [column, LABEL] if LABEL in names else [column]
    raise UserError(f"{file.name}: has neither a column messages nor text, only {', '.join(names)[:200]}")


def _read(files: Sequence[File], footers: list[Any], chosen: range, columns: list[str]) -> Iterator[dict[str, Any]]:
    start = 0
    for file, footer in zip(files, footers, strict=False):
        needed: list[tuple[int, list[int]]] = []  # row groups, and the rows of each, counted in the group
        for group in range(footer.num_row_groups):
            stop = start + footer.row_group(group).num_rows
            if inside := overlap(chosen, start, stop):
                needed.append((group, [index - start for index in inside]))
            start = stop
        if not needed:
            continue
        most = len(needed) == footer.num_row_groups and _share(footer, columns[0]) > 0.5
        with file.open(most) as handle, _undamaged(file):
            # No read-ahead and no threads: one that still waits for the file when the process ends would abort it.
            parquet = require_pyarrow().ParquetFile(
                handle, metadata=footer, pre_buffer=False, page_checksum_verification=True
            )
            for group, rows in needed:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
                yield from (table.take(rows) if len(rows) < len(table) else table).to_pylist()


def _share(footer: Any, column: str) -> float:
    """The part of a file's bytes that one column takes."""
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    pieces = [group.column(index) for group in groups for index in range(footer.num_columns)]
    wanted = [piece for piece in pieces if f"{piece.path_in_schema}.".startswith(f"{column}.")]
    return sum(p.total_compressed_size for p in wanted) / max(sum(p.total_compressed_size for p in pieces), 1)


@contextlib.contextmanager
def _undamaged(file: File) -> Iterator[None]:
    """What pyarrow finds wrong with a file, as one line. Errors of the network pass: they are their opener's."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("pyarrow") or type(error) in (OSError, ValueError, UnicodeDecodeError):
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")
            raise UserError(f"{file.name}: damaged, or no Parquet file ({reason}); fetch it again") from None
        raise
