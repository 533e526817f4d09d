"""Where the weights that learn lie, with their gradients and moments: in one tensor, or in shards over the ranks.

N = elements of all weights that learn, n = those of a piece that is updated at once
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from minipersona.training.distributed import Distributed
from minipersona.training.sharding import is_dealt, local, own_rows

CALL = 7  # the most pieces of an update's call on a sharded rank: as many matrices as a block has
SLICE = 50_000_000  # the most elements of a piece: an update's temporaries stay small beside the model


@dataclass(frozen=True)
class Piece:
    """Elements that are updated alike, (n,)."""

    weight: Tensor
    gradient: Tensor
    first: Tensor  # the moments
    second: Tensor
    decays: bool


class Layout(Protocol):
    """The weights, and what an update needs of them. Vectors (biases, norms) do not decay, as usual."""

    # One tensor a parameter, in the parameters' order: what this rank keeps of it and of its moments.
    weights: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]

    def bundles(self) -> Iterator[list[Piece]]:
        """All that this rank updates, in lists of what is updated with one call."""
        ...

    def zero(self) -> None:
        """Forget the gradients."""
        ...

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """Sum gradients and `sums` over the ranks, if that has not happened during the backward passes."""
        ...

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """The norm of the reduced gradients over all weights, ()."""
        ...

    def rows(self, index: int) -> slice:
        """Which rows of parameter `index` this rank keeps."""
        ...

    def saved_rows(self, index: int) -> slice:
        """Which of the rows that it keeps this rank writes down; the ranks' files together hold each row once."""
        ...


class Flat:
    """Every rank keeps everything. Parameters, gradients and moments are views of one tensor (N,) each.

    So an update is a few operations whatever the number of parameters, and a reduction over ranks is one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Matrices come first, so that what decays is one piece.
        order = sorted(range(len(parameters)), key=lambda i: parameters[i].ndim < 2)
        self._decayed = sum(p.numel() for p in parameters if p.ndim >= 2)
        self._weights, self.weights = _flat(parameters, order)
        with torch.no_grad():
            for parameter, weight in zip(parameters, self.weights, strict=True):
                weight.copy_(parameter)
                parameter.data = weight  # from here on the old weights' memory is free: three more of that size follow
        self._gradients, self._gradient_views = _flat(parameters, order)
        for parameter, gradient in zip(parameters, self._gradient_views, strict=True):
            parameter.grad = gradient
        self._first, self.first = _flat(parameters, order)
        self._second, self.second = _flat(parameters, order)

    def bundles(self) -> Iterator[list[Piece]]:
        """What decays, and what does not, a slice at a time."""
        flat = (self._weights, self._gradients, self._first, self._second)
        for decays, part in ((True, slice(None, self._decayed)), (False, slice(self._decayed, None))):
            for piece in _slices([x[part] for x in flat], decays):
                yield [piece]

    def zero(self) -> None:
        """Forget the gradients."""
        self._gradients.zero_()

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """Once all packs of the step are through."""
        distributed.sum(self._gradients, sums)

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """()"""
        # A tensor at a time: on the CPU the squares of a million fp32 numbers in one sum are off by 1e-4.
        return get_total_norm(self._gradient_views)

    def rows(self, index: int) -> slice:
        """All."""
        return slice(0, len(self.weights[index]))

    def saved_rows(self, index: int) -> slice:
        """All: one rank writes."""
        return self.rows(index)


class Shards:
    """A rank keeps some rows of each matrix, as FSDP2 has dealt them, whose gradients come reduced; and all vectors.

    `parameters` are those of a model that `sharding.shard` has treated.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], distributed: Distributed) -> None:
        self._parameters, self._distributed = parameters, distributed
        vectors = [parameter for parameter in parameters if not is_dealt(parameter)]
        flat = self._vectors = Flat(vectors)
        kept = dict(zip(vectors, zip(flat.weights, flat.first, flat.second, strict=True), strict=True))
        with torch.no_grad():
            dealt = {matrix: local(matrix) for matrix in parameters if is_dealt(matrix)}
        kept |= {matrix: (rows, torch.zeros_like(rows), torch.zeros_like(rows)) for matrix, rows in dealt.items()}
        self._matrices = [(matrix, *kept[matrix]) for matrix in dealt]
        self.weights, self.first, self.second = ([kept[p][i] for p in parameters] for i in range(3))

    def bundles(self) -> Iterator[list[Piece]]:
        """The vectors; then a block each, since a call costs the host 0.1 ms, and a model has hundreds of weights."""
        yield from self._vectors.bundles()
        yield from self._blocks()

    def _blocks(self) -> Iterator[list[Piece]]:
        """The matrices' pieces, up to CALL at a time, none with another group's: a group's gradients are one tensor."""
        learned = [(p, w, local(p.grad), *moments) for p, w, *moments in self._matrices if p.grad is not None]
        for _, group in itertools.groupby(learned, lambda each: each[2].untyped_storage().data_ptr()):
            pieces = [piece for _, *kept in group for piece in _slices([x.view(-1) for x in kept], decays=True)]
            for start in range(0, len(pieces), CALL):
                yield pieces[start : start + CALL]

    def zero(self) -> None:
        """Forget the gradients, and free the matrices' memory."""
        self._vectors.zero()
        for parameter, *_ in self._matrices:
            parameter.grad = None

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """The vectors'. Matrices' gradients were summed over the ranks, and dealt to them, in the backward passes."""
        self._vectors.reduce(distributed, sums)

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """()"""
        dealt = [piece.gradient for block in self._blocks() for piece in block]
        squared = get_total_norm(dealt).to(distributed.device).square()
        distributed.sum(squared)
        return (squared + self._vectors.gradient_norm(distributed).square()).sqrt()

    def rows(self, index: int) -> slice:
        """Of a matrix those that FSDP2 has dealt to it."""
        parameter = self._parameters[index]
        return own_rows(len(parameter), self._distributed) if is_dealt(parameter) else slice(0, len(parameter))

    def saved_rows(self, index: int) -> slice:
        """All that it keeps of a matrix, and its share of a vector."""
        parameter = self._parameters[index]
        return slice(None) if is_dealt(parameter) else own_rows(len(parameter), self._distributed)


def gradients(layout: Layout) -> list[Tensor]:
    """Those of all that this rank updates, (n,) each; on a sharded rank there are none before a backward pass."""
    return [piece.gradient for bundle in layout.bundles() for piece in bundle]


def _slices(kept: Sequence[Tensor], decays: bool) -> Iterator[Piece]:
    """Weights, gradients and both moments, (n,) each, in pieces; none where n = 0."""
    for weight, gradient, first, second in zip(*(x.split(SLICE) for x in kept), strict=True):
        if len(weight):
            yield Piece(weight, gradient, first, second, decays)


def _flat(parameters: Sequence[Tensor], order: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """A zero tensor (N,) with room for the parameters in that order, and its views in the parameters' own order."""
    flat = parameters[0].new_zeros(sum(p.numel() for p in parameters), requires_grad=False)
    pieces = flat.split([parameters[i].numel() for i in order])
    views = {i: piece.view_as(parameters[i]) for i, piece in zip(order, pieces, strict=True)}
    return flat, [views[i] for i in range(len(parameters))]
