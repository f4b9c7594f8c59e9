"""What one rank needs of a step: the rows of its own packs, the tiles that it encodes, and where visual tokens go.

    StepPlan ─┬─ packs of my data-parallel rank ─► MicroBatch each        rows of text, places for visual tokens
              ├─ images of my encoder           ─► tiles [N, 3, P, P]     decoded nowhere else
              └─ both ends of every tile        ─► Routes                 sends and receives of the exchange

A rank reads only the tokens that it trains on and the images that it encodes; what the others do follows from the plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evovlm.csrc import random
from evovlm.data.batch import BatchSettings, MicroBatch, build_microbatch
from evovlm.data.images import jpeg_qualities
from evovlm.data.index import ImageRef, Index
from evovlm.data.step_plan import StepPlan
from evovlm.parallel.routes import Routes, TileReceives, TileSends


@dataclass
class StepBatch:
    """One rank's part of a step, on the host.

    Attributes:
        packs: microbatches of this rank's data-parallel rank of the LLM, in order, whole rows.
        tiles: float32 [N, 3, P, P], the tiles that this rank's data-parallel rank of the ViT encodes.
        tile_keys: int64 [N], bits of ``keys("drop_path", seed, sample, visit, image, tile)``.
        routes: where visual tokens come from and go to.
        tokens_per_tile: visual tokens of one tile.
    """

    packs: list[MicroBatch]
    tiles: Tensor
    tile_keys: Tensor
    routes: Routes
    tokens_per_tile: int

    @classmethod
    def of_text(cls, packs: list[MicroBatch]) -> "StepBatch":
        """A step of a model that has no encoder."""
        none = np.empty(0, np.int64)
        routes = Routes(TileSends(*[none] * 5), TileReceives(*[none] * 5), none)
        return cls(packs, torch.empty(0), torch.empty(0, dtype=torch.int64), routes, 1)


@dataclass(frozen=True)
class ImageJob:
    """Tiles ``begin`` to ``end - 1`` of an image, to decode into ``StepBatch.tiles[slot : slot + end - begin]``.

    Attributes:
        name: the sample's, for error messages.
        ref: file and tile grid.
        begin: first tile wanted.
        end: tile after the last one wanted.
        slot: place of the first among the tiles of this encoder.
        jpeg_qualities: degrade each of these tiles to its quality; None: do not.
    """

    name: str
    ref: ImageRef
    begin: int
    end: int
    slot: int
    jpeg_qualities: list[int] | None


@dataclass(frozen=True, eq=False)
class _Images:
    """Every piece of a step, one entry each: where its image stands in the packs, and where it is encoded."""

    pack: NDArray[np.int64]
    segment: NDArray[np.int64]  # of all segments of the step
    number: NDArray[np.int64]  # of the image in its sample
    begin: NDArray[np.int64]  # first tile, in the image
    num_tiles: NDArray[np.int64]
    first_tile: NDArray[np.int64]  # of all tiles of the step
    encoder: NDArray[np.int64]
    slot: NDArray[np.int64]

    @classmethod
    def of(cls, index: Index, plan: StepPlan) -> "_Images":
        pieces, packs = plan.pieces, plan.packs
        counts = index.samples["num_images"][packs.samples].astype(np.int64)
        segment = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
        image, tiles = pieces.image, pieces.tiles.astype(np.int64)
        of_encoder = np.argsort(pieces.encoder, kind="stable")
        ends = np.cumsum(tiles[of_encoder])
        slot = np.empty_like(tiles)
        slot[of_encoder] = ends - tiles[of_encoder]
        slot -= np.concatenate([[0], np.cumsum(plan.vit_load)])[pieces.encoder]
        return cls(
            packs.pack_of[segment[image]],
            segment[image],
            number[image],
            pieces.first.astype(np.int64),
            tiles,
            np.cumsum(tiles) - tiles,
            pieces.encoder.astype(np.int64),
            slot,
        )


def build_step(
    index: Index,
    plan: StepPlan,
    settings: BatchSettings,
    *,
    data_rank: int,
    encoder: int,
    allocate: Callable[[int], Tensor] | None = None,
) -> tuple[StepBatch, list[ImageJob]]:
    """Make the tensors of a rank; tiles are allocated, and the jobs say what to decode into them.

    Args:
        index: the index that the step was planned from.
        plan: the step.
        settings: see ``BatchSettings``.
        data_rank: this rank's data-parallel rank of the LLM.
        encoder: this rank's data-parallel rank of the ViT.
        allocate: makes an uninitialised float32 [N, 3, P, P] for N tiles; ordinary memory by default.

    Raises:
        ValueError: a sample is not what its row in the index says.
    """
    images = _Images.of(index, plan)
    per_tile = index.meta.tokens_per_tile
    packs, received = [], []
    for number in plan.assignment[data_rank].tolist():
        first = int(plan.packs.starts[number])
        pack = build_microbatch(index, plan.packs[number], settings, first_segment=first)
        packs.append(pack)
        received.append(pack.visual_rows.numpy()[::per_tile])  # first row of each tile, in order
    sends, jobs, keys = _sends(index, plan, images, settings, encoder)
    size, num_tiles = index.meta.tile_size, plan.vit_load
    batch = StepBatch(
        packs=packs,
        tiles=(allocate or (lambda n: torch.empty(n, 3, size, size)))(int(num_tiles[encoder])),
        tile_keys=torch.from_numpy(np.concatenate(keys).view(np.int64)),
        routes=Routes(sends, _receives(plan, images, data_rank, np.concatenate(received)), num_tiles),
        tokens_per_tile=per_tile,
    )
    return batch, jobs


def _tiles(images: _Images, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each tile of the chosen pieces: its piece, and its number in it."""
    counts = images.num_tiles[chosen]
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(chosen, counts), inside


