"""What a set of persona vectors looks like: M1, the registered measure, and what M1 alone cannot tell.

Shapes: P = personas, Q = questions, D = width. `vectors` (P, D) holds one mean vector a persona; `samples`
(P, Q, D) holds every persona's residual at every question, the questions being the same for all personas.

Raw cosine rises with the mean that all personas share, even where the personas keep their distances. So M1
stands beside measures that do not see the shared mean: the centred cosine, the variances, the effective rank
and the accuracy of telling personas apart. Everything is computed in fp64.

A vector that is zero or not finite is a `UserError`; a measure without a value (a centred cosine of identical
personas) is nan, and None in `all_measures`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipersona.errors import UserError

ROUNDING = 1e-12  # centred norms below this share of the largest raw norm are fp64 rounding, not geometry


def persona_vectors(samples: Tensor) -> Tensor:
    """The mean over questions, (P, Q, D) -> (P, D) fp32, summed in fp64."""
    return samples.double().mean(1).float()


def cosines(vectors: Tensor) -> Tensor:
    """Raw cosines of every pair, (P, D) -> (P, P) fp64, in [-1, 1].

    Raises UserError where a vector is zero or not finite.
    """
    vectors = _checked(vectors)  # (P, D)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    return torch.clamp(units @ units.T, -1, 1)  # (P, P)


def m1(vectors: Tensor) -> float:
    """M1: the mean of the P (P - 1) / 2 off-diagonal raw cosines of (P, D) persona vectors.

    In [-1 / (P - 1), 1]. Raises UserError where a vector is zero or not finite, or where there are fewer than
    two. Near 1 it also falls with the noise in the vectors, so compare only M1 over equally many questions.
    """
    return _mean_off_diagonal(cosines(vectors))


def m1_by_persona(vectors: Tensor) -> Tensor:
    """Each persona's mean cosine with the others, (P, D) -> (P,) fp64; their mean is M1. Errors as from `m1`."""
    pairwise = cosines(vectors)
    _at_least_two(len(pairwise), "personas")
    return (pairwise.sum(1) - pairwise.diagonal()) / (len(pairwise) - 1)


def m1_without(vectors: Tensor) -> Tensor | None:
    """M1 with each persona left out in turn, (P, D) -> (P,) fp64; None of two personas, which leave one.

    With c_p the sum of p's cosines with the others, M1 without p is (sum_q c_q - 2 c_p) / ((P - 1) (P - 2)).
    """
    personas = len(vectors)
    if personas == 2:
        return None
    sums = m1_by_persona(vectors) * (personas - 1)  # (P,) c
    return (sums.sum() - 2 * sums) / ((personas - 1) * (personas - 2))


def centred_cosine(vectors: Tensor) -> float:
    """M1 of (P, D) vectors less their mean: the part of M1 that the shared mean does not explain.

    Centred vectors sum to zero, so P equally long ones give -1 / (P - 1) whatever their directions: what it
    tells is how far from equally long they are. nan where a persona sits on the mean.
    """
    centred, scale = _centred(vectors)
    if bool((centred.norm(dim=-1) <= ROUNDING * scale).any()):
        return math.nan
    return m1(centred)


def shared_mean_share(vectors: Tensor) -> float:
    """||mean_p v_p||^2 / mean_p ||v_p||^2 of (P, D) vectors: 1 where all are equal, 0 where they cancel out.

    The rest, 1 - share, is the mean squared distance to the mean over the mean squared norm.
    """
    vectors = _checked(vectors)
    return float(vectors.mean(0).square().sum() / vectors.square().sum(-1).mean())


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy (in nats) of sigma_i / sum sigma, the singular values of the centred (P, D) vectors.

    Roy and Vetterli 2007. Between 1 (all personas on one line) and min(P - 1, D); nan where all
    personas are equal.
    """
    centred, scale = _centred(vectors)
    singular = torch.linalg.svdvals(centred)  # (min(P, D),)
    if float(singular[0]) <= ROUNDING * scale:
        return math.nan
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


def variances(samples: Tensor) -> tuple[float, float]:
    """Between- and within-persona variance of (P, Q, D) samples: traces over D, in squared activation units.

    The model is x_pq = mean + persona_p + question_q + rest_pq, all effects random and every persona asked
    the same questions (two-way layout, one observation a cell; Searle, Casella and McCulloch 1992, ch. 4):

        between  (MS_persona - MS_rest) / Q   unbiased for the variance of persona_p; below zero by chance
                                              where there is none, and not cut off there
        within   SS_within / (P (Q - 1))      unbiased for the variance of question_q + rest_pq: how far one
                                              persona's vector moves from question to question

    A one-way layout would subtract the questions' variance too, though it is common to all personas and
    cancels between them. Raises UserError below two personas or two questions.
    """
    personas, questions, _ = samples.shape
    _at_least_two(personas, "personas")
    _at_least_two(questions, "questions")
    samples = samples.double()  # (P, Q, D)
    samples = samples - samples.mean((0, 1))
    persona_means = samples.mean(1)  # (P, D)
    ss_persona = questions * float(persona_means.square().sum())
    ss_question = personas * float(samples.mean(0).square().sum())
    ss_within = float((samples - persona_means[:, None]).square().sum())
    ms_persona = ss_persona / (personas - 1)
    ms_rest = (ss_within - ss_question) / ((personas - 1) * (questions - 1))
    return (ms_persona - ms_rest) / questions, ss_within / (personas * (questions - 1))


def alignment(vectors: Tensor, base_vectors: Tensor) -> float:
    """Pearson's correlation of the centred vectors with the base's, over all P D entries, (P, D) twice -> [-1, 1].

    Both are centred over personas: corr = <A, B> / (||A|| ||B||) in Frobenius' inner product. 1 where the personas
    lie around their mean as in the base but for one scale; a rotation of the whole configuration lowers it, since it
    asks for the same directions of the same space. nan where all personas are equal in either.
    """
    assert vectors.shape == base_vectors.shape
    (a, scale_a), (b, scale_b) = _centred(vectors), _centred(base_vectors)
    norm_a, norm_b = float(a.norm()), float(b.norm())
    if norm_a <= ROUNDING * scale_a or norm_b <= ROUNDING * scale_b:
        return math.nan
    return float((a * b).sum()) / (norm_a * norm_b)


def spread(between: float, base_between: float) -> float:
    """The between-persona variance as a share of the base's: 1 where the personas keep their distances.

    nan where the base's is not positive, as by chance where its personas do not differ.
    """
    return between / base_between if base_between > 0 else math.nan


def discriminability(between: float, within: float, base_between: float, base_within: float) -> float:
    """Between- over within-persona variance as a share of the base's. nan where one that divides is not positive."""
    if within <= 0 or base_within <= 0 or base_between <= 0:
        return math.nan
    return (between / within) / (base_between / base_within)


