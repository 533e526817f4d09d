"""The figures, each drawn from the rows of its series alone. Needs matplotlib only where a figure is drawn.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; markers and line styles say the same
again for print. A legend stands to the right of its panel, and only the few points with a label are named in place.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from minipersona.report.blocks import one_line
from minipersona.report.series import CosineRow, DecompositionRow, MixtureRow, Series, StepRow, TradeOffRow
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1c1e21", "#6d747c", "#d5d9de"
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
Style = dict[str, Any]  # keyword arguments of matplotlib
STYLE: Style = {
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "font.family": "DejaVu Sans",  # the one that matplotlib ships
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}

# Of each phase: its name; colour, marker and whether the marker is filled.
PHASES = {
    "1": ("dose", INK, "o", True),
    "2A": ("KL to the base", BLUE, "o", True),
    "2B": ("R3F noise", BLUE, "s", False),
    "3": ("low rank", GREEN, "^", True),
    "4A": ("persona system prompts", ORANGE, "D", True),
    "4B": ("persona responses", ORANGE, "D", False),
    "EM": ("unmixed EM reference", INK, "*", True),
    "5A": ("raw text mixed in", VERMILLION, "v", True),
    "5B": ("instructions mixed in", PURPLE, "P", True),
    "5C": ("preventative steering", SKY, "X", True),
}
UNNAMED = ("", GREY, "o", True)

T = TypeVar("T")
K = TypeVar("K")
R = TypeVar("R", TradeOffRow, StepRow, MixtureRow)  # the rows that have an interval of M1


def draw(series: Series) -> bytes:
    """The figure as PNG bytes, without a date or a version, so that equal series are equal bytes."""
    from matplotlib.style import context

    file = io.BytesIO()
    with context(["default", STYLE]):
        figure = DRAWINGS[series.name](series.rows)
        figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def phase_title(phase: str) -> str:
    """``"2A"`` -> ``"2A  KL to the base"``."""
    return f"{phase}  {PHASES.get(phase, UNNAMED)[0]}".rstrip()


def shortened(text: str, most: int = 34) -> str:
    """A label that fits into a figure."""
    text = one_line(text)
    text = f" {text}" if text.startswith("_") else text  # matplotlib's legends leave out a label such as _x
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------- M1


def m1_against_learned(rows: Sequence[TradeOffRow]) -> Figure:
    """Every recipe as a point, marked by its phase, and the two lines that doing less follows."""
    figure = _new_figure(10.5, 6)
    axes: Axes = figure.subplots()
    kinds = grouped(rows, lambda row: row.kind)
    base, baseline, recipes = (kinds.get(kind, []) for kind in ("base", "baseline", "recipe"))
    _limit(axes, rows)
    axes.fill_between([LEAST_LEARNED, axes.get_xlim()[1]], -1, PASS_M1, color=GREEN, alpha=0.10, linewidth=0, zorder=0)
    axes.annotate("substantive PASS", (1, 0), (-6, 6), xycoords="axes fraction", textcoords="offset points",
                  ha="right", color=GREEN, fontweight="bold")  # fmt: skip
    for phase, group in grouped([*baseline, *recipes], lambda row: row.phase).items():
        _bars(axes, group, lambda row: row.learned, _colour(phase))
        axes.plot(*_xy(group), markersize=7, zorder=6, label=phase_title(phase), **_point_style(phase))
    dose = [*base, *kinds.get("baseline on the way", []), *baseline]
    scaled = kinds.get("scaled baseline", [])
    if dose:
        axes.plot(*_xy(dose), color=INK, marker="o", markersize=4, zorder=4, label="baseline along training")
    if scaled:
        axes.plot(*_xy(scaled), color=GREY, marker=".", markersize=4, linestyle=(0, (5, 2)), zorder=3,
                  label="baseline's update, scaled")  # fmt: skip
    _thresholds(axes)
    for row in rows:
        if row.label:
            above = row.kind != "base" and row.m1 >= np.interp(row.learned, *_xy(dose))
            _label(axes, row, bool(above))
    axes.set_xlabel("learned (share of the baseline's reduction of held-out loss)")
    axes.set_ylabel("M1 (mean cosine between persona vectors)")
    _legend(axes)
    return figure


def _limit(axes: Axes, rows: Sequence[TradeOffRow]) -> None:
    learned = [row.learned for row in rows]
    m1 = [value for row in rows for value in (row.m1, row.m1_low, row.m1_high)]
    axes.set_xlim(min(0, *learned) - 0.04, max(1, *learned) + 0.05)
    axes.set_ylim(min(PASS_M1, *m1) - 0.012, max(COLLAPSED_M1, *m1) + 0.01)


def _xy(rows: Sequence[TradeOffRow]) -> tuple[list[float], list[float]]:
    return [row.learned for row in rows], [row.m1 for row in rows]


def _label(axes: Axes, row: TradeOffRow, above: bool) -> None:
    """The row's label beside its point: to the upper left of one above the baseline's line, else to the lower right."""
    offset, side = ((-30, 20), "right") if above else ((14, -20), "left")
    axes.annotate(
        shortened(row.label), (row.learned, row.m1), offset, textcoords="offset points", ha=side, fontsize=8.5,
        zorder=8, arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def m1_by_step(rows: Sequence[StepRow]) -> Figure:
    """One panel a phase, with the baseline in black in each; its legend has the highest last M1 first."""
    seeds = grouped((row for row in rows if row.recipe == "baseline"), lambda row: row.seed)
    baseline = next(iter(seeds.values()), [])
    phases = grouped(rows, lambda row: row.phase)
    columns = min(2, len(phases))
    lines = math.ceil(len(phases) / columns)
    figure = _new_figure(6.2 * columns, 2.7 * lines)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    steps = sorted({row.step for row in baseline or rows})
    for number, (axes, (phase, group)) in enumerate(zip(panels, phases.items(), strict=False)):
        axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.tick_params(labelbottom=True)
        axes.set_title(phase_title(phase))
        _thresholds(axes, named=number == 0)
        recipes = {"baseline": baseline} if baseline else {}
        recipes |= grouped(group, lambda row: row.recipe)
        styles = _line_styles()
        for name, own in sorted(recipes.items(), key=lambda item: -item[1][-1].m1):
            style = {"color": INK, "marker": "."} if name == "baseline" else next(styles)
            for k, line in enumerate(grouped(own, lambda row: row.seed).values()):
                _line(axes, line, style, "" if k else shortened(name))
        _legend(axes)
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
        _bars(axes, line, lambda row: row.step, style["color"])
    else:
        axes.fill_between(*_intervals(line, lambda row: row.step), color=style["color"], alpha=0.22, linewidth=0)
    axes.plot([row.step for row in line], [row.m1 for row in line], clip_on=False, label=label, **style)


# ---------------------------------------------------------------- geometry


def cosines(rows: Sequence[CosineRow]) -> Figure:
    """A matrix a model, the cosine written into each cell, on one scale of grey-safe colours (cividis)."""
    models = grouped(rows, lambda row: row.model)
    personas = list(dict.fromkeys(row.persona for row in rows))
    ticks = range(len(personas)), [shortened(name, 22) for name in personas]
    low = min(row.cosine for row in rows)
    figure = _new_figure(1.6 + 4.4 * len(models), 5.3)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (model, group) in zip(panels, models.items(), strict=True):
        value = {(row.persona, row.other): row.cosine for row in group}
        matrix = [[value[a, b] for b in personas] for a in personas]  # (P, P)
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=1.0)
        axes.set_title(f"{shortened(model, 30)}   M1 {group[0].m1:.3f}")
        axes.set_xticks(*ticks, rotation=55, ha="right", rotation_mode="anchor")
        axes.set_yticks(*ticks if axes is panels[0] else ([],))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, line in enumerate(matrix):
            for j, cosine in enumerate(line):
                if i != j:
                    colour = "white" if cosine < low + 0.55 * (1 - low) else INK
                    axes.text(j, i, _hundredths(cosine), ha="center", va="center", fontsize=6.3, color=colour)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8, pad=0.015)
    bar.set_label("cosine between two persona vectors")
    bar.outline.set_visible(False)
    return figure


def _hundredths(value: float) -> str:
    """``.97``; three digits from .995 on, so that nothing but 1 looks like 1."""
    text = f"{value:.2f}" if value < 0.995 else f"{value:.3f}"
    return text.replace("0.", ".", 1) if value < 1 else text


def decomposition(rows: Sequence[DecompositionRow]) -> Figure:
    """A line a recipe, three measures side by side."""
    figure = _new_figure(11, 1.3 + 0.215 * len(rows))
    panels = figure.subplots(1, 3, sharey=True)
    unit = "variance, as a multiple of the base's"
    columns: tuple[tuple[str, str, Callable[[DecompositionRow], float | None]], ...] = (
        ("shared mean", "share of the mean squared norm", lambda row: row.shared_mean_share),
        ("between personas", unit, lambda row: row.between_of_base),
        ("within personas", unit, lambda row: row.within_of_base),
    )
    references = [(rows[0], GREY, "-"), *((row, INK, "--") for row in rows[1:2] if row.phase == "1")]
    for axes, (title, label, measure) in zip(panels, columns, strict=True):
        for row, colour, dash in references:
            if (value := measure(row)) is not None:
                axes.axvline(value, color=colour, linewidth=0.9, linestyle=dash, zorder=1)
        for place, row in enumerate(rows):
            if (value := measure(row)) is not None:
                axes.plot(value, place, markersize=6, **_point_style(row.phase))
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    for axes in panels[1:]:
        left, right = axes.get_xlim()
        axes.set_xlim(min(0.0, left), right + 0.04 * (right - left))
    panels[0].set_yticks(range(len(rows)), [f"{row.phase}  {shortened(row.recipe, 40)}".strip() for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def mixture(rows: Sequence[MixtureRow]) -> Figure:
    """A panel a phase: the measured ratios, the fitted curve, and where it crosses 0.95."""
    phases = grouped(rows, lambda row: row.phase)
    figure = _new_figure(6.2 * len(phases), 3.4)
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, (phase, group) in zip(panels, phases.items(), strict=True):
        kinds = grouped(group, lambda row: row.kind)
        _thresholds(axes, named=axes is panels[0])
        _bars(axes, kinds["measured"], _percent, INK)
        _plot(axes, kinds["measured"], "measured", color=INK, marker="o", linestyle="", markersize=5, zorder=4)
        if "fit" in kinds:
            _plot(axes, kinds["fit"], "fitted curve", color=BLUE, zorder=2)
        axes.set_title(phase_title(phase))
        axes.set_xlabel("broad data, % of rows")
        axes.margins(x=0.08, y=0.12)
        for row in kinds.get("threshold", []):
            _crossing(axes, row)
        _legend(axes)
    panels[0].set_ylabel("M1 (mean cosine)")
    return figure


def _percent(row: MixtureRow) -> float:
    return 100 * row.fraction


def _plot(axes: Axes, rows: Sequence[MixtureRow], label: str, **style: Any) -> None:
    axes.plot([_percent(row) for row in rows], [row.m1 for row in rows], label=label, **style)


def _crossing(axes: Axes, row: MixtureRow) -> None:
    """Mark where the curve crosses 0.95; the legend has the fraction and its interval, open where it is beyond."""
    label = f"crosses {row.m1:g} at {_percent(row):.1f}%"
    low, high = (None if bound is None else 100 * bound for bound in (row.fraction_low, row.fraction_high))
    if low is not None or high is not None:
        label += " [{}, {}]".format(*("beyond" if bound is None else f"{bound:.1f}" for bound in (low, high)))
        left, right = axes.get_xlim()
        low, high = left if low is None else low, right if high is None else high
        axes.hlines(row.m1, low, high, color=VERMILLION, linewidth=3, alpha=0.6, zorder=3)
    _plot(axes, [row], label, color=VERMILLION, marker="D", linestyle="", markersize=6, zorder=5)


# ---------------------------------------------------------------- parts


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, belonging to no window and to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def _thresholds(axes: Axes, named: bool = True) -> None:
    """Horizontal lines at the M1 below which a recipe can pass, and from which it counts as collapsed."""
    for value, meaning in ((COLLAPSED_M1, "collapsed from here"), (PASS_M1, "passes below")):
        label = f"{value:g}: {meaning}" if named else ""
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=":", zorder=1, label=label)


def _bars(axes: Axes, rows: Sequence[R], across: Callable[[R], float], colour: str) -> None:
    """The interval of every row that has one, as a vertical bar."""
    axes.vlines(*_intervals(rows, across), color=colour, linewidth=1.2, zorder=5)


def _intervals(rows: Sequence[R], across: Callable[[R], float]) -> tuple[list[float], list[float], list[float]]:
    """Of every row that has an interval of M1: its place on the horizontal axis, and the two ends."""
    known = [(across(r), r.m1_low, r.m1_high) for r in rows if r.m1_low is not None and r.m1_high is not None]
    return [x for x, _, _ in known], [low for _, low, _ in known], [high for _, _, high in known]


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)


def _colour(phase: str) -> str:
    return PHASES.get(phase, UNNAMED)[1]


def _point_style(phase: str) -> Style:
    """How a recipe of that phase is marked; the base, which has no phase, in grey."""
    _, colour, marker, filled = PHASES.get(phase, UNNAMED)
    face, edge, width = (colour, INK, 0.5) if filled else ("white", colour, 1.4)
    return {
        "linestyle": "",
        "marker": marker,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
    }


def _line_styles() -> Iterator[Style]:
    """How the first line of a panel looks, the second, and so on; no two of a dozen alike."""
    colours = cycle((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY))
    dashes = cycle(("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2))))
    markers = cycle(("o", "s", "^", "D", "v", "P", "X"))
    for colour, dash, marker in zip(colours, dashes, markers):  # noqa: B905, without end
        yield {"color": colour, "linestyle": dash, "marker": marker}


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The rows by the value of a key, in the order in which they first occur."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


DRAWINGS: Mapping[str, Callable[[Sequence[Any]], Figure]] = {
    "m1_against_learned": m1_against_learned,
    "m1_by_step": m1_by_step,
    "cosines": cosines,
    "decomposition": decomposition,
    "mixture": mixture,
}
