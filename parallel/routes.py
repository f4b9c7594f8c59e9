"""Who sends which visual token to whom: the vision exchange of one step, decided before it starts.

    encoder e, chunk k of its tiles                 pack of an LLM data-parallel rank, T rows
    ┌─────┬─────┬─────┐                             ┌───┬─────┬─────────┬─────┬──┐
    │slot0│slot1│slot2│   tokens_per_tile rows      │txt│tile │  text   │tile │  │
    └─────┴─────┴─────┘   each                      └───┴──┬──┴─────────┴──┬──┴──┘
       └─────────────── every row straight to the rank ────┴───────────────┘
                        that holds it between blocks (cp, hp, tp; pipeline stage 0)

A tile's rows are consecutive in its pack, so only the borders between holders cut them: all work is on a few *runs* of
rows for each tile, and rows are listed once, at the end. Rows from one rank to another in one chunk are in the order
of (number of the use, token), which both sides know without asking.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.parallel.layout import Coordinates, Layout, ParallelPlan
from evovlm.parallel.sequence import SequenceShards

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TileSends:
    """Uses of the tiles that one ViT data-parallel rank encodes; a tile used twice has two rows.

    Attributes:
        slot: int64 ``[n]``, which of this encoder's tiles, in the order in which it encodes them.
        number: int64 ``[n]``, number of the use in the whole step.
        dp: int64 ``[n]``, LLM data-parallel rank of the pack.
        microbatch: int64 ``[n]``.
        row: int64 ``[n]``, first of the tile's rows in the pack.
    """

    slot: Ints
    number: Ints
    dp: Ints
    microbatch: Ints
    row: Ints


@dataclass(frozen=True, eq=False)
class TileReceives:
    """Uses of tiles in the packs of one LLM data-parallel rank, all microbatches.

    Attributes:
        encoder: int64 ``[m]``, ViT data-parallel rank that encodes the tile.
        slot: int64 ``[m]``, which of that encoder's tiles.
        number: int64 ``[m]``, number of the use in the whole step.
        microbatch: int64 ``[m]``.
        row: int64 ``[m]``, first of the tile's rows in the pack.
    """

    encoder: Ints
    slot: Ints
    number: Ints
    microbatch: Ints
    row: Ints


@dataclass(frozen=True, eq=False)
class Routes:
    """What one rank must know of a step's tiles.

    Attributes:
        sends: Uses of the tiles of this rank's encoder.
        receives: Uses of tiles in the packs of this rank's LLM data-parallel rank.
        num_tiles: int64 ``[vit.dp]``, tiles that each encoder encodes in this step.
    """

    sends: TileSends
    receives: TileReceives
    num_tiles: Ints


@dataclass(frozen=True, eq=False)
class Chunk:
    """One all-to-all, as one rank sees it.

    Attributes:
        slots: The tiles that this rank's encoder encodes in this chunk (none on an encoder that has run out).
        tiles: Those of them, counted within the chunk, whose rows this rank hands over: its share among the tp ranks.
        num_rows: Rows that it hands over: its tiles · tokens_per_tile.
        send_rows: int64 ``[n]``, which of these rows go out, grouped by destination rank; one may go out repeatedly.
        send_splits: int64 ``[R]``, rows to each rank.
        recv_splits: int64 ``[R]``, rows from each rank.
    """

    slots: range
    tiles: range
    num_rows: int
    send_rows: Ints
    send_splits: Ints
    recv_splits: Ints

    @property
    def num_received(self) -> int:
        """Rows that this rank receives."""
        return int(self.recv_splits.sum())


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """All of one rank's part in a step's vision exchange.

    Attributes:
        chunks: The all-to-alls, in order; as many on every rank, at least one.
        rows: int64 ``[m]``, local rows (among the T/(cp·hp·tp) that this rank holds) that visual tokens fill, by
            microbatch, ascending within each.
        sources: int64 ``[m]``, for each its row in the concatenation of what all chunks received.
        borders: int64 ``[microbatches + 1]``, where each microbatch begins in the two, up to the last with a token.
    """

    chunks: tuple[Chunk, ...]
    rows: Ints
    sources: Ints
    borders: Ints

    def of_microbatch(self, microbatch: int) -> tuple[Ints, Ints]:
        """``rows`` and ``sources`` of one microbatch; both empty where this rank holds no visual token of it."""
        if microbatch + 1 >= len(self.borders):
            return self.rows[:0], self.sources[:0]
        part = slice(self.borders[microbatch], self.borders[microbatch + 1])
        return self.rows[part], self.sources[part]


def plan_exchange(
    routes: Routes,
    plan: ParallelPlan,
    rank: int,
    shards: SequenceShards,
    tokens_per_tile: int,
    chunk_tiles: int,
) -> ExchangePlan:
    """Decide one rank's sends and receives of a step; pure, without communication.

    Tiles are encoded ``chunk_tiles`` slots at a time. The tp ranks of an encoder share the n tiles of a chunk: rank t
    hands over tiles ``[n·t // tp, n·(t+1) // tp)``.

    Args:
        routes: What the rank knows of the step's tiles.
        plan: Layouts of the run; the ViT's and the LLM's are used.
        rank: The rank in the run.
        shards: How the rows of a pack are split over the LLM's ranks.
        tokens_per_tile: Rows of one tile.
        chunk_tiles: Tiles of one encoder and chunk.

    Raises:
        ValueError: Numbers that do not fit together: a tile that is not there, rows outside of the pack, two tiles on
            one row, a rank outside of the layout. The message names them.
    """
    _check(routes, plan, rank, shards, tokens_per_tile, chunk_tiles)
    sends, receives, num_tiles = routes.sends, routes.receives, routes.num_tiles
    size, me = plan.size, plan.vit.coordinates(rank)
    num_chunks = max(1, -(-int(num_tiles.max()) // chunk_tiles))

    # Sender: runs of its own share of the tiles, ordered by (chunk, destination, number, token).
    encoder = np.full_like(sends.slot, me.dp)
    chunk, tile, tp = tile_shares(encoder, sends.slot, num_tiles, plan.vit.tp, chunk_tiles)
    use, token, length, place, _ = _runs(sends.row, shards, tokens_per_tile)
    target = first_stage_ranks(plan.llm)[sends.dp[use], place[0], place[1], place[2]]
    order = np.lexsort((token, sends.number[use], target, chunk[use]))
    order = order[tp[use[order]] == me.tp]
    use, token, length, target = use[order], token[order], length[order], target[order]
    first_tile = _first_tile(num_tiles[me.dp], np.arange(num_chunks), chunk_tiles, me.tp, plan.vit.tp)
    send_rows = _expand((tile[use] - first_tile[chunk[use]]) * tokens_per_tile + token, length)
    send_splits = _sums(chunk[use], target, length, num_chunks, size)

    # Receiver: runs that it holds, ordered by (chunk, source, number, token): so they arrive.
    here = plan.llm.coordinates(rank)
    chunk, _, tp = tile_shares(receives.encoder, receives.slot, num_tiles, plan.vit.tp, chunk_tiles)
    source = encoder_ranks(plan.vit)[receives.encoder, tp]
    use, token, length, place, local = _runs(receives.row, shards, tokens_per_tile)
    mine = (place == np.array([[here.cp], [here.hp], [here.tp]])).all(0) & (here.pp == 0)
    use, token, length, local = use[mine], token[mine], length[mine], local[mine]
    order = np.lexsort((token, receives.number[use], source[use], chunk[use]))
    use, length, local = use[order], length[order], local[order]
    recv_splits = _sums(chunk[use], source[use], length, num_chunks, size)
    arrival = np.cumsum(length) - length
    order = np.lexsort((local, receives.microbatch[use]))
    counts = np.bincount(receives.microbatch[use], weights=length).astype(np.int64)

    ends = np.cumsum(send_splits.sum(1))
    chunks = []
    for k in range(num_chunks):
        tiles = range(*(int(_first_tile(num_tiles[me.dp], k, chunk_tiles, me.tp + i, plan.vit.tp)) for i in (0, 1)))
        slots = range(*(min((k + i) * chunk_tiles, int(num_tiles[me.dp])) for i in (0, 1)))
        rows = send_rows[ends[k] - send_splits[k].sum() : ends[k]]
        chunks.append(Chunk(slots, tiles, len(tiles) * tokens_per_tile, rows, send_splits[k], recv_splits[k]))
    return ExchangePlan(
        chunks=tuple(chunks),
        rows=_expand(local[order], length[order]),
        sources=_expand(arrival[order], length[order]),
        borders=np.concatenate(([0], np.cumsum(counts))),
    )


def tile_shares(encoder: Ints, slot: Ints, num_tiles: Ints, tp_size: int, chunk_tiles: int) -> tuple[Ints, Ints, Ints]:
    """Find who hands a tile over, and when.

    Args:
        encoder: int64 ``[n]``, ViT data-parallel rank of each tile.
        slot: int64 ``[n]``, which of that encoder's tiles.
        num_tiles: int64 ``[vit.dp]``, tiles of each encoder.
        tp_size: Tensor-parallel ranks of an encoder.
        chunk_tiles: Tiles of one encoder and chunk.

    Returns:
        int64 ``[n]`` each: chunk, the tile's number in it, and the tp rank of its encoder that hands it over.
    """
    chunk, tile = np.divmod(slot, chunk_tiles)
    in_chunk = np.minimum(num_tiles[encoder] - chunk * chunk_tiles, chunk_tiles)
    return chunk, tile, ((tile + 1) * tp_size - 1) // in_chunk  # inverse of _first_tile


def first_stage_ranks(llm: Layout) -> Ints:
    """Ranks of the first pipeline stage, int64 ``[dp, cp, hp, tp]``."""
    shape = (llm.dp, llm.cp, llm.hp, llm.tp)
    places = np.ndindex(shape)
    return np.array([llm.rank_of(Coordinates(0, *place)) for place in places], dtype=np.int64).reshape(shape)


def encoder_ranks(vit: Layout) -> Ints:
    """Ranks of the ViT's layout, int64 ``[dp, tp]``."""
    places = np.ndindex(vit.dp, vit.tp)
    ranks = [vit.rank_of(Coordinates(0, dp, 0, 0, tp)) for dp, tp in places]
    return np.array(ranks, dtype=np.int64).reshape(vit.dp, vit.tp)


def _runs(first: Ints, shards: SequenceShards, tokens_per_tile: int) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Cut tiles into runs of rows that one rank holds side by side.

    Args:
        first: int64 ``[n]``, first row of each tile in its pack.
        shards: How a pack is split.
        tokens_per_tile: Rows of a tile.

    Returns:
        For each run, int64: tile, first token, number of tokens, holder's place ``[3, runs]`` (cp, hp, tp), first
        local row.
    """
    # A holder's border is always at a multiple of this: half of its rows when zigzag chunks may meet inside it.
    unit = shards.num_rows // ((2 * shards.cp if shards.cp > 1 else 1) * shards.hp * shards.tp)
    begin, last = first // unit, (first + tokens_per_tile - 1) // unit
    pieces = last - begin + 1
    tile = np.repeat(np.arange(len(first)), pieces)
    block = _expand(begin, pieces)
    start = np.maximum(block * unit, first[tile])
    stop = np.minimum((block + 1) * unit, first[tile] + tokens_per_tile)
    place, local = shards.owners(start)
    return tile, start - first[tile], stop - start, place, local


def _first_tile(num_tiles: Ints | int, chunk: Ints | int, chunk_tiles: int, tp: int, tp_size: int) -> Ints:
    """First tile, counted within its chunk, that tp rank ``tp`` of an encoder hands over; ``tp_size`` gives the end."""
    tiles: Ints = np.clip(num_tiles - np.asarray(chunk) * chunk_tiles, 0, chunk_tiles)
    return tiles * tp // tp_size


def _expand(first: Ints, length: Ints) -> Ints:
    """Join ``arange(first, first + length)`` of all runs."""
    end = np.cumsum(length)
    return np.repeat(first - end + length, length) + np.arange(end[-1] if len(end) else 0)


def _sums(chunk: Ints, rank: Ints, length: Ints, num_chunks: int, size: int) -> Ints:
    """Rows of each chunk and rank, int64 ``[num_chunks, R]``."""
    sums = np.bincount(chunk * size + rank, weights=length, minlength=num_chunks * size)
    return sums.astype(np.int64).reshape(num_chunks, size)


def _check(
    routes: Routes, plan: ParallelPlan, rank: int, shards: SequenceShards, tokens_per_tile: int, chunk_tiles: int
) -> None:
    """Raise ValueError where numbers do not fit together."""
    vit, llm = plan.vit, plan.llm
    for name, value in (("tokens_per_tile", tokens_per_tile), ("chunk_tiles", chunk_tiles)):
        if value < 1:
            raise ValueError(f"vision exchange: {name} = {value}; it must be at least 1")
    if not 0 <= rank < plan.size:
        raise ValueError(f"vision exchange: rank {rank} is not one of the plan's {plan.size} ranks")
    if (shards.cp, shards.hp, shards.tp) != (llm.cp, llm.hp, llm.tp):
        raise ValueError(
            f"vision exchange: rows are split over cp, hp, tp = {shards.cp}, {shards.hp}, {shards.tp}, but the LLM's "
            f"layout has {llm.cp}, {llm.hp}, {llm.tp}; make the split with SequenceShards.of(plan.llm, num_rows)"
        )
    if len(routes.num_tiles) != vit.dp:
        raise ValueError(f"vision exchange: tiles of {len(routes.num_tiles)} encoders are given; vit.dp = {vit.dp}")
    sends, receives = routes.sends, routes.receives
    me = vit.coordinates(rank).dp
    limits = (("dp", sends.dp, llm.dp), ("encoder", receives.encoder, vit.dp))
    for name, values, limit in limits:
        _check_range(name, values, np.full_like(values, limit), sends.number if name == "dp" else receives.number)
    for side, slot in ((sends, sends.slot), (receives, receives.slot)):
        encoder = side.encoder if isinstance(side, TileReceives) else np.full_like(slot, me)
        _check_range("slot", slot, routes.num_tiles[encoder], side.number, encoder)
        _check_range("microbatch", side.microbatch, np.full_like(slot, np.iinfo(np.int64).max), side.number)
        _check_rows(side, shards.num_rows, tokens_per_tile)


def _check_range(name: str, values: Ints, limit: Ints, number: Ints, encoder: Ints | None = None) -> None:
    bad = np.flatnonzero((values < 0) | (values >= limit))
    if bad.size:
        at = bad[0]
        of = "" if encoder is None else f" of encoder {encoder[at]}"
        raise ValueError(
            f"vision exchange: tile use {number[at]} has {name} {values[at]}{of}; it must be in [0, {limit[at]})"
        )


def _check_rows(side: TileSends | TileReceives, num_rows: int, tokens_per_tile: int) -> None:
    outside = np.flatnonzero((side.row < 0) | (side.row + tokens_per_tile > num_rows))
    if outside.size:
        at = outside[0]
        raise ValueError(
            f"vision exchange: tile use {side.number[at]} takes rows [{side.row[at]}, {side.row[at] + tokens_per_tile})"
            f" of microbatch {side.microbatch[at]}; a pack has T = {num_rows}"
        )
    dp = side.dp if isinstance(side, TileSends) else np.zeros_like(side.row)
    order = np.lexsort((side.row, side.microbatch, dp))
    same = (np.diff(dp[order]) == 0) & (np.diff(side.microbatch[order]) == 0)
    clash = np.flatnonzero(same & (np.diff(side.row[order]) < tokens_per_tile))
    if clash.size:
        one, two = order[clash[0]], order[clash[0] + 1]
        raise ValueError(
            f"vision exchange: tile uses {side.number[one]} and {side.number[two]} share rows of microbatch "
            f"{side.microbatch[one]}: they begin at {side.row[one]} and {side.row[two]}, each takes {tokens_per_tile}"
        )
    unique, counts = np.unique(side.number, return_counts=True)
    if len(unique) < len(side.number):
        raise ValueError(f"vision exchange: {counts.max()} tile uses have number {unique[counts.argmax()]}")
