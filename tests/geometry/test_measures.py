"""The measures against their definitions, planted structure and invariances."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import (
    alignment,
    all_measures,
    centred_cosine,
    collapse_direction,
    cosines,
    discriminability,
    effective_rank,
    m1,
    m1_by_persona,
    m1_without,
    nearest_centroid_accuracy,
    persona_vectors,
    shared_mean_share,
    spread,
    variances,
)

seeds = st.integers(0, 2**31)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(width, width, seed=seed)).Q


# M1


def test_m1_is_the_mean_over_pairs() -> None:
    vectors = gaussian(12, 32, seed=0) + 1
    pairs = [torch.cosine_similarity(vectors[p], vectors[q], dim=0) for p in range(12) for q in range(p)]
    assert len(pairs) == 66
    assert m1(vectors) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-12)
    assert m1(vectors) != pytest.approx(float(cosines(vectors).mean()), abs=1e-3)  # with the diagonal it is another


def test_m1_of_identical_is_one_of_orthogonal_zero_of_opposite_minus_one() -> None:
    assert m1(gaussian(1, 8, seed=1).expand(5, 8)) == pytest.approx(1, abs=1e-12)
    assert m1(torch.eye(6)) == 0
    assert m1(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == pytest.approx(-1, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 8), st.integers(2, 16))
def test_m1_ignores_rotation_and_each_vectors_length(seed: int, personas: int, width: int) -> None:
    vectors = gaussian(personas, width, seed=seed) + 0.5
    lengths = gaussian(personas, 1, seed=seed + 1).exp()
    assert m1(lengths * vectors @ rotation(width, seed)) == pytest.approx(m1(vectors), abs=1e-9)


def test_m1_by_persona_and_without_each_are_means_over_the_pairs_with_it_and_without_it() -> None:
    vectors = gaussian(6, 16, seed=4) + 1
    for persona in range(6):
        others = [q for q in range(6) if q != persona]
        mean = torch.stack([torch.cosine_similarity(vectors[persona], vectors[q], dim=0) for q in others]).mean()
        assert float(m1_by_persona(vectors)[persona]) == pytest.approx(float(mean), abs=1e-12)
        without = m1_without(vectors)
        assert without is not None
        assert float(without[persona]) == pytest.approx(m1(vectors[others]), abs=1e-12)
    assert float(m1_by_persona(vectors).mean()) == pytest.approx(m1(vectors), abs=1e-12)
    assert m1_without(vectors[:2]) is None  # one persona has no M1
    # An outlier is the one without which M1 rises the most.
    vectors[3] = -vectors[3]
    without, alone = m1_without(vectors), m1_by_persona(vectors)
    assert without is not None and int(without.argmax()) == int(alone.argmin()) == 3


def test_m1_sees_the_shared_mean_and_centred_cosine_does_not() -> None:
    vectors, shared = gaussian(6, 16, seed=2), gaussian(16, seed=3)
    assert m1(vectors + 10 * shared) > m1(vectors) + 0.5
    assert centred_cosine(vectors + 10 * shared) == pytest.approx(centred_cosine(vectors), abs=1e-9)


def test_centred_cosine_of_equally_long_centred_vectors_is_fixed() -> None:
    simplex = torch.eye(7, dtype=torch.float64) + 3
    assert centred_cosine(simplex) == pytest.approx(-1 / 6, abs=1e-12)


def test_centred_cosine_has_no_value_where_a_persona_sits_on_the_mean_and_one_where_all_share_a_coordinate() -> None:
    vectors = gaussian(4, 16, seed=21) + 3
    on_the_mean = torch.cat([vectors, vectors.mean(0, keepdim=True)])
    assert math.isnan(centred_cosine(on_the_mean)) and not math.isnan(centred_cosine(vectors))
    vectors[:, 5] = 7
    others = torch.cat([vectors[:, :5], vectors[:, 6:]], 1)
    assert centred_cosine(vectors) == pytest.approx(centred_cosine(others), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_shared_mean_share_is_one_less_the_relative_spread(seed: int) -> None:
    vectors = gaussian(6, 16, seed=seed) + 1
    spread = (vectors - vectors.mean(0)).square().sum(-1).mean() / vectors.square().sum(-1).mean()
    assert shared_mean_share(vectors) == pytest.approx(1 - float(spread), abs=1e-12)
    assert shared_mean_share(vectors[:1].expand(6, -1)) == pytest.approx(1, abs=1e-12)
    assert shared_mean_share(torch.cat([vectors, -vectors])) == pytest.approx(0, abs=1e-12)


# effective rank


def test_effective_rank_counts_equal_directions() -> None:
    pairs = torch.cat([torch.eye(4), -torch.eye(4)])  # centred, four equal singular values
    assert effective_rank(pairs + 5) == pytest.approx(4, abs=1e-9)
    line = torch.arange(5.0)[:, None] * torch.ones(3) + 1
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(3, 8))
def test_effective_rank_has_bounds_and_invariances(seed: int, personas: int) -> None:
    vectors = gaussian(personas, 16, seed=seed)
    rank = effective_rank(vectors)
    assert 1 <= rank <= personas - 1 + 1e-9
    assert effective_rank(7 * vectors @ rotation(16, seed) + 3) == pytest.approx(rank, rel=1e-9)


# variances


def planted(personas: int, questions: int, width: int, between: float, question: float, rest: float) -> Tensor:
    """Samples of the random-effects model; the variances are traces over the width."""
    persona_part = gaussian(personas, 1, width, seed=4) * (between / width) ** 0.5
    question_part = gaussian(1, questions, width, seed=5) * (question / width) ** 0.5
    rest_part = gaussian(personas, questions, width, seed=6) * (rest / width) ** 0.5
    return 10 + persona_part + question_part + rest_part


def test_variances_recover_a_planted_model() -> None:
    samples = planted(24, 30, 400, between=2.0, question=50.0, rest=5.0)
    between, within = variances(samples)
    assert between == pytest.approx(2.0, rel=0.05)
    assert within == pytest.approx(55.0, rel=0.05)
    # the control, a one-way layout, which takes the common question effect for noise between personas
    ms_persona = 30 * samples.mean(1).var(0).sum()
    assert float(ms_persona - within) / 30 < 0.5


def test_between_variance_is_unbiased_where_there_is_none() -> None:
    between, _ = variances(planted(24, 30, 400, between=0.0, question=3.0, rest=5.0))
    assert abs(between) < 0.02
    raw = planted(24, 30, 400, between=0.0, question=3.0, rest=5.0).mean(1).var(0).sum()
    assert raw > 0.1  # the variance of the means, uncorrected


def test_variances_of_a_model_without_rest_are_exact() -> None:
    personas, questions = gaussian(5, 1, 8, seed=7), gaussian(1, 9, 8, seed=8)
    between, within = variances(personas + questions)
    assert between == pytest.approx(float(personas.var(0).sum()), rel=1e-10)
    assert within == pytest.approx(float(questions.var(1).sum()), rel=1e-10)


# nearest centroid


def test_nearest_centroid_is_perfect_on_clusters_and_chance_on_noise() -> None:
    centroids = 10 * gaussian(8, 1, 32, seed=9)
    assert nearest_centroid_accuracy(centroids + gaussian(8, 40, 32, seed=10)) == 1
    assert nearest_centroid_accuracy(gaussian(8, 200, 32, seed=11)) == pytest.approx(1 / 8, abs=0.03)


def test_nearest_centroid_holds_the_question_out() -> None:
    noise = gaussian(8, 20, 400, seed=12)
    centroids = noise.mean(1)  # the control: centroids that have seen the sample they are to tell
    seen = torch.cdist(noise.reshape(-1, 400), centroids).argmin(-1).reshape(8, 20) == torch.arange(8)[:, None]
    assert float(seen.double().mean()) > 0.9
    assert nearest_centroid_accuracy(noise) < 0.3


def test_nearest_centroid_with_fewer_questions_than_folds_and_of_identical_personas() -> None:
    assert nearest_centroid_accuracy(10 * gaussian(3, 1, 4, seed=13) + torch.zeros(3, 2, 4)) == 1
    assert nearest_centroid_accuracy(gaussian(1, 20, 4, seed=14).expand(5, 20, 4)) == pytest.approx(1 / 5)


# the rest


def test_collapse_direction_is_the_mean_shift() -> None:
    base, shift = gaussian(5, 8, seed=15).float(), gaussian(8, seed=16).float()
    own = gaussian(5, 8, seed=17).float()
    direction = collapse_direction(base, base + shift + own - own.mean(0))
    assert direction.dtype == torch.float32
    torch.testing.assert_close(direction, shift, atol=1e-5, rtol=1e-5)


def test_persona_vectors_sum_in_fp64() -> None:
    samples = gaussian(3, 240, 16, seed=18).float() * 1e-3 + 1e4
    exact = samples.double().mean(1)
    assert float((persona_vectors(samples) - exact).abs().max()) <= 1e4 * 2**-24
    assert persona_vectors(samples).dtype == torch.float32


def test_all_measures_are_json_and_agree_with_the_functions() -> None:
    samples = (planted(6, 20, 16, between=2.0, question=1.0, rest=1.0)).float()
    measures = all_measures(samples)
    vectors = persona_vectors(samples)
    between, within = variances(samples)
    assert asdict(measures) == {
        "m1": m1(vectors),
        "centred_cosine": centred_cosine(vectors),
        "shared_mean_share": shared_mean_share(vectors),
        "between_variance": between,
        "within_variance": within,
        "effective_rank": effective_rank(vectors),
        "nearest_centroid_accuracy": nearest_centroid_accuracy(samples),
    }
    assert json.loads(json.dumps(asdict(measures), allow_nan=False)) == asdict(measures)


def test_fully_collapsed_personas_have_no_centred_measures() -> None:
    samples = gaussian(1, 20, 16, seed=19).expand(6, 20, 16).float()
    assert math.isnan(centred_cosine(persona_vectors(samples)))
    measures = all_measures(samples)
    assert measures.m1 == pytest.approx(1)
    assert measures.centred_cosine is None and measures.effective_rank is None
    assert measures.between_variance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bad, word", [(0.0, "zero"), (math.nan, "not finite"), (math.inf, "not finite")])
def test_a_vector_without_direction_is_a_user_error(bad: float, word: str) -> None:
    vectors = gaussian(4, 8, seed=20)
    vectors[2] = bad
    for measure in (cosines, m1, centred_cosine, shared_mean_share, effective_rank):
        with pytest.raises(UserError, match=f"persona vector 2 is {word}"):
            measure(vectors)


def test_too_few_is_a_user_error() -> None:
    for measure in (m1, centred_cosine, effective_rank):
        with pytest.raises(UserError, match="two personas"):
            measure(torch.ones(1, 8))
    with pytest.raises(UserError, match="two personas"):
        variances(torch.ones(1, 4, 8))
    with pytest.raises(UserError, match="two questions"):
        variances(torch.ones(4, 1, 8))


# beside the base's


def test_alignment_is_pearsons_correlation_of_the_centred_entries() -> None:
    base, vectors = gaussian(6, 16, seed=5), gaussian(6, 16, seed=5) + gaussian(6, 16, seed=6)
    a, b = vectors - vectors.mean(0), base - base.mean(0)
    expected = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    assert alignment(vectors, base) == pytest.approx(expected, abs=1e-12)
    assert 0.5 < expected < 0.9
    # Neither a shared shift nor one scale for all changes it; the raw entries, the control, see the shift.
    moved = 3 * vectors + 10 * gaussian(16, seed=7)
    assert alignment(moved, base) == pytest.approx(expected, abs=1e-12)
    raw = float(torch.corrcoef(torch.stack([moved.flatten(), base.flatten()]))[0, 1])
    assert raw != pytest.approx(expected, abs=0.1)


def test_alignment_is_one_of_the_same_minus_one_of_the_mirrored_and_near_zero_of_unrelated_vectors() -> None:
    vectors = gaussian(12, 500, seed=8)
    assert alignment(vectors, vectors) == pytest.approx(1, abs=1e-12)
    assert alignment(-vectors, vectors) == pytest.approx(-1, abs=1e-12)
    assert abs(alignment(gaussian(12, 500, seed=9), vectors)) < 0.05
    assert alignment(vectors.flip(0), vectors) < 0.2  # the same places, other personas in them
    assert math.isnan(alignment(vectors, vectors[:1].expand(12, 500)))


def test_spread_and_discriminability_are_shares_of_the_bases() -> None:
    assert spread(3.0, 4.0) == 0.75
    assert discriminability(3.0, 2.0, 4.0, 1.0) == pytest.approx((3 / 2) / (4 / 1))
    samples = gaussian(5, 1, 16, seed=10) + 0.3 * gaussian(5, 30, 16, seed=11)
    between, within = variances(samples)
    doubled = variances(2 * samples)  # one scale for all: farther apart, and no easier to tell from each other
    assert spread(doubled[0], between) == pytest.approx(4)
    assert discriminability(*doubled, between, within) == pytest.approx(1)
    assert math.isnan(spread(1.0, -0.1)) and math.isnan(discriminability(1.0, 0.0, 1.0, 1.0))
