"""Linear layers that read the same input as one product: q, k and v; gate and up.

    y_i = W_i x + b_i + B_i l_i,   l_i = s_i A_i dropout_i(x)

Their weights lie in one tensor, the rows of one layer after those of another. Behind their I columns come columns for
the adapters' B:

    [ W_q | B_q  0   0  ]
    [ W_k |  0  B_k  0  ]   [x | l_q | l_k | l_v]^T  =  [y_q; y_k; y_v] - b
    [ W_v |  0   0  B_v ]

So the adapters' products are part of a product that is computed anyway, forward and backward, and do not read and
write the wide outputs once more: a step of the 7B is 5% faster. The layers keep their names: the weight of each is a
view of its rows.

I/O = inputs/outputs, T = tokens, n = layers, r, s = rank and scale of an adapter, R = r summed over the layers that
have one
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.acceleration.foreach import copy_each
from minipersona.model.dropout import hashed_dropout
from minipersona.model.lora import Adapter, Linear


class FusedLinear:
    """Several layers of one input. Call it where `ready`, which `refresh` decides before a pass."""

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self.outputs = [layer.weight.shape[0] for layer in layers]
        self.ready = False
        self._memory: Tensor | None = None  # (sum of O, I + the largest R so far)
        self._storage: Tensor | None = None  # (sum of O, I + R), of `_memory`
        self._bias: Tensor | None = None  # (sum of O)
        self._columns: list[Tensor] = []  # (O, r) each: where an adapter's B goes
        self._laid_out: tuple[Any, ...] = ()  # what `addresses` were when the weights were laid out
        self._ranks: list[int] = []  # of the adapters that `_columns` are for

    def __call__(self, x: Tensor, dropout_keys: Tensor | None) -> Sequence[Tensor]:
        """x (T, I) -> each layer's output (T, O)."""
        storage = self._storage
        assert self.ready and storage is not None, "call each layer instead"
        adapters = self.adapters
        if adapters:
            to_rank = to_rank_at_once if x.is_cuda else to_rank_one_by_one  # a CPU would multiply the zeros
            x = torch.cat([x, to_rank(adapters, x, dropout_keys)], dim=-1)  # (T, I + R)
        else:
            storage = storage[:, : x.shape[-1]]
        if not torch.is_grad_enabled():
            return F.linear(x, storage, self._bias).split(self.outputs, dim=-1)
        weights, lora_B = list(storage.split(self.outputs)), [adapter.lora_B for adapter in adapters]
        if x.is_cuda or torch.compiler.is_compiling():
            return linear_each(x, weights, self._bias, lora_B)
        return _LinearEach.apply(len(weights), self._bias, x, *weights, *lora_B)

    @property
    def adapters(self) -> list[Adapter]:
        """The layers' adapters that are enabled."""
        return [layer.adapter for layer in self.layers if layer.adapter is not None and layer.adapter.enabled]

    @property
    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(columns, B) of the adapters that are enabled."""
        adapters = self.adapters
        return list(zip(self._columns, [a.lora_B for a in adapters], strict=True)) if self.ready and adapters else []

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay out the weights, unless they are: a pass whose weights lie as before compares addresses and ranks only.

        Where weights learn or are stored in another precision than the pass's, or only some layers have an enabled
        adapter, the layers are not ready to be fused.
        """
        weights = [layer.weight for layer in self.layers]
        adapters = [layer.adapter for layer in self.layers if layer.adapter is not None]
        self.ready = (
            all(weight.dtype == dtype and not weight.requires_grad for weight in weights)
            and len({adapter.enabled for adapter in adapters}) <= 1
            and len(adapters) in (0, len(self.layers))
        )
        if not self.ready:
            if any(weight.requires_grad for weight in weights):
                self.release()  # an optimizer lays such weights out
            return  # where they lie is kept otherwise, for the passes in their own precision and their graphs
        ranks = [adapter.lora_B.shape[1] for adapter in adapters]
        inputs, width = weights[0].shape[1], weights[0].shape[1] + sum(ranks)
        if self._memory is None or self._memory.shape[1] < width or self._laid_out != self.addresses:
            self._move(inputs, width)
            self._laid_out = self.addresses
        assert self._memory is not None
        if self._storage is None or self._ranks != ranks:
            self._storage, self._ranks = self._memory[:, :width], ranks
            # .data: what an earlier pass saved for its backward pass is this same tensor, and B does not change in
            # between.
            rows, edges = self._storage.data.split(self.outputs), itertools.accumulate(ranks, initial=inputs)
            self._storage.data[:, inputs:].zero_()
            # Without adapters there are no edges, and no columns.
            self._columns = [row[:, a:b] for row, (a, b) in zip(rows, itertools.pairwise(edges), strict=False)]

    def release(self) -> None:
        """Forget the layout. Its memory is free once the layers' weights, which are views of it, lie elsewhere."""
        self.ready = False
        self._memory, self._storage, self._bias, self._columns, self._laid_out = None, None, None, [], ()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie; 0 where they are not laid out. A copy of a model has other addresses.

        Adapters of smaller ranks, or none, leave them where they are: a CUDA graph reads from fixed addresses.
        """
        biases = [layer.bias.data_ptr() for layer in self.layers if layer.bias is not None]
        memory = 0 if self._memory is None else self._memory.data_ptr()
        return memory, *(layer.weight.data_ptr() for layer in self.layers), *biases

    def _move(self, inputs: int, width: int) -> None:
        """Move the weights into one tensor; the layers' parameters become views of it."""
        self._memory, self._storage = self.layers[0].weight.new_zeros(sum(self.outputs), width), None
        for layer, rows_of_it in zip(self.layers, self._memory.split(self.outputs), strict=True):
            rows_of_it[:, :inputs].copy_(layer.weight)
            layer.weight.data = rows_of_it[:, :inputs]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        if self._bias is not None:
            for bias, part in zip(biases, self._bias.split(self.outputs), strict=True):
                bias.data = part
        if self._memory.is_cuda:
            torch.cuda.empty_cache()  # the old weights leave gaps that are too small for what comes next


