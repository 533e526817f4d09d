"""Full-parameter training on several ranks: every rank keeps a share of the weights, gradients and moments.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023) gathers a block's weights before they are used, frees
them after, and sums and deals out their gradients as the backward pass goes. Weights travel as the fp32 masters they
are, so that a sharded run computes what an unsharded one does.
"""

from __future__ import annotations

from torch import Tensor

from minipersona.config import RunConfig
from minipersona.model.network import Qwen2
from minipersona.training.world import World


def is_sharded(config: RunConfig, world: World) -> bool:
    """Whether weights are dealt out: all of them learn, and there are ranks to deal them to."""
    return config.training.method == "full" and world.size > 1


def shard(model: Qwen2, world: World) -> None:
    """Deal the model's weights to the ranks, which all hold the same ones before.

    Every rank has to go through the model equally often from here on: each pass is a sequence of collective operations.
    """
    # Imported late: it brings torch.distributed.tensor along, a second that no other command should wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # some may be views into a `Joined` tensor
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    if not model.config.tie_word_embeddings:  # a tied one stays with the head, which is the same parameter
        fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the rest: final norm and head, which stay gathered until the backward pass is over
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loop divides, once
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def reshard(model: Qwen2) -> None:
    """Give back what a pass without gradients has left gathered: afterwards parameters are shards again."""
    model.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """What this rank keeps of a sharded tensor; call it without gradients."""
    kept = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    assert isinstance(kept, Tensor)
    return kept


def own_rows(rows: int, world: World) -> slice:
    """Which of a weight's rows this rank keeps. FSDP2 deals them as torch.chunk does: equal shares rounded up, of which
    the last ranks' may be smaller or empty.
    """
    share = -(-rows // world.size)
    return slice(min(world.rank * share, rows), min((world.rank + 1) * share, rows))
