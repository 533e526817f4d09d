"""Starts two ranks on the CPU that run a script each: by torchrun, or forked from a server."""

from __future__ import annotations

import os
import re
import runpy
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.run
from forking import FORKING

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the commands set it

# What scripts train on.
DOCUMENTS = """
rng = np.random.default_rng(0)
documents = [
    Document(rng.integers(0, 160, n).astype(np.int32), np.arange(n) >= (n + 1) // 2, False)
    for n in rng.integers(3, 25, 48)
]
"""

# What every script begins with: a small model's training as one of two ranks, and the command around it.
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
from minipersona.training import loop
from minipersona.training.distributed import fail_rank, process_group
from minipersona.training.interruption import Stop, handle_signals
from minipersona.training.loop import Hooks, Trainer, train

torch.set_num_threads(1)
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
        try:
            with handle_signals(stop), process_group("cpu", minutes, stop) as distributed:
                work(distributed)
        except Exception as error:
            fail_rank(error)
    sys.exit(answer(run))
"""
)


def script(text: str, scenario: str, out: Path, model: Path | str = "-", minutes: float = 5.0) -> list[str]:
    """Write a script, after the preamble, and return its command line without the interpreter."""
    out.mkdir(exist_ok=True)
    file = out / "worker.py"
    file.write_text(PREAMBLE + text)
    return [str(file), scenario, str(out), str(model), str(minutes)]


# ---------------------------------------------------------------- by torchrun


@dataclass(frozen=True)
class Launch:
    """How a command ended that torchrun started."""

    code: int
    said: str  # on stderr, by torchrun and by the ranks
    seconds: float  # from the fault to the end; from the start where there was no fault

    @property
    def errors(self) -> list[str]:
        """The lines that ranks reported."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    @property
    def culprit(self) -> tuple[int, int]:
        """(rank, exit status) of the rank that torchrun saw end first."""
        found = re.search(r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+)", self.said, re.DOTALL)
        assert found is not None, self.said
        return int(found[1]), int(found[2])


def torchrun(command: Sequence[str], fault: Path, variables: Mapping[str, str] | None = None) -> Launch:
    """Start two ranks of a Python script. `fault` is the file that they touch when something goes wrong."""
    started = time.time()
    with tempfile.NamedTemporaryFile() as said:
        launcher = FORKING.Process(target=_launch, args=(command, said.name, {**QUIET, **(variables or {})}))
        launcher.start()
        launcher.join(180)
        ended = time.time()
        assert launcher.exitcode is not None, "torchrun hangs"
        words = Path(said.name).read_text()
    return Launch(launcher.exitcode, words, ended - (fault.stat().st_mtime if fault.exists() else started))


def _launch(command: Sequence[str], said: str, variables: Mapping[str, str]) -> None:
    """As ``python -m torch.distributed.run``; `test_survival.py` starts that."""
    os.environ.update(variables)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)  # for its ranks too
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", *command])


# ---------------------------------------------------------------- forked from a server


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    code: int
    said: str  # on stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def forked_ranks(text: str, out: Path, arguments: Sequence[str], ranks: int) -> list[End]:
    """Run a script as so many ranks, without importing torch for each, and wait for them.

    Each one's status and words are told, which torchrun does not tell.
    """
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= QUIET
    processes = []
    for rank in range(ranks):
        script, said = out / f"rank-{rank}.py", out / f"rank-{rank}.stderr"
        said.touch()
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        begin = f"""
import os, sys
os.environ.update({variables!r})
os.dup2(os.open({str(said)!r}, os.O_WRONLY | os.O_TRUNC), 2)
sys.argv = {[str(script), *arguments]!r}
"""
        script.write_text(begin + text)
        processes.append((FORKING.Process(target=runpy.run_path, args=(str(script), None, "__main__")), said))
    try:
        for process, _ in processes:
            process.start()
        for process, _ in processes:
            process.join(120)
            assert process.exitcode is not None, "a rank hangs"
        return [End(process.exitcode or 0, said.read_text()) for process, said in processes]
    finally:
        for process, _ in processes:
            process.kill()
            process.join()


def two_ranks(text: str, scenario: str, out: Path, model: Path | str = "-") -> list[End]:
    """The same of a script after the preamble, as ranks 0 and 1."""
    out.mkdir(exist_ok=True)
    return forked_ranks(PREAMBLE + text, out, [scenario, str(out), str(model), "5.0"], 2)
