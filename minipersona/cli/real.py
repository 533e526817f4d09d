"""`make real`: a real chat model, its geometry, a fine-tune and what it did, by commands that anyone can type.

python -m minipersona.cli.real
"""

from __future__ import annotations

import sys
from pathlib import Path

from minipersona import cli
from minipersona.console import Console, answer, command_line

MODEL = "models/smollm2"
LAYERS = ("10", "15", "20", "25", "29")


def commands(gpu: bool, hub: bool) -> list[list[str]]:
    """What is run one after another: the whole recipe on a GPU, else the short one.

    The registered rows where the Hub can be reached, else the config's own, which need no network.
    """
    config, questions = ("smollm2", "shipped") if gpu else ("smollm2_short", "data/questions_48.jsonl")
    train, heldout = ("tulu[0:6000]", "tulu[6000:6500]") if gpu else ("tulu[0:320]", "tulu[6000:6064]")
    rows = ["--set", f"data.train={train}", "--set", f"data.heldout={heldout}"] if hub else []
    out = f"runs/{config}_tulu" if hub else f"runs/{config}"
    return [
        ["extract", "--model", MODEL, "--layer", *LAYERS, "--questions", questions],
        ["train", "--config", f"configs/{config}.toml", *rows, "--out", out],
        ["evaluate", "--run", out],
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

    from minipersona.hub import hub_unreachable

    for command in commands(torch.cuda.is_available(), hub_unreachable() is None):
        Console().say(f"\n$ {command_line(*command)}")
        if status := cli.main(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
