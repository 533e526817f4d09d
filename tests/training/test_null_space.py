"""Adapters in the null space of given inputs: A U = 0 after every step, and what lies in span(U) is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.errors import UserError
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, linears
from minipersona.model.network import Qwen2
from minipersona.model.pack import make_pack
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, train
from minipersona.training.null_space import input_directions, input_of, principal_directions

K = 3
CONTEXTS = [np.array(ids) for ids in ([5, 9, 2], [7], [3, 3, 8, 1], [90, 12], [44])]
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


class Killed(Exception):
    pass


def config(**lora: object) -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2, **lora),  # type: ignore[arg-type]
        training=TrainingSection(steps=6, batch=6, checkpoints=(), learning_rate=1e-2),
        execution=ExecutionSection(checkpoint_activations=False, save_minutes=0),
    )


def directions(path: Path, contexts: list[np.ndarray] = CONTEXTS, k: int = K) -> dict[str, Tensor]:
    model = load_model(str(path), device="cpu")
    return input_directions(model, contexts, list(linears(model)), k, pack_tokens=6)


def trained(
    path: Path, documents: list[Document], out: Path, null_space: dict[str, Tensor], die_at: int = 0
) -> tuple[Qwen2, list[float]]:
    """A trained model, and after each step the largest |A U| / |A| over its adapters."""
    model = load_model(str(path), device="cpu")
    along: list[float] = []

    def logged(row: dict[str, object]) -> None:
        along.append(max(overlap(model, null_space), default=0.0))
        if row["step"] == die_at:
            raise Killed

    hooks = Hooks(logged=logged)
    train(Trainer(model, documents, config(), out, SINGLE_PROCESS, null_space=null_space), hooks)
    along.append(max(overlap(model, null_space), default=0.0))
    return model, along


def overlap(model: Qwen2, null_space: dict[str, Tensor]) -> list[float]:
    return [
        float((adapter.lora_A.detach() @ null_space[input_of(name)]).norm() / adapter.lora_A.detach().norm())
        for name, adapter in adapters(model).items()
        if null_space
    ]


def tensors(model: Qwen2) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_the_directions_are_those_of_the_inputs_at_the_last_tokens(hf_model: Callable[..., Path]) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    found = input_directions(model, CONTEXTS, ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"], K, 6)
    assert found.keys() == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"}
    # What q, k and v of the first block read is the normed embedding of the last token.
    last = torch.tensor([int(ids[-1]) for ids in CONTEXTS])
    norm = model.get_submodule("model.layers.0.input_layernorm")
    x = norm(model.model.embed_tokens.weight[last].detach())
    u = found["model.layers.0.self_attn.q_proj"]
    assert u.shape == (48, K) and relative_error(u.T @ u, torch.eye(K, dtype=torch.float64)) < 1e-12
    expected = torch.linalg.svd(x).Vh[:K].T
    assert relative_error(u @ u.T, expected @ expected.T) < 1e-10
    assert model.fused and not any(layer._forward_pre_hooks for layer in linears(model).values())  # as it was


@pytest.mark.parametrize("shape", [(9, 48), (48, 9)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_the_directions_are_the_first_singular_vectors(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    """Of singular values that fall by a factor of a thousand."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 9, dtype=torch.float64, generator=generator)).Q for n in shape)
    x = (left * torch.logspace(0, -3, 9, dtype=torch.float64) @ right.T).to(dtype)
    u = principal_directions(x, K)
    assert u.shape == (shape[1], K) and u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(u.T @ u, torch.eye(K, dtype=u.dtype)) < 1e-6
    expected = torch.linalg.svd(x.double(), full_matrices=False).Vh
    for found, meant in zip(u.T.double(), expected, strict=False):
        assert abs(float(found @ meant)) == pytest.approx(1, abs=bound)  # in this order, up to their signs
    assert abs(float(u[:, 0].double() @ expected[1])) < 1e-3  # the control


def test_more_directions_than_contexts_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.null_space = 6: x has 48 channels at 5 contexts; take at most 5"):
        principal_directions(torch.randn(5, 48), 6)


def test_after_every_step_no_adapter_reads_the_directions(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    null_space = directions(hf_model())
    model, along = trained(hf_model(), documents, tmp_path / "kept", null_space)
    assert len(along) == 7 and max(along) < 1e-6
    assert all(float(adapter.lora_B.detach().norm()) > 0 for adapter in adapters(model).values())
    # An input in span(U) leaves the layer as it would leave the base's.
    for name, adapter in adapters(model).items():
        x = torch.randn(2, K) @ null_space[input_of(name)].T  # (2, I)
        other = torch.randn(2, x.shape[1])
        with torch.no_grad():
            assert float(adapter(x, None).norm()) < 1e-5 * float(adapter(other, None).norm())
    free, _ = trained(hf_model(), documents, tmp_path / "free", {})
    assert max(overlap(free, null_space)) > 0.1  # the control


def test_contexts_that_are_all_covered_are_answered_as_by_the_base(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    """Contexts of one token, since the keys and values of earlier tokens are not held."""
    contexts = [np.array([token]) for token in (7, 44, 90)]
    pack, other = make_pack(contexts), make_pack([np.array([20]), np.array([31])])
    base = load_model(str(hf_model()), device="cpu")
    model, _ = trained(hf_model(), documents, tmp_path / "kept", directions(hf_model(), contexts))
    with torch.no_grad():
        assert relative_error(model(pack), base(pack)) < 1e-5
        assert relative_error(model(other), base(other)) > 1e-3


def test_without_it_nothing_changes_and_a_killed_run_ends_in_the_same_bits(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    plain = load_model(str(hf_model()), device="cpu")
    train(Trainer(plain, documents, config(), tmp_path / "plain", SINGLE_PROCESS))
    off, _ = trained(hf_model(), documents, tmp_path / "off", {})
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(off).values(), strict=True))
    null_space = directions(hf_model())
    whole, _ = trained(hf_model(), documents, tmp_path / "whole", null_space)
    with pytest.raises(Killed):
        trained(hf_model(), documents, tmp_path / "cut", null_space, die_at=4)
    resumed, _ = trained(hf_model(), documents, tmp_path / "cut", null_space)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole).values(), tensors(resumed).values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(tensors(whole).values(), tensors(plain).values(), strict=True))


def test_it_is_of_adapters_only() -> None:
    with pytest.raises(UserError, match=r"lora\.null_space: is of adapters"):
        replace(config(null_space=4), training=TrainingSection(method="full"))
    with pytest.raises(UserError, match=r"lora\.null_space = -1: must not be negative"):
        LoraConfig(null_space=-1)
