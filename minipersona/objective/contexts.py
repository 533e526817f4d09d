"""What anchored objectives share: prompts that a step passes beside its rows, to hold the model near its base there.

    L = sum_t -log p(y_t | y_<t) + w N a,      a = the anchor: a mean over the step's contexts

A context is the rendered prompt of a training persona at an anchor question, neither of which is measured, and for KL
also the base's response to it, where the config says so. The loop divides by N, the supervised tokens of the step's
rows. Contexts add none. So a step's loss is the mean cross-entropy plus w a, however rows and contexts are cut into
packs and dealt to ranks. Contexts have no dropout and are not steered: it is the model as it is used afterwards that is
held.

P = personas, Q = questions, C = contexts of a step, S = contexts of a pack, T = their tokens, n = those of T at which
predictions are held, N = supervised tokens of the step's rows, D = width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minipersona.corpus.batch import Batch, RowOrder, assign_to_packs, balance
from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import IGNORE, Pack, make_pack, send, split
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass

DRAW = 101  # of the contexts, beside the seed: independent of the order of the rows and of mixtures


@dataclass(frozen=True, kw_only=True)
class ContextPack(Pack):
    """Contexts end to end; `documents` are their indices.

    Where contexts end in responses, `supervised` and `targets` are of the responses' tokens, as in a pack of rows.
    Otherwise nothing is supervised, and `targets` only say what counts: they are 0 at the contexts' tokens, and IGNORE
    in a document of padding.

    per_context  () fp64  supervised tokens of the whole step's rows, N, divided by its contexts, C
    per_token    () fp64  N divided by the tokens of these contexts, or of their responses where they end in some
    """

    per_context: Tensor
    per_token: Tensor

    @property
    def counted(self) -> Tensor:
        """(S,) bool: False for a document of padding."""
        return self.targets[self.last] != IGNORE


@dataclass(frozen=True, eq=False)
class PredictingStates:
    """The base's states, after the final norm, at the tokens of contexts at which an anchor holds predictions.

    states  (M, D) in the stream's precision: M such tokens of all contexts that a run takes
    first   (P * Q,) int64: of context c's token at position t it is states[first[c] + t]
    """

    states: Tensor
    first: Tensor

    def at(self, pack: Pack, rows: Tensor) -> Tensor:
        """rows (n,) of a pack's stream -> (n, D). Rows of padding get other rows' states."""
        document = torch.searchsorted(pack.boundaries[1:].long(), rows, right=True)
        found = self.first[pack.documents[document]] + pack.positions[rows]
        return self.states[found.clamp(0, len(self.states) - 1)]


@dataclass(frozen=True, eq=False)
class Contexts:
    """The prompts of all personas at all questions, which of them each step takes, and what the base does with them.

    ids          P * Q prompts, personas outermost, each with its response where there are responses
    personas     P
    per_step     C
    by_question  True: a step takes whole questions, C / P of them rounded down, each with all personas, which stay in
                 one pack. False: it takes contexts one by one
    base         layer -> (P * Q, D) of `base_states`; empty for an objective that does not read it
    scale        layer -> (P * Q,) what a feature anchor divides the squared change of each context's state by
    responses    (n,) bool of each context: which of its tokens are the response's; empty where there are only prompts
    predicting   the base's states that its predictions follow from; None for an objective that does not read them

    Like the rows, contexts come from a seeded permutation, an epoch after another: a function of (seed, step).
    """

    ids: Sequence[np.ndarray]
    personas: int
    per_step: int
    seed: int
    by_question: bool
    base: Mapping[int, Tensor] = field(default_factory=dict)
    scale: Mapping[int, Tensor] = field(default_factory=dict)
    responses: Sequence[np.ndarray] = ()
    predicting: PredictingStates | None = None

    @cached_property
    def _order(self) -> RowOrder:
        return RowOrder(len(self.ids) // self.together, self.per_step // self.together, (self.seed, DRAW))

    @property
    def together(self) -> int:
        """How many contexts are compared with each other, and so are in one pack."""
        return self.personas if self.by_question else 1

    def groups(self, step: int) -> list[list[int]]:
        """The contexts of a step, from 1, as those that stay together."""
        drawn = self._order.step(step)
        if not self.by_question:
            return [[context] for context in drawn]
        questions = len(self.ids) // self.personas
        return [[p * questions + q for p in range(self.personas)] for q in drawn]

    def taken(self, steps: int) -> list[int]:
        """The contexts that any of the first `steps` steps takes, each once."""
        return sorted({c for step in range(1, steps + 1) for group in self.groups(step) for c in group})

    def join(self, batch: Batch, step: int, pack_tokens: int, rank: int, size: int) -> Batch:
        """The batch with this rank's share of the step's contexts; a step that is skipped has none."""
        if not batch.supervised:
            return batch
        groups = self.groups(step)
        lengths = [sum(len(self.ids[c]) for c in group) for group in groups]
        count, tokens = sum(map(len, groups)), sum(lengths)
        held = self.count_held(c for group in groups for c in group)
        parts = [batch.supervised / count, batch.supervised / held]
        per_context, per_token = torch.tensor(parts, dtype=torch.float64)
        own = balance(lengths, size)[rank]
        packs: list[Pack] = []
        for share in filter(None, assign_to_packs([lengths[i] for i in own], pack_tokens)):
            pack = self.pack([c for i in share for c in groups[own[i]]])
            targets = pack.targets if self.responses else torch.zeros_like(pack.ids)
            pack = replace(pack, targets=targets, together=self.together)
            packs.append(ContextPack(**vars(pack), per_context=per_context, per_token=per_token))
        return replace(batch, packs=[*batch.packs, *packs], context_tokens=tokens)

    def count_held(self, contexts: Iterable[int]) -> int:
        """How many tokens of these contexts have predictions that are held."""
        return sum(int(self.responses[c].sum()) if self.responses else len(self.ids[c]) for c in contexts)

    def held(self, pack: Pack) -> Tensor:
        """(n,) the rows of its stream at which predictions are held: those that predict a response, or all."""
        return pack.supervised if self.responses else torch.arange(pack.tokens, device=pack.ids.device)

    def pack(self, contexts: Sequence[int]) -> Pack:
        """These contexts, in this order."""
        responses = [self.responses[c] for c in contexts] if self.responses else None
        return make_pack([self.ids[c] for c in contexts], responses, documents=contexts)


@dataclass(frozen=True, eq=False)
class Anchored(ABC):
    """An `Objective`: cross-entropy of packs of rows, the anchor of packs of contexts. Its file defines the anchor."""

    weight: float | Tensor  # w
    contexts: Contexts
    likelihood: float = field(default=1.0, kw_only=True)  # factor of the cross-entropy
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "anchor")
    copies: ClassVar[int] = 1

    def __call__(self, model: Qwen2, pack: Pack, forward: ForwardPass) -> tuple[Tensor, Tensor]:
        if isinstance(pack, ContextPack):
            anchor = self.anchor(model, pack.to(model.device), forward)
            loss = self.weight * anchor
            return loss, torch.stack([loss, torch.zeros_like(loss), anchor]).detach()
        loss, terms = CrossEntropy()(model, pack, forward)
        loss = self.likelihood * loss
        return loss, torch.cat([loss.detach().view(1), terms[1:], terms.new_zeros(1)])

    @abstractmethod
    def anchor(self, model: Qwen2, pack: ContextPack, forward: ForwardPass) -> Tensor:
        """What this pack, which is on the model's device, adds to N a: (), differentiable."""


