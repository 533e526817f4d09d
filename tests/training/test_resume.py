"""A run that was killed ends where an undisturbed one ends, to the bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minipersona.chat import Document
from minipersona.config import DataSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.model.load import load_model
from minipersona.training import loop
from minipersona.training.checkpoint import Position, stored_position
from minipersona.training.distributed import Distributed
from minipersona.training.loop import LOGS, Hooks, Trainer, cut_logs, train

SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


class Killed(Exception):
    pass


def config(method: str = "lora") -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
        training=TrainingSection(method=method, steps=9, batch=7, checkpoints=(2, 5), learning_rate=1e-2),  # type: ignore[arg-type]
    )


def run(
    directory: Path, documents: list[Document], out: Path, settings: RunConfig, die_at: int | None = None
) -> tuple[dict[str, torch.Tensor], Position]:
    def logged(row: dict) -> None:
        if row["step"] == die_at:
            raise Killed

    model = load_model(str(directory), device="cpu")
    position = train(Trainer(model, documents, settings, out, SINGLE_PROCESS), Hooks(logged=logged))
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, position


def losses(out: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("die_at", [1, 3, 5, 6, 9])
def test_killed_and_resumed_equals_uninterrupted(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, method: str, die_at: int
) -> None:
    expected, position = run(hf_model(), documents, tmp_path / "whole", config(method))
    assert position == Position(step=9, updates=9, done=True)
    with pytest.raises(Killed):
        run(hf_model(), documents, tmp_path / "cut", config(method), die_at)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill tore
    torch.manual_seed(die_at)  # another process has another RNG state
    resumed, _ = run(hf_model(), documents, tmp_path / "cut", config(method))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize("kind, method", [("r3f", "lora"), ("kl_to_base", "lora"), ("kl_to_base", "full")])
def test_killed_and_resumed_with_a_divergence(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str, method: str
) -> None:
    """The noise and the base are those of the step and of the start, whenever a run begins again."""
    settings = replace(config(method), objective=ObjectiveSection(kind, weight=0.5))  # type: ignore[arg-type]
    expected, _ = run(hf_model(), documents, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        run(hf_model(), documents, tmp_path / "cut", settings, 6)
    resumed, _ = run(hf_model(), documents, tmp_path / "cut", settings)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    divergences = [[row["kl"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert divergences[0] == divergences[1] and divergences[0][-1] > 0


def test_control_a_resume_without_moments_ends_elsewhere(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(hf_model(), documents, tmp_path / "whole", config())
    with pytest.raises(Killed):
        run(hf_model(), documents, tmp_path / "cut", config(), 7)
    load = loop.load_state

    def forgetful(*arguments) -> Position:
        position = load(*arguments)
        for moment in arguments[2].layout.exp_avg:
            moment.zero_()
        return position

    monkeypatch.setattr(loop, "load_state", forgetful)
    resumed, _ = run(hf_model(), documents, tmp_path / "cut", config())
    assert any(not torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_step_is_recorded_although_the_next_one_fails(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are read while the next one is at work."""
    real, calls = loop.accumulate, itertools.count(1)

    def failing(*arguments: Any, **more: Any) -> torch.Tensor:
        if next(calls) == 4:
            raise RuntimeError("a defect")
        return real(*arguments, **more)

    monkeypatch.setattr(loop, "accumulate", failing)
    settings = replace(config(), execution=replace(config().execution, save_minutes=0))
    with pytest.raises(RuntimeError, match="a defect"):
        run(hf_model(), documents, tmp_path, settings)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert stored_position(tmp_path).step == 3


