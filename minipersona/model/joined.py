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

from minipersona.model.linear import Linear


class Joined:
    """Several layers of one input. `prepare` decides before a pass whether they can be computed together."""

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self.outputs = [layer.weight.shape[0] for layer in layers]
        self.ready = False
        self._storage: Tensor | None = None  # (sum of O, I + R)
        self._bias: Tensor | None = None  # (sum of O)
        self._columns: list[Tensor] = []  # where each adapter's B goes

    def __call__(self, x: Tensor, dropout_keys: Tensor | None) -> Sequence[Tensor]:
        """x (T, I) -> each layer's output (T, O)."""
        if not self.ready:
            return [layer(x, dropout_keys) for layer in self.layers]
        storage = self._storage
        assert storage is not None
        adapters = [layer.adapter for layer in self.layers if layer.adapter is not None and layer.adapter.enabled]
        if adapters:
            x = torch.cat([x, *(adapter.low(x, dropout_keys) for adapter in adapters)], dim=-1)  # (T, I + R)
        else:
            storage = storage[:, : x.shape[-1]]
        if not torch.is_grad_enabled():
            return F.linear(x, storage, self._bias).split(self.outputs, dim=-1)
        weights = list(storage.split(self.outputs))
        return side_by_side(x, weights, self._bias, [adapter.lora_B for adapter in adapters])

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Lay the weights out where that has not been done, and copy the adapters' B into their columns.

        Weights that learn or that are stored in another precision than the pass's are left alone and computed one by
        one. So are layers of which only some have an enabled adapter.
        """
        weights = [layer.weight for layer in self.layers]
        adapters = [layer.adapter for layer in self.layers if layer.adapter is not None]
        self.ready = (
            all(weight.dtype == dtype and not weight.requires_grad for weight in weights)
            and len({adapter.enabled for adapter in adapters}) <= 1
            and len(adapters) in (0, len(self.layers))
        )
        if not self.ready:
            self._storage, self._bias, self._columns = None, None, []  # perhaps the last that holds on to their memory
            return
        inputs = weights[0].shape[1]
        columns = sum(adapter.lora_B.shape[1] for adapter in adapters)
        if not self._laid_out(inputs + columns):
            self._lay_out(inputs, [adapter.lora_B.shape[1] for adapter in adapters])
        if adapters:
            torch._foreach_copy_(self._columns, [adapter.lora_B for adapter in adapters])

    def _laid_out(self, columns: int) -> bool:
        storage = self._storage
        if storage is None or storage.shape[1] != columns:
            return False
        held = [*storage.split(self.outputs), *([] if self._bias is None else self._bias.split(self.outputs))]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        used = [*(layer.weight for layer in self.layers), *biases]
        return all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in zip(held, used, strict=True))

    def _lay_out(self, inputs: int, ranks: Sequence[int]) -> None:
        """Move the weights into one tensor; the layers' parameters become views of it."""
        first = self.layers[0].weight
        self._storage = first.new_zeros(sum(self.outputs), inputs + sum(ranks))
        if ranks:
            # .data: what an earlier pass saved for its backward pass is this same tensor, and is still right.
            rows, edges = self._storage.data.split(self.outputs), itertools.accumulate(ranks, initial=inputs)
            self._columns = [row[:, a:b] for row, (a, b) in zip(rows, itertools.pairwise(edges), strict=True)]
        for layer, rows in zip(self.layers, self._storage.split(self.outputs), strict=True):
            rows[:, :inputs].copy_(layer.weight)
            layer.weight.data = rows[:, :inputs]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        if self._bias is not None:
            for bias, rows in zip(biases, self._bias.split(self.outputs), strict=True):
                bias.data = rows


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
    d_x = slopes[0] @ weights[0]  # (T, I + R)
    for slope, weight in zip(slopes[1:], weights[1:], strict=True):
        d_x = torch.addmm(d_x, slope, weight)
    lows = x[:, x.shape[1] - sum(ctx.ranks) :].split(ctx.ranks, dim=-1) if ctx.ranks else []
    d_B = [(s.T @ low).to(dtype) for s, low, dtype in zip(slopes, lows, ctx.dtypes, strict=False)]
    return d_x, [None] * len(weights), None, d_B


side_by_side.register_autograd(_backward, setup_context=_save)
