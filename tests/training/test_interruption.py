"""Signals: noted or obeyed at once, once per request, and the process's own handlers afterwards as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.chat import Document
from minipersona.config import DataSection, LoraConfig, RunConfig, TrainingSection
from minipersona.errors import Interrupted, UserError
from minipersona.files import read_jsonl
from minipersona.model.load import load_model
from minipersona.training import loop
from minipersona.training.checkpoint import Position, load_state, save_state, stored_position
from minipersona.training.distributed import Distributed
from minipersona.training.interruption import SIGNALS, Stop, handle_signals
from minipersona.training.loop import Hooks, Trainer, train
from minipersona.training.optimizer import AdamW, Flat


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_or_raises_at_once(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in SIGNALS}
    stop = Stop()
    with handle_signals(stop):
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
        with pytest.raises(Interrupted), stop.at_once():
            raise AssertionError("entered after a signal")
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    stop, reached = Stop(), []
    with handle_signals(stop), pytest.raises(Interrupted), stop.at_once():
        with stop.deferred():
            reached.append("before")
        os.kill(os.getpid(), number)
        reached.append("after")
    assert reached == ["before"]
    stop, reached = Stop(), []
    with handle_signals(stop), pytest.raises(Interrupted), stop.at_once():
        with stop.deferred():
            os.kill(os.getpid(), number)
            reached.append("finished")
        reached.append("after")
    assert reached == ["finished"]


def test_control_nobody_asked() -> None:
    stop, threads = Stop(), threading.active_count()
    with handle_signals(stop), stop.at_once():
        stop.check()
    assert not stop.asked and threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1


TWICE = """
import os, signal, sys, time
from minipersona.training import interruption

