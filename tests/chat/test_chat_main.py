"""The inspection command: what it shows, and that it fails in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minipersona.chat
from minipersona.chat.__main__ import escape, main

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nBye."}]}


@pytest.fixture
def show(parts_dir, tmp_path, capsys):
    def run(text: str, *options: str) -> tuple[int, str, str]:
        file = tmp_path / "rows.jsonl"
        file.write_text(text)
        status = main([str(file), "--tokenizer", str(parts_dir), *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_supervised_tokens_are_bracketed(show):
    status, out, err = show(json.dumps(ROW))
    assert (status, err) == (0, "")
    assert "<|im_start|>assistant\n⟦Hello.\nBye.<|im_end|>\n⟧" in out
    assert "line 1: " in out and " supervised (" in out and "--- 1 conversations" in out


def test_color_ends_with_each_line(show):
    _, out, _ = show(json.dumps(ROW), "--color")
    assert "\x1b[32mHello.\x1b[0m\n\x1b[32mBye.<|im_end|>\x1b[0m\n" in out
    assert "⟦" not in out


def test_lines_and_one_list_are_the_same(show):
    _, lines, _ = show("\n" + "\n\n".join([json.dumps(ROW)] * 3) + "\n")
    _, listed, _ = show(json.dumps([ROW] * 3, indent=1))
    assert lines.count("⟦") == listed.count("⟦") == 3
    assert lines.splitlines()[-1] == listed.splitlines()[-1]
    assert "--- 0 conversations" in show("")[1]


def test_forms_of_rows_and_templates(show):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.\nBye."}]}
    assert show(json.dumps(row))[1] == show(json.dumps(ROW))[1]
    _, out, _ = show(json.dumps(row), "--template", "chatml-qwen2")
    assert out.startswith("---") and "\n<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" in out
    assert "template chatml-qwen2: " in out.splitlines()[-1]


def test_a_terminal_gets_colours_unless_no_color_is_set(show, monkeypatch):
    for value, options, coloured in [
        (None, (), True),
        ("", (), True),  # set but empty counts as not set
        ("1", (), False),
        ("0", (), False),  # any text counts
        ("1", ("--color",), True),  # what the command line says comes first
    ]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.delenv("NO_COLOR", raising=False)
        if value is not None:
            monkeypatch.setenv("NO_COLOR", value)
        out = show(json.dumps(ROW), *options)[1]
        assert ("\x1b[" in out, "⟦" in out) == (coloured, not coloured), (value, options)


def test_rows_and_turns_are_chosen(show):
    row = {"messages": ROW["messages"] * 2}
    assert show(json.dumps(row) + "\nnot reached", "--rows", "1", "--supervise", "all")[1].count("⟦") == 2


def test_lost_responses_are_counted(show):
    status, out, _ = show(json.dumps(ROW), "--max-tokens", "3")
    assert status == 0
    assert "truncated before its response" in out
    assert "1 truncated, 1 with nothing supervised" in out


def test_control_characters_are_escaped(show):
    row = {"messages": [{"role": "assistant", "content": "\x1b[2J\r\x07\x9b\u202e\ttab é"}]}
    for option in ((), ("--color",)):
        out = show(json.dumps(row), *option)[1]
        assert "\\u001b[2J\\u000d\\u0007\\u009b\\u202e\\u0009tab é" in out
        assert "\x1b[2J" not in out
    assert escape("a\nb") == "a\nb"


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("{", (), "rows.jsonl: line 1 is not valid JSON"),
        (json.dumps(ROW) + "\n[]", (), 'rows.jsonl: line 2 is not a row; give it "messages"'),
        ('{"text": "x"}', (), "rows.jsonl: line 1 is raw text"),
        ('[{"text": "x"}]', (), "rows.jsonl: item 0 is raw text"),
        ("[1, ", (), "rows.jsonl: item 0 is not a row"),
        ("[", (), "rows.jsonl: item 0 is not valid JSON"),
        (json.dumps({**ROW, "tools": [{"name": "f"}]}), (), "line 1 has tools"),
        ("", ("--template", "chatml-qwen"), "template 'chatml-qwen' is unknown; use one of chatml, chatml-qwen2, "),
        ("", ("--template", "llama3"), "<|begin_of_text|> is not a token of its own, as the template llama3 needs"),
        ('{"messages": [{"role": "tool", "content": ""}]}', (), "line 1: messages[0]: role is 'tool'"),
        ('{"messages": [{"role": "user", "content": ""}]}', (), "line 1: row has no assistant turn"),
        ("", ("--rows", "0"), "'0' is not a positive whole number"),
        ("", ("--supervise", "first"), "invalid choice"),
        ("", ("--no-such",), "unrecognized arguments"),
        ("", ("--tokenizer", "no-such-dir"), "no-such-dir: no such directory"),
        ("", ("--tokenizer", "x" * 300), "no such directory"),
    ],
)
def test_errors_are_one_line(show, text, options, error):
    status, _, err = show(text, *options)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and error in err


def test_a_missing_or_binary_file_is_an_error(parts_dir, tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl"), "--tokenizer", str(parts_dir)]) == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path / "binary"), "--tokenizer", str(parts_dir)]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err


def test_as_a_command_into_a_closed_pipe(parts_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(ROW)] * 2000))
    command = [
        sys.executable,
        "-m",
        "minipersona.chat",
        str(file),
        "--tokenizer",
        str(parts_dir),
        "--rows",
        "2000",
    ]
    root = Path(minipersona.chat.__file__).parents[2]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"---")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
