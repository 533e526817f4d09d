"""The verdicts there are, and findings: a claim, what became of it, its evidence, what it implies, its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minipersona.significance import Interval

VerdictKind = Literal[
    "not_reproduced", "incomplete", "no_collapse", "positive", "unconfirmed", "h_null", "inconclusive"
]
Answer = Literal["supported", "refuted", "undecided", "not tested"]


@dataclass(frozen=True)
class Nothing:
    """An empty table: there is nothing to say."""


@dataclass(frozen=True)
class RecipePoint:
    """A recipe by its two numbers."""

    cell: str
    m1: float
    learned: float | None


@dataclass(frozen=True)
class Difference:
    """M1 of a recipe less its rival's; the interval is over questions at the level, None where vectors are missing."""

    cell: str
    rival: str
    difference: float
    interval: Interval | None
    level: float
    lower: bool | None  # whether the whole interval lies below zero


@dataclass(frozen=True)
class DoseNumbers:
    """H1: the baseline's checkpoints from the base, step 0, on."""

    steps: tuple[int, ...]
    m1: tuple[float, ...]
    learned: tuple[float | None, ...]
    falls: tuple[tuple[int, int], ...]  # pairs of steps between which M1 falls by more than the intervals
    early_steps: tuple[int, ...]
    saturated_at: int | None  # the first step from which on every interval overlaps the last one's


@dataclass(frozen=True)
class FamilyNumbers:
    """H2 to H5: the settings of one kind of recipe."""

    settings: int  # planned
    counted: int  # measured, and effective enough to count
    ineffective: tuple[str, ...]  # inert ones too
    passers: tuple[str, ...]
    confirmed: tuple[str, ...]
    lowest_m1: RecipePoint | None
    lowest_m1_that_teaches: RecipePoint | None
    baseline_m1: float | None
    better_than_less: tuple[str, ...]
    against_same_rate: tuple[Difference, ...]  # H3: against rank 32 at the same learning rate


@dataclass(frozen=True)
class RecoveryNumbers:
    """Phase 5: which mixtures bring M1 down to the target."""

    target: float
    lowest: str
    lowest_m1: float
    recovered: tuple[str, ...]


@dataclass(frozen=True)
class DifferenceNumbers:
    """Phase 5: every mixture that can be compared with the rival."""

    mixtures: tuple[Difference, ...]


Numbers = DoseNumbers | FamilyNumbers | RecoveryNumbers | DifferenceNumbers | Nothing


@dataclass(frozen=True)
class Finding:
    """One claim, judged."""

    claim: str
    verdict: Answer
    evidence: str
    implication: str
    numbers: Numbers = Nothing()
