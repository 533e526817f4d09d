"""What objectives are made of: passes through the network, and one through the head that ends in a loss.

    z = W h_t,      L = sum_t l(z_t),      dL/dh = W^T dL/dz,      dL/dW = sum_t dL/dz h_t^T

The logits of a whole pack never exist at once. One sweep over chunks of tokens computes the loss and its gradient:
dL/dz is computed while the logits exist. l is given by a rule: a function of one chunk's logits, written beside its
equation in the file of its objective. Some rules compare branches: states of the same tokens from different passes
through the network.

T = tokens of the pack, N = supervised tokens, C = tokens of a chunk, D = width, V = vocabulary, K = terms
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from minipersona.model.acceleration.compiler import compile_function
from minipersona.model.dropout import token_keys
from minipersona.model.network import EMBEDDING, Qwen2, Tap
from minipersona.model.pack import IGNORE, Pack, send

CHUNK = 768  # tokens: 768 x 152k fp32 logits are 0.45 GB a branch, and the product is large enough for full speed


@dataclass(frozen=True)
class ForwardPass:
    """How the model that learns is applied to a pack: in which step, with which taps, and with what saved."""

    seed: int
    step: int
    taps: Mapping[int, Tap] = field(default_factory=dict)
    checkpoint_activations: bool = False
    compiled: bool = False

    def keys(self, model: Qwen2, pack: Pack) -> Tensor:
        """(T,) int32 on the model's device, from which dropout and noise follow. The pack is on the CPU."""
        return send(token_keys(self.seed, self.step, pack), model.device)

    def states(self, model: Qwen2, pack: Pack, keys: Tensor, noise: Tap | None = None) -> Tensor:
        """(N, D) the states that predict, after the final norm. The pack is on the model's device."""
        assert EMBEDDING not in self.taps, "the embedding's tap is reserved for the noise"
        taps = dict(self.taps) if noise is None else {**self.taps, EMBEDDING: noise}
        return model(
            pack, taps=taps, dropout_keys=keys, checkpoint_activations=self.checkpoint_activations,
            last_rows=pack.supervised,
        )  # fmt: skip


class Objective(Protocol):
    """Maps a model, a pack on the CPU and a forward pass to the summed loss, (), and all summed terms, (K,).

    Only the loss, which is also the first term, carries a gradient. The caller divides the sums, once a step. An
    objective with a penalty is a dataclass of which `dataclasses.replace` makes another one: with `weight` 0 the
    cross-entropy alone, with `likelihood` 0 the penalty alone.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    terms: ClassVar[tuple[str, ...]]  # names of the K terms
    copies: ClassVar[int]  # of every token in a pass; a pack has that many times fewer tokens than a pass may have

    @property
    def weight(self) -> float | Tensor:
        """Of the penalty that is added to the cross-entropy."""
        ...

    def __call__(self, model: Qwen2, pack: Pack, forward: ForwardPass) -> tuple[Tensor, Tensor]: ...


# ---------------------------------------------------------------- through the head

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
    """The summed loss (), differentiable, and all terms (K,), not differentiable; both in fp32 or better.

    branches   each (N, D), the states that predict, after the final norm
    weight     (V, D) of the head, in any precision: it is cast to the branches'
    targets    (N,) int64; a row whose target is IGNORE adds nothing to any term or gradient
    chunk      tokens whose logits exist at a time
    compiled   fuse the passes over a chunk's logits (worth it on CUDA)
    settings   are passed on to the rule
    """
    # Zero states give every branch the same distribution, so that divergences are 0; `loss_and_slope` leaves these rows
    # out of the cross-entropy. No gradient passes through what is filled, and the head gets slope^T 0.
    ignored = (targets == IGNORE)[:, None]
    branches = [hidden.masked_fill(ignored, 0.0) for hidden in branches]
    if reference is not None:
        reference = Reference(reference.hidden.masked_fill(ignored, 0.0), reference.weight)
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

        def sweep(rows: slice) -> Tensor:  # a function, so that a chunk's tensors are freed before the next chunk
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
    0.03, more than the distributions that a divergence compares differ by.
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
