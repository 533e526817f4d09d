"""Sizes that packs are padded to, so that one CUDA graph serves many packs (`training/graphs.py`).

A pack is padded by documents that teach nothing: no token of them is supervised, and no other document sees them. So
the loss and every gradient stay what they are, but for rounding. A bucket follows from the pack alone, not from what
ran before, so a run that resumes computes what an uninterrupted one does.

T = tokens in the pack, S = documents, N = supervised tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from minipersona.model.pack import IGNORE, Pack

TOKENS = 512  # T is a multiple
DOCUMENTS = 8  # S is a multiple
SHORTEST = 1024  # of `longest`: what an attention kernel launches in vain for shorter documents costs little


@dataclass(frozen=True)
class Bucket:
    """The sizes of a padded pack: T, S, N, and the most tokens of a document."""

    tokens: int
    documents: int
    supervised: int
    longest: int


def bucket_of(pack: Pack) -> Bucket:
    """The smallest bucket that the pack fits into, with at least one document of padding.

    N is a quarter of T, a half, three quarters or all of it. Steps of 16 real chats, of 3,200 tokens in the mean, are
    padded by 9% and come in 28 sizes. Finer ones would save a few percent of a step, but a size that is new takes as
    long as twenty steps.
    """
    of = math.lcm(DOCUMENTS, pack.together)
    documents = _multiple(len(pack.documents) + 1, of)
    padding = documents - len(pack.documents)
    tokens = _multiple(pack.tokens + padding, TOKENS)
    supervised = _multiple(max(1, pack.supervised.numel()), tokens // 4)
    longest = max(pack.longest, -(-(tokens - pack.tokens) // padding), SHORTEST)
    return Bucket(tokens, documents, supervised, 1 << (longest - 1).bit_length())


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def pad(pack: Pack, bucket: Bucket) -> Pack:
    """The pack, on the CPU, with documents of token 0 behind its own up to the bucket's sizes.

    Further supervised rows are rows of that padding. Their targets are IGNORE, so they count for nothing. Padding
    documents get the last document's identity, so that an objective that looks states up by identity finds some.
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
        documents=behind(pack.documents, np.full(documents, int(pack.documents[-1]))),
        longest=bucket.longest,
    )
