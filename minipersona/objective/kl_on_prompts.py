"""Cross-entropy, and an anchor that keeps the model's predictions near the base's: over persona prompts, or over the
base's own responses to them.

    a = mean_t KL(q_t || p_t)           da/dz_t = (p_t - q_t) / T

q is the base's distribution of the next token, a constant, and p = softmax(z) the trained model's. t goes over all
tokens of the step's contexts. Where these end in responses, t goes only over the tokens at which a token of a response,
or its end, is predicted. This is `reverse` of `kl_to_base.py`, on prompts that no row contains.

T = those tokens, of all contexts of a step, C = tokens of a chunk, V = vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minipersona.model.lora import adapter_disabled
from minipersona.model.network import Qwen2, Tap
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
        return self.divergence(model, pack, forward)

    def divergence(
        self, model: Qwen2, pack: ContextPack, forward: ForwardPass, taps: Mapping[int, Tap] | None = None
    ) -> Tensor:
        """N times this pack's part of mean_t KL(q_t || p_t). The model that learns is applied with `taps`."""
        base = self.frozen or model
        rows = pack.supervised if self.contexts.responses else None  # of the stream: only they go through the head
        with torch.no_grad(), contextlib.nullcontext() if self.frozen else adapter_disabled(model):
            reference = Reference(base(pack, last_rows=rows), base.lm_head.weight)
        states = model(pack, taps=taps, checkpoint_activations=forward.checkpoint_activations, last_rows=rows)  # (T, D)
        targets = pack.targets if rows is None else pack.targets[rows]
        divergence, _ = through_head(
            _rule, [states], model.lm_head.weight, targets, chunk=CHUNK, compiled=forward.compiled, reference=reference
        )
        return pack.per_token * divergence


def _rule(logits: Tensor, base_logits: Tensor, targets: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor]]:
    """The rule (`head.Rule`) of the equation above; it has no use for targets."""
    divergence, slope = divergence_and_slope(log_probabilities(logits), log_probabilities(base_logits), "reverse")
    return divergence.view(1), (slope.to(dtype),)
