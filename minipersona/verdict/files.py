"""The files of a study's directory, as records, and how each is read.

    plan.json           Plan           every cell that the study may come to
    calibration.json    Calibration    the base's M1 beside the predecessor's (calibration.py)
    frontier.json       Frontier       the baseline's update, scaled down; its vectors and losses in frontier/
    scaling.json        Scaling        the same by scales that training personas chose; vectors and losses in scaling/
    matched/            MatchedScale   the same at the scale that has a recipe's held-out loss
    cells/<id>/         CellRecord     cell.json, with which a cell counts as done; beside it result.json (RunResult)
    cells/<id>/         Transfer       transfer.json of a confirmed recipe: every layer, on every persona set
    base/, cells/<id>/  Behaviour, Instructions, Voice   behaviour.json (behaviour/suite.py), instructions.json
                        (behaviour/instructions/suite.py) and voice.json (behaviour/voice.py), where they were due

What is there and cannot be right is a UserError with a mend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as brief
from statistics import fmean
from typing import TypeVar

from minipersona.behaviour.voice import VOICE, Voice
from minipersona.errors import UserError, require
from minipersona.objective.noise_check import NoiseCheck
from minipersona.records import may_be_missing, read_record
from minipersona.run import result as run_result
from minipersona.run.result import Checkpoint, RunResult
from minipersona.significance import Interval
from minipersona.study_config import PHASES, Role

Record = TypeVar("Record")
Knobs = dict[str, int | float | str]
"""What a phase varies, by its name."""

# ---------------------------------------------------------------- plan.json and cell.json


@dataclass(frozen=True)
class PlanEntry:
    """One planned cell; `cell` is its id, the name of its directory."""

    phase: str
    name: str
    seed: int
    knobs: Knobs
    cell: str
    role: Role = may_be_missing("registered")

    def __post_init__(self) -> None:
        words = (self.phase, self.name, self.cell)
        if self.phase not in PHASES or any(len(word) >= 200 for word in words):
            raise UserError(f"{brief(words)} is not a planned cell")


@dataclass(frozen=True)
class Plan:
    """plan.json."""

    cells: tuple[PlanEntry, ...]


@dataclass(frozen=True)
class CellRecord:
    """cell.json: what a published cell is, and what is to be said about it besides its numbers."""

    phase: str
    name: str
    hash: str
    seed: int
    knobs: Knobs
    notes: tuple[str, ...]
    labels: tuple[str, ...]  # such as recipe_results.INEFFECTIVE and INERT
    objective_check: NoiseCheck | None  # of R3F's noise
    gpu_seconds: float | None  # None where it did not run on a GPU
    seconds: float
    role: Role = may_be_missing("registered")
    penalty_ratio: float | None = may_be_missing()  # ||gradient of the penalty|| / ||gradient of cross-entropy||, the
    # mean over the steps at which it was taken; None without a penalty


def read_result(directory: Path) -> RunResult:
    """result.json of a published cell, its checkpoints in the order of their steps."""
    path, mend = directory / "result.json", f"delete {directory} and continue the study"
    if not path.is_file():
        raise UserError(f"{directory}: has a cell.json and no result.json; delete it and continue the study")
    result = run_result.read_result(path, mend)
    require(bool(result.checkpoints), f"{path}: has no checkpoints; {mend}")
    for row in (result.base, *result.checkpoints):
        require(row.step is not None, f"{path}: a checkpoint has no step; {mend}")
        require(abs(row.m1) <= 1 + 1e-6, f"{path}: m1 = {row.m1} is not a mean cosine; {mend}")
        low, high = row.m1_ci95
        require(low <= high, f"{path}: m1_ci95 = [{low}, {high}] is not an interval; {mend}")
    return replace(result, checkpoints=tuple(sorted(result.checkpoints, key=step_of)))


def step_of(row: Checkpoint) -> int:
    """The step of a run's checkpoint; only a model that is not a run's has none."""
    assert row.step is not None
    return row.step


# ---------------------------------------------------------------- frontier.json


@dataclass(frozen=True)
class FrontierPoint:
    """The model at theta_base + scale (theta_baseline - theta_base)."""

    scale: float
    m1: float
    m1_ci95: Interval
    eval_loss: float | None
    learned: float | None
    delta_norm: float


@dataclass(frozen=True)
class Frontier:
    """frontier.json; `baseline` is the hash of the cell whose update is scaled."""

    baseline: str
    points: tuple[FrontierPoint, ...]


def frontier_vectors(directory: Path, scale: float) -> Path:
    """Where a study keeps the vectors of a point."""
    return directory / "frontier" / f"scale-{scale:.1f}.safetensors"


def frontier_losses(directory: Path, scale: float) -> Path:
    """Where a study keeps the loss of every held-out row at a point."""
    return directory / "frontier" / f"scale-{scale:.1f}.losses.safetensors"


# ---------------------------------------------------------------- scaling.json


@dataclass(frozen=True)
class ChosenScales:
    """The baseline's update scaled block by block: by what it was chosen, and what was measured of it."""

    scales: tuple[float, ...]  # one a block
    separation: float  # that it leaves of the training personas
    loss: float  # of training rows, in nats per supervised token
    measured: Checkpoint  # on the measured personas and the held-out rows, at the baseline's last step

    def __post_init__(self) -> None:
        if not self.scales or not all(0 <= scale <= 1 for scale in self.scales):
            raise UserError(f"scales = {brief(self.scales)}: must be numbers from 0 to 1, one a block")

    @property
    def distinct(self) -> tuple[float, ...]:
        """The one scale of all blocks, or that of each."""
        return self.scales[:1] if len(set(self.scales)) == 1 else self.scales

    @property
    def knobs(self) -> Knobs:
        """The scale, or the mean of those that differ."""
        return {"scale" if len(self.distinct) == 1 else "mean scale": fmean(self.distinct)}


