"""A step's tiles seen from above: each rank's routes, and the bytes that four ways of delivering them move.

    encoder ──────────────────────► owner of the row      moved: this project's exchange, one hop
    encoder ──► home ─────────────► owner                 two exchanges: first back to the data's order
    encoder ──► every rank                                all-gather, each rank picks its rows

The counts here look at every token by itself; ``parallel/routes.py`` gets the same ones from runs of tokens.
"""

from dataclasses import dataclass

import numpy as np

from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.routes import (
    Ints,
    Routes,
    TileReceives,
    TileSends,
    encoder_ranks,
    first_stage_ranks,
    tile_shares,
)
from evovlm.parallel.sequence import SequenceShards


@dataclass(frozen=True, eq=False)
class TileUses:
    """Every use of a tile in a step, over all ranks; a use's number is its place here.

    Attributes:
        encoder: int64 ``[n]``, ViT data-parallel rank that encodes the tile.
        slot: int64 ``[n]``, which of that encoder's tiles.
        dp: int64 ``[n]``, LLM data-parallel rank of the pack.
        microbatch: int64 ``[n]``.
        row: int64 ``[n]``, first of the tile's rows in the pack.
        num_tiles: int64 ``[vit.dp]``, tiles that each encoder encodes.
    """

    encoder: Ints
    slot: Ints
    dp: Ints
    microbatch: Ints
    row: Ints
    num_tiles: Ints

    def routes(self, plan: ParallelPlan, rank: int) -> Routes:
        """The part that one rank must know."""
        out = np.flatnonzero(self.encoder == plan.vit.coordinates(rank).dp)
        into = np.flatnonzero(self.dp == plan.llm.coordinates(rank).dp)
        return Routes(
            TileSends(self.slot[out], out, self.dp[out], self.microbatch[out], self.row[out]),
            TileReceives(self.encoder[into], self.slot[into], into, self.microbatch[into], self.row[into]),
            self.num_tiles,
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes that cross from one rank to another in a step's forward, summed over ranks; backward moves as many.

    ``holder`` is the rank that hands a token over, ``owner`` the one that holds its row of the pack between blocks.

    Attributes:
        moved: By the exchange: Σ over tokens of all uses of [holder ≠ owner].
        lower_bound: Each visual token once to each other rank that owns a row of it. Less than ``moved`` only where
            tiles are used twice and one rank owns the row of a token in both.
        all_gather: Every rank gets every visual token: N · tokens_per_tile · (R − 1).
        two_exchange: First to the rank that the image belongs to in the data's order, then to the owner:
            Σ [holder ≠ home] + [home ≠ owner].
    """

    moved: int
    lower_bound: int
    all_gather: int
    two_exchange: int


def traffic(
    uses: TileUses,
    home: Ints,
    plan: ParallelPlan,
    shards: SequenceShards,
    tokens_per_tile: int,
    chunk_tiles: int,
    row_bytes: int,
) -> Traffic:
    """Count the bytes of four ways to bring a step's visual tokens to their rows.

    Args:
        uses: The step's tiles.
        home: int64 ``[n]``, for each use the rank that its image belongs to in the data's order.
        plan: Layouts of the run.
        shards: How the rows of a pack are split over the LLM's ranks.
        tokens_per_tile: Rows of one tile.
        chunk_tiles: Tiles of one encoder and chunk (it decides which tp rank of the encoder hands a tile over).
        row_bytes: Bytes of one visual token.
    """
    _, _, tp = tile_shares(uses.encoder, uses.slot, uses.num_tiles, plan.vit.tp, chunk_tiles)
    holder = encoder_ranks(plan.vit)[uses.encoder, tp][:, None]
    token = np.arange(tokens_per_tile)
    place, _ = shards.owners(uses.row[:, None] + token)
    owner = first_stage_ranks(plan.llm)[uses.dp[:, None], place[0], place[1], place[2]]
    moves = owner != holder
    tile = (np.cumsum(uses.num_tiles) - uses.num_tiles)[uses.encoder] + uses.slot
    arrivals = np.sort(((tile[:, None] * tokens_per_tile + token) * plan.size + owner)[moves])
    repeated = np.count_nonzero(arrivals[1:] == arrivals[:-1])
    hops = np.count_nonzero(holder[:, 0] != home) * tokens_per_tile + np.count_nonzero(owner != home[:, None])
    return Traffic(
        moved=int(np.count_nonzero(moves)) * row_bytes,
        lower_bound=(len(arrivals) - int(repeated)) * row_bytes,
        all_gather=int(uses.num_tiles.sum()) * tokens_per_tile * (plan.size - 1) * row_bytes,
        two_exchange=int(hops) * row_bytes,
    )
