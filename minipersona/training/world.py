"""One process or many: the few collective operations that training needs.

`torchrun` sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one rank, and every operation is the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minipersona.errors import Interrupted, UserError
from minipersona.training.interruption import Stop
from minipersona.training.watch import Watch

TIMEOUT_MINUTES = 30.0
LATER = datetime.timedelta(minutes=5)  # the library's own timeout comes after ours, which names the rank


@dataclass(frozen=True)
class World:
    """This process's place among its peers, its device, and whether it was asked to stop."""

    rank: int
    size: int
    device: torch.device
    stop: Stop = field(default_factory=Stop)
    watch: Watch | None = None  # of several ranks

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Sum tensors over ranks, in place, all on their way at once."""
        if self.size > 1:
            with self._together():
                pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
                for work in pending:
                    assert work is not None
                    work.wait()

    def agree(self, value: int, what: str) -> None:
        """UserError on every rank where they hold different values, before anything is mixed up."""
        if self.size > 1:
            highest, lowest = self._highest(value), -self._highest(-value)
            if highest != lowest:
                raise UserError(
                    f"{what} is {lowest} on one rank and {highest} on another; all ranks must see the same --out"
                )

    def follow(self, value: int) -> int:
        """The first rank's value, which is not negative, on every rank."""
        return self._highest(value if self.first else 0) if self.size > 1 else value

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            self._highest(0)

    def meet(self) -> None:
        """Return once every rank has come here; where any of them was asked to stop, raise Interrupted on all."""
        if self.size == 1:
            self.stop.check()
        elif self._highest(int(self.stop.asked)):
            self.stop.check()
            raise Interrupted("stopped")

    def _highest(self, value: int) -> int:
        """The highest of the ranks' values."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        with self._together():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return int(tensor)

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Around passes through a sharded model: an error there is a lost rank's, if one is found to be lost."""
        return self._together(nothing_else=False)

    @contextlib.contextmanager
    def _together(self, nothing_else: bool = True) -> Iterator[None]:
        """Around a collective operation: one that fails is a rank that was lost, where it is `nothing_else`."""
        if self.watch is not None:
            self.watch.arrive()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.watch is None:
                raise
            lost = self.watch.broken(error)  # ends this process where it finds which
            if nothing_else:
                raise lost from error
            raise


def join_world(device: str = "auto", timeout_minutes: float = TIMEOUT_MINUTES, stop: Stop | None = None) -> World:
    """Take this process's place. `device` is auto, cpu, cuda or cuda:<n>."""
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
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
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"device {chosen}: this machine has {torch.cuda.device_count()}; start fewer processes")
        torch.cuda.set_device(chosen)
    watch = None
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # A connection of its own: one that the main thread waits on would hold up the watch.
        watch = Watch(dist.PrefixStore("minipersona", store.clone()), rank, size, 60 * timeout_minutes)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout + LATER,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        watch.start()
    return World(rank, size, chosen, stop or Stop(), watch)


def leave_world(world: World) -> None:
    """Give the process group back, so that the process ends quietly."""
    if world.watch is not None:
        world.watch.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank() -> NoReturn:
    """End the process of a rank whose work is done and written, without taking the interpreter down.

    Of fifty sharded ranks one or so was aborted while that went on, by a thread that the process group had left.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def in_world(device: str, timeout_minutes: float, stop: Stop) -> Iterator[World]:
    """Join for the length of this context. An error that ends it is told to the other ranks."""
    world = join_world(device, timeout_minutes, stop)
    try:
        # Alone, this process may stop wherever it is, but for its steps; several stop where they meet.
        with stop.deferred() if world.size > 1 else stop.at_once():
            yield world
    except Exception as error:
        if world.watch is not None:
            world.watch.fail(error)
        raise
    finally:
        leave_world(world)
