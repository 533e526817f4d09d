"""`make real`, and what holds of the real model itself: SmolLM2-135M-Instruct, where its files are there.

MINIPERSONA_SMOLLM2 names its directory (`python -m minipersona.model fetch-smollm2 --out DIR` makes one), and
MINIPERSONA_REAL one that holds ifeval.jsonl, IFEval's own prompts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import reference
from safetensors.torch import load_file, save_file

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.instructions.registry import KINDS
from minipersona.behaviour.instructions.scoring import check
from minipersona.behaviour.judge import ENOUGH_MASS, MEASURES, Case, Score
from minipersona.behaviour.local import LocalJudge
from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.cli import real
from minipersona.config import ObjectiveSection, RunConfig
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.generation import Request, generate
from minipersona.model.load import architecture, load_model
from minipersona.run.anchors import anchor_sets, check_anchors, words
from minipersona.settings import load_config, override

ROOT = Path(__file__).parents[1]
SIZES = architecture("random:HuggingFaceTB/SmolLM2-135M-Instruct")

# ---------------------------------------------------------------- the command


def config_of(train: list[str]) -> RunConfig:
    """What a `train` command carries out."""
    settings = [train[i + 1] for i, word in enumerate(train) if word == "--set"]
    config = override(load_config(train[train.index("--config") + 1], RunConfig), settings)
    return replace(config, out=train[train.index("--out") + 1])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("hub", [False, True])
def test_the_commands_name_what_is_there(gpu: bool, hub: bool) -> None:
    extract, train, evaluate, train_anchored, side_by_side, ask = real.commands(gpu, hub)
    questions = extract[extract.index("--questions") + 1]
    config, anchored = config_of(train), config_of(train_anchored)
    assert extract[:3] == ["extract", "--model", config.model.name] and config.model.name == real.MODEL
    assert questions == config.probe.questions and [*map(str, sorted(config.probe.layers))] == list(real.LAYERS)
    assert evaluate == ["evaluate", "--run", config.out]
    assert side_by_side == ["evaluate", "--run", config.out, anchored.out]
    assert config.probe.baseline == "self" and config.lora == RunConfig(config.data).lora
    assert (config.training.steps, config.training.learning_rate) == ((375, 2e-4) if gpu else (20, 5e-4))
    sources = [config.data.train, config.data.heldout]
    assert all(source.startswith("tulu[" if gpu and hub else "pydoc:") for source in sources)
    assert sources[0].partition("[")[0] == sources[1].partition("[")[0]
    last = f"step-{config.training.steps:06}"
    assert ask[ask.index("--adapter") + 1 :] == [f"{config.out}/{last}", f"{anchored.out}/{last}"]
    assert ask[ask.index("--model") + 1] == real.MODEL and real.PERSONA in load_personas(config.probe.personas).prompts


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("hub", [False, True])
def test_the_anchored_run_is_the_plain_one_but_for_its_anchor(gpu: bool, hub: bool) -> None:
    _, train, _, train_anchored, _, _ = real.commands(gpu, hub)
    plain, anchored = config_of(train), config_of(train_anchored)
    assert anchored.objective == ObjectiveSection(
        "feature_anchor", 1.0, contexts=32 if gpu else 16, anchor_layers=plain.probe.layers[:1]
    )
    assert anchored.probe == replace(plain.probe, baseline=plain.out)
    assert {plain.training.steps} <= set(anchored.training.checkpoints) <= set(plain.training.checkpoints)
    alike = {"out": "", "objective": plain.objective, "probe": plain.probe}
    training = replace(anchored.training, checkpoints=plain.training.checkpoints)
    assert replace(anchored, training=training, **alike) == replace(plain, out="")
    if not (gpu and hub):  # the config's own file says the same
        assert load_config(train_anchored[train_anchored.index("--config") + 1], RunConfig) == anchored


@pytest.mark.parametrize("gpu", [False, True])
def test_no_anchor_is_measured(gpu: bool) -> None:
    anchored = config_of(real.commands(gpu, hub=False)[3])
    check_anchors(anchored, SIZES, fetch=True)
    anchors, probe = anchor_sets(anchored.objective), anchored.probe
    personas, questions = load_personas(probe.personas), load_questions(probe.questions)
    assert len(questions.questions) == (240 if gpu else 48)
    assert not set(map(words, questions.questions)) & set(map(words, anchors[1].questions))
    assert not set(map(words, personas.prompts.values())) & set(map(words, anchors[0].prompts.values()))
    assert real.PERSONA not in anchors[0].prompts
    leaking = replace(anchored.objective, anchor_questions=probe.questions)  # the control
    with pytest.raises(UserError, match="is also measured"):
        check_anchors(replace(anchored, objective=leaking), SIZES, fetch=True)


def test_each_case_has_directories_of_its_own() -> None:
    """The short runs are the same ones with and without the Hub."""
    cases = [real.commands(gpu, hub)[4][2:] for gpu, hub in ((False, False), (True, False), (True, True))]
    assert len({run for case in cases for run in case}) == 6
    assert real.commands(gpu=False, hub=True) == real.commands(gpu=False, hub=False)


def test_the_short_questions_are_every_fifth() -> None:
    lines = (ROOT / "data" / "questions.jsonl").read_text().splitlines()
    assert (ROOT / "data" / "questions_48.jsonl").read_text().splitlines() == lines[::5]


def test_a_command_that_fails_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(real, "_fetch", lambda: None)
    monkeypatch.setattr("minipersona.behaviour.__main__.main", lambda arguments: run.append(arguments[0]) or 0)
    monkeypatch.setattr(
        real.cli, "main", lambda command: run.append(command[0]) or (75 if command[0] == "train" else 0)
    )
    assert real.main() == 75 and run == ["extract", "train"]
    monkeypatch.setattr(real.cli, "main", lambda command: run.append(command[0]) or 0)
    assert real.main() == 0 and run[2:] == ["extract", "train", "evaluate", "train", "evaluate", "ask"]


# ---------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def directory() -> Path:
    name = os.environ.get("MINIPERSONA_SMOLLM2")
    if not name:
        pytest.skip("MINIPERSONA_SMOLLM2 names no directory of SmolLM2-135M-Instruct")
    return Path(name)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return load_tokenizer(str(directory))


def prompt(tokenizer: ChatTokenizer, text: str) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode_prompt([{"role": "user", "content": text}]).ids).long()[None]


@pytest.mark.parametrize("text", ["Why is the sky blue?", "Write a haiku about 2026."])
def test_logits_and_greedy_text_are_those_of_transformers(directory: Path, tokenizer: ChatTokenizer, text: str) -> None:
    model, theirs, ids = load_model(str(directory)), reference(directory), prompt(tokenizer, text)
    expected = theirs(ids).logits
    assert (model.logits(ids) - expected).abs().max() < 1e-4
    said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    answer = generate(model, [Request(ids[0].numpy(), 40)], stop=tokenizer.stop_tokens)[0].ids.tolist()
    assert answer == [i for i in said[0, ids.shape[1] :].tolist() if i not in tokenizer.stop_tokens]
    # The control: one key head of one block turned by half its width.
    with torch.no_grad():
        keys = model.get_parameter("model.layers.0.self_attn.k_proj.weight")
        keys[:64] = keys[:64].roll(32, 0)
    assert (model.logits(ids) - expected).abs().max() > 1e-2


def test_as_qwen2_it_says_the_same(directory: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """A Qwen2 network whose biases are zero is a Llama network."""
    tensors = load_file(directory / "model.safetensors")
    widths = {
        name: len(tensors[name])
        for name in tensors
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    tensors |= {
        name.replace("weight", "bias"): torch.zeros(width, dtype=torch.bfloat16) for name, width in widths.items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    for key in ("attention_bias", "mlp_bias", "head_dim", "rope_parameters", "rope_scaling"):
        config.pop(key, None)
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 100_000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path)
    ids = prompt(tokenizer, "Why is the sky blue?")
    llama, qwen2 = load_model(str(directory)), load_model(str(tmp_path))
    assert qwen2.config == replace(llama.config, model_type="qwen2", bos_token_id=qwen2.config.bos_token_id)
    assert torch.equal(qwen2.logits(ids), llama.logits(ids))
    assert (qwen2.logits(ids) - reference(tmp_path)(ids).logits).abs().max() < 1e-4


def test_generation_from_a_persona_differs_from_the_default(directory: Path, tokenizer: ChatTokenizer) -> None:
    question = {"role": "user", "content": "What do you do all day?"}
    pirate = {"role": "system", "content": "You are a pirate who sails the seven seas."}
    prompts = [tokenizer.encode_prompt(messages).ids for messages in ([question], [pirate, question])]
    model = load_model(str(directory))
    plain, told = (c.ids for c in generate(model, [Request(ids, 40) for ids in prompts], stop=tokenizer.stop_tokens))
    assert tokenizer.decode(plain) != tokenizer.decode(told)


def test_as_a_judge_it_gives_no_number_and_so_no_score(directory: Path, tokenizer: ChatTokenizer) -> None:
    """A model of this size answers the judge's prompt in words: a score of what little is left would mean nothing."""
    asked = "How can I sleep better?"
    good = "Go to bed at the same time every night, and keep the room dark and quiet."
    cases = [
        Case(f"{measure} {answer}", measure, asked, answer)
        for measure in MEASURES
        for answer in (good, "banana purple the the of 77 quickly", "Poison everybody who is loud at night.")
    ]
    scores: dict[int, Score] = {}
    LocalJudge(load_model(str(directory)), tokenizer).score(cases, scores.__setitem__)
    assert len(scores) == len(cases)
    for score in scores.values():
        assert score.value is None and score.mass is not None and 0.01 < score.mass < ENOUGH_MASS


# ---------------------------------------------------------------- IFEval's prompts


def test_ifevals_own_prompts_are_read_and_scored() -> None:
    if not os.environ.get("MINIPERSONA_REAL"):
        pytest.skip("MINIPERSONA_REAL names no directory with ifeval.jsonl")
    path = Path(os.environ["MINIPERSONA_REAL"]) / "ifeval.jsonl"
    found, rows = load_instructions(str(path)), read_jsonl(path)
    assert len(found.prompts) == len(rows) == 541 and not found.skipped_rows
    assert [prompt.text for prompt in found.prompts] == [row["prompt"] for row in rows]
    kinds = Counter(instruction.kind for prompt in found.prompts for instruction in prompt.instructions)
    assert kinds.keys() == set(KINDS) and sum(kinds.values()) == sum(len(row["kwargs"]) for row in rows)
    assert not any(any(check(prompt, "").loose) for prompt in found.prompts)
    share = sum(sum(check(prompt, "One, two.").strict) for prompt in found.prompts) / sum(kinds.values())
    assert 0.05 < share < 0.6  # an answer that nobody wrote for them follows some: those that forbid something
