"""CUDA graphs of training passes, for models whose kernels run for less time than the host takes to launch them.

A pass through 135 M parameters is some 4,000 kernels. Recorded once as a graph, they are one launch. A graph has fixed
sizes and fixed addresses, so a pack is padded to a bucket (`training/buckets.py`), what differs from step to step is
copied into tensors that the graph reads, and adapters, gradients and fused weights stay where they lie from run to run.
Nothing else changes: the same code runs, through the same objective, and an objective does not know of graphs.

The first pass of a bucket runs as usual, which compiles what is not compiled and lets libraries allocate their memory.
The second one is recorded, and from then on it is replayed. All graphs share the memory of their activations, because
they run one after another.

Inside of a graph, a kernel takes two microseconds though it does next to nothing. So fp32 adapters are cast to the
stream's precision all at once, not each where it is used, and so are their gradients before they are added. That is
some 800 kernels less for 420 matrices, and the numbers are the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipersona.model.acceleration.foreach import copy_each
from minipersona.model.lora import adapters
from minipersona.model.network import AddVector, Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.contexts import Anchored, PredictingStates
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.feature_anchor import FeatureAnchor
from minipersona.objective.feature_and_kl import FeatureAndKL
from minipersona.objective.gram_anchor import GramAnchor
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_on_prompts import KLOnPrompts
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F
from minipersona.training.buckets import bucket_of, pad
from minipersona.training.optimizer import Flat

MOST = 96  # graphs that are kept; a pack of another bucket is padded and computed without one
# Those whose passes follow from a pack and its keys alone, without the step.
OBJECTIVES = (CrossEntropy, KLToBase, R3F, FeatureAnchor, GramAnchor, KLOnPrompts, FeatureAndKL)
STRENGTHS = ("weight", "kl_factor")  # of an anchor, which a graph reads from memory


class Graphs:
    """The graphs of one model's training passes, for all runs of a process that train it.

    most  graphs that are kept; 0 pads packs all the same, so it gives the numbers that graphs give, without them
    """

    def __init__(self, model: Qwen2, most: int = MOST) -> None:
        self.model, self._most = model, most
        self._passes: dict[Any, _Pass] = {}  # those used last are at the end
        self._layouts: dict[Any, Flat] = {}  # by the shapes of their parameters
        self._read: dict[str, Tensor] = {}  # what an anchor reads beside packs, by what it is
        self._layout: Flat | None = None
        self._learned: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []
        self._buffers: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()  # of the weights that do not learn, for which the graphs were recorded
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._pool: Any = None

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return sum(each.graph is not None for each in self._passes.values())

    def layout(self, parameters: Sequence[nn.Parameter]) -> Flat:
        """Begin a run that trains these parameters, in memory that runs of the same shapes share."""
        for key in list(self._passes)[: max(0, len(self._passes) - self._most // 2)]:
            del self._passes[key]  # the run needs room, and these were not used for longest
        shapes = tuple((parameter.shape, parameter.dtype) for parameter in parameters)
        if shapes in self._layouts:
            self._layouts[shapes].take_over(parameters)
        else:
            self._layouts[shapes] = Flat(parameters)
        self._layout, self._learned = self._layouts[shapes], list(parameters)
        self._frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        self._buffers = list(self.model.buffers())
        self.model.refresh_fused_weights()  # moves weights where it must, before addresses are compared
        return self._layout

    def objective(self, objective: Objective) -> Objective:
        """The objective of a run that begins; what it reads is copied into memory that runs share."""
        if not isinstance(objective, Anchored):
            return objective

        keep, contexts = self._keep, objective.contexts
        base = {layer: keep(f"base {layer}", states) for layer, states in contexts.base.items()}
        scale = {layer: keep(f"scale {layer}", values) for layer, values in contexts.scale.items()}
        predicting = contexts.predicting
        if predicting is not None:
            predicting = PredictingStates(keep("predicting", predicting.states), keep("first", predicting.first))
        strengths: dict[str, Any] = {
            name: keep(name, torch.as_tensor(getattr(objective, name), dtype=torch.float64, device=self.model.device))
            for name in STRENGTHS if hasattr(objective, name)
        }  # fmt: skip
        contexts = replace(contexts, base=base, scale=scale, predicting=predicting)
        return replace(objective, contexts=contexts, **strengths)

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in the memory of this name, which is another where the shape is."""
        old = self._read.get(name)
        if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            if old is not None:  # passes that read it will not be used again, and would hold it
                self._passes = {key: each for key, each in self._passes.items() if not each.reads(old)}
            self._read[name] = torch.empty_like(tensor)
        return self._read[name].copy_(tensor)

    def backward(self, model: Qwen2, pack: Pack, objective: Objective, forward: ForwardPass) -> Tensor:
        """What `loop.backward` does: add the gradients of one pack's summed loss; return the summed terms, (K,)."""
        assert model is self.model and type(objective) in OBJECTIVES and self._layout is not None
        # Fused weights lie where their layers' weights lie, which are views of them.
        if (addresses := tuple(parameter.data_ptr() for parameter in self._frozen)) != self._addresses:
            self._passes.clear()  # they read from where the weights were
            self._addresses = addresses
        bucket = bucket_of(pack)
        pack = pad(pack, bucket)
        key = (  # all that the host decides by within a pass
            bucket, type(pack), pack.together, _identity(objective), forward.checkpoint_activations, forward.compiled,
            tuple(sorted(forward.taps)), repr(model.lora), model.fused, self._layout,
        )  # fmt: skip
        known = self._passes.pop(key, None)
        each = known or _Pass(model, self._layout, pack, objective, forward)
        if known is not None or len(self._passes) < self._most:
            self._passes[key] = each
        each.fill(pack, forward)
        try:
            if known is not None and self._stream is not None and each.graph is None:
                self._record(each)
            return self._run(each)
        except torch.OutOfMemoryError:
            self._give_up()
            raise

    def _run(self, each: _Pass) -> Tensor:
        if each.graph is not None:
            each.graph.replay()
        elif self._stream is None:
            each.compute(self._learned)
        else:
            # On the stream that graphs are recorded on, because libraries keep a workspace a stream.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    each.compute(self._learned)
            finally:
                current.wait_stream(self._stream)
        return each.terms

    def _record(self, each: _Pass) -> None:
        """Record a pass; nothing is computed. Without memory for it, none is recorded from then on."""
        if not self.recorded:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                each.compute(self._learned)
        except torch.OutOfMemoryError:
            self._give_up()
        else:
            each.graph, each.alive = graph, self._buffers

    def _give_up(self) -> None:
        """Free the memory of the graphs and record no more."""
        self._passes.clear()
        self._pool, self._most = None, 0


