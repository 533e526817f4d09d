"""Generation: prompts are computed in packs, then every slot takes a token a step; a slot that is done takes the next.

B = slots, L = tokens of a slot, N = most new tokens of a request, V = vocabulary

What is generated depends on the request alone: a request brings its own seed, and a token never sees another request.
Rounding aside: on CUDA the products of a bf16 model depend on how many rows they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipersona.config import LARGE_PASS
from minipersona.model.cache import Cache
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack, make_pack, split

STRIDE = 8  # token steps between two reads from the device; a finished row waits for fewer than that
WINDOW = 128  # tokens by which the attended part of the cache grows, where attending to all of it would cost time


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    ids          (n,) tokens of the prompt
    temperature  0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature)
    top_p        draw among the likeliest tokens that together have this probability (Holtzman et al. 2020)
    seed         of the request's own stream of uniforms, one a token
    """

    ids: np.ndarray
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert len(self.ids) and self.max_new_tokens >= 1, "a request has a prompt and asks for a token at least"
        assert self.temperature >= 0 and 0 < self.top_p <= 1, "temperature is at least 0, top_p in (0, 1]"


@dataclass(frozen=True)
class Completion:
    """What was generated: ids (m,), without the stop token. `stopped` is false where max_new_tokens cut it."""

    ids: np.ndarray
    stopped: bool


