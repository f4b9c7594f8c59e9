"""The lists of work cover the causal pairs of every segment, each exactly once, for any pack and any ring."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.parallel.attention import blocks_between
from evovlm.parallel.attention.blocks import check_borders
from evovlm.parallel.sequence import SequenceShards

from ...csrc.prefix_support import PrefixPack, prefix_packs


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[int], SequenceShards]:
    """Borders anywhere, and gladly where chunks end, one row before and one row after."""
    cp, chunk = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    num_rows = 2 * cp * chunk
    near = [row + shift for row in range(0, num_rows, chunk) for shift in (-1, 0, 1) if 0 < row + shift < num_rows]
    inner = draw(st.sets(st.sampled_from(near) | st.integers(1, num_rows - 1))) if near else set()
    return [0, *sorted(inner), num_rows], SequenceShards(num_rows, cp=cp)


def same_segment(borders: list[int], num_rows: int) -> np.ndarray:
    segments = np.searchsorted(borders, np.arange(num_rows), side="right")
    return np.tril(segments[:, None] == segments[None])


def assert_computed_once(
    allowed: np.ndarray,
    borders: list[int],
    shards: SequenceShards,
    prefixes: Sequence[tuple[int, int, int, int]] = (),
) -> None:
    """The blocks of all pairs of ranks hold each (query, key) that is allowed once, and no other."""
    computed = np.zeros((shards.num_rows, shards.num_rows), dtype=int)
    num_pairs = 0
    for query_rank in range(shards.cp):
        for key_rank in range(shards.cp):
            query_rows, key_rows = shards.ring_rows(query_rank), shards.ring_rows(key_rank)
            for block in blocks_between(borders, shards, query_rank, key_rank, prefixes):
                queries, keys = query_rows[block.queries], key_rows[block.keys]
                area = np.ones((len(queries), len(keys)), dtype=int)
                computed[np.ix_(queries, keys)] += np.tril(area) if block.causal else area
                num_pairs += block.num_pairs
    np.testing.assert_array_equal(computed, allowed)
    assert num_pairs == allowed.sum()


@st.composite
def packs_with_prefixes(draw: st.DrawFn) -> tuple[PrefixPack, SequenceShards]:
    """Long prefixes over many chunks, and several small groups within one."""
    cp, chunk = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 3, 7, 20]))
    rows = 2 * cp * chunk
    return draw(prefix_packs(rows, longest=max(3, rows // 2))), SequenceShards(rows, cp=cp)


@given(packs())
def test_every_causal_pair_of_a_segment_is_computed_once_and_no_other(pack: tuple[list[int], SequenceShards]) -> None:
    borders, shards = pack
    assert_computed_once(same_segment(borders, shards.num_rows), borders, shards)


@given(packs_with_prefixes())
def test_every_pair_of_a_prefix_is_computed_once_too(pack: tuple[PrefixPack, SequenceShards]) -> None:
    shared, shards = pack
    assert_computed_once(shared.allowed.numpy(), shared.borders, shards, shared.prefixes)
    for rank in range(shards.cp):
        own = [block.causal for block in blocks_between(shared.borders, shards, rank, rank, shared.prefixes)]
        assert own == sorted(own, reverse=True)  # squares first


@given(packs())
def test_squares_come_first_and_hold_each_row_of_a_rank_once(pack: tuple[list[int], SequenceShards]) -> None:
    borders, shards = pack
    for rank in range(shards.cp):
        blocks = blocks_between(borders, shards, rank, rank)
        causal = [block.causal for block in blocks]
        assert causal == sorted(causal, reverse=True)
        rows = [row for block in blocks if block.causal for row in range(block.query_start, block.query_end)]
        assert rows == list(range(len(shards.ring_rows(rank))))
        for other in {*range(shards.cp)} - {rank}:
            assert not any(block.causal for block in blocks_between(borders, shards, rank, other))


@pytest.mark.parametrize("cp", [2, 3, 8])
def test_one_long_segment_is_one_rectangle_a_step(cp: int) -> None:
    """Zigzag: each rank computes, at each step, half of the pairs of two whole shards; all ranks equally many."""
    shards = SequenceShards(2 * cp * 5, cp=cp)
    for query_rank in range(cp):
        for key_rank in {*range(cp)} - {query_rank}:
            (block,) = blocks_between([0, shards.num_rows], shards, query_rank, key_rank)
            assert block.num_pairs == 10 * 10 // 2


def test_blocks_without_a_common_segment_are_no_work() -> None:
    shards = SequenceShards(16, cp=2)
    # Borders at the ends of chunks: no rank needs keys of another.
    assert blocks_between([0, 4, 8, 12, 16], shards, 0, 1) == []
    assert blocks_between([0, 4, 8, 12, 16], shards, 1, 0) == []


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([], "got nothing"),
        ([0], r"must reach from 0 to 8, got 0 … 0"),
        ([1, 8], r"must reach from 0 to 8, got 1 … 8"),
        ([0, 7], r"must reach from 0 to 8, got 0 … 7"),
        ([0, 4, 4, 8], r"segment 1 of the pack reaches from row 4 to 4"),
        ([0, 5, 4, 8], r"segment 1 of the pack reaches from row 5 to 4"),
    ],
)
def test_borders_that_do_not_cut_the_pack(borders: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_borders(borders, 8)
