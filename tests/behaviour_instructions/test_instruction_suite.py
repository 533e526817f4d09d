"""The suite on the embedded model: what it writes, that a kill loses nothing, and that no answer is another model's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.behaviour.instructions import suite
from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.instructions.scoring import summarise
from minipersona.chat import ChatTokenizer
from minipersona.chat.tokenizer import load_tokenizer
from minipersona.config import LoraConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.locks import lock
from minipersona.model.generation import Request, generate
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_disabled, adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.records import read_record, write_record

Run = Callable[..., suite.Instructions]
PROMPTS = 5
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture
def model() -> Qwen2:
    return load_model("tiny", device="cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Five rows that the tiny model can answer in its way, and one that nobody can check."""
    rows = [
        {"key": f"k{n}", "prompt": f"List {n} facts about bread.", "instruction_id_list": kinds, "kwargs": arguments}
        for n, (kinds, arguments) in enumerate(
            [
                (["punctuation:no_comma"], [{}]),
                (["keywords:existence"], [{"keywords": ["here"]}]),
                (["startend:quotation", "punctuation:no_comma"], [{}, {}]),
                (["length_constraints:number_words"], [{"num_words": 2, "relation": "at least"}]),
                (["change_case:english_lowercase"], [{}]),
                (["punctuation:no_semicolon"], [{}]),
            ]
        )
    ]
    path = tmp_path / "instructions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tokenizer: ChatTokenizer, file: Path) -> Run:
    def run(model: Qwen2, directory: Path, **options: Any) -> suite.Instructions:
        console = options.pop("console", Console(quiet=True))
        settings = {"max_new_tokens": LENGTH, "batch": 2, **options}
        return suite.instruction_suite(model, tokenizer, directory, str(file), console, **settings)

    return run


def answers(directory: Path) -> list[dict[str, Any]]:
    return read_jsonl(directory / "instructions" / "answers.jsonl")


def test_answers_are_greedy_and_scored(
    model: Qwen2, tokenizer: ChatTokenizer, run: Run, file: Path, tmp_path: Path
) -> None:
    stream = io.StringIO()
    result = run(model, tmp_path / "out", console=Console(stream=stream))
    assert result == read_record(tmp_path / "out" / "instructions.json", suite.Instructions, "ask again")
    prompts = load_instructions(str(file)).prompts
    expected = {}
    for prompt in prompts:
        ids = tokenizer.encode_prompt([{"role": "user", "content": prompt.text}]).ids
        (done,) = generate(model, [Request(ids, LENGTH)], stop=tokenizer.stop_tokens)
        expected[prompt.key] = tokenizer.decode(done.ids, skip_special_tokens=True)
    assert {row["key"]: row["response"] for row in answers(tmp_path / "out")} == expected
    assert len(set(expected.values())) > 1  # the model does answer
    assert {k: getattr(result, k) for k in vars(summarise(prompts, expected))} == vars(summarise(prompts, expected))
    assert result.prompts == PROMPTS and result.instructions == PROMPTS + 1
    assert result.skipped == 1 and result.skipped_kinds == {"punctuation:no_semicolon": 1}
    assert "rows are left out: 'punctuation:no_semicolon' (rows: 1)" in stream.getvalue()
    assert result.cut == sum(not row["stopped"] for row in answers(tmp_path / "out"))


@pytest.mark.parametrize("of_a_study", [{}, {"step": 0, "settings_digest": "d"}])
def test_a_file_is_written_as_it_was_read(tmp_path: Path, of_a_study: dict[str, Any]) -> None:
    content: dict[str, Any] = {"prompts": 2, "instructions": 3}
    for name in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"):
        content |= {name: 0.5, f"{name}_ci95": [0.25, 0.75]}
    kind = {"instructions": 3, "strict": 0.5, "strict_ci95": [0.25, 0.75], "loose": 1.0, "loose_ci95": [0.5, 1.0]}
    content |= {"by_kind": {"punctuation:no_comma": kind}, "empty": 0, "cut": 1, "skipped": 1}
    content |= {"skipped_kinds": {"punctuation:no_semicolon": 1}, "set": "shipped", "digest": "i"}
    text = json.dumps({**content, "max_new_tokens": 1280, **of_a_study}, indent=2) + "\n"
    path = tmp_path / "instructions.json"
    path.write_text(text)
    write_record(path, read_record(path, suite.Instructions, "ask again"))
    assert path.read_text() == text


class Killed(BaseException):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, kept: int, run: Callable[[], object]) -> None:
    """Run until `kept` answers are written, then die in the middle of the next line."""
    append = suite.append_jsonl
    count = 0

    def dying(path: Path, row: dict[str, Any], ascii: bool = False) -> None:
        nonlocal count
        if count == kept:
            with open(path, "a") as log:
                log.write('{"key": "k4", "resp')
            raise Killed
        count += 1
        append(path, row, ascii=ascii)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(suite, "append_jsonl", dying)
        run()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_killed_suite_continues(
    model: Qwen2, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    whole = run(model, tmp_path / "whole")
    killed_after(monkeypatch, kept, lambda: run(model, tmp_path / "killed"))
    assert len(answers(tmp_path / "killed")) == kept
    assert not (tmp_path / "killed" / "instructions.json").exists()
    assert run(model, tmp_path / "killed") == whole
    rows = answers(tmp_path / "killed")
    assert len(rows) == PROMPTS  # none was asked twice
    assert sorted(rows, key=lambda r: r["key"]) == sorted(answers(tmp_path / "whole"), key=lambda r: r["key"])


def changed(model: Qwen2) -> Qwen2:
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.add_(0.05)
    return model


def adapted(model: Qwen2) -> Qwen2:
    apply_lora(model, LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",)))
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 1.0, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("change", [changed, adapted])
def test_answers_of_other_weights_are_not_taken(
    model: Qwen2, run: Run, tmp_path: Path, change: Callable[[Qwen2], Qwen2]
) -> None:
    run(model, tmp_path / "both")
    run(change(model), tmp_path / "both")
    rows = answers(tmp_path / "both")
    assert len(rows) == 2 * PROMPTS and len({row["made_by"] for row in rows}) == 2
    before, after = ({row["key"]: row["response"] for row in part} for part in (rows[:PROMPTS], rows[PROMPTS:]))
    assert before != after


def test_a_switched_off_adapter_is_the_base(model: Qwen2, run: Run, tmp_path: Path) -> None:
    base = run(model, tmp_path / "out")
    with adapter_disabled(adapted(model)):
        assert run(model, tmp_path / "out") == base
    assert len(answers(tmp_path / "out")) == PROMPTS  # found, not asked again


def test_other_settings_are_asked_anew(model: Qwen2, run: Run, tmp_path: Path) -> None:
    run(model, tmp_path / "out")
    short = run(model, tmp_path / "out", max_new_tokens=2)
    assert short.cut == PROMPTS and short.max_new_tokens == 2
    assert len(answers(tmp_path / "out")) == 2 * PROMPTS


def test_a_second_process_is_refused(model: Qwen2, run: Run, tmp_path: Path) -> None:
    with lock(tmp_path / "out" / "instructions"), pytest.raises(UserError, match="is in use"):
        run(model, tmp_path / "out")


def test_the_shipped_set_runs(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    result = suite.instruction_suite(model, tokenizer, tmp_path, None, Console(quiet=True), max_new_tokens=4)
    assert result.prompts >= 240 and result.set == "shipped" and result.skipped == 0
    assert 0 <= result.prompt_strict <= result.prompt_loose <= result.instruction_loose <= 1
