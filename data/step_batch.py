"""What one rank needs of a step: the rows of its own packs, the tiles that it encodes, and where visual tokens go.

    StepPlan ─┬─ packs of my data-parallel rank ─► MicroBatch each        rows of text, places for visual tokens
              ├─ images of my encoder           ─► tiles [N, 3, P, P]     decoded nowhere else
              └─ both ends of every tile        ─► Routes                 sends and receives of the exchange

A rank expands only the samples that it trains on or encodes an image of; what the others do follows from the plan.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evovlm.csrc import random
from evovlm.data.batch import BatchSettings, MicroBatch, build_microbatch
from evovlm.data.images import jpeg_qualities
from evovlm.data.index import ImageRef, Index
from evovlm.data.sample import expand_sample
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
    """One image to decode into ``StepBatch.tiles[first : first + ref.num_tiles]``.

    Attributes:
        sample: row of the index, for error messages.
        ref: file and tile grid.
        first: first tile among those of this encoder.
        jpeg_qualities: degrade each tile to its quality; None: do not.
    """

    sample: int
    ref: ImageRef
    first: int
    jpeg_qualities: list[int] | None


@dataclass(frozen=True, eq=False)
class _Images:
    """Every image of a step, one entry each: its pack, segment, and number in the sample; where it is encoded."""

    pack: NDArray[np.int64]
    segment: NDArray[np.int64]
    number: NDArray[np.int64]
    num_tiles: NDArray[np.int64]
    first_tile: NDArray[np.int64]
    encoder: NDArray[np.int64]
    slot: NDArray[np.int64]

    @classmethod
    def of(cls, index: Index, plan: StepPlan, num_encoders: int) -> "_Images":
        counts = [index.samples["num_images"][p.samples].astype(np.int64) for p in plan.packs]
        per_sample = np.concatenate(counts)
        pack = np.repeat(np.arange(len(counts)), [int(c.sum()) for c in counts])
        segment = np.repeat(np.concatenate([np.arange(len(c)) for c in counts]), per_sample)
        number = np.arange(len(segment)) - np.repeat(np.cumsum(per_sample) - per_sample, per_sample)
        tiles, encoder = plan.image_tiles.astype(np.int64), plan.encoder_rank.astype(np.int64)
        slot = np.empty_like(tiles)
        for e in range(num_encoders):
            mine = encoder == e
            slot[mine] = np.cumsum(tiles[mine]) - tiles[mine]
        return cls(pack, segment, number, tiles, np.cumsum(tiles) - tiles, encoder, slot)


def build_step(
    index: Index, plan: StepPlan, settings: BatchSettings, *, data_rank: int, encoder: int, num_encoders: int
) -> tuple[StepBatch, list[ImageJob]]:
    """Make the tensors of a rank; tiles are allocated, and the jobs say what to decode into them.

    Args:
        index: the index that the step was planned from.
        plan: the step.
        settings: see ``BatchSettings``.
        data_rank: this rank's data-parallel rank of the LLM.
        encoder: this rank's data-parallel rank of the ViT.
        num_encoders: data-parallel ranks of the ViT.

    Raises:
        ValueError: a sample is not what its row in the index says.
    """
    images = _Images.of(index, plan, num_encoders)
    per_tile = index.meta.tokens_per_tile
    packs, received = [], []
    for number in plan.assignment[data_rank].tolist():
        pack = build_microbatch(index, plan.packs[number], settings)
        packs.append(pack)
        received.append(pack.visual_rows.numpy()[::per_tile])  # first row of each tile, in order
    sends, jobs, keys = _sends(index, plan, images, settings, encoder)
    size = index.meta.tile_size
    num_tiles = np.bincount(images.encoder, weights=images.num_tiles, minlength=num_encoders).astype(np.int64)
    batch = StepBatch(
        packs=packs,
        tiles=torch.empty(int(num_tiles[encoder]), 3, size, size),
        tile_keys=torch.from_numpy(np.concatenate(keys).view(np.int64)),
        routes=Routes(sends, _receives(plan, images, data_rank, np.concatenate(received)), num_tiles),
        tokens_per_tile=per_tile,
    )
    return batch, jobs


def _tiles(images: _Images, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each tile of the chosen images: its image, and its number in it."""
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
    data_rank, microbatch = np.empty((2, len(plan.packs)), np.int64)
    for rank, row in enumerate(plan.assignment.tolist()):
        data_rank[row], microbatch[row] = rank, np.arange(len(row))
    chosen = np.flatnonzero(images.encoder == encoder)
    first_rows = np.empty(len(chosen), np.int64)
    jobs: list[ImageJob] = []
    keys = [np.empty(0, np.uint64)]
    expanded, expanded_place = None, (-1, -1)
    for i, image in enumerate(chosen.tolist()):
        place = (int(images.pack[image]), int(images.segment[image]))
        pack, segment, number = plan.packs[place[0]], place[1], int(images.number[image])
        sample, visit = int(pack.samples[segment]), int(pack.visits[segment])
        if expanded is None or place != expanded_place:  # images of a sample follow one another
            expanded, expanded_place = expand_sample(index, sample, image_context=settings.image_context), place
        begin = int(index.samples["num_tokens"][pack.samples[:segment]].sum())
        first_rows[i] = begin + expanded.runs[number][0]
        ref = expanded.refs[number]
        degrade = settings.augment and index.datasets[int(index.samples["dataset"][sample])].augment
        qualities = jpeg_qualities(settings.seed, sample, visit, number, ref.num_tiles) if degrade else None
        jobs.append(ImageJob(sample, ref, int(images.slot[image]), qualities))
        keys.append(random.keys("drop_path", settings.seed, sample, visit, number, np.arange(ref.num_tiles)))
    image_of, inside = _tiles(images, chosen)
    sends = TileSends(
        slot=images.slot[image_of] + inside,
        number=images.first_tile[image_of] + inside,
        dp=data_rank[images.pack[image_of]],
        microbatch=microbatch[images.pack[image_of]],
        row=np.repeat(first_rows, images.num_tiles[chosen]) + inside * index.meta.tokens_per_tile,
    )
    return sends, jobs, keys
