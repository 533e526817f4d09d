"""The last block computes its MLP where it is read; nothing else may change by that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error

from minipersona.config import LoraConfig
from minipersona.geometry.extraction import Tails
from minipersona.model.dropout import token_keys
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import make_pack

PACK = make_pack([np.arange(1, 9), np.arange(20, 23), np.arange(5, 17)])
ROWS = torch.tensor([0, 3, 4, 9, 10, 11, 20])


@pytest.fixture
def model(hf_model: Callable[..., Path]) -> Qwen2:
    model = apply_lora(load_model(str(hf_model()), device="cpu", dtype=torch.float64), LoraConfig(rank=4, dropout=0.3))
    for adapter in adapters(model).values():
        adapter.double().lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("stop_after", [None, 0])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_states_and_gradients_are_those_of_all_rows(model: Qwen2, stop_after: int | None, checkpointed: bool) -> None:
    keys, learned = token_keys(0, 1, PACK), [p for p in model.parameters() if p.requires_grad]

    def states(rows: torch.Tensor | None) -> torch.Tensor:
        return model(
            PACK, stop_after=stop_after, dropout_keys=keys, checkpoint_activations=checkpointed, last_rows=rows
        )

    def found(h: torch.Tensor) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(h.sin().sum(), learned, allow_unused=True)
        return [h, *(g for g in gradients if g is not None)]

    whole = found(states(None)[ROWS])
    ours = found(states(ROWS))
    assert len(ours) == len(whole) > 7
    assert max(map(relative_error, ours, whole)) < 1e-10
    # The controls: other rows, and rows without their dropout.
    assert relative_error(states(ROWS + 1), whole[0]) > 1e-3
    assert relative_error(model(PACK, stop_after=stop_after, last_rows=ROWS), whole[0]) > 1e-3


def test_the_last_tokens_of_each_document_are_read() -> None:
    tails = Tails(PACK, [3, 1, 2])
    assert tails.rows.tolist() == [5, 6, 7, 10, 21, 22]
    h = torch.arange(6.0)[:, None]
    assert tails.mean(h)[:, 0].tolist() == [1.0, 3.0, 4.5]
