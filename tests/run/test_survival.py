"""Commands that machines interrupt: signals, launchers, a second command; and a curve of measurements between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_study import small_study, start

from minipersona.cli import main
from minipersona.config import RunConfig
from minipersona.corpus.training_set import training_set
from minipersona.errors import Interrupted
from minipersona.files import read_json, read_jsonl
from minipersona.locks import lock
from minipersona.model.load import load_model
from minipersona.run.resources import load_run_tokenizer
from minipersona.run.train import finished
from minipersona.settings import load_config, to_toml
from minipersona.training.distributed import Distributed
from minipersona.training.interruption import Stop
from minipersona.training.loop import Hooks, Trainer, train
from minipersona.verdict.ledger import read_entries

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ADAPTER = Path("step-000010") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = (ROOT / "data" / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines[:6]) + "\n")
    changes = {
        "data.heldout": "tiny:benign[2000:2010]",
        "training.steps": 10,
        "training.checkpoints": [3, 10],
        "training.probe_every": 4,
        "training.batch": 4,
        "probe.questions": questions,
        "execution.device": "cpu",
    }
    given = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return ["--config", str(ROOT / "configs" / "tiny_phase1.toml"), *given]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *settings, "--out", str(out)]) == 0
    return out


def started(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def once(there: Callable[[], object], process: subprocess.Popen[str] | ForkProcess) -> None:
    deadline = time.monotonic() + 90
    while not there():
        status = process.exitcode if isinstance(process, ForkProcess) else process.poll()
        assert status is None and time.monotonic() < deadline, (
            isinstance(process, subprocess.Popen) and process.stderr and process.stderr.read()
        )
        time.sleep(0.005)


# ---------------------------------------------------------------- train.py


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signalled_run_exits_with_75_and_the_same_command_continues(
    whole: Path, settings: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "cut"
    process = started("train.py", *settings, "--out", str(out))
    once(lambda: len(read_jsonl(out / "metrics.jsonl")) >= 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1].endswith("; the same command continues") and "Traceback" not in said
    assert "stopped" in said.splitlines()[-1] and not (out / ".lock").exists()
    step = read_json(out / "latest" / "state.json")["step"]
    assert step == len(read_jsonl(out / "metrics.jsonl"))  # not one of them is lost
    assert main(["train", *settings, "--out", str(out)]) == 0
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [row["step"] for row in read_jsonl(out / "probes.jsonl")] == [0, 3, 4, 8, 10]
    assert [row["m1"] for row in read_jsonl(out / "probes.jsonl")] == [
        row["m1"] for row in read_jsonl(whole / "probes.jsonl")
    ]


def test_a_run_stopped_while_the_base_is_measured_exits_with_75(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cut"
    process = started("train.py", *settings, "--set", "probe.questions=shipped", "--out", str(out))  # takes seconds
    once((out / "provenance.json").is_file, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and said.endswith("stopped by SIGTERM; the same command continues\n"), said
    assert not (out / "probes.jsonl").exists()  # control: it was measuring


def test_torchrun_passes_the_signal_on_and_the_ranks_stop_together(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    long = [*settings, "--set", "training.steps=400", "--set", "training.checkpoints=[400]", "--out", str(out)]
    process = started("train.py", *long, "--set", "training.probe_every=0", launcher=launcher)
    once(lambda: len(read_jsonl(out / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    step = read_json(out / "latest" / "state.json")["step"]
    assert process.returncode != 0 and f"stopped after step {step}; the same command continues" in said, said
    assert step == len(read_jsonl(out / "metrics.jsonl")) < 400
    assert said.count("the same command continues") == 1 and "error:" not in said


# ---------------------------------------------------------------- a curve of measurements


def test_steps_between_the_checkpoints_are_measured_and_leave_nothing_else(whole: Path, tmp_path: Path) -> None:
    probes = read_jsonl(whole / "probes.jsonl")
    assert [row["step"] for row in probes] == [0, 3, 4, 8, 10]
    assert all(row["eval_loss"] and row["m1"] for row in probes)
    assert {path.name for path in whole.glob("step-*")} == {"step-000003", "step-000010"}
    assert {path.stem for path in (whole / "vectors").iterdir()} == {"step-000000", "step-000003", "step-000010"}
    config = load_config(str(whole / "config.toml"), RunConfig)
    assert finished(whole, config)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    rows = [json.dumps(row) for row in probes if row["step"] != 4]
    (copy / "probes.jsonl").write_text("\n".join(rows) + "\n")
    assert not finished(copy, config)
    assert finished(copy, replace(config, training=replace(config.training, probe_every=0)))  # control
    assert main(["evaluate", "--run", str(whole)]) == 0
    assert [row["step"] for row in read_json(whole / "result.json")["checkpoints"]] == [3, 10]
    (whole / "result.json").unlink()


# ---------------------------------------------------------------- two commands, one directory


def test_evaluating_a_run_in_training_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "probes.jsonl").read_bytes()
    with lock(whole):
        assert main(["evaluate", "--run", str(whole)]) == 2
        assert f"{whole} is in use by pid {os.getpid()} on " in capsys.readouterr().err
    assert (whole / "probes.jsonl").read_bytes() == before and not (whole / "result.json").exists()
    assert main(["evaluate", "--run", str(whole), "--json"]) == 0  # control: once it is let go
    (whole / "result.json").unlink()
    assert main(["evaluate", "--run", str(whole.parent / "absent")]) == 2 and not (whole.parent / "absent").exists()


def test_an_interrupted_evaluation_exits_with_75_and_gives_the_directory_back(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "probes.jsonl").unlink()
    process = started("evaluate.py", "--run", str(out), "--questions", "shipped")
    once((out / ".lock").is_file, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and said.endswith("stopped by SIGTERM; the same command continues\n"), said
    assert not (out / ".lock").exists()


# ---------------------------------------------------------------- a study


@pytest.mark.parametrize("workers", [pytest.param((), marks=pytest.mark.slow), ("--workers", "2")])
def test_a_signalled_study_exits_with_75_and_continues(tmp_path: Path, workers: tuple[str, ...]) -> None:
    config = small_study(tmp_path)
    config = replace(config, training=replace(config.training, steps=200, checkpoints=(1, 200)), later_checkpoints=())
    file = tmp_path / "study.toml"
    file.write_text(to_toml(config))
    command = ("study.py", "--config", str(file), "--phases", "1", *workers)
    attempts = Path(config.out) / "cells" / ".attempts"

    def steps() -> int:
        return max([len(read_jsonl(path)) for path in attempts.glob("*/metrics.jsonl")], default=0)

    process = started(*command)
    once(lambda: steps() >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and said.splitlines()[-1].endswith("; the same command continues"), said
    (state,) = attempts.glob("*/latest/state.json")
    stopped_at = read_json(state)["step"]
    assert 2 <= stopped_at == steps() < 200
    assert not list(Path(config.out).glob("**/.lock"))  # every lock was given back
    entries = [(entry.name, entry.event) for entry in read_entries(Path(config.out))]
    beside = {("voice of the base", event) for event in ("started", "done")}  # what another worker is at
    assert [entry for entry in entries if entry not in beside] == [
        ("base", "started"), ("base", "done"), ("baseline", "started")
    ]  # fmt: skip
    again = start(config, ("1",), workers=2 if workers else 0)  # as the command does, without importing torch anew
    once(lambda: steps() > stopped_at + 1 or list(attempts.parent.glob("1-*")), again)
    again.kill()
    again.join()
    taken_up = [rows for path in attempts.glob("*/metrics.jsonl") if (rows := read_jsonl(path))]
    assert all([row["step"] for row in rows] == list(range(1, len(rows) + 1)) for rows in taken_up)


def test_a_cell_that_stays_non_finite_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from small_study import run

    from minipersona.training import loop

    real = loop.backward

    def poisoned(model, pack, objective, over_pack):  # type: ignore[no-untyped-def]
        terms = real(model, pack, objective, over_pack)
        return terms * float("nan") if objective.terms[-1] == "kl" else terms

    monkeypatch.setattr(loop, "backward", poisoned)
    config = small_study(tmp_path)
    config = replace(config, training=replace(config.training, most_non_finite=2, learning_rate=1e-5))
    monkeypatch.setattr("minipersona.report.write.draw_all", lambda series: None)
    verdict = run(config, ("1", "2", "3"))
    assert {row.cell.split()[0] for row in verdict.failed} == {"2A", "2B"}
    assert all("non-finite 2 steps in a row" in str(row.error) for row in verdict.failed)
    published = {path.name[:1] for path in (Path(config.out) / "cells").iterdir() if not path.name.startswith(".")}
    assert published == {"1", "3"}


# ---------------------------------------------------------------- said early, and said alike twice


@pytest.mark.parametrize("vector", ["villain - nobody", "file:absent.safetensors"])
def test_a_wrong_steering_vector_is_said_before_the_directory_is_claimed(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], vector: str
) -> None:
    out = tmp_path / "run"
    assert main(["train", *settings, "--out", str(out), "--set", f"steering.vector={vector}"]) == 2
    assert vector.split()[-1].removeprefix("file:") in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_the_first_steps_of_the_demo_are_equal_to_the_bit(tmp_path: Path) -> None:
    config = load_config("tiny_phase1", RunConfig)
    documents = training_set(config.data, config.seed, load_run_tokenizer(config.model)).documents

    def first_steps(out: Path, seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        distributed = Distributed(0, 1, torch.device("cpu"), Stop())
        torch.manual_seed(time.time_ns())  # nothing hangs on it
        model = load_model("tiny", device="cpu")
        settings = replace(config, seed=seed, training=replace(config.training, checkpoints=(40,)))

        def logged(row: dict) -> None:
            if row["step"] == 2:
                distributed.stop.note(signal.SIGTERM)

        with pytest.raises(Interrupted, match="stopped after step 3"):
            train(Trainer(model, documents, settings, out, distributed), Hooks(logged=logged))
        return [row["loss"] for row in read_jsonl(out / "metrics.jsonl")], load_file(out / "latest/state.safetensors")

    (losses, state), (losses_again, state_again) = (first_steps(tmp_path / name, 42) for name in ("a", "b"))
    assert losses == losses_again and len(losses) == 3
    weights = [name for name in state if not name.startswith("rng.")]
    assert all(torch.equal(state[name], state_again[name]) for name in weights)
    assert losses != first_steps(tmp_path / "control", 43)[0]
