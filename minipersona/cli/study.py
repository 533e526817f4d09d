"""The `study` command: a search in this process, in one process a device, or on a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from minipersona.cli.options import refuse
from minipersona.console import Console, printable
from minipersona.errors import Interrupted, UserError
from minipersona.report import write_report
from minipersona.settings import load_config, override
from minipersona.study.executors import Executor, InProcess, Processes
from minipersona.study.search import run_study
from minipersona.study_config import BEYOND, STAGES, StudyConfig
from minipersona.training.distributed import join_process_group
from minipersona.training.interruption import Stop, handle_signals

OF_A_SEARCH = ("--config", "--out", "--set", "--exhaustive", "--phases", "--plan", "--gpus", "--workers", "--ray")


def report(options: argparse.Namespace) -> None:
    """``study.py report DIR``."""
    if options.report[0] != "report" or len(options.report) != 2:
        raise UserError(f"{' '.join(options.report)}: write study.py report DIR, or study.py --config C")
    refuse(options, OF_A_SEARCH, "has no effect on report, which reads what DIR holds; leave it out")
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
    stages = parse_stages(options.phases)
    named_all = bool(options.phases) and set(stages) >= set(STAGES) - {BEYOND}
    config = replace(config, exhaustive=config.exhaustive or options.exhaustive or named_all)
    if options.plan:
        from minipersona.study.plan import study_plan

        refuse(options, ("--ray",), "has no effect on --plan, which does not ask the cluster; leave it out")
        devices = gpus(options.gpus) if options.gpus else ["cpu"] * (options.workers or 0)
        print(study_plan(config, stages, devices), end="")
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("study.py is not started by torchrun: a cell is one process; use --gpus all")
    console, stop = Console(), Stop()
    executor = make_executor(options, config.execution.device, console, stop)
    try:
        # A signal ends all but training steps at once: what a job leaves is taken up again.
        with handle_signals(stop), contextlib.closing(executor), stop.at_once():
            verdict = run_study(config, executor, console, stages=stages, report=write_report)
    except Interrupted as interrupted:
        console.say(f"{interrupted}; the same command continues")
        raise
    print(f"{verdict.verdict}: {printable(verdict.sentence)}\n{Path(config.out) / 'report.html'}")


def parse_stages(text: str) -> list[str]:
    """``"1,2"`` -> ["1", "2"]; empty is all of them."""
    wanted = [part.strip() for part in text.split(",")] if text else list(STAGES)
    for part in wanted:
        if part not in STAGES:
            raise UserError(f"--phases {text}: {part!r} is none of {', '.join(STAGES)}")
    return wanted


# ---------------------------------------------------------------- where it runs


def make_executor(options: argparse.Namespace, device: str, console: Console, stop: Stop) -> Executor:
    """What --gpus, --workers or --ray ask for; without any of them this process, on the config's device."""
    given = {f"--{name}": value for name in ("gpus", "workers", "ray") if (value := getattr(options, name))}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say where a study runs; give one of them")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if options.gpus:
        return Processes(gpus(options.gpus), console)
    if options.workers:
        return Processes(["cpu"] * options.workers, console, threads=threads_each(options.workers))
    if options.ray:
        try:
            from minipersona.study.ray_executor import RayExecutor
        except ModuleNotFoundError:
            raise UserError("--ray: Ray is not installed; run pip install 'minipersona[cluster]'") from None
        return RayExecutor(options.ray, device, console)
    return InProcess(join_process_group(device, stop=stop), console)


def gpus(wanted: str) -> list[str]:
    """``"0,1"`` -> ["cuda:0", "cuda:1"], of the GPUs that this process may use; "all" is each of them.

    A GPU that is named twice gets two processes.
    """
    count = torch.cuda.device_count()
    if not count:
        raise UserError("--gpus: this machine has no GPU that torch can use; leave the option out")
    chosen = list(map(str, range(count))) if wanted == "all" else [part.strip() for part in wanted.split(",")]
    for part in chosen:
        if not part.isdecimal() or int(part) >= count:
            raise UserError(f"--gpus {wanted}: {part!r} is none of 0 to {count - 1}; write all, or numbers such as 0,1")
    return [f"cuda:{int(part)}" for part in chosen]


def threads_each(workers: int) -> int:
    """Threads of torch in each of so many processes, out of those that it takes alone: one a core unless it is told."""
    return max(1, torch.get_num_threads() // workers)
