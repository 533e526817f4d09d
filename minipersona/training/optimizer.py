"""The learning rate, the weights that learn with their gradients and moments, AdamW, and gradient clipping.

AdamW (Loshchilov & Hutter 2019), of gradient g, moments m and v and weight p at update k, from 1:

    m <- b1 m + (1-b1) g            p <- p - lr wd p
    v <- b2 v + (1-b2) g^2          p <- p - lr (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps)

N = elements of all weights that learn, n = elements of a piece that is updated at once
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from minipersona.model.acceleration.compiler import compile_function
from minipersona.training.distributed import Distributed

SLICE = 50_000_000  # the most elements of a piece: an update's temporaries stay small beside the model


def learning_rate(step: int, peak: float, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero: the rate of step s, from 1.

    peak (s-1)/w in the warm-up of w = ceil(warmup * steps) steps, then peak (steps+1-s)/(steps-w). This is Hugging
    Face's linear scheduler, whose first step has rate 0 because its counter runs one behind. A skipped step uses up
    its rate and does not count in AdamW's k.
    """
    assert 1 <= step <= steps
    w = math.ceil(warmup * steps)
    done = step - 1
    if done < w:
        return peak * done / w
    return peak * (steps - done) / max(1, steps - w)


# ---------------------------------------------------------------- weights, gradients and moments


