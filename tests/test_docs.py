"""What the documents name is there: files, tests, and the functions that are said to be in a file."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("audit", "protocol", "results", "reliability", "cluster")))
FILE = re.compile(r"(?<![\w/.*-])(?:[\w-]+/)*[\w-]+\.(?:py|md)\b|\b(?:configs|tests|minipersona)/[\w./*-]*\w")
TEST = re.compile(r"(?<![\w/])test_\w+\*?(?!\.py|\w|/)")
INSIDE = re.compile(r"`([\w/]+\.py)` `([\w.]+)`")  # a file and what is in it


@cache
def names_of_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M))


def path_of(name: str, line: str) -> Path | None:
    """A file that a line of a document names: from the root, within the package, or beside one named before it."""
    folders = [ROOT, ROOT / "minipersona", ROOT / "docs"]
    before = [found for found in FILE.findall(line[: line.index(name)]) if "/" in found]
    if "/" not in name and before:
        folders = [folder / Path(before[-1]).parent for folder in folders] + folders
    return next((path for folder in folders for path in folder.glob(name)), None)


def missing(text: str) -> list[str]:
    """What a document names and is not there."""
    lost = []
    for line in text.splitlines():
        lost += [name for name in FILE.findall(line) if path_of(name, line) is None]
        lost += [name for name in TEST.findall(line) if not any(fnmatchcase(test, name) for test in names_of_tests())]
        for name, inside in INSIDE.findall(line):
            file = path_of(name, line)
            words = inside.split(".")
            if file is not None and not all(re.search(rf"\b{word}\b", file.read_text()) for word in words):
                lost.append(f"{name} {inside}")
    return lost


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    assert missing(text) == []
    assert FILE.search(text)  # else this test would show nothing


def test_the_audit_names_many() -> None:
    text = (ROOT / "docs/audit.md").read_text()
    assert len(FILE.findall(text)) > 60 and len(TEST.findall(text)) > 60 and len(INSIDE.findall(text)) > 30


@pytest.mark.parametrize(
    "line",
    ["`model/no_such_file.py`", "| `minipersona/model/network.py`, `parquet.py` |", "`tests/model/test_nothing.py`",
     "[log](no_log.md)", "python train.py --config configs/nothing.toml", "tests/no_such_folder",
     "`test_that_nobody_wrote`", "`test_nowhere_*`", "`minipersona/no_such_folder/`",
     "`model/network.py` `Perceptron`"],
)  # fmt: skip
def test_control_a_name_that_is_made_up_is_found_missing(line: str) -> None:
    assert len(missing(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["`model/network.py` `RMSNorm`", "| `minipersona/model/network.py`, `attention.py` |", "[log](log.md)",
     "python train.py --config configs/phase1.toml", "`tests/model/`", "`tests/test_layout.py`, `test_dropout_*`"],
)  # fmt: skip
def test_control_a_name_that_is_there_is_not_missing(line: str) -> None:
    assert missing(line) == []
