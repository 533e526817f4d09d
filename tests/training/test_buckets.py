"""Every pack fits its bucket, little is added, and the padding is documents like any others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipersona.chat import Document
from minipersona.corpus.batch import pack_documents
from minipersona.model.pack import IGNORE, Pack
from minipersona.training.buckets import bucket_of, pad


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    """Up to 40 documents of up to 3,000 tokens, of which some are supervised from anywhere to the end."""
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from([8, 300, 3000]))), min_size=1, max_size=40))
    begins = [draw(st.integers(0, length)) for length in lengths]
    return pack_documents(
        [
            Document(np.full(n, 7, dtype=np.int32), np.arange(n) >= max(1, begin), False)
            for n, begin in zip(lengths, begins, strict=True)
        ],
        range(100, 100 + len(lengths)),
    )


@given(packs())
def test_a_padded_pack_has_the_sizes_of_its_bucket_and_begins_with_the_pack(pack: Pack) -> None:
    bucket = bucket_of(pack)
    padded = pad(pack, bucket)
    lengths = padded.boundaries.diff()
    assert padded.tokens == len(padded.positions) == len(padded.targets) == bucket.tokens == padded.boundaries[-1]
    assert len(padded.documents) == len(lengths) == bucket.documents > len(pack.documents)
    assert len(padded.supervised) == bucket.supervised and padded.longest == bucket.longest
    assert lengths.min() > 0 and lengths.max() <= bucket.longest  # what the attention kernel is told
    for name in ("ids", "positions", "targets", "supervised", "boundaries", "documents"):
        ours, theirs = getattr(padded, name), getattr(pack, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours[: len(theirs)], theirs)


@given(packs())
def test_padding_teaches_nothing(pack: Pack) -> None:
    padded = pad(pack, bucket_of(pack))
    assert (padded.targets[pack.tokens :] == IGNORE).all()
    further = padded.supervised[len(pack.supervised) :]
    assert ((pack.tokens <= further) & (further < padded.tokens)).all()
    starts = torch.repeat_interleave(padded.boundaries[:-1].long(), padded.boundaries.diff().long())
    assert torch.equal(padded.positions, torch.arange(padded.tokens) - starts)


@given(packs())
def test_little_is_added(pack: Pack) -> None:
    bucket = bucket_of(pack)
    assert bucket.documents <= len(pack.documents) + 8
    assert pack.tokens < bucket.tokens < pack.tokens + 512 + 8
    assert bucket.supervised < max(1, len(pack.supervised)) + bucket.tokens // 4
    assert bucket.longest == 1024 or bucket.longest < 2 * max(pack.longest, bucket.tokens - pack.tokens)


@given(packs(), st.integers(1, 16))
def test_documents_that_are_compared_stay_in_whole_groups(pack: Pack, together: int) -> None:
    documents = together * len(pack.documents)  # only their number is read
    groups = replace(pack, documents=pack.documents.repeat(together), together=together)
    bucket = bucket_of(groups)
    assert bucket.documents % together == 0 and documents < bucket.documents <= documents + 8 * together


def test_few_buckets_serve_a_run() -> None:
    """375 steps of sixteen rows, whose lengths are log-normal with a median of 144 tokens, as those of real chats."""
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(375):
        lengths = np.clip(np.exp(rng.normal(np.log(144), 0.8, 16)).astype(int), 32, 2048)
        rows = [Document(np.zeros(n, dtype=np.int32), np.arange(n) >= max(1, n // 3), False) for n in lengths]
        found.add(bucket_of(pack_documents(rows)))
    assert len(found) <= 32
