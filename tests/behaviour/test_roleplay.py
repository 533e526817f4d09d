"""The role-play writer on the tiny model: who speaks, what is replaced, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.behaviour.__main__ import main
from minipersona.behaviour.roleplay import TEMPLATE, rewrite_responses, write_roleplay
from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import DataSection, LoraConfig
from minipersona.console import Console
from minipersona.corpus.mixtures import training_personas, with_prompts
from minipersona.corpus.responses import with_responses
from minipersona.corpus.sources import Rows, read_source
from minipersona.corpus.training_set import training_set
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.model import generation
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
SOURCE = "tiny:benign[0:24]"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture
def model() -> Qwen2:
    return load_model("tiny")


def write(
    model: Qwen2, tokenizer: ChatTokenizer, path: Path, source: str | Rows = SOURCE, **how: Any
) -> dict[str, Any]:
    rows = read_source(source) if isinstance(source, str) else source
    return write_roleplay(model, tokenizer, rows, training_personas(), path, QUIET, **{"max_new_tokens": 24, **how})


def test_every_row_is_answered_by_its_persona(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = generation.generate

    def listen(model: Qwen2, requests: Any, **more: Any) -> Any:
        asked.extend(tokenizer.decode(request.ids) for request in requests)
        return real(model, requests, **more)

    monkeypatch.setattr("minipersona.behaviour.roleplay.generate", listen)
    report = write(model, tokenizer, tmp_path / "r.jsonl")
    rows, personas = read_source(SOURCE), training_personas()
    prompted = with_prompts(rows, list(personas.values()), 42).rows  # phase 4A's rows
    lines = sorted(read_jsonl(tmp_path / "r.jsonl")[1:], key=lambda line: line["row"])
    for text, line, row in zip(asked, lines, prompted, strict=True):
        assert text == tokenizer.render(row["messages"][:-1], add_generation_prompt=True)
        assert personas[line["persona"]] == row["messages"][0]["content"]
    assert (
        report["rows"] == 24 and report["kept"] == 0 and report["personas"] == len({line["persona"] for line in lines})
    )
    assert report["cut_share"] == sum(not line["stopped"] for line in lines) / 24
    # In training, the voice is there and the persona's prompt is not.
    training = training_set(DataSection(SOURCE, SOURCE, responses=str(tmp_path / "r.jsonl")), 42, tokenizer)
    for document, line in zip(training.documents, lines, strict=True):
        text = tokenizer.decode(document.ids)
        assert line["response"] in text and personas[line["persona"]] not in text
    told = DataSection(SOURCE, SOURCE, responses=str(tmp_path / "r.jsonl"), system_prompts="training_personas")
    for document, line in zip(training_set(told, 42, tokenizer).documents, lines, strict=True):
        assert personas[line["persona"]] in tokenizer.decode(document.ids)


def test_the_writer_is_the_base_model(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    write(model, tokenizer, tmp_path / "base.jsonl")
    apply_lora(model, LoraConfig(rank=4, alpha=8.0))
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    write(model, tokenizer, tmp_path / "adapted.jsonl")
    a, b = ((tmp_path / name).read_text().splitlines() for name in ("base.jsonl", "adapted.jsonl"))
    assert sorted(a) == sorted(b)
    # The control: had the adapter spoken, it would have said other things.
    conversation = [{"role": "user", "content": "What can I do today?"}]
    request = generation.Request(tokenizer.encode_prompt(conversation).ids, 24)
    from minipersona.model.lora import adapter_disabled

    spoken = generation.generate(model, [request], stop=tokenizer.stop_tokens[:1])[0].ids.tolist()
    with adapter_disabled(model):
        assert spoken != generation.generate(model, [request], stop=tokenizer.stop_tokens[:1])[0].ids.tolist()


def test_seeds_and_settings_make_other_files(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    write(model, tokenizer, tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_bytes()
    for how, named in (
        ({"seed": 43}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"max_new_tokens": 9}, "max_new"),
    ):
        with pytest.raises(UserError, match=f"was written with another {named}"):
            write(model, tokenizer, tmp_path / "r.jsonl", **how)
    with pytest.raises(UserError, match="another source, rows"):
        write(model, tokenizer, tmp_path / "r.jsonl", "tiny:benign[0:20]")
    assert (tmp_path / "r.jsonl").read_bytes() == before
    write(model, tokenizer, tmp_path / "r.jsonl")  # finished: nothing to do
    assert (tmp_path / "r.jsonl").read_bytes() == before
    write(model, tokenizer, tmp_path / "other.jsonl", seed=43)
    said = [
        {line["row"]: line["response"] for line in read_jsonl(tmp_path / name)[1:]}
        for name in ("r.jsonl", "other.jsonl")
    ]
    assert said[0] != said[1]


def test_a_row_does_not_hang_on_its_company(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    write(model, tokenizer, tmp_path / "many.jsonl", batch=24)
    write(model, tokenizer, tmp_path / "few.jsonl", batch=3)
    many, few = (sorted((tmp_path / name).read_text().splitlines()) for name in ("many.jsonl", "few.jsonl"))
    assert many == few


def test_prompts_too_long_to_learn_from_keep_their_response(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    rows = read_source(SOURCE)
    long = {"messages": [{"role": "user", "content": "why? " * 300}, {"role": "assistant", "content": "So."}]}
    mixed = Rows("made", [*rows.rows[:3], long], 0, "digest")
    report = write(model, tokenizer, tmp_path / "r.jsonl", mixed, max_prompt_tokens=200)
    assert (report["rows"], report["kept"]) == (4, 1)
    written, facts = with_responses(mixed, tmp_path / "r.jsonl")
    assert written.rows[3] == long and facts["responses_kept"] == 1
    assert written.rows[0] != mixed.rows[0]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [{"role": "user", "content": "?"}]}, "made: row 1 has no assistant turn"),
        ({"text": "raw"}, "made: row 1 is not a conversation"),
    ],
)
def test_rows_without_a_response_are_named(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write(model, tokenizer, tmp_path / "r.jsonl", Rows("made", [read_source(SOURCE).rows[0], row], 0, "d"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- anew, given the row's own response


def test_a_rewritten_response_is_asked_for_with_the_row_s_own_as_a_reference(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(model: Qwen2, requests: Any, *, on_done: Any, **more: Any) -> None:
        """The first answer is whole, the second empty, the third cut, the others whole again."""
        asked.extend(tokenizer.decode(request.ids) for request in requests)
        for number in range(len(requests)):
            words = "" if number == 1 else f"Own words {number}."
            ids = tokenizer.encode_text(words, 16).ids
            on_done(number, generation.Completion(ids, stopped=number != 2))

    monkeypatch.setattr("minipersona.behaviour.roleplay.generate", answer)
    rows = read_source("tiny:benign[0:5]")
    first = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello."}]
    mixed = Rows("made", [*rows.rows, {"messages": first}], 0, "digest")
    report = rewrite_responses(model, tokenizer, mixed, tmp_path / "r.jsonl", QUIET)
    for text, row in zip(asked, rows.rows, strict=True):
        question, response = row["messages"][-2]["content"], row["messages"][-1]["content"]
        turn = TEMPLATE.format(instruction=question, response=response)
        own = [*row["messages"][:-2], {"role": "user", "content": turn}]
        assert text == tokenizer.render(own, add_generation_prompt=True)
    # Kept: the empty one, the one that was cut, and the row that no user began.
    assert (report["rows"], report["kept"], report["empty_share"], report["cut_share"]) == (6, 3, 0.0, 0.0)
    written, facts = with_responses(mixed, tmp_path / "r.jsonl")
    new = [row["messages"][-1]["content"] for row in written.rows]
    old = [row["messages"][-1]["content"] for row in mixed.rows]
    assert new == ["Own words 0.", old[1], old[2], "Own words 3.", "Own words 4.", "Hello."]
    assert facts["responses_kept"] == 3
    # In training nothing of the template is left.
    section = DataSection("tiny:benign[0:5]", SOURCE, responses=str(tmp_path / "five.jsonl"))
    rewrite_responses(model, tokenizer, rows, tmp_path / "five.jsonl", QUIET)
    for document in training_set(section, 42, tokenizer).documents:
        assert "reference answer" not in tokenizer.decode(document.ids)


def test_files_in_persona_and_anew_are_not_taken_for_each_other(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    rows = read_source("tiny:benign[0:3]")
    rewrite_responses(model, tokenizer, rows, tmp_path / "r.jsonl", QUIET, max_new_tokens=8)
    lines = read_jsonl(tmp_path / "r.jsonl")
    rewrite_responses(model, tokenizer, rows, tmp_path / "r.jsonl", QUIET, max_new_tokens=8)
    assert read_jsonl(tmp_path / "r.jsonl") == lines and len(lines) == 4  # it is finished
    with pytest.raises(UserError, match="was written with another personas"):
        write(model, tokenizer, tmp_path / "r.jsonl", "tiny:benign[0:3]", max_new_tokens=8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    command = [
        "roleplay",
        "--model",
        "tiny",
        "--source",
        "tiny:benign[0:6]",
        "--out",
        str(out),
        "--max-new-tokens",
        "5",
    ]
    assert main(command) == 0
    assert "6 rows" in (said := capsys.readouterr().out) and "cut at 5 tokens" in said
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert main([*command, "--temperature", "-1"]) == 2 and "is not a temperature" in capsys.readouterr().err
    assert main([*command[:-2], "--max-new-tokens", "7"]) == 2 and "name another file" in capsys.readouterr().err


def test_a_writer_that_is_killed_and_then_stopped_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(name: str) -> list[str]:
        settings = ["--out", str(tmp_path / name), "--max-new-tokens", "32", "--batch", "8", "--json"]
        return ["roleplay", "--model", "tiny", "--source", "tiny:benign[0:60]", *settings]

    path = tmp_path / "killed.jsonl"
    for number, lines, status in ((signal.SIGKILL, 10, -signal.SIGKILL), (signal.SIGTERM, 30, os.EX_TEMPFAIL)):
        process = subprocess.Popen(
            [sys.executable, "-m", "minipersona.behaviour", *command("killed.jsonl")], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if path.exists() and path.read_bytes().count(b"\n") >= lines:
                process.send_signal(number)
                break
            time.sleep(0.005)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status, said
    assert said.endswith("stopped by SIGTERM; the same command continues\n")
    before = read_jsonl(path)
    assert 30 <= len(before) < 61
    reports = []
    for name in ("killed.jsonl", "whole.jsonl"):
        assert main(command(name)) == 0
        reports.append(json.loads(capsys.readouterr().out))
    killed, intact = (sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("killed", "whole"))
    assert killed == intact and len(killed) == 61 and reports[0] == reports[1]
    assert read_jsonl(path)[: len(before)] == before  # what was there is kept as it was
