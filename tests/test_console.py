"""What a terminal is shown cannot steer it, wherever the text comes from."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipersona.cli import main
from minipersona.console import Console, answer, positive, printable
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


FULL = Path("/dev/full")  # to whose writers Linux says that the disk is full


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "out, err, fails, status",
    [
        (None, FULL, False, 0),
        (None, FULL, True, 2),
        (FULL, None, False, 2),
        (FULL, FULL, False, 2),
        (None, None, False, 0),
    ],
)
def test_a_log_on_a_full_disk_stops_no_work(out: Path | None, err: Path | None, fails: bool, status: int) -> None:
    code = f"""
    import sys
    from minipersona.console import Console, answer
    from minipersona.errors import UserError
    def command():
        for _ in range(3):
            Console().say("a remark")
        print("a result")
        if {fails}:
            raise UserError("no such file")
    sys.exit(answer(command))
    """
    with contextlib.ExitStack() as stack:
        pipes = [subprocess.PIPE if path is None else stack.enter_context(open(path, "w")) for path in (out, err)]
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, stdout=pipes[0], stderr=pipes[1], text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout in (None, "a result\n")
    errors = [line for line in (done.stderr or "").splitlines() if line != "a remark"]
    full = "error: cannot write standard output: No space left on device; free some space or write elsewhere"
    assert errors == ([full] if out and not err else [])


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


# ---------------------------------------------------------------- numbers among the options


def test_options_take_positive_numbers() -> None:
    assert positive(int)("7") == 7 and positive(float)("0.5") == 0.5
    for kind, texts in ((int, ("0", "-1", "1.5", "nan", "x", "")), (float, ("0", "-0.1", "nan", "inf", "x", ""))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="is not a positive"):
                positive(kind)(text)
