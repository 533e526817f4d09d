"""A rank that fails, dies or hangs ends the run: torchrun ends the other ranks, and the one that failed says why.

And a NaN on one rank only, and a signal to one rank only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipersona.files import read_jsonl

from .rank_workers import ROOT, Launch, script, torchrun, two_ranks

SECONDS = 25.0  # that the other ranks have to end after a fault: less than torchrun waits before it kills them

# ---------------------------------------------------------------- the train command

# train.py, in which one rank fails at a step.
TRAIN = """
import os, signal, sys
from pathlib import Path
from minipersona.cli import main
from minipersona.errors import UserError
from minipersona.training import loop

what, culprit, fault = os.environ["FAULT"], os.environ["CULPRIT"], Path(os.environ["FAULT_FILE"])
real = loop.accumulate

def accumulate(model, objective, forward, layout, packs, **more):
    if forward.step == 4 and os.environ["RANK"] == culprit:
        fault.touch()
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "error":
            raise UserError("rows.jsonl: the disk is gone; mount it")
    return real(model, objective, forward, layout, packs, **more)

loop.accumulate = accumulate
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = [
    "training.steps=5", "training.checkpoints=[2, 5]", "training.batch=4", "save_minutes=0",
    "data.heldout=tiny:benign[2000:2010]",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launch]:
    """Run `torchrun train.py` in a directory, with a fault on one of the two ranks."""
    directory = tmp_path_factory.mktemp("train")
    (directory / "train.py").write_text(TRAIN)
    questions = directory / "questions.jsonl"
    lines = (ROOT / "data" / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines[:4]) + "\n")
    settings = [part for setting in (*SETTINGS, f"questions={questions}") for part in ("--set", setting)]
    command = [str(directory / "train.py"), "train", "--config", "configs/tiny_phase1.toml", *settings]

    def start(out: Path, fault: str = "none", culprit: int = 0, *more: str) -> Launch:
        file = out.parent / f"{out.name}.fault"
        file.unlink(missing_ok=True)
        variables = {"FAULT": fault, "CULPRIT": str(culprit), "FAULT_FILE": str(file)}
        return torchrun([*command, "--out", str(out), *more], file, variables)

    return start


