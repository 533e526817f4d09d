"""Full-parameter training on several ranks: every rank stores a part of the weights, gradients and moments.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023) gathers the matrices of some blocks before they are
used, frees them afterwards, and sums and scatters their gradients during the backward pass. A sharded run computes what
an unsharded one does: the blocks' matrices are gathered in the precision in which the products read them, embedding and
head as they are stored, and all gradients are summed in the masters' precision. Vectors (norms, which are read as fp32,
and biases) are so few that every rank stores all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from minipersona.config import RunConfig
from minipersona.model.network import Qwen2
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import Flat, Piece, pieces

GROUP = 320_000_000  # elements gathered at a time: a block of the 7B, four of the 3B; each time costs the host 1 ms
CALL = 7  # the most pieces of one update call: as many matrices as a block has


def is_sharded(config: RunConfig, distributed: Distributed) -> bool:
    """Whether weights are sharded: all of them learn, and there are several ranks."""
    return config.training.method == "full" and distributed.size > 1


def shard(model: Qwen2, distributed: Distributed, stop: int) -> None:
    """Shard the model's matrices over the ranks, which must all hold the same ones before. Vectors stay as they are.

    stop  the one block after which a pass may end early. No group contains blocks on both sides of its end, because
          torch 2.11 leaves a group gathered if a pass has used a part of it

    From here on every rank has to go through the model equally often: each pass is a sequence of collective operations.
    """
    # Imported late: it imports torch.distributed.tensor, a second that no other command should wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # some may be views of fused weights
    mesh = init_device_mesh(distributed.device.type, (distributed.size,))
    vectors = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    master = model.lm_head.weight.dtype
    as_read = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=master, cast_forward_inputs=False)
    for group in groups(list(model.model.layers), stop):
        fully_shard(group, mesh=mesh, mp_policy=as_read, ignored_params=vectors)
    # Embedding and head stay as they are stored: gradients of a token's row add up over its places in the pack.
    if not model.config.tie_word_embeddings:  # a tied one stays with the head, which is the same parameter
        fully_shard(model.model.embed_tokens, mesh=mesh)
    # The head stays gathered from a pass's end to the end of its backward pass: the loss reads it in between.
    fully_shard(model, mesh=mesh, ignored_params=vectors)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loop divides, once
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def check(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        assert given.get("stop_after") in (stop, None), "weights would stay gathered"

    model.register_forward_pre_hook(check, prepend=True, with_kwargs=True)  # before anything is gathered


def groups(blocks: Sequence[nn.Module], stop: int) -> list[list[nn.Module]]:
    """The blocks in their order, in groups of about GROUP elements, none with blocks before and after `stop`'s end."""
    size = max(1, round(GROUP / sum(parameter.numel() for parameter in blocks[0].parameters())))
    parts = blocks[: stop + 1], blocks[stop + 1 :]
    return [list(part[i : i + size]) for part in parts for i in range(0, len(part), size)]


def reshard(model: Qwen2) -> None:
    """Free what a pass without gradients has left gathered: afterwards parameters are shards again."""
    model.reshard()  # type: ignore[operator]


# ---------------------------------------------------------------- one rank's part of a tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this rank stores only some rows of it."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of a DTensor that this rank stores; call it without gradients."""
    stored = tensor.to_local()  # type: ignore[attr-defined]
    assert isinstance(stored, Tensor)
    return stored


def own_rows(rows: int, distributed: Distributed) -> slice:
    """Which rows of a matrix this rank stores, and which of a vector it saves and measures.

    FSDP2 splits rows as torch.chunk does: equal shares rounded up, of which the last ranks' may be smaller or empty.
    """
    share = -(-rows // distributed.size)
    return slice(min(distributed.rank * share, rows), min((distributed.rank + 1) * share, rows))


def share_of(weight: Tensor, distributed: Distributed) -> Tensor:
    """This rank's rows of a weight, sharded or not; all ranks together have each row once."""
    assert is_dtensor(weight) or weight.ndim < 2, "still gathered, in the precision of the products"
    return local(weight) if is_dtensor(weight) else weight[own_rows(len(weight), distributed)]


class Shards:
    """The layout of a sharded rank: its rows of each matrix, and all vectors.

    `parameters` are those of a model after `shard`. FSDP2 sums the gradients of matrices in the backward passes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], distributed: Distributed) -> None:
        self._parameters, self._distributed = parameters, distributed
        vectors = [parameter for parameter in parameters if not is_dtensor(parameter)]
        flat = self._vectors = Flat(vectors)
        stored = dict(zip(vectors, zip(flat.weights, flat.exp_avg, flat.exp_avg_sq, strict=True), strict=True))
        with torch.no_grad():
            own = {matrix: local(matrix) for matrix in parameters if is_dtensor(matrix)}
        stored |= {matrix: (rows, torch.zeros_like(rows), torch.zeros_like(rows)) for matrix, rows in own.items()}
        self._matrices = [(matrix, *stored[matrix]) for matrix in own]
        self.weights, self.exp_avg, self.exp_avg_sq = ([stored[p][i] for p in parameters] for i in range(3))

    def update_groups(self) -> Iterator[list[Piece]]:
        """The vectors; then a block each, since a call costs the host 0.1 ms, and a model has hundreds of weights."""
        yield from self._vectors.update_groups()
        yield from self._blocks()

    def _blocks(self) -> Iterator[list[Piece]]:
        """The matrices' pieces, up to CALL at a time, of one FSDP2 group each: its gradients are one tensor."""
        learned = [(p, w, local(p.grad), *moments) for p, w, *moments in self._matrices if p.grad is not None]
        for _, group in itertools.groupby(learned, lambda each: each[2].untyped_storage().data_ptr()):
            found = [piece for _, *stored in group for piece in pieces([x.view(-1) for x in stored], decays=True)]
            for start in range(0, len(found), CALL):
                yield found[start : start + CALL]

    def zero(self) -> None:
        """Set the vectors' gradients to zero, and free the matrices'."""
        self._vectors.zero()
        for parameter, *_ in self._matrices:
            parameter.grad = None

    def reduce(self, distributed: Distributed, sums: Tensor) -> None:
        """Sum the vectors' gradients and `sums` over the ranks."""
        self._vectors.reduce(distributed, sums)

    def gradient_norm(self, distributed: Distributed) -> Tensor:
        """()"""
        own = [piece.gradient for block in self._blocks() for piece in block]
        squared = get_total_norm(own).to(distributed.device).square()
        distributed.sum(squared)
        return (squared + self._vectors.gradient_norm(distributed).square()).sqrt()

    def rows(self, index: int) -> slice:
        """Of a matrix this rank's share, of a vector all."""
        parameter = self._parameters[index]
        return own_rows(len(parameter), self._distributed) if is_dtensor(parameter) else slice(0, len(parameter))

    def saved_rows(self, index: int) -> slice:
        """Of a matrix all that it stores, of a vector this rank's share."""
        parameter = self._parameters[index]
        return slice(None) if is_dtensor(parameter) else own_rows(len(parameter), self._distributed)
