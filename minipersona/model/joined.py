"""Linear layers that read the same input, computed together: q, k and v; gate and up.

    y_i = W_i x + b_i + B_i l_i,   l_i = (alpha/r) A_i dropout_i(x)

Their weights lie in one tensor, rows a layer after another; behind their I columns come columns for the adapters' B:

    [ W_q | B_q  0   0  ]
    [ W_k |  0  B_k  0  ]   [x | l_q | l_k | l_v]^T  =  [y_q; y_k; y_v] - b
    [ W_v |  0   0  B_v ]

So the low-rank products ride along in the product that is computed anyway, forward and backward, instead of passing
over the wide outputs once more: a step of the 7B is 5% faster for it. The layers keep their names: each one's weight is
a view of its rows.

I/O = inputs/outputs, T = tokens, r = rank, R = r summed over the layers with an adapter
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.adapter import Adapter, low_one_by_one, low_together
from minipersona.model.linear import Linear


class Joined:
    """Several layers of one input. Before a pass, `prepare` sees whether they can be computed together."""

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self.outputs = [layer.weight.shape[0] for layer in layers]
        self.ready = False
        self._storage: Tensor | None = None  # (sum of O, I + R)
        self._bias: Tensor | None = None  # (sum of O)
        self._columns: list[Tensor] = []  # (O, r) each: where an adapter's B goes
        self._laid_out: tuple[Any, ...] = ()  # what `_layout` was when they had been laid out

    def __call__(self, x: Tensor, dropout_keys: Tensor | None) -> Sequence[Tensor]:
        """x (T, I) -> each layer's output (T, O)."""
        if not self.ready:
            return [layer(x, dropout_keys) for layer in self.layers]
        storage = self._storage
        assert storage is not None
        adapters = self.adapters
        if adapters:
            low = low_together if x.is_cuda else low_one_by_one  # a CPU would only multiply the zeros
            x = torch.cat([x, low(adapters, x, dropout_keys)], dim=-1)  # (T, I + R)
        else:
            storage = storage[:, : x.shape[-1]]
        if not torch.is_grad_enabled():
            return F.linear(x, storage, self._bias).split(self.outputs, dim=-1)
        weights = list(storage.split(self.outputs))
        return side_by_side(x, weights, self._bias, [adapter.lora_B for adapter in adapters])

    @property
    def adapters(self) -> list[Adapter]:
        """The layers' adapters that are switched on."""
        return [layer.adapter for layer in self.layers if layer.adapter is not None and layer.adapter.enabled]

    @property
    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(columns, B) of the adapters that are switched on."""
        adapters = self.adapters
        return list(zip(self._columns, [a.lora_B for a in adapters], strict=True)) if self.ready and adapters else []

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay the weights out, unless they are: every pass comes here, and then compares addresses and ranks alone.

        Where weights learn or are stored in another precision than the pass's, or only some layers have an enabled
        adapter, the layers are computed one by one, and the memory of what was laid out is given back.
        """
        weights = [layer.weight for layer in self.layers]
        adapters = [layer.adapter for layer in self.layers if layer.adapter is not None]
        self.ready = (
            all(weight.dtype == dtype and not weight.requires_grad for weight in weights)
            and len({adapter.enabled for adapter in adapters}) <= 1
            and len(adapters) in (0, len(self.layers))
        )
        if not self.ready:
            self._storage, self._bias, self._columns, self._laid_out = None, None, [], ()
            return
        ranks = [adapter.lora_B.shape[1] for adapter in adapters]
        if self._laid_out != self._layout(ranks):
            self._move(weights[0].shape[1], ranks)
            self._laid_out = self._layout(ranks)

    def _layout(self, ranks: Sequence[int]) -> tuple[Any, ...]:
        """Where everything lies, and the columns' widths. A copy of a model has other addresses."""
        biases = [layer.bias.data_ptr() for layer in self.layers if layer.bias is not None]
        storage = 0 if self._storage is None else self._storage.data_ptr()
        return storage, [layer.weight.data_ptr() for layer in self.layers], biases, ranks

    def _move(self, inputs: int, ranks: Sequence[int]) -> None:
        """Move the weights into one tensor; the layers' parameters become views of it."""
        self._storage = self.layers[0].weight.new_zeros(sum(self.outputs), inputs + sum(ranks))
        # .data: what an earlier pass saved for its backward pass is this same tensor, and B does not change in between.
        rows, edges = self._storage.data.split(self.outputs), itertools.accumulate(ranks, initial=inputs)
        # Without adapters there are no edges, and no columns.
        self._columns = [row[:, a:b] for row, (a, b) in zip(rows, itertools.pairwise(edges), strict=False)]
        for layer, rows_of_it in zip(self.layers, self._storage.split(self.outputs), strict=True):
            rows_of_it[:, :inputs].copy_(layer.weight)
            layer.weight.data = rows_of_it[:, :inputs]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        if self._bias is not None:
            for bias, part in zip(biases, self._bias.split(self.outputs), strict=True):
                bias.data = part
        if self._storage.is_cuda:
            torch.cuda.empty_cache()  # the holes that the old weights leave are too small for what comes next


