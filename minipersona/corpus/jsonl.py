"""Rows from JSON: one row a line, or one list of rows."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipersona.chat.rows import read_row
from minipersona.corpus.ranges import MOST_ROWS, too_many, within
from minipersona.errors import UserError
from minipersona.text_rows import read_values


def read_rows(path: Path, wanted: slice, name: str) -> list[dict[str, Any]]:
    """The rows of a JSON file of conversations or texts that are meant. UserErrors name the line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the source")
    try:
        with open(path, "rb") as file:
            return list(select(iterate_rows(file, str(path)), wanted, name))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable JSONL file") from None


def select(rows: Iterator[dict[str, Any]], wanted: slice, name: str) -> Iterator[dict[str, Any]]:
    """Those of `rows` that are meant, of which no more are read than that takes."""
    count = chosen = 0
    for count, row in enumerate(itertools.islice(rows, wanted.stop), 1):
        if count > wanted.start and (count - 1 - wanted.start) % wanted.step == 0:
            chosen += 1
            if chosen > MOST_ROWS:
                raise too_many(name, chosen)
            yield row
    within(wanted, count, name)


def iterate_rows(file: io.BufferedReader, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an open file, one at a time; empty lines are skipped."""
    for where, value in read_values(file, name):
        try:
            row = read_row(value)
        except UserError as error:
            raise UserError(f"{where} {error}") from None
        yield row
