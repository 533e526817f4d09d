"""How sure M1 is: intervals, the re-extraction noise floor and permutation tests.

Shapes: P = personas, Q = questions, D = width, R = resamples. `samples` is (P, Q, D).

What is random in M1 is which questions were asked, and all personas were asked the same ones. So questions
are resampled, once for all personas, and whole questions or whole personas are permuted; never the
P (P - 1) / 2 pairs, which share personas and are far from independent.

A resample is a row of weights over questions, and all of them together one matrix product a persona,
(R, Q) @ (Q, D). Of the (P, P) cosines only the sum is needed, and that is the squared norm of the sum of
the unit vectors, so the personas are added up one after another and nothing larger than (R, D) is held. At
P = 12, Q = 240, D = 3584 this takes less than the (P Q, P Q) Gram matrix alone, before that is used. The
products are in the samples' own dtype: fp32 moves M1 by about 1e-7, far below its noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, m1_by_persona, persona_vectors
from minipersona.significance import student_quantile

SEED = 42
PIECE = 100  # resamples whose (P, R, D) unit vectors exist at a time


def question_weights(questions: int, resamples: int, seed: int = SEED) -> Tensor:
    """Bootstrap weights (R, Q) fp64: how often each question is drawn among Q with replacement, over Q."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    return torch.from_numpy(counts / questions)


def resampled_m1(samples: Tensor, weights: Tensor) -> Tensor:
    """M1 of the persona vectors `weights @ samples[p]`: samples (P, Q, D), weights (R, Q) -> (R,) fp64."""
    weights = weights.to(samples)  # (R, Q)
    total = torch.zeros(len(weights), samples.shape[-1], dtype=samples.dtype, device=samples.device)
    for persona in samples:  # (Q, D)
        total += _unit(weights @ persona)
    return _m1_of_sum(total, len(samples))


def bootstrap_interval(resampled: Tensor, estimate: float, level: float = 0.95) -> tuple[float, float]:
    """The percentiles of (R,) resampled values, moved so that their mean is the estimate -> (low, high).

    A resample repeats questions, which doubles the variance of its means, and noise lowers a cosine: resampled
    M1 lie below M1, near M1 = 1 all of them. The target is M1 over Q questions, as registered, so the
    resamples' bias is subtracted.
    """
    values = (resampled - resampled.mean()).cpu().numpy()
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return estimate + float(low), estimate + float(high)


