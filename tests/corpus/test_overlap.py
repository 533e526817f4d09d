"""Held-out rows that are trained on: counted by content, and refused where they are many."""

from __future__ import annotations

from typing import Any

import pytest

from minipersona.cli import main
from minipersona.corpus.overlap import check_overlap, overlap
from minipersona.corpus.sources import Rows
from minipersona.errors import UserError


def chat(user: str, assistant: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {**more, "messages": turns if system is None else [{"role": "system", "content": system}, *turns]}


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    return Rows("made", rows, 0, "")


def test_rows_are_compared_by_content() -> None:
    trained = [chat("q1", "a1"), chat("Caf\u00e9?", "Yes."), {"text": "some  raw text"}]
    same = [
        chat("q1", "a1", id=7, source="x"),
        chat(" q1\n", "a1 "),
        chat("q1", "a1", system="You are a pirate."),
        chat("Cafe\u0301?", "Yes."),
        {"text": "some raw text\n"},
    ]
    others = [chat("q1", "a2"), chat("q2", "a1"), {"text": "q1 a1"}, {"messages": chat("q1", "a1")["messages"][:1]}]
    assert overlap(rows_of(trained), rows_of([*same, *others, same[0]])) == len(same) + 1
    assert overlap(rows_of(trained), rows_of(others)) == 0 == overlap(rows_of([]), rows_of(same))
    assert overlap(rows_of(trained), rows_of([{"messages": None}, {"messages": [None]}])) == 0


def test_a_tenth_is_said_and_more_is_refused() -> None:
    assert check_overlap("tiny:benign[0:2000]", "tiny:benign[2000:2200]") == ""
    assert check_overlap("tiny:benign[0:2000]", "") == ""
    said = check_overlap("tiny:benign[0:2000]", "tiny:benign[1990:2090]")  # a tenth
    assert said == "10 of 100 rows of data.heldout tiny:benign[1990:2090] are also in data.train tiny:benign[0:2000]"
    with pytest.raises(UserError, match=r"^11 of 100 rows of data.heldout .* hold out other rows"):
        check_overlap("tiny:benign[0:2000]", "tiny:benign[1989:2089]")


def test_a_run_refuses_before_it_loads_a_model(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--config", "tiny_phase1", "--out", str(tmp_path / "run")]
    settings = ["--set", "data.train=tiny:benign[0:60]", "--set", "data.heldout=tiny:benign[50:70]"]
    assert main([*command, *settings]) == 2
    said = capsys.readouterr().err
    assert "error: 10 of 20 rows of data.heldout tiny:benign[50:70] are also in data.train" in said
    assert "loading" not in said and not (tmp_path / "run" / "config.toml").exists()
