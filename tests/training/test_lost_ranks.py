"""A rank that fails, dies or hangs: the other one ends soon, in one line that names it. And a NaN on one rank only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipersona.files import read_jsonl

from .rank_workers import two_ranks

SUMMING = """
def work(world):
    what, culprit = scenario.split("-")
    for step in range(40):
        world.sum(torch.ones(3))
        if step == 3 and culprit in ("both", str(world.rank)):
            if what == "error":
                raise UserError("rows.jsonl: the disk is gone; mount it")
            if what == "defect":
                raise KeyError("weights")
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hang":
                time.sleep(600)
            if what == "slow":
                time.sleep(2)
command(work)
"""


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    "what, codes, said",
    [
        ("error", (2, 1), "error: rank {} failed: rows.jsonl: the disk is gone; mount it\n"),
        ("killed", (-9, 1), "died"),
        ("hang", (-9, 1), "error: rank {} hangs: the others have waited for it for 0.05 minutes "),
    ],
)
def test_the_other_rank_ends_in_one_line_that_names_the_culprit(
    tmp_path: Path, what: str, codes: tuple[int, int], said: str, culprit: int
) -> None:
    ends = two_ranks(SUMMING, f"{what}-{culprit}", tmp_path / "out", minutes=0.05 if what == "hang" else 5.0)
    lost, other = ends[culprit], ends[1 - culprit]
    assert (lost.code, other.code) == codes, ends
    assert said.format(culprit) in other.said and f"rank {culprit}" in other.said
    assert other.said.count("\n") == 1 and "Traceback" not in lost.said + other.said, other.said
    if what == "error":
        assert lost.said == "error: rows.jsonl: the disk is gone; mount it\n"


def test_a_defect_on_one_rank_shows_its_traceback_once(tmp_path: Path) -> None:
    lost, other = two_ranks(SUMMING, "defect-0", tmp_path / "out")
    assert lost.said.count("Traceback") == 1 and other.said == "error: rank 0 failed: KeyError('weights')\n"


def test_an_error_on_all_ranks_is_each_ones_own(tmp_path: Path) -> None:
    ends = two_ranks(SUMMING, "error-both", tmp_path / "out")
    assert [(end.code, end.said) for end in ends] == [(2, "error: rows.jsonl: the disk is gone; mount it\n")] * 2


def test_control_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    assert [(end.code, end.said) for end in two_ranks(SUMMING, "slow-1", tmp_path / "out")] == [(0, "")] * 2


SHARDED = """
from dataclasses import replace

real = loop.backward
def backward(model, pack, objective, over_pack):
    if rank == 1 and over_pack.step == 3:
        if scenario == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("weights")
    return real(model, pack, objective, over_pack)
loop.backward = backward

def work(world):
    sharded = replace(config, training=replace(config.training, method="full"))
    train(load_model(model_dir, device="cpu"), documents, sharded, out / "run", world)
command(work)
"""


@pytest.mark.parametrize("how, code, said", [("killed", -9, "rank 1 has died"), ("defect", 1, "rank 1 failed: KeyErr")])
def test_a_rank_lost_within_a_pass_of_a_sharded_model_is_named(
    hf_model: Callable[..., Path], tmp_path: Path, how: str, code: int, said: str
) -> None:
    other, lost = two_ranks(SHARDED, how, tmp_path / "out", hf_model())
    assert (lost.code, other.code) == (code, 1), (lost, other)
    assert said in other.said and other.said.count("\n") == 1, other.said


POISONED = """
real = loop.backward
def backward(model, pack, objective, over_pack):
    terms = real(model, pack, objective, over_pack)
    if rank == 1 and over_pack.step in (3, 4):
        next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = float("nan")
    return terms
loop.backward = backward

def work(world):
    model = load_model(model_dir, device="cpu")
    def logged(row):
        save_file(weights(model), str(out / f"{row['step']}-{rank}.safetensors"))
    train(model, documents, config, out / "run", world, Hooks(logged=logged))
command(work)
"""


def test_a_nan_on_one_rank_updates_neither_and_the_run_goes_on(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    ends = two_ranks(POISONED, "-", tmp_path / "out", hf_model())
    assert [end.code for end in ends] == [0, 0], ends
    after = {
        (step, rank): load_file(tmp_path / "out" / f"{step}-{rank}.safetensors")
        for step in range(1, 9)
        for rank in range(2)
    }

    def equal(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return all(torch.equal(after[a][name], after[b][name]) for name in after[a])

    assert all(equal((step, 0), (step, 1)) for step in range(1, 9))
    assert [step for step in range(2, 9) if equal((step - 1, 0), (step, 0))] == [3, 4]  # the others do update
    rows = read_jsonl(tmp_path / "out" / "run" / "metrics.jsonl")
    skipped = {row["step"]: row for row in rows if "skipped" in row}
    assert sorted(skipped) == [3, 4] and all(len(row["documents"]) == 8 for row in skipped.values())


STOPPED = """
def work(world):
    model = load_model(model_dir, device="cpu")
    def logged(row):
        if scenario == "signal" and rank == 1 and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
    try:
        train(model, documents, config, out / "run", world, Hooks(logged=logged))
    except Interrupted as interrupted:
        print(interrupted, stop.signal or "nobody", file=sys.stderr)
        raise
    finally:
        save_file(weights(model), str(out / f"end-{rank}.safetensors"))
command(work)
"""


def test_a_signal_to_one_rank_stops_both_after_the_same_step(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    whole = two_ranks(STOPPED, "undisturbed", tmp_path / "whole", hf_model())
    ends = two_ranks(STOPPED, "signal", tmp_path / "cut", hf_model())
    assert [end.code for end in whole + ends] == [0, 0, 75, 75], ends
    assert [end.said for end in ends] == ["stopped after step 4 nobody\n", "stopped after step 4 SIGUSR1\n"]
    at_stop, at_end = (load_file(tmp_path / name / "end-0.safetensors") for name in ("cut", "whole"))
    again = two_ranks(STOPPED, "undisturbed", tmp_path / "cut", hf_model())
    assert [end.code for end in again] == [0, 0], again
    resumed = [load_file(tmp_path / "cut" / f"end-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(resumed[rank][name], at_end[name]) for name in at_end for rank in range(2))
    assert any(not torch.equal(at_stop[name], at_end[name]) for name in at_end)  # control: there was a way to go
    assert [row["step"] for row in read_jsonl(tmp_path / "cut" / "run" / "metrics.jsonl")] == list(range(1, 9))
