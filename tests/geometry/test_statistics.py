"""Intervals and tests against naive loops, known nulls and planted effects."""

from __future__ import annotations

from functools import partial
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, m1_by_persona
from minipersona.geometry.statistics import (
    bootstrap_by_persona,
    bootstrap_interval,
    bootstrap_m1,
    bootstrap_m1_difference,
    jackknife_interval,
    noise_floor,
    permutation_test,
    question_weights,
    resampled_m1,
)

P, Q, D = 5, 30, 16


def world(
    seed: int, *, spread: float = 1.0, questions: int = Q, question: float = 2.0, rest: float = 0.5, personas: int = 7
) -> Tensor:
    """(P, Q, D) samples: personas drawn from one seed, around a mean, and questions and rest from another."""
    fixed = torch.Generator().manual_seed(personas)
    drawn = torch.Generator().manual_seed(seed)
    vectors = 2 + spread * torch.randn(P, 1, D, generator=fixed, dtype=torch.float64)
    common = question * torch.randn(1, questions, D, generator=drawn, dtype=torch.float64)
    return vectors + common + rest * torch.randn(P, questions, D, generator=drawn, dtype=torch.float64)


def naive_m1(samples: Tensor, drawn: Tensor) -> float:
    return m1(torch.stack([persona[drawn].mean(0) for persona in samples]))


# bootstrap


def test_bootstrap_equals_a_loop_over_the_same_resamples() -> None:
    samples, weights = world(0), question_weights(Q, 50)
    draws = [torch.arange(Q).repeat_interleave((Q * row).round().long()) for row in weights]
    assert all(len(drawn) == Q for drawn in draws)
    naive = torch.tensor([naive_m1(samples, drawn) for drawn in draws], dtype=torch.float64)
    torch.testing.assert_close(resampled_m1(samples, weights), naive, rtol=1e-12, atol=1e-12)
    assert bootstrap_m1(samples, 50) == pytest.approx(bootstrap_interval(naive, m1(samples.mean(1))), abs=1e-7)

    # the control resamples each persona's questions by themselves, as if they were not the same
    rng = np.random.default_rng(0)
    apart = [m1(torch.stack([x[rng.integers(0, Q, Q)].mean(0) for x in samples])) for _ in range(50)]
    assert np.mean(apart) < float(naive.mean() - naive.std())


def test_fp32_moves_m1_by_little() -> None:
    samples, weights = world(1), question_weights(Q, 50)
    difference = resampled_m1(samples.float(), weights) - resampled_m1(samples, weights)
    assert 0 < float(difference.abs().max()) < 1e-6


def test_weights_are_a_multinomial_and_follow_the_seed() -> None:
    weights = question_weights(Q, 400, seed=3)
    torch.testing.assert_close(weights.sum(1), torch.ones(400, dtype=torch.float64))
    assert float(weights.var(0).mean()) == pytest.approx((1 / Q) * (1 - 1 / Q) / Q, rel=0.1)
    assert torch.equal(weights, question_weights(Q, 400, seed=3))
    assert not torch.equal(weights, question_weights(Q, 400, seed=4))


def test_questions_are_drawn_with_replacement() -> None:
    """Each is drawn Binomial(Q, 1 / Q) times. The control has weights of almost the same variance: random halves."""
    expected = [comb(Q, k) * (1 / Q) ** k * (1 - 1 / Q) ** (Q - k) for k in range(5)]

    def shares(weights: Tensor) -> list[float]:
        counts = (Q * weights).round()
        return [float((counts == k).double().mean()) for k in range(5)]

    assert shares(question_weights(Q, 1000)) == pytest.approx(expected, abs=0.01)
    halves = np.random.default_rng(0).random((1000, Q)).argsort(1) < Q // 2
    assert shares(torch.from_numpy(halves * 2 / Q)) != pytest.approx(expected, abs=0.1)


