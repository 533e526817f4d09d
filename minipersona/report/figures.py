"""The figures of M1, and all of them by name: each is drawn from its series alone.

Needs matplotlib only where a figure is drawn. A legend stands to the right of its panel, and only the few points with
a label are named in place.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minipersona.report.curves import MixtureRow, StepRow
from minipersona.report.drawing import (
    BLUE,
    INK,
    STYLE,
    VERMILLION,
    Style,
    bars,
    grouped,
    intervals,
    legend,
    line_styles,
    new_figure,
    phase_title,
    shortened,
    thresholds,
)  # fmt: skip
from minipersona.report.front_figure import front
from minipersona.report.geometry_figures import cosines, decomposition, personas, transfer, voice
from minipersona.report.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(series: Series) -> bytes:
    """The figure as PNG bytes, without a date or a version, so that equal series are equal bytes."""
    from matplotlib.style import context

    file = io.BytesIO()
    with context(["default", STYLE]):
        figure = DRAWINGS[series.name](series)
        figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def m1_by_step(series: Series) -> Figure:
    """One panel a phase, with the baseline in black in each; its legend has the highest last M1 first."""
    rows: Sequence[StepRow] = series.rows
    seeds = grouped((row for row in rows if row.recipe == "baseline"), lambda row: row.seed)
    baseline = next(iter(seeds.values()), [])
    phases = grouped(rows, lambda row: row.phase)
    columns = min(2, len(phases))
    lines = math.ceil(len(phases) / columns)
    figure = new_figure(6.2 * columns, 2.7 * lines)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    steps = sorted({row.step for row in baseline or rows})
    for number, (axes, (phase, group)) in enumerate(zip(panels, phases.items(), strict=False)):
        axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.tick_params(labelbottom=True)
        axes.set_title(phase_title(phase))
        thresholds(axes, series.bounds, named=number == 0)
        recipes = {"baseline": baseline} if baseline else {}
        recipes |= grouped(group, lambda row: row.recipe)
        styles = line_styles()
        for name, own in sorted(recipes.items(), key=lambda item: -item[1][-1].m1):
            style = {"color": INK, "marker": "."} if name == "baseline" else next(styles)
            for k, line in enumerate(grouped(own, lambda row: row.seed).values()):
                _line(axes, line, style, "" if k else shortened(name))
        legend(axes)
        if number % columns == 0:
            axes.set_ylabel("M1 (mean cosine)")
        if number + columns >= len(phases):
            axes.set_xlabel("training step")
    for axes in panels[len(phases) :]:
        axes.remove()
    panels[0].set_xlim(0, max(row.step for row in rows))
    return figure


def _line(axes: Axes, line: Sequence[StepRow], style: Style, label: str) -> None:
    """A line through a cell's checkpoints with its band; a cell with one checkpoint is a point with its interval."""
    style = {**style, "markersize": 3.5}
    if len(line) <= 2:
        line, style = line[-1:], {**style, "linestyle": "", "markersize": 5.5}
        bars(axes, line, lambda row: row.step, style["color"])
    else:
        axes.fill_between(*intervals(line, lambda row: row.step), color=style["color"], alpha=0.22, linewidth=0)
    axes.plot([row.step for row in line], [row.m1 for row in line], clip_on=False, label=label, **style)


def mixture(series: Series) -> Figure:
    """A panel a phase: the measured ratios, the fitted curve, and where it crosses the bound."""
    rows: Sequence[MixtureRow] = series.rows
    phases = grouped(rows, lambda row: row.phase)
    figure = new_figure(6.2 * len(phases), 3.4)
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, (phase, group) in zip(panels, phases.items(), strict=True):
        kinds = grouped(group, lambda row: row.kind)
        thresholds(axes, series.bounds, named=axes is panels[0])
        bars(axes, kinds["measured"], _percent, INK)
        _plot(axes, kinds["measured"], "measured", color=INK, marker="o", linestyle="", markersize=5, zorder=4)
        if "fit" in kinds:
            _plot(axes, kinds["fit"], "fitted curve", color=BLUE, zorder=2)
        axes.set_title(phase_title(phase))
        axes.set_xlabel("broad data, % of rows")
        axes.margins(x=0.08, y=0.12)
        for row in kinds.get("threshold", []):
            _crossing(axes, row)
        legend(axes)
    panels[0].set_ylabel("M1 (mean cosine)")
    return figure


def _percent(row: MixtureRow) -> float:
    return 100 * row.fraction


def _plot(axes: Axes, rows: Sequence[MixtureRow], label: str, **style: Any) -> None:
    axes.plot([_percent(row) for row in rows], [row.m1 for row in rows], label=label, **style)


def _crossing(axes: Axes, row: MixtureRow) -> None:
    """Mark where the curve crosses the bound; the legend has the fraction and its interval, open where it is beyond."""
    label = f"crosses {row.m1:.4g} at {_percent(row):.1f}%"
    low, high = (None if bound is None else 100 * bound for bound in (row.fraction_low, row.fraction_high))
    if low is not None or high is not None:
        label += " [{}, {}]".format(*("beyond" if bound is None else f"{bound:.1f}" for bound in (low, high)))
        left, right = axes.get_xlim()
        low, high = left if low is None else low, right if high is None else high
        axes.hlines(row.m1, low, high, color=VERMILLION, linewidth=3, alpha=0.6, zorder=3)
    _plot(axes, [row], label, color=VERMILLION, marker="D", linestyle="", markersize=6, zorder=5)


DRAWINGS: Mapping[str, Callable[[Series], Figure]] = {
    "m1_against_learned": front,
    "m1_by_step": m1_by_step,
    "cosines": cosines,
    "decomposition": decomposition,
    "personas": personas,
    "transfer": transfer,
    "voice": voice,
    "mixture": mixture,
}
