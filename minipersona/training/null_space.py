"""Adapters that are kept off the directions which their layers' inputs have at given contexts. LoRA-Null
(arXiv:2503.02659) begins in the null space of such inputs; here every update is projected onto it.

    X (C, I)   a layer's inputs at the last tokens of C contexts, of the base model
    U (I, k)   its first k right singular vectors: of all k directions, those that hold most of X
    A <- A (I - U U^T)      after every update

An adapter adds s B A x to its layer's output. With A U = 0 it adds nothing to the part of x that lies in span(U). So an
input that lies there entirely is answered as by the base, whatever B has learned. A starts in the null space too.

C = contexts, I = inputs of a layer, r = rank, k = directions
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from minipersona.errors import UserError
from minipersona.model.lora import adapters, linears
from minipersona.model.network import Qwen2
from minipersona.model.pack import make_pack, split

SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # these read what the others read

Projections = Sequence[tuple[Tensor, Tensor]]
"""(A, U) of each adapter: (r, I) and (I, k)."""


def input_of(name: str) -> str:
    """The layer that stands for all that have the same input, by their names."""
    block, _, layer = name.rpartition(".")
    return f"{block}.{SHARED_INPUT.get(layer, layer)}"


@torch.no_grad()
def input_directions(
    model: Qwen2, contexts: Sequence[np.ndarray], layers: Sequence[str], k: int, pack_tokens: int
) -> dict[str, Tensor]:
    """U (I, k) of every input that these layers read, by `input_of`; fp32, or fp64 in a model of fp64.

    The model is applied as it is, without dropout: nothing is attached to it yet. UserError where there are fewer than
    k contexts or channels.
    """
    read = sorted({input_of(name) for name in layers})
    stop = max(int(name.split(".")[2]) for name in read)  # model.layers.<block>.
    inputs: dict[str, list[Tensor]] = {name: [] for name in read}
    for group in split([len(ids) for ids in contexts], pack_tokens):
        pack = make_pack([contexts[i] for i in group]).to(model.device)

        def keep(name: str, x: Tensor, last: Tensor = pack.last) -> None:
            inputs[name].append(x[last])  # (S, I)

        with _inputs_shown(model, read, keep):
            model(pack, stop_after=stop)
    return {name: principal_directions(torch.cat(rows), k, name) for name, rows in inputs.items()}


def principal_directions(x: Tensor, k: int, name: str = "x") -> Tensor:
    """The first k right singular vectors of x (C, I), as the columns of U (I, k).

    They are the eigenvectors of x^T x, or follow from those of x x^T: a decomposition of the smaller side alone. That
    squares the singular values, so it is done in fp64, and U is made orthonormal again at the end.
    """
    if k > min(x.shape):
        raise UserError(
            f"lora.null_space = {k}: {name} has {x.shape[1]:,} channels at {x.shape[0]:,} contexts; take at most "
            f"{min(x.shape):,}"
        )
    wide = x.double()
    contexts, channels = x.shape
    smaller = wide.T @ wide if channels <= contexts else wide @ wide.T
    largest = torch.linalg.eigh(smaller).eigenvectors[:, -k:].flip(1)  # which are in ascending order
    u = torch.linalg.qr(largest if channels <= contexts else wide.T @ largest).Q
    return u.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@contextlib.contextmanager
def _inputs_shown(model: Qwen2, names: Sequence[str], show: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context every pass shows what these layers read, x (T, I).

    Taps see the residual stream alone. So this is a hook, on the plain path, where each layer is called for itself.
    """
    fused, model.fused = model.fused, False
    layers = linears(model)
    handles = []
    for name in names:

        def shown(layer: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            show(name, arguments[0])

        handles.append(layers[name].register_forward_pre_hook(shown))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.fused = fused


def projections(model: Qwen2, directions: Mapping[str, Tensor]) -> Projections:
    """Every adapter's A with the U of its input, on A's device and in its precision."""
    found = adapters(model)
    dtype = next(iter(found.values())).lora_A.dtype
    moved = {name: u.to(model.device, dtype) for name, u in directions.items()}
    return [(adapter.lora_A, moved[input_of(name)]) for name, adapter in found.items()]


@torch.no_grad()
def keep_in_null_space(pairs: Projections) -> None:
    """A <- A (I - U U^T), in place."""
    for a, u in pairs:
        a.sub_((a @ u) @ u.T)
