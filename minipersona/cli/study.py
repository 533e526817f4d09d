"""The `study` command: one runner in this process, or one in a process of its own on each GPU."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minipersona.console import Console, printable
from minipersona.errors import Interrupted, UserError
from minipersona.files import PACKAGE
from minipersona.report import write_report
from minipersona.settings import load_config, override
from minipersona.study.search import study as run_study
from minipersona.study_config import STAGES, StudyConfig
from minipersona.training.distributed import join_process_group
from minipersona.training.interruption import Stop, handle_signals


def report(options: argparse.Namespace) -> None:
    """``study.py report DIR``."""
    if options.report[0] != "report" or len(options.report) != 2 or options.config:
        raise UserError(f"{' '.join(options.report)}: write study.py report DIR, or study.py --config C")
    directory = Path(options.report[1])
    write_report(directory)
    print(directory / "report.html")


def study(options: argparse.Namespace) -> None:
    """``study.py --config C``."""
    if not options.config:
        raise UserError("--config is missing; name a study such as configs/tiny_study.toml, or write report DIR")
    config = override(load_config(options.config, StudyConfig), options.set)
    if options.out is not None:
        config = override(config, [f"out={options.out}"])
    config = replace(config, exhaustive=config.exhaustive or options.exhaustive)
    stages, share = parse_stages(options.phases), parse_share(options.cell)
    if options.plan:
        from minipersona.study.plan import study_plan

        print(study_plan(config, stages), end="")
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("study.py is not started by torchrun: a cell is one process; use --gpus all")
    if options.gpus and options.cell:
        raise UserError("--gpus starts the runners of this machine, --cell is one of many; give one of the two")
    console, stop = Console(), Stop()
    try:
        with handle_signals(stop), stop.at_once():  # all but training steps: a job that is left gives its claim back
            if options.gpus:
                on_gpus(options, gpu_ids(options.gpus))
                return
            distributed = join_process_group(config.execution.device, stop=stop)
            verdict = run_study(config, distributed, console, stages=stages, share=share)
            write_report(Path(config.out))
    except Interrupted as interrupted:
        console.say(f"{interrupted}; the same command continues")
        raise
    print(f"{verdict['verdict']}: {printable(verdict['sentence'])}\n{Path(config.out) / 'report.html'}")


def parse_stages(text: str) -> list[str]:
    """``"1,2"`` -> ["1", "2"]; empty is all five."""
    wanted = [part.strip() for part in text.split(",")] if text else list(STAGES)
    for part in wanted:
        if part not in STAGES:
            raise UserError(f"--phases {text}: {part!r} is none of {', '.join(STAGES)}")
    return wanted


def parse_share(text: str) -> tuple[int, int]:
    """``"3/8"`` -> (3, 8): runner 3 of 8, counted from 1."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--cell {text}: write K/N with K from 1 to N, such as 3/8")
    return int(match[1]), int(match[2])


# ---------------------------------------------------------------- several GPUs


def gpu_ids(wanted: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be for each runner: of the GPUs that this process may use, all or those named."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    if not count:
        raise UserError("--gpus: this machine has no GPU that torch can use; leave the option out")
    if wanted == "all":
        return ids
    chosen = [part.strip() for part in wanted.split(",")]
    for part in chosen:
        if not part.isdigit() or int(part) >= count:
            raise UserError(f"--gpus {wanted}: {part!r} is none of 0 to {count - 1}; write all, or numbers such as 0,1")
    return [ids[int(part)] for part in dict.fromkeys(chosen)]


def on_gpus(options: argparse.Namespace, gpus: Sequence[str]) -> None:
    """Start a runner on each GPU, pass on what they say, and wait for them.

    UserError where one failed, Interrupted where one was asked to stop.
    """
    arguments = ["--config", options.config, "--phases", options.phases]
    arguments += ["--out", options.out] if options.out is not None else []
    arguments += ["--exhaustive"] if options.exhaustive else []
    arguments += ["--debug"] if options.debug else []
    for setting in options.set:
        arguments += ["--set", setting]
    runners = run_each(arguments, [(gpu, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus])
    failed = [gpu for gpu, code in zip(gpus, runners, strict=True) if code not in (0, os.EX_TEMPFAIL)]
    if failed:
        raise UserError(f"the runner on GPU {failed[0]} failed, as it says above; the same command continues the study")
    if any(runners):
        raise Interrupted("a runner was stopped")


def run_each(arguments: Sequence[str], environments: Sequence[tuple[str, dict[str, str]]]) -> list[int]:
    """One runner a (label, environment variables); their exit codes. What they say is printed behind their labels."""
    command = [sys.executable, "-m", "minipersona", "study", *arguments]
    path = os.pathsep.join([str(PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(
        os.pathsep
    )
    processes, readers = [], []
    try:
        for number, (label, variables) in enumerate(environments, 1):
            process = subprocess.Popen(
                [*command, "--cell", f"{number}/{len(environments)}"],
                env={**os.environ, "PYTHONPATH": path, **variables},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL if number > 1 else None,  # they all come to the same verdict
                text=True,
            )
            reader = threading.Thread(target=_pass_on, args=(process, label))
            reader.start()
            processes.append(process)
            readers.append(reader)
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for reader in readers:
            reader.join()


def _pass_on(process: subprocess.Popen[str], label: str) -> None:
    assert process.stderr is not None
    console = Console()  # which goes on reading where nothing can be said: a pipe that is full would stop the runner
    for line in process.stderr:
        console.say(f"[{label}] {line.rstrip()}")
