"""The engine: jobs go to the devices of an executor, and what comes of them into the ledger.

done              the next job begins
failed            the error is recorded and the study goes on; the next command tries the job once more
disk full         the study ends, with no verdict on the job
defect            an error of ours: it is recorded, and the study ends with its traceback
its worker died   the job is done again, from what it left; after ATTEMPTS deaths it has failed
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any, NamedTuple

from minipersona.console import Console
from minipersona.errors import DiskFull
from minipersona.run.plan import duration
from minipersona.study.cell import Cell, Study
from minipersona.study.executors import Device, Executor
from minipersona.study.worker import Job, Outcome
from minipersona.verdict.ledger import Event, LedgerEntry, append, read_entries

ATTEMPTS = 3  # of a job whose worker dies, within one command


class Defect(Exception):
    """An error of ours in a job; it ends the study. Its text holds the traceback from where the job was at work."""


class Running(NamedTuple):
    """A job at work."""

    job: Job
    device: Device
    began: float


class Engine:
    """Carries out the jobs of one command. `cells` are those that it may come to, for what it says of its progress."""

    def __init__(self, study: Study, executor: Executor, console: Console, cells: Sequence[Cell]) -> None:
        self.study, self.executor, self.console, self.cells = study, executor, console, cells
        self.failures: dict[str, str] = {}  # what has failed in this command: id -> error
        self._starts = Counter(entry.cell for entry in read_entries(study.directory) if entry.event == "started")
        self._deaths: Counter[str] = Counter()
        self._running: dict[Future[Outcome], Running] = {}
        self._kinds: dict[str, str] = {}  # of each device's last job, by its label
        self._seconds: list[float] = []  # of every cell that was done in this command

    def add(self, cells: Sequence[Cell]) -> None:
        """Have the study hold these cells too, which have fallen due while it goes on."""
        self.study = replace(self.study, cells=(*self.study.cells, *cells))
        self.cells = (*self.cells, *cells)

    def complete(self, jobs: Sequence[Job]) -> None:
        """Carry out what is not done of these jobs, as many at once as there are devices.

        DiskFull, Defect and Interrupted once the jobs at work have stopped where the same command continues them.
        """
        waiting = deque(job for job in jobs if job.id not in self.failures and not job.done())
        try:
            while waiting or self._running:
                for device in self._free():
                    if waiting:
                        self._begin(self._next(waiting, device), device)
                coming: list[Future[Any]] = [device.ready for device in self.executor.devices]
                wait([*self._running, *[ready for ready in coming if not ready.done()]], return_when=FIRST_COMPLETED)
                for future in [future for future in self._running if future.done()]:
                    if (again := self._end(future)) is not None:
                        waiting.appendleft(again)
        except BaseException:
            self._stop()
            raise

    def _free(self) -> list[Device]:
        busy = [running.device for running in self._running.values()]
        there = [device for device in self.executor.devices if device.ready.done()]
        for device in there:
            device.ready.result()  # UserError where its worker can never be there
        return [device for device in there if device not in busy]

    def _next(self, waiting: deque[Job], device: Device) -> Job:
        """Take the first job of the kind that this device did last, else of one that no other device is at, else any.

        What a kind of cell needs compiled and recorded can take longer than the cell, and each process does it anew.
        """
        own = self._kinds.get(device.label)
        others = {kind for label, kind in self._kinds.items() if kind and label != device.label}
        choices = (
            [job for job in waiting if job.kind and job.kind == own],
            [job for job in waiting if job.kind not in others],
            waiting,
        )
        job = next(jobs[0] for jobs in choices if jobs)
        waiting.remove(job)
        self._kinds[device.label] = job.kind
        return job

    def _begin(self, job: Job, device: Device) -> None:
        self._starts[job.id] += 1
        self._note(job, "started")
        self.console.say(f"{self._title(job)}: started on {device.label}")
        self._running[device.submit(job)] = Running(job, device, time.monotonic())

    def _end(self, future: Future[Outcome]) -> Job | None:
        """Record how an attempt ended. The job, where it is to be done again."""
        job, device, began = self._running.pop(future)
        death = future.exception()
        outcome = Outcome("interrupted", f"its worker died ({type(death).__name__})") if death else future.result()
        if outcome.event == "interrupted":  # the worker alone, by a signal or by its death, since this process goes on
            device.renew()
            self._deaths[job.id] += 1
            self.console.say(f"{self._title(job)}: {outcome.error} on {device.label}")
            if self._deaths[job.id] < ATTEMPTS:
                return job
            outcome = Outcome("failed", f"{outcome.error}, {ATTEMPTS} times; check whether memory runs out")
        if outcome.event == "disk full":
            raise DiskFull(outcome.error)
        self._settle(job, outcome, time.monotonic() - began)
        if outcome.event == "defect":
            raise Defect(f"{job}: {outcome.error}\n\n{outcome.trace}")
        return None

    def _settle(self, job: Job, outcome: Outcome, seconds: float) -> None:
        """Record what became of a job."""
        if outcome.event == "done":
            self._seconds += [seconds] if job.id in {cell.id for cell in self.cells} else []
            self._note(job, "done")
            self.console.say(f"{self._title(job)}: done in {duration(seconds)}{self._standing()}")
        else:
            self.failures[job.id] = outcome.error
            self._note(job, "failed", outcome.error)
            self.console.say(f"{self._title(job)}: failed: {outcome.error}")

    def _stop(self) -> None:
        """Have the jobs at work stop after their step, and record those that came to their end."""
        self.executor.stop()
        if self._running:
            self.console.say(f"waiting until the jobs at work have ended their step: {self._at_work()}")
        for future in wait(self._running).done:
            job, _, began = self._running.pop(future)
            if future.exception() is None and future.result().event in ("done", "failed"):
                self._settle(job, future.result(), time.monotonic() - began)

    def _note(self, job: Job, event: Event, error: str | None = None) -> None:
        entry = LedgerEntry(time.time(), *job.title, event, self._starts[job.id], error)
        append(self.study.directory, entry)

    # What is said: one line where a job begins and where it ends.

    def _title(self, job: Job) -> str:
        """``cell 9 of 28, 3 r=4 lr=2e-05``."""
        place = next((number for number, cell in enumerate(self.cells, 1) if cell.id == job.id), 0)
        return f"cell {place} of {len(self.cells)}, {job}" if place else job.title.name

    def _standing(self) -> str:
        """How many cells are done, how long the rest may take, and what is at work where."""
        failed = sum(cell.id in self.failures for cell in self.cells)
        done = sum(self.study.published(cell) for cell in self.cells)
        left = len(self.cells) - done - failed
        parts = [f"; {done} of {len(self.cells)} cells done", *([f"{failed} failed"] if failed else [])]
        if left and self._seconds:
            seconds = sum(self._seconds) / len(self._seconds) * left / min(left, len(self.executor.devices))
            parts.append(f"{left} left, about {duration(seconds)}")
        if self._running:
            parts.append(f"at work: {self._at_work()}")
        return ", ".join(parts)

    def _at_work(self) -> str:
        return ", ".join(f"{running.job} on {running.device.label}" for running in self._running.values())
