"""Every family against transformers, and LoRA against peft: logits and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, relative_error
from parity import reference
from torch import Tensor

from minipersona.config import LoraConfig
from minipersona.model import network
from minipersona.model.adapter_config import AdapterConfig
from minipersona.model.adapter_files import load_adapter, save_adapter
from minipersona.model.attention import rotate
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_disabled, adapters, apply_lora, merge_adapter
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model

IDS = torch.randint(0, 160, (3, 19), generator=torch.Generator().manual_seed(1))
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_equal_transformers(hf_model: Callable[..., Path], family: str, tied: bool, shards: int) -> None:
    directory = hf_model(tied, shards, family=family)
    expected = reference(directory)(IDS).logits
    assert (load_model(str(directory)).logits(IDS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_is_the_same_model_to_transformers(
    hf_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    directory = hf_model(family == "smollm2", family=family)
    save_model(load_model(str(directory)), tmp_path / "saved")
    theirs, again = reference(directory), reference(tmp_path / "saved")
    assert type(again) is type(theirs)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    assert load_model(str(tmp_path / "saved")).config == load_model(str(directory)).config


def without_scaling(model: Qwen2) -> None:
    model.config = replace(model.config, rope_scaling=None)


def without_norms(model: Qwen2) -> None:
    for block in model.blocks:
        block.self_attn.q_norm = block.self_attn.k_norm = None


def norms_exchanged(model: Qwen2) -> None:
    for block in model.blocks:
        block.self_attn.q_norm, block.self_attn.k_norm = block.self_attn.k_norm, block.self_attn.q_norm


def without_biases(model: Qwen2) -> None:
    for block in model.blocks:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            layer.bias = None


def half_the_head_width(model: Qwen2) -> None:
    model.config = replace(model.config, head_dim=model.config.head_dim // 2)
    for block in model.blocks:
        block.self_attn.head_dim //= 2


@pytest.mark.parametrize(
    "family, change",
    [
        ("qwen2", without_biases),
        ("llama", without_scaling),
        ("llama", half_the_head_width),
        ("qwen3", without_norms),
        ("qwen3", norms_exchanged),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_control_what_makes_a_family_left_out_fails_the_same_bound(
    hf_model: Callable[..., Path], family: str, change: Callable[[Qwen2], None]
) -> None:
    directory = hf_model(family=family)
    expected, model = reference(directory)(IDS).logits, load_model(str(directory))
    change(model)
    assert (model.logits(IDS) - expected).abs().max() > 1e-4


def test_gradients_of_all_parameters_equal_transformers(hf_model: Callable[..., Path], family: str) -> None:
    directory = hf_model(tied=True, family=family)
    ours, theirs = load_model(str(directory), dtype=torch.float64), reference(directory, torch.float64)
    weights = torch.linspace(-1, 1, IDS.numel() * 160, dtype=torch.float64).view(3, 19, 160)
    (ours.requires_grad_(True).logits(IDS) * weights).sum().backward()
    (theirs(IDS).logits * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    assert max(errors.values()) < 1e-10, max(errors.items(), key=lambda item: item[1])


def test_control_rotary_halves_swapped_fails_the_same_bound(
    hf_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = hf_model()
    expected = reference(directory)(IDS).logits

    def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The other convention: channel 2i is paired with channel 2i + 1."""
        first, second = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin

    monkeypatch.setattr(network, "rotate", interleaved)
    assert (load_model(str(directory)).logits(IDS) - expected).abs().max() > 1e-4
    monkeypatch.setattr(network, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    assert (load_model(str(directory)).logits(IDS) - expected).abs().max() > 1e-4


def adapted_pair(directory: Path, dtype: torch.dtype) -> tuple[Qwen2, torch.nn.Module]:
    """Our model and peft's with the same random A and B."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    ours = apply_lora(load_model(str(directory), dtype=dtype), LORA)
    theirs = get_peft_model(
        reference(directory, dtype),
        PeftConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=list(LORA.targets)),
        autocast_adapter_dtype=False,
    ).to(dtype)
    state = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            adapter.lora_B.normal_(0, 0.1, generator=generator)  # at zero, half of the gradients would vanish
            for factor in ("lora_A", "lora_B"):
                state[f"base_model.model.{name}.{factor}.default.weight"].copy_(getattr(adapter, factor))
    return ours, theirs


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_lora_gradients_equal_peft(
    hf_model: Callable[..., Path], family: str, dtype: torch.dtype, bound: float
) -> None:
    ours, theirs = adapted_pair(hf_model(family=family), dtype)
    weights = torch.linspace(-1, 1, IDS.numel() * 160, dtype=dtype).view(3, 19, 160)
    (ours.logits(IDS) * weights).sum().backward()
    (theirs(IDS).logits * weights).sum().backward()
    state = dict(theirs.named_parameters())
    errors = {
        f"{name}.{factor}": relative_error(
            getattr(adapter, factor).grad, state[f"base_model.model.{name}.{factor}.default.weight"].grad
        )
        for name, adapter in adapters(ours).items()
        for factor in ("lora_A", "lora_B")
    }
    assert len(errors) == 3 * 7 * 2
    assert max(errors.values()) < bound, max(errors.items(), key=lambda item: item[1])
    # Nothing but the adapters learns, the tied or untied head least of all.
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
        name for name, p in ours.named_parameters() if "lora_" in name
    }


def test_control_a_root_in_the_scale_fails_the_gradient_bound(hf_model: Callable[..., Path]) -> None:
    ours, theirs = adapted_pair(hf_model(), torch.float64)
    for adapter in adapters(ours).values():
        adapter.scale = LORA.alpha / LORA.rank**0.5  # rsLoRA's
    ours.logits(IDS).square().sum().backward()
    theirs(IDS).logits.square().sum().backward()
    state = dict(theirs.named_parameters())
    name = "model.layers.0.mlp.up_proj"
    expected = state[f"base_model.model.{name}.lora_B.default.weight"].grad
    assert relative_error(adapters(ours)[name].lora_B.grad, expected) > 1e-2


def test_our_adapter_loads_in_peft(hf_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    from peft import PeftModel

    ours, _ = adapted_pair(hf_model(family=family), torch.float32)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(reference(hf_model(family=family)), tmp_path / "adapter").eval()
    assert (ours.logits(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    with adapter_disabled(ours):  # the control: without the adapter the logits are others
        assert (ours.logits(IDS) - theirs(IDS).logits).abs().max() > 1e-2


def test_peft_adapter_loads_in_ours(hf_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    _, theirs = adapted_pair(hf_model(family=family), torch.float32)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(str(hf_model(family=family)))
    base = ours.logits(IDS)
    load_adapter(ours, tmp_path / "adapter")
    assert ours.lora is not None and set(ours.lora.target_modules) == set(LORA.targets)
    assert replace(ours.lora, target_modules=LORA.targets) == AdapterConfig.of(LORA, blocks=3)
    assert (ours.logits(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    assert (base - theirs(IDS).logits).abs().max() > 1e-2


def test_merged_equals_unmerged(hf_model: Callable[..., Path]) -> None:
    ours, _ = adapted_pair(hf_model(tied=True), torch.float32)
    unmerged = ours.logits(IDS)
    merged = merge_adapter(ours).logits(IDS)
    assert (merged - unmerged).abs().max() < 1e-4
    assert not adapters(ours)


def test_merging_in_bf16_rounds_each_weight_once(hf_model: Callable[..., Path]) -> None:
    ours, _ = adapted_pair(hf_model(), torch.float32)
    exact = {name: ours.get_submodule(name).weight + a.delta() for name, a in adapters(ours).items()}
    half = load_model(str(hf_model()), dtype=torch.bfloat16)
    apply_lora(half, LORA)
    for name, adapter in adapters(half).items():
        adapter.load_state_dict(adapters(ours)[name].state_dict())
    stored = {name: half.get_submodule(name).weight.float() for name in exact}
    deltas = {name: a.delta() for name, a in adapters(half).items()}
    merge_adapter(half)
    for name in exact:
        assert torch.equal(half.get_submodule(name).weight, (stored[name] + deltas[name]).bfloat16())
    # The control: a sum in bf16 rounds the update first, and differs somewhere.
    assert any(
        not torch.equal(half.get_submodule(n).weight, stored[n].bfloat16() + deltas[n].bfloat16()) for n in exact
    )
