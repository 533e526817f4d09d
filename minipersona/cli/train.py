"""The `train` command."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any

from minipersona.cli.options import command
from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.errors import Interrupted
from minipersona.settings import load_config, override


def train_options(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "train",
        "Fine-tune a model by one recipe, measuring it at the checkpoint steps. The same command continues a run.",
        "  python train.py --config configs/tiny_phase1.toml\n"
        "  torchrun --nproc-per-node 2 train.py --config configs/phase1.toml --set training.learning_rate=1e-5",
    )
    option = parser.add_argument
    option("--config", required=True, metavar="C", help="a TOML file, or the name of a shipped config")
    option("--model", metavar="M", help="directory, hub id, tiny or random:<hub id>; in place of the config's")
    option("--out", metavar="DIR", help="the run's directory, in place of the config's")
    option("--set", action="append", default=[], metavar="section.key=value", help="change one setting; repeatable")
    option("--plan", action="store_true", help="print the resolved config and what the run will need, and do nothing")
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    try:
        _train_as_rank(options)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from minipersona.training.distributed import fail_rank

            fail_rank(error)
        raise


def _train_as_rank(options: argparse.Namespace) -> None:
    config = override(load_config(options.config, RunConfig), options.set)
    if options.model is not None:
        config = replace(config, model=replace(config.model, name=options.model, revision=""))
    if options.out is not None:
        config = override(config, [f"out={options.out}"])

    if options.plan:
        from minipersona.run.plan import plan

        print(plan(config), end="")
        return

    from minipersona.run.train import run
    from minipersona.training.distributed import end_rank, process_group
    from minipersona.training.interruption import Stop, handle_signals

    stop, execution = Stop(), config.execution
    with handle_signals(stop), process_group(execution.device, execution.timeout_minutes, stop) as distributed:
        console = Console(quiet=not distributed.first)
        try:
            run(config, distributed, console)
        except Interrupted as interrupted:
            console.say(f"{interrupted}; the same command continues")
            raise
    if distributed.size > 1:
        end_rank()
