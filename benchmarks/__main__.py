"""The four tables of one GPU in one sitting, with one model of ours and one of transformers':

    python -m benchmarks [--tokenizer DIR] [--personas F] [--questions F] [--out FILE]

The model is loaded and compiled once. A part alone: `python -m benchmarks.sft`, `.objectives`, `.extract`, `.generate`.
"""

from __future__ import annotations

from benchmarks import extract, generate, objectives, sft
from benchmarks.common import sit


def main() -> None:
    """Make the tables. SFT comes last, since the Liger kernels that it tries there stay with transformers' model."""
    parts = (objectives, extract, generate, sft)
    sitting = sit(__doc__, {name: default for part in parts for name, default in part.OPTIONS.items()})
    for part in parts:
        part.run(sitting)


if __name__ == "__main__":
    main()
