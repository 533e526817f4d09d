"""Cross-entropy, and an anchor that keeps the model's states at persona prompts where the base has them.

    a = mean_c mean_l ||h_l(c) - h0_l(c)||^2 / ||h0_l(c)||^2
    da/dh_l(c) = 2 (h_l(c) - h0_l(c)) / (C L ||h0_l(c)||^2)

h_l(c) is the stream that leaves block l at the last token of context c, and h0 the base's, a constant. This is l2 in
feature space: LDIFS (Mukhoti et al. 2023, arXiv:2308.13320), here at the states that persona vectors are made of.

C = contexts of a step, L = anchored layers, S = contexts of a pack, D = width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, ContextPack, last_states, wide
from minipersona.objective.head import ForwardPass


@dataclass(frozen=True, eq=False)
class FeatureAnchor(Anchored):
    """An `Objective`: a pass through the rows, and one through the contexts that ends after the last anchored block."""

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        base = self.contexts.base
        states = last_states(model, pack, base, forward.checkpoint_activations)
        moved = [squared_change(h, base[layer][pack.documents]) for layer, h in states.items()]  # (S,) each
        return pack.per_context * (torch.stack(moved).mean(0) * pack.counted).sum()


def squared_change(h: Tensor, base: Tensor) -> Tensor:
    """h and the base's, (S, D) -> ||h - h0||^2 / ||h0||^2 of each, (S,), in fp32 or better."""
    h, base = wide(h), wide(base)
    return (h - base).square().sum(-1) / base.square().sum(-1)
