"""Cosines between personas, what the collapse consists of, and M1 against the share of broad data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minipersona.report.labels import label_points
from minipersona.report.names import Row, phase_title, shortened
from minipersona.report.style import (
    BLUE,
    GREY,
    INK,
    PALE,
    VERMILLION,
    by,
    new_figure,
    point_style,
    settle,
    thresholds,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cosine_matrices(rows: Sequence[Row]) -> Figure:
    """A matrix a model, the cosine written into each cell, on one scale of grey-safe colours (cividis)."""
    models = by(rows, "model")
    names = list(dict.fromkeys(row["persona"] for row in rows))
    low = min(row["cosine"] for row in rows)
    figure = new_figure(1.6 + 4.4 * len(models), 5.3)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (model, group) in zip(panels, models.items(), strict=True):
        value = {(row["persona"], row["other"]): row["cosine"] for row in group}
        matrix = [[value[a, b] for b in names] for a in names]  # (P, P)
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=1.0)
        axes.set_title(f"{shortened(model, 30)}   M1 {group[0]['m1']:.3f}")
        axes.set_xticks(
            range(len(names)), [shortened(name, 22) for name in names], rotation=55, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names] if axes is panels[0] else [])
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


def decomposition(rows: Sequence[Row]) -> Figure:
    """A line a recipe, three measures side by side."""
    figure = new_figure(11, 1.3 + 0.215 * len(rows))
    panels = figure.subplots(1, 3, sharey=True)
    columns = (
        ("shared_mean_share", "shared mean", "share of the mean squared norm"),
        ("between_of_base", "between personas", "variance, as a multiple of the base's"),
        ("within_of_base", "within personas", "variance, as a multiple of the base's"),
    )
    for axes, (key, title, unit) in zip(panels, columns, strict=True):
        for row, colour, dash in ((rows[0], GREY, "-"), *((r, INK, "--") for r in rows[1:2] if r["phase"] == "1")):
            if row[key] is not None:
                axes.axvline(row[key], color=colour, linewidth=0.9, linestyle=dash, zorder=1)
        for place, row in enumerate(rows):
            if row[key] is not None:
                axes.plot(row[key], place, markersize=6, **point_style(row["phase"]))
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    for axes in panels[1:]:
        left, right = axes.get_xlim()
        axes.set_xlim(min(0.0, left), right + 0.04 * (right - left))
    panels[0].set_yticks(range(len(rows)), [f"{row['phase']}  {shortened(row['recipe'], 40)}".strip() for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def mixture(rows: Sequence[Row]) -> Figure:
    """A panel a phase: the measured ratios, the fitted curve, and where it crosses 0.95."""
    phases = by(rows, "phase")
    figure = new_figure(5.4 * len(phases), 3.9)
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for axes, (phase, group) in zip(panels, phases.items(), strict=True):
        kinds = by(group, "kind")
        thresholds(axes, "outside" if axes is panels[-1] else "")
        curve = kinds.get("fit", [])
        axes.plot([100 * row["fraction"] for row in curve], [row["m1"] for row in curve], color=BLUE, zorder=2)
        for row in kinds["measured"]:
            _measured(axes, row)
        axes.set_title(phase_title(phase))
        axes.set_xlabel("broad data, % of rows")
        axes.margins(x=0.08, y=0.12)
    panels[0].set_ylabel("M1 (mean cosine)")
    settle(figure)
    for axes, group in zip(panels, phases.values(), strict=True):
        kinds = by(group, "kind")
        named = [(name, _place(seeds[0]), INK) for name, seeds in by(kinds["measured"], "recipe").items()]
        named += [_crossing(axes, row) for row in kinds.get("threshold", [])]
        fitted, measured = ([_place(row) for row in kinds.get(kind, [])] for kind in ("fit", "measured"))
        label_points(axes, named, curves=[fitted], points=measured)
    return figure


def _place(row: Row) -> tuple[float, float]:
    return 100 * row["fraction"], row["m1"]


def _measured(axes: Axes, row: Row) -> None:
    x, y = _place(row)
    if row["m1_low"] is not None and row["m1_high"] is not None:
        axes.vlines(x, row["m1_low"], row["m1_high"], color=INK, linewidth=1.2, zorder=3)
    axes.plot(x, y, "o", color=INK, markersize=5, zorder=4)


def _crossing(axes: Axes, row: Row) -> tuple[str, tuple[float, float], str]:
    """Mark where the curve crosses 0.95 and how sure that is -> what to call it, and where."""
    x, y = _place(row)
    bounds = [None if row[f"fraction_{end}"] is None else 100 * row[f"fraction_{end}"] for end in ("low", "high")]
    if bounds != [None, None]:
        left, right = (edge if bound is None else bound for bound, edge in zip(bounds, axes.get_xlim(), strict=True))
        axes.hlines(y, left, right, color=VERMILLION, linewidth=3, alpha=0.6, zorder=3)
    axes.plot(x, y, "D", color=VERMILLION, markersize=6, zorder=5)
    low, high = ("beyond" if bound is None else f"{bound:.1f}" for bound in bounds)
    return f"{x:.1f}%" + (f"  [{low}, {high}]" if bounds != [None, None] else ""), (x, y), VERMILLION
