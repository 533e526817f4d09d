"""Cross-entropy, and an anchor that keeps the model's predictions at persona prompts near the base's.

    a = mean_t KL(q_t || p_t)           da/dz_t = (p_t - q_t) / T

t goes over all T tokens of the step's contexts, q is the base's distribution of the next token, a constant, and
p = softmax(z) the trained model's. This is `reverse` of `kl_to_base.py`, on prompts that no row contains.

T = tokens of all contexts of a step, C = tokens of a chunk, V = vocabulary
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minipersona.model.lora import adapter_disabled
from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, ContextPack
from minipersona.objective.head import CHUNK, ForwardPass, Reference, log_probabilities, through_head
from minipersona.objective.kl_to_base import divergence_and_slope


@dataclass(frozen=True, eq=False)
class KLOnPrompts(Anchored):
    """An `Objective`: a pass through the rows, and two through the contexts, of which the base's has no gradients.

    The base is the model without its adapters, or `frozen` if all weights learn. Its states at every token are too many
    to keep, so it is applied in every step.
    """

    frozen: Qwen2 | None = None

    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """N times this pack's part of a."""
        base = self.frozen or model
        with torch.no_grad(), contextlib.nullcontext() if self.frozen else adapter_disabled(model):
            reference = Reference(base(pack), base.lm_head.weight)
        states = model(pack, checkpoint_activations=forward.checkpoint_activations)  # (T, D)
        divergence, _ = through_head(
            _rule, [states], model.lm_head.weight, pack.targets, chunk=CHUNK, compiled=forward.compiled,
            reference=reference,
        )  # fmt: skip
        return pack.per_token * divergence


def _rule(logits: Tensor, base_logits: Tensor, targets: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor]]:
    """The rule (`head.Rule`) of the equation above; it has no use for targets."""
    divergence, slope = divergence_and_slope(log_probabilities(logits), log_probabilities(base_logits), "reverse")
    return divergence.view(1), (slope.to(dtype),)
