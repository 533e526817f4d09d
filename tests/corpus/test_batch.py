"""Row order, balanced shares and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.corpus.batch import RowOrder, assign_to_packs, balance


@pytest.mark.parametrize("seed", [42, 0, 7])
def test_row_order_is_the_registered_permutation(seed: int) -> None:
    order = RowOrder(6000, 16, seed)
    expected = np.random.Generator(np.random.PCG64(seed)).permutation(6000)
    assert [row for step in range(1, 376) for row in order.step(step)] == expected.tolist()


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_row_order_needs_no_history(rows: int, batch: int, seed: int, step: int) -> None:
    walked = RowOrder(rows, batch, seed)
    steps = [walked.step(k) for k in range(1, step + 1)]
    assert RowOrder(rows, batch, seed).step(step) == steps[-1]
    flat = [row for s in steps for row in s]
    for epoch in range(len(flat) // rows):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 5))
def test_balanced_shares_hold_each_item_once_and_are_even(lengths: list[int], ranks: int) -> None:
    shares = balance(lengths, ranks)
    assert sorted(item for share in shares for item in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 700), st.integers(1, 5))
def test_packs_keep_the_bound_and_are_even(lengths: list[int], most: int, at_least: int) -> None:
    packs = assign_to_packs(lengths, most, at_least)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert len(packs) >= at_least
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(len(pack) < 2 or load <= most for pack, load in zip(packs, loads, strict=True))
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_step_just_above_the_bound_is_cut_in_halves() -> None:
    assert assign_to_packs([1000, 1000, 1000, 1000, 1000, 200], 5000) == [[0, 2, 4], [1, 3, 5]]
    assert assign_to_packs([1000, 1000, 1000, 1000, 1000], 5000) == [[0, 1, 2, 3, 4]]
