"""The front: two panels of M1 against what was learned, of the ordinary rows and under the measured personas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from minipersona.report.drawing import (
    GREEN,
    GREY,
    INK,
    ORANGE,
    Style,
    bars,
    colour_of,
    grouped,
    new_figure,
    phase_title,
    point_style,
    shortened,
    thresholds,
)  # fmt: skip
from minipersona.report.front import FrontRow
from minipersona.report.series import Series
from minipersona.run.judgement import LEAST_LEARNED, LEAST_LEARNED_PERSONAS, TRADE_OFF_LEARNED, Bounds
from minipersona.study_config import BEYOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Across = Callable[[FrontRow], float]
OUTLINE: Style = {"linestyle": "", "markerfacecolor": "none", "markeredgecolor": INK}


def front(series: Series) -> Figure:
    """Every recipe as a point, marked by its phase, and the line that doing less follows; the legend has the left's."""
    rows: Sequence[FrontRow] = series.rows
    under = [row for row in rows if row.learned_personas is not None]
    both = any(row.kind == "recipe" for row in under)
    figure = new_figure(12.5 if both else 9, 6)
    left, *right = figure.subplots(1, 2 if both else 1, sharey=True, squeeze=False)[0]
    _panel(left, rows, lambda row: row.learned, LEAST_LEARNED, series.bounds)
    left.set_xlabel("learned (share of the baseline's reduction of held-out loss)")
    left.set_ylabel("M1 (mean cosine between persona vectors)")
    for axes in right:
        _panel(axes, under, lambda row: row.learned_personas or 0.0, LEAST_LEARNED_PERSONAS, series.bounds)
        axes.set_xlabel("learned under the measured personas")
    last = right[-1] if right else left
    last.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    return figure


def _panel(axes: Axes, rows: Sequence[FrontRow], across: Across, least: float, bounds: Bounds) -> None:
    kinds = grouped(rows, lambda row: row.kind)
    base, baseline, recipes = (kinds.get(kind, []) for kind in ("base", "baseline", "recipe"))
    _limit(axes, rows, across, bounds)
    _regions(axes, least, bounds)
    for phase, group in grouped([*baseline, *recipes], lambda row: row.phase).items():
        bars(axes, group, across, colour_of(phase))
        axes.plot(*_xy(group, across), markersize=7, zorder=6, label=_title(phase, group), **point_style(phase))
    _beside(axes, "reference", kinds.get("reference", []), across, {**OUTLINE, "marker": "h", "markersize": 8})
    _beside(axes, "control", kinds.get("control", []), across, {**OUTLINE, "marker": "x", "markersize": 7})
    fresh: Style = {"linestyle": "", "marker": ".", "color": GREY, "markersize": 6, "zorder": 5}
    _beside(axes, "fresh seed of a passer", kinds.get("fresh seed", []), across, fresh)
    ring: Style = {**OUTLINE, "marker": "o", "markersize": 14, "markeredgewidth": 1.6}
    confirmed = [row for row in rows if row.confirmed and "on the way" not in row.kind]
    _beside(axes, "confirmed by fresh seeds", confirmed, across, ring)
    dose = [*base, *kinds.get("baseline on the way", []), *baseline]
    if dose:
        axes.plot(*_xy(dose, across), color=INK, marker="o", markersize=4, zorder=4, label="baseline along training")
    scaled = kinds.get("scaled baseline", [])
    if scaled:
        axes.plot(*_xy(scaled, across), color=GREY, marker=".", markersize=4, linestyle=(0, (5, 2)), zorder=3,
                  label="baseline's update, scaled")  # fmt: skip
    plus: Style = {"linestyle": "", "marker": "+", "color": GREY, "markersize": 6}
    _beside(axes, "the same, at a recipe's loss", kinds.get("matched scale", []), across, plus)
    thresholds(axes, bounds)
    for row in rows:
        if row.label:
            above = row.kind != "base" and row.m1 >= np.interp(across(row), *_xy(dose, across)) if dose else False
            _label(axes, row, across, bool(above))


def _title(phase: str, group: Sequence[FrontRow]) -> str:
    """The phase in the legend; beyond the registered ones by the names of its recipes."""
    names = "; ".join(dict.fromkeys(row.recipe for row in group))
    return f"{phase}  {shortened(names, 26)}" if phase.startswith(BEYOND) else phase_title(phase)


def _limit(axes: Axes, rows: Sequence[FrontRow], across: Across, bounds: Bounds) -> None:
    learned = [across(row) for row in rows]
    m1 = [value for row in rows for value in (row.m1, row.m1_low, row.m1_high)]
    low, high = min(bounds.passing, *m1), max(bounds.collapsed, *m1)
    axes.set_xlim(min(0, *learned) - 0.04, max(1, *learned) + 0.05)
    axes.set_ylim(low - 0.14 * (high - low), high + 0.1 * (high - low))


def _regions(axes: Axes, least: float, bounds: Bounds) -> None:
    """Where the substantive rule can pass, and where a recipe is a trade-off."""
    right = axes.get_xlim()[1]
    for (start, end), colour, name in (
        ((least, right), GREEN, "PASS"),
        ((TRADE_OFF_LEARNED, least), ORANGE, "trade-off"),
    ):
        axes.fill_between([start, end], -1, bounds.passing, color=colour, alpha=0.10, linewidth=0, zorder=0)
        axes.annotate(name, ((start + end) / 2, 0), (0, 6), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", color=colour, fontweight="bold")  # fmt: skip


def _beside(axes: Axes, name: str, rows: Sequence[FrontRow], across: Across, style: Style) -> None:
    """Draw points that are not recipes of the search, or marks around those that are."""
    if rows:
        axes.plot(*_xy(rows, across), label=name, **{"zorder": 7, **style})


def _xy(rows: Sequence[FrontRow], across: Across) -> tuple[list[float], list[float]]:
    return [across(row) for row in rows], [row.m1 for row in rows]


def _label(axes: Axes, row: FrontRow, across: Across, above: bool) -> None:
    """The row's label beside its point: to the upper left of one above the baseline's line, else to the lower left
    or, near the left edge, the lower right.
    """
    near_left = across(row) < sum(axes.get_xlim()) / 2
    offset, side = ((-30, 20), "right") if above else ((14, -20), "left") if near_left else ((-14, -22), "right")
    axes.annotate(
        shortened(row.label), (across(row), row.m1), offset, textcoords="offset points", ha=side, fontsize=8.5,
        zorder=8, arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
