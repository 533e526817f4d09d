"""The weights of a model's directory: one safetensors file, or shards with an index.

Every tensor of the files is used, or known to say what is said elsewhere and equal to it, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minipersona.errors import UserError, require
from minipersona.files import read_json
from minipersona.model.attention import frequencies
from minipersona.model.config import ModelConfig
from minipersona.model.network import Qwen2
from minipersona.model.tensor_file import FLOATS, open_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What wrapping a model adds to the names of its tensors: torch.compile, FSDP and activation checkpointing wherever they
# were applied, DistributedDataParallel in front.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PARALLEL = "module."


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: where it lies, and under which name."""

    file: Path
    name: str
    shape: tuple[int, ...]


def expected_shapes(model: Qwen2) -> dict[str, tuple[int, ...]]:
    """Every weight a checkpoint must hold, by its Hugging Face name. A tied head is the embedding, stored once."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=True)}
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def read_weights(directory: Path, model: Qwen2, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight that the model expects, one at a time, as stored. All names and shapes are checked first."""
    expected = expected_shapes(model)
    files = weight_files(directory)
    tensors = _by_name(_contents(files), expected)
    _check_names(directory, tensors, expected)
    for name, tensor in tensors.items():
        if name not in expected:
            _check_redundant(name, tensor, tensors, model.config)
        elif tensor.shape != expected[name]:
            raise UserError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {expected[name]}; do "
                "they belong together?"
            )
    for file in files:
        with open_safetensors(file, device) as handle:
            for name, tensor in tensors.items():
                if tensor.file != file or name not in expected:
                    continue
                values = handle.get_tensor(tensor.name)
                if not torch.isfinite(values.sum(dtype=torch.float32)):
                    raise UserError(f"{file}: {name} holds non-finite values; the file is damaged, fetch it again")
                yield name, values


# ---------------------------------------------------------------- files


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights. UserError where one is missing, or two statements of them differ."""
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        files = [directory / shard for shard in shard_names(index)]
    elif single.is_file():
        files = [single]
    else:
        raise UserError(f"{directory}: holds neither {SINGLE} nor {INDEX}; {other_formats(directory)}")
    for file in files:
        require(file.is_file(), f"{file}: this shard is missing; finish the download or copy it there")
    if single.is_file() and single not in files:
        _check_same(index, _contents(files), _contents([single]))
    return files


def shard_names(index: Path) -> list[str]:
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


def other_formats(directory: Path) -> str:
    """What to do about a directory without safetensors files."""
    found = sorted(file.name for file in directory.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if found:
        return f"{found[0]} could run code and is not read: convert it to safetensors where you trust it"
    return "only safetensors weights are read: fetch them, or convert what there is"


def _contents(files: list[Path]) -> dict[str, Stored]:
    """Every tensor by its stored name, read from the headers alone."""
    found: dict[str, Stored] = {}
    for file in files:
        with open_safetensors(file) as handle:
            for name in handle.keys():
                if name in found:
                    raise UserError(f"{file}: {name} is also in {found[name].file.name}; the checkpoint is ambiguous")
                piece = handle.get_slice(name)
                if piece.get_dtype() not in FLOATS and not name.endswith("inv_freq"):
                    raise UserError(
                        f"{file}: {name} is stored as {piece.get_dtype()}; quantised weights are not supported, use "
                        "a bfloat16 or float32 checkpoint"
                    )
                found[name] = Stored(file, name, tuple(piece.get_shape()))
    return found


def _check_same(index: Path, shards: dict[str, Stored], single: dict[str, Stored]) -> None:
    """A directory that holds its weights twice must hold the same ones: names first, then shapes, then values."""
    differing = sorted(shards.keys() ^ single.keys())
    differing = differing or sorted(name for name in shards if shards[name].shape != single[name].shape)
    differing = differing or [next((name for name in shards if not _equal(shards[name], single[name])), "")]
    if differing[0]:
        raise UserError(
            f"{index.parent}: {SINGLE} stands beside {INDEX}, and {differing[0]} is not the same in both; delete the "
            "one that is out of date"
        )


def _equal(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Whether two stored tensors hold the same values, compared some rows at a time."""
    if a.shape != b.shape:
        return False
    with open_safetensors(a.file) as one, open_safetensors(b.file) as other:
        if not a.shape:
            return bool(one.get_tensor(a.name) == other.get_tensor(b.name))
        first, second = one.get_slice(a.name), other.get_slice(b.name)
        return all(
            torch.equal(first[start : start + rows].double(), second[start : start + rows].double())
            for start in range(0, a.shape[0], rows)
        )


# ---------------------------------------------------------------- names


def _by_name(stored: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The tensors by the names of the network: without what wrappers add, and with `model.` where it was left out."""
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        name = name.removeprefix(PARALLEL)
        if name not in expected and f"model.{name}" in expected:
            name = f"model.{name}"
        if name in found:
            raise UserError(f"{tensor.file}: {tensor.name} and {found[name].name} are both {name}; delete one of them")
        found[name] = tensor
    return found


def _check_names(directory: Path, tensors: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> None:
    """UserError where a weight is missing."""
    missing = sorted(name for name in expected if name not in tensors)
    if not missing:
        return
    first = missing[0]
    for tensor in tensors.values():
        for ending in (first, first.removeprefix("model.")):
            if tensor.name.endswith(f".{ending}") and tensor.name != f"model.{ending}":
                prefix = tensor.name.removesuffix(ending)
                raise UserError(
                    f"{tensor.file}: names of tensors begin with {prefix!r} ({tensor.name}), which is not known; save "
                    "the language model itself, without what wraps it"
                )
    if missing == [HEAD]:
        raise UserError(
            f"{directory}: tensor {HEAD} is missing, and config.json says that the head is not the embedding "
            "(tie_word_embeddings is false); finish the download, or correct config.json"
        )
    raise UserError(f"{directory}: tensor {first} is missing ({len(missing)} in all); the download is incomplete")


def _check_redundant(name: str, tensor: Stored, tensors: dict[str, Stored], config: ModelConfig) -> None:
    """UserError unless a tensor that the network has no place for repeats what is known without it."""
    if name == HEAD:  # where it has a place, it is expected
        require(
            _equal(tensor, tensors[EMBEDDING]),
            f"{tensor.file}: {tensor.name} is not {tensors[EMBEDDING].name}, and config.json says that they are one "
            "(tie_word_embeddings is true); set it to false, or save the model without the other head",
        )
    elif name.endswith(".rotary_emb.inv_freq"):
        with open_safetensors(tensor.file) as handle:
            stored = handle.get_tensor(tensor.name).double()
        ours = frequencies(config, torch.float64)
        # Some were stored in half precision.
        require(
            stored.shape == ours.shape and torch.allclose(stored, ours, rtol=1e-2, atol=0.0),
            f"{tensor.file}: {tensor.name} holds other frequencies than the rotary positions of config.json "
            "(rope_theta, rope_parameters) have; correct the one that is wrong",
        )
    else:
        raise UserError(
            f"{tensor.file}: unknown tensor {tensor.name}: a {config.model_type} network of this config.json has no "
            "such weight; is it a plain checkpoint?"
        )
