"""The registered rules, and what they leave open.

registered    M1 < 0.95 and held-out loss <= 2 x the unregularised baseline's. An untrained base passes this if its
              loss is within that bound, as the real 7B's is.
substantive   registered, and at least half of what the baseline learned.
collapsed     M1 >= 0.97
learned       (L_base - L_recipe) / (L_base - L_baseline): the share of the baseline's loss reduction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from minipersona.run.result import Checkpoint, Judged, RunResult

PASS_M1 = 0.95
COLLAPSED_M1 = 0.97
MOST_LOSS_RATIO = 2.0
LEAST_LEARNED = 0.5
LEAST_REDUCTION = 0.01  # nats; where the baseline itself learned less than this, its share has no meaning

Row = TypeVar("Row", bound=Judged)


@dataclass(frozen=True)
class Judgement:
    """The verdict on one model. None: undecided, because the baseline or a loss is missing."""

    learned: float | None
    registered_pass: bool | None
    substantive_pass: bool | None
    collapsed: bool


def learned_share(loss: float | None, base: float | None, baseline: float | None) -> float | None:
    """The share of the baseline's loss reduction that was achieved; None where that reduction is <= 0.01 nats."""
    if loss is None or base is None or baseline is None or base - baseline <= LEAST_REDUCTION:
        return None
    return (base - loss) / (base - baseline)


def judge(m1: float, loss: float | None, base: float | None, baseline: float | None) -> Judgement:
    """Judge a model by its M1 and held-out loss (nats per token), against the base's and the baseline's losses."""
    share = learned_share(loss, base, baseline)
    registered: bool | None
    if m1 >= PASS_M1:
        registered = False
    elif loss is None or baseline is None:
        registered = None
    else:
        registered = loss <= MOST_LOSS_RATIO * baseline
    if registered is False:
        substantive: bool | None = False
    else:
        substantive = None if share is None or registered is None else share >= LEAST_LEARNED
    return Judgement(share, registered, substantive, m1 >= COLLAPSED_M1)


# ---------------------------------------------------------------- the same on records


def judge_row(row: Row, base_loss: float | None, baseline_loss: float | None) -> Row:
    """The row with what the rules say of it; what it said before does not count."""
    return replace(row, **vars(judge(row.m1, row.eval_loss, base_loss, baseline_loss)))


def judge_result(result: RunResult, base_loss: float | None, baseline_loss: float | None) -> RunResult:
    """A run's result with base and checkpoints judged and the best one named; what it said before does not count."""
    base, *checkpoints = (judge_row(row, base_loss, baseline_loss) for row in (result.base, *result.checkpoints))
    return replace(result, base=base, checkpoints=tuple(checkpoints), best=best_step(checkpoints))


def best_step(checkpoints: Sequence[Checkpoint]) -> int | None:
    """The step of the checkpoint that passes substantively and learned the most; None where none passes."""
    passed = [(row.learned, row.step) for row in checkpoints if row.substantive_pass and row.learned is not None]
    return max(passed, key=lambda pair: pair[0])[1] if passed else None