def last_states(
    model: Qwen2, pack: Pack, layers: Iterable[int], checkpoint_activations: bool = False
) -> dict[int, Tensor]:
    """layer -> (S, D): the stream that leaves it at each document's last token. Later blocks are not computed."""
    found: dict[int, Tensor] = {}
    rows, stop = pack.last, max(layers := list(layers))

    def recorder(layer: int) -> Tap:
        def record(h: Tensor) -> Tensor:
            found[layer] = h if layer == stop else h[rows]  # only these rows leave the last block
            return h

        return record

    model(
        pack, taps={layer: recorder(layer) for layer in layers}, stop_after=stop, last_rows=rows,
        checkpoint_activations=checkpoint_activations,
    )  # fmt: skip
    return found


@torch.no_grad()
def base_states(
    model: Qwen2, contexts: Contexts, layers: Sequence[int], steps: int, pack_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, Tensor]:  # fmt: skip
    """layer -> (P * Q, D) in the stream's precision: `last_states` of the base at the contexts that a run takes.

    model     the base: nothing is attached to it, or the adapters add nothing
    steps     of the run; contexts that none of them takes are not computed, and are NaN
    progress  called with the number of contexts that are done
    """
    shape = len(contexts.ids), model.config.hidden_size
    states = {layer: torch.full(shape, torch.nan, dtype=model.compute_dtype, device=model.device) for layer in layers}
    for pack in _packs(contexts, steps, pack_tokens, progress):
        for layer, h in last_states(model, pack := pack.to(model.device), layers).items():
            states[layer][pack.documents] = h
    return states


@torch.no_grad()
def predicting_states(
    model: Qwen2, contexts: Contexts, steps: int, pack_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> PredictingStates:  # fmt: skip
    """The base's at the contexts that a run takes: at all tokens, or, of responses, at those that predict them.

    The arguments are those of `base_states`. For the 7B, 6,000 responses of 64 tokens are 2.8 GB.
    """
    shape = contexts.count_held(contexts.taken(steps)), model.config.hidden_size
    states = torch.empty(shape, dtype=model.compute_dtype, device=model.device)
    first, done = torch.zeros(len(contexts.ids), dtype=torch.int64), 0
    for pack in _packs(contexts, steps, pack_tokens, progress):
        rows = contexts.held(pack)
        before = torch.searchsorted(rows, pack.boundaries[:-1].long())  # of each document: the rows before it
        first[pack.documents] = done + before - pack.positions[rows[before]]
        end = done + len(rows)
        states[done:end] = model(pack.to(model.device), last_rows=send(rows, model.device))
        done = end
    return PredictingStates(states, first.to(model.device))


def _packs(contexts: Contexts, steps: int, pack_tokens: int, progress: Callable[[int], None]) -> Iterator[Pack]:
    """The contexts that a run takes, those of similar lengths together."""
    by_length = sorted(contexts.taken(steps), key=lambda c: len(contexts.ids[c]))
    done = 0
    for part in split([len(contexts.ids[c]) for c in by_length], pack_tokens):
        yield contexts.pack([by_length[i] for i in part])
        done += len(part)
        progress(done)


def wide(h: Tensor) -> Tensor:
    """h in fp32 or better."""
    return h.to(torch.promote_types(h.dtype, torch.float32))
