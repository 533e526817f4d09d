"""From hidden states through the head to a loss, without ever holding the logits of a whole pack.

    z = W h_t,      L = sum_t l(z_t),      dL/dh = W^T dL/dz,      dL/dW = sum_t dL/dz h_t^T

One sweep over chunks of tokens makes the loss and its gradient: dL/dz is taken while the logits exist. What l is, a
rule says: a function of one chunk's logits, written out beside its equation in the file of its objective. Some rules
compare branches: states of the same tokens that come from different passes through the network.

N = supervised tokens, C = tokens of a chunk, D = width, V = vocabulary, K = terms
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipersona.model.acceleration.compiler import compile_function

CHUNK = 768  # tokens: 768 x 152k fp32 logits are 0.45 GB a branch, and the product is large enough for full speed

Rule = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
"""(logits (C, V) of every branch, then of the reference, then targets (C,), dtype=) -> terms (K,), the loss first and
all of them sums over the chunk, and dL/dz (C, V) in `dtype` for every branch. Logits come in fp32 or better."""


@dataclass(frozen=True)
class Reference:
    """States (N, D) and the head (V, D) of a model that does not learn: no gradient goes there."""

    hidden: Tensor
    weight: Tensor


def through_head(
    rule: Rule,
    branches: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    compiled: bool,
    reference: Reference | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The summed loss (), differentiable, and all terms (K,), which are not. Both in fp32 or better.

    branches   each (N, D), the states that predict, after the final norm
    weight     (V, D) of the head, in any precision: it is cast to the branches'
    targets    (N,) int64
    chunk      tokens whose logits exist at a time
    compiled   fuse the passes over a chunk's logits (worth it on CUDA)
    settings   go to the rule as they are
    """
    rule = functools.partial(_compiled(rule) if compiled else rule, dtype=branches[0].dtype, **settings)
    return _ThroughHead.apply(rule, chunk, reference, targets, weight, *branches)


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        chunk: int,
        reference: Reference | None,
        targets: Tensor,
        weight: Tensor,
        *branches: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, _, _, _, needs_weight, *needs_branch = ctx.needs_input_grad
        tokens, dtype = len(targets), branches[0].dtype
        cast = weight.to(dtype)
        fixed = [] if reference is None else [(reference.hidden, reference.weight.to(reference.hidden.dtype))]
        pairs = [*((hidden, cast) for hidden in branches), *fixed]
        d_branches = [torch.empty_like(h) if needed else None for h, needed in zip(branches, needs_branch, strict=True)]
        d_weight = torch.zeros_like(weight, dtype=_wide(dtype)) if needs_weight else None

        def sweep(rows: slice) -> Tensor:  # a function, so that a chunk's tensors are gone before the next one's come
            terms, slopes = rule(*(head_logits(hidden[rows], head) for hidden, head in pairs), targets[rows])
            for hidden, d_hidden, slope in zip(branches, d_branches, slopes, strict=True):
                if d_hidden is not None:
                    torch.mm(slope, cast, out=d_hidden[rows])
                if d_weight is not None:
                    d_weight.add_(slope.T @ hidden[rows])
            return terms

        terms = torch.stack([sweep(slice(start, start + chunk)) for start in range(0, max(1, tokens), chunk)]).sum(0)
        ctx.save_for_backward(d_weight, *d_branches)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(terms)
        return terms[0].clone(), terms

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_weight, *d_branches = ctx.saved_tensors
        scale = upstream[0]
        return (
            *(None, None, None, None),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            *(None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype) for d_hidden in d_branches),
        )


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(C, D), (V, D) -> (C, V) in fp32 or better.

    Products of half-precision numbers are summed in fp32 anyway; rounded to bf16, a logit of 10 would be off by up to
    0.03, which is more than what lies between the distributions that a divergence compares.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return hidden @ head.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return hidden.float() @ head.float().T


def log_probabilities(logits: Tensor) -> Tensor:
    """(C, V) -> log softmax over the vocabulary."""
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _compiled(rule: Rule) -> Rule:
    return compile_function(rule)