def _receives(plan: StepPlan, images: _Images, data_rank: int, rows: NDArray[np.int64]) -> TileReceives:
    """Where the tiles of this rank's packs come from; ``rows`` in the order of its microbatches."""
    chosen = [np.flatnonzero(images.pack == number) for number in plan.assignment[data_rank].tolist()]
    microbatch = np.repeat(np.arange(len(chosen)), [int(images.num_tiles[c].sum()) for c in chosen])
    image, inside = _tiles(images, np.concatenate(chosen))
    return TileReceives(
        encoder=images.encoder[image],
        slot=images.slot[image] + inside,
        number=images.first_tile[image] + inside,
        microbatch=microbatch,
        row=rows,
    )


def _sends(
    index: Index, plan: StepPlan, images: _Images, settings: BatchSettings, encoder: int
) -> tuple[TileSends, list[ImageJob], list[NDArray[np.uint64]]]:
    """Where the tiles of this encoder go, what it decodes, and the keys of their drop path."""
    packs, per_tile = plan.packs, index.meta.tokens_per_tile
    data_rank, microbatch = np.empty((2, len(packs)), np.int64)
    ranks, microbatches = plan.assignment.shape
    data_rank[plan.assignment], microbatch[plan.assignment] = np.arange(ranks)[:, None], np.arange(microbatches)
    before = np.cumsum(packs.lengths) - packs.lengths
    chosen = np.flatnonzero(images.encoder == encoder)
    first_rows = np.empty(len(chosen), np.int64)
    jobs: list[ImageJob] = []
    keys = [np.empty(0, np.uint64)]
    last, refs = -1, []
    for i, piece in enumerate(chosen.tolist()):
        segment, number = int(images.segment[piece]), int(images.number[piece])
        sample, visit = int(packs.samples[segment]), int(packs.visits[segment])
        if segment != last:  # images of a sample follow one another
            last, refs = segment, index.image_refs(sample)
        ref, begin, count = refs[number], int(images.begin[piece]), int(images.num_tiles[piece])
        earlier = sum(other.num_tiles for other in refs[:number]) + begin
        start = before[segment] - before[packs.starts[images.pack[piece]]]
        first_rows[i] = start + ref.insert_at + earlier * per_tile
        qualities = None
        if settings.augment and index.dataset_of(sample).augment:
            drawn = jpeg_qualities(settings.seed, sample, visit, number, ref.num_tiles)
            qualities = drawn[begin : begin + count]
        jobs.append(ImageJob(index.name(sample), ref, begin, begin + count, int(images.slot[piece]), qualities))
        tiles = np.arange(begin, begin + count)
        keys.append(random.keys("drop_path", settings.seed, sample, visit, number, tiles))
    image_of, inside = _tiles(images, chosen)
    sends = TileSends(
        slot=images.slot[image_of] + inside,
        number=images.first_tile[image_of] + inside,
        dp=data_rank[images.pack[image_of]],
        microbatch=microbatch[images.pack[image_of]],
        row=np.repeat(first_rows, images.num_tiles[chosen]) + inside * per_tile,
    )
    return sends, jobs, keys
