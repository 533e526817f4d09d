"""Weights from a directory, the hub, or a seed, straight into their place.

Each tensor is read, checked against the architecture, cast and put on its device before the next one is touched: the
most that exists beside the model is one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minipersona.config import DEFAULT_MODEL
from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.hub import locate, resolved_revision
from minipersona.model.config import ModelConfig
from minipersona.model.config_file import read_config
from minipersona.model.network import Qwen2
from minipersona.model.sizes import known_config
from minipersona.model.tensor_file import FLOATS, open_safetensors

RANDOM = "random:"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    """A Qwen2.5 with its weights, in evaluation form (nothing requires a gradient).

    name_or_path  a directory in Hugging Face layout, a hub id, ``tiny``, or ``random:<hub id or directory>``
    dtype         of weights and stream; default bfloat16 on CUDA, else float32
    device        default CUDA where there is one

    UserError where a file is missing or damaged, or a tensor is missing, unknown, misshapen or not finite.
    """
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config, directory = _architecture(name_or_path, revision)
    # On the meta device a network has shapes and no memory.
    with torch.device("meta"):
        model = Qwen2(config, compute_dtype=dtype)
    model.source = {
        "name": name_or_path,
        "revision": None if directory is None else resolved_revision(directory) or revision,
    }
    for name, tensor in stream_weights(model, device):
        _assign(model, name, tensor.to(device=device, dtype=dtype))
    model.tie_head()
    return model.requires_grad_(False)


def stream_weights(model: Qwen2, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights that a model was loaded from, (name, tensor) one at a time, as stored."""
    device = device or model.device
    _, directory = _architecture(str(model.source["name"]), model.source["revision"])
    expected = expected_shapes(model)
    return _random_weights(expected, device) if directory is None else read_weights(directory, expected, device)


def architecture(name_or_path: str, revision: str | None = None) -> ModelConfig:
    """The sizes of a model, without its weights."""
    return _architecture(name_or_path, revision, weights=False)[0]


def _architecture(name: str, revision: str | None, weights: bool = True) -> tuple[ModelConfig, Path | None]:
    """The model's sizes, and the directory of its weights (None for random ones)."""
    if name.startswith(RANDOM):
        inner = name.removeprefix(RANDOM)
        known = known_config(inner)
        if known is not None:
            return known, None
        return read_config(locate(inner, ["config.json"], revision=revision) / "config.json"), None
    directory = locate(name, ["config.json", INDEX, SINGLE] if weights else ["config.json"], revision=revision)
    if not (directory / "config.json").is_file():
        raise UserError(f"{name}: holds no config.json; give a directory in Hugging Face layout or a hub id")
    config = read_config(directory / "config.json")
    if weights and (directory / INDEX).is_file():  # the shards are named by the index, so they come second
        # From the same commit, should a branch have moved in between.
        commit = resolved_revision(directory) or revision
        directory = locate(name, ["config.json", INDEX, *_shards(directory / INDEX)], revision=commit)
    return config, directory


def expected_shapes(model: Qwen2) -> dict[str, tuple[int, ...]]:
    """Every weight a checkpoint must hold, by its Hugging Face name. A tied head is the embedding, stored once."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=True)}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


# ---------------------------------------------------------------- from files


def read_weights(
    directory: Path, expected: dict[str, tuple[int, ...]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield every expected tensor of a checkpoint, one at a time, as stored. All names and shapes are checked first."""
    files = _weight_files(directory)
    where = _contents(files)
    ignored = {"lm_head.weight"} if "lm_head.weight" not in expected else set()  # a tied head that was stored twice
    unknown = sorted(
        name for name in where if name not in expected and name not in ignored and not name.endswith("inv_freq")
    )
    missing = sorted(name for name in expected if name not in where)
    if missing:
        raise UserError(
            f"{directory}: tensor {missing[0]} is missing ({len(missing)} in all); the download is incomplete"
        )
    if unknown:
        raise UserError(f"{directory}: unknown tensor {unknown[0]} ({len(unknown)} in all); not a plain Qwen2.5 model")
    for name, (file, shape) in where.items():
        if name in expected and shape != expected[name]:
            raise UserError(f"{file}: {name} has shape {shape}, config.json asks for {expected[name]}; do they belong?")
    for file in files:
        with open_safetensors(file, device) as handle:
            for name in handle.keys():
                if name not in expected:
                    continue
                tensor = handle.get_tensor(name)
                if not torch.isfinite(tensor.sum(dtype=torch.float32)):
                    raise UserError(f"{file}: {name} holds non-finite values; the file is damaged, fetch it again")
                yield name, tensor


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        files = [directory / shard for shard in _shards(directory / INDEX)]
    elif (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    else:
        raise UserError(f"{directory}: holds neither {SINGLE} nor {INDEX}; {other_formats(directory)}")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: this shard is missing; finish the download or copy it there")
    return files


def other_formats(directory: Path) -> str:
    """What to do about a directory without safetensors files."""
    found = sorted(file.name for file in directory.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if found:
        return f"{found[0]} could run code and is not read: convert it to safetensors where you trust it"
    return "only safetensors weights are read: fetch them, or convert what there is"


def _shards(index: Path) -> list[str]:
    """The shard files that an index names, each once. Names that leave the directory are refused."""
    raw = read_json(index)
    weights = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{index}: has no weight_map; fetch the file again")
    shards = sorted({str(shard) for shard in weights.values()})
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard) or shard.startswith("."):
            raise UserError(f"{index}: names {shard[:200]!r}; only .safetensors files of the same directory are read")
    return shards


def _contents(files: list[Path]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """name -> (file, shape), read from the headers alone."""
    where: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with open_safetensors(file) as handle:
            for name in handle.keys():
                if name in where:
                    raise UserError(f"{file}: {name} is also in {where[name][0].name}; the checkpoint is ambiguous")
                piece = handle.get_slice(name)
                if piece.get_dtype() not in FLOATS and not name.endswith("inv_freq"):
                    raise UserError(
                        f"{file}: {name} is stored as {piece.get_dtype()}; quantised weights are not supported, use "
                        "a bfloat16 or float32 checkpoint"
                    )
                where[name] = (file, tuple(piece.get_shape()))
    return where


# ---------------------------------------------------------------- from a seed


def _random_weights(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Seeded weights with the statistics of an untrained network: N(0, 0.02), norms 1. Drawn on `device`."""
    generator = torch.Generator(device).manual_seed(42)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, device=device)
        else:
            yield name, torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator)
