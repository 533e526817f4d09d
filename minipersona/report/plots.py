"""M1 along training, and M1 against what was learned: each drawn from the rows of its series alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minipersona.report.labels import label_ends, label_points
from minipersona.report.names import Row, phase_title
from minipersona.report.style import (
    GREEN,
    GREY,
    INK,
    PHASE_STYLES,
    by,
    known,
    line_styles,
    new_figure,
    point_style,
    settle,
    thresholds,
)
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = {"color": INK, "linestyle": "-", "marker": "."}

# ---------------------------------------------------------------- M1 against step


def m1_by_step(rows: Sequence[Row]) -> Figure:
    """One panel a phase, with the baseline in black in each."""
    reference = next(iter(by([row for row in rows if row["recipe"] == "baseline"], "seed").values()), [])
    phases = by(rows, "phase")
    columns = min(3, len(phases))
    lines = math.ceil(len(phases) / columns)
    figure = new_figure(4.3 * columns, 3.0 * lines)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(phases) :]:
        axes.remove()
    steps = sorted({row["step"] for row in reference or rows})
    ends: list[tuple[Axes, list[tuple[str, tuple[float, float], Any]]]] = []
    for number, (axes, (phase, group)) in enumerate(zip(panels, phases.items(), strict=False)):
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.tick_params(labelbottom=True)
        axes.set_title(phase_title(phase))
        thresholds(axes, "" if number else "inside")
        styles = line_styles()
        recipes = {"baseline": reference} if reference else {}
        ends.append((axes, []))
        for name, own in (recipes | by(group, "recipe")).items():
            style = BASELINE if name == "baseline" else next(styles)
            seeds = list(by(own, "seed").values())
            for line in seeds:
                _line(axes, line, style)
            ends[-1][1].append((name, _place(seeds[0][-1], "step"), style["color"]))
        if number % columns == 0:
            axes.set_ylabel("M1 (mean cosine)")
        if number + columns >= len(phases):
            axes.set_xlabel("training step")
    panels[0].set_xlim(0, max(row["step"] for row in rows))
    figure.draw_without_rendering()  # heights and limits are settled now
    for axes, labels in ends:
        label_ends(axes, labels)
    return figure


def _root(x: Any) -> Any:
    return abs(x) ** 0.5


def _square(x: Any) -> Any:
    return x**2


def _line(axes: Axes, line: Sequence[Row], style: dict[str, Any]) -> None:
    """A line through a cell's checkpoints with its band; of a cell with a single one only that, with its interval."""
    band = known(line, "m1_low", "m1_high")
    if len(line) <= 2:
        line, style = line[-1:], {**style, "linestyle": ""}
        for row in band[-1:]:
            axes.vlines(row["step"], row["m1_low"], row["m1_high"], color=style["color"])
    else:
        steps, low, high = ([row[key] for row in band] for key in ("step", "m1_low", "m1_high"))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.22, linewidth=0)
    axes.plot([row["step"] for row in line], [row["m1"] for row in line], markersize=3.5, clip_on=False, **style)


# ---------------------------------------------------------------- M1 against what was learned


def m1_against_learned(rows: Sequence[Row]) -> Figure:
    """Every recipe as a point, its doses on the way as a thin line, and the lines that merely doing less follows."""
    figure = new_figure(11, 7.2)
    axes: Axes = figure.subplots()
    kinds = by(rows, "kind")
    base, baseline, recipes = (kinds.get(kind, []) for kind in ("base", "baseline", "recipe"))
    dose = base + kinds.get("baseline on the way", []) + baseline
    scaled = kinds.get("scaled baseline", [])
    learned, m1 = _column(rows, "learned"), _column(rows, "m1")
    axes.set_xlim(min(0, *learned) - 0.04, max(1, *learned) + 0.03)
    ends = [end for row in known(rows, "m1_low", "m1_high") for end in (row["m1_low"], row["m1_high"])]
    axes.set_ylim(min(PASS_M1, *m1, *ends) - 0.012, max(COLLAPSED_M1, *m1, *ends) + 0.008)
    axes.fill_between([LEAST_LEARNED, axes.get_xlim()[1]], -1, PASS_M1, color=GREEN, alpha=0.10, linewidth=0, zorder=0)
    heading = axes.annotate(
        "substantive PASS", (1, 0), (-6, 6), xycoords="axes fraction", textcoords="offset points",
        ha="right", color=GREEN, fontweight="bold",
    )  # fmt: skip
    lines = thresholds(axes)
    on_the_way = by(kinds.get("recipe on the way", []), "phase", "recipe", "seed")
    for row in recipes:
        doses = on_the_way.get((row["phase"], row["recipe"], row["seed"]))
        if doses:
            way, colour = [*base, *doses, row], PHASE_STYLES[row["phase"]][0]
            axes.plot(_column(way, "learned"), _column(way, "m1"), color=colour, linewidth=0.7, alpha=0.3, zorder=2)
    axes.plot(_column(scaled, "learned"), _column(scaled, "m1"), color=GREY, marker=".", markersize=4, linewidth=1.4,
              linestyle=(0, (5, 2)), zorder=3)  # fmt: skip
    axes.plot(
        _column(dose, "learned"), _column(dose, "m1"), color=INK, marker="o", markersize=4, linewidth=1.6, zorder=4
    )
    for row in [*baseline, *recipes]:
        _point(axes, row)
    axes.set_xlabel("learned (share of the baseline's reduction of held-out loss)")
    axes.set_ylabel("M1 (mean cosine between persona vectors)")
    bars = [
        [(row["learned"], row["m1_low"]), (row["learned"], row["m1_high"])]
        for row in known([*baseline, *recipes], "m1_low", "m1_high")
    ]
    seeds = by([*baseline, *recipes], "phase", "recipe").values()
    named = [(f"{first['phase']}  {first['recipe']}", first) for first, *_ in seeds]
    named += [("untrained base", row) for row in base]
    named += [(f"step {row['dose']}", row) for row in kinds.get("baseline on the way", [])]
    named += [("the baseline's update, scaled", row) for row in scaled[len(scaled) // 2 :][:1]]
    settle(figure)
    colour_of = {phase: colour for phase, (colour, _, _) in PHASE_STYLES.items()}
    label_points(
        axes,
        [(text, _place(row), colour_of.get(row["phase"], GREY)) for text, row in named],
        curves=[[_place(row) for row in curve] for curve in (dose, scaled)] + bars,
        points=[_place(row) for row in recipes],
        texts=[heading, *lines],
    )
    return figure


def _place(row: Row, across: str = "learned") -> tuple[float, float]:
    return row[across], row["m1"]


def _column(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _point(axes: Axes, row: Row) -> None:
    if row["m1_low"] is not None and row["m1_high"] is not None:
        colour = PHASE_STYLES[row["phase"]][0]
        axes.vlines(row["learned"], row["m1_low"], row["m1_high"], color=colour, linewidth=1.2, zorder=5)
    axes.plot(row["learned"], row["m1"], markersize=7, zorder=6, **point_style(row["phase"]))
