"""Names beside what they name in a figure, in place of a legend. Called once limits and sizes are settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from minipersona.report.names import shortened
from minipersona.report.placement import Box, nearest, place_beside, spread
from minipersona.report.style import GREY, LABEL_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_HEIGHT = 1.2 * LABEL_SIZE  # points
Place = tuple[float, float]  # in data coordinates


def label_ends(axes: Axes, labels: Sequence[tuple[str, Place, str]]) -> None:
    """Names (text, place, colour) in a column to the right of the axes, moved apart, each led to its place."""
    height = axes.get_window_extent().height / _figure_of(axes).dpi * 72  # points
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [tuple(to_axes.transform(place)) for _, place, _ in labels]
    lines = spread([y for _, y in ends], LINE_HEIGHT / height, 0.0, 1.0)
    for (name, _, colour), (x, y), line in zip(labels, ends, lines, strict=True):
        axes.plot(
            [x, 1.04], [y, line], transform=axes.transAxes, color=colour, linewidth=0.6, clip_on=False, zorder=4.5
        )
        axes.text(1.05, line, shortened(name), transform=axes.transAxes, fontsize=LABEL_SIZE, va="center_baseline")


def label_points(
    axes: Axes,
    named: Sequence[tuple[str, Place, str]],
    curves: Sequence[Sequence[Place]] = (),
    points: Sequence[Place] = (),
    texts: Sequence[Any] = (),
) -> None:
    """Names (text, place, colour) near their places, off curves, points, other text and each other.

    Where a crowd leaves no room, the name goes into the column on the right.
    """
    scale = _figure_of(axes).dpi / 72  # pixels a point
    labels = [axes.text(0, 0, shortened(text), fontsize=LABEL_SIZE, va="bottom", zorder=7) for text, _, _ in named]
    extents = [label.get_window_extent() for label in labels]
    places = [tuple(axes.transData.transform(place)) for _, place, _ in named]
    obstacles = [Box(*text.get_window_extent().extents) for text in texts]
    for curve in curves:
        obstacles += _along([axes.transData.transform(place) for place in curve], 3 * scale)
    for x, y in (axes.transData.transform(place) for place in points):
        obstacles.append(Box(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale))
    area = Box(*axes.get_window_extent().extents)
    boxes = place_beside(places, [(e.width + 2, e.height) for e in extents], obstacles, area, scale)
    to_data = axes.transData.inverted()
    crowded = []
    for label, name, point, box in zip(labels, named, places, boxes, strict=True):
        if box is None:
            label.remove()
            crowded.append(name)
            continue
        x, y = to_data.transform((box.left + 1, box.bottom))
        label.set_position((x, y))
        end = nearest(box, point)
        if math.dist(point, end) > 12 * scale:
            (x, y), (u, v) = to_data.transform([point, end])
            axes.plot([x, u], [y, v], color=GREY, linewidth=0.5, zorder=4.5)
    label_ends(axes, crowded)


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _along(line: Sequence[Any], half: float) -> list[Box]:
    """Small boxes all along a line of pixel positions."""
    boxes = []
    for (x, y), (u, v) in pairwise(line):
        pieces = max(1, round(math.hypot(u - x, v - y) / (2 * half)))
        for k in range(pieces + 1):
            a, b = x + (u - x) * k / pieces, y + (v - y) * k / pieces
            boxes.append(Box(a - half, b - half, a + half, b + half))
    return boxes
