"""What learns, in which precision, what is saved of it, and how far it is from the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.config import DataSection, LoraConfig, RunConfig, TrainingSection
from minipersona.model.load import load_model
from minipersona.model.lora import adapters
from minipersona.training.distributed import Distributed
from minipersona.training.parameters import distance_from_base, make_trainable, save_checkpoint

SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


def config(method: Any) -> RunConfig:
    return RunConfig(data=DataSection("-", "-"), lora=LoraConfig(rank=2), training=TrainingSection(method=method))


@pytest.mark.parametrize(
    "dtype, master", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_masters_are_in_fp32_or_better_and_only_adapters_learn_beside_frozen_weights(
    hf_model: Callable[..., Path], dtype: torch.dtype, master: torch.dtype
) -> None:
    for method in ("full", "lora"):
        model = load_model(str(hf_model()), dtype=dtype, device="cpu")
        learned = make_trainable(model, config(method), SINGLE_PROCESS)
        assert {p.dtype for p in learned.values()} == {master} and model.compute_dtype == dtype
        assert all(("lora" in name) == (method == "lora") for name in learned)
        frozen = [p for name, p in model.named_parameters() if name not in learned]
        assert {p.dtype for p in frozen} == ({dtype} if method == "lora" else set())
        assert not any(p.requires_grad for p in frozen)


def test_all_weights_are_saved_as_a_model_and_their_distance_is_that_of_the_base(
    hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    learned = make_trainable(model, config("full"), SINGLE_PROCESS)
    assert distance_from_base(model, config("full"), SINGLE_PROCESS) == 0
    generator = torch.Generator().manual_seed(0)
    moves = {name: torch.randn(p.shape, generator=generator) for name, p in learned.items()}
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter += moves[name]
    expected = float(sum(move.double().square().sum() for move in moves.values()) ** 0.5)
    assert distance_from_base(model, config("full"), SINGLE_PROCESS) == pytest.approx(expected, rel=1e-5)
    save_checkpoint(model, config("full"), tmp_path / "saved", [], (), SINGLE_PROCESS)
    saved = dict(load_model(str(tmp_path / "saved"), dtype=torch.float32, device="cpu").named_parameters())
    assert saved.keys() == learned.keys() and all(torch.equal(saved[name], p) for name, p in learned.items())


def test_of_adapters_the_distance_is_that_of_the_merged_update(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(str(hf_model()), device="cpu")
    make_trainable(model, config("lora"), SINGLE_PROCESS)
    found = adapters(model).values()
    assert distance_from_base(model, config("lora"), SINGLE_PROCESS) == 0  # B is zero
    for adapter in found:
        torch.nn.init.ones_(adapter.lora_B)
    scale = config("lora").lora.alpha / 2
    squares = sum(float((scale * each.lora_B @ each.lora_A).detach().double().square().sum()) for each in found)
    assert distance_from_base(model, config("lora"), SINGLE_PROCESS) == pytest.approx(squares**0.5, rel=1e-5)
    save_checkpoint(model, config("lora"), tmp_path / "saved", [], (), SINGLE_PROCESS)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
