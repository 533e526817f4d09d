"""Adapters on disk, in PEFT's format: any peft loads ours, and a plain LoRA of peft's loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.config import LORA_TARGETS, LoraConfig
from minipersona.errors import UserError
from minipersona.files import read_json, sha256, write_directory_atomically, write_json
from minipersona.model.load import open_safetensors
from minipersona.model.lora import adapters, apply_lora, remove_lora
from minipersona.model.network import Qwen2


def adapter_tensors(model: Qwen2) -> dict[str, Tensor]:
    """The adapters under PEFT's names, fp32, on the CPU."""
    return {
        f"base_model.model.{name}.{factor}.weight": getattr(adapter, factor).detach().float().cpu().contiguous()
        for name, adapter in adapters(model).items()
        for factor in ("lora_A", "lora_B")
    }


def save_adapter(model: Qwen2, path: str | Path, config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them; whole or not at all."""
    with write_directory_atomically(path) as directory:
        save_file(adapter_tensors(model), directory / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(
            directory / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": model.source.get("name"),
                "revision": model.source.get("revision"),
                "r": config.rank,
                "lora_alpha": config.alpha,
                "lora_dropout": config.dropout,
                "target_modules": list(config.targets),
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "use_rslora": False,
                "use_dora": False,
                "inference_mode": True,
            },
        )


MOST_RANK = 65_536  # beyond any matrix of these models; keeps a damaged file from asking for terabytes

# Whatever PEFT option would change the arithmetic must be at the value that this implementation has.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}


def read_adapter_config(path: Path) -> LoraConfig:
    """A PEFT adapter_config.json. What this implementation lacks is refused, and nothing is guessed."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a PEFT adapter config; name the adapter's directory")
    for key, allowed in _PLAIN.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported; train a plain LoRA adapter, or merge it")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MOST_RANK:
        raise UserError(f"{path}: r = {rank!r} must be a whole number from 1 to {MOST_RANK:,}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise UserError(f"{path}: lora_alpha = {alpha!r} must be a positive number; the adapter's scale is alpha / r")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(map(str, targets)) <= set(LORA_TARGETS):
        raise UserError(f"{path}: target_modules = {targets!r}; a list out of {', '.join(LORA_TARGETS)} is supported")
    dropout = raw.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout = {dropout!r} must lie in [0, 1)")
    ordered = tuple(name for name in LORA_TARGETS if name in targets)
    return LoraConfig(rank=rank, alpha=float(alpha), dropout=float(dropout), targets=ordered)


def load_adapter(model: Qwen2, path: str | Path) -> LoraConfig:
    """Attach a PEFT adapter directory to `model`, replacing any adapters; every tensor must be used and must fit."""
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: no adapter_config.json; name a directory that holds a PEFT adapter")
    config = read_adapter_config(path / "adapter_config.json")
    file = path / "adapter_model.safetensors"
    tensors = {}
    with open_safetensors(file) as handle:
        for key in handle.keys():
            tensors[key] = handle.get_tensor(key)
    apply_lora(model, config)
    expected = adapter_tensors(model)
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())[0]
        side = "lacks" if odd in expected else "has an unknown tensor"
        remove_lora(model)
        raise UserError(f"{file}: {side} {odd}; was the adapter made for this model?")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            remove_lora(model)
            raise UserError(f"{file}: {key} is {found} {tensor.dtype}, this model needs {wanted}; check --model")
        if not torch.isfinite(tensor).all():
            remove_lora(model)
            raise UserError(f"{file}: {key} holds non-finite values; the adapter is damaged")
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.lora_A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
            adapter.lora_B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
    model.source["adapter"] = f"{path} (sha256 {sha256(file)})"  # vectors say which adapter made them
    return config
