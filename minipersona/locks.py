"""One writer per directory: a lock of the operating system, in a file that says who holds it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from minipersona.errors import UserError
from minipersona.files import explained

SECONDS = 0.2  # an attempt lasts so long, so that a lock which is changing hands is not refused


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is created if need be. UserError with the holder's host and pid if another holds it.

    `filelock` holds a flock on `directory/.lock`, which ends with its process, however that ends. On a network file
    system the lock reaches as far as flock does there (between hosts on NFS, and on Lustre if mounted with `flock`);
    where flock is missing, the existence of the file is the lock, and a holder that dies on another host leaves it
    behind, to be deleted by hand. A forked process does not end its parent's lock. The file is removed with the lock,
    and so is the directory if nothing else is left in it.
    """
    path = directory / ".lock"
    held = FileLock(path, timeout=SECONDS, poll_interval=SECONDS / 10)
    with explained(path):
        _acquire(held, directory, path)
    owner = os.getpid()
    try:
        with explained(path):  # the form of filelock's own marker, which this file is where flock is missing
            path.write_text(f"{owner}\n{socket.gethostname()}\n")
        yield
    finally:
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                path.unlink()  # before the release: whoever then locks the unlinked file notices, and tries again
                directory.rmdir()
            held.release()


def _acquire(held: FileLock, directory: Path, path: Path) -> None:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
            return
        except FileNotFoundError:  # the last holder has just removed the directory
            continue
        except Timeout:
            raise UserError(f"{directory} is in use by {_holder(path)}") from None


def _holder(path: Path) -> str:
    """Who holds the lock, as far as its file says, and what the user can do."""
    with contextlib.suppress(OSError, ValueError):
        pid, host, *_ = path.read_text().splitlines()
        return f"pid {int(pid)} on {host}; wait for it or stop it, or delete {path} if it no longer runs"
    return f"another process; wait for it, or delete {path} if there is none"
