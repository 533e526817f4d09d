"""Cross-entropy of the next token, summed.

    L = sum_t  -log p(y_t | y_<t),      p = softmax(z)
    dL/dz = p - onehot(y_t)

C = tokens of a chunk, D = width, V = vocabulary, N = supervised tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.network import Qwen2
from minipersona.model.pack import IGNORE, Pack
from minipersona.objective.head import CHUNK, ForwardPass, head_logits, log_probabilities, through_head


@dataclass(frozen=True)
class CrossEntropy:
    """Plain SFT, an `Objective`: one pass through the network."""

    weight: ClassVar[float] = 0.0
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy")
    copies: ClassVar[int] = 1

    def __call__(self, model: Qwen2, pack: Pack, forward: ForwardPass) -> tuple[Tensor, Tensor]:
        keys, pack = forward.keys(model, pack), pack.to(model.device)
        states, targets = forward.states(model, pack, keys), pack.targets[pack.supervised]
        loss = cross_entropy(states, model.lm_head.weight, targets, compiled=forward.compiled)
        return loss, loss.detach().expand(2)


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK, compiled: bool = False
) -> Tensor:
    """The summed cross-entropy in nats, a scalar in fp32 or better; the caller divides, once a step.

    hidden    (N, D) the states that predict, after the final norm
    weight    (V, D) of the head, in any precision: it is cast to hidden's
    targets   (N,) int64; IGNORE: this row counts for nothing
    compiled  fuse the passes over a chunk's logits (worth it on CUDA)
    """
    loss, _ = through_head(_rule, [hidden], weight, targets, chunk=chunk, compiled=compiled)
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """-log p of each target in nats, (N,) in fp32 or better, without gradient; arguments as above."""
    head = weight.to(hidden.dtype)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(head_logits(h, head), y, reduction="none") for h, y in pieces])


def _rule(logits: Tensor, targets: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor]]:
    """The rule (`head.Rule`) of the equation above; its only term is the loss."""
    loss, slope = loss_and_slope(log_probabilities(logits), targets)
    return loss.view(1), (slope.to(dtype),)


def loss_and_slope(log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p (C, V), targets (C,) -> the summed -log p(target), (), and p - onehot(target), (C, V).

    A target of IGNORE adds nothing to the sum; its row of the slope means nothing (`through_head`).
    """
    log_p_target = log_p.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)  # (C,)
    loss = -log_p_target.masked_fill(targets == IGNORE, 0.0).sum()
    is_target = torch.arange(log_p.shape[-1], device=log_p.device) == targets[:, None]  # (C, V)
    return loss, log_p.exp() - is_target.to(log_p.dtype)