@pytest.fixture(scope="module")
def undisturbed(train: Callable[..., Launch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(out).code == 0
    return out


def assert_equal_runs(a: Path, b: Path) -> None:
    adapters = [load_file(out / "step-000005" / "adapter_model.safetensors") for out in (a, b)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    assert read_jsonl(a / "probes.jsonl") == read_jsonl(b / "probes.jsonl")
    metrics = [[{**row, "tokens_per_second": 0} for row in read_jsonl(out / "metrics.jsonl")] for out in (a, b)]
    assert metrics[0] == metrics[1] and len(metrics[1]) == 5


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_fails_says_why_in_one_line_and_the_run_ends(
    train: Callable[..., Launch], tmp_path: Path, culprit: int
) -> None:
    failed = train(tmp_path / "run", "error", culprit)
    assert failed.code != 0 and failed.seconds < SECONDS
    assert failed.errors == [f"error: rank {culprit}: rows.jsonl: the disk is gone; mount it"], failed.said
    assert failed.culprit == (culprit, 2)
    assert failed.said.count("Traceback") == 1, failed.said  # torchrun's own


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_run_and_the_same_command_continues_it(
    train: Callable[..., Launch], undisturbed: Path, tmp_path: Path, culprit: int
) -> None:
    killed = train(tmp_path / "run", "killed", culprit)
    assert killed.code != 0 and killed.seconds < SECONDS
    assert killed.culprit == (culprit, -9)
    assert len(killed.errors) <= 1  # none if torchrun ends the other rank before it notices the loss
    for line in killed.errors:
        assert line.startswith(f"error: rank {1 - culprit}: another rank has ended"), killed.said
        assert line.endswith("the same command continues from the last checkpoint")
    assert killed.said.count("Traceback") == 1, killed.said  # torchrun's own
    assert (tmp_path / "run" / "latest" / "state.safetensors").is_file()
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 5  # there is something left to do
    assert train(tmp_path / "run").code == 0
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_an_error_of_all_ranks_is_reported_once(train: Callable[..., Launch], tmp_path: Path) -> None:
    failed = train(tmp_path / "run", "none", 0, "--set", "training.stepz=3")
    assert failed.code != 0
    (line,) = failed.errors
    assert line[: len("error: rank 0: ")] in ("error: rank 0: ", "error: rank 1: ") and "training.stepz" in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- other ways to fail

SUMMING = """
def work(distributed):
    what, culprit = scenario.split("-")
    for step in range(40):
        distributed.sum(torch.ones(3))
        if step == 3 and culprit in ("both", str(distributed.rank)):
            (out / "fault").touch()
            if what == "error":
                raise UserError("rows.jsonl: the disk is gone; mount it")
            if what == "defect":
                raise KeyError("weights")
            if what == "hang":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun kills it after half a minute
                time.sleep(600)
            if what == "slow":
                time.sleep(2)
command(work)
"""


def summing(scenario: str, out: Path, minutes: float = 5.0) -> Launch:
    return torchrun(script(SUMMING, scenario, out, minutes=minutes), out / "fault")


def test_a_defect_on_one_rank_shows_its_traceback_once(tmp_path: Path) -> None:
    failed = summing("defect-0", tmp_path / "out")
    assert failed.code != 0 and failed.seconds < SECONDS and failed.culprit == (0, 1)
    assert failed.said.count("Traceback") == 2 and failed.errors == []  # the defect's and torchrun's own
    assert failed.said.count("\n[rank0]: KeyError: 'weights'\n") == 1, failed.said


@pytest.mark.slow
def test_an_error_on_both_ranks_at_once_is_reported_by_one(tmp_path: Path) -> None:
    failed = summing("error-both", tmp_path / "out")
    (line,) = failed.errors
    assert failed.code != 0 and line[line.index("rank ") + 6 :] == ": rows.jsonl: the disk is gone; mount it"


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path: Path, culprit: int) -> None:
    failed = summing(f"hang-{culprit}", tmp_path / "out", minutes=0.05)
    assert failed.code != 0 and 3 < failed.seconds < SECONDS
    (line,) = failed.errors
    assert line.startswith(f"error: rank {1 - culprit}: another rank has ended, or took longer than execution.timeout")
    assert failed.said.count("Traceback") == 1, failed.said


def test_control_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    finished = summing("slow-1", tmp_path / "out")
    assert finished.code == 0 and finished.errors == [] and "Traceback" not in finished.said


SHARDED = """
from dataclasses import replace

real = loop.backward
def backward(model, pack, objective, forward):
    if rank == 1 and forward.step == 3:
        (out / "fault").touch()
        if scenario == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("weights")
    return real(model, pack, objective, forward)
loop.backward = backward

def work(distributed):
    sharded = replace(config, training=replace(config.training, method="full"))
    train(Trainer(load_model(model_dir, device="cpu"), documents, sharded, out / "run", distributed))
command(work)
"""


@pytest.mark.parametrize("how, code", [("killed", -9), pytest.param("defect", 1, marks=pytest.mark.slow)])
def test_a_rank_lost_within_a_pass_of_a_sharded_model_ends_the_run(
    hf_model: Callable[..., Path], tmp_path: Path, how: str, code: int
) -> None:
    failed = torchrun(script(SHARDED, how, tmp_path / "out", hf_model()), tmp_path / "out" / "fault")
    assert failed.code != 0 and failed.seconds < SECONDS and failed.culprit == (1, code), failed.said
    if how == "defect":
        assert failed.said.count("Traceback") == 2 and "\n[rank1]: KeyError: 'weights'\n" in failed.said


# ---------------------------------------------------------------- one rank only

POISONED = """
real = loop.backward
def backward(model, pack, objective, forward):
    terms = real(model, pack, objective, forward)
    if rank == 1 and forward.step in (3, 4):
        next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = float("nan")
    return terms
loop.backward = backward

def work(distributed):
    model = load_model(model_dir, device="cpu")
    def logged(row):
        save_file(weights(model), str(out / f"{row['step']}-{rank}.safetensors"))
    train(Trainer(model, documents, config, out / "run", distributed), Hooks(logged=logged))
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
def work(distributed):
    model = load_model(model_dir, device="cpu")
    def logged(row):
        if scenario == "signal" and rank == 1 and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
    try:
        train(Trainer(model, documents, config, out / "run", distributed), Hooks(logged=logged))
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
