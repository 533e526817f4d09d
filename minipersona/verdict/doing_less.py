"""Is a recipe better than simply doing less? Its M1 against that of the baseline at equal `learned`.

Anything that learns less keeps more of the geometry, so a low M1 alone is no merit. Two curves say what doing less
gives: the frontier, the baseline's own update scaled by 0, 0.1 ... 1, and the dose curve, the baseline's
checkpoints. On each, M1 is interpolated linearly in `learned` between two neighbouring points, and a recipe is
better where its M1 lies below the curve by more than the questions' noise: the 95% interval of the difference,
from a bootstrap in which recipe and curve see the same resampled questions, excludes zero.

Shapes: P = personas, Q = questions, D = width, R = resamples. A vectors file is read once, and what is kept of it
is its M1 and its (R,) resampled M1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_interval, question_weights, resampled_m1
from minipersona.verdict.files import frontier_vectors
from minipersona.verdict.recipe_results import RecipeResult, all_of
from minipersona.verdict.results import CellResult, StudyResults, Table

RESAMPLES = 1000
ROUNDING = 1e-6  # a smaller difference of two M1 may be that of fp32
AGREE = 1e-4  # M1 of a file and of its row: the same number but for the device's rounding


@dataclass(frozen=True)
class Resampled:
    """M1 of one vectors file: the estimate and the (R,) fp64 values under resampled questions."""

    m1: float
    values: Tensor

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.m1 - other.m1, self.values - other.values)

    def towards(self, other: Resampled, share: float) -> Resampled:
        """The point `share` of the way to `other`."""
        return Resampled(self.m1 + share * (other.m1 - self.m1), self.values + share * (other.values - self.values))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The bootstrap interval of the estimate."""
        return bootstrap_interval(self.values, self.m1, level)


class Bootstrap:
    """The resampled M1 of vectors files at the deciding layer, all under the same resampled questions."""

    def __init__(self, layer: int, resamples: int = RESAMPLES) -> None:
        self.layer, self.resamples = layer, resamples
        self._weights: Tensor | None = None  # (R, Q)
        self._read: dict[Path, Resampled] = {}

    def of(self, path: Path | None, expected: float) -> Resampled | None:
        """Of a file, None where there is none. UserError where its M1 is not the `expected` one of its row."""
        if path is None or not path.is_file():
            return None
        if path not in self._read:
            samples = deciding_samples(path, self.layer)  # (P, Q, D)
            if self._weights is None:
                self._weights = question_weights(samples.shape[1], self.resamples)
            if samples.shape[1] != self._weights.shape[1]:
                raise UserError(
                    f"{path}: has {samples.shape[1]} questions, other cells {self._weights.shape[1]}; "
                    "delete its cell and continue the study"
                )
            self._read[path] = Resampled(m1(persona_vectors(samples)), resampled_m1(samples, self._weights))
        found = self._read[path]
        if abs(found.m1 - expected) > AGREE:
            raise UserError(
                f"{path}: its M1 is {found.m1:.4f}, its row says {expected:.4f}; delete its cell and continue the study"
            )
        return found

    def of_row(self, cell: CellResult, row: Table) -> Resampled | None:
        """Of a checkpoint of a cell."""
        assert cell.directory is not None
        return self.of(cell.directory / "vectors" / f"step-{row['step']:06}.safetensors", row["m1"])


def bootstrap_of(results: StudyResults) -> Bootstrap:
    """A bootstrap at the layer by which the study is judged."""
    return Bootstrap(int(results.protocol.get("layer", 0)))


def deciding_samples(path: Path, layer: int) -> Tensor:
    """The samples (P, Q, D) fp32 of one layer of a vectors file, without reading the others."""
    name = f"layer.{layer}.samples"
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():
                raise UserError(f"{path}: has no {name}; delete its cell and continue the study")
            samples: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no readable safetensors file ({reason}); delete its cell and continue") from None
    if samples.ndim != 3 or samples.dtype != torch.float32 or not bool(samples.isfinite().all()):
        raise UserError(f"{path}: {name} is not finite fp32 of (personas, questions, width); delete its cell")
    return samples


