"""What --plan says where the model or the rows are not on this machine: an estimate that is called one."""

from __future__ import annotations

import pytest

from minipersona.cli import main


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
