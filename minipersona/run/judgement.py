"""The rules by which a model is judged, with all of their thresholds.

registered    M1 < 0.95 and held-out loss <= 2 x the unregularised baseline's, to the letter. An untrained base passes
              this if its loss is within that bound, as the real 7B's is.
bounds        M1 < 0.95 may pass and M1 >= 0.97 has collapsed on the registered model, sets and layer. Elsewhere they
              keep their meaning by separation = (1 - M1) / (1 - M1 of the base): above 0.5, at most 0.3.
learned       (L_base - L) / (L_base - L_baseline): the share of the baseline's loss reduction; under personas the same
              with the measured system prompts over the same rows
substantive   the upper 95% bound of M1 is below the bound, learned >= 0.9, under personas >= 0.8, discriminability
              (between / within persona variance) >= 0.5 of the base's, and with any one persona left out M1 is below
              the relative bound of the base without that persona
trade-off     the same bound on M1, and learned between 0.5 and 0.9: reported, no pass
collapsed     M1 reaches the upper bound and the personas drew together. Where they keep their variance (spread >= 0.9
              of the base's) only the mean that they share has grown: mean growth
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from minipersona.config import DEFAULT_MODEL
from minipersona.geometry.measures import discriminability, none_if_nan, spread
from minipersona.geometry.prompts import REGISTERED
from minipersona.geometry.statistics import jackknife_interval
from minipersona.hub import PINNED
from minipersona.run.result import Baseline, Checkpoint, MeasurementProtocol, RunResult
from minipersona.significance import Interval

PASS_M1 = 0.95
COLLAPSED_M1 = 0.97
PASS_SEPARATION = 0.5
COLLAPSED_SEPARATION = 0.3
MOST_LOSS_RATIO = 2.0
LEAST_LEARNED = 0.9
LEAST_LEARNED_PERSONAS = 0.8
LEAST_DISCRIMINABILITY = 0.5
TRADE_OFF_LEARNED = 0.5  # a recipe that learned at least this, and less than 0.9, is a trade-off
MEAN_GROWTH_SPREAD = 0.9
LEAST_REDUCTION = 0.01  # nats; where the baseline itself learned less than this, its share has no meaning

REGISTERED_LAYER = 20
Choice = Literal["auto", "absolute", "relative"]
Condition = tuple[bool | None, str]
"""Whether it holds, None where that cannot be said, and what is to be said where it does not hold."""

# ---------------------------------------------------------------- bounds


@dataclass(frozen=True)
class Bounds:
    """A pass needs M1 < `passing`; M1 >= `collapsed` has collapsed."""

    passing: float
    collapsed: float
    relative: bool  # to the base's M1


ABSOLUTE = Bounds(PASS_M1, COLLAPSED_M1, relative=False)


def relative_bounds(base_m1: float) -> Bounds:
    """The M1 at which the separation is 0.5 and 0.3 of the base's."""
    apart = 1 - base_m1
    return Bounds(1 - PASS_SEPARATION * apart, 1 - COLLAPSED_SEPARATION * apart, relative=True)


def bounds_for(protocol: MeasurementProtocol, base_m1: float, choice: Choice = "auto") -> Bounds:
    """The bounds for what was measured by `protocol`; "auto" is absolute on the registered model, sets and layer."""
    if choice == "auto":
        registered = is_registered(protocol) and protocol.layer == REGISTERED_LAYER
        choice = "absolute" if registered else "relative"
    return ABSOLUTE if choice == "absolute" else relative_bounds(base_m1)


def is_registered(protocol: MeasurementProtocol) -> bool:
    """Whether this is what the predecessor measured: the pinned 7B and the registered sets by Method A, at a layer."""
    return (
        (protocol.model, protocol.revision) == (DEFAULT_MODEL, PINNED[DEFAULT_MODEL])
        and protocol.persona_set == protocol.question_set == REGISTERED
        and protocol.method == "A"
    )


# ---------------------------------------------------------------- numbers


def learned_share(loss: float | None, base: float | None, baseline: float | None) -> float | None:
    """The share of the baseline's loss reduction that was achieved; None where that reduction is <= 0.01 nats."""
    if loss is None or base is None or baseline is None or base - baseline <= LEAST_REDUCTION:
        return None
    return (base - loss) / (base - baseline)


def separation(m1: float, base_m1: float) -> float | None:
    """(1 - M1) / (1 - M1 of the base); None where all personas of the base are one."""
    return (1 - m1) / (1 - base_m1) if base_m1 < 1 else None


def spread_of(row: Checkpoint, base: Checkpoint) -> float | None:
    """The between-persona variance as a share of the base's; None where it is not known."""
    if row.between_variance is None or base.between_variance is None:
        return None
    return none_if_nan(spread(row.between_variance, base.between_variance))


