"""A runner: one process of a study, with one model in memory, that takes jobs until none is left.

Runners are equals and share only the study's directory. Each goes through the same phases and looks for work that no
other has claimed; how many there are, and on which machines, changes nothing but the time.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minipersona.console import Console
from minipersona.errors import DiskFull, UserError
from minipersona.run.resources import Resources
from minipersona.study.cell import Cell
from minipersona.study.claims import Claim, Claims, Lost
from minipersona.study_config import StudyConfig
from minipersona.training.memory import OUT_OF_MEMORY
from minipersona.training.world import World
from minipersona.verdict import ledger
from minipersona.verdict.ledger import LedgerEntry

WAIT = 2.0  # seconds between two looks for work, where all of it is claimed


def runner_name() -> str:
    """A name that no other process has had."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Job:
    """A piece of work that leaves a file or a directory behind; doing it twice is a waste and no harm."""

    id: str
    phase: str
    name: str
    done: Callable[[], bool]
    work: Callable[[Claim], None]


@dataclass
class Runner:
    """What a runner works with. `config` is resolved; `share` = (k, n) starts it on the k-th of n shares, from 1."""

    config: StudyConfig
    directory: Path
    cells: list[Cell]
    world: World
    console: Console
    share: tuple[int, int] = (1, 1)
    name: str = field(default_factory=runner_name)

    def __post_init__(self) -> None:
        self.bench = Resources(self.world.device)
        self.claims = Claims(self.directory / "cells" / ".claims", self.name)
        self._started = time.time()

    @property
    def baseline(self) -> Cell:
        """The unregularised cell that all others are judged against."""
        return self.cells[0]

    def cell_directory(self, cell: Cell) -> Path:
        """Where a cell's results are published."""
        return self.directory / "cells" / cell.id

    def published(self, cell: Cell) -> bool:
        """Whether a cell's results are there."""
        return (self.cell_directory(cell) / "cell.json").is_file()

    def failed(self) -> dict[str, str]:
        """Jobs that have failed since this runner began, with their errors. What failed earlier is tried once more."""
        newest = ledger.read_ledger(self.directory)
        return {
            cell: entry.error or ""
            for cell, entry in newest.items()
            if entry.event == "failed" and entry.time >= self._started
        }

    def note(
        self, cell: str, phase: str, name: str, event: ledger.Event, attempt: int = 0, error: str | None = None
    ) -> None:
        """Add an entry to the study's ledger, one runner at a time."""
        with open(self.directory / ".ledger.lock", "a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # until it is closed
            ledger.append(self.directory, LedgerEntry(time.time(), cell, phase, name, event, attempt, error))

    def complete(self, jobs: Sequence[Job]) -> None:
        """Work until every job is done or has failed, whoever does it."""
        k, n = self.share
        first = (k - 1) * len(jobs) // n
        jobs = [*jobs[first:], *jobs[:first]]  # runners that start in different places seldom want the same job
        waiting = False
        while left := self._left(jobs):
            if any(self._attempt(job) for job in left):
                waiting = False
                continue
            if not waiting:
                self.console.say(f"waiting for other runners, on {', '.join(job.id for job in left)}")
                waiting = True
            time.sleep(WAIT)

    def _left(self, jobs: Sequence[Job]) -> list[Job]:
        failed = self.failed()
        return [job for job in jobs if job.id not in failed and not job.done()]

    def _attempt(self, job: Job) -> bool:
        """Try to claim the job and to do it; False where another runner has it."""
        with self.claims.take(job.id) as claim:
            if claim is None:
                return False
            if self._left([job]):  # nobody finished it between the look and the claim
                self._do(job, claim)
            return True

    def _do(self, job: Job, claim: Claim) -> None:
        about = (job.id, job.phase, job.name)
        self.console.say(f"{job.phase} {job.name}")
        self.note(*about, "started", claim.attempt)
        error = self._error(job, claim)
        if error is None:
            self.note(*about, "done", claim.attempt)
        elif error:
            self.console.say(f"{job.phase} {job.name} failed: {error}")
            self.note(*about, "failed", claim.attempt, error)

    def _error(self, job: Job, claim: Claim) -> str | None:
        """Do the job; None where it is done, else what went wrong, empty where it was only lost to another runner."""
        try:
            try:
                job.work(claim)
                assert job.done(), f"{job.id} left nothing behind"
                return None
            except Lost:
                raise
            except Exception:
                claim.check()  # a job that was taken over fails in many ways, and none of them counts
                raise
        except Lost as lost:
            self.console.say(str(lost))
            return ""
        except DiskFull:
            raise  # no verdict on the job; the same command takes it up once there is room
        except UserError as error:
            return str(error)
        except torch.OutOfMemoryError:
            message = OUT_OF_MEMORY
        except Exception as error:
            # A defect, not a result: it is recorded, and this runner ends with its traceback.
            self.note(job.id, job.phase, job.name, "failed", claim.attempt, f"{type(error).__name__}: {error}")
            raise
        self.bench.discard_model()  # here, where no traceback holds its tensors any more
        torch.cuda.empty_cache()
        return message
