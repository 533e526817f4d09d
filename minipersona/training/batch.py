"""A step's documents, dealt to the ranks and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipersona.chat import Document
from minipersona.corpus.packing import deal, pack_documents, share_out
from minipersona.model.pack import Pack, make_pack
from minipersona.training.distributed import Distributed


@dataclass(frozen=True)
class Batch:
    """A step's documents. Rows that teach nothing are left out."""

    rows: list[int]  # of the whole step, on every rank
    tokens: int  # likewise
    supervised: int  # likewise
    packs: list[Pack]  # of this rank


def make_batch(
    documents: Sequence[Document],
    rows: Sequence[int],
    pack_tokens: int,
    distributed: Distributed,
    sharded: bool = False,
) -> Batch:
    """Deal a step's rows to the ranks, and pack this rank's share. Sharded ranks all get the same number of packs."""
    useful = [row for row in rows if documents[row].supervised.any()]
    lengths = [len(documents[row]) for row in useful]
    hands = [[useful[i] for i in hand] for hand in deal(lengths, distributed.size)]
    packs = make_packs(documents, hands[distributed.rank], pack_tokens)
    if sharded and useful:
        most = max(len(share_out([len(documents[row]) for row in hand], pack_tokens)) for hand in hands)
        packs = make_packs(documents, hands[distributed.rank], pack_tokens, most)
        packs += [_idle(documents[useful[0]])] * (most - len(packs))
    supervised = sum(int(documents[row].supervised.sum()) for row in useful)
    return Batch(useful, sum(lengths), supervised, packs)


def make_packs(documents: Sequence[Document], rows: Sequence[int], pack_tokens: int, at_least: int = 1) -> list[Pack]:
    """The packs of some rows, none of them empty; a document's identity is its row."""
    return [
        pack_documents([documents[rows[i]] for i in group], [rows[i] for i in group])
        for group in share_out([len(documents[row]) for row in rows], pack_tokens, at_least)
        if group
    ]


def _idle(document: Document) -> Pack:
    """A few tokens that teach nothing: for a rank that has no documents left while others still go over theirs."""
    return make_pack([document.ids[:8]])
