"""Adapters on their own: fresh ones, their norm, switching them off, taking them away."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minipersona.config import LORA_TARGETS, LoraConfig
from minipersona.model.load import load_model
from minipersona.model.lora import (
    adapter_disabled,
    adapter_norm,
    adapters,
    apply_lora,
    merge_adapter,
    remove_lora,
)
from minipersona.model.network import Qwen2

CONFIG = LoraConfig(rank=4, alpha=12.0, dropout=0.0)
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model(hf_model: Callable[..., Path]) -> Qwen2:
    return load_model(str(hf_model()), device="cpu")


def randomise(model: Qwen2) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.1, generator=generator)


def test_a_fresh_adapter_is_everywhere_and_changes_nothing(model: Qwen2) -> None:
    base = model.logits(IDS)
    apply_lora(model, CONFIG)
    assert len(adapters(model)) == 3 * len(LORA_TARGETS)
    assert torch.equal(model.logits(IDS), base)
    for adapter in adapters(model).values():
        bound = 1 / math.sqrt(adapter.lora_A.shape[1])
        assert float(adapter.lora_A.detach().abs().max()) <= bound
        assert float(adapter.lora_A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert adapter.lora_A.dtype == torch.float32 and not adapter.lora_B.any()


def test_adapters_are_fp32_over_a_bf16_base_and_the_seed_decides(hf_model: Callable[..., Path]) -> None:
    a, b, c = (load_model(str(hf_model()), dtype=torch.bfloat16, device="cpu") for _ in range(3))
    apply_lora(a, CONFIG, seed=1), apply_lora(b, CONFIG, seed=1), apply_lora(c, CONFIG, seed=2)
    for name, adapter in adapters(a).items():
        assert adapter.lora_A.dtype == torch.float32
        assert torch.equal(adapter.lora_A, adapters(b)[name].lora_A)
        assert not torch.equal(adapter.lora_A, adapters(c)[name].lora_A)
    assert a.logits(IDS).dtype == torch.float32
    assert a.lm_head.weight.dtype == torch.bfloat16


def test_only_the_named_layers_are_adapted(model: Qwen2) -> None:
    apply_lora(model, LoraConfig(rank=2, alpha=4.0, targets=("v_proj", "o_proj")))
    assert {name.rsplit(".", 1)[-1] for name in adapters(model)} == {"v_proj", "o_proj"}


def test_update_norm_equals_the_merged_difference(model: Qwen2) -> None:
    apply_lora(model, CONFIG)
    randomise(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in adapters(model)}
    norm = adapter_norm(model)
    merge_adapter(model)
    squared = sum(float((model.get_submodule(n).weight - w).double().square().sum()) for n, w in before.items())
    assert norm == pytest.approx(math.sqrt(squared), rel=1e-5)
    assert norm != pytest.approx(math.sqrt(squared) / 3, rel=1e-2)  # the control: the scale belongs to it


def test_disabled_is_the_base_and_comes_back_after_an_error(model: Qwen2) -> None:
    base = model.logits(IDS)
    apply_lora(model, CONFIG)
    randomise(model)
    adapted = model.logits(IDS)
    assert not torch.equal(adapted, base)
    with pytest.raises(ZeroDivisionError), adapter_disabled(model):
        assert torch.equal(model.logits(IDS), base)
        _ = 1 / 0
    assert torch.equal(model.logits(IDS), adapted)
    assert torch.equal(remove_lora(model).logits(IDS), base)
