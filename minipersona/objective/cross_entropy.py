"""Cross-entropy of the next token, summed, without ever holding the logits of a whole pack.

    L = sum_t  -log p(y_t | y_<t),      p = softmax(z),  z = W h_t
    dL/dz = p - onehot(y_t),   dL/dh = W^T dL/dz,   dL/dW = sum_t dL/dz h_t^T

N = supervised tokens, C = tokens of a chunk, D = width, V = vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 2048  # tokens: 2048 x 152k fp32 logits are 1.2 GB, and the product is large enough to run at full speed


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK, compiled: bool = False
) -> Tensor:
    """The summed cross-entropy in nats, a scalar in fp32 or better; the caller divides, once a step.

    hidden    (N, D) the states that predict, after the final norm
    weight    (V, D) of the head, in any precision: it is cast to hidden's
    targets   (N,) int64
    compiled  fuse the passes over a chunk's logits (worth it on CUDA)
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, compiled)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks: the gradient takes the logits while they exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, compiled: bool) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss_and_slope = _compiled_loss_and_slope() if compiled else _loss_and_slope
        cast = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], targets[start : start + chunk]  # (C, D), (C,)
            chunk_loss, slope = loss_and_slope(h @ cast.T, y)  # (), (C, V) in hidden's precision
            loss += chunk_loss
            if d_hidden is not None:
                torch.mm(slope, cast, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight += slope.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = upstream
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _loss_and_slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (C, V), targets (C,) -> summed -log p(target), and p - onehot(target) (C, V) in the logits' precision."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = z.logsumexp(dim=-1, keepdim=True)  # (C, 1)
    loss = (normaliser - z.gather(-1, targets[:, None])).sum()
    is_target = torch.arange(z.shape[-1], device=z.device) == targets[:, None]  # (C, V)
    slope = (z - normaliser).exp() - is_target.to(z.dtype)
    return loss, slope.to(logits.dtype)


@functools.cache
def _compiled_loss_and_slope() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_slope, dynamic=True)
