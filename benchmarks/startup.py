"""What comes before the first step: importing, loading the weights from disk, compiling.

    python -m benchmarks.startup [--directory DIR] [--steps 8] [--out FILE]

The model is written to DIR once (15 GB for the 7B; its pages then lie in memory, as those of a model in use do). Then
two processes train a few steps, the first with an empty compile cache, the second with what the first has left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import documents, options, report, table
from benchmarks.sft import BATCH, ours
from minipersona.model.acceleration.compiler import compile_blocks
from minipersona.model.load import load_model
from minipersona.model.save import save_model

OPTIONS = {"steps": 8, "directory": "", "worker": "", "began": 0.0}
SHOWN = {"import": "importing", "load": "loading from disk", "compile": "first step beyond a later one"}


def write(name: str, directory: Path) -> None:
    """The model in Hugging Face's layout, unless it is there."""
    if not (directory / "config.json").is_file():
        save_model(load_model(name, device="cuda", dtype=torch.bfloat16), directory)


def measure(directory: Path, steps: int, began: float) -> dict[str, float]:
    """Seconds of this process, which began at that time and has imported everything."""
    started = time.time()
    model = load_model(str(directory), device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    loaded = time.time()
    compile_blocks(model)
    trained = ours(model, documents(steps * BATCH, model.config.vocab_size), steps, True)
    compiling = trained["first_step"] - trained["median_step"]
    return {"import": started - began, "load": loaded - started, "compile": compiling}


def start(worker: str, given: Any, directory: Path, cache: Path) -> str:
    """What a process of its own prints: the device is free before it and after."""
    command = [sys.executable, "-m", "benchmarks.startup", "--worker", worker, "--directory", str(directory), "--model",
               given.model, "--steps", str(given.steps), "--began", str(time.time())]  # fmt: skip
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure both processes and print the table."""
    given = options(__doc__, OPTIONS)
    if given.worker == "write":
        write(given.model, Path(given.directory))
    elif given.worker == "measure":
        print(json.dumps(measure(Path(given.directory), given.steps, given.began)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            directory, cache = Path(given.directory or scratch) / "model", Path(scratch) / "cache"
            start("write", given, directory, cache)
            found = {
                name: json.loads(start("measure", given, directory, cache).splitlines()[-1])
                for name in ("empty", "of an earlier process")
            }
        rows = [[what, *(f"{figures[key]:.1f}" for figures in found.values())] for key, what in SHOWN.items()]
        report("startup", table(["seconds, compile cache", *found], rows), found, given.out)


if __name__ == "__main__":
    main()
