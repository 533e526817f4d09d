"""The one representation of a batch: a stream of tokens with document boundaries, never padded.

T = tokens in the pack, S = documents, N = supervised tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the target of a position that predicts nothing


@dataclass(frozen=True)
class Pack:
    """Documents end to end. Build one with `make_pack`; move it with `to`.

    ids         (T,) int64    tokens
    positions   (T,) int64    each token's position within its document, from 0 unless it continues a prefix
    targets     (T,) int64    the token that position t is to predict (the next one), IGNORE where none is supervised
    supervised  (N,) int64    the positions that have a target, so that picking them needs no look at the device
    boundaries  (S+1,) int32  document s is ids[boundaries[s]:boundaries[s+1]]
    documents   (S,) int64    each document's identity in its corpus; dropout masks hang on it
    longest     tokens of the longest document
    together    this many consecutive documents are a group; where memory runs out, a pack is cut between groups only
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    supervised: Tensor
    boundaries: Tensor
    documents: Tensor
    longest: int
    together: int = 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.numel()

    @property
    def last(self) -> Tensor:
        """(S,) the stream index of each document's last token."""
        return self.boundaries[1:].long() - 1

    def to(self, device: torch.device | str) -> Self:
        """The same pack on another device, copied without waiting."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: send(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device, copied without waiting: what goes to a GPU goes from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_pack(
    ids: Sequence[np.ndarray],
    supervised: Sequence[np.ndarray] | None = None,
    documents: Sequence[int] | None = None,
    first_positions: Sequence[int] | None = None,
) -> Pack:
    """Lay documents end to end.

    ids         S arrays (n_s,) of tokens, none of them empty
    supervised  S arrays (n_s,) of bool: token t is a target, predicted from token t - 1 of the same document.
                A document's first token has no predecessor and is never a target.
    documents   S identities; 0, 1, ... if not given
    first_positions  S positions of the documents' first tokens, where a prefix of each was computed before; else 0
    """
    lengths = np.array([len(d) for d in ids], dtype=np.int64)
    assert len(lengths) and lengths.min() > 0, "a pack holds at least one document, and none is empty"
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    stream = np.concatenate([np.asarray(d, dtype=np.int64) for d in ids])
    within = np.arange(len(stream)) - np.repeat(boundaries[:-1], lengths)  # from 0 in every document
    positions = within if first_positions is None else within + np.repeat(np.asarray(first_positions), lengths)
    rows = np.empty(0, dtype=np.int64)
    if supervised is not None:
        mask = np.concatenate([np.asarray(m, dtype=bool) for m in supervised])
        assert len(mask) == len(stream), "ids and supervised must have equal lengths"
        rows = np.flatnonzero(mask & (within > 0)) - 1  # token t is predicted at t - 1
    targets = np.full(len(stream), IGNORE, dtype=np.int64)
    targets[rows] = stream[rows + 1]
    return Pack(
        ids=torch.from_numpy(stream),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        supervised=torch.from_numpy(rows),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)),
        documents=torch.tensor(range(len(lengths)) if documents is None else list(documents), dtype=torch.int64),
        longest=int(lengths.max()),
    )


def split(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Cut a sequence of items, in order, into groups of at most `most_tokens`; a longer item stands alone."""
    groups: list[list[int]] = []
    room = 0
    for item, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = most_tokens
        groups[-1].append(item)
        room -= length
    return groups
