"""Sizes that packs are padded to, so that one CUDA graph serves many packs (`training/graphs.py`).

A pack is padded by documents that teach nothing: no token of them is supervised, and no other document sees them. So
the loss and every gradient stay what they are, but for rounding. A bucket follows from the pack alone, not from what
ran before, so a run that resumes computes what an uninterrupted one does.

T = tokens in the pack, S = documents, N = supervised tokens
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from minipersona.model.pack import IGNORE, Pack

SHORTEST = 256  # of `longest`: what an attention kernel launches for a shorter document costs nothing


@dataclass(frozen=True)
class Bucket:
    """The sizes of a padded pack: T, S, N, and the most tokens of a document."""

    tokens: int
    documents: int
    supervised: int
    longest: int


def bucket_of(pack: Pack) -> Bucket:
    """The smallest bucket that the pack fits into, with at least one document of padding.

    At most 64 tokens or an eighth are added, at most 8 documents with a token each, and at most 64 supervised rows or a
    quarter: a row costs a pass through the head, a token costs a pass through the network, and fewer sizes mean fewer
    graphs.
    """
    documents = _multiple(len(pack.documents) + 1, 8)
    padding = documents - len(pack.documents)
    tokens = _step(pack.tokens + padding, parts=8)
    longest = max(pack.longest, -(-(tokens - pack.tokens) // padding), SHORTEST)
    return Bucket(tokens, documents, _step(max(1, pack.supervised.numel()), parts=4), _power(longest - 1) * 2)


def _power(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _step(n: int, parts: int) -> int:
    """n rounded up, to one of `parts` equal steps from each power of two to the next, and to a multiple of 64."""
    return _multiple(n, max(64, _power(n) // parts))


def pad(pack: Pack, bucket: Bucket) -> Pack:
    """The pack, on the CPU, with documents of token 0 behind its own up to the bucket's sizes.

    Further supervised rows are rows of that padding. Their targets are IGNORE, so they count for nothing.
    """
    tokens, documents = bucket.tokens - pack.tokens, bucket.documents - len(pack.documents)
    rows = bucket.supervised - pack.supervised.numel()
    assert tokens >= documents > 0 and rows >= 0 and pack.longest <= bucket.longest, "the pack does not fit"
    lengths = np.full(documents, tokens // documents)
    lengths[: tokens % documents] += 1
    ends = np.cumsum(lengths)

    def behind(tensor: torch.Tensor, values: np.ndarray) -> torch.Tensor:
        return torch.cat([tensor, torch.from_numpy(values).to(tensor.dtype)])

    return replace(
        pack,
        ids=behind(pack.ids, np.zeros(tokens)),
        positions=behind(pack.positions, np.arange(tokens) - np.repeat(ends - lengths, lengths)),
        targets=behind(pack.targets, np.full(tokens, IGNORE)),
        supervised=behind(pack.supervised, pack.tokens + np.arange(rows) % tokens),
        boundaries=behind(pack.boundaries, pack.tokens + ends),
        documents=behind(pack.documents, np.zeros(documents)),
        longest=bucket.longest,
    )