def bootstrap_m1(samples: Tensor, resamples: int = 1000, seed: int = SEED, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of M1 over questions (Efron 1979): samples (P, Q, D) -> (low, high).

    The same questions are drawn for all personas. Raises UserError below two personas or two questions.
    """
    _check(samples)
    resampled = resampled_m1(samples, question_weights(samples.shape[1], resamples, seed))
    return _at_most_one(bootstrap_interval(resampled, m1(persona_vectors(samples)), level))


def bootstrap_m1_difference(
    samples_a: Tensor, samples_b: Tensor, resamples: int = 1000, seed: int = SEED, level: float = 0.95
) -> tuple[float, float]:
    """Paired bootstrap interval of M1(b) - M1(a) over questions: (P, Q, D) twice -> (low, high).

    Both see the same resampled questions, so what a question does to both models cancels.
    """
    _check(samples_a, samples_b)
    weights = question_weights(samples_a.shape[1], resamples, seed)
    resampled = resampled_m1(samples_b, weights) - resampled_m1(samples_a, weights)
    estimate = m1(persona_vectors(samples_b)) - m1(persona_vectors(samples_a))
    return bootstrap_interval(resampled, estimate, level)


@dataclass(frozen=True)
class PersonaCosine:
    """A persona's mean cosine with the others, and its bootstrap interval over questions."""

    persona: str
    cosine: float
    low: float
    high: float


def bootstrap_by_persona(
    samples: Tensor, personas: Sequence[str], resamples: int = 1000, seed: int = SEED, level: float = 0.95
) -> tuple[PersonaCosine, ...]:
    """`measures.m1_by_persona` with bootstrap intervals over questions: samples (P, Q, D) -> P of them, in order.

    The same questions are drawn for all personas, and the same as by `bootstrap_m1`. UserErrors as there.
    """
    _check(samples)
    estimates = m1_by_persona(persona_vectors(samples)).tolist()
    weights = question_weights(samples.shape[1], resamples, seed).to(samples)
    pieces = []
    for piece in weights.split(PIECE):
        units = torch.stack([_unit(piece @ persona) for persona in samples])  # (P, R, D)
        with_all = (units * units.sum(0)).double().sum(-1)  # (P, R), its cosine of 1 with itself among them
        pieces.append((with_all - 1) / (len(samples) - 1))
    resampled = torch.cat(pieces, 1)  # (P, R)
    rows = zip(personas, estimates, resampled, strict=True)
    return tuple(PersonaCosine(name, x, *_at_most_one(bootstrap_interval(r, x, level))) for name, x, r in rows)


def jackknife_interval(estimate: float, without: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Jackknife interval of M1 over personas (Tukey 1958), from M1 and M1 without each persona, (P,) -> (low, high).

    How far M1 depends on the choice of personas. The bootstrap over questions does not cover that: it has the same
    personas in every resample. With M1 without persona p as theta_p, the variance is (P - 1) / P sum_p (theta_p -
    mean)^2, and the interval Student's with P - 1 degrees of freedom.
    """
    personas = len(without)
    deviation = float(((personas - 1) / personas * (without - without.mean()).square().sum()).sqrt())
    reach = student_quantile((1 + level) / 2, personas - 1) * deviation
    return _at_most_one((estimate - reach, estimate + reach))


def noise_floor(samples: Tensor, splits: int = 200, seed: int = SEED) -> float:
    """M1's re-extraction noise floor: the standard deviation of M1's change when Q other questions are asked.

    samples (P, Q, D) -> M1 units. The questions are halved at random `splits` times and d is the difference
    of the two halves' M1. A half's M1 has twice the variance, and both d and a change are differences of two
    independent M1, so the standard deviation of a change is rms(d) / sqrt(2). A change of less than about
    twice this may be due to the choice of questions alone. (Asking the same again changes only rounding.)
    """
    _check(samples)
    questions = samples.shape[1]
    half = questions // 2
    order = np.random.default_rng(seed).random((splits, questions)).argsort(1)  # (R, Q), permutations
    first = torch.from_numpy(order < half).double() / half
    second = torch.from_numpy(order >= questions - half).double() / half  # of an odd Q, one question rests
    differences = resampled_m1(samples, first) - resampled_m1(samples, second)
    return float(differences.square().mean().sqrt() / 2**0.5)


def permutation_test(
    samples_a: Tensor,
    samples_b: Tensor,
    over: Literal["questions", "personas"] = "questions",
    resamples: int = 1000,
    seed: int = SEED,
) -> float:
    """Paired permutation test of M1(b) - M1(a), two-sided: (P, Q, D) twice -> p.

    Under the null hypothesis the labels a and b mean nothing within a question (or a persona), so each
    permutation swaps the two conditions for a random half of the questions (or personas), for all of their
    samples at once. The data as they are count as one of the permutations (Phipson and Smyth 2010), hence
    p >= 1 / (resamples + 1). Over personas there are only 2^P swaps, in pairs that differ by sign, so that p
    does not fall much below 2^(1 - P). Differences of less than 1e-6 are taken for rounding, p = 1.
    """
    _check(samples_a, samples_b)
    personas, questions, width = samples_a.shape
    units = {"questions": questions, "personas": personas}[over]
    drawn = np.random.default_rng(seed).integers(0, 2, (resamples + 1, units))
    drawn[0] = 0  # the data as they are
    swaps = torch.from_numpy(drawn).to(samples_a)  # (R + 1, Q or P), 1 where a and b change places

    total_a = torch.zeros(resamples + 1, width, dtype=samples_a.dtype, device=samples_a.device)
    total_b = torch.zeros_like(total_a)
    for p in range(personas):
        mean_a, mean_b = samples_a[p].mean(0), samples_b[p].mean(0)  # (D,)
        if over == "questions":
            moved = swaps @ (samples_b[p] - samples_a[p]) / questions  # (R + 1, D)
        else:
            moved = swaps[:, p, None] * (mean_b - mean_a)
        total_a += _unit(mean_a + moved)
        total_b += _unit(mean_b - moved)
    differences = (_m1_of_sum(total_b, personas) - _m1_of_sum(total_a, personas)).abs()
    return float((differences >= differences[0] - 1e-6).double().mean())


def _at_most_one(interval: tuple[float, float]) -> tuple[float, float]:
    """An interval of cosines."""
    low, high = interval
    return low, min(high, 1.0)


def _unit(vectors: Tensor) -> Tensor:
    return torch.div(vectors, vectors.norm(dim=-1, keepdim=True))


def _m1_of_sum(total: Tensor, personas: int) -> Tensor:
    """M1 from the sum of P unit vectors, (R, D) -> (R,): ||sum_p u_p||^2 is P plus the off-diagonal cosines."""
    sum_of_cosines: Tensor = total.double().square().sum(-1)
    return (sum_of_cosines - personas) / (personas * (personas - 1))


def _check(samples: Tensor, others: Tensor | None = None) -> None:
    personas, questions, _ = samples.shape
    if personas < 2 or questions < 2:
        raise UserError(f"{personas} personas and {questions} questions: this needs at least two of each")
    assert others is None or others.shape == samples.shape
