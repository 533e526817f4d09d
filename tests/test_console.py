"""What a terminal is shown cannot steer it, wherever the text comes from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipersona.cli import main
from minipersona.console import Console, answer, printable
from minipersona.corpus.__main__ import main as corpus_main
from minipersona.errors import UserError

# Clear the screen, set its title, go back over the line, a C1 control, text that runs backwards, a null.
HOSTILE = "\x1b[2J\x1b]0;title\x07 \rover\x9b31m \u202eback \x00\x7f"


def steers(text: str) -> bool:
    """Whether a terminal would do more with a text than show it."""
    return any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u200f" for c in text)


@given(st.text())
def test_what_is_printable_steers_nothing_and_the_rest_is_left_as_it_is(text: str) -> None:
    assert not steers(printable(text))
    assert printable(text) == text or not text.isprintable()


def test_errors_tracebacks_and_remarks(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError(f"{HOSTILE}: no such file")

    assert steers(HOSTILE)  # the control
    assert answer(fail) == answer(fail, debug=True) == 2
    stream = io.StringIO()
    Console(stream=stream).say(HOSTILE)
    said = capsys.readouterr().err + stream.getvalue()
    assert said.count("\\x1b[2J\\x1b]0;title") == 4 and "Traceback" in said  # two errors, a traceback, a remark
    assert not steers(said)


def test_no_command_passes_on_what_a_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "source": HOSTILE}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    source = f"jsonl:{tmp_path / 'rows.jsonl'}"
    (tmp_path / "personas.json").write_text(json.dumps({"eval_personas": {HOSTILE: "You are A.", "b": "You are B."}}))
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?"}\n{"question": "How?"}\n')
    (tmp_path / "config.toml").write_text(f"[data]\ntrain = {json.dumps(source)}\nheldout = {json.dumps(HOSTILE)}\n")
    extract = ["extract", "--model", "tiny", "--personas", str(tmp_path / "personas.json")]
    extract += ["--questions", str(tmp_path / "questions.jsonl")]
    for form in ([], ["--json"]):
        assert corpus_main(["describe", source, "--tokenizer", "tiny", *form]) == 0
        assert main([*extract, *form]) == 0
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--model", "tiny", "--plan"]) == 0
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--model", HOSTILE]) == 2
    shown = capsys.readouterr()
    assert "title" in shown.out and "title" in shown.err and not steers(shown.out + shown.err)
