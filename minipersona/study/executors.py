"""Where jobs are carried out: in this process, or in a process of its own for each device of this machine.

A device does one job at a time, and the job's outcome is a future. A future that raises says that the worker died. The
third executor, for several machines, is in `ray_executor.py`.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Protocol, TextIO, cast

import torch

from minipersona.console import Console
from minipersona.errors import Interrupted
from minipersona.study.worker import Job, Outcome, Worker
from minipersona.training.distributed import Distributed, join_process_group
from minipersona.training.interruption import Stop, handle_signals

PATIENCE = 300.0  # seconds that a worker has to end its step; one that hangs would keep the driver from ending


class Device(Protocol):
    """A place for one job at a time."""

    @property
    def label(self) -> str:
        """What log lines call it."""

    @property
    def ready(self) -> Future[object]:
        """Done once a worker is there."""

    def submit(self, job: Job) -> Future[Outcome]:
        """Begin a job."""

    def renew(self) -> None:
        """Put a new worker in the place of one that died or was asked to stop."""


class Executor(Protocol):
    """The devices that a study has. `device_type`, cpu or cuda, is the same for all of them."""

    device_type: str

    @property
    def devices(self) -> Sequence[Device]:
        """Every device, busy or not."""

    def stop(self) -> None:
        """Ask the jobs at work to stop where the same command continues them; their futures say when they have."""

    def close(self) -> None:
        """End the workers."""


# ---------------------------------------------------------------- in this process


class InProcess:
    """This process's device. A job is done when `submit` returns, so nothing is ever at work elsewhere.

    `submit` raises Interrupted where this process is asked to stop.
    """

    def __init__(self, distributed: Distributed, console: Console) -> None:
        self.device_type, self.label = distributed.device.type, str(distributed.device)
        self.devices: Sequence[Device] = [self]
        self.ready = _completed(None)
        self._worker = Worker(distributed, console)

    def submit(self, job: Job) -> Future[Outcome]:
        return cast("Future[Outcome]", _completed(self._worker.attempt(job)))

    def renew(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def _completed(result: object) -> Future[object]:
    future: Future[object] = Future()
    future.set_result(result)
    return future


# ---------------------------------------------------------------- a process a device


class Processes:
    """A process for each of `devices`, as torch names them; one that is named twice gets two processes.

    threads  of torch in each process; 0 is torch's own choice
    """

    def __init__(self, devices: Sequence[str], console: Console, threads: int = 0) -> None:
        self.device_type = torch.device(devices[0]).type
        alone = len(set(devices)) == len(devices)
        labels = devices if alone else [f"{device} ({number})" for number, device in enumerate(devices, 1)]
        self.devices = [_Process(*pair, threads, console) for pair in zip(devices, labels, strict=True)]

    def stop(self) -> None:
        for device in self.devices:
            device.stop()

    def close(self) -> None:
        for device in self.devices:
            device.renew()


class _Process:
    """A pool of one process, so that a process that is killed breaks no other's pool.

    A pipe links the process to this one. Lines for the console come through it, a request to stop goes through it, and
    when it closes, because this process has ended in whatever way, the other process ends too.
    """

    def __init__(self, device: str, label: str, threads: int, console: Console) -> None:
        self.label, self.ready = label, _completed(None)
        self._settings, self._console = (device, threads), console
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> Future[Outcome]:
        if self._pool is not None:
            with contextlib.suppress(BrokenProcessPool):  # it died without a job
                return self._pool.submit(_attempt, job)
            self.renew()
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._reader = threading.Thread(target=_pass_on, args=(self._link, self._console, self.label))
        self._reader.start()
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(theirs, *self._settings))
        # Ctrl-C goes to every process of a terminal. The new one inherits that it is blocked, and is asked to stop.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_attempt, job)  # starts the process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()  # so that the pipe ends with the process

    def stop(self) -> None:
        """Ask the job at work, if there is one, to stop."""
        if self._pool is not None:
            with contextlib.suppress(OSError):
                self._link.send_bytes(b"stop")

    def renew(self) -> None:
        """A job at work is waited for; the next one starts a process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._reader.join()
            self._link.close()
            self._pool = None


def _pass_on(link: Connection, console: Console, label: str) -> None:
    """Say what a worker says, to its last line. It is read even where nothing can be said, since a full pipe blocks."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            console.say(f"[{label}] {link.recv_bytes().decode().rstrip()}")


# ---------------------------------------------------------------- within a worker's process

_worker: list[Worker] = []  # the process's only one; a pool hands nothing else on from its initializer to its jobs


def _begin(link: Connection, device: str, threads: int) -> None:
    """What a worker's process does first."""
    threading.Thread(target=_obey, args=(link,), daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    console = Console(stream=lines_to(lambda line: link.send_bytes(line.encode())))
    _worker.append(Worker(join_process_group(device, stop=Stop()), console))


def _attempt(job: Job) -> Outcome:
    (worker,) = _worker
    try:
        with handle_signals(worker.distributed.stop), worker.distributed.stop.at_once():
            return worker.attempt(job)
    except Interrupted as interrupted:
        return Outcome("interrupted", str(interrupted))


def _obey(link: Connection) -> None:
    """Stop when the driver says so, and end at once when the driver has ended, or where stopping takes too long."""
    patience: float | None = None  # until the driver says so
    with contextlib.suppress(EOFError, OSError):
        while link.poll(patience) and link.recv_bytes():
            os.kill(os.getpid(), signal.SIGTERM)
            patience = PATIENCE
    os._exit(os.EX_TEMPFAIL)


class _Lines(io.TextIOBase):
    def __init__(self, send: Callable[[str], object]) -> None:
        self._send = send

    def write(self, text: str) -> int:
        self._send(text)
        return len(text)


def lines_to(send: Callable[[str], object]) -> TextIO:
    """A stream for a Console that hands on each line, which a Console writes at once."""
    return cast(TextIO, _Lines(send))
