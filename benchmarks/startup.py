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

OPTIONS = {"steps": 8, "directory": "", "worker": "", "began": 0.0}
SHOWN = {"import": "importing", "load": "loading from disk", "compile": "first step beyond a later one",
         "ready": "from the start of the process to the second step"}  # fmt: skip


def worker(given: Any, imported: float) -> None:
    """One process: when it had imported, loaded, and made its first step, in seconds."""
    import torch

    from benchmarks.common import documents
    from benchmarks.sft import BATCH, ours
    from minipersona.model.load import load_model

    started = time.time()
    model = load_model(given.worker, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    loaded = time.time()
    model.compile_blocks()
    trained = ours(model, documents(given.steps * BATCH, model.config.vocab_size), given.steps, True)
    found = {
        "import": imported - given.began,
        "load": loaded - started,
        "compile": trained["first_step"] - trained["median_step"],
        "ready": loaded - given.began + trained["first_step"],
    }
    print(json.dumps(found))


def write_model(name: str, directory: Path) -> None:
    """Random weights in Hugging Face's layout, unless they are there."""
    import torch

    from minipersona.model.load import load_model
    from minipersona.model.save import save_model

    if not (directory / "config.json").is_file():
        save_model(load_model(name, device="cuda", dtype=torch.bfloat16), directory)


def main() -> None:
    """Measure both processes and print the table."""
    from benchmarks.common import options, report, table

    given = options(__doc__, OPTIONS)
    if given.worker:
        worker(given, time.time())
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(given.directory or scratch) / "model"
        # In a process of its own, so that the device is free afterwards.
        code = f"from benchmarks.startup import *; write_model({given.model!r}, Path({str(directory)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        found = {}
        for cache in ("empty", "of an earlier process"):
            command = [sys.executable, "-m", "benchmarks.startup", "--worker", str(directory), "--steps",
                       str(given.steps), "--began", str(time.time())]  # fmt: skip
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache"}
            said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[cache] = json.loads(said.splitlines()[-1])
    rows = [[what, *(f"{found[cache][key]:.1f}" for cache in found)] for key, what in SHOWN.items()]
    report("startup", table(["seconds, compile cache", *found], rows), found, given.out)


if __name__ == "__main__":
    main()
