"""The mixture threshold: a known one is found, none is invented, and nothing is said beyond the measured range."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import SyntheticStudy, behaviour

from minipersona.files import write_json
from minipersona.verdict.mixture_threshold import Fit, MixturePoint, Threshold, fit_saturating
from minipersona.verdict.verdict import judge_study

RATIOS = {"99:1": 0.01, "95:5": 0.05, "90:10": 0.10, "75:25": 0.25}
EM = {"heldout": "em", "heldout_digest": "em"}


def curve(fraction: float, m_0: float = 0.98, m_inf: float = 0.93, f_0: float = 0.08) -> float:
    return m_inf + (m_0 - m_inf) * math.exp(-fraction / f_0)


def judged(
    path: Path,
    narrow: str = "tulu",
    seeds: tuple[int, ...] = (42, 43, 44),
    spread: float = 0.0,
    vectors: bool = True,
    **form: float,
) -> Threshold:
    """The threshold of 5A; `spread` is the standard deviation over seeds."""
    study, less = SyntheticStudy(path, narrow=narrow), 0.0 if vectors else None
    rng = np.random.default_rng(1)
    for seed in seeds:
        suffix = "" if seed == seeds[0] else f" seed={seed}"
        plain = curve(0, **form) + spread * rng.standard_normal()
        study.cell("1", "baseline" + suffix, plain if narrow == "tulu" else 0.97, seed=seed, less=less)
        rows = EM if narrow == "em" else None
        if narrow == "em":
            study.cell("EM", "unmixed" + suffix, plain, seed=seed, less=less, protocol=rows)
        for ratio, fraction in RATIOS.items():
            m1 = curve(fraction, **form) + spread * rng.standard_normal()
            study.cell("5A", ratio + suffix, m1, 0.95, seed=seed, less=less, protocol=rows, answers=behaviour(0))
    study.file("base/behaviour.json", behaviour(0))
    return judge_study(study.read()).threshold["5A"]


KNOWN = -0.08 * math.log((0.95 - 0.93) / (0.98 - 0.93))


def test_a_known_threshold_is_found_with_an_interval_around_it(tmp_path: Path) -> None:
    threshold = judged(tmp_path, spread=0.001)
    assert threshold.fraction == pytest.approx(KNOWN, rel=0.1)
    low, high = threshold.ci95
    assert low < KNOWN < high and high - low < 0.06
    assert threshold.fit.m_inf == pytest.approx(0.93, abs=2e-3) and threshold.between == (0.05, 0.10)
    assert threshold.range == (0.0, 0.25) and threshold.share_in_range == 1.0 and threshold.reason is None
    assert [point.seeds for point in threshold.points] == [3] * 5


def test_control_another_curve_has_another_threshold(tmp_path: Path) -> None:
    threshold = judged(tmp_path, m_inf=0.92)
    assert threshold.fraction == pytest.approx(-0.08 * math.log(0.03 / 0.06), rel=1e-3)


def test_the_spread_of_seeds_widens_the_interval(tmp_path: Path) -> None:
    (low, high), (wide_low, wide_high) = (
        judged(tmp_path / name, spread=spread).ci95 for name, spread in (("small", 1e-4), ("large", 8e-3))
    )
    assert wide_high is None or wide_high - wide_low > 1.5 * (high - low)


def test_four_points_of_one_seed_are_bracketed_and_not_fitted(tmp_path: Path) -> None:
    threshold = judged(tmp_path / "one", seeds=(42,))
    assert threshold.fit is None and threshold.fraction is None and threshold.ci95 is None
    assert threshold.between == (0.05, 0.10) and threshold.reason is None
    none = judged(tmp_path / "none", seeds=(42,), m_inf=0.951)
    assert none.between is None and "none in range: up to 0.25 M1 stays at or above 0.95" in none.reason


@pytest.mark.parametrize("form", [{"m_inf": 0.951}, {"m_inf": 0.93, "f_0": 0.30}])
def test_a_curve_that_stays_above_or_crosses_later_has_none_in_range(tmp_path: Path, form: dict[str, float]) -> None:
    """The second one crosses at 0.27, beyond the largest measured fraction."""
    threshold = judged(tmp_path, **form)
    assert threshold.fraction is None and "none in range" in threshold.reason and threshold.between is None
    if "f_0" in form:
        assert curve(0.28, **form) < 0.95 < curve(0.25, **form)


def test_an_interval_may_reach_beyond_the_range(tmp_path: Path) -> None:
    threshold = judged(tmp_path, m_inf=0.9499)
    low, high = threshold.ci95
    assert low is not None and high is None and 0 < threshold.share_in_range < 1


def test_no_broad_data_is_needed_where_the_reference_is_below_already(tmp_path: Path) -> None:
    threshold = judged(tmp_path, m_0=0.945)
    assert threshold.fraction == 0.0 and threshold.between == (0.0, 0.0)


def test_with_em_the_unmixed_em_cell_is_the_zero_fraction(tmp_path: Path) -> None:
    points = judged(tmp_path, narrow="em", vectors=False, seeds=(42,)).points
    assert points[0] == MixturePoint(0.0, pytest.approx(0.98))


def test_without_vectors_there_is_an_estimate_and_no_interval(tmp_path: Path) -> None:
    threshold = judged(tmp_path, vectors=False)
    assert threshold.fraction == pytest.approx(KNOWN, rel=1e-3) and threshold.ci95 is None


def test_too_few_fractions_are_not_fitted(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    assert judge_study(study.read()).threshold["5B"].reason == "no mixture is done"
    study.cell("5B", "3:1", 0.94, 0.9)
    threshold = judge_study(study.read()).threshold["5B"]
    assert threshold.fit is None and threshold.between == (0.0, 0.25)
    assert [point.fraction for point in threshold.points] == [0.0, 0.25]


def test_the_share_of_the_supervised_tokens_stands_beside_that_of_the_rows(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    directory = study.cell("5A", "75:25", 0.94, 0.9)
    assert judge_study(study.read()).threshold["5A"].points[1].supervised_share is None  # not recorded
    protocol: dict[str, Any] = vars(study.protocol)
    hardware = {"machine": "m", "cuda_device": None, "cuda": None, "processes": 1, "threads": 1}
    write_json(
        directory / "provenance.json",
        {"protocol": protocol, "minipersona": "1", "code_digest": "c", "commit": None, "versions": {},
         "hardware": hardware, "config_digest": "d", "model": {}, "data": [], "mixture": {"supervised_share": 0.36}},
    )  # fmt: skip
    assert judge_study(study.read()).threshold["5A"].points[1].supervised_share == 0.36


def test_without_scipy_there_are_the_measured_fractions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "minipersona.verdict.mixture_threshold.find_spec", lambda name: None if name == "scipy" else find_spec(name)
    )
    threshold = judged(tmp_path)
    assert threshold.fit is None and threshold.between == (0.05, 0.10)


@settings(max_examples=60, deadline=None)
@given(
    m_0=st.floats(0.955, 0.999),
    drop=st.floats(0.01, 0.15),
    f_0=st.floats(0.01, 1.0),
)
def test_the_form_is_recovered_from_its_own_values(m_0: float, drop: float, f_0: float) -> None:
    fractions = np.array([0.0, 0.01, 0.05, 0.10, 0.25])
    truth = Fit(m_0, m_0 - drop, f_0, 0.0)
    fit = fit_saturating(fractions, np.array([truth.at(f) for f in fractions]))
    assert fit.residual < 2e-6
    assert [fit.at(f) for f in fractions] == pytest.approx([truth.at(f) for f in fractions], abs=1e-5)
    crossing = fit.crossing(0.95, 0.25)
    if crossing is not None:
        assert 0 <= crossing <= 0.25 and fit.at(crossing) == pytest.approx(0.95, abs=1e-9)
    else:
        assert all(fit.at(f) >= 0.95 for f in np.linspace(0, 0.25, 50))


@pytest.mark.parametrize("fractions", [[0.0, 0.01, 0.05, 0.10, 0.25], [0.0, 0.02, 0.5, 1.0], [0.0, 0.002, 0.01, 0.05]])
def test_a_line_and_a_step_are_fitted_by_the_flattest_and_the_steepest_curve(fractions: list[float]) -> None:
    """Ten times the largest fraction, and a third of the smallest step: beyond these, curves cannot be told apart."""
    at = np.array(fractions)
    assert fit_saturating(at, 0.98 - 0.03 * at).f_0 == pytest.approx(10 * at[-1], rel=1e-2)
    assert fit_saturating(at, np.where(at == 0, 0.98, 0.93)).f_0 == pytest.approx(at[1] / 3, rel=1e-2)


def test_control_the_fit_is_one_of_least_squares() -> None:
    """No neighbour of the fit has a smaller residual, on values that do not follow the form."""
    fractions, values = np.array([0.0, 0.01, 0.05, 0.10, 0.25]), np.array([0.98, 0.975, 0.95, 0.955, 0.93])
    fit = fit_saturating(fractions, values)

    def squares(m_0: float, m_inf: float, f_0: float) -> float:
        return float(np.square(np.array([Fit(m_0, m_inf, f_0, 0).at(f) for f in fractions]) - values).sum())

    least = squares(fit.m_0, fit.m_inf, fit.f_0)
    assert least == pytest.approx(5 * fit.residual**2)
    for scale in (0.98, 0.999, 1.001, 1.02):
        assert squares(fit.m_0 * scale, fit.m_inf, fit.f_0) > least
        assert squares(fit.m_0, fit.m_inf * scale, fit.f_0) > least
        assert squares(fit.m_0, fit.m_inf, fit.f_0 * scale) > least
