"""Cross-entropy, and a Kullback-Leibler divergence that holds the trained model p near its base q.

    L = sum_t  -log p(y_t | y_<t) + beta KL(p_t, q_t)          over the supervised tokens t

The base is a constant: gradients go through p only. With g = log p - log q and p = softmax(z), KL(p, q) is one of

    forward    KL(p || q) = sum_v p g            d/dz = p (g - sum_v p g)
    reverse    KL(q || p) = -sum_v q g           d/dz = p - q
    symmetric  KL_S = KL(p || q) + KL(q || p)    the sum of both

KL_S is computed as sum_v (p - q) g, whose summands are all non-negative and of second order near p = q. The one-sided
sums have summands of first order and of both signs: below about 1e-7 nats they are rounding in fp32.

N = supervised tokens, C = tokens of a chunk, D = width, V = vocabulary
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from minipersona.model.acceleration.compiler import compile_blocks
from minipersona.model.lora import adapter_disabled
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.cross_entropy import loss_and_slope
from minipersona.objective.head import CHUNK, ForwardPass, Reference, log_probabilities, through_head

Direction = Literal["symmetric", "forward", "reverse"]


@dataclass(frozen=True)
class KLToBase:
    """An `Objective`: a pass through the base without gradients, then one through the model that learns.

    weight  beta
    frozen  the base, if all weights learn; otherwise it is the model without its adapters. No dropout, no taps
    """

    weight: float
    direction: Direction
    frozen: Qwen2 | None = None
    likelihood: float = 1.0  # factor of the cross-entropy
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl")
    copies: ClassVar[int] = 1

    def __call__(self, model: Qwen2, pack: Pack, forward: ForwardPass) -> tuple[Tensor, Tensor]:
        keys, pack = forward.keys(model, pack), pack.to(model.device)
        base = self.frozen or model
        # First, so that its activations are freed before the graph of the other pass exists.
        with torch.no_grad(), contextlib.nullcontext() if self.frozen else adapter_disabled(model):
            reference = Reference(base(pack)[pack.supervised], base.lm_head.weight)
        return kl_to_base(
            forward.states(model, pack, keys), model.lm_head.weight, pack.targets[pack.supervised], reference,
            beta=self.weight, likelihood=self.likelihood, direction=self.direction, compiled=forward.compiled,
        )  # fmt: skip


def frozen_copy(model: Qwen2, compiled: bool) -> Qwen2:
    """A copy of the base that stays as it is while all weights of `model` learn."""
    base = copy.deepcopy(model).requires_grad_(False)
    base.refresh_fused_weights()  # the copy holds an earlier layout beside weights that are no longer views of it
    if compiled:
        compile_blocks(base)
    return base


def kl_to_base(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    base: Reference,
    *,
    beta: float,
    likelihood: float = 1.0,
    direction: Direction = "symmetric",
    chunk: int = CHUNK,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The summed loss (), and (loss, cross-entropy, divergence before beta), (3,), summed, in nats, without gradient.

    hidden    (N, D) the trained model's states that predict, after the final norm
    weight    (V, D) of its head, in any precision
    targets   (N,) int64
    base      the base's states of the same tokens, and its head
    likelihood  factor of the cross-entropy in the loss
    """
    return through_head(
        _rule, [hidden], weight, targets, chunk=chunk, compiled=compiled, reference=base, beta=beta,
        likelihood=likelihood, direction=direction,
    )  # fmt: skip


def _rule(
    logits: Tensor, base_logits: Tensor, targets: Tensor, *, beta: float, likelihood: float, direction: Direction,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor]]:  # fmt: skip
    log_p, log_q = log_probabilities(logits), log_probabilities(base_logits)  # (C, V)
    cross_entropy, ce_slope = loss_and_slope(log_p, targets)
    divergence, kl_slope = divergence_and_slope(log_p, log_q, direction)
    terms = torch.stack([likelihood * cross_entropy + beta * divergence, cross_entropy, divergence])
    return terms, ((likelihood * ce_slope + beta * kl_slope).to(dtype),)


def divergence_and_slope(log_p: Tensor, log_q: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """log p, log q (C, V) -> the summed divergence in nats, (), and its slope at p's logits, (C, V)."""
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q
    if direction == "reverse":
        return -(q * gap).sum(), p - q
    forward = (p * gap).sum(dim=-1, keepdim=True)  # (C, 1)
    slope = p * (gap - forward)
    if direction == "forward":
        return forward.sum(), slope
    return ((p - q) * gap).sum(), slope + (p - q)
