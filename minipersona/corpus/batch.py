"""From documents to what a rank computes in a step: the row order, the assignment to ranks, and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipersona.chat import Document
from minipersona.model.pack import Pack, make_pack


class RowOrder:
    """The rows of each step, from a seeded permutation an epoch. A seed is a number or several.

    Step k (from 1) takes the entries (k-1) * batch to k * batch of the permutations laid end to end. The first one is
    ``numpy.random.Generator(PCG64(seed)).permutation(rows)``; later ones continue the generator. A pure function of
    (rows, batch, seed, step), so a run that resumes needs to know only its step.
    """

    def __init__(self, rows: int, batch: int, seed: int | Sequence[int]) -> None:
        assert rows > 0 and batch > 0
        self.rows, self.batch = rows, batch
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._epochs: list[np.ndarray] = []

    def step(self, step: int) -> list[int]:
        """The row indices of a step, in order."""
        first = (step - 1) * self.batch
        return [self._row(k) for k in range(first, first + self.batch)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        while len(self._epochs) <= epoch:
            self._epochs.append(self._generator.permutation(self.rows))
        return int(self._epochs[epoch][offset])


@dataclass(frozen=True)
class Batch:
    """The documents of a step. Rows without a supervised token are left out."""

    rows: list[int]  # of the whole step, the same on every rank
    tokens: int  # likewise
    supervised: int  # tokens, likewise
    packs: list[Pack]  # of this rank
    context_tokens: int = 0  # of the prompts that an anchor adds to the rows, of the whole step


def make_batch(
    documents: Sequence[Document], rows: Sequence[int], pack_tokens: int, rank: int, size: int, sharded: bool = False
) -> Batch:
    """Assign the rows of a step to `size` ranks and pack those of `rank`.

    pack_tokens  the most tokens of a pack
    sharded      every rank gets the same number of packs, since ranks go through a sharded model together
    """
    useful = [row for row in rows if documents[row].supervised.any()]
    lengths = [len(documents[row]) for row in useful]
    shares = [[useful[i] for i in share] for share in balance(lengths, size)]
    packs = make_packs(documents, shares[rank], pack_tokens)
    if sharded and useful:
        most = max(len(assign_to_packs([len(documents[row]) for row in share], pack_tokens)) for share in shares)
        packs = make_packs(documents, shares[rank], pack_tokens, most)
        # A rank with fewer documents than that goes through the model with a few tokens that teach nothing.
        packs += [make_pack([documents[useful[0]].ids[:8]])] * (most - len(packs))
    supervised = sum(int(documents[row].supervised.sum()) for row in useful)
    return Batch(useful, sum(lengths), supervised, packs)


def make_packs(documents: Sequence[Document], rows: Sequence[int], pack_tokens: int, at_least: int = 1) -> list[Pack]:
    """The packs of some rows, none of them empty; a document's identity is its row."""
    return [
        pack_documents([documents[rows[i]] for i in group], [rows[i] for i in group])
        for group in assign_to_packs([len(documents[row]) for row in rows], pack_tokens, at_least)
        if group
    ]


def pack_documents(documents: Sequence[Document], identities: Sequence[int] | None = None) -> Pack:
    """One pack of the given documents, in their order."""
    return make_pack([d.ids for d in documents], [d.supervised for d in documents], identities)


def assign_to_packs(lengths: Sequence[int], most_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Assign items to the fewest packs that `balance` keeps at or below `most_tokens`; a longer item stands alone.

    Packs are of even size because a step of 5,200 tokens in packs of 5,000 and 200 keeps the device waiting for its
    host. There are `at_least` packs, of which some are empty if there are fewer items.
    """
    count = max(at_least, -(-sum(lengths) // most_tokens))
    while True:
        packs = balance(lengths, count)
        if all(len(pack) < 2 or sum(lengths[i] for i in pack) <= most_tokens for pack in packs):
            return packs
        count += 1


def balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Assign items to `count` shares of about equal total length: the longest first, each to the smallest share so far.

    Deterministic; the items of a share are in their original order.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        smallest = min(range(count), key=lambda share: (totals[share], share))
        shares[smallest].append(item)
        totals[smallest] += lengths[item]
    return [sorted(share) for share in shares]
