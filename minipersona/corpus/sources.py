"""Where rows come from. A source is named by one string, with an optional range of rows:

tulu                  allenai/tulu-3-sft-mixture: the registered benign data
fineweb-edu           HuggingFaceFW/fineweb-edu, sample-10BT: raw texts; name a range
jsonl:PATH            one row a line, or one JSON list of rows
parquet:PATH          a column for each key of a row; * in PATH joins several files, in the order of their names
hub:REPO/FILE         such a .jsonl, .json or .parquet file of a dataset on the Hub; FILE@REVISION pins it
pydoc:MODULES         questions about what the named modules document, answered by the docstrings: pydoc:numpy,torch.nn
tiny:NAME             a set of the embedded world: benign, broad, raw_text or em
tulu[0:6000]          the first 6,000 rows, in stored order
tulu[::150]           every 150th row: a sample of the whole

The forms of a row are those of `minipersona.chat.rows`: messages, ShareGPT, prompt and completion, Alpaca, raw text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.chat import ChatTokenizer, Document
from minipersona.chat.rows import check_row
from minipersona.chat.tokenizer import Supervise
from minipersona.corpus.docstrings import module_names, read_docstrings, versions
from minipersona.corpus.jsonl import read_rows
from minipersona.corpus.parquet import LocalFile, read_parquet
from minipersona.corpus.ranges import within
from minipersona.corpus.remote import NAMED, HubDataset, hub_dataset, read_dataset
from minipersona.errors import UserError
from minipersona.files import data_dir, digest, sha256, user_path

_SOURCE = re.compile(
    r"(?P<kind>[a-z-]+)(?::(?P<name>.*?))?(?:\[(?P<first>\d{0,18}):(?P<last>\d{0,18})(?::(?P<step>\d{0,18}))?\])?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Rows:
    """The rows of a source, in stored order, and what identifies them."""

    source: str
    rows: list[dict[str, Any]]
    first: int  # the stored index of rows[0]
    digest: str  # SHA-256 of the file, or of several, joined; for rows that are not of a file here, of their JSON
    step: int = 1  # from one stored index to the next
    revision: str | None = None  # the commit of a dataset on the Hub; the versions of documented modules

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others, without them, for the record."""
        return {"source": self.source, "rows": len(self), "digest": self.digest, "revision": self.revision}


def read_source(source: str) -> Rows:
    """The rows that a source string names. UserError where it is malformed, missing, empty or too short."""
    parts = _SOURCE.fullmatch(source)
    if parts is None or (parts["name"] is None) != (parts["kind"] in NAMED):
        raise _unknown(source)
    wanted = slice(int(parts["first"] or 0), int(parts["last"]) if parts["last"] else None, int(parts["step"] or 1))
    if not wanted.step or (wanted.stop is not None and wanted.stop <= wanted.start):
        raise UserError(f"source {source!r}: the range holds no rows; write [first:last] with first below last")
    match parts["kind"], parts["name"]:
        case "jsonl", name:
            return _from_jsonl(source, user_path(name), wanted)
        case "tiny", name:
            return _from_jsonl(source, _tiny_set(name), wanted)
        case "parquet", name:
            return _from_parquet(source, user_path(name), wanted)
        case "hub", name:
            return _from_hub(source, hub_dataset(name), wanted)
        case "pydoc", name:
            return _from_docstrings(source, module_names(name), wanted)
        case name, None:
            return _from_hub(source, NAMED[name], wanted)
    raise _unknown(source)


def source_identity(source: str) -> list[str]:
    """What tells a source's rows from others without reading them: its name, and its commit or its files' SHA-256.

    Of documented modules it is their versions. UserError where the source is malformed or a local file is missing.
    """
    parts = _SOURCE.fullmatch(source)
    if parts is None or (parts["name"] is None) != (parts["kind"] in NAMED):
        raise _unknown(source)
    kind, name = parts["kind"], parts["name"]
    if kind in NAMED or kind == "hub":
        dataset = NAMED[kind] if name is None else hub_dataset(name)
        return [source, dataset.revision]
    if kind == "pydoc":
        return [source, versions(module_names(name))]
    path = _tiny_set(name) if kind == "tiny" else user_path(name)
    paths = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if kind not in ("tiny", "jsonl", "parquet"):
        raise _unknown(source)
    if not paths or not all(path.is_file() for path in paths):
        raise UserError(f"{path}: no such file; check the path of the source")
    return [source, sha256(*paths)]


def _unknown(source: str) -> UserError:
    kinds = f"{', '.join(NAMED)}, jsonl:PATH, parquet:PATH, hub:REPO/FILE, pydoc:MODULES or tiny:NAME"
    return UserError(f"source {source!r} is unknown; write {kinds}, with [first:last] for a range")


def _from_jsonl(source: str, path: Path, wanted: slice) -> Rows:
    rows = read_rows(path, wanted, repr(source))
    return Rows(source, rows, wanted.start, sha256(path), wanted.step)


def _from_parquet(source: str, path: Path, wanted: slice) -> Rows:
    paths = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not paths or not all(path.is_file() for path in paths):
        raise UserError(f"{path}: no such file; check the path of the source")
    _, rows = read_parquet([LocalFile(path) for path in paths], wanted, repr(source))
    return Rows(source, list(rows), wanted.start, sha256(*paths), wanted.step)


def _from_hub(source: str, dataset: HubDataset, wanted: slice) -> Rows:
    kept = read_dataset(dataset, wanted, source)
    return Rows(source, kept.rows, wanted.start, kept.digest, wanted.step, kept.commit)


def _from_docstrings(source: str, names: list[str], wanted: slice) -> Rows:
    revision, rows = versions(names), read_docstrings(names)
    chosen = [rows[index] for index in within(wanted, len(rows), repr(source))]
    return Rows(source, chosen, wanted.start, digest(chosen), wanted.step, revision)


def _tiny_set(name: str) -> Path:
    directory = data_dir() / "tiny"
    path = directory / f"{name}.jsonl"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        known = ", ".join(sorted(file.stem for file in directory.glob("*.jsonl")))
        raise UserError(f"source tiny:{name} is unknown; the embedded sets are {known}")
    return path


def tokenize(
    rows: Rows, tokenizer: ChatTokenizer, *, supervise: Supervise = "last", max_tokens: int = 2048
) -> list[Document]:
    """Every row as a Document, in order. Conversations supervise responses, raw texts all tokens but the first."""
    documents: list[Document | None] = [None] * len(rows)
    chats = [i for i, row in enumerate(rows.rows) if "messages" in row]
    texts = [i for i, row in enumerate(rows.rows) if "messages" not in row]
    with naming(rows, range(len(rows))):
        for i, row in enumerate(rows.rows):
            check_row(row, f"rows[{i}]")
    with naming(rows, chats):
        encoded = tokenizer.encode_many([rows.rows[i]["messages"] for i in chats], supervise, max_tokens)
    with naming(rows, texts):
        encoded += tokenizer.encode_texts([rows.rows[i]["text"] for i in texts], max_tokens)
    for i, document in zip([*chats, *texts], encoded, strict=True):
        documents[i] = document
    return [document for document in documents if document is not None]


@contextlib.contextmanager
def naming(rows: Rows, chosen: Sequence[int]) -> Iterator[None]:
    """Name a row in an error as the file counts it: ``rows[k]`` in a message becomes the stored index of chosen[k]."""
    try:
        yield
    except UserError as error:
        numbered = re.sub(
            r"^rows\[(\d+)\]", lambda match: f"row {rows.first + chosen[int(match[1])] * rows.step}", str(error)
        )
        raise UserError(f"{rows.source}: {numbered}") from None