class _Pass:
    """One pass, forward and backward, over tensors that stay where they are."""

    def __init__(self, model: Qwen2, layout: Flat, pack: Pack, objective: Objective, forward: ForwardPass) -> None:
        self._model, self._layout, self._objective = model, layout, objective
        self._pack = pack.to(model.device)
        self._keys = forward.keys(model, pack)
        taps = {layer: AddVector(_vector(tap).clone()) for layer, tap in forward.taps.items()}
        settings = {"checkpoint_activations": forward.checkpoint_activations, "compiled": forward.compiled}
        self._forward = _KeysGiven(forward.seed, forward.step, taps, **settings, given=self._keys)
        self.alive: Sequence[Tensor] = ()  # what the graph reads of the adapters of the run in which it was recorded
        self.terms = torch.zeros(len(objective.terms), dtype=torch.float64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, pack: Pack, forward: ForwardPass) -> None:
        """Copy in what differs from step to step."""
        vectors = [(_vector(self._forward.taps[layer]), _vector(tap)) for layer, tap in forward.taps.items()]
        tensors = zip(_tensors(self._pack), _tensors(pack.to(self._model.device)), strict=True)
        copy_each(*zip((self._keys, forward.keys(self._model, pack)), *tensors, *vectors, strict=True))

    def reads(self, tensor: Tensor) -> bool:
        """Whether this tensor is read beside packs."""
        return any(value is tensor for _, value in _beside(self._objective))

    def compute(self, learned: Sequence[nn.Parameter]) -> None:
        """Add to the gradients, and write the terms."""
        with _cast_at_once(self._model, self._layout, learned) as leaves:
            loss, terms = self._objective(self._model, self._pack, self._forward)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        self._layout.add_gradients(gradients)
        self.terms.copy_(terms.detach())


@contextlib.contextmanager
def _cast_at_once(model: Qwen2, layout: Flat, learned: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """What to differentiate by: in this context the adapters' matrices are copies in the stream's precision.

    Where all weights learn, these themselves: norms and embeddings are used in fp32.
    """
    if model.lora is None:
        yield learned
        return
    leaves = [nn.Parameter(copy) for copy in layout.copies(model.compute_dtype)]
    copy_of = {id(master): leaf for master, leaf in zip(learned, leaves, strict=True)}
    masters = [(each, name, p) for each in adapters(model).values() for name, p in each.named_parameters()]
    try:
        for adapter, name, master in masters:
            setattr(adapter, name, copy_of[id(master)])
        yield leaves
    finally:
        for adapter, name, master in masters:
            setattr(adapter, name, master)


@dataclass(frozen=True)
class _KeysGiven(ForwardPass):
    """A forward pass whose keys were computed before it."""

    given: Tensor = field(kw_only=True)

    def keys(self, model: Qwen2, pack: Pack) -> Tensor:
        return self.given


def _identity(objective: Objective) -> Any:
    """Equal for objectives whose passes are the same, but for what `Graphs.objective` copies.

    A tensor is told by its address. A pass keeps the tensors that it reads alive, so no other tensor can have their
    address.
    """
    if not isinstance(objective, Anchored):
        return objective
    contexts, beside = objective.contexts, _beside(objective)
    identities = [(what, value.data_ptr() if isinstance(value, Tensor) else value) for what, value in beside]
    return type(objective), contexts.personas, bool(contexts.responses), *identities


def _beside(objective: Objective) -> list[tuple[Any, Any]]:
    """What an anchored objective reads beside packs and their keys: its settings, and states of the base."""
    if not isinstance(objective, Anchored):
        return []
    contexts, predicting = objective.contexts, objective.contexts.predicting
    found: list[tuple[Any, Any]] = [(name, value) for name, value in vars(objective).items() if name != "contexts"]
    found += [(("base", layer), states) for layer, states in contexts.base.items()]
    found += [(("scale", layer), values) for layer, values in contexts.scale.items()]
    if predicting is not None:
        found += [("predicting", predicting.states), ("first", predicting.first)]
    return found


def _tensors(pack: Pack) -> list[Tensor]:
    return [value for each in fields(pack) if isinstance(value := getattr(pack, each.name), Tensor)]


def _vector(tap: object) -> Tensor:
    assert isinstance(tap, AddVector), "another tap may read what is not copied into a graph"
    return tap.vector
