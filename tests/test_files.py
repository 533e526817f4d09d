"""Files are whole or absent: also when the writer dies, the disk is full, or two want the same directory."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minipersona.errors import UserError
from minipersona.files import (
    append_jsonl,
    read_json,
    read_jsonl,
    sweep_temporaries,
    user_path,
    write_atomically,
    write_directory_atomically,
    write_json,
    write_text,
)


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), write_atomically(path) as temporary:
        temporary.write_text("new")
        _ = 1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        with write_directory_atomically(tmp_path / "d") as directory:
            (directory / "b").write_text("y")
            os.chmod(directory / "b", 0o600)  # as safetensors leaves it
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d" / "b").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with write_directory_atomically(tmp_path / "d") as directory:
            (directory / content).write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["two"]
    with pytest.raises(ZeroDivisionError), write_directory_atomically(tmp_path / "d"):
        _ = 1 / 0
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["two"]


KILL = """
import itertools, sys
from pathlib import Path
from minipersona.files import write_atomically
path = Path(sys.argv[1])
for i in itertools.count():
    with write_atomically(path) as temporary:
        with open(temporary, "wb") as file:
            for _ in range(40):
                file.write(bytes([i % 251]) * 65536)
"""


def test_sigkill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for delay in (0.0, 0.003, 0.007, 0.013, 0.021, 0.034):
        process = subprocess.Popen([sys.executable, "-c", KILL, str(path)])
        while not path.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 40 * 65536 and len(set(content)) == 1
    sweep_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.txt.*MiB are free.*--out"):
            write_text(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"a": 2})
    with open(path, "a") as file:
        file.write('{"a": 3, "b"')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_appending_after_a_torn_line_drops_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for before in ("", '{"a": 1}\n'):
        path.write_text(before + '{"a": 2, "b"')
        append_jsonl(path, {"a": "ü"})
        assert path.read_text() == before + '{"a": "ü"}\n'


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})


def test_a_users_path_may_begin_at_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (user_path("~/a"), user_path("a/~")) == (tmp_path / "a", Path("a/~"))
    for text in ("~nobody-of-this-name/a", "~a\0b/a"):
        with pytest.raises(UserError, match="the home directory that ~ stands for is not known"):
            user_path(text)
