"""One writer a directory: a lock that the kernel holds, and that says who has it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from minipersona.errors import UserError
from minipersona.files import explained, umask_mode

BEAT_SECONDS = 60.0  # a holder shows so often that it lives
EXPIRY_SECONDS = 900.0  # after which a holder on another host, who cannot be looked up, counts as gone


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory`; a second holder is refused with the first one's host and pid.

    The kernel holds the lock on `directory/.lock` (flock), so that of two who come at once one gets it, and that a
    holder who dies lets go of it. Not every network file system shares such locks between hosts. There the file
    says who holds it, and its time of change, renewed each minute, until when. A process that is forked off
    while the lock is held does not end it. The file goes with the lock, and so does a directory in which
    nothing else is left.
    """
    path = directory / ".lock"
    with explained(path):
        descriptor = _acquire(directory, path)
    owner, released = os.getpid(), threading.Event()

    def beat() -> None:
        while not released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        if os.getpid() == owner:
            released.set()
            heart.join()
            with contextlib.suppress(OSError):
                if _names(path, descriptor):  # unlinked while it is held: nobody can be about to take it
                    path.unlink()
                directory.rmdir()
        os.close(descriptor)


def _acquire(directory: Path, path: Path) -> int:
    """The open lock file, held."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, umask_mode(0o666))
        except FileNotFoundError:  # its last holder removed the directory this moment
            continue
        try:
            taken = _taken(descriptor)
            if not _names(path, descriptor):  # it was unlinked before we held it; there may be another by now
                os.close(descriptor)
                continue
            if taken:
                _refuse(directory, path)
            os.ftruncate(descriptor, 0)
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            content = json.dumps(mine).encode()
            while content:  # of a disk that fills up it takes a part before it refuses
                content = content[os.write(descriptor, content) :]
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _taken(descriptor: int) -> bool:
    """Whether another holds the lock. If not, it is ours from here on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shared = True
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: what the file says must do
        shared = False
    holder = _holder(os.pread(descriptor, 4096, 0))
    if holder["host"] == socket.gethostname():
        return not shared and _alive(holder["pid"])
    return holder["host"] != "?" and time.time() - os.fstat(descriptor).st_mtime < EXPIRY_SECONDS


def _alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the file that is open."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(content: bytes) -> dict[str, Any]:
    try:
        return {"pid": "?", "host": "?", **json.loads(content)}
    except (ValueError, TypeError, RecursionError):  # its holder died before it had written this, or is about to
        return {"pid": "?", "host": "?"}


def _refuse(directory: Path, path: Path) -> NoReturn:
    holder = _holder(b"")  # what is said where the holder lets go while we look
    for _ in range(20):
        with contextlib.suppress(OSError):
            if (holder := _holder(path.read_bytes()))["host"] != "?":
                break
        time.sleep(0.01)
    raise UserError(
        f"{directory} is in use by pid {holder['pid']} on {holder['host']}; "
        f"wait for it, or delete {path} if that process is gone"
    )
