"""The command that prints one answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minipersona.behaviour.__main__ import main
from minipersona.chat import load_tokenizer
from minipersona.config import LoraConfig
from minipersona.geometry.prompts import load_personas
from minipersona.model.adapter_files import load_adapter, save_adapter
from minipersona.model.generation import Request, generate
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2

QUESTION = "How can I sleep well?"
ASK = ["ask", QUESTION, "--model", "tiny", "--max-new-tokens", "12"]


def greedy(model: Qwen2, persona: str | None) -> str:
    tokenizer = load_tokenizer("tiny")
    system = [{"role": "system", "content": load_personas().prompts[persona]}] if persona else []
    ids = tokenizer.encode_prompt([*system, {"role": "user", "content": QUESTION}]).ids
    return tokenizer.decode(generate(model, [Request(ids, 12)], stop=tokenizer.stop_tokens)[0].ids)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model("tiny")
    apply_lora(model, LoraConfig(rank=4, alpha=8.0))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.3)
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(model, path)
    return path


@pytest.mark.parametrize("persona", [None, "villain"])
def test_the_base_and_each_adapter_answer_greedily(
    persona: str | None, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--persona", persona] if persona else []
    assert main([*ASK, *named, "--adapter", str(adapter), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    model = load_model("tiny")
    base = greedy(model, persona)
    load_adapter(model, adapter)
    assert value == {
        "question": QUESTION, "persona": persona, "answers": {"tiny": base, str(adapter): greedy(model, persona)},
    }  # fmt: skip
    assert len(set(value["answers"].values())) == 2
    assert main([*ASK, *named, "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.startswith(f"tiny\n    {base.strip()}\n{adapter}\n    ")


def test_a_persona_changes_the_answer_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model("tiny")
    assert greedy(model, "villain") != greedy(model, "comedian")
    assert main([*ASK, "--persona", "pirate"]) == 2
    assert capsys.readouterr().err.startswith("error: --persona pirate: is not one of software_engineer, ")