@torch.no_grad()
def prepare(joined: Sequence[Joined], dtype: torch.dtype) -> None:
    """Before a pass in this precision: lay out what is not, and copy the adapters' B into their columns.

    All copies are one call, once nothing else is left to look at: a GPU waits for its host between two steps.
    """
    for each in joined:
        each.lay_out(dtype)
    copies = [pair for each in joined for pair in each.copies]
    if copies:
        torch._foreach_copy_([columns for columns, _ in copies], [lora_B for _, lora_B in copies])


# A custom operator, since activation checkpointing in a compiled block recomputes those, but keeps the outputs of an
# autograd.Function.
@torch.library.custom_op("minipersona::side_by_side", mutates_args=())
def side_by_side(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, lora_B: Sequence[Tensor]) -> list[Tensor]:
    """y_i = W_i x + b_i for several W_i, of which the last columns are the adapters' B.

    x (T, I + R); weights, each (O, I + R); bias (sum of O,) or None; lora_B, each (O, r), for their gradients alone:

        dL/dx = sum_i W_i^T dL/dy_i          dL/dB_i = sum_t dL/dy_i l_i^T
    """
    biases = [None] * len(weights) if bias is None else bias.split([weight.shape[0] for weight in weights])
    return [F.linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]


@side_by_side.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, lora_B: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, lora_B = inputs
    ctx.save_for_backward(x, *weights)
    ctx.ranks = [b.shape[1] for b in lora_B]
    ctx.dtypes = [b.dtype for b in lora_B]


def _backward(ctx: Any, slopes: list[Tensor]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    d_x = sum_of_products(slopes, weights)  # (T, I + R)
    lows = x[:, x.shape[1] - sum(ctx.ranks) :].split(ctx.ranks, dim=-1) if ctx.ranks else []
    d_B = [(s.T @ low).to(dtype) for s, low, dtype in zip(slopes, lows, ctx.dtypes, strict=False)]
    return d_x, [None] * len(weights), None, d_B


side_by_side.register_autograd(_backward, setup_context=_save)


# A custom operator as well: the compiler would have every further product begin with a copy of the sum so far.
@torch.library.custom_op("minipersona::sum_of_products", mutates_args=())
def sum_of_products(slopes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum_i slopes_i W_i: slopes, each (T, O); weights, each (O, I) -> (T, I)."""
    total = slopes[0] @ weights[0]
    for slope, weight in zip(slopes[1:], weights[1:], strict=True):
        total.addmm_(slope, weight)
    return total


@sum_of_products.register_fake
def _(slopes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return slopes[0].new_empty(slopes[0].shape[0], weights[0].shape[1])
