"""The study command's runners: which GPUs, and that processes started by it share a study."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_study import small_study

from minipersona.cli import main
from minipersona.cli.study import _pass_on, gpu_ids, parse_share, parse_stages, run_each
from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.settings import to_toml


@pytest.mark.parametrize(
    "wanted, visible, ids",
    [
        ("all", "", ["0", "1", "2"]),
        ("2,0", "", ["2", "0"]),
        ("1,1", "", ["1"]),
        ("all", "5,7,GPU-ab12", ["5", "7", "GPU-ab12"]),  # what the scheduler gave us, by its own names
        ("1", "5,7,GPU-ab12", ["7"]),
    ],
)
def test_every_runner_gets_one_of_the_gpus_that_we_may_use(
    wanted: str, visible: str, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_ids(wanted) == ids


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for wanted in ("2", "0,x", "-1", ""):
        with pytest.raises(UserError, match="is none of 0 to 1"):
            gpu_ids(wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="has no GPU"):
        gpu_ids("all")


def test_shares_and_phases_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_share("3/8") == (3, 8) and parse_share("") == (1, 1)
    assert parse_stages("2, 5") == ["2", "5"] and parse_stages("") == ["1", "2", "3", "4", "5"]
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        with pytest.raises(UserError, match="write K/N"):
            parse_share(text)
    assert main(["study", "--config", "tiny_study", "--gpus", "all", "--cell", "1/2"]) == 2
    assert "give one of the two" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "--config", "tiny_study"]) == 2
    assert "not started by torchrun" in capsys.readouterr().err


def test_runners_in_processes_of_their_own_share_a_study(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_study(tmp_path)
    config = replace(config, training=replace(config.training, learning_rate=1e-5))
    (tmp_path / "study.toml").write_text(to_toml(config))
    monkeypatch.chdir(tmp_path)  # the package is found from anywhere
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--config", str(tmp_path / "study.toml"), "--phases", "1"]
    assert run_each(arguments, [("left", {}), ("right", {})]) == [0, 0]
    out, err = capfd.readouterr()
    assert err.count("1 baseline\n") == 1 and "[left] " in err and "[right] " in err
    verdict = read_json(Path(config.out) / "verdict.json")
    assert out.startswith(f"{verdict['verdict']}: ") and out.count("report.html") == 1
    assert len(list((Path(config.out) / "cells").glob("1-baseline-*"))) == 1
    assert run_each(["--config", "no_such_study"], [("only", {})]) == [2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_runner_is_heard_out_where_its_words_cannot_be_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipe would fill up otherwise, and hold it up."""
    talks = "import sys; sys.stderr.write(('x' * 99 + chr(10)) * 3000)"
    process = subprocess.Popen([sys.executable, "-c", talks], stderr=subprocess.PIPE, text=True)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        _pass_on(process, "0")
    assert process.wait(10) == 0
