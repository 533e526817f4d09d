"""Where the study command runs: which GPUs, how many processes, and that these share one study."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_study import QUIET, small_study

from minipersona.cli import main
from minipersona.cli.study import gpus, make_executor, parse_stages, threads_each
from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.locks import lock
from minipersona.settings import to_toml
from minipersona.study.executors import InProcess, Processes
from minipersona.training.interruption import Stop


@pytest.mark.parametrize(
    "wanted, devices",
    [
        ("all", ["cuda:0", "cuda:1", "cuda:2"]),
        ("2,0", ["cuda:2", "cuda:0"]),
        ("1, 1", ["cuda:1", "cuda:1"]),  # two processes on one card
        ("0,0,0,2", ["cuda:0", "cuda:0", "cuda:0", "cuda:2"]),
    ],
)
def test_every_process_gets_one_of_the_gpus_that_we_may_use(
    wanted: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # torch counts what CUDA_VISIBLE_DEVICES leaves
    assert gpus(wanted) == devices
    executor = Processes(devices, QUIET)
    assert executor.device_type == "cuda"
    assert len({device.label for device in executor.devices}) == len(devices)  # so that lines can be told apart


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wanted in ("2", "0,x", "-1", ""):
        with pytest.raises(UserError, match="is none of 0 to 1"):
            gpus(wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="has no GPU"):
        gpus("all")


def test_a_plan_is_of_the_workers_that_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["study", "--config", "tiny_study", "--plan"]
    monkeypatch.setattr("minipersona.study.plan.study_plan", lambda config, stages, devices: f"{list(devices)}")
    for options, devices in (([], []), (["--workers", "2"], ["cpu", "cpu"])):
        assert main([*plan, *options]) == 0
        assert capsys.readouterr().out == str(devices)
    assert main([*plan, "--ray", "auto"]) == 2
    assert "--ray: has no effect on --plan" in capsys.readouterr().err


def test_phases_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_stages("2, 5") == ["2", "5"] and parse_stages("") == ["1", "2", "3", "4", "5", "6"]
    with pytest.raises(UserError, match="'7' is none of 1, 2, 3, 4, 5, 6"):
        parse_stages("1,7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "--config", "tiny_study"]) == 2
    assert "not started by torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("named, exhaustive", [("", False), ("1,3", False), ("1,2,3,4,5", True), ("1,2,3,4,5,6", True)])
def test_all_five_phases_by_name_are_an_exhaustive_search(
    named: str, exhaustive: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.toml"
    file.write_text(to_toml(replace(small_study(tmp_path), exhaustive=False)))  # a plan reads all rows
    assert main(["study", "--config", str(file), "--plan", *(["--phases", named] if named else [])]) == 0
    said = capsys.readouterr().out
    assert f"exhaustive = {str(exhaustive).lower()}\n" in said
    assert ("a pass skips no phase" in said) == bool(named) and ("a pass ends the search" in said) != bool(named)


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"gpus": "", "workers": None, "ray": "", **given})


def test_one_place_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**given: object) -> object:
        return make_executor(options(**given), "cpu", QUIET, Stop())

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert isinstance(made(), InProcess)
    workers, on_gpus = made(workers=3), made(gpus="all")
    assert isinstance(workers, Processes) and (workers.device_type, len(workers.devices)) == ("cpu", 3)
    assert isinstance(on_gpus, Processes) and [device.label for device in on_gpus.devices] == ["cuda:0", "cuda:1"]
    shared = made(gpus="0,0,0")  # three processes that share a card
    assert isinstance(shared, Processes)
    assert [device.label for device in shared.devices] == ["cuda:0 (1)", "cuda:0 (2)", "cuda:0 (3)"]
    for two in ({"gpus": "all", "workers": 2}, {"workers": 2, "ray": "auto"}):
        with pytest.raises(UserError, match=r"--\w+ and --\w+ say where a study runs; give one of them"):
            made(**two)
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"--workers {wrong}: must be at least 1"):
            made(workers=wrong)


def test_without_ray_its_option_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "minipersona.study.ray_executor", raising=False)
    assert main(["study", "--config", "tiny_study", "--ray", "auto"]) == 2
    assert "Ray is not installed; run pip install 'minipersona[cluster]'" in capsys.readouterr().err


def test_an_option_that_is_no_more_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--config", "tiny_study", "--cell", "1/2"]) == 2
    assert "unrecognized arguments: --cell;" in capsys.readouterr().err


def test_the_cores_are_shared_out_among_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_each(workers) for workers in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


def test_processes_share_a_study_and_one_line_says_what_it_came_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_study(tmp_path)
    config = replace(config, training=replace(config.training, learning_rate=1e-5))
    (tmp_path / "study.toml").write_text(to_toml(config))
    monkeypatch.chdir(tmp_path)  # the package is found from anywhere
    command = ["study", "--config", str(tmp_path / "study.toml"), "--phases", "1", "--workers", "2"]
    with lock(Path(config.out)):
        assert main(command) == 2
        (refused,) = capfd.readouterr().err.splitlines()
        assert refused.startswith(f"error: {config.out} is in use by pid ")
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert err.count("cell 1 of 1, 1 baseline: started on cpu (1)\n") == 1 and "[cpu (1)] step 3: M1 " in err
    verdict = read_json(Path(config.out) / "verdict.json")
    assert out.startswith(f"{verdict['verdict']}: ") and out.count("report.html") == 1
    assert len(list((Path(config.out) / "cells").glob("1-baseline-*"))) == 1
    assert main(["study", "--config", "no_such_study", "--workers", "2"]) == 2