def test_each_step_s_batch_is_made_once_and_none_after_the_last(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = loop.Trainer.batch, []

    def noted(trainer: loop.Trainer, step: int) -> Any:
        made.append(step)
        return real(trainer, step)

    monkeypatch.setattr(loop.Trainer, "batch", noted)
    run(hf_model(), documents, tmp_path, config())
    assert made == list(range(1, config().training.steps + 1))


def test_a_finished_run_drops_its_tensors_and_is_left_alone(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    run(hf_model(), documents, tmp_path, config())
    assert [path.name for path in (tmp_path / "latest").iterdir()] == ["state.json"]
    assert json.loads((tmp_path / "latest" / "state.json").read_text()) == {"step": 9, "updates": 9, "done": True}
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _, position = run(hf_model(), documents, tmp_path, config())
    assert position.done and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_runs_state_is_refused(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(hf_model(), documents, tmp_path, config("lora"), 4)
    with pytest.raises(UserError, match="another run's state"):
        run(hf_model(), documents, tmp_path, config("full"))


def test_a_step_without_supervised_tokens_is_skipped_and_logged(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    silent = [replace(d, supervised=d.supervised & False) for d in documents[:30]] + documents[30:33]
    settings = config()
    settings = replace(settings, training=replace(settings.training, batch=2))
    _, position = run(hf_model(), silent, tmp_path, settings)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    skipped = [row for row in rows if "skipped" in row]
    assert skipped and len(skipped) < len(rows)
    assert position.updates == len(rows) - len(skipped)
    assert all(row["supervised_tokens"] == 0 for row in skipped)


def test_a_resumed_run_does_not_count_skipped_steps_as_updates(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    """Adam's bias correction follows from the number of updates."""
    silent = [replace(d, supervised=d.supervised & False) for d in documents[:30]] + documents[30:36]
    settings = replace(config(), training=replace(config().training, batch=2))
    expected, position = run(hf_model(), silent, tmp_path / "whole", settings)
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert position.updates == sum("skipped" not in row for row in rows) > 2
    with pytest.raises(Killed):
        run(hf_model(), silent, tmp_path / "cut", settings, 7)  # continues from the checkpoint of step 5
    assert any("skipped" in row for row in rows[:5]) and stored_position(tmp_path / "cut").step == 5
    assert any("skipped" not in row for row in rows[5:])
    resumed, again = run(hf_model(), silent, tmp_path / "cut", settings)
    assert again == position
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_the_seed_of_the_config_decides_the_rows_of_each_step(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = loop.make_batch, list[list[int]]()

    def recording(documents: list[Document], rows: list[int], *more: Any) -> Any:
        seen.append(list(rows))
        return real(documents, rows, *more)

    monkeypatch.setattr(loop, "make_batch", recording)
    for seed in (42, 7):
        seen.clear()
        run(hf_model(), documents, tmp_path / str(seed), replace(config(), seed=seed))
        expected = np.random.Generator(np.random.PCG64(seed)).permutation(len(documents)).tolist()
        assert seen[:5] == [expected[i : i + 7] for i in range(0, 35, 7)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_skips_the_update_although_the_gradients_are_finite(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:  # fmt: skip
    real = loop.backward

    def poisoned(model: Any, pack: Any, objective: Any, forward: Any) -> torch.Tensor:
        terms = real(model, pack, objective, forward)
        return terms * value if forward.step == 4 else terms

    monkeypatch.setattr(loop, "backward", poisoned)
    model = load_model(str(hf_model()), device="cpu")
    after = dict[int, dict[str, torch.Tensor]]()

    def logged(row: dict[str, Any]) -> None:
        after[row["step"]] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    position = train(Trainer(model, documents, config(), tmp_path, SINGLE_PROCESS), Hooks(logged=logged))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "skipped" in row] == [4] and position.updates == 8
    unchanged = [s for s in range(2, 10) if all(torch.equal(after[s - 1][n], after[s][n]) for n in after[s])]
    assert unchanged == [4]  # the other steps do change the weights


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": "3"}', "[3]", "3"])
@pytest.mark.parametrize("name", LOGS)
def test_a_log_line_without_a_step_is_an_error_that_names_it(tmp_path: Path, name: str, line: str) -> None:
    file = tmp_path / name
    file.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{{"step": 3}}\n{line}\n')
    with pytest.raises(UserError, match=rf"{name}: line 4 has no step; delete that line"):
        cut_logs(tmp_path, 2)
    file.write_text('{"step": 0}\n{"step": 2}\n{"step": 3}\n')  # the control
    cut_logs(tmp_path, 2)
    assert [row["step"] for row in read_jsonl(file)] == [0, 2]


def test_nothing_to_learn_is_an_error(hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path) -> None:
    silent = [replace(d, supervised=d.supervised & False) for d in documents]
    with pytest.raises(UserError, match="no training row has a supervised token"):
        run(hf_model(), silent, tmp_path, config())


@pytest.mark.parametrize("kind", ["cross_entropy", "kl_to_base"])
def test_divergence_stops_the_run_and_names_the_rows(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str
) -> None:
    settings = replace(config(), objective=ObjectiveSection(kind, 0.5 * (kind != "cross_entropy")))  # type: ignore[arg-type]
    model = load_model(str(hf_model()), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"non-finite 5 steps in a row \(rows \[\d+"):
        train(Trainer(model, documents, settings, tmp_path, SINGLE_PROCESS))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert all(row["loss"] is None and row.get("kl") is None for row in rows)
    assert [row["skipped"] for row in rows] == ["non-finite loss or gradient"] * 5
    assert all(len(row["documents"]) == 7 for row in rows)


def test_the_global_rng_is_not_touched(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(hf_model(), documents, tmp_path, config())
    assert torch.equal(torch.get_rng_state(), before)
