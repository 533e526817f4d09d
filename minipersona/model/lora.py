"""LoRA over a whole model: attach adapters, switch them off, merge them, measure them.

W stays frozen and B is zero at the start (Hu et al. 2021); the product itself is in `adapter.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from minipersona.config import LoraConfig
from minipersona.model.adapter import Adapter
from minipersona.model.network import Linear, Qwen2


def linears(model: Qwen2) -> dict[str, Linear]:
    """The layers that an adapter can be attached to, by name, in the network's order."""
    return {n: module for n, module in model.model.named_modules(prefix="model") if isinstance(module, Linear)}


def adapters(model: Qwen2) -> dict[str, Adapter]:
    """The adapters of a model by the name of their layer; none where it has none."""
    return {name: layer.adapter for name, layer in linears(model).items() if layer.adapter is not None}


def apply_lora(model: Qwen2, config: LoraConfig, seed: int = 42) -> Qwen2:
    """Freeze the model and attach fresh adapters; only they are trainable. Returns the same model.

    A is uniform in +-1/sqrt(I), which is Kaiming's bound with a = sqrt 5 as PEFT draws it; B is zero, so nothing
    changes at first. Drawn on the CPU from `seed`, in the network's order: the same on every device.
    """
    remove_lora(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
    for name, layer in linears(model).items():
        if name.rsplit(".", 1)[-1] not in config.targets:
            continue
        adapter = Adapter(layer.weight.shape[1], layer.weight.shape[0], config, name, layer.weight.device)
        bound = 1 / math.sqrt(layer.weight.shape[1])
        with torch.no_grad():
            adapter.lora_A.copy_(torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator))
        layer.adapter = adapter.to(dtype)
    return model


def remove_lora(model: Qwen2) -> Qwen2:
    """Detach every adapter: the base model again."""
    for layer in linears(model).values():
        layer.adapter = None
    model.source.pop("adapter", None)
    return model


@contextlib.contextmanager
def adapter_disabled(model: Qwen2) -> Iterator[None]:
    """Within this context the model is its base, without a copy."""
    before = [(adapter, adapter.enabled) for adapter in adapters(model).values()]
    try:
        for adapter, _ in before:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


@torch.no_grad()
def merge_adapter(model: Qwen2) -> Qwen2:
    """W <- W + (alpha/r) B A, summed in fp32 and rounded once to W's precision; the adapters are gone afterwards."""
    for layer in linears(model).values():
        if layer.adapter is not None:
            delta = layer.adapter.delta()
            layer.weight.copy_(layer.weight.to(torch.promote_types(layer.weight.dtype, delta.dtype)) + delta)
    return remove_lora(model)


@torch.no_grad()
def adapter_norm(model: Qwen2) -> float:
    """||delta theta||_2 over all adapted weights, from the factors."""
    return math.sqrt(sum(float(adapter.squared_norm()) for adapter in adapters(model).values()))
