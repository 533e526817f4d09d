"""Linear layers and LoRA (Hu et al. 2021): y = W x + b + s B A dropout(x), where the scale s is alpha / r.

One layer and its adapter come first, then what concerns a whole model: attach adapters, switch them off, merge them,
measure them. W stays frozen and B is zero at the start. Adapters are fp32 masters, cast to the stream's precision at
use: in bf16 a late update of relative size 1e-4 would be lost to rounding.

T = tokens, I/O = inputs/outputs of a layer, r = rank. Layers may differ in rank and scale (`AdapterConfig`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipersona.config import LoraConfig
from minipersona.errors import UserError
from minipersona.model.adapter_config import AdapterConfig
from minipersona.model.dropout import channel_keys, hashed_dropout

if TYPE_CHECKING:
    from minipersona.model.network import Qwen2  # which is made of these layers


class Linear(nn.Module):
    """y = W x + b, plus an adapter's product where one is attached."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.adapter: Adapter | None = None

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """x (T, I) -> (T, O). `dropout_keys` (T,) of `token_keys`: the adapter drops its input; None: it does not."""
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.adapter is not None and self.adapter.enabled:
            y = y + self.adapter(x, dropout_keys)
        return y


class Adapter(nn.Module):
    """The low-rank product that is added to one linear layer's output."""

    channel_keys: Tensor  # (I,) int32

    def __init__(self, inputs: int, outputs: int, config: AdapterConfig, name: str, device: torch.device) -> None:
        super().__init__()
        rank = config.rank(name)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device=device))  # (r, I)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device))  # (O, r)
        self.scale = config.scale(name)
        self.dropout = config.lora_dropout
        self.enabled = True
        # Derived from the name, so not part of a checkpoint.
        self.register_buffer("channel_keys", channel_keys(name, inputs).to(device), persistent=False)

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, I) -> s B A dropout(x), (T, O)."""
        return F.linear(self.to_rank(x, dropout_keys), self.lora_B.to(x.dtype))

    def to_rank(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, I) -> s A dropout(x), (T, r)."""
        if dropout_keys is not None and self.dropout > 0:
            x = hashed_dropout(x, dropout_keys, self.channel_keys, self.dropout)
        return F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # scaled where it is smallest

    def delta(self) -> Tensor:
        """The merged update s B A, (O, I) in the masters' precision."""
        return self.scale * (self.lora_B @ self.lora_A)

    def squared_norm(self) -> Tensor:
        """||s B A||_F^2 = s^2 trace((B^T B)(A A^T)), fp64, without forming the product."""
        a, b = self.lora_A.double(), self.lora_B.double()
        return self.scale**2 * ((b.T @ b) * (a @ a.T)).sum()


def linears(model: Qwen2) -> dict[str, Linear]:
    """The layers that an adapter can be attached to, by name, in the network's order."""
    return {n: module for n, module in model.model.named_modules(prefix="model") if isinstance(module, Linear)}


def adapters(model: Qwen2) -> dict[str, Adapter]:
    """The adapters of a model by the name of their layer; none where it has none."""
    return {name: layer.adapter for name, layer in linears(model).items() if layer.adapter is not None}


def adapted_layers(model: Qwen2, config: AdapterConfig) -> dict[str, Linear]:
    """The layers that an adapter of this form is attached to, by name, in the network's order.

    UserError where it names none, or a module that is not a linear layer of a block.
    """
    layers = linears(model)
    modules = [name for name, _ in model.named_modules() if name and ".adapter" not in name]
    names = [name for name in (layers if config.all_linear else modules) if config.matches(name)]
    if not names:
        raise UserError("target_modules names no layer of this model; was the adapter made for it?")
    if others := [name for name in names if name not in layers]:
        raise UserError(
            f"target_modules names {others[0]}, and only linear layers of the blocks are adapted here; train an "
            "adapter without it, or merge it with peft"
        )
    return {name: layers[name] for name in names}


def attach(model: Qwen2, config: AdapterConfig) -> Qwen2:
    """Freeze the model and attach adapters of this form in place of any others: B is zero, and A is yet to be filled.

    Returns the same model, whose `lora` is `config`. UserError as `adapted_layers`; the model is then as it was.
    """
    layers = adapted_layers(model, config)
    remove_lora(model).requires_grad_(False)
    dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape
        layer.adapter = Adapter(inputs, outputs, config, name, layer.weight.device).to(dtype)
    model.lora = config
    return model


@torch.no_grad()
def apply_lora(model: Qwen2, config: LoraConfig, seed: int = 42) -> Qwen2:
    """Freeze the model and attach fresh adapters; only they are trainable. Returns the same model.

    A is uniform in +-1/sqrt(I), which is Kaiming's bound with a = sqrt 5 as PEFT draws it; B is zero, so nothing
    changes at first. Drawn on the CPU from `seed`, in the network's order: the same on every device.
    """
    attach(model, AdapterConfig.of(config, model.config.num_hidden_layers))
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        bound = 1 / math.sqrt(adapter.lora_A.shape[1])
        adapter.lora_A.copy_(torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator))
    return model


def remove_lora(model: Qwen2) -> Qwen2:
    """Detach every adapter: the base model again."""
    for layer in linears(model).values():
        layer.adapter = None
    model.lora = None
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
    """W <- W + s B A, summed in fp32 and rounded once to W's precision; the adapters are gone afterwards."""
    for layer in linears(model).values():
        if layer.adapter is not None:
            delta = layer.adapter.delta()
            layer.weight.copy_(layer.weight.to(torch.promote_types(layer.weight.dtype, delta.dtype)) + delta)
    return remove_lora(model)


@torch.no_grad()
def merge_and_compare(model: Qwen2, ids: Tensor) -> float:
    """`merge_adapter`, and by how much rounding the merged weights has changed what the adapter does.

    That is ||merged - unmerged|| / ||unmerged - base|| over the logits at ids (1, T), computed in fp32 or better, so
    that no other rounding counts: 0 where nothing is lost, 1 where nothing is left. 0 where the adapter does nothing.
    """
    precision = model.compute_dtype
    model.compute_dtype = torch.promote_types(precision, torch.float32)
    try:
        unmerged = model.logits(ids)
        with adapter_disabled(model):
            effect = float((unmerged - model.logits(ids)).norm())
        change = float((merge_adapter(model).logits(ids) - unmerged).norm())
    finally:
        model.compute_dtype = precision
    return change / effect if effect > 0 else 0.0


@torch.no_grad()
def adapter_norm(model: Qwen2) -> float:
    """||delta theta||_2 over all adapted weights, from the factors."""
    return math.sqrt(sum(float(adapter.squared_norm()) for adapter in adapters(model).values()))
