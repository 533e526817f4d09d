"""How much broad data keeps the personas apart: the smallest mixed-in fraction at which M1 falls below its bound.

With one seed the noise of training is not known, and a curve through four points of one seed would claim more than they
tell. So the threshold is said to lie between two measured fractions, or beyond them all. With several seeds M1 as a
function of the broad fraction f is fitted with the saturating form

    M1(f) = m_inf + (m_0 - m_inf) exp(-f / f_0)

by least squares over the mean M1 of each fraction and f = 0, the recipe with nothing mixed in. The form is linear in
m_inf and m_0 once f_0 is given (variable projection, Golub and Pereyra 1973), so that only log f_0 is searched. The
threshold is where the curve crosses the bound, if it does so between 0 and the largest measured fraction. Its interval
is of fits to resamples: questions are drawn anew, the same ones for all cells, and each fraction's mean is moved by the
spread of seeds, pooled over the fractions, times a t variable over the root of its number of seeds.

A fraction counts rows. Of a raw text all tokens are supervised, so that its share of what is learned is another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from minipersona.config import parse_ratio
from minipersona.run.directory import PROVENANCE
from minipersona.run.provenance import read_provenance
from minipersona.significance import Interval
from minipersona.verdict.cells import CellResult
from minipersona.verdict.doing_less import Bootstrap, Resampled
from minipersona.verdict.recipe_results import RecipeResult, mixtures_reference
from minipersona.verdict.results import StudyResults

LEAST_POINTS = 4  # one more than the form has parameters
SEED = 44  # of the t variables
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

    def crossing(self, bound: float, most: float) -> float | None:
        """The smallest fraction in [0, most] with M1 below the bound (its infimum), None where there is none."""
        if self.m_0 < bound:
            return 0.0
        if self.at(most) >= bound:
            return None  # the curve is monotone
        return self.f_0 * math.log((self.m_0 - self.m_inf) / (bound - self.m_inf))


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
    """M1 at a broad fraction, the mean over seeds."""

    fraction: float  # of the rows
    m1: float
    seeds: int = 1
    supervised_share: float | None = None  # of the supervised tokens; None where it is not recorded


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The smallest broad fraction with M1 below the bound: fitted, or the two measured ones between which it lies."""

    bound: float | None = None
    fraction: float | None = None  # by the fit
    between: Interval | None = None  # the largest fraction before it and the smallest after it that were measured
    reason: str | None  # why there is no number
    ci95: tuple[float, float | None] | None = None  # an end beyond the range is None
    share_in_range: float | None = None  # of the resamples
    fit: Fit | None = None
    range: Interval | None = None  # of the measured fractions
    points: tuple[MixturePoint, ...] = ()


def mixture_threshold(
    recipes: Sequence[RecipeResult], phase: str, results: StudyResults, bootstrap: Bootstrap
) -> Threshold:
    """The threshold of phase 5A or 5B."""
    reference, bound = mixtures_reference(results), results.bounds.passing
    if reference is None:
        return Threshold(reason="the recipe with nothing mixed in is not done")
    groups = [(0.0, _plain_cells(reference, results))]
    groups += [(broad_fraction(r), r.cells) for r in recipes if r.phase == phase and r.role == "registered"]
    groups.sort(key=lambda group: group[0])
    points = tuple(_point(*group) for group in groups)
    values, most = [point.m1 for point in points], points[-1].fraction
    if len(points) == 1:
        return Threshold(bound=bound, reason="no mixture is done", points=points)
    between = _between(points, bound)
    found = Threshold(
        bound=bound,
        between=between,
        reason=f"none in range: up to {most:g} M1 stays at or above {bound:.4g}" if between is None else None,
        range=(0.0, most),
        points=points,
    )
    if len(points) < LEAST_POINTS or any(point.seeds < 2 for point in points) or find_spec("scipy") is None:
        return found
    fractions = np.array([point.fraction for point in points])
    fit = fit_saturating(fractions, np.array(values))
    crossing = fit.crossing(bound, most)
    resampled = [_resampled(cells, bootstrap) for _, cells in groups]
    known = [one for one in resampled if one is not None]
    interval, share = None, None
    if len(known) == len(points):
        noise = _seed_noise([cells for _, cells in groups], bootstrap.resamples)
        interval, share = _interval(fractions, np.array(values), known, noise, bound, most)
    return Threshold(
        bound=bound,
        fraction=crossing,
        between=between,
        reason=f"none in range: up to {most:g} the fitted M1 stays at or above {bound:.4g}"
        if crossing is None
        else None,
        ci95=interval,
        share_in_range=share,
        fit=fit,
        range=(0.0, most),
        points=points,
    )


