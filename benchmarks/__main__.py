"""The four tables of one GPU in one sitting, with one model of ours and one of transformers':

    python -m benchmarks [--tokenizer DIR] [--personas F] [--questions F] [--parts objectives,extract] [--out FILE]

The model is loaded and compiled once. A part alone: `python -m benchmarks.sft`, `.objectives`, `.extract`, `.generate`.
A part that fails is named at the end, and the others are made all the same.
"""

from __future__ import annotations

import sys
import traceback

from benchmarks import extract, generate, objectives, sft
from benchmarks.common import sit

# SFT comes last, since the Liger kernels that it tries there stay with transformers' model.
PARTS = {"objectives": objectives, "extract": extract, "generate": generate, "sft": sft}


def main() -> int:
    """Make the tables; 1 where one of them failed."""
    defaults = {name: default for part in PARTS.values() for name, default in part.OPTIONS.items()}
    sitting = sit(__doc__, {**defaults, "parts": ",".join(PARTS)})
    failed = []
    for name in sitting.given.parts.split(","):
        try:
            PARTS[name].run(sitting)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
