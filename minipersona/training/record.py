"""What follows from a step's numbers: its line in metrics.jsonl, the rolling checkpoint, the end of a run.

A GPU executes what the host has queued. The host reads the numbers of a step only after it has queued the passes of the
next one, so that the device does not wait for the host between two steps. The weights are then still those of the step
that is read, because their next update is not queued yet. On a CPU the order is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.config import RunConfig
from minipersona.corpus.batch import Batch
from minipersona.errors import Interrupted, UserError
from minipersona.files import append_jsonl
from minipersona.training.distributed import Distributed


class _Moment:
    """The time at which a GPU reaches this point of its queue; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.monotonic()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the GPU has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: _Moment) -> float:
        """Between two moments that the GPU has reached."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        return earlier._event.elapsed_time(self._event) / 1e3


@dataclass(frozen=True)
class _Queued:
    step: int
    batch: Batch
    learning_rate: float
    penalty_ratio: float | None
    numbers: Tensor  # (K + 4,) on the CPU, valid once `done` is reached: terms, flags, the gradients' norm
    done: _Moment


class Record:
    """The record of one run, the same on every rank. At most one step is queued and not yet settled.

    K = terms of the objective

    terms   their names
    save    writes the rolling checkpoint, given the step after which the weights are as they are now
    logged  is called with each line of metrics.jsonl
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        distributed: Distributed,
        terms: Sequence[str],
        save: Callable[[int], object],
        logged: Callable[[dict[str, Any]], None],
    ) -> None:
        self._config, self._directory, self._distributed = config, directory, distributed
        self._terms, self._save, self._logged = terms, save, logged
        self._queued: _Queued | None = None
        self._diverged = 0
        self._saved = time.monotonic()
        self.start_clock()

    def start_clock(self) -> None:
        """Count the time from here on as the next step's."""
        self._begun = _Moment(self._distributed.device)

    def flags(self, halvings: int) -> Tensor:
        """What this rank adds to its terms, (3,): asked to stop, how often memory ran out, a checkpoint is due."""
        due = time.monotonic() - self._saved > 60 * self._config.execution.save_minutes
        return torch.tensor(
            [self._distributed.stop.asked, halvings, due and self._distributed.first], dtype=torch.float64
        )

    def queue(
        self, step: int, batch: Batch, learning_rate: float, sums: Tensor, norm: Tensor, penalty_ratio: float | None
    ) -> None:
        """Start copying a step's numbers: terms and flags, summed over the ranks, (K + 3,); the gradients' norm, ()."""
        numbers = torch.cat([sums, norm.to(sums.dtype).view(1)]).to("cpu", non_blocking=True)
        self._queued = _Queued(step, batch, learning_rate, penalty_ratio, numbers, _Moment(sums.device))

    def settle(self) -> None:
        """Wait for the numbers of the queued step, if there is one, and do what follows from them.

        UserError after too many non-finite steps in a row. Interrupted, on every rank, if any of them was asked to
        stop, once the rolling checkpoint is written.
        """
        if self._queued is None:
            return
        queued, self._queued = self._queued, None
        queued.done.wait()
        seconds, self._begun = queued.done.seconds_since(self._begun), queued.done
        step, batch, recipe = queued.step, queued.batch, self._config.training
        *totals, stopping, shortages, due, grad_norm = queued.numbers.tolist()
        # Several ranks obey the flags, which are the same on all of them. A single process sees a later signal too.
        stopping = stopping or (self._distributed.size == 1 and self._distributed.stop.asked)
        means = [total / max(1, batch.supervised) for total in totals]
        finite = all(map(math.isfinite, (*means, grad_norm)))
        row = {
            "step": step,
            **{name: mean if finite else None for name, mean in zip(self._terms, means, strict=True)},
            "supervised_tokens": batch.supervised,
            "tokens": batch.tokens,
            **({"context_tokens": batch.context_tokens} if batch.context_tokens else {}),
            "grad_norm": grad_norm if finite else None,
            "lr": queued.learning_rate,
            "tokens_per_second": batch.tokens / seconds,
        }
        if queued.penalty_ratio is not None:
            row["penalty_ratio"] = queued.penalty_ratio  # `penalty.py`
        if not batch.supervised:
            row["skipped"] = "no supervised token"
        elif not finite:
            row |= {"skipped": "non-finite loss or gradient", "documents": batch.rows}
        if shortages:
            row["out_of_memory"] = int(shortages)  # how often a rank computed the step again, in smaller packs
        if self._distributed.first:
            append_jsonl(self._directory / "metrics.jsonl", row, durable=False)
        self._logged(row)
        self._diverged = 0 if finite else self._diverged + 1
        if self._diverged and self._diverged == recipe.most_non_finite:
            raise UserError(
                f"step {step}: loss or gradient non-finite {self._diverged} steps in a row (rows {batch.rows}); "
                "lower training.learning_rate or look at these rows"
            )
        # The checkpoint comes before the measurement: a run that ends between the two repeats only the measurement.
        if due or stopping or recipe.measures(step):
            self._save(step)
            self._saved = time.monotonic()
        if stopping:
            self._distributed.barrier()  # the first rank's checkpoint: torchrun ends all ranks when one ends
            raise Interrupted(f"stopped after step {step}")
