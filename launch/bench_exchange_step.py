"""The step that ``bench exchange`` delivers: plans, a seeded mix of packs, and where each of its visual tokens goes.

Where tokens go is found here from maps with an entry for every tile and every row, not from ``parallel/routes.py``:
what the benchmark holds the exchange against is independent of it.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import typer

from evovlm.csrc.random import keys, uniform
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.routes import Chunk, Ints
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.traffic import TileUses


@dataclass(frozen=True)
class Mix:
    """Size of the step that is exchanged.

    Attributes:
        num_rows: T, rows of a pack.
        num_packs: Packs of the step, if the plan's data-parallel ranks are not more.
        tokens_per_tile: Rows of a tile.
        hidden: H; rows are float32.
        chunk_tiles: Tiles of one encoder and chunk.
        layers: Matrix products of the encoder's stand-in.
    """

    num_rows: int = 8192
    num_packs: int = 4
    tokens_per_tile: int = 256
    hidden: int = 256
    chunk_tiles: int = 4
    layers: int = 2

    def num_microbatches(self, plan: ParallelPlan) -> int:
        """M of a plan."""
        return -(-self.num_packs // plan.llm.dp)


def plans(ranks: int) -> list[ParallelPlan]:
    """Plans over a power of two of ranks: its factors of two spread over the axes in four ways."""
    count = ranks.bit_length() - 1
    if ranks < 2 or 1 << count != ranks:
        raise typer.BadParameter(f"{ranks} ranks; the plans need a power of two, such as {2 ** max(1, count)}")
    found = []
    for axes, vit_tp in ((("dp", "cp", "tp"), 1), (("pp", "dp", "hp"), 1), (("cp", "tp"), 2), (("dp",), 1)):
        spread = [axes[i % len(axes)] for i in range(count)]
        llm = Layout(**{axis: 2 ** spread.count(axis) for axis in axes})
        found.append(ParallelPlan.for_llm(llm, Layout(dp=ranks // vit_tp, tp=vit_tp)))
    return found


def draw(plan: ParallelPlan, mix: Mix) -> tuple[TileUses, Ints]:
    """Draw a step: which tile goes to which rows, and the rank that its image belongs to in the data's order."""
    packs = [(dp, microbatch) for microbatch in range(mix.num_microbatches(plan)) for dp in range(plan.llm.dp)]
    images: list[tuple[int, int, int, int]] = []  # dp, microbatch, first row, tiles
    sample = 0
    for dp, microbatch in packs:
        row = 0
        while True:
            part = uniform(keys("bench", "exchange", sample, np.arange(2)))
            text, tiles = 16 + int(part[0] * mix.num_rows / 32), int(14 * part[1] ** 2)
            row += text
            if row + tiles * mix.tokens_per_tile > mix.num_rows:
                break  # the next pack begins with the sample after this one
            images.append((dp, microbatch, row, tiles))
            row += tiles * mix.tokens_per_tile
            sample += 1
        sample += 1
    encoder, load = np.zeros(len(images), dtype=np.int64), np.zeros(plan.vit.dp, dtype=np.int64)
    for image in sorted(range(len(images)), key=lambda i: -images[i][3]):
        encoder[image] = load.argmin()
        load[load.argmin()] += images[image][3]
    replicas = [[r for r in range(plan.size) if plan.llm.coordinates(r).dp == dp] for dp in range(plan.llm.dp)]
    uses, home, slots, seen = [], [], [0] * plan.vit.dp, [0] * plan.llm.dp
    totals = [sum(image[0] == dp for image in images) for dp in range(plan.llm.dp)]
    for (dp, microbatch, row, tiles), e in zip(images, encoder.tolist(), strict=True):
        for tile in range(tiles):
            uses.append((e, slots[e], dp, microbatch, row + tile * mix.tokens_per_tile))
            home.append(replicas[dp][seen[dp] * len(replicas[dp]) // totals[dp]])
            slots[e] += 1
        seen[dp] += 1
    columns = np.array(uses, dtype=np.int64).reshape(-1, 5).T
    tiles_used = TileUses(columns[0], columns[1], columns[2], columns[3], columns[4], num_tiles=np.array(slots))
    return tiles_used, np.array(home, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Every visual token of a step, in the order of (use, token), found without ``parallel/routes.py``.

    Attributes:
        holder: int64 ``[n]``, rank that hands it over.
        held: int64 ``[n]``, its row among all that the rank hands over in the step.
        home: int64 ``[n]``, rank that its image belongs to in the data's order.
        owner: int64 ``[n]``, rank that holds its row of the pack.
        local: int64 ``[n]``, the row there, of ``[M · T/(cp·hp·tp)]``.
    """

    holder: Ints
    held: Ints
    home: Ints
    owner: Ints
    local: Ints


def tokens_of(plan: ParallelPlan, mix: Mix, uses: TileUses, home: Ints) -> Tokens:
    """Follow every visual token of a step, through maps with an entry for every tile and every row."""
    owner = np.full((plan.llm.dp, mix.num_rows), -1)
    local = np.zeros_like(owner)
    for rank in range(plan.size):
        place = plan.llm.coordinates(rank)
        if place.pp == 0:
            rows = SequenceShards.of(plan.llm, mix.num_rows).rows(place)
            owner[place.dp, rows], local[place.dp, rows] = rank, np.arange(len(rows))
    tp, tile_of = plan.vit.tp, np.zeros((plan.size, plan.vit.dp, int(uses.num_tiles.max(initial=1))), dtype=np.int64)
    tile_of -= 1
    for encoder, count in enumerate(uses.num_tiles.tolist()):
        held = [0] * tp
        for begin in range(0, count, mix.chunk_tiles):
            tiles = min(mix.chunk_tiles, count - begin)
            for t, (first, end) in enumerate(pairwise(tiles * t // tp for t in range(tp + 1))):
                tile_of[encoder * tp + t, encoder, begin + first : begin + end] = held[t] + np.arange(end - first)
                held[t] += end - first
    holder = tile_of[:, uses.encoder, uses.slot].argmax(0)
    token = np.arange(mix.tokens_per_tile)
    rows = uses.row[:, None] + token
    width = mix.num_rows // plan.llm.sequence_ranks
    return Tokens(
        holder=np.repeat(holder, len(token)),
        held=(tile_of[holder, uses.encoder, uses.slot][:, None] * len(token) + token).ravel(),
        home=np.repeat(home, len(token)),
        owner=owner[uses.dp[:, None], rows].ravel(),
        local=(uses.microbatch[:, None] * width + local[uses.dp[:, None], rows]).ravel(),
    )


def hop(rank: int, size: int, source: Ints, row: Ints, target: Ints) -> tuple[Chunk, Ints, Ints]:
    """Plan one all-to-all of tokens that lie in ``row`` of rank ``source`` and go to rank ``target``.

    Returns:
        This rank's part, the tokens that arrive there in their order, and for every token its row where it arrives.
    """
    out = np.flatnonzero(source == rank)
    out = out[np.argsort(target[out], kind="stable")]
    order = np.lexsort((source, target))
    counts = np.bincount(target, minlength=size)
    arrival = np.empty_like(order)
    arrival[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    arrived = order[target[order] == rank]
    splits = [np.bincount(ranks, minlength=size) for ranks in (target[out], source[arrived])]
    num_rows = int(row[out].max(initial=-1)) + 1
    return Chunk(range(0), range(0), num_rows, row[out], splits[0], splits[1]), arrived, arrival
