"""Rows from JSON lines: one {"messages": [...]} or {"text": "..."} a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minipersona.errors import UserError

LONGEST_LINE = 16_000_000  # bytes of one row; a longer line is no conversation, and must not fill the memory


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a JSONL file of conversations or texts. UserErrors name the line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the source")
    try:
        with open(path, "rb") as file:
            rows = list(iterate_rows(file, str(path)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable JSONL file") from None
    if not rows:
        raise UserError(f"{path}: holds no rows; it must have one JSON object a line")
    return rows


def iterate_rows(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an open file, one at a time; empty lines are none."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{name}: line {number} is longer than {LONGEST_LINE:,} bytes; is it a JSONL file?")
        if line.strip():
            yield _row(line, f"{name}: line {number}")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{where} is not valid UTF-8; convert the file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or delete it") from None
    if not isinstance(row, dict) or not ("messages" in row or "text" in row):
        raise UserError(
            f'{where} has neither "messages" nor "text"; rows are {{"messages": [...]}} or {{"text": "..."}}'
        )
    return row
