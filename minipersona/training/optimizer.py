"""AdamW (Loshchilov & Hutter 2019) and gradient clipping, written out over lists of tensors.

m <- b1 m + (1-b1) g            p <- p - lr wd p
v <- b2 v + (1-b2) g^2          p <- p - lr (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GROUP = 50_000_000  # elements updated at once: few kernel launches, and temporaries that stay small beside the model


class AdamW:
    """State: the first and second moments of every parameter, and the number of updates k."""

    def __init__(
        self, parameters: Sequence[Tensor], beta1: float, beta2: float, epsilon: float, weight_decay: float
    ) -> None:
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """Apply one update from the parameters' gradients. Vectors (biases, norms) are not decayed, as usual."""
        self.updates += 1
        correction1 = 1 - self.beta1**self.updates
        correction2 = 1 - self.beta2**self.updates
        for group in self._groups():
            p = [self.parameters[i] for i in group]
            g = [_gradient(parameter) for parameter in p]
            m = [self.first[i] for i in group]
            v = [self.second[i] for i in group]
            torch._foreach_lerp_(m, g, 1 - self.beta1)
            torch._foreach_mul_(v, self.beta2)
            torch._foreach_addcmul_(v, g, g, 1 - self.beta2)
            decayed = [parameter for parameter in p if parameter.ndim >= 2]
            if decayed:
                torch._foreach_mul_(decayed, 1 - learning_rate * self.weight_decay)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_div_(denominator, correction2**0.5)
            torch._foreach_add_(denominator, self.epsilon)
            torch._foreach_addcdiv_(p, m, denominator, -learning_rate / correction1)

    def _groups(self) -> Iterator[list[int]]:
        group: list[int] = []
        size = 0
        for index, parameter in enumerate(self.parameters):
            group.append(index)
            size += parameter.numel()
            if size >= GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a trainable parameter took no part in the loss"
    return parameter.grad


@torch.no_grad()
def scale_and_clip(parameters: Sequence[Tensor], divisor: float, max_norm: float) -> Tensor:
    """Divide the summed gradients once, then scale them so that their global norm is at most `max_norm`.

    Returns the norm before clipping, () fp32, on the parameters' device. The factor is max_norm / (norm + 1e-6), at
    most 1, as in `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [_gradient(p) for p in parameters]
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms) / divisor
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / divisor
    torch._foreach_mul_(gradients, factor)
    return norm