def test_interval_covers_the_mean_m1_of_as_many_questions_and_the_plain_percentiles_do_not() -> None:
    """Where personas nearly coincide, noise lowers every resampled M1; only the moved interval is calibrated."""
    worlds = [world(seed, spread=0.1, rest=2.0) for seed in range(100)]
    target = float(np.mean([m1(samples.mean(1)) for samples in worlds]))
    moved = [bootstrap_m1(samples, 200) for samples in worlds]
    plain = [np.quantile(resampled_m1(samples, question_weights(Q, 200)), [0.025, 0.975]) for samples in worlds]
    assert np.mean([low <= target <= high for low, high in moved]) > 0.88
    assert np.mean([low <= target <= high for low, high in plain]) < 0.7


def test_interval_holds_m1_and_widens_with_the_level() -> None:
    samples = world(2)
    low, high = bootstrap_m1(samples)
    narrow_low, narrow_high = bootstrap_m1(samples, level=0.5)
    assert low < narrow_low < m1(samples.mean(1)) < narrow_high < high <= 1


def test_paired_difference_cancels_what_the_questions_do_to_both() -> None:
    a = world(3)
    b = a + 0.1 * world(4, spread=0, rest=0.1, question=0)
    low, high = bootstrap_m1_difference(a, b)
    assert low <= m1(b.mean(1)) - m1(a.mean(1)) <= high
    unpaired = resampled_m1(b, question_weights(Q, 1000, 1)) - resampled_m1(a, question_weights(Q, 1000, 2))
    unpaired_low, unpaired_high = bootstrap_interval(unpaired, 0.0)
    assert high - low < 0.5 * (unpaired_high - unpaired_low)
    assert bootstrap_m1_difference(a, a) == (0, 0)


# by persona, and over personas


def test_intervals_by_persona_equal_a_loop() -> None:
    samples, weights = world(15), question_weights(Q, 150)  # more than a piece
    naive = torch.stack([m1_by_persona(torch.einsum("q,pqd->pd", row, samples)) for row in weights])  # (R, P)
    estimates = m1_by_persona(samples.mean(1))
    found = bootstrap_by_persona(samples, list("abcde"), 150)
    assert [each.persona for each in found] == list("abcde")
    for p, each in enumerate(found):
        assert each.cosine == pytest.approx(float(estimates[p]), abs=1e-7)
        assert (each.low, each.high) == pytest.approx(bootstrap_interval(naive[:, p], float(estimates[p])), abs=1e-6)
    assert np.mean([each.cosine for each in found]) == pytest.approx(m1(samples.mean(1)), abs=1e-7)


def test_the_jackknife_over_personas_by_hand() -> None:
    vectors = world(16).mean(1)
    without = [m1(torch.cat([vectors[:p], vectors[p + 1 :]])) for p in range(P)]
    deviation = ((P - 1) / P * np.square(np.array(without) - np.mean(without)).sum()) ** 0.5
    low, high = jackknife_interval(m1(vectors), torch.tensor(without, dtype=torch.float64))
    assert (low + high) / 2 == pytest.approx(m1(vectors), abs=1e-12)
    assert (high - low) / 2 == pytest.approx(2.776445 * deviation, rel=1e-3)  # Student's with 4 degrees of freedom
    assert jackknife_interval(0.0, torch.zeros(5)) == (0, 0)  # every pair alike


# noise floor


def test_noise_floor_is_the_spread_of_changes_on_other_questions() -> None:
    m1s = np.array([m1(world(seed).mean(1)) for seed in range(400)])
    changes = m1s[::2] - m1s[1::2]
    floors = [noise_floor(world(seed), splits=50) for seed in range(40)]
    assert np.mean(floors) == pytest.approx(float(np.std(changes)), rel=0.2)
    assert np.mean(floors) * 2**0.5 != pytest.approx(float(np.std(changes)), rel=0.2)  # d itself, not scaled


def test_noise_floor_is_zero_where_questions_do_not_matter() -> None:
    assert noise_floor(world(0, question=0, rest=0, questions=7)) == pytest.approx(0, abs=1e-12)


# permutation tests