# ---------------------------------------------------------------- the curves


@dataclass(frozen=True)
class Point:
    """One point of a curve; `resampled` is None where its vectors are missing."""

    learned: float
    m1: float
    resampled: Resampled | None


@dataclass(frozen=True)
class Curve:
    """What doing less gives, from nothing to the whole baseline."""

    points: list[Point] = field(default_factory=list)

    def bracket(self, learned: float) -> tuple[Point, Point, float] | None:
        """The neighbours between which `learned` lies, and how far; None outside of the curve.

        Where the curve reaches a value twice, the first time counts: the least that has to be done for it.
        """
        for low, high in zip(self.points, self.points[1:], strict=False):
            if min(low.learned, high.learned) <= learned <= max(low.learned, high.learned):
                width = high.learned - low.learned
                return low, high, (learned - low.learned) / width if width else 0.0
        return None


def frontier_curve(results: StudyResults, bootstrap: Bootstrap) -> Curve:
    """The baseline's update scaled by 0, 0.1 ... 1, as far as measured."""
    return Curve(
        [
            Point(row["learned"], row["m1"], bootstrap.of(frontier_vectors(results.directory, row["scale"]), row["m1"]))
            for row in results.frontier
            if row["learned"] is not None
        ]
    )


def dose_curve(results: StudyResults, bootstrap: Bootstrap) -> Curve:
    """The base and the baseline's checkpoints."""
    cell = results.baseline
    if cell is None:
        return Curve()
    rows = [{**results.base, "step": 0}, *cell.checkpoints]
    points = [
        Point(row["learned"], row["m1"], bootstrap.of_row(cell, row)) for row in rows if row["learned"] is not None
    ]
    return Curve(points)


# ---------------------------------------------------------------- the comparison


def place(candidate: RecipeResult, frontier: Curve, dose: Curve, bootstrap: Bootstrap) -> list[Table]:
    """A recipe against both curves, one row of verdict.json a seed.

    `difference` is the recipe's M1 less the curve's at equal learned, so that below zero is better; `better` is
    None, with the reason, where that cannot be said.
    """
    rows = []
    for cell, row in zip(candidate.cells, candidate.rows, strict=True):
        seed = f" seed={cell.seed}" if len(candidate.cells) > 1 else ""
        own = bootstrap.of_row(cell, row)
        on_the_curve = _open("it is on the dose curve itself")
        against_dose = on_the_curve if candidate.phase == "1" else _against(row, own, dose)
        rows.append(
            {
                "cell": candidate.id + seed,
                "recipe": candidate.id,
                "m1": row["m1"],
                "learned": row["learned"],
                **_against(row, own, frontier),
                **{f"dose_{key}": value for key, value in against_dose.items()},
            }
        )
    return rows


def better_than_less(candidate: RecipeResult, placed: Sequence[Table]) -> bool | None:
    """Whether a recipe lies below the frontier with every seed; None where that is open, or it was not placed."""
    rows = [row for row in placed if row["recipe"] == candidate.id]
    return all_of(row["better"] for row in rows) if rows else None


def _against(row: Table, own: Resampled | None, curve: Curve) -> Table:
    if not curve.points:
        return _open("the curve has not been measured")
    if row["learned"] is None:
        return _open("learned is undefined")
    bracket = curve.bracket(row["learned"])
    if bracket is None:
        most = max(point.learned for point in curve.points)
        beyond = row["learned"] > most
        return _open(f"it learned {'more' if beyond else 'less'} than any point of the curve")
    low, high, share = bracket
    there = low.m1 + share * (high.m1 - low.m1)
    found = {"m1_at_equal_learned": there, "difference": row["m1"] - there, "ci95": None, "better": None}
    if own is None or low.resampled is None or high.resampled is None:
        return {**found, "reason": "vectors are missing"}
    interval = (own - low.resampled.towards(high.resampled, share)).interval()
    return {**found, "ci95": list(interval), "better": interval[1] < -ROUNDING, "reason": None}


def _open(reason: str) -> dict[str, Any]:
    return {"m1_at_equal_learned": None, "difference": None, "ci95": None, "better": None, "reason": reason}
