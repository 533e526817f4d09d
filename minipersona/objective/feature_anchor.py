"""Cross-entropy, and an anchor that keeps the model's states at persona prompts where the base has them.

    a = mean_c mean_l ||h_l(c) - h0_l(c)||^2 / s_l(c)
    da/dh_l(c) = 2 (h_l(c) - h0_l(c)) / (C L s_l(c))

h_l(c) is the stream that leaves block l at the last token of context c, and h0 the base's, a constant. This is l2 in
feature space: LDIFS (Mukhoti et al. 2023, arXiv:2308.13320), here at the states that persona vectors are made of.

The scale s_l(c) is ||h0_l(c)||^2, or the spread of the base's states over all contexts that a run takes: the mean of
||h0_l(c) - m_l||^2, with m_l their mean. What all prompts share is most of a state, in early blocks nearly all of it.
So a change that is small beside the state may be large beside what tells prompts apart. Relative to the spread, it is
as large in every block.

C = contexts of a step, N = supervised tokens of its rows, L = anchored layers, S = contexts of a pack, P = personas,
Q = questions, D = width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, ContextPack, Contexts, last_states, wide
from minipersona.objective.head import ForwardPass


@dataclass(frozen=True, eq=False)
class FeatureAnchor(Anchored):
    """An `Objective`: a pass through the rows, and one through the contexts that ends after the last anchored block."""

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        states = last_states(model, pack, self.contexts.base, forward.checkpoint_activations)
        return pack.per_context * (moved(states, self.contexts, pack.documents) * pack.counted).sum()


def moved(states: Mapping[int, Tensor], contexts: Contexts, which: Tensor) -> Tensor:
    """layer -> (S, D), and the indices (S,) of these contexts -> mean_l ||h_l - h0_l||^2 / s_l of each, (S,)."""
    changes = [
        squared_change(h, contexts.base[layer][which]) / contexts.scale[layer][which] for layer, h in states.items()
    ]
    return torch.stack(changes).mean(0)


def squared_change(h: Tensor, base: Tensor) -> Tensor:
    """h and the base's, (S, D) -> ||h - h0||^2 of each, (S,), in fp32 or better."""
    return (wide(h) - wide(base)).square().sum(-1)


def scales(base: Mapping[int, Tensor], kind: Literal["state", "spread"]) -> dict[int, Tensor]:
    """s_l(c) of the base's states: layer -> (P * Q, D) -> layer -> (P * Q,), NaN where a context is not taken."""
    if kind == "state":
        return {layer: wide(h).square().sum(-1) for layer, h in base.items()}
    found = {}
    for layer, h in base.items():
        from_mean = squared_change(h, wide(h).nanmean(0))
        found[layer] = torch.where(from_mean.isnan(), from_mean, from_mean.nanmean())
    return found