@torch.no_grad()
def generate(
    model: Qwen2,
    requests: Sequence[Request],
    *,
    stop: Sequence[int],
    batch: int = 256,
    on_done: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Complete every request; the completions come in the order of the requests.

    stop      token ids that end a completion
    batch     requests in flight at once; fewer where the device has no room for the keys and values of so many
    on_done   called with (index, completion) as each finishes, in any order
    """
    if not requests:
        return []
    # Long ones first: the last to finish decide when all is done.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids) - requests[i].max_new_tokens)
    waiting = deque(order)
    slots = Slots(model, requests, min(batch, len(requests)), stop)
    completions: dict[int, Completion] = {}
    while waiting or slots.busy:
        if waiting and slots.free:
            slots.admit([waiting.popleft() for _ in range(min(len(waiting), len(slots.free)))])
        slots.advance()
        for index, completion in slots.collect():
            completions[index] = completion
            if on_done is not None:
                on_done(index, completion)
    return [completions[i] for i in range(len(requests))]


class Slots:
    """The requests in flight, on the device: what a token step reads and writes."""

    def __init__(self, model: Qwen2, requests: Sequence[Request], slots: int, stop: Sequence[int]) -> None:
        self.model, self.requests, self.stop = model, requests, set(stop)
        self.replays = model.fused and model.device.type == "cuda"  # the token step, as a CUDA graph
        most_new = max(request.max_new_tokens for request in requests)
        room = max(len(request.ids) + request.max_new_tokens for request in requests) + STRIDE
        room = -(-room // WINDOW) * WINDOW
        slots = min(slots, room_for(model, room))
        self.cache = Cache(model, slots, room)
        self.occupant: list[int | None] = [None] * slots  # which request a slot holds
        self.filled = [0] * slots  # tokens of it in the cache or about to be; as `lengths`, known to the host
        self.seen = [0] * slots  # new tokens of it that were read from the device
        self.draws = any(request.temperature > 0 for request in requests)
        self.nucleus = any(request.top_p < 1 for request in requests)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.last = zeros(slots)  # the newest token
        self.lengths = zeros(slots) + 1  # tokens up to and including the newest
        self.produced = zeros(slots)  # how many of them are new
        self.output = zeros(slots, most_new + STRIDE)
        self.uniforms = zeros(slots, most_new + STRIDE, dtype=torch.float32)
        self.temperature = zeros(slots, dtype=torch.float32)
        self.top_p = zeros(slots, dtype=torch.float32) + 1
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def free(self) -> list[int]:
        """Slots without a request."""
        return [slot for slot, index in enumerate(self.occupant) if index is None]

    @property
    def busy(self) -> bool:
        """Whether any slot has a request."""
        return any(index is not None for index in self.occupant)

    def admit(self, indices: Sequence[int]) -> None:
        """Compute the prompts of these requests into free slots, and choose their first tokens."""
        free = self.free
        for group in split([len(self.requests[i].ids) for i in indices], LARGE_PASS):
            chosen = [indices[g] for g in group]
            slots = [free[g] for g in group]
            for slot, index in zip(slots, chosen, strict=True):
                self._seat(slot, index)
            pack = make_pack([self.requests[i].ids for i in chosen]).to(self.model.device)
            places = torch.tensor(slots, device=self.model.device)
            hidden = self.model(pack, scopes=self.cache.filling(pack, places))[pack.last]  # (S, D)
            self._append(places, self._choose(hidden, places))

    def _seat(self, slot: int, index: int) -> None:
        request = self.requests[index]
        self.occupant[slot], self.filled[slot], self.seen[slot] = index, len(request.ids) + 1, 0
        self.lengths[slot] = len(request.ids)
        self.produced[slot] = 0
        self.temperature[slot], self.top_p[slot] = request.temperature, request.top_p
        if request.temperature > 0:
            uniforms = np.random.Generator(np.random.PCG64(request.seed)).random(request.max_new_tokens)
            self.uniforms[slot, : len(uniforms)] = torch.from_numpy(uniforms.astype(np.float32)).to(self.model.device)

    def advance(self) -> None:
        """STRIDE token steps of every slot. Rows that finish earlier go on into spare room; that is not read."""
        for _ in range(STRIDE):
            if self.replays:
                self._replay()
            else:
                longest = max(n for n, index in zip(self.filled, self.occupant, strict=True) if index is not None)
                self._step(min(-(-longest // WINDOW) * WINDOW, self.cache.length))
            self.filled = [min(n + 1, self.cache.length) for n in self.filled]

    def _step(self, window: int) -> None:
        """One token more in every slot; only tensors are read and written, so that a CUDA graph can replay it."""
        lengths = self.lengths.clamp(max=window)  # an empty slot's may lie anywhere
        slots = torch.arange(len(self.occupant), device=self.model.device)
        one_each = torch.arange(len(self.occupant) + 1, device=self.model.device, dtype=torch.int32)
        pack = Pack(self.last, lengths - 1, self.last, self.last, one_each, slots, 1)  # no targets: nothing learns
        hidden = self.model(pack, scopes=self.cache.stepping(lengths, window), weights_unchanged=True)  # (B, D)
        self._append(slots, self._choose(hidden, slots))

    def _replay(self) -> None:
        """`_step` as a CUDA graph, over the whole cache: the flash kernel reads no further than a slot is filled."""
        if self.graph is None:
            state = (self.last, self.lengths, self.produced)
            before = [x.clone() for x in state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles, and lets libraries allocate their memory outside of the graph
                self._step(self.cache.length)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step(self.cache.length)
            for x, old in zip(state, before, strict=True):  # what else that step wrote is written again
                x.copy_(old)
        self.graph.replay()

    def _append(self, slots: Tensor, tokens: Tensor) -> None:
        """Take `tokens` (S,) as the newest of `slots` (S,)."""
        place = self.produced[slots].clamp(max=self.output.shape[1] - 1)
        self.output[slots, place] = tokens
        self.last[slots] = tokens
        self.produced[slots] += 1
        self.lengths[slots] += 1

    def _choose(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """hidden (S, D) -> the next token of each slot, (S,)."""
        logits = self.model.lm_head(hidden)  # (S, V)
        if not self.draws:
            return logits.argmax(-1)
        logits = logits.float()
        place = self.produced[slots].clamp(max=self.uniforms.shape[1] - 1)
        drawn = draw(logits, self.temperature[slots], self.top_p[slots] if self.nucleus else None,
                     self.uniforms[slots, place])  # fmt: skip
        return torch.where(self.temperature[slots] > 0, drawn, logits.argmax(-1))

    def collect(self) -> Iterator[tuple[int, Completion]]:
        """The requests that have finished, by index; their slots are free again."""
        output = self.output.cpu().numpy()
        for slot, index in enumerate(self.occupant):
            if index is None:
                continue
            limit = self.requests[index].max_new_tokens
            produced = self.filled[slot] - len(self.requests[index].ids)
            tokens = output[slot, : min(produced, limit)]
            ends = [place for place in range(self.seen[slot], len(tokens)) if int(tokens[place]) in self.stop]
            self.seen[slot] = len(tokens)
            if ends or len(tokens) == limit:
                self.occupant[slot] = None
                yield index, Completion(tokens[: ends[0]].copy() if ends else tokens.copy(), bool(ends))


def room_for(model: Qwen2, length: int) -> int:
    """How many slots of that many tokens four fifths of the device's free memory holds; one at least."""
    if model.device.type != "cuda":
        return 2**31
    free = torch.cuda.mem_get_info(model.device)[0]
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, int(0.8 * free) // Cache.slot_bytes(model, length))


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor | None, uniform: Tensor) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution at `uniform` in [0, 1).

    logits (S, V) fp32; temperature, top_p, uniform (S,) -> (S,). With top_p, only the likeliest tokens whose
    predecessors in the order of probability sum to less than top_p can be drawn.
    """
    probabilities = (logits / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
    if top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= top_p[:, None]
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cumulative = probabilities.cumsum(-1)
    below = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
