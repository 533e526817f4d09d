"""Full-parameter training on several ranks: every rank keeps a share of the weights, gradients and moments.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023) gathers some blocks' matrices before they are used, frees
them after, and sums and deals out their gradients as the backward pass goes. A sharded run computes what an unsharded
one does: the blocks' matrices travel in the precision in which the products read them, embedding and head as they are
stored, and all gradients are summed in the masters' precision. Vectors (norms, which are read as fp32, and biases) are
few enough that every rank keeps them whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from minipersona.config import RunConfig
from minipersona.model.network import Qwen2
from minipersona.training.distributed import Distributed

GROUP = 320_000_000  # elements gathered at a time: a block of the 7B, four of the 3B; each time costs the host 1 ms


def is_sharded(config: RunConfig, distributed: Distributed) -> bool:
    """Whether weights are dealt out: all of them learn, and there are ranks to deal them to."""
    return config.training.method == "full" and distributed.size > 1


def shard(model: Qwen2, distributed: Distributed, stop: int) -> None:
    """Deal the model's matrices to the ranks, which all hold the same ones before. Vectors stay as they are.

    stop  the one block after which a pass may end early. No group reaches over it, since torch 2.11 leaves a group
          gathered of which a pass has used a part

    Every rank has to go through the model equally often from here on: each pass is a sequence of collective operations.
    """
    # Imported late: it brings torch.distributed.tensor along, a second that no other command should wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # some may be views into a `Joined` tensor
    mesh = init_device_mesh(distributed.device.type, (distributed.size,))
    vectors = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    master = model.lm_head.weight.dtype
    as_read = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=master, cast_forward_inputs=False)
    for group in groups(list(model.model.layers), stop):
        fully_shard(group, mesh=mesh, mp_policy=as_read, ignored_params=vectors)
    model.early_exit = stop
    # Embedding and head stay as they are stored: gradients of a token's row add up over its places in the pack.
    if not model.config.tie_word_embeddings:  # a tied one stays with the head, which is the same parameter
        fully_shard(model.model.embed_tokens, mesh=mesh)
    # The head stays gathered from a pass's end to the end of its backward pass: the loss reads it in between.
    fully_shard(model, mesh=mesh, ignored_params=vectors)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loop divides, once
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def groups(blocks: Sequence[nn.Module], stop: int) -> list[list[nn.Module]]:
    """The blocks in their order, in groups of about GROUP elements; none reaches over the end of block `stop`."""
    size = max(1, round(GROUP / sum(parameter.numel() for parameter in blocks[0].parameters())))
    parts = blocks[: stop + 1], blocks[stop + 1 :]
    return [list(part[i : i + size]) for part in parts for i in range(0, len(part), size)]


def reshard(model: Qwen2) -> None:
    """Give back what a pass without gradients has left gathered: afterwards parameters are shards again."""
    model.reshard()  # type: ignore[operator]


def is_dealt(tensor: Tensor) -> bool:
    """Whether this rank keeps some rows of it only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this rank keeps of a tensor that is dealt; call it without gradients."""
    kept = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    assert isinstance(kept, Tensor)
    return kept


def own_rows(rows: int, distributed: Distributed) -> slice:
    """Which rows of a matrix this rank keeps, and which of a vector it answers for.

    FSDP2 deals them as torch.chunk does: equal shares rounded up, of which the last ranks' may be smaller or empty.
    """
    share = -(-rows // distributed.size)
    return slice(min(distributed.rank * share, rows), min((distributed.rank + 1) * share, rows))


def share_of(weight: Tensor, distributed: Distributed) -> Tensor:
    """This rank's rows of a weight, whether it is dealt or kept whole; together the ranks have each row once."""
    assert is_dealt(weight) or weight.ndim < 2, "still gathered, and rounded at that"
    return local(weight) if is_dealt(weight) else weight[own_rows(len(weight), distributed)]
