"""Cross-entropy, and two anchors at once: of the states from which the model responds, and of its predictions.

    a = mean_c mean_l ||h_l(c) - h0_l(c)||^2 / s_l(c) + r mean_t KL(q_t || p_t)

The terms are those of `feature_anchor.py`, at each prompt's last token, and of `kl_on_prompts.py`, over the base's own
responses to these prompts, or over the prompts where there are none. The first acts where persona vectors are measured,
and it does not hold the words that follow. The second acts on these.

C = contexts of a step, N = supervised tokens of its rows, S = contexts of a pack, D = width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import IGNORE
from minipersona.objective.contexts import ContextPack
from minipersona.objective.feature_anchor import moved
from minipersona.objective.head import ForwardPass
from minipersona.objective.kl_on_prompts import KLOnPrompts


@dataclass(frozen=True, eq=False)
class FeatureAndKL(KLOnPrompts):
    """An `Objective`: the passes of `KLOnPrompts`; the states are recorded in the one through the contexts."""

    kl_factor: float | Tensor = 1.0  # r

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        ends = pack.last  # (S,) each prompt's last token, as a row of the stream
        at_end = ends  # (S,) the same, as a row of what leaves the last block
        begin = pack.boundaries[:-1].long()
        if self.contexts.responses:  # the first row that predicts a response; rows of padding lie behind all others
            at_end = torch.searchsorted(pack.supervised, begin).clamp(max=pack.supervised.numel() - 1)
            ends = pack.supervised[at_end]
        found: dict[int, Tensor] = {}

        def recorder(layer: int) -> Tap:
            rows = at_end if layer == model.config.num_hidden_layers - 1 else ends

            def record(h: Tensor) -> Tensor:
                found[layer] = h[rows]
                return h

            return record

        divergence = self.divergence(model, pack, forward, {layer: recorder(layer) for layer in self.contexts.base})
        # A document without a row, such as one of padding, is given another one's.
        counted = (pack.targets[ends] != IGNORE) & (ends >= begin) & (ends < pack.boundaries[1:])
        features = pack.per_context * (moved(found, self.contexts, pack.documents) * counted).sum()
        return features + self.kl_factor * divergence
