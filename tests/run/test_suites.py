"""The suites of answers for a run: its base, its last checkpoint, and who judges them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minipersona.behaviour.hidden import BehaviourComparison
from minipersona.behaviour.suite import Behaviour
from minipersona.behaviour.weights import weights_digest
from minipersona.behaviour_config import BehaviourSection
from minipersona.config import DataSection, LoraConfig, ModelSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.model.adapter_files import save_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.save import save_model
from minipersona.records import from_dict
from minipersona.run.directory import CONFIG, checkpoint_directory
from minipersona.run.suites import Suites, run_suites, suites_table
from minipersona.settings import to_toml

CPU, QUIET = torch.device("cpu"), Console(quiet=True)
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture
def suites(tmp_path: Path) -> Suites:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "idle", "question": "What can I do today?"}) + "\n")
    section = BehaviourSection(questions=str(questions), samples=2, max_new_tokens=6)
    return Suites(["behaviour"], section, "plain")


def make_run(directory: Path, method: str) -> None:
    config = RunConfig(
        DataSection("tiny:benign[0:2]", "tiny:benign[2:3]"),
        model=ModelSection("tiny"),
        lora=LORA,
        training=replace(TrainingSection(steps=2, checkpoints=(1, 2)), method=method),  # type: ignore[arg-type]
    )
    directory.mkdir()
    (directory / CONFIG).write_text(to_toml(config))
    for step in (1, 2):
        model = load_model("tiny")
        if method == "full":
            with torch.no_grad():
                model.model.norm.weight.mul_(1 + step)
            save_model(model, checkpoint_directory(directory, step))
            continue
        apply_lora(model, LORA)
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_B.fill_(0.01 * step)
        save_adapter(model, checkpoint_directory(directory, step))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_compared_with_its_base_which_also_judges(tmp_path: Path, suites: Suites, method: str) -> None:
    make_run(tmp_path / "run", method)
    result = run_suites(tmp_path / "run", CPU, QUIET, suites)
    behaviour = result.behaviour
    assert behaviour is not None and result.consistency is not None and result.instructions is None
    base = load_model("tiny")
    assert result.step == 2
    assert behaviour["base"].weights == weights_digest(base) == behaviour["trained"].judge["weights"]
    assert behaviour["trained"].weights != behaviour["base"].weights
    assert behaviour["trained"].judge == behaviour["base"].judge
    trained, untrained = (read_json(tmp_path / "run" / where / "behaviour.json") for where in (".", "base"))
    assert {"base": from_dict(Behaviour, untrained), "trained": from_dict(Behaviour, trained)} == behaviour
    assert result.consistency.reason in suites_table(result)
    printed = json.loads(json.dumps(result.to_json()))
    compared = printed["behaviour"].pop("consistency")
    assert from_dict(BehaviourComparison, compared) == result.consistency
    assert printed == {"step": 2, "behaviour": {"base": untrained, "trained": trained}}


def test_a_file_of_instructions_is_read_before_anything_is_asked(
    tmp_path: Path, suites: Suites, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "lora")
    monkeypatch.setattr("minipersona.run.suites.behaviour_suite", lambda *_, **__: pytest.fail("it was asked"))
    both = replace(suites, names=["behaviour", "instructions"], instructions_file=str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        run_suites(tmp_path / "run", CPU, QUIET, both)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path, suites: Suites) -> None:
    make_run(tmp_path / "run", "lora")
    for step in (1, 2):
        checkpoint_directory(tmp_path / "run", step).rename(tmp_path / f"step-{step}")
    with pytest.raises(UserError, match="has no checkpoint yet; let train"):
        run_suites(tmp_path / "run", CPU, QUIET, suites)
