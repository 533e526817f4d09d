"""The figures of the geometry itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minipersona.report.drawing import (
    GREY,
    INK,
    PALE,
    colour_of,
    grouped,
    legend,
    line_styles,
    new_figure,
    point_style,
    shortened,
)  # fmt: skip
from minipersona.report.geometry import CosineRow, DecompositionRow, PersonaRow, TransferRow
from minipersona.report.series import Series
from minipersona.run.judgement import PASS_SEPARATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cosines(series: Series) -> Figure:
    """A matrix a model, the cosine written into each cell, on one scale of grey-safe colours (cividis)."""
    rows: Sequence[CosineRow] = series.rows
    models = grouped(rows, lambda row: row.model)
    personas = list(dict.fromkeys(row.persona for row in rows))
    ticks = range(len(personas)), [shortened(name, 22) for name in personas]
    low = min(row.cosine for row in rows)
    columns = len(models) if len(models) <= 3 else 2
    lines = math.ceil(len(models) / columns)
    figure = new_figure(1.6 + 4.4 * columns, 0.9 + 4.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(models) :]:
        axes.remove()
    panels = panels[: len(models)]
    for number, (axes, (model, group)) in enumerate(zip(panels, models.items(), strict=True)):
        value = {(row.persona, row.other): row.cosine for row in group}
        matrix = [[value[a, b] for b in personas] for a in personas]  # (P, P)
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=1.0)
        axes.set_title(f"{shortened(model, 30)}   M1 {group[0].m1:.3f}")
        axes.set_xticks([])
        axes.set_yticks(*ticks if number % columns == 0 else ([],))
        if number + columns >= len(models):
            axes.set_xticks(*ticks, rotation=55, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, line in enumerate(matrix):
            for j, cosine in enumerate(line):
                if i != j:
                    colour = "white" if cosine < low + 0.55 * (1 - low) else INK
                    axes.text(j, i, _hundredths(cosine), ha="center", va="center", fontsize=6.3, color=colour)
    bar = figure.colorbar(image, ax=panels, shrink=0.8 / lines, pad=0.015)
    bar.set_label("cosine between two persona vectors")
    bar.outline.set_visible(False)
    return figure


def _hundredths(value: float) -> str:
    """``.97``; three digits from .995 on, so that nothing but 1 looks like 1."""
    text = f"{value:.2f}" if value < 0.995 else f"{value:.3f}"
    return text.replace("0.", ".", 1) if value < 1 else text


def decomposition(series: Series) -> Figure:
    """A line a recipe, three measures side by side."""
    rows: Sequence[DecompositionRow] = series.rows
    figure = new_figure(11, 1.3 + 0.215 * len(rows))
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
                axes.plot(value, place, markersize=6, **point_style(row.phase))
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


def personas(series: Series) -> Figure:
    """A panel a recipe, a line a persona: the base, the baseline and the recipe, from the most alike down."""
    rows: Sequence[PersonaRow] = series.rows
    recipes = grouped(rows, lambda row: row.recipe)
    names = [row.persona for row in sorted(next(iter(recipes.values())), key=lambda row: -row.base)]
    figure = new_figure(1.6 + 5 * len(recipes), 1.3 + 0.27 * len(names))
    panels = figure.subplots(1, len(recipes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (recipe, group) in zip(panels, recipes.items(), strict=True):
        places = [names.index(row.persona) for row in group]
        colour = colour_of(recipe.split(" ")[0])
        axes.hlines(places, [row.base for row in group], [row.after for row in group], color=PALE, zorder=1)
        axes.hlines(places, [row.base_low for row in group], [row.base_high for row in group], color=GREY, zorder=2)
        axes.hlines(places, [row.after_low for row in group], [row.after_high for row in group], color=colour, zorder=2)
        axes.plot([row.base for row in group], places, "o", color=GREY, markersize=5, label="base")
        known = [(row.baseline, place) for row, place in zip(group, places, strict=True) if row.baseline is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "|", color=INK, markersize=9, label="baseline")
        axes.plot([row.after for row in group], places, "D", color=colour, markersize=5, label=shortened(recipe, 28))
        axes.set_title(shortened(recipe))
        axes.set_xlabel("mean cosine with the other personas")
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1), borderaxespad=0)
    panels[0].set_yticks(range(len(names)), [shortened(name, 28) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def transfer(series: Series) -> Figure:
    """A panel a set of personas: the separation left at each layer by the baseline and by each confirmed recipe."""
    rows: Sequence[TransferRow] = series.rows
    sets = grouped(rows, lambda row: row.personas)
    figure = new_figure(1.6 + 4.2 * len(sets), 3.6)
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, (name, group) in zip(panels, sets.items(), strict=True):
        recipes = grouped(group, lambda row: row.recipe)
        first = next(iter(recipes.values()))
        axes.plot(*_by_layer(first, "separation_baseline"), color=INK, marker=".", label="baseline")
        for style, (recipe, own) in zip(line_styles(), recipes.items(), strict=False):
            axes.plot(*_by_layer(own, "separation"), markersize=4, label=shortened(recipe), **style)
        axes.axhline(PASS_SEPARATION, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        for row in first:
            if row.deciding:
                axes.axvline(row.layer, color=GREY, linewidth=0.9, zorder=1)
        axes.set_title(f"personas: {name}")
        axes.set_xlabel("layer")
    highest = max(1.0, *(value for row in rows for value in (row.separation, row.separation_baseline)))
    panels[0].set_ylim(0, 1.05 * highest)  # of all panels
    panels[0].set_ylabel("separation, share of the base's")
    legend(panels[-1])
    return figure


def _by_layer(rows: Sequence[TransferRow], name: str) -> tuple[list[int], list[float]]:
    """Layers, and a number of the rows there, the mean over seeds."""
    layers = grouped(rows, lambda row: row.layer)
    return [*layers], [sum(getattr(row, name) for row in there) / len(there) for there in layers.values()]


def voice(series: Series) -> Figure:
    """A bar a model, its share of the base's voice, with the interval of its first seed and a dot a seed."""
    models = grouped(series.rows, lambda row: row.model)
    figure = new_figure(10, 0.9 + 0.28 * len(models))
    axes = figure.subplots()
    for place, rows in enumerate(models.values()):
        first, shares = rows[0], [row.share for row in rows]
        colour, mean = colour_of(first.phase) if first.phase else GREY, sum(shares) / len(shares)
        axes.barh(place, mean, height=0.6, color=colour, alpha=0.55)
        axes.hlines(place, first.share_low, first.share_high, color=INK, linewidth=1.4)
        if len(rows) > 1:
            axes.plot(shares, [place] * len(shares), ".", color=INK, markersize=5)
        axes.annotate(f"{mean:.2f}", (max(*shares, first.share_high), place), (6, 0),
                      textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    axes.axvline(1, color=GREY, linewidth=0.9, linestyle="-", zorder=1)
    axes.axvline(0, color=GREY, linewidth=0.9, zorder=1)
    axes.set_yticks(range(len(models)), [shortened(model, 40) for model in models])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("voice, as a share of the base's")
    return figure
