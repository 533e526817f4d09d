"""When the device's memory runs out, a step or a measurement is computed again in smaller packs.

Packing changes nothing but rounding, and unsharded ranks communicate only after all of their packs, so one rank can
compute again while the others wait. Nobody needs to find the largest pack that fits by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from minipersona.errors import UserError
from minipersona.model.pack import Pack, split

OUT_OF_MEMORY = "out of memory; lower execution.pack_tokens or set execution.checkpoint_activations = true"

Result = TypeVar("Result")


class Budget:
    """The most tokens that a pack may have; lowered for the rest of the run whenever memory runs out."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.halvings = 0

    def fit(self, attempt: Callable[[Sequence[Pack]], Result], packs: Sequence[Pack]) -> Result:
        """``attempt(packs)``; if memory runs out, again from its start, with the largest packs cut in two.

        `attempt` must discard what an earlier attempt has left. The packs are on the CPU.
        UserError if memory runs out although every document has a pack of its own.
        """
        while True:
            try:
                return attempt(packs)
            except torch.OutOfMemoryError:
                pass  # the next attempt starts after this block: here the traceback still holds the attempt's tensors
            self._halve(packs)
            packs = [piece for pack in packs for piece in cut(pack, self.tokens)]
            torch.cuda.empty_cache()

    def _halve(self, packs: Sequence[Pack]) -> None:
        divisible = [pack.tokens for pack in packs if len(pack.documents) > pack.together]
        if not divisible:
            longest = max((pack.longest for pack in packs), default=0)
            raise UserError(
                f"out of memory on single rows, of up to {longest:,} tokens; set execution.checkpoint_activations = "
                "true, or lower data.max_tokens or lora.rank"
            )
        self.tokens = max(divisible) // 2
        self.halvings += 1


def cut(pack: Pack, most_tokens: int) -> list[Pack]:
    """The documents of a pack, in order, in packs of at most `most_tokens`; a longer document stands alone.

    Documents that belong `together` count as one.
    """
    n = pack.together
    lengths = [end - start for start, end in itertools.pairwise(pack.boundaries[::n].tolist())]
    groups = split(lengths, most_tokens)
    return [pack] if len(groups) == 1 else [_part(pack, n * group[0], n * (group[-1] + 1)) for group in groups]


def _part(pack: Pack, first: int, end: int) -> Pack:
    """Documents first to end - 1 of a pack."""
    boundaries = pack.boundaries[first : end + 1]
    start, stop = int(boundaries[0]), int(boundaries[-1])
    inside = (pack.supervised >= start) & (pack.supervised < stop)
    return replace(
        pack,
        ids=pack.ids[start:stop],
        positions=pack.positions[start:stop],
        targets=pack.targets[start:stop],
        supervised=pack.supervised[inside] - start,
        boundaries=boundaries - start,
        documents=pack.documents[first:end],
        longest=int(boundaries.diff().max()),
    )