def discriminability_of(row: Checkpoint, base: Checkpoint) -> float | None:
    """Between- over within-persona variance as a share of the base's; None where it is not known."""
    if row.within_variance is None or base.within_variance is None or spread_of(row, base) is None:
        return None
    assert row.between_variance is not None and base.between_variance is not None
    return none_if_nan(
        discriminability(row.between_variance, row.within_variance, base.between_variance, base.within_variance)
    )


def over_personas(row: Checkpoint) -> Interval | None:
    """The 95% interval of M1 over personas, by the jackknife."""
    without = row.m1_without
    return (
        None if without is None else jackknife_interval(row.m1, torch.tensor([*without.values()], dtype=torch.float64))
    )


# ---------------------------------------------------------------- the rules


def registered_pass(m1: float, loss: float | None, baseline: float | None) -> bool | None:
    """The registered rule, to the letter. None where it depends on a loss that is missing."""
    if m1 >= PASS_M1:
        return False
    return None if loss is None or baseline is None else loss <= MOST_LOSS_RATIO * baseline


def judge_row(row: Checkpoint, base: Checkpoint, baseline: Baseline | Checkpoint | None, bounds: Bounds) -> Checkpoint:
    """The row with what the rules say of it; what it said before does not count.

    base      the model that the row was trained from
    baseline  the run that it is held against, by its losses after the last step; None where there is none
    """
    losses = (None, None) if baseline is None else (baseline.eval_loss, baseline.persona_loss)
    learned = learned_share(row.eval_loss, base.eval_loss, losses[0])
    row = replace(
        row,
        learned=learned,
        learned_personas=learned_share(row.persona_loss, base.persona_loss, losses[1]),
        separation=separation(row.m1, base.m1),
        spread=spread_of(row, base),
        discriminability=discriminability_of(row, base),
        m1_ci95_personas=over_personas(row),
        registered_pass=registered_pass(row.m1, row.eval_loss, losses[0]),
    )
    conditions = [_kept(row, bounds), *_taught(row), _discriminable(row), _without_any(row, base)]
    grown = row.spread is not None and row.spread >= MEAN_GROWTH_SPREAD
    return replace(
        row,
        substantive_pass=all_of(holds for holds, _ in conditions),
        shortfalls=tuple(said for holds, said in conditions if not holds),
        trade_off=_kept(row, bounds)[0] is True
        and learned is not None
        and TRADE_OFF_LEARNED <= learned < LEAST_LEARNED,
        collapsed=row.m1 >= bounds.collapsed and not grown,
        mean_growth=row.m1 >= bounds.collapsed and grown,
    )


def _kept(row: Checkpoint, bounds: Bounds) -> Condition:
    high = row.m1_ci95[1]
    return high < bounds.passing, f"the upper 95% bound of M1, {high:.4f}, is not below {bounds.passing:.4f}"


def _taught(row: Checkpoint) -> Iterable[Condition]:
    yield _at_least(row.learned, LEAST_LEARNED, "learned")
    yield _at_least(row.learned_personas, LEAST_LEARNED_PERSONAS, "learned under personas")


def _discriminable(row: Checkpoint) -> Condition:
    return _at_least(row.discriminability, LEAST_DISCRIMINABILITY, "discriminability")


def _at_least(value: float | None, least: float, name: str) -> Condition:
    if value is None:
        return None, f"{name} is not known"
    digits = 2 if round(value, 2) < least else 5  # so that a value just below the bound does not read as the bound
    return value >= least, f"{name} is {value:.{digits}f}, less than {least:g}"


def _without_any(row: Checkpoint, base: Checkpoint) -> Condition:
    """M1 with any one persona left out, against the base's with the same one left out."""
    if row.m1_without is None or base.m1_without is None or row.m1_without.keys() != base.m1_without.keys():
        return None, "M1 with each persona left out is not known"
    needed = [p for p, m1 in row.m1_without.items() if m1 >= relative_bounds(base.m1_without[p]).passing]
    if len(needed) == len(row.m1_without):
        return False, "M1 is not below the bound whichever persona is left out"
    return not needed, f"it depends on one persona: without {' or without '.join(needed)}, M1 is not below the bound"


def all_of(values: Iterable[bool | None]) -> bool | None:
    """Kleene's conjunction: False where one is False, else None where one is None."""
    values = list(values)
    if False in values:
        return False
    return None if None in values else True


# ---------------------------------------------------------------- the same on a run


def judge_result(result: RunResult, baseline: Baseline | Checkpoint | None, bounds: Bounds) -> RunResult:
    """A run's result with base and checkpoints judged and the best one named; what it said before does not count."""
    base, *checkpoints = (judge_row(row, result.base, baseline, bounds) for row in (result.base, *result.checkpoints))
    return replace(result, base=base, checkpoints=tuple(checkpoints), best=best_step(checkpoints))


def best_step(checkpoints: Sequence[Checkpoint]) -> int | None:
    """The step of the checkpoint that passes substantively and learned the most; None where none passes."""
    passed = [(row.learned, row.step) for row in checkpoints if row.substantive_pass and row.learned is not None]
    return max(passed, key=lambda pair: pair[0])[1] if passed else None
