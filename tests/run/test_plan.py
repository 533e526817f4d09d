"""What --plan says where the model or the rows are not on this machine: an estimate that is called one."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipersona.chat import load_tokenizer
from minipersona.cli import main
from minipersona.config import RunConfig
from minipersona.corpus.mixtures import content_digest
from minipersona.corpus.sources import read_source, tokenize
from minipersona.files import append_jsonl
from minipersona.run.plan import measured_tokens
from minipersona.settings import load_config, override


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """The exit status, the lines of comment and the error of ``train --plan``. These tests have no network."""
    status = main(["train", *arguments, "--plan"])
    out, error = capsys.readouterr()
    return status, [line for line in out.splitlines() if line.startswith("#")], error


def test_a_plan_of_the_7b_needs_neither_its_files_nor_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, error = planned(capsys, "--config", "phase1")
    assert (status, error) == (0, "")
    assert lines[0] == "# model      7,615.6 million parameters, 28 blocks; measured at layer 20"
    assert lines[1].startswith(
        "# data       tokens are an estimate, 450 a row, since the rows cannot be counted here: "
    )
    assert "# training   375 steps of 16 rows, about 2,700,000 tokens, 7,200 a step" in lines


def test_control_what_is_at_hand_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, error = planned(capsys, "--config", "tiny_phase1")
    assert (status, error) == (0, "") and not any("estimate," in line or "about" in line for line in lines[:3])
    assert lines[1].startswith("# data       2,000 rows, ") and lines[1].endswith(" 0.32 epochs")


@pytest.mark.parametrize(
    "setting, said",
    [
        (["--model", "me/model"], "me/model: not in the local cache, and "),  # its sizes are not known
        (["--set", "data.train=jsonl:gone.jsonl"], "gone.jsonl: no such file"),
        (["--set", "data.heldout=tulux[0:10]"], "source 'tulux[0:10]' is unknown"),
    ],
)
def test_what_is_amiss_without_a_network_is_refused(
    setting: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines, error = planned(capsys, "--config", "phase1", *setting)
    assert (status, lines) == (2, []) and error.startswith(f"error: {said}") and error.count("\n") == 1


TRAIN, HELDOUT = "tiny:benign[0:120]", "tiny:benign[2000:2040]"


@pytest.mark.parametrize(
    "recipe",
    [
        [],
        ["system_prompts=training_personas"],
        ["system_prompts=training_personas", "persona_share=0.5"],
        ["responses=responses.jsonl"],
        ["responses=responses.jsonl", "system_prompts=training_personas"],
        ["shuffle_responses=true"],
        ["broad=tiny:raw_text", "broad_kind=raw_text", "ratio=99:1"],  # of 40 rows it would replace none
        ["broad=tiny:broad", "broad_kind=rows", "ratio=1:1"],
        ["broad=tulu", "broad_kind=rows", "ratio=1:1"],  # which would have to be fetched
    ],
    ids=" ".join,
)
def test_held_out_rows_are_counted_as_they_are_measured_whatever_is_trained_on(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    append_jsonl("responses.jsonl", {"roleplay": {"seed": 42}})
    for index, row in enumerate(read_source(TRAIN).rows):
        line = {"row": index, "content": content_digest(row), "persona": "pirate", "response": "Arr!"}
        append_jsonl("responses.jsonl", line)
    (tmp_path / "questions.txt").write_text("What is courage?\nWhat is a promise?\n")
    settings = [f"data.train={TRAIN}", f"data.heldout={HELDOUT}", "probe.questions=questions.txt", *recipe]
    tokenizer = load_tokenizer("tiny")
    _, heldout = measured_tokens(override(load_config("tiny_phase1", RunConfig), settings), tokenizer)
    assert heldout == 2 * sum(map(len, tokenize(read_source(HELDOUT), tokenizer)))
    status, lines, error = planned(capsys, "--config", "tiny_phase1", *(f"--set={setting}" for setting in settings))
    assert (status, error) == (0, "") and lines[1].startswith("# data       120 rows, ")


def test_a_run_without_held_out_rows_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = planned(capsys, "--config", "tiny_phase1", "--set", "data.heldout=")
    assert (status, error) == (0, "")
