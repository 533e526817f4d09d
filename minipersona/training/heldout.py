"""Losses of documents without training on them: summed by document, and pooled. Dropout and steering are off.

R = documents, N = supervised tokens of a pack
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


@torch.no_grad()
def document_losses(model: Qwen2, documents: Sequence[Document], pack_tokens: int) -> tuple[Tensor, Tensor]:
    """Of each document the cross-entropy summed over its supervised tokens, in nats, and how many these are.

    (R,) fp64 and (R,) int64, on the CPU; zeros for a document without supervised tokens.

    pack_tokens  most tokens of one forward pass
    """
    tokens = torch.tensor([int(document.supervised.sum()) for document in documents], dtype=torch.int64)
    # Similar lengths in a pack waste no work.
    useful = sorted((i for i in range(len(documents)) if tokens[i]), key=lambda i: len(documents[i]))

    def summed(packs: Sequence[Pack]) -> Tensor:
        nats = torch.zeros(len(documents), dtype=torch.float64, device=model.device)
        for pack in packs:
            pack = pack.to(model.device)
            states = model(pack, last_rows=pack.supervised)  # (N, D)
            losses = token_losses(states, model.lm_head.weight, pack.targets[pack.supervised])  # (N,)
            within = torch.searchsorted(pack.boundaries.long(), pack.supervised, right=True) - 1  # (N,) of the pack
            nats.index_add_(0, pack.documents[within], losses.double())
        return nats

    groups = [[useful[i] for i in group] for group in split([len(documents[i]) for i in useful], pack_tokens)]
    packs = [pack_documents([documents[i] for i in group], group) for group in groups]
    return Budget(pack_tokens).fit(summed, packs).cpu(), tokens


def pooled(nats: Tensor, tokens: Tensor) -> float:
    """The mean over all supervised tokens, from what `document_losses` gives. UserError if there is none."""
    if not (count := int(tokens.sum())):
        raise UserError("the held-out rows have no supervised token; raise data.max_tokens or choose other rows")
    return float(nats.sum()) / count
