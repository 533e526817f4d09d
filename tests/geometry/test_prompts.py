"""Persona and question files of a user's own: what is accepted, and what is refused in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minipersona.cli.options import FORMS
from minipersona.errors import UserError
from minipersona.geometry.prompts import load_personas, load_questions


def test_shipped_sets() -> None:
    personas, questions = load_personas(), load_questions()
    assert (personas.name, questions.name) == ("shipped", "shipped")
    assert len(personas.prompts) == 12 and len(set(questions.questions)) == 240


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "eval_personas"),
        ([], "eval_personas"),
        ({"eval_personas": {"a": "x"}}, "has 1 personas; name at least 2"),
        ({"eval_personas": {}}, "has 0 personas; name at least 2"),
        ({"eval_personas": {"a": "x", "b": ""}}, "'b' has no system prompt"),
        ({"eval_personas": {"a": "x", "b": 3}}, "'b' has no system prompt"),
        ({"eval_personas": {"a": "x", "b": "x"}}, "same system prompt"),
        ({"eval_personas": {"a": "x", "b": "y"}, "eval_persona_order": ["a"]}, "does not list every persona"),
        ({"eval_personas": {"1": "x", "b": "y"}, "eval_persona_order": [1, "b"]}, "does not list every persona"),
        ({"eval_personas": {"a": "x", "[1]": "y"}, "eval_persona_order": ["a", [1]]}, "does not list every persona"),
        ({"eval_personas": {"a": "x", "\ud800": "y"}}, "surrogate"),
    ],
)
def test_bad_personas(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "personas.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as raised:
        load_personas(str(path))
    assert "\n" not in str(raised.value)


def test_a_set_that_one_persona_is_enough_for_has_one(tmp_path: Path) -> None:
    path = tmp_path / "personas.json"
    path.write_text('{"eval_personas": {}}')
    with pytest.raises(UserError, match=r"has 0 personas; name at least 1$"):
        load_personas(str(path), at_least=1)
    path.write_text('{"eval_personas": {"a": "x"}}')
    assert load_personas(str(path), at_least=1).prompts == {"a": "x"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no questions"),
        ('{"question": "a?"}\n{"question": "b?', "line 2 is not JSON"),  # torn, and not to be dropped silently
        ('{"question": 3}\n', "row 1"),
        ('["a?"]\n', "row 1"),
        ('{"question": "\\ud800"}\n', "surrogate"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_bad_questions(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_questions(str(path))


@pytest.mark.parametrize(
    "name, content",
    [
        ("questions.jsonl", '{"question": "a?"}\n\n{"question": "b?", "id": 1}\n'),
        ("questions.json", '["a?", "b?"]'),
        ("questions.json", '[{"question": "a?"}, {"question": "b?"}]'),
        ("questions.txt", "a?\n\n  b? \r\n"),
        ("questions", "a?\nb?"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_form_of_questions(tmp_path: Path, name: str, content: str, mark: str) -> None:
    path = tmp_path / name
    path.write_bytes((mark + content).encode())
    assert load_questions(str(path)).questions == ["a?", "b?"]


def test_the_forms_that_help_and_readme_show_are_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = dict(line.split(maxsplit=1) for line in FORMS.splitlines()[1:])
    assert shown.keys() == {"personas.json", "questions.jsonl", "questions.txt"}
    assert all(name in readme and content.split("; ")[0] in readme for name, content in shown.items())
    (tmp_path / "personas.json").write_text(shown["personas.json"])
    assert list(load_personas(str(tmp_path / "personas.json")).prompts) == ["pirate", "poet"]
    line = shown["questions.jsonl"].split(", one a line")[0]
    (tmp_path / "questions.jsonl").write_text(f"{line}\n{line.replace('courage', 'time')}\n")
    (tmp_path / "questions.json").write_text('["What is courage?", "What is time?"]')  # "a list of texts"
    (tmp_path / "questions.txt").write_text("What is courage?\nWhat is time?\n")
    for ending in ("jsonl", "json", "txt"):
        found = load_questions(str(tmp_path / f"questions.{ending}")).questions
        assert found == ["What is courage?", "What is time?"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("questions.txt", "", "no questions"),
        ("questions.txt", "a?\n", "one question"),
        ("questions.txt", '{"question": "a?"}\n{"question": "b?"}\n', "begins like JSON; name it .jsonl"),
        ("questions.txt", '["a?", "b?"]', "begins like JSON"),
        ("questions.txt", b"\xff", "line 1 is not valid UTF-8"),
        ("questions.json", '{"question": "a?"}', "is not a JSON list"),
        ("questions.json", '["a?", ""]', "row 2 has no question"),
        ("questions.json", '["a?", {"text": "b?"}]', "row 2 has no question"),
        ("questions.jsonl", gzip.compress(b"a?", mtime=0), "questions.jsonl: is gzip-compressed; decompress it"),
        ("questions.json", gzip.compress(b"a?", mtime=0), "is gzip-compressed; decompress it"),
        ("questions.txt", gzip.compress(b"a?", mtime=0), "is gzip-compressed; decompress it"),
    ],
)
def test_bad_questions_in_other_forms(tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load_questions(str(path))


def test_personas_with_a_byte_order_mark_and_compressed_ones(tmp_path: Path) -> None:
    content = json.dumps({"eval_personas": {"a": "You are A.", "b": "You are B."}}).encode()
    path = tmp_path / "personas.json"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert load_personas(str(path)).prompts == {"a": "You are A.", "b": "You are B."}
    path.write_bytes(gzip.compress(content, mtime=0))
    with pytest.raises(UserError, match=r"personas.json: is gzip-compressed; decompress it"):
        load_personas(str(path))


@pytest.mark.parametrize("source", ["./shipped", "sets/shipped", "sets/registered", "./registered", "shipped.json"])
def test_only_a_bare_name_is_a_shipped_set(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (load_personas, load_questions):
        with pytest.raises(UserError, match=rf"{Path(source)}: no such file"):
            load(source)


def test_a_question_may_be_there_twice(tmp_path: Path) -> None:
    """The registered set has one that is."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a?"}\n{"question": "b?"}\n{"question": "a?"}\n')
    assert load_questions(str(path)).questions == ["a?", "b?", "a?"]
