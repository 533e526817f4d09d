"""The directions of a run: made once, kept in its directory, and never of what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minipersona.chat import load_tokenizer
from minipersona.config import DataSection, LoraConfig, ModelSection, ProbeSection, RunConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import data_dir
from minipersona.model.load import load_model
from minipersona.run import null_space as module
from minipersona.run.directory import NULL_SPACE
from minipersona.run.null_space import check_null_space, run_null_space
from minipersona.training.distributed import Distributed

WORLD = Distributed(0, 1, torch.device("cpu"))
QUIET = Console(quiet=True)
CONFIG = RunConfig(
    DataSection("-", "-"), model=ModelSection("tiny"), lora=LoraConfig(null_space=5, targets=("v_proj",), blocks=(1, 2))
)


def test_a_run_makes_its_directions_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    monkeypatch.setattr(module, "CONTEXTS", 40)
    made = run_null_space(CONFIG, tmp_path, WORLD, model, tokenizer, QUIET)
    assert {name: tuple(u.shape) for name, u in made.items()} == {
        f"model.layers.{block}.self_attn.q_proj": (model.config.hidden_size, 5) for block in (1, 2)
    }
    monkeypatch.setattr(module, "input_directions", None)  # what continues does not compute them again
    again = run_null_space(CONFIG, tmp_path, WORLD, model, tokenizer, QUIET)
    assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in made)
    off = replace(CONFIG, lora=LoraConfig())
    assert run_null_space(off, tmp_path / "off", WORLD, model, tokenizer, QUIET) == {}
    assert not (tmp_path / "off" / NULL_SPACE).exists()


def test_what_is_measured_is_refused() -> None:
    check_null_space(CONFIG)
    asked = replace(CONFIG, probe=ProbeSection(questions=str(data_dir() / "anchor_questions.jsonl")))
    with pytest.raises(UserError, match="is also measured"):
        check_null_space(asked)
    check_null_space(replace(asked, lora=LoraConfig()))
