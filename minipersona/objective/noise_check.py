"""Whether the model's precision carries R3F's noise, and the epsilon that it carries.

A bf16 number has 8 bits: added to an embedding of size 0.02, the paper's noise of 1e-5 rounds away. So the noise is
measured where the first block reads it, after the first norm, and compared with the noise without rounding.

T = tokens, D = width, N = supervised tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import RunConfig
from minipersona.corpus.batch import RowOrder, pack_documents
from minipersona.errors import UserError
from minipersona.model.acceleration.compiler import without_compiler
from minipersona.model.dropout import token_keys
from minipersona.model.network import EMBEDDING, Qwen2
from minipersona.model.pack import Pack, split
from minipersona.objective.r3f import NoiseKind, add_to_second_half, embedding_noise, r3f, twice
from minipersona.records import may_be_missing

EPSILONS = (1e-5, 1e-4, 1e-3)  # the paper's, and those that are tried if rounding loses it
CARRIED = 0.9  # the cosine from which the realised noise counts as the intended one
CHECKED_TOKENS = 1_024  # enough: millions of entries. In fp32 all attention scores exist at once


@dataclass(frozen=True)
class NoiseCheck:
    """What the model's precision makes of the noise."""

    epsilon: float
    cosine: float  # of realised and intended noise after the first norm, the mean over tokens
    kl: float  # KL_S of the base with and without noise, nats a supervised token, in the model's precision
    kl_fp32: float  # the same in fp32, with the same weights and noise
    effective: bool
    # Supervised tokens of a training row, the mean over all rows; by so much is fairseq's lambda, which counts a row,
    # stronger than ours, which counts a token.
    supervised_per_row: float = may_be_missing(0.0)


def check_first_step(model: Qwen2, documents: Sequence[Document], config: RunConfig) -> NoiseCheck:
    """`check_noise` on rows of the first step that teaches anything. UserError if the model's logits are not finite."""
    section = config.objective
    order = RowOrder(len(documents), config.training.batch, config.seed)
    steps = (order.step(step) for step in range(1, config.training.steps + 1))
    rows = next(useful for step in steps if (useful := [row for row in step if documents[row].supervised.any()]))
    rows = [rows[i] for i in split([len(documents[row]) for row in rows], CHECKED_TOKENS)[0]]
    pack = pack_documents([documents[row] for row in rows], rows)
    tokens = token_keys(config.seed, 1, pack).to(model.device)
    epsilons = (section.epsilon,) if section.epsilon else EPSILONS
    check = check_noise(model, pack.to(model.device), tokens, section.noise, epsilons)
    if not all(map(math.isfinite, (check.cosine, check.kl, check.kl_fp32))):
        raise UserError("objective r3f: the base's logits are not finite on the first step's rows; check the model")
    lengths = [int(document.supervised.sum()) for document in documents]
    return replace(check, supervised_per_row=sum(lengths) / len(lengths))


@torch.no_grad()
def check_noise(
    model: Qwen2, pack: Pack, tokens: Tensor, kind: NoiseKind, epsilons: Sequence[float] = EPSILONS
) -> NoiseCheck:
    """Choose the smallest epsilon whose noise the model's precision carries, or the largest, and measure its effect.

    The model is applied without dropout and steering. `pack` and its `tokens` (T,) of `token_keys` are on its device.
    """
    for epsilon in sorted(epsilons):
        noise = embedding_noise(tokens, kind, epsilon, model.config.hidden_size)  # (T, D)
        cosine = realised_cosine(model, pack, noise)
        if cosine >= CARRIED:
            break
    own = mean_divergence(model, pack, noise)
    computed, model.compute_dtype = model.compute_dtype, torch.promote_types(model.compute_dtype, torch.float32)
    try:
        with without_compiler(model):  # one measurement is not worth compiling for another precision
            reference = mean_divergence(model, pack, noise)
    finally:
        model.compute_dtype = computed
    return NoiseCheck(epsilon, cosine, own, reference, cosine >= CARRIED)


def realised_cosine(model: Qwen2, pack: Pack, noise: Tensor) -> float:
    """The mean over tokens of cos(n(h + z) - n(h) as the model computes it, the same unrounded), n the first norm."""
    norm = model.get_submodule("model.layers.0.input_layernorm")
    h = F.embedding(pack.ids, model.model.embed_tokens.weight).to(model.compute_dtype)  # (T, D)
    realised = norm((h + noise).to(h.dtype)).double() - norm(h).double()
    intended = norm(h.double() + noise.double()) - norm(h.double())
    return float(F.cosine_similarity(realised, intended, dim=-1, eps=1e-30).mean())


def mean_divergence(model: Qwen2, pack: Pack, noise: Tensor) -> float:
    """KL_S between the model without and with noise (T, D), in nats a supervised token."""
    both = twice(pack)
    clean, noisy = model(both, taps={EMBEDDING: add_to_second_half(noise)})[both.supervised].chunk(2)  # (N, D)
    targets = pack.targets[pack.supervised]
    _, terms = r3f(clean, noisy, model.lm_head.weight, targets, lam=1.0)
    return float(terms[2]) / len(targets)
