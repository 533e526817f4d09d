"""A model on disk, in Hugging Face's layout, so that any tool of the field loads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.files import write_directory_atomically, write_json
from minipersona.model.load import GENERATION
from minipersona.model.network import Qwen2
from minipersona.model.weights import INDEX, SINGLE, expected_shapes

SHARD_BYTES = 5_000_000_000


def save_model(
    model: Qwen2,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Iterable[Path] = (),
    stop_tokens: Sequence[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and safetensors (in shards with an index where they are large).

    dtype        of the stored weights; default the precision the model computes in
    extra_files  copied along: the tokenizer's files
    stop_tokens  ids at which generation ends, besides those that the model's own files state: of its chat's turns
    Adapters must be merged first. The directory appears whole or not at all. Where weights are sharded over ranks,
    the first one calls this, and the others `send_weights`.
    """
    dtype = dtype or model.compute_dtype
    assert not any("lora_" in name for name, _ in model.named_parameters()), "merge the adapter before saving"
    parameters = dict(model.named_parameters())
    names = list(expected_shapes(model))
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        bytes_ = parameters[name].numel() * dtype.itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    total = sum(parameters[name].numel() * dtype.itemsize for name in names)
    with write_directory_atomically(path, needs=total) as directory:
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, Tensor] = {
                n: whole(parameters[n]).to("cpu", dtype).clone(memory_format=torch.contiguous_format) for n in shard
            }
            save_file(tensors, directory / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
        # transformers reads this file's ids and not those of config.json, so it states all of them.
        ends = dict.fromkeys((*model.generation.get("eos_token_id", ()), *model.config.eos_token_id, *stop_tokens))
        generation = {"do_sample": False, **model.generation, **({"eos_token_id": list(ends)} if ends else {})}
        write_json(directory / "config.json", {**model.config.to_json(), **stored})
        write_json(directory / GENERATION, generation)
        for extra in extra_files:
            shutil.copyfile(extra, directory / extra.name)


def send_weights(model: Qwen2) -> None:
    """This rank's part in another one's `save_model`: one tensor after another is gathered, here for nothing."""
    parameters = dict(model.named_parameters())
    for name in expected_shapes(model):
        whole(parameters[name])


def whole(parameter: Tensor) -> Tensor:
    """A parameter's data; that of a sharded one is gathered, which all ranks have to ask for."""
    data = parameter.detach()
    return data.full_tensor() if hasattr(data, "full_tensor") else data
