"""How much of the gradient is the penalty's. A penalty whose gradient is next to nothing is not there.

    ratio = ||gradient of weight * penalty|| / ||gradient of the cross-entropy||

over all weights that learn, of one step's packs on all ranks. Each gradient is of passes of its own, through the same
objective, under the same dropout and noise: with `likelihood` 0, and with `weight` 0. It is not taken as the difference
of the objective's gradient and the cross-entropy's. In bf16 the least change of a loss flips roundings, which flip
others in every block that the gradient goes through: on a GPU two gradients of SmolLM2-135M whose losses differ by
1e-10 differ by 1.1%, and a penalty counts from 1% on.
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
    """The ratio above, the same on every rank; None where the cross-entropy has no gradient or one is not finite.

    packs  of this rank
    fit    calls its first argument with the packs, again where memory runs out (`memory.Budget.fit`)

    Overwrites the gradients in `layout`.
    """

    def norm(each: Objective) -> Tensor:
        def attempt(packs: Sequence[Pack]) -> None:
            layout.zero()
            for pack in packs:
                loss, _ = each(model, pack, forward)
                loss.backward()

        fit(attempt, packs)
        layout.reduce(distributed, torch.zeros(1, dtype=torch.float64, device=model.device))
        return layout.gradient_norm(distributed)

    ratio = norm(replace(objective, likelihood=0.0)) / norm(replace(objective, weight=0.0))
    return float(ratio) if bool(ratio.isfinite()) else None
