"""What a terminal is shown cannot steer it, wherever the text comes from."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

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


# ---------------------------------------------------------------- streams that cannot take everything


def run_module(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run ``python -m`` with these arguments; bytes out, since the encoding is what is tested."""
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, timeout=120, **options)


def tiny_extract(folder: Path, name: str) -> list[str]:
    """The arguments of an extraction of two personas, the first called `name`, by one question."""
    personas = {"eval_personas": {name: "You are A.", "b": "You are B."}}
    (folder / "personas.json").write_text(json.dumps(personas, ensure_ascii=False), encoding="utf-8")
    (folder / "questions.jsonl").write_text('{"question": "Why?"}\n{"question": "How?"}\n')
    files = ["--personas", str(folder / "personas.json"), "--questions", str(folder / "questions.jsonl")]
    return ["minipersona", "extract", "--model", "tiny", *files]


@pytest.mark.parametrize(
    "encoding, carried",
    [
        ({"PYTHONIOENCODING": "latin-1"}, "é".encode("latin-1")),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\\xe9"),
        ({"PYTHONIOENCODING": "utf-8"}, "é".encode()),  # the control: there nothing is escaped
    ],
)
def test_a_stream_carries_what_its_encoding_has_and_the_rest_escaped(
    tmp_path: Path, encoding: dict[str, str], carried: bytes
) -> None:
    done = run_module([*tiny_extract(tmp_path, "Жé"), "--method", "B"], env=encoding, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    letter = "Ж".encode() if "utf-8" in encoding.values() else b"\\u0416"
    assert letter + carried + b" " in done.stdout  # a line of the table


COMMANDS = [[f"minipersona{rest}", "--help"] for rest in ("", ".chat", ".corpus", ".behaviour", ".model", ".tiny")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_ends_quietly_where_nobody_reads_it(command: list[str]) -> None:
    assert b"usage:" in run_module(command, capture_output=True).stdout  # the control
    closed = run_module(command, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    read, write = os.pipe()
    os.close(read)
    unread = run_module(command, stderr=subprocess.PIPE, stdout=write)
    os.close(write)
    assert [(done.returncode, done.stderr) for done in (closed, unread)] == [(0, b"")] * 2


@pytest.mark.parametrize("how", ["closed", "unread", "nothing open"])
def test_the_work_is_done_where_nobody_reads_the_result(tmp_path: Path, how: str) -> None:
    out = tmp_path / "vectors.safetensors"
    read, write = os.pipe()
    os.close(read)
    close = {"closed": [1], "unread": [], "nothing open": [1, 2]}[how]
    done = run_module(
        [*tiny_extract(tmp_path, "a"), "--out", str(out)],
        stdout=write,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: [os.close(stream) for stream in close],
    )
    os.close(write)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Error" not in done.stderr
    assert out.is_file() and (b"wrote" in done.stderr) == (how != "nothing open")
    error = run_module([*tiny_extract(tmp_path, "a"), "--out", str(out)], stderr=subprocess.PIPE)
    assert error.returncode == 2 and b"exists already" in error.stderr  # what fails still fails
