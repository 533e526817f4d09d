"""Make the embedded model and its sets anew:  python -m minipersona.tiny [--out DIR] [--steps N] [--seed N]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minipersona.console import Console, Parser, answer
from minipersona.files import data_dir
from minipersona.model.load import default_device
from minipersona.tiny.build import SEED, STEPS, build
from minipersona.training.loop import Hooks


def main() -> int:
    """Build it; 0, or 2 after a line ``error: ...``."""
    return answer(_build)


def _build() -> None:
    parser = Parser(prog="python -m minipersona.tiny", description="Make the embedded model anew.")
    parser.add_argument("--out", type=Path, default=data_dir() / "tiny", metavar="DIR", help="default: data/tiny")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"training steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help=f"of the base chats (default {SEED})")
    options = parser.parse_args()
    with Console().progress("training", options.steps, "steps") as progress:

        def logged(row: dict[str, Any]) -> None:
            progress.advance(row["step"], f"loss {row['loss']:.3f}")

        build(options.out, options.steps, options.seed, default_device(), Hooks(logged=logged))


if __name__ == "__main__":
    sys.exit(main())
