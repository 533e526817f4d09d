"""Rows that came over the network, kept as JSON lines: a second run needs no network, and reads the same bytes.

Two files an entry, under HF_HOME: KEY.jsonl, the rows, and KEY.json, a note of what they are, of the commit that
they were read at and of the SHA-256 of the rows file. An entry without its note was never finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.errors import UserError
from minipersona.files import digest, read_json, write_atomically, write_json
from minipersona.hub import cache_dir, make_cache_dir


@dataclass(frozen=True)
class Kept:
    """An entry: rows, the commit that they were read at, the SHA-256 of their JSON lines."""

    rows: list[dict[str, Any]]
    commit: str
    digest: str


def load(what: dict[str, Any]) -> Kept | None:
    """The rows kept for `what` (JSON values that identify them), or None. UserError where they have been altered."""
    path, note_path = _paths(what)
    if not (path.is_file() and note_path.is_file()):
        return None
    note = read_json(note_path)
    found = hashlib.sha256()
    rows = []
    try:
        with open(path, "rb") as file:
            for line in file:
                found.update(line)
                rows.append(json.loads(line))
        if note["what"] == what and note["sha256"] == found.hexdigest():
            return Kept(rows, str(note["commit"]), note["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: is not what was recorded when it was fetched; delete it to fetch it again")


def store(what: dict[str, Any], commit: str, rows: Iterable[dict[str, Any]]) -> Kept:
    """Write the rows as they come, whole or not at all, and read them back."""
    path, note_path = _paths(what)
    make_cache_dir("rows")
    written = hashlib.sha256()
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            # ASCII, so that half a surrogate pair survives
            line = json.dumps(row, default=_as_text).encode() + b"\n"
            written.update(line)
            file.write(line)
    write_json(note_path, {"what": what, "commit": commit, "sha256": written.hexdigest()})
    kept = load(what)
    assert kept is not None
    return kept


def _as_text(value: object) -> str:
    """Dates and the like, in keys that no template reads. Bytes may be content, and are not text."""
    if isinstance(value, bytes):
        raise UserError("a column of the Parquet file holds bytes, not text; convert it to strings")
    return str(value)


def _paths(what: dict[str, Any]) -> tuple[Path, Path]:
    key = digest(what)[:32]
    directory = cache_dir("rows")
    return directory / f"{key}.jsonl", directory / f"{key}.json"
