"""Held-out loss: the mean over the supervised tokens of all rows together, whatever the packs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from minipersona.chat import Document
from minipersona.errors import UserError
from minipersona.model.load import load_model
from minipersona.training.heldout import heldout_loss


@pytest.mark.parametrize("pack_tokens", [1, 40, 1000])
def test_held_out_loss_is_the_mean_over_supervised_tokens(
    hf_model: Callable[..., Path], documents: list[Document], pack_tokens: int
) -> None:
    """Against transformers, a document at a time."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(hf_model(), dtype=torch.float64)
    sums, supervised, tokens = [], 0, 0
    with torch.no_grad():
        for document in documents:
            rows = torch.from_numpy(document.supervised[1:]).nonzero()[:, 0]
            ids = torch.from_numpy(document.ids.astype("int64"))
            logits = theirs(ids[None]).logits[0, rows]
            sums.append(float(F.cross_entropy(logits, ids[rows + 1], reduction="sum")))
            supervised, tokens = supervised + len(rows), tokens + len(ids)
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    found = torch.tensor(heldout_loss(model, documents, pack_tokens))
    assert relative_error(found, torch.tensor(sum(sums) / supervised)) < 1e-6
    # The controls: the mean over all tokens, and the mean of the documents' means, are other numbers.
    assert relative_error(found, torch.tensor(sum(sums) / tokens)) > 0.1
    means = [s / max(1, int(d.supervised[1:].sum())) for s, d in zip(sums, documents, strict=True)]
    assert relative_error(found, torch.tensor(sum(means) / len(means))) > 1e-4


def test_held_out_rows_without_a_supervised_token_are_an_error(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    silent = [Document(d.ids, d.supervised & False, False) for d in documents]
    with pytest.raises(UserError, match="the held-out rows have no supervised token"):
        heldout_loss(model, silent, 1000)
