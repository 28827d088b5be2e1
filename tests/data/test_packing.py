"""The order of blocks: each once per epoch, O(1), the same for any way of asking."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.data.packing import BlockOrder, shuffle, spread_starts
from smelt.errors import NotEnoughData


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_shuffle_is_a_permutation(size: int, key: int) -> None:
    images = shuffle(np.arange(size, dtype=np.uint64), size, np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@given(num_tokens=st.integers(20, 5000), block_size=st.integers(1, 19), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_visits_disjoint_blocks_inside_the_stream(num_tokens: int, block_size: int, seed: int) -> None:
    order = BlockOrder(num_tokens, block_size, seed)
    for epoch in range(2):
        starts = np.sort(order.starts(epoch * order.num_blocks, order.num_blocks))
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= num_tokens
        assert (np.diff(starts) == block_size).all()


def test_order_does_not_depend_on_how_it_is_asked_for() -> None:
    order = BlockOrder(10_000, 16, seed=3)
    at_once = order.starts(500, 400)
    in_parts = np.concatenate([order.starts(500 + part * 100, 100) for part in range(4)])
    assert (at_once == in_parts).all()


def test_epochs_and_seeds_differ() -> None:
    order = BlockOrder(10_000, 16, seed=3)
    first, second = order.starts(0, 100), order.starts(order.num_blocks, 100)
    other_seed = BlockOrder(10_000, 16, seed=4).starts(0, 100)
    assert (first != second).any()
    assert (first != other_seed).any()
    assert (np.diff(first) != 16).any(), "blocks must not come in the order of the text"


def test_a_far_sample_costs_no_more_than_a_near_one() -> None:
    order = BlockOrder(10**12, 1024, seed=0)
    starts = order.starts(10**15, 8)
    assert ((starts >= 0) & (starts < 10**12)).all()


def test_too_few_tokens_says_how_many_are_needed() -> None:
    with pytest.raises(NotEnoughData, match=r"holds 16 tokens, but one block needs 17"):
        BlockOrder(16, 16, seed=0)
    assert BlockOrder(17, 16, seed=0).starts(0, 3).tolist() == [0, 0, 0]


def test_spread_starts_cover_the_whole_stream_when_there_is_room() -> None:
    assert spread_starts(1001, 100, 1000).tolist() == list(range(0, 1000, 100))
    few = spread_starts(100_001, 100, 5)
    assert len(few) == 5
    assert few[0] == 0
    assert few[-1] == 99_900
    with pytest.raises(NotEnoughData, match="validation split holds 100 tokens"):
        spread_starts(100, 100, 5)