from minipersona.training.interruption import Stop, handle_signals
interruption.SAME_REQUEST = 0.3
stop = Stop()
with handle_signals(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a scheduler and a launcher
    time.sleep(float(sys.argv[1]))
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    print("still there", flush=True)
"""


@pytest.mark.parametrize("pause, code, said", [("0.6", 75, "goes on\n"), ("0", 0, "goes on\nstill there\n")])
def test_a_second_request_ends_the_process_and_an_echo_of_the_first_does_not(pause: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, pause], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, said)
    assert ("stopped at once" in done.stderr) is (code == 75)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        stop = Stop()
        with handle_signals(stop):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.asked and signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---------------------------------------------------------------- a run that is stopped


def config() -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
        training=TrainingSection(steps=9, batch=7, checkpoints=(4, 9), probe_every=3, learning_rate=1e-2),
    )


class Caller:
    """Counts what it is called for, as a run does, and may stop it at a call."""

    def __init__(self, stop_at: tuple[str, int] = ("", 0)) -> None:
        self.distributed = Distributed(0, 1, torch.device("cpu"), Stop())
        self.stop_at = stop_at
        self.measured: list[tuple[str, int]] = []

    def hooks(self) -> Hooks:
        return Hooks(
            checkpoint=lambda step: self._measure("checkpoint", step),
            probe=lambda step: self._measure("probe", step),
            logged=lambda row: self.ask("logged", row["step"]),
        )

    def ask(self, what: str, step: int) -> None:
        if (what, step) == self.stop_at:
            self.distributed.stop.note(signal.SIGTERM)

    def _measure(self, what: str, step: int) -> None:
        self.ask(what, step)
        self.distributed.check_stop()
        self.measured.append((what, step))


def trained(directory: Path, documents: list[Document], out: Path, caller: Caller) -> dict[str, torch.Tensor]:
    model = load_model(str(directory), device="cpu")
    train(Trainer(model, documents, config(), out, caller.distributed), caller.hooks())
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


DUE = [("probe", 3), ("checkpoint", 4), ("probe", 6), ("checkpoint", 9)]


@pytest.mark.parametrize(
    "stop_at, step",
    [(("logged", 1), 2), (("logged", 3), 3), (("logged", 8), 9), (("probe", 3), 3), (("checkpoint", 4), 4),
     (("probe", 6), 6), (("checkpoint", 9), 9)],
)  # fmt: skip
def test_stopped_anywhere_a_run_loses_no_step_and_repeats_no_measurement(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, stop_at: tuple[str, int], step: int
) -> None:
    """Asked while a step is recorded, it stops before its measurement if one is due, or else after the next step."""
    whole = Caller()
    expected = trained(hf_model(), documents, tmp_path / "whole", whole)
    assert whole.measured == DUE
    first, second = Caller(stop_at), Caller()
    with pytest.raises(Interrupted, match="stopped"):
        trained(hf_model(), documents, tmp_path / "cut", first)
    assert (tmp_path / "cut" / "latest" / "state.safetensors").is_file()
    assert [row["step"] for row in read_jsonl(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, step + 1))
    resumed = trained(hf_model(), documents, tmp_path / "cut", second)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert first.measured + second.measured == DUE
    assert [row["step"] for row in read_jsonl(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 10))


@pytest.mark.parametrize(
    "during, size, done, begun",
    [("logged", 1, 4, 4), ("logged", 2, 4, 5),
     ("update", 1, 4, 4), ("update", 2, 5, 6),  # after the step's flags are taken
     ("passes", 1, 3, 4), ("passes", 2, 4, 5)],  # before they are, and before the step before is recorded
)  # fmt: skip
def test_one_of_several_ranks_stops_only_once_all_have_been_through_the_next_step(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    during: str, size: int, done: int, begun: int,
) -> None:  # fmt: skip
    """A pass through a sharded model is a sequence of collective operations, which a rank cannot leave to the others.

    Here the collective operations of the second rank are left out.
    """
    monkeypatch.setattr(Distributed, "sum", lambda self, *tensors: None)
    monkeypatch.setattr(Distributed, "_max", lambda self, value: value)
    accumulate, learning_rate, steps = loop.accumulate, loop.learning_rate, []
    caller = Caller(("logged", 3) if during == "logged" else (during, 4))  # in step 4, which records step 3
    caller.distributed = replace(caller.distributed, size=size)

    def counted(model, objective, forward, *rest, **more) -> torch.Tensor:
        steps.append(forward.step)
        caller.ask("passes", forward.step)
        return accumulate(model, objective, forward, *rest, **more)

    def asking(step: int, *rest: Any) -> float:
        caller.ask("update", step)
        return learning_rate(step, *rest)

    monkeypatch.setattr(loop, "accumulate", counted)
    monkeypatch.setattr(loop, "learning_rate", asking)
    settings = replace(config(), training=replace(config().training, checkpoints=(9,), probe_every=0))
    with pytest.raises(Interrupted, match=f"stopped after step {done}"):
        model = load_model(str(hf_model()), device="cpu")
        train(Trainer(model, documents, settings, tmp_path, caller.distributed), caller.hooks())
    assert steps == list(range(1, begun + 1))


# ---------------------------------------------------------------- too many non-finite steps


@pytest.mark.parametrize("most, steps", [(2, 2), (7, 7), (0, 9)])
def test_the_number_of_non_finite_steps_that_fail_a_run_is_the_configs(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, most: int, steps: int
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    settings = replace(config(), training=replace(config().training, most_non_finite=most))
    distributed = Distributed(0, 1, torch.device("cpu"))
    if most:
        with pytest.raises(UserError, match=f"step {most}: loss or gradient non-finite {most} steps in a row"):
            train(Trainer(model, documents, settings, tmp_path, distributed))
    else:
        assert train(Trainer(model, documents, settings, tmp_path, distributed)).updates == 0
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == steps


# ---------------------------------------------------------------- a damaged checkpoint


def test_another_runs_state_is_an_error(tmp_path: Path) -> None:
    """Also where torch could stretch its tensors to fit."""

    def optimised(*shape: int) -> tuple[dict[str, torch.nn.Parameter], AdamW]:
        weights = {"w": torch.nn.Parameter(torch.ones(shape))}
        return weights, AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)

    save_state(tmp_path, Position(step=3, updates=3), *optimised(1, 4), Distributed(0, 1, torch.device("cpu")))
    assert load_state(tmp_path, *optimised(1, 4)).step == 3  # the control
    for shape in ((4, 1), (5, 4), (4,)):
        with pytest.raises(UserError, match=r"state\.safetensors: holds another run's state; delete"):
            load_state(tmp_path, *optimised(*shape))


def test_without_a_checkpoint_a_run_stands_at_its_beginning(tmp_path: Path) -> None:
    weights = {"w": torch.nn.Parameter(torch.ones(3, 2))}
    optimizer = AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)
    for found in (load_state(tmp_path, weights, optimizer), stored_position(tmp_path)):
        assert (found.step, found.updates, found.done) == (0, 0, False)
    assert optimizer.updates == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a CUDA device")
def test_a_checkpoint_that_a_gpu_wrote_continues_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the GPU's generator is left alone: torch would keep it for a device that may come later."""
    from safetensors.torch import load_file, save_file

    weights = {"w": torch.nn.Parameter(torch.ones(3, 2))}
    optimizer = AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)
    save_state(tmp_path, Position(step=3, updates=2), weights, optimizer, Distributed(0, 1, torch.device("cpu")))
    file = tmp_path / "latest" / "state.safetensors"
    words = {"state": '{"step": 3, "updates": 2, "done": false}'}
    save_file({**load_file(file), "rng.cuda": torch.zeros(16, dtype=torch.uint8)}, file, words)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: pytest.fail("there is no such generator"))
    assert load_state(tmp_path, weights, optimizer) == Position(3, 2, False) and optimizer.updates == 2


@pytest.mark.parametrize("words", ["{}", '{"step": 3, "done": false}', '{"step": "3", "updates": 3, "done": false}',
                                   "[3]", '{"step": 3, "updates": 3, "done": false, "more": 1}'])  # fmt: skip
def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path: Path, words: str) -> None:
    from safetensors.torch import save_file

    (tmp_path / "latest").mkdir()
    file = tmp_path / "latest" / "state.safetensors"
    save_file({"rng.cpu": torch.zeros(2)}, file, {"state": words})
    with pytest.raises(UserError, match=r"state\.safetensors: is not a run's state; delete"):
        load_state(tmp_path, {}, None)  # type: ignore[arg-type]
    file.unlink()
    (tmp_path / "latest" / "state.json").write_text(words)
    with pytest.raises(UserError, match=r"state\.json: is not a run's state; delete"):
        load_state(tmp_path, {}, None)  # type: ignore[arg-type]
    (tmp_path / "latest" / "state.json").write_text("{torn")
    with pytest.raises(UserError, match=r"state\.json: not valid JSON"):
        load_state(tmp_path, {}, None)  # type: ignore[arg-type]
