"""What a rank does with the values of the others, one rank by itself, and what it says where another is lost."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from minipersona.errors import Interrupted, UserError
from minipersona.training.distributed import Distributed, RankLost, join_process_group, process_group
from minipersona.training.interruption import Stop

CPU = torch.device("cpu")


def take_part(monkeypatch: pytest.MonkeyPatch, *values: int) -> None:
    """The other rank's values, one for each of the next reductions."""
    others = iter(values)
    monkeypatch.setattr(Distributed, "_max", lambda self, value: max(value, next(others)))


def test_with_one_rank_every_operation_is_the_identity() -> None:
    alone, tensor = Distributed(0, 1, CPU), torch.tensor([1.0, 2.0])
    alone.sum(tensor, tensor)
    alone.check_equal(3, "the step")
    alone.barrier()
    alone.check_stop()
    assert tensor.tolist() == [1.0, 2.0] and alone.broadcast(5) == 5 and alone.first
    alone.stop.note(15)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        alone.check_stop()


def test_different_values_are_an_error_and_equal_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, other in ((4, 5), (5, 4)):
        take_part(monkeypatch, other, -other)
        with pytest.raises(UserError, match="the step is 4 on one rank and 5 on another; all ranks must see the same"):
            Distributed(1, 2, CPU).check_equal(own, "the step")
        take_part(monkeypatch, own, -own)
        Distributed(1, 2, CPU).check_equal(own, "the step")


def test_the_first_rank_s_value_is_everyone_s(monkeypatch: pytest.MonkeyPatch) -> None:
    take_part(monkeypatch, 0)
    assert Distributed(0, 2, CPU).broadcast(7) == 7
    take_part(monkeypatch, 7)
    assert Distributed(1, 2, CPU).broadcast(9) == 7


def test_a_rank_stops_where_another_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    take_part(monkeypatch, 0, 1)
    rank = Distributed(1, 2, CPU)
    rank.check_stop()
    with pytest.raises(Interrupted, match="stopped"):
        rank.check_stop()


def test_a_failed_operation_means_that_a_rank_is_lost_unless_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dist, "all_reduce", fail)
    error: Exception = RuntimeError("Connection closed by peer. Some advice\nand more")
    for operation in (Distributed(0, 2, CPU).barrier, lambda: Distributed(0, 2, CPU).sum(torch.ones(1))):
        with pytest.raises(
            RankLost, match=r"another rank has ended, .*\(Connection closed by peer\); the same command"
        ):
            operation()
    error = torch.OutOfMemoryError()
    with pytest.raises(torch.OutOfMemoryError):
        Distributed(0, 2, CPU).barrier()


def test_without_torchrun_there_is_one_rank_on_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = join_process_group("cpu")
    assert (found.rank, found.size, found.device) == (0, 1, CPU) and not dist.is_initialized()
    for device, said in (("tpu9", "is unknown; use auto, cpu or cuda"), ("meta", "is not supported; use auto")):
        with pytest.raises(UserError, match=said):
            join_process_group(device)


def test_a_single_process_stops_anywhere() -> None:
    stop = Stop()
    with pytest.raises(Interrupted), process_group("cpu", 1.0, stop):
        stop.note(15)
        raise AssertionError("went on after a signal")
