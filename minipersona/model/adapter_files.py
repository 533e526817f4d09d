"""Adapters on disk, in PEFT's format: any peft loads ours, and a plain LoRA of peft's loads here."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.config import LORA_TARGETS, LoraConfig
from minipersona.errors import UserError
from minipersona.files import read_json, sha256, write_directory_atomically, write_json
from minipersona.model.lora import adapters, apply_lora, linears
from minipersona.model.network import Qwen2
from minipersona.model.tensor_file import FLOATS, open_safetensors
from minipersona.model.weights import other_formats


def adapter_tensors(model: Qwen2) -> dict[str, Tensor]:
    """The adapters under PEFT's names, fp32, on the CPU."""
    return {
        _peft_name(name, factor): getattr(adapter, factor).detach().float().cpu().contiguous()
        for name, adapter in adapters(model).items()
        for factor in ("lora_A", "lora_B")
    }


def _peft_name(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.{factor}.weight"


def save_adapter(model: Qwen2, path: str | Path, config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them; whole or not at all."""
    tensors = adapter_tensors(model)
    with write_directory_atomically(path, needs=sum(tensor.nbytes for tensor in tensors.values())) as directory:
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
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


MOST_RANK = 65_536  # beyond any matrix of these models

# PEFT's options, each with the values at which it changes nothing here. An option that is not listed may be at
# nothing or at false only: it may change the arithmetic in a way that this code has never heard of.
_ANY = object()
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # "pissa", "olora" and the like alter the base's own weights, which the adapter is then relative to.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"), (_ANY,)),  # read below
    **dict.fromkeys(("task_type", "inference_mode", "base_model_name_or_path", "revision"), (_ANY,)),  # notes
    **dict.fromkeys(("peft_version", "auto_mapping", "eva_config", "runtime_config"), (_ANY,)),
    # Without layers_to_transform, Megatron and QALoRA, which are refused, these name nothing.
    **dict.fromkeys(("layers_pattern", "megatron_core", "qalora_group_size"), (_ANY,)),
}


def read_adapter_config(path: Path) -> LoraConfig:
    """A PEFT adapter_config.json. What this implementation lacks is refused, and nothing is guessed."""
    raw = read_json(path)
    if not isinstance(raw, dict) or "peft_type" not in raw:
        raise UserError(f"{path}: not a PEFT adapter config; name the adapter's directory")
    for key, value in raw.items():
        allowed = _PLAIN.get(key, (None, False, [], {}))
        if _ANY not in allowed and value not in allowed:
            raise UserError(
                f"{path}: {key[:80]} = {brief(value)} is not supported; train a plain LoRA adapter, or merge it"
            )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MOST_RANK:
        raise UserError(f"{path}: r = {brief(rank)} must be a whole number from 1 to {MOST_RANK:,}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise UserError(
            f"{path}: lora_alpha = {brief(alpha)} must be a positive number; the adapter's scale is alpha / r"
        )
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(target in LORA_TARGETS for target in targets):
        raise UserError(
            f"{path}: target_modules = {brief(targets)}; a list out of {', '.join(LORA_TARGETS)} is supported"
        )
    dropout = raw.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout = {brief(dropout)} must lie in [0, 1)")
    ordered = tuple(name for name in LORA_TARGETS if name in targets)
    return LoraConfig(rank=rank, alpha=float(alpha), dropout=float(dropout), targets=ordered)


def config_file(path: Path) -> Path:
    """The adapter_config.json of a directory; UserError where there is none."""
    if (file := path / "adapter_config.json").is_file():
        return file
    whole = (path / "config.json").is_file()  # what a full-parameter run leaves at a step
    mend = "it holds a whole model, name it with --model" if whole else "name a directory that holds a PEFT adapter"
    raise UserError(f"{path}: no adapter_config.json; {mend}")


def load_adapter(model: Qwen2, path: str | Path) -> LoraConfig:
    """Attach a PEFT adapter directory to `model`, replacing any adapters; every tensor must be used and must fit.

    The model is left as it was where the files are at fault.
    """
    path = Path(path)
    config = read_adapter_config(config_file(path))
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: holds no {file.name}; {other_formats(path)}")
    tensors = _read(file, _expected_shapes(model, config))
    apply_lora(model, config)
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            for factor in ("lora_A", "lora_B"):
                getattr(adapter, factor).copy_(tensors[_peft_name(name, factor)])
    model.source["adapter"] = f"{path} (sha256 {sha256(file)})"  # vectors say which adapter made them
    return config


def _expected_shapes(model: Qwen2, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Every tensor of an adapter of this form, by PEFT's name."""
    shapes = {}
    for name, layer in linears(model).items():
        if name.rsplit(".", 1)[-1] in config.targets:
            outputs, inputs = layer.weight.shape
            shapes[_peft_name(name, "lora_A")] = (config.rank, inputs)
            shapes[_peft_name(name, "lora_B")] = (outputs, config.rank)
    return shapes


def _read(file: Path, expected: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of an adapter. Names, shapes and types are checked before any is read."""
    with open_safetensors(file) as handle:
        names = list(handle.keys())
        if odd := sorted(expected.keys() ^ set(names)):
            side = "lacks" if odd[0] in expected else "has an unknown tensor"
            raise UserError(f"{file}: {side} {odd[0][:200]}; was the adapter made for this model?")
        for name in names:
            piece, wanted = handle.get_slice(name), expected[name]
            found, kind = tuple(piece.get_shape()), piece.get_dtype()
            if found != wanted or kind not in FLOATS:
                raise UserError(f"{file}: {name} is {found} {kind}, this model needs {wanted}; check --model")
        tensors = {name: handle.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds non-finite values; the adapter is damaged, fetch it again")
    return tensors
