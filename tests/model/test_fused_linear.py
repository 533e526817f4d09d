"""Layers computed as one product equal the same layers one by one: outputs and every gradient."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.model.acceleration.fused_linear import (
    FusedLinear,
    refresh,
    sum_of_products,
    to_rank_at_once,
    to_rank_one_by_one,
)
from minipersona.model.adapter_config import AdapterConfig
from minipersona.model.lora import Adapter, Linear

INPUTS, OUTPUTS = 12, (7, 3, 5)
LORA = AdapterConfig(r=2, lora_alpha=4.0, target_modules="all-linear", lora_dropout=0.2)
UNEQUAL = replace(LORA, rank_pattern={"0": 3, "2": 1}, alpha_pattern={"1": 5.0}, use_rslora=True)
KEYS = torch.arange(9, dtype=torch.int32) * 7919


def layers(
    bias: bool = True, adapted: tuple[bool, ...] = (True, True, True), lora: AdapterConfig = LORA
) -> list[Linear]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (outputs, adapt) in enumerate(zip(OUTPUTS, adapted, strict=True)):
        layer = Linear(INPUTS, outputs, bias).to(torch.float64).requires_grad_(False)
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        if adapt:
            adapter = Adapter(INPUTS, outputs, lora, f"{index}", torch.device("cpu"))
            layer.adapter = adapter.to(torch.float64)
            for factor in (adapter.lora_A, adapter.lora_B):
                factor.data.normal_(generator=generator)
        made.append(layer)
    return made


def results(computed: object, inputs: Tensor, group: list[Linear]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs and of every factor."""
    x = inputs.clone().requires_grad_()
    ys = computed(x, KEYS)  # type: ignore[operator]
    factors = [f for layer in group if layer.adapter for f in (layer.adapter.lora_A, layer.adapter.lora_B)]
    weights = torch.linspace(-1, 1, sum(OUTPUTS), dtype=torch.float64)
    return [*ys, *torch.autograd.grad((torch.cat(list(ys), -1) * weights).sum(), [x, *factors])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("lora", [LORA, UNEQUAL], ids=["alike", "unequal"])
@pytest.mark.parametrize("operator", [True, False], ids=["operator", "eager"])
def test_fused_equals_one_by_one(
    bias: bool, adapted: tuple[bool, ...], lora: AdapterConfig, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operator, which CUDA and compiled code take, and by what a CPU takes."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: operator)
    group = layers(bias, adapted, lora)
    x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = results(lambda x, keys: [layer(x, keys) for layer in group], x, group)
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    assert fused.ready
    for ours, theirs in zip(results(fused, x, group), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-10
    with torch.no_grad():
        for ours, theirs in zip(fused(x, None), [layer(x, None) for layer in group], strict=True):
            assert relative_error(ours, theirs) < 1e-10


def test_a_changed_adapter_is_seen_once_refreshed_and_only_then() -> None:
    group = layers()
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    before = fused(x, None)[0]
    adapter = group[0].adapter
    assert adapter is not None
    with torch.no_grad():
        adapter.lora_B += 1
    assert torch.equal(fused(x, None)[0], before)  # the control: columns that are not brought up to date are stale
    refresh([fused], torch.float64)
    assert relative_error(fused(x, None)[0], group[0](x)) < 1e-10


def test_a_disabled_or_removed_adapter_is_gone() -> None:
    group = layers()
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    fused = FusedLinear(*group)
    for change in ("none", "disabled", "removed"):
        for layer in group:
            assert layer.adapter is not None
            if change == "disabled":
                layer.adapter.enabled = False
            if change == "removed":
                layer.adapter = None
        refresh([fused], torch.float64)
        assert fused.ready
        for ours, layer in zip(fused(x, None), group, strict=True):
            assert relative_error(ours, layer(x)) < 1e-10
        if change == "disabled":
            assert (
                relative_error(fused(x, None)[0], torch.nn.functional.linear(x, group[0].weight, group[0].bias)) < 1e-10
            )
            for layer in group:
                assert layer.adapter is not None
                layer.adapter.enabled = True


@pytest.mark.parametrize("reason", ["learns", "precision", "some adapted"])
def test_what_cannot_be_fused_is_not_ready(reason: str) -> None:
    group = layers(adapted=(True, False, True) if reason == "some adapted" else (True, True, True))
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    fused = FusedLinear(*group)
    if reason == "learns":
        group[1].weight.requires_grad_(True)
    refresh([fused], torch.float32 if reason == "precision" else torch.float64)
    assert not fused.ready
    with pytest.raises(AssertionError, match="each layer"):
        fused(x, None)


def test_weights_that_were_replaced_are_laid_out_again() -> None:
    group = layers()
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    group[1].weight = torch.nn.Parameter(torch.ones_like(group[1].weight), requires_grad=False)
    assert group[0].bias is not None
    group[0].bias = torch.nn.Parameter(torch.ones_like(group[0].bias), requires_grad=False)
    refresh([fused], torch.float64)
    for ours, layer in zip(fused(x, None), group, strict=True):
        assert relative_error(ours, layer(x)) < 1e-10


def test_adapters_of_smaller_ranks_leave_the_weights_where_they_are() -> None:
    group = layers()
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    addresses = fused.addresses
    smaller = replace(LORA, r=1)
    for layer, like in zip(group, layers(lora=smaller), strict=True):
        layer.adapter = like.adapter
    for adapted in (True, False, True):
        for layer in group:
            assert layer.adapter is not None
            layer.adapter.enabled = adapted
        refresh([fused], torch.float64)
        assert fused.addresses == addresses
        for ours, layer in zip(fused(x, KEYS), group, strict=True):
            assert relative_error(ours, layer(x, KEYS)) < 1e-10
    for layer, like in zip(group, layers(lora=replace(LORA, r=3)), strict=True):  # the control: larger ones do not
        layer.adapter = like.adapter
    refresh([fused], torch.float64)
    assert fused.addresses != addresses
    assert relative_error(fused(x, KEYS)[1], group[1](x, KEYS)) < 1e-10


@pytest.mark.parametrize("keys", [KEYS, None], ids=["dropout", "none"])
@pytest.mark.parametrize("lora", [LORA, UNEQUAL], ids=["alike", "unequal"])
def test_products_to_rank_at_once_equal_those_one_by_one(keys: Tensor | None, lora: AdapterConfig) -> None:
    adapters = [layer.adapter for layer in layers(lora=lora) if layer.adapter is not None]
    assert (len({adapter.scale for adapter in adapters}) > 1) == (lora is UNEQUAL)
    x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def found(to_rank: Callable[..., Tensor]) -> list[Tensor]:
        y = to_rank(adapters, x, keys)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        return [y, *torch.autograd.grad((y * weights).sum(), [x, *(adapter.lora_A for adapter in adapters)])]

    together, one_by_one = found(to_rank_at_once), found(to_rank_one_by_one)
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    for adapter in adapters:  # the control: each has its own mask
        adapter.channel_keys = adapters[0].channel_keys
    assert (relative_error(found(to_rank_at_once)[0], together[0]) > 1e-3) == (keys is not None)


def test_a_sum_of_products_adds_in_place_to_its_own_memory_alone() -> None:
    d_y = [torch.randn(5, 4) for _ in range(3)]
    weights = [torch.randn(4, 6) for _ in range(3)]
    before = [x.clone() for x in (*d_y, *weights)]
    total = sum_of_products(d_y, weights)
    expected = sum((d @ w for d, w in zip(d_y, weights, strict=True)), torch.zeros(5, 6))
    assert relative_error(total, expected) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, (*d_y, *weights), strict=True))


def test_a_pass_in_another_precision_leaves_the_weights_where_they_are() -> None:
    """The fp32 reference of R3F's noise, between two runs: graphs that were recorded go on reading those addresses."""
    group = layers()
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    before = fused.addresses
    refresh([fused], torch.float32)
    refresh([fused], torch.float64)
    assert fused.ready and fused.addresses == before
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    for ours, layer in zip(fused(x, None), group, strict=True):
        assert relative_error(ours, layer(x)) < 1e-10
    fused.release()  # the control: what is forgotten is laid out anew
    refresh([fused], torch.float64)
    assert fused.addresses != before


def test_weights_that_begin_to_learn_are_held_once_and_a_copy_stands_alone() -> None:
    group = layers(adapted=(False, False, False))
    fused = FusedLinear(*group)
    refresh([fused], torch.float64)
    other = copy.deepcopy(fused)
    storage = weakref.ref(fused._storage)
    for layer in group:
        layer.weight.data = layer.weight.data.clone()
        layer.requires_grad_(True)
    assert storage() is not None
    refresh([fused], torch.float64)
    assert storage() is None and not fused.ready
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    # A copy whose weights happen to lie where the original's once lay is told apart by its own storage.
    other._laid_out = (0, *other.addresses[1:])
    other.layers[0].weight.data.fill_(1.0)
    refresh([other], torch.float64)
    assert relative_error(other(x, None)[0], other.layers[0](x)) < 1e-10