@dataclass(frozen=True)
class Scaling:
    """scaling.json, phase 6D; `baseline` is the hash of the cell whose update is scaled.

    These are judged like recipes, but they are not cells: no fresh seed confirms them, and a verdict cannot name them.
    """

    baseline: str
    least_separation: float  # of the training personas, by which the scales were chosen
    anchors: tuple[str, str]  # digests of these personas and of what they were asked
    one: ChosenScales
    per_block: ChosenScales

    def __post_init__(self) -> None:
        if len(self.one.scales) != len(self.per_block.scales):
            raise UserError("one.scales and per_block.scales must have one number a block each")


def scaling_file(directory: Path, form: str, suffix: str) -> Path:
    """Where a study keeps what a form, "one" or "per_block", was measured from; `suffix` as in `matched_file`."""
    return directory / "scaling" / f"{form}{suffix}"


# ---------------------------------------------------------------- matched/


@dataclass(frozen=True)
class MatchedScale:
    """matched/<cell>-step-<step>.json: the baseline's update at the scale that has a recipe's held-out loss.

    Found by bisection and measured there, not interpolated. Its vectors and held-out losses lie beside it.
    """

    baseline: str  # the hash of the cell whose update is scaled
    cell: str  # the hash of the recipe's cell
    step: int
    scale: float
    m1: float
    m1_ci95: Interval
    eval_loss: float
    persona_loss: float | None
    between_variance: float | None
    within_variance: float | None
    slope: float  # dM1 / dloss of the scaled update around this scale


def matched_file(directory: Path, cell: str, step: int, suffix: str = ".json") -> Path:
    """Where a study keeps the scaled update that matches a cell, by its id, at a step.

    suffix  ".json" for the record, ".vectors.safetensors" and ".losses.safetensors" for what it was measured from
    """
    return directory / "matched" / f"{cell}-step-{step:06d}{suffix}"


# ---------------------------------------------------------------- transfer.json


@dataclass(frozen=True)
class ModelOnSet:
    """One model measured on one set of personas and questions."""

    m1: dict[str, float]  # by layer
    between_variance: float  # at the deciding layer
    within_variance: float

    def __post_init__(self) -> None:
        for layer in self.m1:
            require(layer.isdecimal() and len(layer) < 10, f"m1: {layer[:80]!r} is not the number of a layer")

    @property
    def ratio(self) -> float:
        """Between- over within-persona variance."""
        return self.between_variance / self.within_variance


@dataclass(frozen=True)
class SetTransfer:
    """Three models on one set, which is named as `geometry.prompts` names it."""

    personas: str
    personas_digest: str
    questions: str
    questions_digest: str
    base: ModelOnSet
    baseline: ModelOnSet
    recipe: ModelOnSet

    def __post_init__(self) -> None:
        same = self.base.m1.keys() == self.baseline.m1.keys() == self.recipe.m1.keys()
        require(same, "base, baseline and recipe: must be measured at the same layers")

    def separation(self, layer: str) -> float:
        """(1 - M1) / (1 - M1 of the base) at a layer: how much of the personas' separation the recipe leaves."""
        return (1 - self.recipe.m1[layer]) / (1 - self.base.m1[layer])


@dataclass(frozen=True)
class Transfer:
    """cells/<id>/transfer.json: a confirmed recipe on the sets that it was not chosen by, beside its own.

    sets     by "study", the study's own, "shipped" and "registered", as far as these are others
    missing  why one of them was not measured
    """

    baseline: str  # hashes
    cell: str
    step: int
    layer: int  # the deciding one
    sets: dict[str, SetTransfer]
    missing: dict[str, str]


# ---------------------------------------------------------------- reading


def read_optional(path: Path, kind: type[Record]) -> Record | None:
    """The record of a file that the study makes again where it is deleted; None where there is none."""
    return read_record(path, kind, f"delete {path} and continue the study") if path.is_file() else None


def read_voice(directory: Path) -> Voice | None:
    """voice.json of the base's or a cell's directory; None where it was not measured."""
    return read_optional(directory / VOICE, Voice)


def same_hash(one: str, other: str) -> bool:
    """Whether two hashes agree as far as both go: an id holds only the beginning of one."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]
