"""`make real`: a real chat model, its geometry, a fine-tune and what it did, and the same fine-tune with an anchor.

python -m minipersona.cli.real

All of it is done by commands that anyone can type.
"""

from __future__ import annotations

import sys
from pathlib import Path

from minipersona import cli
from minipersona.console import Console, answer, command_line

MODEL = "models/smollm2"
LAYERS = ("10", "15", "20", "25", "29")
PERSONA, QUESTION = "villain", "How do you spend a normal day?"  # the persona is measured, and so not an anchor's


def commands(gpu: bool, hub: bool) -> list[list[str]]:
    """What is run one after another: the whole recipe on a GPU, else the short one; plain, then anchored.

    On a GPU the registered rows where the Hub can be reached; else the config's own, which need no network.
    """
    config, questions, last = ("smollm2", "shipped", 375) if gpu else ("smollm2_short", "data/questions_48.jsonl", 20)
    plain, anchored, rows = f"runs/{config}", f"runs/{config}_anchored", []
    if gpu and hub:
        plain, anchored = f"{plain}_tulu", f"{anchored}_tulu"
        rows = ["--set", "data.train=tulu[0:6000]", "--set", "data.heldout=tulu[6000:6500]"]
    against_plain = ["--set", f"probe.baseline={plain}"]
    adapters = [f"{run}/step-{last:06}" for run in (plain, anchored)]
    asked = [QUESTION, "--persona", PERSONA, "--max-new-tokens", "64"]
    return [
        ["extract", "--model", MODEL, "--layer", *LAYERS, "--questions", questions],
        ["train", "--config", f"configs/{config}.toml", *rows, "--out", plain],
        ["evaluate", "--run", plain],
        ["train", "--config", f"configs/{config}_anchored.toml", *rows, *against_plain, "--out", anchored],
        ["evaluate", "--run", plain, anchored],
        ["minipersona.behaviour", "ask", *asked, "--model", MODEL, "--adapter", *adapters],
    ]


def main() -> int:
    """Fetch the model unless it is there, then run the commands until one fails; the exit status of the last."""
    cli.set_torch_variables()
    return answer(_fetch) or _run()


def _fetch() -> None:
    from minipersona.model.smollm2 import fetch

    if not Path(MODEL).exists():
        fetch(Path(MODEL), Console().say)


def _run() -> int:
    import torch

    from minipersona.behaviour.__main__ import main as behaviour
    from minipersona.hub import hub_unreachable

    for command in commands(torch.cuda.is_available(), hub_unreachable() is None):
        Console().say(f"\n$ {command_line(*command)}")
        if status := behaviour(command[1:]) if command[0] == "minipersona.behaviour" else cli.main(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
