"""The scaled update that learned as much as a recipe: the baseline's, at the scale that has the recipe's held-out loss.

Whether a recipe is better than doing less is asked at equal held-out loss. The scale is searched for between scales
that are measured already, by interpolation that falls back on bisection, and M1 is then measured there rather than
interpolated: it is convex in the loss, so that a chord between two measured scales lies above the curve itself.

The loss may rise again beyond an optimum. Of several scales with the same loss the smallest counts, since it moves the
model the least.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from minipersona.records import write_record
from minipersona.run.judgement import LEAST_REDUCTION
from minipersona.run.measurement import measure
from minipersona.study.cell import Cell, Study
from minipersona.study.frontier import scaled_baseline
from minipersona.study.worker import Worker
from minipersona.verdict.files import Frontier, MatchedScale, matched_file, read_optional, read_result, step_of
from minipersona.verdict.results import StudyResults

TOLERANCE = 1e-3  # of the baseline's loss reduction; the sampling error of a held-out loss is some ten times as large
APART = 0.05  # how far in scale the slope's other points are from the matched one, at least


class Scaled(NamedTuple):
    """What is known of the update at a scale."""

    scale: float
    loss: float  # nats per supervised token of the held-out rows
    m1: float


# ---------------------------------------------------------------- which are due


def matches(study: Study, results: StudyResults) -> list[tuple[Cell, int]]:
    """The cells and steps whose losses a baseline's update is scaled to: every recipe at its last step and each
    baseline at the earlier ones, where the loss is one that the update has at some scale.

    A cell that confirms a pass is left out: it repeats a recipe that has a match.
    """
    by_hash = {cell.hash: cell for cell in study.cells}
    due = []
    for found in results.cells:
        if found.status != "done" or found.role == "confirmation":
            continue
        cell = by_hash[found.hash]
        scaled = study.scaled_for(cell)
        if not study.published(scaled) or cell.recipe.is_unmixed:
            continue
        update = measured_scales(study, scaled)
        rows = found.checkpoints[:-1] if cell == scaled else [found.final]
        due += [(cell, step_of(row)) for row in rows if row.eval_loss is not None and _reaches(update, row.eval_loss)]
    return due


def measured_scales(study: Study, baseline: Cell) -> list[Scaled]:
    """What is known of a baseline's update, by scale: of the study's own the frontier, of others both ends."""
    frontier = read_optional(study.directory / "frontier.json", Frontier)
    if frontier is not None and frontier.baseline == baseline.hash:
        known = [(point.scale, point.eval_loss, point.m1) for point in frontier.points]
    else:
        result = read_result(study.cell_directory(baseline))
        base, last = result.base, result.checkpoints[-1]
        known = [(0.0, base.eval_loss, base.m1), (1.0, last.eval_loss, last.m1)]
    return [Scaled(scale, loss, m1) for scale, loss, m1 in known if loss is not None]


def _reaches(update: Sequence[Scaled], loss: float) -> bool:
    """Whether the update has this loss at some scale above 0, and learned enough for shares of it to have a meaning."""
    if not update or update[0].loss - update[-1].loss <= LEAST_REDUCTION:
        return False
    return min(point.loss for point in update) <= loss < update[0].loss - _tolerance(update)


def _tolerance(update: Sequence[Scaled]) -> float:
    return TOLERANCE * (update[0].loss - update[-1].loss)


# ---------------------------------------------------------------- one of them


def measure_matched_scale(study: Study, cell: Cell, step: int, worker: Worker) -> None:
    """Find the scale for a cell at a step, and write what was measured there: vectors, losses and, last, the record."""
    baseline = study.scaled_for(cell)
    instruments = worker.resources.instruments(baseline.recipe.config)
    loss = next(row.eval_loss for row in read_result(study.cell_directory(cell)).checkpoints if row.step == step)
    assert loss is not None, "a match is due where there are held-out rows"
    points = measured_scales(study, baseline)
    tolerance, nearest = _tolerance(points), math.inf
    for propose in PROPOSALS:
        scale = propose(points, loss)
        worker.console.say(f"the baseline's update, scaled by {scale:.4f}")
        row, vectors, losses = measure(scaled_baseline(study, baseline, scale, worker), instruments, worker.console)
        assert row.eval_loss is not None and losses is not None
        point = Scaled(scale, row.eval_loss, row.m1)
        insort(points, point)
        if (distance := abs(point.loss - loss)) < nearest:
            nearest, best, metrics = distance, point, row
            vectors.save(matched_file(study.directory, cell.id, step, ".vectors.safetensors"))
            losses.save(matched_file(study.directory, cell.id, step, ".losses.safetensors"))
        if nearest <= tolerance:
            break
    record = MatchedScale(
        baseline=baseline.hash,
        cell=cell.hash,
        step=step,
        scale=best.scale,
        m1=best.m1,
        m1_ci95=(metrics.m1_low, metrics.m1_high),
        eval_loss=best.loss,
        persona_loss=metrics.persona_loss,
        between_variance=metrics.between_variance,
        within_variance=metrics.within_variance,
        slope=slope(points, best),
    )
    write_record(matched_file(study.directory, cell.id, step), record)


# ---------------------------------------------------------------- the search


def bracket(points: Sequence[Scaled], loss: float) -> int:
    """The index of the first point after which the update falls to a loss that the first point does not have yet."""
    return next(i for i in range(len(points) - 1) if points[i].loss > loss >= points[i + 1].loss)


def midpoint(points: Sequence[Scaled], loss: float) -> float:
    """The scale halfway between the two points, ordered by scale, that the loss lies between."""
    i = bracket(points, loss)
    return (points[i].scale + points[i + 1].scale) / 2


def interpolated(points: Sequence[Scaled], loss: float) -> float:
    """The scale between those two points at which the cubic through them and a point on either side has the loss.

    The cubic is of log loss, which bends less where the loss falls fastest.
    """
    i = bracket(points, loss)
    around = points[max(0, i - 1) : i + 3]

    def cubic(scale: float) -> float:  # Lagrange's form
        factors = [math.prod((scale - b.scale) / (a.scale - b.scale) for b in around if b is not a) for a in around]
        return sum(factor * math.log(point.loss) for factor, point in zip(factors, around, strict=True))

    low, high = points[i].scale, points[i + 1].scale
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cubic(middle) > math.log(loss) else (low, middle)
    return high


PROPOSALS = (*[interpolated] * 4, *[midpoint] * 4)  # each scale that a search measures, as far as it has to


def slope(points: Sequence[Scaled], at: Scaled) -> float:
    """dM1 / dloss of the update at a point: of the parabolas in scale through it and the nearest points on both sides.

    Those are at least APART away, so that rounding counts for little. Without a point beyond, or where the loss does
    not fall any more, it is the chord to the point before.
    """
    before = max((point for point in points if point.scale <= at.scale - APART), default=points[0])
    after = min((point for point in points if point.scale >= at.scale + APART), default=None)
    chord = (at.m1 - before.m1) / (at.loss - before.loss)
    if after is None:
        return chord
    left, right = at.scale - before.scale, after.scale - at.scale

    def derivative(low: float, here: float, high: float) -> float:
        return (right * (here - low) / left + left * (high - here) / right) / (left + right)

    fall = derivative(before.loss, at.loss, after.loss)
    return derivative(before.m1, at.m1, after.m1) / fall if fall < 0 else chord
