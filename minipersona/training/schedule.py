"""The learning rate: linear warm-up, then linear decay to zero."""

from __future__ import annotations

import math


def learning_rate(update: int, peak: float, steps: int, warmup: float) -> float:
    """The rate of update k, from 1: peak (k-1)/w in the warm-up of w = ceil(warmup * steps) updates, then
    peak (steps+1-k)/(steps-w).

    This is Hugging Face's linear scheduler, whose first update has rate 0 and whose counter runs one behind.
    """
    assert 1 <= update <= steps
    w = math.ceil(warmup * steps)
    done = update - 1
    if done < w:
        return peak * done / w
    return peak * (steps - done) / max(1, steps - w)
