"""Documents into packs: which rank takes which, and which share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.chat import Document
from minipersona.model.pack import Pack, make_pack


def pack_documents(documents: Sequence[Document], identities: Sequence[int] | None = None) -> Pack:
    """One pack of the given documents, in their order."""
    return make_pack([d.ids for d in documents], [d.supervised for d in documents], identities)


def share_out(lengths: Sequence[int], most_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Deal items to the fewest packs of at most `most_tokens`, as evenly as `deal` does; a longer item stands alone.

    Even packs, since a step of 5,200 tokens in packs of 5,000 and 200 keeps the device waiting for its host. There are
    `at_least` packs, of which some are empty where there are fewer items than that.
    """
    packs = max(at_least, -(-sum(lengths) // most_tokens))
    while True:
        hands = deal(lengths, packs)
        if all(len(hand) < 2 or sum(lengths[i] for i in hand) <= most_tokens for hand in hands):
            return hands
        packs += 1


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Spread items over ranks so that the tokens are as even as the longest-first rule makes them.

    Deterministic; each rank's items come back in their original order.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        hands[rank].append(item)
        loads[rank] += lengths[item]
    return [sorted(hand) for hand in hands]
