"""Without acceleration (`execution.fused = false`) a model computes the same to rounding: states and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.config import LoraConfig
from minipersona.model.acceleration.fused_linear import FusedLinear
from minipersona.model.cache import Stepping
from minipersona.model.dropout import token_keys
from minipersona.model.generation import Request, generate
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import EMBEDDING, Qwen2
from minipersona.model.pack import make_pack

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
PACK = make_pack([np.arange(1, 9), np.arange(20, 23), np.arange(5, 17)])
REQUESTS = [Request(np.arange(3, n + 3), max_new_tokens=12) for n in (4, 9, 1)]


@pytest.fixture
def make(hf_model: Callable[..., Path], family: str) -> Callable[..., Qwen2]:
    """A model with adapters whose B is not zero, fused or plain."""

    def make(fused: bool, dtype: torch.dtype = torch.float64, changed: str = "") -> Qwen2:
        model = apply_lora(
            load_model(str(hf_model(family=family)), device="cpu", dtype=dtype),
            LoraConfig(rank=4, alpha=8.0, dropout=0.3),
        )
        generator = torch.Generator().manual_seed(0)
        for name, adapter in adapters(model).items():
            adapter.lora_B.data.normal_(0, 0.1, generator=generator)
            if name == changed:
                adapter.lora_B.data.mul_(1.001)
        model.fused = fused
        return model

    return make


def found(model: Qwen2, checkpointed: bool = False) -> list[Tensor]:
    """States, and the gradients of the embedded tokens and of every factor."""
    embedded: list[Tensor] = []

    def tap(h: Tensor) -> Tensor:
        embedded.append(h.detach().requires_grad_())
        return embedded[0]

    h = model(PACK, taps={EMBEDDING: tap}, dropout_keys=token_keys(0, 1, PACK), checkpoint_activations=checkpointed)
    learned = [p for p in model.parameters() if p.requires_grad]
    return [h, *torch.autograd.grad(h.sin().sum(), [embedded[0], *learned])]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_plain_path_is_the_fused_one_to_rounding(
    make: Callable[..., Qwen2], dtype: torch.dtype, checkpointed: bool
) -> None:
    plain, fused = (found(make(choice, dtype), checkpointed) for choice in (False, True))
    assert len(plain) == len(fused) == 2 + 2 * 7 * 3
    assert max(map(relative_error, plain, fused)) < BOUNDS[dtype]
    # The control: one adapter of 21 that differs by a thousandth is outside of the bound.
    changed = found(make(False, dtype, "model.layers.1.self_attn.k_proj"), checkpointed)
    assert min(map(relative_error, changed, fused)) > BOUNDS[dtype]


def test_nothing_is_fused_on_the_plain_path(make: Callable[..., Qwen2], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[FusedLinear] = []
    real = FusedLinear.__call__
    monkeypatch.setattr(FusedLinear, "__call__", lambda self, x, keys: called.append(self) or real(self, x, keys))
    model = make(True)
    model(PACK)
    assert len(called) == 2 * 3  # the control
    model.fused = False
    called.clear()
    assert relative_error(model(PACK), make(False)(PACK)) < 1e-10
    assert not called and all(block.self_attn.qkv._storage is None for block in model.blocks)
    model.fused = True
    model(PACK)
    assert len(called) == 2 * 3


@pytest.mark.parametrize("reason", ["learns", "some adapted"])
def test_what_cannot_be_fused_takes_the_plain_path(make: Callable[..., Qwen2], reason: str) -> None:
    models = make(False), make(True)
    for model in models:
        block = model.blocks[0]
        block.mlp.up_proj.weight.requires_grad_(True)
        if reason == "learns":
            block.self_attn.k_proj.weight.requires_grad_(True)
        else:
            block.self_attn.k_proj.adapter = None
    plain, fused = (model(PACK, stop_after=0) for model in models)
    first, second, _ = models[1].blocks
    assert not first.self_attn.qkv.ready and not first.mlp.gate_up.ready
    assert second.self_attn.qkv.ready and second.mlp.gate_up.ready  # the control
    assert torch.equal(plain, fused)


def test_the_plain_path_generates_the_same(make: Callable[..., Qwen2], monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[bool] = []
    real = Stepping.attend
    monkeypatch.setattr(Stepping, "attend", lambda self, *qkv: flags.append(self.fused) or real(self, *qkv))
    plain, fused = ([c.ids.tolist() for c in generate(make(f), REQUESTS, stop=[0])] for f in (False, True))
    assert plain == fused and any(plain)
    assert set(flags[: len(flags) // 2]) == {False} and set(flags[len(flags) // 2 :]) == {True}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_plain_token_step_uses_no_flash_kernel(
    make: Callable[..., Qwen2], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minipersona.model import cache

    monkeypatch.setattr(cache, "newest_token", lambda *_: pytest.fail("the flash kernel"))
    model = make(False, torch.bfloat16).to("cuda")
    assert all(len(c.ids) for c in generate(model, REQUESTS, stop=[]))
    model.fused = True
    with pytest.raises(BaseException, match="the flash kernel"):  # the control
        generate(model, REQUESTS, stop=[])
