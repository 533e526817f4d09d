"""Cross-entropy, and an anchor that keeps the angles between personas, but not where they are.

    a = 100 mean_q mean_l mean_ij (G_ij - G0_ij)^2,      G_ij = cos(h_i, h_j) = u_i . u_j,   u = h / ||h||
    da/dh_i = 400 / (Q L P^2) sum_j (G_ij - G0_ij) (u_j - G_ij u_i) / ||h_i||

i and j go over all P personas at one question q of the step; h_i is the stream that leaves block l at the last token of
persona i's prompt, and G0 the base's matrix, a constant. Similarities of states are preserved, as in
similarity-preserving distillation (Tung & Mori 2019, arXiv:1907.09682): the states may rotate and scale together.

Q = questions of a step, N = supervised tokens of its rows, L = anchored layers, P = personas, D = width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, ContextPack, last_states, wide
from minipersona.objective.head import ForwardPass

SCALE = 100.0  # cosines move by a few hundredths; with it, weights are of the order of one, as for the other anchors


@dataclass(frozen=True, eq=False)
class GramAnchor(Anchored):
    """An `Objective`: a pass through the rows, and one through the contexts that ends after the last anchored block.

    A pack holds all personas of a question, one after another.
    """

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        base, personas = self.contexts.base, self.contexts.personas
        states = last_states(model, pack, base, forward.checkpoint_activations)
        moved = [
            (cosines(h, personas) - cosines(base[layer][pack.documents], personas)).square().mean(-1)  # (Q, P)
            for layer, h in states.items()
        ]
        # The sum over i of the mean over j, for each context i: their mean over the step's contexts is that over q, i.
        return pack.per_context * SCALE * (torch.stack(moved).mean(0).flatten() * pack.counted).sum()


def cosines(h: Tensor, personas: int) -> Tensor:
    """h (Q * P, D), personas innermost -> the cosines between the personas at each question, (Q, P, P)."""
    unit = F.normalize(wide(h), dim=-1).unflatten(0, (-1, personas))  # (Q, P, D)
    return unit @ unit.mT
