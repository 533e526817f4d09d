"""How much of the gradient is the penalty's. A penalty whose gradient is next to nothing is not there.

    ratio = sqrt(max(0, ||g - g0||^2 - ||g0' - g0||^2)) / ||g0||

g is the gradient of an objective, g0 that of the cross-entropy alone, over all weights that learn, of one step's packs
on all ranks. The objective with weight 0 gives g0 by the same passes, under the same dropout and noise.

g0' is g0 once more. On a CPU they are equal. On a GPU kernels add in another order each time, and in bf16 two passes of
SmolLM2-135M differ by 1.1% of ||g0||: more than a penalty needs to have in order to count. That part of ||g - g0||^2
has nothing to do with the penalty, is as large on average, and is taken off. In fp32 a ratio of less than about 1e-6 is
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.head import ForwardPass, Objective
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import Layout

Fit = Callable[[Callable[[Sequence[Pack]], None], Sequence[Pack]], None]


def penalty_ratio(
    model: Qwen2, objective: Objective, forward: ForwardPass, layout: Layout, distributed: Distributed,
    packs: Sequence[Pack], fit: Fit,
) -> float | None:  # fmt: skip
    """The ratio above, the same on every rank; None where g0 is zero or a gradient is not finite.

    packs  of this rank
    fit    calls its first argument with the packs, again where memory runs out (`memory.Budget.fit`)

    Overwrites the gradients in `layout`. It goes through the packs five times, and keeps no second set of gradients,
    for which full parameters have no room: differences are accumulated pack by pack.
    """
    plain = replace(objective, weight=0.0)

    def norm(signed: Sequence[tuple[float, Objective]]) -> Tensor:
        def attempt(packs: Sequence[Pack]) -> None:
            layout.zero()
            for pack in packs:
                for sign, each in signed:
                    loss, _ = each(model, pack, forward)
                    (sign * loss).backward()

        fit(attempt, packs)
        layout.reduce(distributed, torch.zeros(1, dtype=torch.float64, device=model.device))
        return layout.gradient_norm(distributed)

    change, repeated = norm([(1.0, objective), (-1.0, plain)]), norm([(1.0, plain), (-1.0, plain)])
    ratio = (change.square() - repeated.square()).clamp(min=0).sqrt() / norm([(1.0, plain)])
    return float(ratio) if bool(ratio.isfinite()) else None