def test_permuting_questions_equals_a_loop() -> None:
    a, b = world(5, questions=8), world(6, questions=8, spread=0.9)
    observed = abs(m1(b.mean(1)) - m1(a.mean(1)))
    drawn = np.random.default_rng(42).integers(0, 2, (201, 8))
    drawn[0] = 0
    reached = 0
    for row in drawn:
        swap = torch.from_numpy(row).bool()[None, :, None]
        reached += abs(m1(torch.where(swap, a, b).mean(1)) - m1(torch.where(swap, b, a).mean(1))) >= observed - 1e-9
    assert 0.02 < reached / 201 < 0.98
    assert permutation_test(a, b, resamples=200) == reached / 201


def test_permuting_personas_equals_all_swaps() -> None:
    a, b = world(7), world(8, spread=0.9)
    vectors_a, vectors_b = a.mean(1), b.mean(1)
    differences = []
    for pattern in range(2**P):
        swap = torch.tensor([pattern >> p & 1 for p in range(P)]).bool()[:, None]
        swapped_a, swapped_b = torch.where(swap, vectors_b, vectors_a), torch.where(swap, vectors_a, vectors_b)
        differences.append(abs(m1(swapped_b) - m1(swapped_a)))
    exact = np.mean(np.array(differences) >= differences[0] - 1e-9)
    assert permutation_test(a, b, "personas", resamples=4000) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("over", ["questions", "personas"])
def test_permutation_p_is_uniform_under_the_null(over: str) -> None:
    ps = []
    for seed in range(200):
        a, b = world(seed, question=0, personas=seed), world(seed + 1000, question=0, personas=seed)
        ps.append(permutation_test(a, b, over, resamples=99))  # type: ignore[arg-type]
    ps_array = np.array(ps)
    assert 0.4 < ps_array.mean() < 0.62
    assert np.mean(ps_array <= 0.1) < 0.16  # exact, but for the discreteness
    assert np.mean(ps_array <= 0.5) > 0.38


def test_permutation_p_is_small_under_a_planted_difference() -> None:
    a, b = world(9), world(9, spread=0.3)
    assert permutation_test(a, b) == 1 / 1001
    assert permutation_test(a, b, "personas") < 0.15  # 2^(1 - P) = 0.0625 at the least
    assert permutation_test(a, a) == permutation_test(a, a, "personas") == 1


def test_seeds_reproduce_and_differ() -> None:
    a, b = world(13), world(14, spread=0.95)
    assert bootstrap_m1(a, seed=1) == bootstrap_m1(a, seed=1) != bootstrap_m1(a, seed=2)
    assert noise_floor(a, seed=1) == noise_floor(a, seed=1) != noise_floor(a, seed=2)
    assert permutation_test(a, b, seed=1) == permutation_test(a, b, seed=1)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    permutation_test(a, b, resamples=10)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # type: ignore[index]  # noqa: NPY002


def test_too_few_is_a_user_error() -> None:
    by_persona = partial(bootstrap_by_persona, personas=list("abcde"))
    for statistic in (bootstrap_m1, by_persona, noise_floor):
        for few in (world(0)[:1], world(0)[:, :1]):
            with pytest.raises(UserError, match="at least two"):
                statistic(few)


def test_intervals_are_of_95_percent_where_no_level_is_given() -> None:
    a, b = world(1), world(2)
    resampled, names = resampled_m1(a, question_weights(Q, 50)), list("abcde")
    assert bootstrap_interval(resampled, 0.5) == bootstrap_interval(resampled, 0.5, 0.95)
    assert bootstrap_m1(a, 50) == bootstrap_m1(a, 50, level=0.95) != bootstrap_m1(a, 50, level=0.9)
    assert bootstrap_m1_difference(a, b, 50) == bootstrap_m1_difference(a, b, 50, level=0.95)
    assert bootstrap_by_persona(a, names, 50) == bootstrap_by_persona(a, names, 50, level=0.95)
    without = torch.linspace(0.5, 0.6, 5)
    assert jackknife_interval(0.5, without) == jackknife_interval(0.5, without, 0.95)
    assert jackknife_interval(0.5, without) != jackknife_interval(0.5, without, 0.9)
