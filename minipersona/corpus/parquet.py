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

from minipersona.chat.rows import BESIDE, FORMS, read_row
from minipersona.corpus.ranges import overlap, within
from minipersona.errors import UserError, require

LABEL = "source"  # which of a mixture's subsets a row is from
BATCH = 512  # rows decoded at a time

# A few bytes of Parquet can stand for any number of them: pages are compressed, and a value that comes a million times
# is stored once. So text stays in the dictionary it is stored in until it is known how long it gets.
MOST_STORED = 2_000_000_000  # bytes of one row group, decompressed
MOST_DECODED = 500_000_000  # bytes of one batch's text


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
    a file is damaged or has no columns of a row.
    """
    footers: list[Any] = []
    rows = 0
    for file in files:
        with file.open(most=False) as handle, _undamaged(file):
            footer = require_pyarrow().read_metadata(handle)
        in_groups = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        require(
            footer.num_rows == in_groups,
            f"{file.name}: damaged: its footer says {footer.num_rows:,} rows and, of its groups, {in_groups:,}; fetch "
            "it again",
        )
        footers.append(footer)
        rows += footer.num_rows
        if wanted.stop is not None and rows >= wanted.stop:
            break  # the files after it need not even be opened
    chosen = within(wanted, rows, name)
    return len(chosen), _rows(chosen, _read(files, footers, chosen, _columns(files[0], footers[0])), name)


def _rows(chosen: range, stored: Iterator[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    for index in chosen:
        row = next(stored, None)
        require(row is not None, f"{name}: row {index} is missing, although a footer counts it; fetch the file again")
        try:
            yield read_row(row)
        except UserError as error:
            raise UserError(f"{name}: row {index} {error}") from None


def _columns(file: File, footer: Any) -> list[str]:
    """The columns that a row is read from, and that of its label if there is one."""
    names = footer.schema.to_arrow_schema().names
    content = [key for keys in FORMS.values() if all(key in names for key in keys) for key in keys]
    if not content:
        forms = ", ".join(" and ".join(keys) for keys in FORMS.values())
        raise UserError(f"{file.name}: has no columns of a row ({forms}), only {', '.join(names)[:200]}")
    return [*content, *(name for name in (*BESIDE, LABEL) if name in names)]


def _read(files: Sequence[File], footers: list[Any], chosen: range, columns: list[str]) -> Iterator[dict[str, Any]]:
    start = 0
    for file, footer in zip(files, footers, strict=False):
        needed: list[tuple[int, range]] = []  # row groups, and the rows that are meant of each, counted in the group
        for group in range(footer.num_row_groups):
            stop = start + footer.row_group(group).num_rows
            if inside := overlap(chosen, start, stop):
                needed.append((group, range(inside.start - start, inside.stop - start, inside.step)))
            start = stop
        if needed:
            with file.open(most=len(needed) == footer.num_row_groups) as handle, _undamaged(file):
                for group, rows in needed:
                    yield from _read_group(file, handle, footer, group, rows, columns)


def _read_group(
    file: File, handle: BinaryIO, footer: Any, group: int, wanted: range, columns: list[str]
) -> Iterator[dict[str, Any]]:
    """The rows of one group that are meant. Of the footer only what describes whole groups is looked at: pyarrow
    ends the process where a damaged one misdescribes a column.
    """
    if (stored := footer.row_group(group).total_byte_size) > MOST_STORED:
        raise UserError(
            f"{file.name}: row group {group} holds {stored:,} bytes, too many at once; write the file again in smaller "
            "row groups"
        )
    done = 0
    for dictionaries in (_text_columns(footer, columns), []):
        # No read-ahead and no threads: one that still waits for the file when the process ends would abort it.
        parquet = require_pyarrow().ParquetFile(
            handle, metadata=footer, pre_buffer=False, page_checksum_verification=True, read_dictionary=dictionaries
        )
        start = 0
        try:
            for batch in parquet.iter_batches(BATCH, [group], columns, use_threads=False):
                stop = start + len(batch)
                if rows := [index - start for index in overlap(wanted, max(start, done), stop)]:
                    _check_length(file, batch)
                    yield from (batch.take(rows) if len(rows) < len(batch) else batch).to_pylist()
                start, done = stop, max(stop, done)
                if done >= wanted.stop:
                    return
        except OSError as error:
            # So pyarrow says that it cannot put delta-encoded text into a dictionary.
            if not dictionaries or "Not yet implemented" not in str(error):
                raise


def _text_columns(footer: Any, columns: Sequence[str]) -> list[str]:
    """Where the text of the columns is stored; a nested column is stored as several."""
    stored = [footer.schema.column(index) for index in range(len(footer.schema))]
    return [s.path for s in stored if s.path.split(".")[0] in columns and s.physical_type == "BYTE_ARRAY"]


def _check_length(file: File, batch: Any) -> None:
    """UserError where a batch's text is too long to write out."""
    length = sum(_length(column) for column in batch.columns)
    if length > MOST_DECODED:
        raise UserError(
            f"{file.name}: {len(batch)} rows in succession hold {length:,} bytes, too many for conversations or texts; "
            "check what the file is"
        )


def _length(array: Any) -> int:
    """The bytes of an array's text once each value is written out."""
    import pyarrow
    import pyarrow.compute as compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).cast("int64")
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(_length(part) for part in array.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _length(array.flatten())
    return int(array.nbytes)


@contextlib.contextmanager
def _undamaged(file: File) -> Iterator[None]:
    """What pyarrow finds wrong with a file, as one line. Errors of the network pass: they are their opener's."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith("pyarrow") or type(error) in (OSError, ValueError, UnicodeDecodeError):
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")
            raise UserError(f"{file.name}: damaged, or not a Parquet file ({reason}); fetch it again") from None
        raise
