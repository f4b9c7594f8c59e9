"""Which queries of one ring rank meet which keys of another, as few rectangles as cover exactly the causal pairs.

               keys
               0 1  2 3  4 5  6 7     A pack of two segments, 0-4 and 5-7, in four chunks of two rows (cp = 2).
    queries 0  c .  . .  . .  . .
            1  c c  . .  . .  . .     c  causal square, on the diagonal: one for each segment in a chunk
            2  r r  c .  . .  . .     r  rectangle: all its keys come before all its queries, in one segment
            3  r r  c c  . .  . .     .  no common segment, or keys after queries: never computed
            4  r r  r r  c .  . .
            5  . .  . .  . c  . .     Two chunks have at most one segment in common: the one that reaches from the
            6  . .  . .  . r  c .     earlier into the later. So a pair of chunks is one rectangle or nothing.
            7  . .  . .  . r  c c

Rows are counted as a rank holds them: first its earlier chunk, then its later one.

A shared prefix (queries that see all of an earlier stretch of keys besides their segment) is a rectangle of the pack:
each pair of chunks, also a chunk with itself, gets the part of it that falls between them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evovlm.csrc.prefixes import Rectangle
from evovlm.parallel.sequence import SequenceShards


@dataclass(frozen=True)
class Block:
    """Queries and keys that meet, as rows of the ranks that hold them.

    Attributes:
        query_start: First query.
        query_end: One past the last query.
        key_start: First key.
        key_end: One past the last key.
        causal: Query i sees keys 0 … i of the block; otherwise it sees all.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool

    @property
    def queries(self) -> slice:
        """Rows of the queries."""
        return slice(self.query_start, self.query_end)

    @property
    def keys(self) -> slice:
        """Rows of the keys."""
        return slice(self.key_start, self.key_end)

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that are computed."""
        num_queries = self.query_end - self.query_start
        return num_queries * (num_queries + 1) // 2 if self.causal else num_queries * (self.key_end - self.key_start)


def check_borders(borders: Sequence[int], num_rows: int) -> None:
    """Check that borders cut a pack of T rows into segments of at least one row.

    Raises:
        ValueError: They do not start at 0, do not end at T, or do not rise; the message says where.
    """
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != num_rows:
        ends = f"{borders[0]} … {borders[-1]}" if len(borders) else "nothing"
        raise ValueError(f"the segments of a pack of T = {num_rows} rows must reach from 0 to {num_rows}, got {ends}")
    for number, (start, end) in enumerate(pairwise(borders)):
        if start >= end:
            raise ValueError(f"segment {number} of the pack reaches from row {start} to {end}: it has no rows")


def blocks_between(
    borders: Sequence[int],
    shards: SequenceShards,
    query_rank: int,
    key_rank: int,
    prefixes: Sequence[Rectangle] = (),
) -> list[Block]:
    """The blocks of one ring rank's queries with another's keys; causal squares come first.

    Args:
        borders: Segment borders, S + 1 rising integers from 0 to T.
        shards: The split of the pack.
        query_rank: cp coordinate of the holder of the queries.
        key_rank: cp coordinate of the holder of the keys and values.
        prefixes: Rectangles of the pack (query start, query end, key start, key end), as
            :func:`evovlm.csrc.prefixes.list_prefixes` checks them.

    Returns:
        Blocks that do not overlap; rows are local to the two ranks' ``[T / cp]``.
    """
    squares: list[Block] = []
    rectangles: list[Block] = []
    for query_slot, query_chunk in enumerate(_chunks(shards, query_rank)):
        for key_slot, key_chunk in enumerate(_chunks(shards, key_rank)):
            if key_chunk > query_chunk:
                continue
            queries, keys = query_chunk * shards.chunk, key_chunk * shards.chunk
            # From rows of the pack to rows of the rank.
            to_query, to_key = query_slot * shards.chunk - queries, key_slot * shards.chunk - keys
            if key_chunk == query_chunk:
                squares += [
                    Block(start + to_query, end + to_query, start + to_key, end + to_key, causal=True)
                    for start, end in _segments_inside(borders, keys, keys + shards.chunk)
                ]
                seen = list(prefixes)
            else:
                segment = bisect_right(borders, queries) - 1
                seen = [(queries, borders[segment + 1], borders[segment], keys + shards.chunk), *prefixes]
            for query_start, query_end, key_start, key_end in seen:
                query_start, query_end = max(query_start, queries), min(query_end, queries + shards.chunk)
                key_start, key_end = max(key_start, keys), min(key_end, keys + shards.chunk)
                if query_start < query_end and key_start < key_end:
                    block = Block(
                        query_start + to_query, query_end + to_query, key_start + to_key, key_end + to_key, causal=False
                    )
                    _append(rectangles, block)
    return squares + rectangles


def _chunks(shards: SequenceShards, rank: int) -> tuple[int, ...]:
    """Numbers of a ring rank's chunks, in the order in which it holds them."""
    return (rank, 2 * shards.cp - 1 - rank) if shards.cp > 1 else (0,)


def _segments_inside(borders: Sequence[int], start: int, end: int) -> list[tuple[int, int]]:
    """The parts of segments between two rows of the pack."""
    first, last = bisect_right(borders, start), bisect_right(borders, end - 1)
    return list(pairwise((start, *borders[first:last], end)))


def _append(blocks: list[Block], block: Block) -> None:
    """Add a rectangle, as part of the last one where both are one rectangle in a rank's memory."""
    if blocks:
        last = blocks[-1]
        if (last.key_start, last.key_end, last.query_end) == (block.key_start, block.key_end, block.query_start):
            blocks[-1] = Block(last.query_start, block.query_end, last.key_start, last.key_end, causal=False)
            return
        if (last.query_start, last.query_end, last.key_end) == (block.query_start, block.query_end, block.key_start):
            blocks[-1] = Block(last.query_start, last.query_end, last.key_start, block.key_end, causal=False)
            return
    blocks.append(block)
