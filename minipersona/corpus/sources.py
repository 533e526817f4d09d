"""Where rows come from. A source is named by one string, with an optional range of rows:

jsonl:PATH            one {"messages": [...]} or {"text": "..."} a line
tiny:NAME             a set of the embedded world: benign, broad, raw_text or em
jsonl:PATH[0:6000]    the first 6,000 rows, in stored order
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.chat import ChatTokenizer, Document
from minipersona.chat.tokenizer import Supervise
from minipersona.errors import UserError
from minipersona.files import data_dir, sha256

LONGEST_LINE = 16_000_000  # bytes of one row; a longer line is no conversation, and must not fill the memory

_SOURCE = re.compile(r"(?P<kind>[a-z-]+):(?P<name>.*?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Rows:
    """The rows of a source, in stored order, and what identifies them."""

    source: str
    rows: list[dict[str, Any]]
    first: int  # the stored index of rows[0]
    digest: str  # SHA-256 of the file

    def __len__(self) -> int:
        return len(self.rows)


def read_source(source: str) -> Rows:
    """The rows that a source string names. UserError where it is malformed, missing, empty or too short."""
    match = _SOURCE.fullmatch(source)
    if match is None or match["kind"] not in ("jsonl", "tiny"):
        raise UserError(f"source {source!r} is unknown; write jsonl:PATH or tiny:NAME, with [first:last] for a range")
    path = Path(match["name"]).expanduser() if match["kind"] == "jsonl" else _tiny_set(match["name"])
    rows = read_rows(path)
    start = int(match["start"] or 0)
    stop = int(match["stop"]) if match["stop"] else len(rows)
    if not start < stop <= len(rows):
        raise UserError(f"source {source!r}: {path.name} has {len(rows):,} rows; choose a range within them")
    return Rows(source, rows[start:stop], start, sha256(path))


def _tiny_set(name: str) -> Path:
    directory = data_dir() / "tiny"
    path = directory / f"{name}.jsonl"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        known = ", ".join(sorted(file.stem for file in directory.glob("*.jsonl")))
        raise UserError(f"source tiny:{name} is unknown; the embedded sets are {known}")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a JSONL file of conversations or texts. UserErrors name the line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the source")
    rows = []
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE:,} bytes; is it a JSONL file?")
            if line.strip():
                rows.append(_row(line, f"{path}: line {number}"))
    if not rows:
        raise UserError(f"{path}: holds no rows; it must have one JSON object a line")
    return rows


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


def tokenize(
    rows: Rows, tokenizer: ChatTokenizer, *, supervise: Supervise = "last", max_tokens: int = 2048
) -> list[Document]:
    """Every row as a Document, in order. Conversations supervise responses, raw texts all tokens but the first."""
    documents: list[Document | None] = [None] * len(rows)
    chats = [i for i, row in enumerate(rows.rows) if "messages" in row]
    try:
        encoded = tokenizer.encode_many(
            [rows.rows[i]["messages"] for i in chats],
            supervise=supervise,
            max_tokens=max_tokens,
        )
    except UserError as error:
        raise UserError(f"{rows.source}: {_name_row(str(error), chats, rows.first)}") from None
    for i, document in zip(chats, encoded, strict=True):
        documents[i] = document
    for i, row in enumerate(rows.rows):
        if documents[i] is None:
            try:
                documents[i] = tokenizer.encode_text(row["text"], max_tokens)
            except UserError as error:
                raise UserError(f"{rows.source}: row {rows.first + i}: {error}") from None
    return [document for document in documents if document is not None]


def _name_row(message: str, chats: Sequence[int], first: int) -> str:
    """The tokenizer counts within the list it was given; a user counts within the file."""
    return re.sub(r"^rows\[(\d+)\]", lambda match: f"row {first + chats[int(match[1])]}", message)