def broad_fraction(recipe: RecipeResult) -> float:
    """Of a mixture, in rows: 95:5, narrow:broad, is 0.05."""
    narrow, broad = parse_ratio(recipe.name)
    return broad / (narrow + broad)


def _plain_cells(reference: CellResult, results: StudyResults) -> tuple[CellResult, ...]:
    """The recipe with nothing mixed in, with every seed of the study."""
    return tuple(c for c in results.registered(reference.phase) if c.status == "done")


def _point(fraction: float, cells: Sequence[CellResult]) -> MixturePoint:
    m1 = sum(cell.final.m1 for cell in cells) / len(cells)
    return MixturePoint(fraction, m1, len(cells), _supervised_share(cells[0]))


def _supervised_share(cell: CellResult) -> float | None:
    assert cell.directory is not None
    if not (cell.directory / PROVENANCE).is_file():
        return None
    share = read_provenance(cell.directory).mixture.get("supervised_share")
    return float(share) if isinstance(share, (int, float)) else None


def _between(points: Sequence[MixturePoint], bound: float) -> Interval | None:
    """The neighbours between which M1 falls below the bound for good, by increasing fraction; None where it never does.

    Both are 0 where the recipe with nothing mixed in and all mixtures lie below.
    """
    below = len(points)
    while below > 0 and points[below - 1].m1 < bound:
        below -= 1
    if below == len(points):
        return None
    return points[max(0, below - 1)].fraction, points[below].fraction


def _seed_noise(groups: Sequence[Sequence[CellResult]], resamples: int) -> Array:
    """(n, R): by what the mean M1 of each fraction may be off for the seeds that were drawn."""
    squares = sum(np.var([cell.final.m1 for cell in cells]) * len(cells) for cells in groups)
    freedom = sum(len(cells) - 1 for cells in groups)
    draws = np.random.default_rng(SEED).standard_t(freedom, size=(len(groups), resamples))
    roots = np.sqrt([len(cells) for cells in groups])[:, None]
    return np.asarray(math.sqrt(squares / freedom) * draws / roots)


def _interval(
    fractions: Array, values: Array, resampled: list[Resampled], noise: Array, bound: float, most: float
) -> tuple[tuple[float, float | None] | None, float]:
    """The percentile interval of the threshold, None for an end beyond the range, and the share of resamples within it.

    The resamples are moved so that their mean is the measured M1, as for M1's own interval.
    """
    draws = np.stack([r.values.numpy() - float(r.values.mean()) for r in resampled]) + values[:, None]  # (n, R)
    crossings = [fit_saturating(fractions, draw).crossing(bound, most) for draw in (draws + noise).T]
    finite = np.array([math.inf if crossing is None else crossing for crossing in crossings])
    low, high = np.quantile(finite, [0.025, 0.975], method="inverted_cdf")  # does not average a number with infinity
    share = float(np.isfinite(finite).mean())
    if math.isinf(low):
        return None, share
    return (float(low), float(high) if math.isfinite(high) else None), share


def _resampled(cells: Sequence[CellResult], bootstrap: Bootstrap) -> Resampled | None:
    """Of a recipe, the mean over its seeds; None where vectors are missing."""
    resampled = [bootstrap.m1_of(cell, cell.final) for cell in cells]
    known = [one for one in resampled if one is not None]
    if len(known) < len(cells):
        return None
    values = sum((one.values for one in known[1:]), known[0].values) / len(known)
    return Resampled(sum(one.estimate for one in known) / len(known), values)
