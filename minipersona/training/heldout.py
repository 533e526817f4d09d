"""Held-out loss: nats per supervised token, pooled over all rows; dropout and steering off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minipersona.chat import Document
from minipersona.corpus.batch import pack_documents
from minipersona.errors import UserError
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack, split
from minipersona.objective.cross_entropy import cross_entropy
from minipersona.training.memory import Budget


@torch.no_grad()
def heldout_loss(model: Qwen2, documents: Sequence[Document], pack_tokens: int, compiled: bool = False) -> float:
    """The mean cross-entropy, in nats, over all supervised tokens of `documents` together (not a mean of means).

    UserError if there is none.
    """
    useful = sorted((d for d in documents if d.supervised.any()), key=len)  # similar lengths in a pack waste no work
    if not useful:
        raise UserError("the held-out rows have no supervised token; raise data.max_tokens or choose other rows")

    def summed(packs: Sequence[Pack]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for pack in packs:
            pack = pack.to(model.device)
            hidden = model(pack)[pack.supervised]  # (N, D)
            total += cross_entropy(hidden, model.lm_head.weight, pack.targets[pack.supervised], compiled=compiled)
        return total

    packs = [pack_documents([useful[i] for i in group]) for group in split([len(d) for d in useful], pack_tokens)]
    return float(Budget(pack_tokens).fit(summed, packs)) / sum(int(d.supervised.sum()) for d in useful)
