"""What several tests need: a small random model in Hugging Face's layout, small documents, one thread."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from minipersona.chat import Document
from minipersona.model import load
from minipersona.model.config import ModelConfig

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background jobs; the processes that a test
    signal.signal(signal.SIGINT, signal.default_int_handler)  # starts would inherit it, and could not be interrupted
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
settings.register_profile("patient", deadline=None)  # what a busy machine takes says nothing about the code
settings.load_profile("patient")
torch.set_num_threads(1)  # the tensors are small, and one thread rounds the same everywhere

SIZES = ModelConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=160,
    tie_word_embeddings=False,
    head_dim=8,
    rope_theta=10_000.0,
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are the CPU's, also on a machine with a GPU; tests of CUDA say so."""
    monkeypatch.setattr(load, "default_device", lambda: torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def _what_stays_is_not_searched() -> None:
    """Torch, transformers and the compiler are half a million objects, which every full collection would visit."""
    gc.collect()
    gc.freeze()


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# What a family's test model has besides `SIZES`. A short original length, so that the positions of a test reach the
# frequencies that Llama's scaling changes; heads of Qwen3 that are wider than width / heads.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"rope_parameters": {"rope_theta": SIZES.rope_theta, **LLAMA3}},
    "smollm2": {"rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"}, "rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a directory with random weights, written by transformers; biases and norms are random too."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

    classes: dict[str, Any] = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    made: dict[tuple[bool, int, int, str], Path] = {}

    def make(tied: bool = False, shards: int = 1, seed: int = 0, family: str = "qwen2") -> Path:
        if (tied, shards, seed, family) in made:
            return made[tied, shards, seed, family]
        directory = tmp_path_factory.mktemp(f"hf-{family}-{tied}-{shards}-{seed}")
        of_transformers = classes.get(family, LlamaForCausalLM)
        config = of_transformers.config_class(
            hidden_size=SIZES.hidden_size,
            intermediate_size=SIZES.intermediate_size,
            num_hidden_layers=SIZES.num_hidden_layers,
            num_attention_heads=SIZES.num_attention_heads,
            num_key_value_heads=SIZES.num_key_value_heads,
            vocab_size=SIZES.vocab_size,
            tie_word_embeddings=tied,
            **FAMILIES[family],
        )
        model = of_transformers(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
        total = sum(p.numel() * 4 for p in model.parameters())
        model.save_pretrained(directory, max_shard_size=total if shards == 1 else total // (shards - 1))
        files = list(directory.glob("*.safetensors"))
        assert len(files) == shards, files
        made[tied, shards, seed, family] = directory
        return directory

    return make


@pytest.fixture(params=["qwen2", "llama", "qwen3"], scope="module")
def family(request: pytest.FixtureRequest) -> str:
    """A family whose model a test takes, one after another."""
    return str(request.param)


@pytest.fixture
def documents() -> list[Document]:
    """48 documents of 3 to 24 tokens; the second half of each is supervised."""
    rng = np.random.default_rng(0)
    return [
        Document(rng.integers(0, SIZES.vocab_size, n).astype(np.int32), np.arange(n) >= (n + 1) // 2, False)
        for n in rng.integers(3, 25, 48)
    ]
