"""CUDA graphs of training passes, for models whose kernels run for less time than the host takes to launch them.

A pass through 135 M parameters is some 4,000 kernels. Recorded once as a graph, they are one launch. A graph has fixed
sizes and fixed addresses, so a pack is padded to a bucket (`corpus/buckets.py`), what differs from step to step is
copied into tensors that the graph reads, and adapters, gradients and fused weights stay where they lie from run to run.
Nothing else changes: the same code runs, through the same objective, and an objective does not know of graphs.

The first pass of a bucket runs as usual, which compiles what is not compiled and lets libraries allocate their memory.
The second one is recorded, and from then on it is replayed. All graphs share the memory of their activations, because
they run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minipersona.corpus.buckets import bucket_of, pad
from minipersona.model.acceleration.foreach import copy_each
from minipersona.model.network import AddVector, Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F
from minipersona.training.optimizer import Flat

MOST = 96  # graphs that are kept; a pack of another bucket is padded and computed without one
OBJECTIVES = (CrossEntropy, KLToBase, R3F)  # whose passes follow from a pack and its keys alone, without the step


class Graphs:
    """The graphs of one model's training passes, for all runs of a process that train it.

    most  graphs that are kept; 0 pads packs all the same, so it gives the numbers that graphs give, without them
    """

    def __init__(self, model: Qwen2, most: int = MOST) -> None:
        self.model, self._most = model, most
        self._passes: dict[Any, _Pass] = {}
        self._layouts: dict[Any, Flat] = {}  # by the shapes of their parameters
        self._frozen: list[nn.Parameter] = []
        self._learned: list[nn.Parameter] = []
        self._addresses: tuple[int, ...] = ()  # of the weights that do not learn, for which the graphs were recorded
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._pool: Any = None

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return sum(each.graph is not None for each in self._passes.values())

    def layout(self, parameters: Sequence[nn.Parameter]) -> Flat:
        """Begin a run that trains these parameters, in memory that runs of the same shapes share."""
        shapes = tuple((parameter.shape, parameter.dtype) for parameter in parameters)
        if shapes in self._layouts:
            self._layouts[shapes].take_over(parameters)
        else:
            self._layouts[shapes] = Flat(parameters)
        self._learned = list(parameters)
        self._frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        self.model.refresh_fused_weights()  # moves weights where it must, before addresses are compared
        return self._layouts[shapes]

    def backward(self, model: Qwen2, pack: Pack, objective: Objective, forward: ForwardPass) -> Tensor:
        """What `loop.backward` does: add the gradients of one pack's summed loss; return the summed terms, (K,)."""
        assert model is self.model and type(objective) in OBJECTIVES
        if (addresses := self._frozen_addresses()) != self._addresses:
            self._passes.clear()  # they read from where the weights were
            self._addresses = addresses
        bucket = bucket_of(pack)
        pack = pad(pack, bucket)
        kind = (  # all that the host decides by within a pass
            objective, forward.checkpoint_activations, forward.compiled, tuple(sorted(forward.taps)),
            repr(model.lora), model.fused, tuple(parameter.data_ptr() for parameter in self._learned),
        )  # fmt: skip
        known = self._passes.get((bucket, kind))
        each = known or _Pass(model, pack, objective, forward)
        if known is None and len(self._passes) < self._most:
            self._passes[bucket, kind] = each
        each.fill(pack, forward)
        try:
            if known is not None and self._stream is not None and each.graph is None:
                self._record(each)
            return self._run(each)
        except torch.OutOfMemoryError:
            self._give_up()
            raise

    def _frozen_addresses(self) -> tuple[int, ...]:
        fused = [each for block in self.model.blocks for each in (block.self_attn.qkv, block.mlp.gate_up)]
        inside = (address for each in fused for address in each.addresses)
        return *(parameter.data_ptr() for parameter in self._frozen), *inside

    def _run(self, each: _Pass) -> Tensor:
        if each.graph is not None:
            each.graph.replay()
        elif self._stream is None:
            each.compute()
        else:
            # On the stream that graphs are recorded on, because libraries keep a workspace a stream.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    each.compute()
            finally:
                current.wait_stream(self._stream)
        return each.terms

    def _record(self, each: _Pass) -> None:
        """Record a pass; nothing is computed. Without memory for it, none is recorded from then on."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                each.compute()
        except torch.OutOfMemoryError:
            self._give_up()
        else:
            each.graph = graph

    def _give_up(self) -> None:
        """Free the memory of the graphs and record no more."""
        self._passes.clear()
        self._pool, self._most = None, 0


class _Pass:
    """One pass, forward and backward, over tensors that stay where they are."""

    def __init__(self, model: Qwen2, pack: Pack, objective: Objective, forward: ForwardPass) -> None:
        self._model, self._objective = model, objective
        self._pack = pack.to(model.device)
        self._keys = forward.keys(model, pack)
        taps = {layer: AddVector(_vector(tap).clone()) for layer, tap in forward.taps.items()}
        settings = {"checkpoint_activations": forward.checkpoint_activations, "compiled": forward.compiled}
        self._forward = _KeysGiven(forward.seed, forward.step, taps, **settings, given=self._keys)
        self._alive = list(model.buffers())  # the graph reads them, and a later run's adapters have others
        self.terms = torch.zeros(len(objective.terms), dtype=torch.float64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, pack: Pack, forward: ForwardPass) -> None:
        """Copy in what differs from step to step."""
        sent = pack.to(self._model.device)
        vectors = [(_vector(self._forward.taps[layer]), _vector(tap)) for layer, tap in forward.taps.items()]
        pairs = [
            (self._keys, forward.keys(self._model, pack)),
            *((getattr(self._pack, name), getattr(sent, name)) for name in TENSORS),
            *vectors,
        ]
        copy_each(*zip(*pairs, strict=True))

    def compute(self) -> None:
        """Add to the gradients, and write the terms."""
        loss, terms = self._objective(self._model, self._pack, self._forward)
        loss.backward()
        self.terms.copy_(terms.detach())


TENSORS = ("ids", "positions", "targets", "supervised", "boundaries", "documents")  # of a pack


@dataclass(frozen=True)
class _KeysGiven(ForwardPass):
    """A forward pass whose keys were computed before it."""

    given: Tensor = field(kw_only=True)

    def keys(self, model: Qwen2, pack: Pack) -> Tensor:
        return self.given


def _vector(tap: object) -> Tensor:
    assert isinstance(tap, AddVector), "another tap may read what is not copied into a graph"
    return tap.vector
