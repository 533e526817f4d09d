"""Losses of documents without training on them, by token, by document and pooled. Dropout and steering are off.

R = documents, N = supervised tokens of a pack, n = those of a document
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minipersona.chat import Document
from minipersona.corpus.batch import pack_documents
from minipersona.errors import UserError
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack, split
from minipersona.objective.cross_entropy import token_losses
from minipersona.training.memory import Budget


def heldout_loss(model: Qwen2, documents: Sequence[Document], pack_tokens: int) -> float:
    """The mean cross-entropy, in nats, over all supervised tokens of `documents` together (not a mean of means).

    UserError if there is none.
    """
    return pooled(*document_losses(model, documents, pack_tokens))


def pooled(nats: Tensor, tokens: Tensor) -> float:
    """The mean over all supervised tokens, from what `document_losses` gives. UserError if there is none."""
    if not (count := int(tokens.sum())):
        raise UserError("the held-out rows have no supervised token; raise data.max_tokens or choose other rows")
    return float(nats.sum()) / count


def document_losses(model: Qwen2, documents: Sequence[Document], pack_tokens: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy summed over each document's supervised tokens, in nats, and how many these are.

    (R,) fp64 and (R,) int64, on the CPU; zeros for a document without supervised tokens.
    """
    losses = supervised_losses(model, documents, pack_tokens)
    nats = torch.tensor([float(own.sum()) for own in losses], dtype=torch.float64)
    return nats, torch.tensor([len(own) for own in losses], dtype=torch.int64)


@torch.no_grad()
def supervised_losses(model: Qwen2, documents: Sequence[Document], pack_tokens: int) -> list[Tensor]:
    """The cross-entropy of every supervised token in nats: of each document (n,) fp64 on the CPU, in its order.

    pack_tokens  most tokens of one forward pass
    """
    counts = [int(document.supervised.sum()) for document in documents]
    # Similar lengths in a pack waste no work.
    useful = sorted((i for i in range(len(documents)) if counts[i]), key=lambda i: len(documents[i]))

    def computed(packs: Sequence[Pack]) -> list[Tensor]:
        found = [torch.empty(0, dtype=torch.float64)] * len(documents)
        parts = []
        for pack in packs:
            here = pack.to(model.device)
            states = model(here, last_rows=here.supervised)  # (N, D)
            parts.append(token_losses(states, model.lm_head.weight, here.targets[here.supervised]))  # (N,)
        for pack, losses in zip(packs, parts, strict=True):  # the host waits for the device only here
            rows = pack.documents.tolist()
            for row, own in zip(rows, losses.double().cpu().split([counts[row] for row in rows]), strict=True):
                found[row] = own
        return found

    groups = [[useful[i] for i in group] for group in split([len(documents[i]) for i in useful], pack_tokens)]
    packs = [pack_documents([documents[i] for i in group], group) for group in groups]
    return Budget(pack_tokens).fit(computed, packs)
