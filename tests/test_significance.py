"""Intervals and tests against scipy, and by hand."""

from __future__ import annotations

from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import fisher_exact

from minipersona.significance import fisher_above, holm, student_quantile, wilson_interval


@pytest.mark.parametrize("degrees", [4, 7, 11, 40])
def test_student_quantile_is_scipys(degrees: int) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)
    assert student_quantile(0.975, degrees) != pytest.approx(1.96, rel=1e-2)


@pytest.mark.parametrize("probability", [0.8, 0.9, 0.975, 0.995])
def test_the_student_quantile_is_the_expansion_to_the_fourth_term(probability: float) -> None:
    """Less the fifth term (Hill 1970), what remains falls as 1 / n^6: every coefficient before it is right."""
    z = NormalDist().inv_cdf(probability)
    fifth = (27 * z**11 + 339 * z**9 + 930 * z**7 - 1782 * z**5 - 765 * z**3 + 17955 * z) / 368_640
    once, twice = (student_quantile(probability, n) + fifth / n**5 - stats.t.ppf(probability, n) for n in (40, 80))
    assert once / twice == pytest.approx(64, rel=0.06)


@pytest.mark.parametrize("successes, n", [(0, 10), (3, 10), (10, 10), (1, 500), (250, 500)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_equals_scipy(successes: int, n: int, level: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson_interval(successes, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)
    exact = stats.binomtest(successes, n).proportion_ci(level, method="exact")
    assert wilson_interval(successes, n, level) != pytest.approx((exact.low, exact.high), abs=1e-4)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(3, 10) == wilson_interval(3, 10, 0.95) != wilson_interval(3, 10, 0.9)


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_fisher_is_scipys(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 300))
    k, others = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    expected = fisher_exact([[k, n - k], [others, m - others]], alternative="greater").pvalue
    assert fisher_above((k, n), (others, m)) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_control_the_other_side_is_another_p_value() -> None:
    assert fisher_above((9, 10), (1, 10)) < 0.001 < 0.99 < fisher_above((1, 10), (9, 10))


def test_large_counts_are_exact_and_quick() -> None:
    assert fisher_above((60, 20_000), (20, 20_000)) == pytest.approx(
        fisher_exact([[60, 19_940], [20, 19_980]], alternative="greater").pvalue, rel=1e-6
    )


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.02, "c": 0.06}) == {"a": True, "b": True, "c": False}  # 0.05/3, 0.05/2, 0.05/1
    assert holm({"a": 0.02, "b": 0.001, "c": 0.02}) == {"a": True, "b": True, "c": True}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.02}) == {"a": False, "b": False, "c": False}  # 0.02 > 0.05/3: all stay
    assert holm({}) == {}