@torch.no_grad()
def refresh(fused: Sequence[FusedLinear], dtype: torch.dtype) -> None:
    """Before a pass in this precision: lay out the weights where needed, and copy the adapters' B into their columns.

    All copies are one call at the end: between two steps a GPU waits for its host.
    """
    for each in fused:
        each.lay_out(dtype)
    copies = [pair for each in fused for pair in each.copies]
    if copies:
        copy_each([columns for columns, _ in copies], [lora_B for _, lora_B in copies])


def to_rank_one_by_one(adapters: Sequence[Adapter], x: Tensor, dropout_keys: Tensor | None) -> Tensor:
    """x (T, I) -> what every adapter's `to_rank` gives, side by side, (T, R)."""
    return torch.cat([adapter.to_rank(x, dropout_keys) for adapter in adapters], dim=-1)


def to_rank_at_once(adapters: Sequence[Adapter], x: Tensor, dropout_keys: Tensor | None) -> Tensor:
    """The same as one product: the dropped-out copies of x, side by side, with the A of all on a block diagonal.

    A GPU takes a fixed time for a product of rank 32, more than its bytes would, forward and twice backward. So one
    product is faster than three, though two thirds of the block diagonal are zeros (docs/log.md).
    """
    first = adapters[0]
    assert all(adapter.dropout == first.dropout for adapter in adapters), "one AdapterConfig a model"
    if dropout_keys is not None and first.dropout > 0:
        channels = torch.stack([adapter.channel_keys for adapter in adapters])  # (n, I)
        x = hashed_dropout(x[:, None], dropout_keys, channels, first.dropout).flatten(1)  # (T, n I)
        lora_A = torch.block_diag(*(adapter.lora_A.to(x.dtype) for adapter in adapters))  # (R, n I)
    else:
        lora_A = torch.cat([adapter.lora_A.to(x.dtype) for adapter in adapters])  # (R, I)
    low = F.linear(x, lora_A)  # (T, R)
    if all(adapter.scale == first.scale for adapter in adapters):
        return low * first.scale
    parts = low.split([adapter.lora_A.shape[0] for adapter in adapters], dim=-1)
    return torch.cat([part * adapter.scale for part, adapter in zip(parts, adapters, strict=True)], dim=-1)


def _products(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> list[Tensor]:
    biases = [None] * len(weights) if bias is None else bias.split([weight.shape[0] for weight in weights])
    return [F.linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]


# A custom operator, since activation checkpointing in a compiled block recomputes those, but keeps the outputs of an
# autograd.Function.
@torch.library.custom_op("minipersona::linear_each", mutates_args=())
def linear_each(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, lora_B: Sequence[Tensor]) -> list[Tensor]:
    """y_i = W_i x + b_i for several W_i, of which the last columns are the adapters' B.

    In training the products stay separate: one product's backward pass would first have to lay the dL/dy_i side by
    side. x (T, I + R); weights, each (O, I + R); bias (sum of O,) or None; lora_B, each (O, r), for their gradients
    alone:

        dL/dx = sum_i W_i^T dL/dy_i          dL/dB_i = sum_t dL/dy_i l_i^T
    """
    return _products(x, weights, bias)


@linear_each.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, lora_B: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, lora_B = inputs
    ctx.save_for_backward(x, *weights)
    ctx.ranks = [b.shape[1] for b in lora_B]
    ctx.dtypes = [b.dtype for b in lora_B]


def _backward(ctx: Any, d_y: list[Tensor]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    add = sum_of_products if x.is_cuda or torch.compiler.is_compiling() else _sum_of_products
    d_x = add(d_y, weights)  # (T, I + R)
    lows = x[:, x.shape[1] - sum(ctx.ranks) :].split(ctx.ranks, dim=-1) if ctx.ranks else []  # l_i, (T, r) each
    d_B = [(d.T @ low).to(dtype) for d, low, dtype in zip(d_y, lows, ctx.dtypes, strict=False)]
    return d_x, [None] * len(weights), None, d_B


linear_each.register_autograd(_backward, setup_context=_save)


# A custom operator as well: the compiler would have every further product begin with a copy of the sum so far.
@torch.library.custom_op("minipersona::sum_of_products", mutates_args=())
def sum_of_products(d_y: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum_i dL/dy_i W_i: d_y, each (T, O); weights, each (O, I) -> (T, I)."""
    return _sum_of_products(d_y, weights)


def _sum_of_products(d_y: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = d_y[0] @ weights[0]
    for d, weight in zip(d_y[1:], weights[1:], strict=True):
        total.addmm_(d, weight)
    return total


@sum_of_products.register_fake
def _(d_y: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return d_y[0].new_empty(d_y[0].shape[0], weights[0].shape[1])


class _LinearEach(torch.autograd.Function):
    """`linear_each` where nothing is compiled: the first call of an operator imports the compiler, in 1.5 seconds."""

    @staticmethod
    def forward(ctx: Any, layers: int, bias: Tensor | None, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, lora_B = tensors[:layers], tensors[layers:]
        output = _products(x, weights, bias)
        _save(ctx, (x, weights, bias, lora_B), output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *d_y: Tensor) -> tuple[Any, ...]:
        d_x, d_weights, d_bias, d_B = _backward(ctx, list(d_y))
        return None, d_bias, d_x, *d_weights, *d_B
