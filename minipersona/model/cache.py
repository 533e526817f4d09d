"""The key-value cache: keys and values of the tokens computed so far, and three ways to use it.

B = slots, L = tokens that a slot has room for, S = documents, T = tokens in the pack, K = key heads, d = their channels

Filling computes documents from their beginning and keeps their keys and values; Continuing computes what follows a kept
prefix, any number of documents a slot; Stepping computes one further token of every slot. Each is a scope
(`attention.py`), so the network itself does not depend on the cache. For inference: no gradient flows through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.acceleration.token_attention import newest_token
from minipersona.model.attention import Spans, attention, has_flash
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack


class Cache:
    """Keys and values of every block up to `blocks`, (B, L, K, d) each, in the precision of the model's stream."""

    def __init__(self, model: Qwen2, slots: int, length: int, blocks: int | None = None) -> None:
        config = model.config
        shape = (slots, length, config.num_key_value_heads, config.head_dim)

        def empty() -> list[Tensor]:
            # Zeros, because a masked score is multiplied with the value there, and 0 times NaN is NaN.
            return [
                torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
                for _ in range(config.num_hidden_layers if blocks is None else blocks)
            ]

        self.slots, self.length, self.fused = slots, length, model.fused
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.keys, self.values = empty(), empty()

    @staticmethod
    def slot_bytes(model: Qwen2, length: int) -> int:
        """The memory of a slot of that many tokens."""
        config = model.config
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * length * width * model.compute_dtype.itemsize

    def filling(self, pack: Pack, slots: Tensor) -> list[Filling]:
        """Scopes for a pack of S documents that are computed from their beginning, kept in `slots` (S,) int64."""
        documents = Spans(pack.boundaries, pack.longest)
        of_token = slots.repeat_interleave(pack.boundaries.diff())  # (T,)
        return [Filling(documents, k, v, of_token, pack.positions) for k, v in zip(self.keys, self.values, strict=True)]

    def continuing(self, pack: Pack, slots: Tensor, prefixes: Tensor, longest_prefix: int) -> list[Continuing]:
        """Scopes for documents of which a prefix is kept.

        slots (S,) int64: where each document's prefix lies; prefixes (S,) int64: its tokens, at most `longest_prefix`
        """
        own = pack.boundaries.diff().long()  # (S,)
        whole = prefixes + own
        ends = whole.cumsum(0)
        total = self.length * self.slots  # rows of the cache; the pack's own keys are laid behind them
        document = torch.repeat_interleave(torch.arange(len(own), device=own.device), whole)  # (T',)
        offset = torch.arange(len(document), device=own.device) - (ends - whole)[document]  # (T',) within the document
        kept = slots[document] * self.length + offset
        new = total + pack.boundaries[:-1].long()[document] + offset - prefixes[document]
        rows = torch.where(offset < prefixes[document], kept, new)
        keys = Spans(F.pad(ends, (1, 0)).int(), pack.longest + longest_prefix)
        queries = Spans(pack.boundaries, pack.longest)
        return [Continuing(queries, keys, k, v, rows) for k, v in zip(self.keys, self.values, strict=True)]

    def stepping(self, lengths: Tensor, window: int) -> list[Stepping]:
        """Scopes for one token a slot. lengths (B,) int64 include that token and do not exceed `window`."""
        each = torch.arange(self.slots + 1, device=lengths.device, dtype=torch.int32)
        edges = each * self.group, each * self.length
        used = lengths.int()
        return [
            Stepping(k, v, lengths, window, self.fused, used, *edges)
            for k, v in zip(self.keys, self.values, strict=True)
        ]


@dataclass(frozen=True)
class Filling:
    """Documents from their beginning; their keys and values are kept."""

    documents: Spans
    keys: Tensor  # (B, L, K, d)
    values: Tensor
    slots: Tensor  # (T,)
    positions: Tensor  # (T,)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d); k, v (T, K, d) -> (T, H, d)."""
        self.keys[self.slots, self.positions] = k
        self.values[self.slots, self.positions] = v
        return attention(q, k, v, self.documents, self.documents)


@dataclass(frozen=True)
class Continuing:
    """Documents after their prefixes. With grouped queries keys are narrow, so laying them out anew costs little."""

    queries: Spans
    documents: Spans
    keys: Tensor  # (B, L, K, d)
    values: Tensor
    rows: Tensor  # (T',) of the cache's B * L rows and, behind them, the pack's T

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d); k, v (T, K, d) -> (T, H, d)."""
        all_keys = torch.cat([self.keys.flatten(0, 1), k])[self.rows]  # (T', K, d)
        all_values = torch.cat([self.values.flatten(0, 1), v])[self.rows]
        return attention(q, all_keys, all_values, self.queries, self.documents)


@dataclass(frozen=True)
class Stepping:
    """One token a slot: T = B. The portable back end reads `window` tokens of each slot; flash reads what is filled."""

    keys: Tensor  # (B, L, K, d)
    values: Tensor
    lengths: Tensor  # (B,)
    window: int
    fused: bool  # False: never the flash kernel
    used: Tensor  # (B,) int32: lengths
    query_edges: Tensor  # (B+1,) int32: where each slot's H / K queries begin
    slot_edges: Tensor  # (B+1,) int32: where each slot's keys begin

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, d); k, v (B, K, d) -> (B, H, d)."""
        slots = torch.arange(q.shape[0], device=q.device)
        self.keys[slots, self.lengths - 1] = k
        self.values[slots, self.lengths - 1] = v
        if self.fused and has_flash(q):
            return newest_token(q, self.keys, self.values, self.used, self.query_edges, self.slot_edges)
        # The query heads of a group read the same keys: laid out as rows of one product, the keys are read once.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, H / K, d)
        keys = self.keys[:, : self.window].transpose(1, 2)  # (B, K, window, d)
        values = self.values[:, : self.window].transpose(1, 2)
        seen = torch.arange(self.window, device=q.device) < self.lengths[:, None]  # (B, window)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None])
        return out.flatten(1, 2)
