"""A worker carries out jobs, one after another, on one device; every executor runs this code.

A job is a picklable description. Its files are written by the worker that holds its lock, so that what an earlier
command left running never writes beside it. A job whose worker dies is done again, from what it left.
"""

from __future__ import annotations

import abc
import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.errors import DiskFull, UserError
from minipersona.locks import lock
from minipersona.model.network import Qwen2
from minipersona.run.resources import Resources, load_checkpoint
from minipersona.study.cell import Study
from minipersona.training.distributed import Distributed
from minipersona.training.memory import OUT_OF_MEMORY

PATIENCE = 120.0  # seconds; what a dead process held is free at once on this machine, in 90 s on an NFS server


class Title(NamedTuple):
    """How the ledger names a job: its id, which is its cell's where it trains one, its phase, and a name for people."""

    id: str
    phase: str
    name: str


@dataclass(frozen=True)
class Job(abc.ABC):
    """A piece of a study's work, which leaves a file or a directory behind."""

    study: Study

    @property
    @abc.abstractmethod
    def title(self) -> Title:
        """What it is called; no two jobs of a study have one id."""

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether what it leaves behind is there."""

    @abc.abstractmethod
    def carry_out(self, worker: Worker) -> None:
        """Do it, or what is left of it."""

    @property
    def id(self) -> str:
        """See Title."""
        return self.title.id

    @property
    def kind(self) -> str:
        """Jobs of one kind use what the first of them has compiled and recorded in its process; "" is of no kind."""
        return ""

    def __str__(self) -> str:
        return f"{self.title.phase} {self.title.name}"


@dataclass(frozen=True)
class Outcome:
    """How an attempt on a job ended, and where it did not end well, with what error.

    A "defect" is an error of ours, and `trace` its traceback. "interrupted" and "disk full" say nothing about the job.
    """

    event: Literal["done", "failed", "defect", "disk full", "interrupted"]
    error: str = ""
    trace: str = ""


class Worker:
    """A device, with the model and the instruments that are kept from one job to the next."""

    def __init__(self, distributed: Distributed, console: Console) -> None:
        self.distributed, self.console = distributed, console
        self.resources = Resources(distributed.device)

    def attempt(self, job: Job) -> Outcome:
        """Do a job. Interrupted where this process was asked to stop."""
        try:
            with _held(job.study.attempts / f"{job.id}.lock", self.console):
                if not job.done():  # whoever had the lock may have finished it
                    job.carry_out(self)
            assert job.done(), f"{job.id} left nothing behind"
            return Outcome("done")
        except DiskFull as error:
            return Outcome("disk full", str(error))
        except UserError as error:
            return Outcome("failed", str(error))
        except torch.OutOfMemoryError:
            pass
        except Exception as error:
            return Outcome("defect", f"{type(error).__name__}: {error}", traceback.format_exc())
        self.resources.clear()  # here, where no traceback holds its tensors any more
        torch.cuda.empty_cache()
        return Outcome("failed", OUT_OF_MEMORY)

    def trained_model(self, config: RunConfig, directory: Path, step: int) -> Qwen2:
        """The model that a run left at a step."""
        return load_checkpoint(self.resources.base(config), config, directory, step)


@contextlib.contextmanager
def _held(directory: Path, console: Console) -> Iterator[None]:
    """Hold a job's lock. A process that still has it belongs to a study that has ended, and will soon end too."""
    begun, said = time.monotonic(), False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(directory))
                break
            except UserError as error:
                if isinstance(error, DiskFull) or time.monotonic() - begun > PATIENCE:
                    raise
                if not said:
                    console.say(f"waiting: {error}")
                    said = True
                time.sleep(0.5)
        yield