def nearest_centroid_accuracy(samples: Tensor, folds: int = 5, seed: int = 42) -> float:
    """How often a sample at a new question is nearest to its own persona's centroid; chance is 1 / P.

    samples (P, Q, D). The questions are dealt at random into `folds` (at most Q) parts; each is held out in
    turn for all personas while the centroids are means over the other questions. The distance is Euclidean:
    unlike the cosine it ignores a mean that all personas share, so centring would change nothing.
    """
    personas, questions, _ = samples.shape
    _at_least_two(questions, "questions")
    samples = samples.double()  # (P, Q, D)
    samples = samples - samples.mean((0, 1))  # no distance changes; less to round
    total = samples.sum(1)  # (P, D)
    fold_of = np.random.default_rng(seed).permutation(questions) % min(folds, questions)
    truth = torch.arange(personas, device=samples.device)[:, None]  # (P, 1)
    correct = 0
    for fold in range(min(folds, questions)):
        held_out = samples[:, torch.from_numpy(fold_of == fold).to(samples.device)]  # (P, held out, D)
        centroids = (total - held_out.sum(1)) / (questions - held_out.shape[1])  # (P, D)
        # argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2
        scores = held_out @ centroids.T - centroids.square().sum(-1) / 2  # (P, held out, P)
        correct += int((scores.argmax(-1) == truth).sum())
    return correct / (personas * questions)


def collapse_direction(base_vectors: Tensor, trained_vectors: Tensor) -> Tensor:
    """The mean over personas of trained minus base vectors, (P, D) and (P, D) -> (D,) fp32."""
    assert base_vectors.shape == trained_vectors.shape
    return (trained_vectors.double() - base_vectors.double()).mean(0).float()


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Every measure of one layer's samples, each as its function above defines it. None where it has no value."""

    m1: float
    centred_cosine: float | None
    shared_mean_share: float | None
    between_variance: float | None
    within_variance: float | None
    effective_rank: float | None
    nearest_centroid_accuracy: float | None


def all_measures(samples: Tensor) -> Measures:
    """Every measure of (P, Q, D) samples. UserError as from the measures themselves."""
    vectors = persona_vectors(samples)
    between, within = variances(samples)
    return Measures(
        m1=m1(vectors),
        centred_cosine=none_if_nan(centred_cosine(vectors)),
        shared_mean_share=none_if_nan(shared_mean_share(vectors)),
        between_variance=none_if_nan(between),
        within_variance=none_if_nan(within),
        effective_rank=none_if_nan(effective_rank(vectors)),
        nearest_centroid_accuracy=nearest_centroid_accuracy(samples),
    )


def none_if_nan(value: float) -> float | None:
    """None for a measure without a value."""
    return None if math.isnan(value) else value


def _mean_off_diagonal(matrix: Tensor) -> float:
    personas = len(matrix)
    _at_least_two(personas, "personas")
    return float(matrix.sum() - matrix.trace()) / (personas * (personas - 1))


def _centred(vectors: Tensor) -> tuple[Tensor, float]:
    """(P, D) less the mean over P, and the largest raw norm, against which rounding is judged."""
    vectors = _checked(vectors)
    _at_least_two(len(vectors), "personas")
    return vectors - vectors.mean(0), float(vectors.norm(dim=-1).max())


def _checked(vectors: Tensor) -> Tensor:
    """The (P, D) vectors in fp64, none of them zero or not finite."""
    assert vectors.ndim == 2
    vectors = vectors.double()
    norms = vectors.norm(dim=-1)  # (P,)
    for persona in range(len(norms)):
        if not (0 < float(norms[persona]) < math.inf):
            what = "zero" if float(norms[persona]) == 0 else "not finite"
            raise UserError(f"persona vector {persona} is {what}: check whether the model has diverged")
    return vectors


def _at_least_two(count: int, what: str) -> None:
    if count < 2:
        raise UserError(f"this needs at least two {what}, got {count}: give it more {what}")
