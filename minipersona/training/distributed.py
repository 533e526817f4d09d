"""One process or several ranks: the few collective operations that training needs.

`torchrun` sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one rank, and every operation is the identity.
torchrun also ends the other ranks when one has failed or died. What it does not do stands at the end of this file: the
rank that failed says why, in one line.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minipersona.errors import Interrupted, UserError
from minipersona.training.interruption import Stop

TIMEOUT_MINUTES = 30.0
NOTICED = 1.0  # seconds within which torchrun, which polls ten times a second, has seen that a rank has ended


class RankLost(UserError):
    """A collective operation failed: another rank has ended, or did not take part within the timeout."""


@dataclass(frozen=True)
class Distributed:
    """This process's rank, the number of ranks, its device, and whether it was asked to stop."""

    rank: int
    size: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over ranks, in place. All reductions are started before the first is waited for."""
        if self.size > 1:
            with _collective():
                pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
                for work in pending:
                    assert work is not None
                    work.wait()

    def check_equal(self, value: int, what: str) -> None:
        """UserError on every rank if they hold different values."""
        if self.size > 1:
            highest, lowest = self._max(value), -self._max(-value)
            if highest != lowest:
                raise UserError(
                    f"{what} is {lowest} on one rank and {highest} on another; all ranks must see the same --out"
                )

    def broadcast(self, value: int) -> int:
        """The first rank's value, which must not be negative, on every rank."""
        return self._max(value if self.first else 0) if self.size > 1 else value

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            self._max(0)

    def check_stop(self) -> None:
        """A barrier that raises Interrupted on every rank if any of them was asked to stop."""
        if self.size == 1:
            self.stop.check()
        elif self._max(int(self.stop.asked)):
            self.stop.check()
            raise Interrupted("stopped")

    def _max(self, value: int) -> int:
        """The highest of the ranks' values."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        with _collective():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return int(tensor)


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Around a collective operation and nothing else: its errors are RankLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = re.split(r"\. |\n", str(error))[0][:200]  # gloo's advice follows after it
        raise RankLost(
            f"another rank has ended, or took longer than execution.timeout_minutes ({reason}); "
            "the same command continues from the last checkpoint"
        ) from error


def join_process_group(
    device: str = "auto", timeout_minutes: float = TIMEOUT_MINUTES, stop: Stop | None = None
) -> Distributed:
    """Choose this process's device and, if it is one of several ranks, connect it to the others.

    device           auto, cpu, cuda or cuda:<n>
    timeout_minutes  after which a collective operation fails
    """
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    chosen = _choose_device(device, local)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Distributed(rank, size, chosen, stop or Stop())


def _choose_device(device: str, local_rank: int) -> torch.device:
    """UserError if there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown; use auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; use auto, cpu or cuda")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda: this machine has none that torch can use; use auto or cpu")
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"device {chosen}: this machine has {torch.cuda.device_count()}; start fewer processes")
        torch.cuda.set_device(chosen)
    return chosen


def leave_process_group() -> None:
    """Close the connections to the other ranks, if there are any. All ranks leave together."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def process_group(device: str, timeout_minutes: float, stop: Stop) -> Iterator[Distributed]:
    """`join_process_group` for the length of this context."""
    distributed = join_process_group(device, timeout_minutes, stop)
    # A single process may stop anywhere except within a step; several ranks stop only where all of them check.
    with stop.deferred() if distributed.size > 1 else stop.at_once():
        try:
            yield distributed
        except Interrupted:  # on every rank
            leave_process_group()
            raise
    # After an error the group is not left: that can wait for operations which the other ranks never finish.
    leave_process_group()


def end_rank(status: int = 0) -> NoReturn:
    """End the process of a rank without shutting down the interpreter.

    During that shutdown about one in fifty sharded ranks was aborted, by a thread that the process group had left, and
    a rank that failed could wait for the others, which wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fail_rank(error: Exception) -> NoReturn:
    """End one of several ranks because of an error. Of the ranks of a machine only the first that fails reports it.

    The others fail for the same reason (a config that all of them read) or because they lost that rank.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: this rank ends by itself, after its report
    atexit.register(end_rank, 2 if isinstance(error, UserError) else 1)  # later, once the error is printed
    rank, first = os.environ["RANK"], _fails_first()
    # So that torchrun's own report names the rank that ended before this one. An error that is not a UserError may also
    # mean that another rank is gone, in a pass of a sharded model for example.
    if not first or isinstance(error, RankLost):
        time.sleep(2 * NOTICED)
    elif not isinstance(error, UserError):
        time.sleep(NOTICED)
    if not first:
        end_rank(1)
    if isinstance(error, UserError):
        raise UserError(f"rank {rank}: {error}") from error
    raise error  # a defect: its traceback, of which torch marks every line with the rank


def _fails_first() -> bool:
    """Whether no other rank of this machine has failed before, by a counter in the store of torchrun."""
    group = ("GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    counter = "/".join(["minipersona.failed", *(os.environ.get(name, "") for name in group)])
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=datetime.timedelta(seconds=5), wait_for_workers=False)
        return store.add(counter, 1) == 1
    except RuntimeError:  # the store is gone too
        return True
