"""Who works on what, among runners that share nothing but a directory.

Attempt n on a job is the file `<job>.<n>`, made by its runner with O_EXCL and touched while the work goes on. The
highest number holds the job. It may be outbid, by n + 1, once it is released, its process is gone (same host), or
it has not been touched for `EXPIRES` seconds (`UNSIGNED`, where no runner's name is in it). No claim is ever removed
or handed over, so there is no moment in which two runners could take the same one.

An owner that was only asleep may wake up after it was outbid. It then learns that its claim is lost; should it
publish before it learns, nothing is harmed either, since publishing never replaces (`cells.publish`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipersona.errors import UserError
from minipersona.files import explained, write_json

BEAT = 15.0  # seconds between two signs of life
EXPIRES = 600.0  # seconds without one
UNSIGNED = 10.0  # seconds in which a runner has written its name into its claim, unless it was killed or had no room
_STARTED = time.time()


class Lost(Exception):
    """The work in hand was taken over by another runner."""


class Claim:
    """One attempt of this runner on a job, kept alive until it is released."""

    def __init__(self, claims: Claims, job: str, attempt: int) -> None:
        self._claims, self.job, self.attempt = claims, job, attempt
        self.path = claims.directory / f"{job}.{attempt}"
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise Lost where a higher attempt exists."""
        if (self._claims.directory / f"{self.job}.{self.attempt + 1}").exists():
            raise Lost(f"{self.job} was taken over; this runner had been silent for too long")

    def release(self) -> None:
        """Let others take the job at once."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(UserError):
            write_json(self.path, {"released": True})

    def _beat(self) -> None:
        while not self._over.wait(self._claims.beat):
            with contextlib.suppress(OSError):
                os.utime(self.path)


class Claims:
    """The claims of a study as one runner sees them."""

    def __init__(self, directory: Path, runner: str, beat: float = BEAT, expires: float = EXPIRES) -> None:
        self.directory, self.runner, self.beat, self.expires = directory, runner, beat, expires
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def take(self, job: str) -> Iterator[Claim | None]:
        """Hold the job within this context; None where another runner holds it."""
        attempt = self.attempts(job)
        claim = self._make(job, attempt + 1) if attempt == 0 or not self._held(job, attempt) else None
        try:
            yield claim
        finally:
            if claim is not None:
                claim.release()

    def attempts(self, job: str) -> int:
        """How often the job has been claimed."""
        files = self.directory.glob(f"{job}.*")
        return max(
            (int(number) for file in files if (number := file.name.removeprefix(f"{job}.")).isdigit()), default=0
        )

    def _make(self, job: str, attempt: int) -> Claim | None:
        path = self.directory / f"{job}.{attempt}"
        mine = {"runner": self.runner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        with explained(path):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return None
            with os.fdopen(descriptor, "w") as file:
                json.dump(mine, file)
        return Claim(self, job, attempt)

    def _held(self, job: str, attempt: int) -> bool:
        path = self.directory / f"{job}.{attempt}"
        try:
            owner = json.loads(path.read_text())
        except ValueError:  # it is being written this moment, or its writer came no further
            return self._now() - path.stat().st_mtime < min(UNSIGNED, self.expires)
        if owner.get("released") or _gone(owner):
            return False
        return self._now() - path.stat().st_mtime < self.expires

    def _now(self) -> float:
        """The clock that stamps the claims: the file system's, since those of two machines may differ."""
        mine = self.directory / f".clock-{self.runner}"
        with explained(mine):
            mine.touch()
        return mine.stat().st_mtime


def _gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that has ended."""
    if owner.get("host") != socket.gethostname():
        return False
    if owner["pid"] == os.getpid():  # in a container the same number comes round
        return bool(owner["time"] < _STARTED)
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
