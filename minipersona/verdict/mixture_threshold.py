"""How much broad data keeps the personas apart: the smallest mixed-in fraction at which M1 falls below 0.95.

M1 as a function of the broad fraction f is fitted with the saturating form

    M1(f) = m_inf + (m_0 - m_inf) exp(-f / f_0)

by least squares over the fractions of one phase and f = 0, the recipe with nothing mixed in. The form is
linear in m_inf and m_0 once f_0 is given (variable projection, Golub and Pereyra 1973), so that only log f_0 is
searched. The threshold is where the curve crosses 0.95, if it does so between 0 and the largest measured
fraction; nothing is said beyond that. Its interval comes from a bootstrap over questions, the same ones for all cells,
and a fit to each resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from minipersona.config import parse_ratio
from minipersona.run.judgement import PASS_M1
from minipersona.run.result import Interval
from minipersona.verdict.doing_less import Bootstrap, Resampled
from minipersona.verdict.recipe_results import RecipeResult, mixtures_reference
from minipersona.verdict.results import CellResult, StudyResults

LEAST_POINTS = 4  # one more than the form has parameters
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """The fitted curve; `residual` is the root mean square, in units of M1."""

    m_0: float
    m_inf: float
    f_0: float
    residual: float

    def at(self, fraction: float) -> float:
        """M1 at a broad fraction."""
        return self.m_inf + (self.m_0 - self.m_inf) * math.exp(-fraction / self.f_0)

    def crossing(self, most: float) -> float | None:
        """The smallest fraction in [0, most] with M1 < 0.95 (its infimum), None where there is none."""
        if self.m_0 < PASS_M1:
            return 0.0
        if self.at(most) >= PASS_M1:
            return None  # the curve is monotone
        return self.f_0 * math.log((self.m_0 - self.m_inf) / (PASS_M1 - self.m_inf))


def fit_saturating(fractions: Array, values: Array) -> Fit:
    """The least-squares fit to M1 `values` (n,) at broad `fractions` (n,), n >= 3 of them different."""
    from scipy.optimize import minimize_scalar

    def projected(log_f_0: float) -> tuple[float, Array]:
        decay = np.exp(-fractions / math.exp(log_f_0))  # (n,)
        design = np.stack([decay, 1 - decay], axis=1)  # (n, 2): M1 = m_0 decay + m_inf (1 - decay)
        solution = np.linalg.lstsq(design, values, rcond=None)[0]
        return float(np.square(design @ solution - values).sum()), solution

    # With f_0 below a third of the smallest step, curves differ only between two fractions; beyond ten times the
    # largest fraction the curve is a straight line within the range.
    steps = np.diff(np.unique(fractions))
    bounds = (math.log(float(steps.min()) / 3), math.log(10 * float(fractions.max())))
    found = minimize_scalar(lambda x: projected(x)[0], bounds=bounds, method="bounded", options={"xatol": 1e-4})
    squares, (m_0, m_inf) = projected(found.x)
    return Fit(float(m_0), float(m_inf), math.exp(found.x), math.sqrt(squares / len(fractions)))


@dataclass(frozen=True)
class MixturePoint:
    """M1 at a broad fraction."""

    fraction: float
    m1: float


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The smallest broad fraction with M1 < 0.95; None with a `reason`, such as none in range."""

    fraction: float | None = None
    reason: str | None
    ci95: tuple[float, float | None] | None = None  # an end beyond the range is None
    share_in_range: float | None = None  # of the resamples
    fit: Fit | None = None
    range: Interval | None = None  # of the measured fractions
    smallest_measured: float | None = None  # fraction with M1 < 0.95
    points: tuple[MixturePoint, ...] = ()


def mixture_threshold(
    recipes: Sequence[RecipeResult], phase: str, results: StudyResults, bootstrap: Bootstrap
) -> Threshold:
    """The threshold of phase 5A or 5B."""
    reference = mixtures_reference(results)
    if reference is None:
        return Threshold(reason="the recipe with nothing mixed in is not done")
    measured = [(MixturePoint(0.0, reference.final.m1), _resampled((reference,), bootstrap))]
    for recipe in recipes:
        if recipe.phase == phase:
            measured.append((MixturePoint(broad_fraction(recipe), recipe.m1), _resampled(recipe.cells, bootstrap)))
    measured.sort(key=lambda point: point[0].fraction)
    points = tuple(point for point, _ in measured)
    if len(points) < LEAST_POINTS:
        reason = f"{len(points)} fractions are measured; a fit needs {LEAST_POINTS}"
        return Threshold(reason=reason, points=points)
    if find_spec("scipy") is None:
        return Threshold(reason="scipy is not installed; pip install 'minipersona[report]'", points=points)

    fractions = np.array([point.fraction for point in points])
    values = np.array([point.m1 for point in points])
    fit, most = fit_saturating(fractions, values), float(fractions.max())
    threshold = fit.crossing(most)
    known = [resampled for _, resampled in measured if resampled is not None]
    interval, share = _interval(fractions, values, known, most) if len(known) == len(points) else (None, None)
    none_in_range = f"none in range: up to {most:g} the fitted M1 stays at or above 0.95"
    return Threshold(
        fraction=threshold,
        reason=none_in_range if threshold is None else None,
        ci95=interval,
        share_in_range=share,
        fit=fit,
        range=(0.0, most),
        smallest_measured=min((point.fraction for point in points if point.m1 < PASS_M1), default=None),
        points=points,
    )


def broad_fraction(recipe: RecipeResult) -> float:
    """Of a mixture, in rows: 95:5, narrow:broad, is 0.05."""
    narrow, broad = parse_ratio(recipe.name)
    return broad / (narrow + broad)


def _interval(
    fractions: Array, values: Array, resampled: list[Resampled], most: float
) -> tuple[tuple[float, float | None] | None, float]:
    """The percentile interval of the threshold, None for an end beyond the range, and the share of resamples within it.

    The resamples are moved so that their mean is the measured M1, as for M1's own interval.
    """
    draws = np.stack([r.values.numpy() - float(r.values.mean()) for r in resampled]) + values[:, None]  # (n, R)
    crossings = [fit_saturating(fractions, draw).crossing(most) for draw in draws.T]
    finite = np.array([math.inf if crossing is None else crossing for crossing in crossings])
    low, high = np.quantile(finite, [0.025, 0.975], method="inverted_cdf")  # does not average a number with infinity
    share = float(np.isfinite(finite).mean())
    if math.isinf(low):
        return None, share
    return (float(low), float(high) if math.isfinite(high) else None), share


def _resampled(cells: tuple[CellResult, ...], bootstrap: Bootstrap) -> Resampled | None:
    """Of a recipe, the mean over its seeds; None where vectors are missing."""
    resampled = [bootstrap.of_checkpoint(cell, cell.final) for cell in cells]
    known = [one for one in resampled if one is not None]
    if len(known) < len(cells):
        return None
    values = sum((one.values for one in known[1:]), known[0].values) / len(known)
    return Resampled(sum(one.m1 for one in known) / len(known), values)
