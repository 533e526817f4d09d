"""Where labels go so that they hide neither each other nor what they name. All positions are in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle, from (left, bottom) to (right, top)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, other: Box) -> float:
        """The area of this one that `other` does not cover."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(other)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as they can be, in the same order, at least `gap` apart, in [low, high].

    Where there is no room for that, they are spaced evenly. Least squares with an order constraint: neighbours
    that would come too near are pooled and share their mean (Ayer et al. 1955).
    """
    if len(wanted) * gap > high - low + gap:
        gap = (high - low) / max(len(wanted) - 1, 1)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # [sum, count] of the wanted places less the gaps before them
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    levels = [total / count for total, count in pools for _ in range(int(count))]
    most = high - (len(wanted) - 1) * gap
    places = [0.0] * len(wanted)
    for rank, (i, level) in enumerate(zip(order, levels, strict=True)):
        places[i] = min(max(level, low), most) + rank * gap
    return places


ANGLES = tuple(math.radians(15 * step) for step in range(24))
RADII = (8, 13, 19, 26)  # points of type


def place_beside(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Iterable[Box],
    area: Box,
    scale: float = 1.0,
) -> list[Box | None]:
    """A box of each size beside its point, within the area and free of obstacles, points, leaders and other boxes.

    None where there is no such place. Greedy: the loneliest points first, each at the nearest free place.
    `scale` is pixels a point of type.
    """
    half = 5 * scale
    marks = [Box(x - half, y - half, x + half, y + half) for x, y in points]
    taken = [*obstacles, *marks]
    crowd = [sum(math.dist(p, q) < 60 * scale for q in points) for p in points]
    leaders: list[tuple[tuple[float, float], tuple[float, float]]] = []
    placed: list[Box | None] = [None] * len(points)
    for i in sorted(range(len(points)), key=lambda i: (crowd[i], points[i])):
        for radius, angle in product(RADII, ANGLES):
            box = _box_at(points[i], sizes[i], radius * scale, angle)
            leader = (points[i], nearest(box, points[i]))
            if (
                box.outside(area) < 1e-6
                and not any(box.overlap(other) for other in taken)
                and not any(_passes(leader, other) for other in marks if not _holds(other, points[i]))
                and not any(_passes(leader, other) for other in placed if other)
                and not any(_passes(other, box) for other in leaders)
            ):
                placed[i] = box
                taken.append(box)
                leaders.append(leader)
                break
    return placed


def nearest(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """The place of a box that is nearest to a point."""
    return min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top)


def _box_at(point: tuple[float, float], size: tuple[float, float], radius: float, angle: float) -> Box:
    """The box whose nearest place to the point lies about `radius` away in that direction."""
    (x, y), (width, height) = point, size
    left = x + radius * math.cos(angle) - width / 2 * (1 - math.cos(angle))
    bottom = y + radius * math.sin(angle) - height / 2 * (1 - math.sin(angle))
    return Box(left, bottom, left + width, bottom + height)


def _holds(box: Box, point: tuple[float, float]) -> bool:
    return box.left <= point[0] <= box.right and box.bottom <= point[1] <= box.top


def _passes(segment: tuple[tuple[float, float], tuple[float, float]], box: Box) -> bool:
    """Whether a short segment passes through a box; looked up at a few places along it."""
    (x, y), (u, v) = segment
    return any(
        box.left < x + k / 8 * (u - x) < box.right and box.bottom < y + k / 8 * (v - y) < box.top for k in range(9)
    )