@dataclass(frozen=True)
class Piece:
    """Elements that are updated together, each tensor (n,)."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor  # m
    exp_avg_sq: Tensor  # v
    decays: bool


class Layout(Protocol):
    """Where weights, gradients and moments are stored. Vectors (biases, norms) do not decay, as usual."""

    # One tensor a parameter, in the parameters' order: what this rank stores of it and of its moments.
    weights: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]

    def update_groups(self) -> Iterator[list[Piece]]:
        """Everything that this rank updates; one list is updated by one call."""
        ...

    def zero(self) -> None:
        """Set the gradients to zero."""
        ...

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """Sum gradients and `sums` over the ranks, as far as the backward passes have not done it."""
        ...

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """The norm of the reduced gradients over all weights, ()."""
        ...

    def rows(self, index: int) -> slice:
        """Which rows of parameter `index` this rank stores."""
        ...

    def saved_rows(self, index: int) -> slice:
        """Which of its stored rows this rank saves; the files of all ranks together have each row once."""
        ...


class Flat:
    """The layout in which every rank stores everything: one tensor (N,) each for weights, gradients and moments.

    Parameters and their gradients are views of these, so an update is a few operations however many parameters there
    are, and one reduction over ranks is enough.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Matrices come first, so that what decays is contiguous; what has the same shape is together.
        self._order = order = sorted(
            range(len(parameters)), key=lambda i: (parameters[i].ndim < 2, parameters[i].shape)
        )
        self._decayed = sum(p.numel() for p in parameters if p.ndim >= 2)
        self._weights, self.weights = _flat(parameters, order)
        self._lay_out(parameters)  # frees the old weights, before three more tensors of N elements are made
        self._gradients, self._gradient_views = _flat(parameters, order)
        self._exp_avg, self.exp_avg = _flat(parameters, order)
        self._exp_avg_sq, self.exp_avg_sq = _flat(parameters, order)
        self._give_gradients(parameters)

    def take_over(self, parameters: Sequence[nn.Parameter]) -> None:
        """Lay out other parameters, of the same shapes, in the same memory; gradients and moments become zero."""
        self._lay_out(parameters)
        self._give_gradients(parameters)
        for flat in (self._gradients, self._exp_avg, self._exp_avg_sq):
            flat.zero_()

    @torch.no_grad()
    def _lay_out(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, weight in zip(parameters, self.weights, strict=True):
            weight.copy_(parameter)
            parameter.data = weight

    def _give_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, gradient in zip(parameters, self._gradient_views, strict=True):
            parameter.grad = gradient

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a gradient for each parameter, in any precision, or None: some kernels a shape, not one a parameter.

        Of one shape they are concatenated as they are: some are slices of a larger tensor, and each would be copied
        to become contiguous.
        """
        end = 0
        for (shape, used), run in itertools.groupby(
            self._order, key=lambda i: (self.weights[i].shape, gradients[i] is not None)
        ):
            indices = list(run)
            start, end = end, end + len(indices) * shape.numel()
            if used:
                self._gradients[start:end] += torch.cat([gradients[i] for i in indices]).flatten()  # type: ignore[misc]

    def copies(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights in another precision, in the parameters' order; one kernel."""
        return _views(self._weights.to(dtype), self.weights, self._order)

    def update_groups(self) -> Iterator[list[Piece]]:
        """What decays, then what does not, a slice at a time."""
        flat = (self._weights, self._gradients, self._exp_avg, self._exp_avg_sq)
        for decays, part in ((True, slice(None, self._decayed)), (False, slice(self._decayed, None))):
            for piece in pieces([x[part] for x in flat], decays):
                yield [piece]

    def zero(self) -> None:
        """Set the gradients to zero."""
        self._gradients.zero_()

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """Sum gradients and `sums` over the ranks, once a step."""
        distributed.sum(self._gradients, sums)

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """()"""
        if self._gradients.is_cuda:
            return torch.linalg.vector_norm(self._gradients)
        # A tensor at a time: on the CPU the squares of a million fp32 numbers in one sum are off by 1e-4.
        return get_total_norm(self._gradient_views)

    def rows(self, index: int) -> slice:
        """All."""
        return slice(0, len(self.weights[index]))

    def saved_rows(self, index: int) -> slice:
        """All: one rank saves."""
        return self.rows(index)


def _flat(parameters: Sequence[Tensor], order: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """A zero tensor (N,) with room for the parameters in that order, and its views in the parameters' own order."""
    flat = parameters[0].new_zeros(sum(p.numel() for p in parameters), requires_grad=False)
    return flat, _views(flat, parameters, order)


def _views(flat: Tensor, parameters: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
    """What of `flat` (N,), which is in that order, is which parameter's, in the parameters' own order."""
    parts = flat.split([parameters[i].numel() for i in order])
    views = {i: part.view_as(parameters[i]) for i, part in zip(order, parts, strict=True)}
    return [views[i] for i in range(len(parameters))]


def pieces(stored: Sequence[Tensor], decays: bool) -> Iterator[Piece]:
    """Weights, gradients and both moments, all (n,), in pieces of at most SLICE elements; none where n = 0."""
    for weight, gradient, exp_avg, exp_avg_sq in zip(*(x.split(SLICE) for x in stored), strict=True):
        if len(weight):
            yield Piece(weight, gradient, exp_avg, exp_avg_sq, decays)


# ---------------------------------------------------------------- the update


@torch.no_grad()
def norm_and_scale(layout: Layout, distributed: Distributed, divisor: float, max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of the summed gradients divided by `divisor`, over all weights, and what an update multiplies the sums
    by: they are divided once and clipped. Both are () and on the gradients' device.

    Clipping multiplies by max_norm / (norm + 1e-6), at most 1, as `torch.nn.utils.clip_grad_norm_` does.
    """
    norm = layout.gradient_norm(distributed) / divisor
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0) / divisor


class AdamW:
    """State: the moments, which the layout stores, and the number of updates k.

    All of it is on the weights' device. The device, not the host, decides whether an update is applied, so that the
    host need not wait for the gradients.
    """

    def __init__(
        self, layout: Layout, beta1: float, beta2: float, epsilon: float, weight_decay: float, compiled: bool = False
    ) -> None:
        self.layout = layout
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self._updates = torch.zeros((), dtype=torch.float64, device=layout.weights[0].device)
        self._dtype = layout.weights[0].dtype
        self._identity = self._updates.new_tensor([1.0, 0.0, 1.0, 0.0, 1.0])  # coefficients that change nothing
        # One pass over memory instead of one an operation: with full parameters a step of the 3B is 5% faster.
        self._adamw = compile_function(adamw) if compiled else adamw

    @property
    def updates(self) -> int:
        """k; waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates.fill_(updates)

    @torch.no_grad()
    def update(self, learning_rate: float, scale: Tensor, allowed: Tensor) -> None:
        """Apply one update from the summed gradients times `scale`, (), if `allowed`, () bool.

        Otherwise nothing changes, k included.
        """
        k = self._updates.add_(allowed)
        corrected = learning_rate / (1 - self.beta1**k)
        root = (1 - self.beta2**k).sqrt()

        def coefficients(weight_decay: float) -> Tensor:  # a tensor, since a compiler would specialise on each number
            keep, rest1, beta2 = (
                torch.full_like(corrected, x) for x in (1 - learning_rate * weight_decay, 1 - self.beta1, self.beta2)
            )
            return torch.where(allowed, torch.stack([keep, corrected, root, rest1, beta2]), self._identity).to(
                self._dtype
            )

        decayed, plain = coefficients(self.weight_decay), coefficients(0.0)
        for group in self.layout.update_groups():
            tensors = [(piece.weight, piece.gradient, piece.exp_avg, piece.exp_avg_sq) for piece in group]
            numbers = [decayed if piece.decays else plain for piece in group]
            self._adamw(tensors, numbers, scale, allowed, 1 - self.beta2, self.epsilon)


def adamw(
    group: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    coefficients: Sequence[Tensor],
    scale: Tensor,
    allowed: Tensor,
    rest2: float,
    epsilon: float,
) -> None:
    """Update in place weights p and moments m and v from gradients scale * g, for each (p, g, m, v) of tensors (n,).

    coefficients  (5,) for each: 1 - lr wd, lr / (1-b1^k), sqrt(1-b2^k), 1-b1, b2; the identity's if not `allowed`
    allowed       (): if False, gradients count as zeros
    rest2         1-b2
    """
    for (p, g, m, v), (keep, corrected, root, rest1, beta2) in zip(group, coefficients, strict=True):
        g = torch.where(allowed, g * scale, 0.0)
        m.lerp_(g, rest1)
        v.mul_(beta2).addcmul_(g, g, value=rest2)
        p.mul_(keep).sub_((m * corrected).div_(v.sqrt().div_(root).add_(epsilon)))
