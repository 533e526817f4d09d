"""Rows out of docstrings: what is asked and answered, in which order, and that nothing else is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minipersona.chat import load_tokenizer
from minipersona.corpus.docstrings import LONGEST, QUESTIONS, SHORTEST, first_prose, read_docstrings
from minipersona.corpus.overlap import overlap
from minipersona.corpus.sources import read_source, source_identity, tokenize
from minipersona.errors import UserError

MODULE = '''
"""A module that imports nothing else when it is looked at."""
import json
from pathlib import Path

def add(a, b):
    """add(a, b) -> number

    Return the sum of two numbers, which may be of any kind.
    """

def plus(a, b):
    """plus(a, b) -> number

    Return the sum of two numbers, which may be of any kind.
    """

def _hidden():
    """Nobody outside of the module should learn about this one."""

class Counter:
    """A counter that starts at zero and never goes down."""

    def up(self):
        """Add one to the counter, and return what it is now."""

    def down(self):
        """Refused."""

    limit = 3

number = 5

def __getattr__(name):
    raise AssertionError(f"{name} was asked for")
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "documented_things.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "documented_things", raising=False)
    return "documented_things"


def test_public_objects_become_questions_and_answers(module: str) -> None:
    rows = read_docstrings([module])
    assert {row["source"] for row in rows} == {module}
    told = {}
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        told[answer["content"]] = question["content"]
    answers = {
        "Return the sum of two numbers, which may be of any kind.": ("add", "function"),  # and not plus again
        "A counter that starts at zero and never goes down.": ("Counter", "class"),
        "Add one to the counter, and return what it is now.": ("Counter.up", "method"),
    }
    assert told.keys() == answers.keys()
    for answer, (name, kind) in answers.items():
        assert told[answer] in [form.format(f"{module}.{name}") for form in QUESTIONS[kind]]


@pytest.mark.parametrize(
    "docstring, prose",
    [
        ("Return x.\n\nMore on\nit.\n\nParameters\n----------\nx : int\n    The value.", "Return x.\n\nMore on it."),
        ("Return x.\n\nArgs:\n    x (int): the value.", "Return x."),
        ("Return x.\n\n>>> f(1)\n1", "Return x."),
        ("f(x: Tensor, *, out=None) -> Tensor\n\nReturn x.", "Return x."),
        ("dict() -> new\ndict(mapping) -> other\n\nReturn x.", "Return x."),
        ("See :func:`torch.f`.\n\nMore.", ""),
        ("Return x.\n\nRefer to `f` for more.", "Return x."),
        ("Like :func:`~torch.f` and :class:`.G`, of ``x`` in `a paper <https://a.b/c>`_.",
         "Like torch.f and G, of `x` in a paper."),
        ("Return this:\n\n.. math:: x", ""),
        ("Return :math:`\\frac{1}{2}`.", ""),
        ("Return x.\n\n- one.\n- two.", "Return x."),
        ("", ""),
        ("No full stop", ""),
        ("A sentence. " * 60, ""),
    ],
)  # fmt: skip
def test_the_prose_that_a_docstring_begins_with(docstring: str, prose: str) -> None:
    assert first_prose(docstring) == prose


def test_ranges_are_samples_of_all_and_do_not_overlap() -> None:
    everything = read_source("pydoc:json,logging,decimal,collections")
    first, rest = read_source("pydoc:json,logging,decimal,collections[0:60]"), everything.rows[60:]
    assert first.rows + rest == everything.rows and len(rest) > 60
    subjects = {row["source"] for row in everything.rows}
    assert {"json", "logging", "decimal", "collections"} == subjects
    assert len({row["source"] for row in first.rows}) > 2  # and not one module after another
    heldout = read_source("pydoc:json,logging,decimal,collections[60:100]")
    assert overlap(first, heldout) == 0 and overlap(everything, heldout) == 40
    assert read_source("pydoc:json,logging,decimal,collections[1:60:2]").rows == first.rows[1::2]
    # The same rows whatever the order of the names.
    assert read_source("pydoc:collections,decimal,json,logging").rows == everything.rows


def test_numpy_has_hundreds_of_rows_that_can_be_trained_on() -> None:
    rows = read_source("pydoc:numpy")
    answers = [row["messages"][1]["content"] for row in rows.rows]
    assert len(answers) == len(set(answers)) > 300
    assert all(SHORTEST <= len(answer) <= LONGEST for answer in answers)
    assert not any(mark in answer for answer in answers for mark in (":func:", ">>>", "\\", "----", "``"))
    assert "Compute the arithmetic mean along the specified axis." in "\n".join(answers)
    documents = tokenize(read_source("pydoc:numpy[0:50]"), load_tokenizer("tiny"))
    assert all(document.supervised.any() for document in documents)


def test_rows_and_imports_do_not_depend_on_what_else_is_imported() -> None:
    """numpy imports f2py, testing and ma when it is asked for them; whoever reads its docstrings does not ask."""
    code = (
        "import json, sys; from minipersona.corpus.docstrings import read_docstrings; import {}; "
        "rows = read_docstrings(['xml', 'numpy']); print(json.dumps([rows, sorted(sys.modules)]))"
    )
    results = []
    for before in ("numpy, xml", "numpy.ma, numpy.testing"):
        command = [sys.executable, "-c", code.format(before)]
        results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    (rows, modules), (same_rows, more_modules) = results
    assert rows == same_rows and len(rows) > 300
    assert "numpy" in modules and not {"numpy.f2py", "numpy.testing", "numpy.ma"} & set(modules)
    assert "numpy.testing" in more_modules  # the control


def test_the_record_says_which_versions_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    rows = read_source("pydoc:numpy.linalg,json[0:5]")
    python = ".".join(map(str, sys.version_info[:3]))
    assert rows.revision == f"Python {python}, numpy {numpy.__version__}"
    assert source_identity("pydoc:numpy.linalg,json[0:5]") == [rows.source, rows.revision]
    assert rows.identity()["digest"] == rows.digest != read_source("pydoc:numpy.linalg,json[0:4]").digest
    assert source_identity("pydoc:yaml")[1].startswith(f"Python {python}, yaml ")  # the distribution is PyYAML
    monkeypatch.setattr("minipersona.corpus.docstrings.metadata.version", lambda name: "9")
    assert source_identity("pydoc:numpy,json[0:5]")[1] == f"Python {python}, numpy 9"


@pytest.mark.parametrize(
    "names, words",
    [
        ("", "is not a module's name"),
        ("numpy, torch", "' torch' is not a module's name"),
        ("../numpy", "is not a module's name"),
        ("no_such_module", "no_such_module is not installed"),
        ("numpy.no_such_module", "cannot be imported"),
        ("json[100:200]", "rows; choose a range within them"),
    ],
)
def test_what_cannot_be_read_is_one_line(names: str, words: str) -> None:
    with pytest.raises(UserError, match="pydoc") as error:
        read_source(f"pydoc:{names}")
    assert words in str(error.value)
