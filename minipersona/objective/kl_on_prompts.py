"""Cross-entropy, and an anchor that keeps the model's predictions near the base's: over persona prompts, or over the
base's own responses to them.

    a = mean_t KL(q_t || p_t)           da/dz_t = (p_t - q_t) / T

q is the base's distribution of the next token, a constant, and p = softmax(z) the trained model's. t goes over all
tokens of the step's contexts. Where these end in responses, t goes only over the tokens at which a token of a response,
or its end, is predicted. This is `reverse` of `kl_to_base.py`, on prompts that no row contains.

T = those tokens of all contexts of a step, n = those of a pack, N = supervised tokens of the step's rows, C = tokens of
a chunk, D = width, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minipersona.model.network import Qwen2, Tap
from minipersona.objective.contexts import Anchored, ContextPack
from minipersona.objective.head import CHUNK, ForwardPass, Reference, log_probabilities, through_head
from minipersona.objective.kl_to_base import divergence_and_slope


@dataclass(frozen=True, eq=False)
class KLOnPrompts(Anchored):
    """An `Objective`: a pass through the rows, and one through the contexts.

    The base's states are computed once a run (`contexts.predicting`). Its distributions, which are too many to keep,
    follow from them by its head.

    head  (V, D) the base's, if all weights learn; otherwise it is the model's
    """

    head: Tensor | None = None

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        return self.divergence(model, pack, forward)

    def divergence(
        self, model: Qwen2, pack: ContextPack, forward: ForwardPass, taps: Mapping[int, Tap] | None = None
    ) -> Tensor:
        """N times this pack's part of mean_t KL(q_t || p_t). The model that learns is applied with `taps`."""
        assert self.contexts.predicting is not None, "the base's states are computed before the run"
        rows = self.contexts.held(pack)
        states = model(pack, taps=taps, checkpoint_activations=forward.checkpoint_activations, last_rows=rows)  # (n, D)
        learned = model.lm_head.weight
        base = Reference(self.contexts.predicting.at(pack, rows), learned if self.head is None else self.head)
        divergence, _ = through_head(
            _rule, [states], learned, pack.targets[rows], chunk=CHUNK, compiled=forward.compiled, reference=base
        )
        return pack.per_token * divergence


def _rule(logits: Tensor, base_logits: Tensor, targets: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor]]:
    """The rule (`head.Rule`) of the equation above; it has no use for targets."""
    divergence, slope = divergence_and_slope(log_probabilities(logits), log_probabilities(base_logits), "reverse")
    return divergence.view(1), (slope.to(dtype),)
