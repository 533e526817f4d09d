"""Weights from a directory, the hub, or a seed, straight into their place.

Each tensor is read, checked against the architecture, cast and put on its device before the next one is touched: the
most that exists beside the model is one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minipersona.config import DEFAULT_MODEL
from minipersona.errors import UserError
from minipersona.files import digest, sampled_sha256
from minipersona.hub import locate, resolved_revision
from minipersona.model.config import ModelConfig
from minipersona.model.config_file import read_config, read_generation
from minipersona.model.network import Qwen2
from minipersona.model.sizes import known_config
from minipersona.model.weights import INDEX, SINGLE, expected_shapes, read_weights, shard_names

RANDOM = "random:"
GENERATION = "generation_config.json"


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name_or_path: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> Qwen2:
    """A model with its weights, in evaluation form (nothing requires a gradient); `Qwen2` says which families.

    name_or_path  a directory in Hugging Face layout, a hub id, ``tiny``, or ``random:<hub id or directory>``
    dtype         of weights and stream; default bfloat16 on CUDA, else float32
    device        default CUDA where there is one

    UserError where a file is missing or damaged, config.json states what the network does not do or contradicts itself
    or the weights, or a tensor is missing, unknown, misshapen or not finite.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config, directory = _architecture(name_or_path, revision)
    # On the meta device a network has shapes and no memory.
    with torch.device("meta"):
        model = Qwen2(config, compute_dtype=dtype)
    commit = None if directory is None else resolved_revision(directory) or revision
    model.source = {"name": name_or_path, "revision": commit}
    model.generation = {} if directory is None else read_generation(directory / GENERATION)
    for name, tensor in stream_weights(model, device):
        _assign(model, name, tensor.to(device=device, dtype=dtype))
    if directory is not None and commit is None:  # a name says nothing of what a directory holds
        files = [file for file in sorted(directory.glob("*.safetensors")) if file.is_file()]
        model.source["weights"] = digest(list(map(sampled_sha256, files)))
    model.tie_head()
    return model.requires_grad_(False)


def stream_weights(model: Qwen2, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights that a model was loaded from, (name, tensor) one at a time, as stored."""
    device = device or model.device
    _, directory = _architecture(str(model.source["name"]), model.source["revision"])
    if directory is None:
        return _random_weights(expected_shapes(model), device)
    return read_weights(directory, model, device)


def architecture(name_or_path: str, revision: str | None = None) -> ModelConfig:
    """The sizes of a model, without its weights."""
    return _architecture(name_or_path, revision, weights=False)[0]


def architecture_offline(name_or_path: str, revision: str | None = None) -> ModelConfig:
    """`architecture`; that of a published model whose sizes are known without a network."""
    return known_config(name_or_path) or architecture(name_or_path, revision)


def _architecture(name: str, revision: str | None, weights: bool = True) -> tuple[ModelConfig, Path | None]:
    """The model's sizes, and the directory of its weights (None for random ones)."""
    if name.startswith(RANDOM):
        inner = name.removeprefix(RANDOM)
        known = known_config(inner)
        if known is not None:
            return known, None
        return read_config(locate(inner, ["config.json"], revision=revision) / "config.json"), None
    directory = locate(
        name, ["config.json", GENERATION, INDEX, SINGLE] if weights else ["config.json"], revision=revision
    )
    if not (directory / "config.json").is_file():
        raise UserError(f"{name}: holds no config.json; give a directory in Hugging Face layout or a hub id")
    config = read_config(directory / "config.json")
    if weights and (directory / INDEX).is_file():  # the shards are named by the index, so they come second
        # From the same commit, should a branch have moved in between.
        commit = resolved_revision(directory) or revision
        directory = locate(name, ["config.json", GENERATION, INDEX, *shard_names(directory / INDEX)], revision=commit)
    return config, directory


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _random_weights(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Seeded weights with the statistics of an untrained network: N(0, 0.02), norms 1. Drawn on `device`."""
    generator = torch.Generator(device).manual_seed(42)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, device=device)
        else:
            yield name, torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator)
