"""Starts two ranks on the CPU, as a launcher would, that run a script each; and collects how they ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent

# What scripts train on.
DOCUMENTS = """
rng = np.random.default_rng(0)
documents = [
    Document(rng.integers(0, 160, n).astype(np.int32), np.arange(n) >= (n + 1) // 2, False)
    for n in rng.integers(3, 25, 48)
]
"""

# What every script begins with: a small model's training in a world of two, and the command around it.
PREAMBLE = (
    """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.console import answer
from minipersona.errors import Interrupted, UserError
from minipersona.model.load import load_model
from minipersona.training import loop, watch
from minipersona.training.interruption import Stop, heed_signals
from minipersona.training.loop import Hooks, train
from minipersona.training.world import in_world

torch.set_num_threads(1)
watch.BEAT, watch.BROKEN_SILENCE, watch.LINGER = 0.1, 1.0, 1.0
scenario, out, model_dir, minutes = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
stop, rank = Stop(), int(os.environ["RANK"])
"""
    + DOCUMENTS
    + """config = RunConfig(
    data=DataSection("-", "-"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
    training=TrainingSection(steps=8, batch=8, checkpoints=(8,), learning_rate=1e-2),
    execution=ExecutionSection(pack_tokens=60, checkpoint_activations=False),
)

def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

def command(work):
    def run():
        with heed_signals(stop), in_world("cpu", minutes, stop) as world:
            work(world)
    sys.exit(answer(run))
"""
)


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    code: int
    said: str  # on stderr
    seconds: float  # after the start of all ranks


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def two_ranks(script: str, scenario: str, out: Path, model: Path | str = "-", minutes: float = 5.0) -> list[End]:
    """Run a script, after the preamble, as ranks 0 and 1, until both have ended."""
    out.mkdir(exist_ok=True)
    file = out / "worker.py"
    file.write_text(PREAMBLE + script)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the commands set it
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), scenario, str(out), str(model), str(minutes)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends: dict[int, End] = {}
    try:
        while len(ends) < 2:
            for rank, process in enumerate(processes):
                if rank not in ends and process.poll() is not None:
                    assert process.stderr is not None
                    ends[rank] = End(process.returncode, process.stderr.read(), time.monotonic() - started)
            # A rank that hangs is ended once the other has gone, as a launcher does.
            for rank, process in enumerate(processes):
                if rank not in ends and len(ends) == 1 and scenario.startswith("hang"):
                    process.kill()
            assert time.monotonic() - started < 60, "a rank is held up"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [ends[0], ends[1]]
