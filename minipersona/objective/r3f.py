"""R3F (Aghajanyan et al. 2020): cross-entropy, and a divergence between the model and itself under small noise.

    L = sum_t  -log p(y_t | y_<t) + lambda KL_S(p_t, q_t),     p = f(x),  q = f(x + z)

z is added to the token embeddings; KL_S is that of `kl_to_base.py`. Gradients go through both branches:

    dL/dz_p = p - onehot(y_t) + lambda dKL_S/dz_p,     dL/dz_q = lambda dKL_S/dz_q

The paper's code sums KL over a sentence and divides by sentences; here both terms are means over supervised tokens, so
its lambda is about one sentence's tokens times ours (`objective.per_row` multiplies by their mean).

Both branches go through the network in one pass over a pack that holds every document twice. They are the same tokens,
so they have the same dropout masks: with others, the divergence would be that of the masks and not of the noise.

N = supervised tokens, T = tokens of the pack, C = tokens of a chunk, D = width, V = vocabulary
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from minipersona.model.dropout import channel_keys
from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import Pack
from minipersona.objective.cross_entropy import loss_and_slope
from minipersona.objective.head import CHUNK, ForwardPass, log_probabilities, through_head
from minipersona.objective.kl_to_base import divergence_and_slope

NoiseKind = Literal["normal", "uniform"]


@dataclass(frozen=True)
class R3F:
    """An `Objective`: both branches in one pass, with the same dropout and the same taps. `weight` is lambda."""

    weight: float
    noise: NoiseKind
    epsilon: float
    likelihood: float = 1.0  # factor of the cross-entropy
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl")
    copies: ClassVar[int] = 2

    def __call__(self, model: Qwen2, pack: Pack, forward: ForwardPass) -> tuple[Tensor, Tensor]:
        keys, pack = forward.keys(model, pack), pack.to(model.device)
        noise = embedding_noise(keys, self.noise, self.epsilon, model.config.hidden_size)  # (T, D)
        states = forward.states(model, twice(pack), keys.repeat(2), add_to_second_half(noise))  # (2N, D)
        clean, noisy = states.chunk(2)
        targets = pack.targets[pack.supervised]
        return r3f(
            clean, noisy, model.lm_head.weight, targets, lam=self.weight, likelihood=self.likelihood,
            compiled=forward.compiled,
        )  # fmt: skip


def r3f(
    clean: Tensor, noisy: Tensor, weight: Tensor, targets: Tensor, *, lam: float, likelihood: float = 1.0,
    chunk: int = CHUNK, compiled: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The summed loss (), and (loss, cross-entropy, KL_S before lambda), (3,), summed, in nats, without gradient.

    clean, noisy   (N, D) the states that predict, after the final norm, without and with noise
    weight         (V, D) of the head, in any precision
    targets        (N,) int64
    lam            lambda
    likelihood     factor of the cross-entropy in the loss
    """
    return through_head(
        _rule, [clean, noisy], weight, targets, chunk=chunk, compiled=compiled, lam=lam, likelihood=likelihood
    )


def _rule(
    clean: Tensor, noisy: Tensor, targets: Tensor, *, lam: float, likelihood: float, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    log_p, log_q = log_probabilities(clean), log_probabilities(noisy)  # (C, V)
    cross_entropy, ce_slope = loss_and_slope(log_p, targets)
    divergence, clean_slope = divergence_and_slope(log_p, log_q, "symmetric")
    _, noisy_slope = divergence_and_slope(log_q, log_p, "symmetric")
    terms = torch.stack([likelihood * cross_entropy + lam * divergence, cross_entropy, divergence])
    return terms, ((likelihood * ce_slope + lam * clean_slope).to(dtype), (lam * noisy_slope).to(dtype))


def embedding_noise(tokens: Tensor, kind: NoiseKind, epsilon: float, channels: int) -> Tensor:
    """z, (T, D) fp32: normal with standard deviation epsilon, or uniform from -epsilon to epsilon.

    It is a function of (seed, step, document, position, channel), as a dropout mask is (`model/dropout.py`), so
    packing, ranks, recomputation and resuming cannot change it.

    tokens    (T,) int32 of `token_keys`
    channels  D
    """
    x = tokens[:, None] ^ _noise_channels(channels, tokens.device)  # (T, D)
    # Wellons' lowbias32 in int32: products wrap, and the masks make the right shifts logical ones.
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed word
    x = x ^ ((x >> 16) & 0xFFFF)
    uniform = ((x >> 8).float() + 0.5) * 2.0**-23  # 24 bits are exact in fp32 and never reach -1 or 1
    return epsilon * (uniform if kind == "uniform" else math.sqrt(2) * torch.erfinv(uniform))


@functools.cache
def _noise_channels(channels: int, device: torch.device) -> Tensor:
    return channel_keys("embedding noise", channels).to(device)  # (D,), copied from the host once


def twice(pack: Pack) -> Pack:
    """The pack with every document again: T tokens for the clean branch, then T for the noisy one."""
    return replace(
        pack,
        ids=pack.ids.repeat(2),
        positions=pack.positions.repeat(2),
        targets=pack.targets.repeat(2),
        supervised=torch.cat([pack.supervised, pack.supervised + pack.tokens]),
        boundaries=torch.cat([pack.boundaries, pack.boundaries[1:] + pack.tokens]),
        documents=pack.documents.repeat(2),
    )


def add_to_second_half(noise: Tensor) -> Tap:
    """The tap that adds noise (T, D) fp32 to the noisy branch of a stream (2T, D), rounding once."""

    def tap(h: Tensor) -> Tensor:
        clean, noisy = h.chunk(2)
        return torch.cat([clean, (noisy + noise).to(h.dtype)])  # the sum is in the wider of the two precisions

    return tap
