"""The lock on a directory: one holder, named to the others, and let go of whatever ends it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from minipersona.errors import UserError
from minipersona.files import write_text
from minipersona.locks import lock

HERE = socket.gethostname()


def holder(directory: Path) -> tuple[int, str]:
    """The pid and the host that the lock's file names."""
    pid, host = (directory / ".lock").read_text().splitlines()
    return int(pid), host


def test_a_second_holder_is_refused_with_the_firsts_host_and_pid(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with lock(directory):
        with pytest.raises(UserError, match=f"in use by pid {os.getpid()} on {HERE}"), lock(directory):
            pass
        assert (directory / ".lock").exists()
    assert not directory.exists()  # nothing came of it
    with lock(directory):
        write_text(directory / "result", "kept")
    assert [path.name for path in directory.iterdir()] == ["result"]


HOLD = """
import sys, time
from pathlib import Path
from minipersona.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"pid {process.pid} on"), lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        assert holder(tmp_path) == (os.getpid(), HERE)


@pytest.mark.parametrize(
    "content", ["", "{", "1\n", "x" * 9999, "1\nelsewhere\n", f"{2**22 + 1}\n{HERE}\n", "\0\xff\n"]
)
def test_a_file_that_was_left_behind_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with lock(tmp_path):
        assert holder(tmp_path) == (os.getpid(), HERE)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}/*"))


@pytest.mark.parametrize("content", ["", "1\n", "x", "\0\xff\n", "pid\nhost\n"])
def test_a_holder_that_the_file_does_not_name_is_another_process(tmp_path: Path, content: str) -> None:
    with lock(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with (
            pytest.raises(UserError, match=r"in use by another process; wait for it, or delete .*lock"),
            lock(tmp_path),
        ):
            pass


def fails_with(code: int) -> Callable[[int, int], None]:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_flock_is_missing_the_existence_of_the_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", fails_with(errno.ENOSYS))
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / ".lock"
    path.write_text(f"{dead.pid}\n{HERE}\n")  # a process of this host that no longer runs is not waited for
    with lock(tmp_path):
        assert holder(tmp_path) == (os.getpid(), HERE)
        with pytest.raises(UserError, match=f"pid {os.getpid()} on {HERE}"), lock(tmp_path):
            pass
        assert holder(tmp_path) == (os.getpid(), HERE)
    assert not path.exists()
    tmp_path.mkdir()
    path.write_text("1\nelsewhere\n")
    with pytest.raises(UserError, match=r"pid 1 on elsewhere; .* delete .*\.lock if it no longer runs"), lock(tmp_path):
        pass
    assert holder(tmp_path) == (1, "elsewhere")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("fcntl.flock", fails_with(code))
    with pytest.raises(UserError, match=rf"\.lock: {os.strerror(code)}; .* choose another --out"), lock(tmp_path):
        pytest.fail("held")


def test_a_fork_does_not_end_the_lock(tmp_path: Path) -> None:
    code = """
    import os, subprocess, sys
    from pathlib import Path
    from minipersona.errors import UserError
    from minipersona.locks import lock
    directory = Path(sys.argv[1])
    try:
        with lock(directory):
            parent = os.getpid()
            child = os.fork()
            if not child:
                sys.exit(7)  # leaves the context
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert (directory / ".lock").exists()
            try:
                with lock(directory):
                    print("taken")
            except UserError as error:
                print("refused" if str(parent) in str(error) else error)
    finally:
        sys.stdout.flush()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"
    assert not tmp_path.exists()


RACE = """
import os, sys, time
from pathlib import Path
from minipersona.errors import UserError
from minipersona.locks import lock
directory, log = Path(sys.argv[1]), open(sys.argv[2], "a")
(log_dir := Path(sys.argv[2]).parent).joinpath(f"ready-{os.getpid()}").touch()
while len(list(log_dir.glob("ready-*"))) < 3:  # an import may take long beside other work
    time.sleep(0.01)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with lock(directory):
            log.write(f"in {os.getpid()}\\n"); log.flush()
            log.write(f"out {os.getpid()}\\n"); log.flush()
    except UserError:
        pass
"""


def test_of_many_who_come_at_once_one_gets_it(tmp_path: Path) -> None:
    """Each finds a stale lock, or a directory that the one before is just removing."""
    log = tmp_path / "log"
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text(f"{2**22 + 1}\n{HERE}\n")
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(run), str(log)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = log.read_text().splitlines()
    assert len({line.split()[1] for line in lines}) > 1  # the control: they did contend
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.split() == ["in", left.split()[1]] and left.startswith("out")
    assert not run.exists()


@pytest.mark.parametrize("what", ["directory", "symlink", "file above"])
def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "run"
    if what == "file above":
        directory.write_text("a file")
    else:
        directory.mkdir()
        (directory / ".lock").mkdir() if what == "directory" else (directory / ".lock").symlink_to(tmp_path / "x")
    with pytest.raises(UserError, match=r"cannot write .*run"), lock(directory):
        pass
    assert not (tmp_path / "x").exists()
