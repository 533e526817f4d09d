"""What a terminal is shown cannot steer it, wherever the text comes from."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipersona.console
from minipersona.cli import main
from minipersona.console import Console, answer, command_line, positive, printable
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
    heldout = tmp_path / f"{HOSTILE.translate({0: None, ord('/'): None})}.jsonl"
    heldout.write_text((tmp_path / "rows.jsonl").read_text())
    for name, rows in (("config", f"jsonl:{heldout}"), ("absent", HOSTILE)):
        text = f"[data]\ntrain = {json.dumps(source)}\nheldout = {json.dumps(rows)}\n"
        (tmp_path / f"{name}.toml").write_text(text)
    extract = ["extract", "--model", "tiny", "--personas", str(tmp_path / "personas.json")]
    extract += ["--questions", str(tmp_path / "questions.jsonl")]
    for form in ([], ["--json"]):
        assert corpus_main(["describe", source, "--tokenizer", "tiny", *form]) == 0
        assert main([*extract, *form]) == 0
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--model", "tiny", "--plan"]) == 0
    assert main(["train", "--config", str(tmp_path / "absent.toml"), "--model", "tiny", "--plan"]) == 2
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


COMMANDS = [[f"minipersona{rest}", "--help"] for rest in ("", ".chat", ".tiny")]


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
    if how == "closed":
        error = run_module(
            [*tiny_extract(tmp_path, "a"), "--out", str(out)],
            stderr=subprocess.PIPE,
            preexec_fn=lambda: os.close(1),
        )
        assert error.returncode == 2 and b"exists already" in error.stderr  # what fails still fails


# ---------------------------------------------------------------- commands that a reader pastes


CHECKOUT = Path(minipersona.console.__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs of an environment that is not activated, whose interpreter runs this."""
    programs = tmp_path / "an env" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "minipersona"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    return programs


def test_the_next_command_names_what_is_found_where_it_is_printed(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = f"'{environment}/python'"
    assert command_line("evaluate", "--run", Path("my runs/a")) == f"{full} -m minipersona evaluate --run 'my runs/a'"
    assert command_line("minipersona.behaviour", "score", "r") == f"{full} -m minipersona.behaviour score r"
    (tmp_path / "evaluate.py").write_text("")  # somebody else's
    assert command_line("evaluate") == f"{full} -m minipersona evaluate"
    monkeypatch.chdir(CHECKOUT)
    assert command_line("evaluate", "--run", "runs/a") == f"{full} evaluate.py --run runs/a"

    monkeypatch.setenv("PATH", str(environment), prepend=os.pathsep)  # activated
    assert command_line("evaluate", "--run", "runs/a") == "python evaluate.py --run runs/a"
    assert command_line("minipersona.behaviour", "score", "r") == "python -m minipersona.behaviour score r"
    monkeypatch.chdir(tmp_path)
    assert command_line("evaluate", "--run", "it's") == "minipersona evaluate --run 'it'\"'\"'s'"
    monkeypatch.setattr(sys, "executable", f"{environment}/python3.9")  # beside PATH's python, and another
    (environment / "python3.9").write_text("")
    assert command_line("minipersona.behaviour") == f"'{environment}/python3.9' -m minipersona.behaviour"


@pytest.mark.parametrize("folder", [None, CHECKOUT])
def test_a_printed_command_runs_in_a_shell_without_the_environment(
    tmp_path: Path, folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder or tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    line = command_line("evaluate", "--run", tmp_path / "no run")
    assert sys.executable in line
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"{tmp_path / 'no run'}: is not a run directory" in done.stderr


# ---------------------------------------------------------------- the tests in the background of a script


@pytest.mark.parametrize("configured", [True, False])
def test_the_tests_can_interrupt_what_they_start_where_a_script_ignores_it(configured: bool) -> None:
    code = f"""
    import runpy, signal, subprocess, sys
    if {configured}:
        runpy.run_path({str(CHECKOUT / "tests" / "conftest.py")!r})
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(done.stdout.strip() or done.stderr.splitlines()[-1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.stdout.strip() == ("KeyboardInterrupt" if configured else "went on"), done.stderr
