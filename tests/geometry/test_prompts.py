"""Persona and question files of a user's own: what is accepted, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
        ({"eval_personas": {"a": "x"}}, "at least two"),
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


def test_a_question_may_be_there_twice(tmp_path: Path) -> None:
    """The registered set has one that is."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a?"}\n{"question": "b?"}\n{"question": "a?"}\n')
    assert load_questions(str(path)).questions == ["a?", "b?", "a?"]
