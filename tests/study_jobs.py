"""Jobs that train nothing, for what an engine does around a job. Workers in processes of their own import this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minipersona.errors import Interrupted
from minipersona.study.worker import Job, Title, Worker


def nothing(job: FileJob) -> None:
    """Be done at once."""


@dataclass(frozen=True)
class FileJob(Job):
    """Leaves an empty file, once `work` has been called with the job; another one where it is interrupted."""

    file: str
    work: Callable[[FileJob], None] = nothing

    @property
    def title(self) -> Title:
        return Title(self.file, "3", self.file)

    @property
    def path(self) -> Path:
        return self.study.directory / self.file

    def done(self) -> bool:
        return self.path.exists()

    def carry_out(self, worker: Worker) -> None:
        try:
            with open(self.path.with_suffix(".log"), "a") as log:
                print(os.getpid(), file=log)
            worker.console.say(f"{self.file} is at work")
            self.work(self)
        except Interrupted:
            self.path.with_suffix(".interrupted").touch()
            raise
        self.path.touch()

    def attempts(self) -> list[int]:
        """The pids of the processes that have begun it."""
        log = self.path.with_suffix(".log")
        return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


class TalkingJob(FileJob):
    """Says more than a pipe holds."""

    def carry_out(self, worker: Worker) -> None:
        for _ in range(3000):
            worker.console.say("x" * 99)
        super().carry_out(worker)


def die(job: FileJob) -> None:
    """Be killed, each time."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(job: FileJob) -> None:
    """Be killed the first time."""
    if len(job.attempts()) == 1:
        die(job)


def stopped_once(job: FileJob) -> None:
    """Have this process asked to stop, the first time, and nobody else."""
    if len(job.attempts()) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def divide(job: FileJob) -> None:
    """A defect."""
    raise ZeroDivisionError("oh")


def last_long(job: FileJob) -> None:
    """Take a minute."""
    time.sleep(60)
