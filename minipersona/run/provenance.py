"""What made a run, as far as it can be known: versions, commit, digests, hardware. Never an environment variable."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from minipersona import __version__
from minipersona.config import RunConfig
from minipersona.corpus.training_set import TrainingSet
from minipersona.files import PACKAGE, digest, sha256
from minipersona.model.network import Qwen2
from minipersona.run.measurement import Instruments
from minipersona.settings import to_toml


def provenance(
    config: RunConfig, model: Qwen2, instruments: Instruments, training: TrainingSet, processes: int
) -> dict[str, Any]:
    """The content of provenance.json. Its `protocol` is what every measurement of the run is made with."""
    heldout = [] if instruments.heldout_rows is None else [instruments.heldout_rows.identity()]
    device = model.device
    on_cuda = device.type == "cuda"
    return {
        "protocol": instruments.protocol(model),
        "minipersona": __version__,
        "code_digest": code_digest(),
        "commit": _commit(),
        "config_digest": digest(to_toml(config)),
        "model": {**model.source, "compute_dtype": str(model.compute_dtype).removeprefix("torch.")},
        "data": [*training.sources, *heldout],
        "mixture": training.mixture,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")},
        },
        "hardware": {
            "machine": platform.machine(),
            "cuda_device": torch.cuda.get_device_name(device) if on_cuda else None,
            "cuda": torch.version.cuda,
            "processes": processes,
            "threads": torch.get_num_threads(),
        },
    }


def code_digest() -> str:
    """One SHA-256 over the package's source files, which also covers changes that are not committed."""
    return sha256(*sorted(PACKAGE.rglob("*.py")))


def _commit() -> str | None:
    git = ["git", "-C", str(PACKAGE)]
    try:
        # Installed below somebody's repository, the package is not in it, and that commit says nothing.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True, timeout=5)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5)
        return head.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or no git
