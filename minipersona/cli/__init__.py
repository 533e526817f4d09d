"""The commands: parse, call, print. `minipersona train` and `python train.py` are the same.

The commands import torch, the parser does not: `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from minipersona import __version__
from minipersona.cli.evaluate import evaluate_options
from minipersona.cli.extract import extract_options
from minipersona.cli.options import command
from minipersona.cli.train import train_options
from minipersona.console import Parser, answer, dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 2 after one line ``error: ...`` on stderr, or 75 where it was asked to stop (`answer`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    set_torch_variables()
    return answer(lambda: dispatch(_parser(), argv), debug="--debug" in argv)


def set_torch_variables() -> None:
    """The environment variables that torch reads when it is imported, where the user has not set them."""
    # torch's idle threads spin by default, which beside another busy process makes two threads slower than one (64 s
    # against 19 s for a small run on two cores); sleeping costs little.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Packs differ in length, so that cached blocks of a fixed size soon fit no request; expandable segments grow.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "RANK" in os.environ:  # when a rank is lost, gloo would log a stack of C++ frames on each of the others
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minipersona", description="Does a fine-tuning recipe leave persona geometry alone?")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="{train,extract,evaluate,study}")
    train_options(commands)
    extract_options(commands)
    evaluate_options(commands)
    _study_options(commands)
    return parser


def _study_options(commands: Any) -> None:
    parser = command(
        commands,
        "study",
        "Run the whole search, or continue it, and write its verdict and report; or write a study's report anew.",
        "  python study.py --config configs/tiny_study.toml --exhaustive\n"
        "  python study.py --config configs/study.toml --gpus all\n"
        "  python study.py report studies/study",
    )
    option = parser.add_argument
    option("report", nargs="*", metavar="report DIR", help="write the report of the study in DIR from what it holds")
    option("--config", metavar="C", help="a TOML file, or the name of a shipped config")
    option("--out", metavar="DIR", help="the study's directory, in place of the config's")
    option("--set", action="append", default=[], metavar="section.key=value", help="change one setting; repeatable")
    option("--exhaustive", action="store_true", help="run every phase, also after a recipe has passed")
    option("--phases", default="", metavar="1,2", help="only these of 1 to 6, whatever passes, and the baseline")
    option("--plan", action="store_true", help="print every recipe and what the study will take, and do nothing")
    option("--gpus", default="", metavar="all|0,1", help="a process on each of these GPUs; 0,0 puts two on one")
    option("--workers", type=int, metavar="N", help="so many processes on this machine's CPU cores")
    option("--ray", default="", metavar="ADDRESS", help="the devices of a Ray cluster, such as auto (docs/cluster.md)")
    parser.set_defaults(command=_study)


def _study(options: argparse.Namespace) -> None:
    from minipersona.cli.study import report, study

    if options.report:
        report(options)
    else:
        study(options)
