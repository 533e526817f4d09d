"""What follows from a step's numbers: its log line, when a checkpoint is due, and when the run ends."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.config import DataSection, ExecutionSection, RunConfig, TrainingSection
from minipersona.corpus.batch import Batch
from minipersona.errors import Interrupted, UserError
from minipersona.files import read_jsonl
from minipersona.training.distributed import Distributed
from minipersona.training.interruption import Stop
from minipersona.training.record import Record

TERMS = ("loss", "cross_entropy")
CONFIG = RunConfig(
    data=DataSection("-", "-"),
    training=TrainingSection(steps=9, checkpoints=(4, 9), most_non_finite=3),
    execution=ExecutionSection(save_minutes=1e6),
)
BATCH = Batch(rows=[5, 7], packs=[], tokens=20, supervised=10)


class Recorded:
    """A record that notes when it saves; `step` queues and settles one."""

    def __init__(self, directory: Path, config: RunConfig = CONFIG, rank: int = 0, size: int = 1) -> None:
        self.file, self.saved, self.rows = directory / "metrics.jsonl", [], []  # type: ignore[var-annotated]
        self.stop = Stop()
        distributed = Distributed(rank, size, torch.device("cpu"), self.stop)
        self.record = Record(config, directory, distributed, TERMS, self.saved.append, self.rows.append)

    def step(
        self, step: int, loss: float = 30.0, norm: float = 2.0, flags: tuple[float, ...] = (0, 0, 0),
        batch: Batch = BATCH, ratio: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        sums = torch.tensor([loss, 20.0, *flags], dtype=torch.float64)
        self.record.queue(step, batch, 1e-3, sums, torch.tensor(norm), ratio)
        self.record.settle()
        return self.rows[-1]


def test_a_line_has_the_means_of_the_sums(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    row = recorded.step(1)
    assert row.pop("tokens_per_second") > 0
    numbers = {"loss": 3.0, "cross_entropy": 2.0, "supervised_tokens": 10, "tokens": 20, "grad_norm": 2.0, "lr": 1e-3}
    assert row == {"step": 1, **numbers}
    row = recorded.step(2, flags=(0, 2, 0), batch=replace(BATCH, context_tokens=6), ratio=0.25)
    assert (row["context_tokens"], row["penalty_ratio"], row["out_of_memory"]) == (6, 0.25, 2)
    row = recorded.step(3, batch=replace(BATCH, supervised=0))
    assert row["skipped"] == "no supervised token" and row["loss"] == 30.0
    assert [row["step"] for row in read_jsonl(recorded.file)] == [1, 2, 3]
    recorded.record.settle()  # nothing is queued
    assert len(recorded.rows) == 3


def test_of_several_ranks_the_first_one_writes(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, rank=1)
    assert recorded.step(1)["loss"] == 3.0 and not recorded.file.exists()


@pytest.mark.parametrize("loss, norm", [(math.nan, 2.0), (math.inf, 2.0), (30.0, math.nan), (30.0, math.inf)])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path, loss: float, norm: float) -> None:
    recorded = Recorded(tmp_path)
    for step in (1, 2):
        row = recorded.step(step, loss, norm)
        assert (row["loss"], row["cross_entropy"], row["grad_norm"]) == (None, None, None)
        assert row["skipped"] == "non-finite loss or gradient" and row["documents"] == [5, 7]
    assert "skipped" not in recorded.step(3)  # the count begins anew
    for step in (4, 5):
        recorded.step(step, loss, norm)
    with pytest.raises(UserError, match=r"step 6: loss or gradient non-finite 3 steps in a row \(rows \[5, 7\]\)"):
        recorded.step(6, loss, norm)


def test_a_checkpoint_is_written_where_it_is_measured_or_due_or_somebody_asks_to_stop(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    for step in range(1, 7):
        recorded.step(step, flags=(0, 0, float(step == 2)))
    assert recorded.saved == [2, 4]
    with pytest.raises(Interrupted, match="stopped after step 7"):
        recorded.step(7, flags=(1, 0, 0))
    assert recorded.saved == [2, 4, 7]


def test_a_checkpoint_is_due_so_many_minutes_after_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    recorded = Recorded(tmp_path, replace(CONFIG, execution=ExecutionSection(save_minutes=2.0)))

    def due_after(seconds: float) -> bool:
        clock[0] += seconds
        return bool(recorded.record.flags(0)[2])

    assert (due_after(119), due_after(2)) == (False, True)
    assert recorded.step(4)["tokens_per_second"] == pytest.approx(20 / 121) and recorded.saved == [4]
    assert (due_after(119), due_after(2)) == (False, True)


@pytest.mark.parametrize("minutes, rank, due", [(1e6, 0, 0), (1e6, 1, 0), (0.0, 0, 1), (0.0, 1, 0)])
def test_one_rank_says_when_a_checkpoint_is_due(tmp_path: Path, minutes: float, rank: int, due: int) -> None:
    recorded = Recorded(tmp_path, replace(CONFIG, execution=ExecutionSection(save_minutes=minutes)), rank, 2)
    assert recorded.record.flags(3).tolist() == [0, 3, due]
    recorded.stop.note(15)
    assert recorded.record.flags(0).tolist() == [1, 0, due]
