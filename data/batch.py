"""Turns a planned pack into tensors: tokens, shifted labels, loss weights, V2PE positions, and where its images go.

    pack      │ sample 0        │ sample 1     │ padding │      T = pack_tokens, always
    tokens    │ a <img> v v v b │ c d e        │ p p p p │
    labels    │ . .     . . b . │ d e .        │ . . . . │      target of each row; the last row of a sample has none
    positions │ 0 1     … …   … │ 0 1 2        │ 0 1 2 3 │      restart in every segment
    cu_seqlens 0                 6              9         13

    visual rows  ▲ ▲ ▲ ◄── tiles of image 0 ◄── ``ImageJob``: which file, which tiles, which JPEG qualities

Nothing here depends on ranks: random numbers are keyed by (seed, sample, visit, image).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evovlm.csrc import random
from evovlm.data.images import jpeg_qualities
from evovlm.data.index import ImageRef, Index
from evovlm.data.plan import LossWeighting, Pack, loss_weights
from evovlm.data.sample import IGNORE, expand_sample
from evovlm.models.v2pe import DELTAS, segment_positions


class V2PESettings(BaseModel):
    """Strides of visual positions (spec §2).

    Attributes:
        mode: "off": δ = 1, ordinary positions; "fixed": ``delta`` everywhere; "random": one of 1, 1/2, …, 1/256 for
            each image.
        delta: δ of mode "fixed".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["off", "fixed", "random"] = "off"
    delta: float = Field(0.25, gt=0, le=1)


@dataclass(frozen=True)
class BatchSettings:
    """What making a microbatch needs to know besides the index.

    Attributes:
        seed: seed of the run.
        pack_tokens: T.
        loss_weighting: "token", "sample" or "square".
        image_context: id of ``<IMG_CONTEXT>``.
        padding: id of ``<|endoftext|>``.
        v2pe: strides of visual positions.
        augment: degrade images of datasets that ask for it (``data_augment``); False in validation.
    """

    seed: int
    pack_tokens: int
    loss_weighting: LossWeighting
    image_context: int
    padding: int
    v2pe: V2PESettings
    augment: bool


@dataclass
class MicroBatch:
    """One pack as CPU tensors; T tokens, S segments (padding included), N tiles of side P pixels.

    Attributes:
        tokens: int64 [T], ``<IMG_CONTEXT>`` at visual rows, ``<|endoftext|>`` as padding.
        labels: int64 [T], already shifted: the target of each row, -100 where there is none.
        weights: float32 [T], loss weight of each row's target, 0 where there is none.
        positions: float32 [T], restarting in every segment. Never cast them down: fractions would be lost.
        cu_seqlens: int32 [S + 1], segment borders from 0 to T; padding is one last segment. Stays on the CPU.
        tiles: float32 [N, 3, P, P]; N may be 0.
        tile_keys: int64 [N], bits of ``keys("drop_path", seed, sample, visit, image, tile)``.
        visual_rows: int64 [N · tokens per tile], rows of T that the visual tokens fill, in tile order.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    tiles: Tensor
    tile_keys: Tensor
    visual_rows: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MicroBatch":
        """Return the batch on a device; ``cu_seqlens`` stays on the CPU, where segments are looped over."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return MicroBatch(
            tokens=move(self.tokens),
            labels=move(self.labels),
            weights=move(self.weights),
            positions=move(self.positions),
            cu_seqlens=self.cu_seqlens,
            tiles=move(self.tiles),
            tile_keys=move(self.tile_keys),
            visual_rows=move(self.visual_rows),
        )


@dataclass(frozen=True)
class ImageJob:
    """One image to decode into ``MicroBatch.tiles[first : first + ref.num_tiles]``.

    Attributes:
        sample: row of the index, for error messages.
        ref: file and tile grid.
        first: first tile in the microbatch.
        jpeg_qualities: degrade each tile to its quality; None: do not.
    """

    sample: int
    ref: ImageRef
    first: int
    jpeg_qualities: list[int] | None


def build_microbatch(index: Index, pack: Pack, settings: BatchSettings) -> tuple[MicroBatch, list[ImageJob]]:
    """Make the tensors of a pack; tiles are allocated, and the jobs say what to decode into them.

    Args:
        index: the index that the pack was planned from.
        pack: the samples.
        settings: see ``BatchSettings``.

    Raises:
        ValueError: a sample is not what its row in the index says.
    """
    T = settings.pack_tokens
    tokens = np.full(T, settings.padding, np.int64)
    labels = np.full(T, IGNORE, np.int64)
    weights = np.zeros(T, np.float64)
    positions = np.empty(T, np.float32)
    borders = [0]
    rows, keys, jobs = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], []
    num_tiles = 0
    for sample, visit in zip(pack.samples.tolist(), pack.visits.tolist(), strict=True):
        expanded = expand_sample(index, sample, image_context=settings.image_context)
        begin, end = borders[-1], borders[-1] + len(expanded.tokens)
        if end > T:
            raise ValueError(f"sample '{index.name(sample)}' ends at token {end} of a pack of {T}")
        tokens[begin:end] = expanded.tokens
        labels[begin:end] = expanded.labels
        supervised = expanded.labels != IGNORE
        count, planned = int(supervised.sum()), int(index.samples["num_supervised"][sample])
        if count != planned:
            raise ValueError(
                f"sample '{index.name(sample)}' has {count} targets, but the index says {planned}: rebuild the index"
            )
        weights[begin:end] = np.where(supervised, loss_weights(count, settings.loss_weighting), 0.0)
        deltas = run_deltas(settings.v2pe, settings.seed, sample, visit, len(expanded.runs))
        positions[begin:end] = segment_positions(len(expanded.tokens), expanded.runs, deltas)
        rows += [np.arange(begin + start, begin + start + length) for start, length in expanded.runs]
        jobs += _jobs(index, sample, visit, expanded.refs, num_tiles, settings)
        keys += [
            random.keys("drop_path", settings.seed, sample, visit, image, np.arange(ref.num_tiles))
            for image, ref in enumerate(expanded.refs)
        ]
        num_tiles += sum(ref.num_tiles for ref in expanded.refs)
        borders.append(end)
    if borders[-1] < T:
        positions[borders[-1] :] = np.arange(T - borders[-1], dtype=np.float32)
        borders.append(T)
    size = index.meta.tile_size
    batch = MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights.astype(np.float32)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.empty(num_tiles, 3, size, size),
        tile_keys=torch.from_numpy(np.concatenate(keys).view(np.int64)),
        visual_rows=torch.from_numpy(np.concatenate(rows)),
    )
    return batch, jobs


def run_deltas(v2pe: V2PESettings, seed: int, sample: int, visit: int, num_images: int) -> list[float]:
    """Return the stride δ of each image of a sample; random ones are keyed by the image, never by a rank."""
    if v2pe.mode != "random":
        return [v2pe.delta if v2pe.mode == "fixed" else 1.0] * num_images
    keys = random.keys("v2pe", seed, sample, visit, np.arange(num_images))
    return [DELTAS[i] for i in random.choice_index(keys, len(DELTAS)).tolist()]


def _jobs(
    index: Index, sample: int, visit: int, refs: list[ImageRef], first: int, settings: BatchSettings
) -> list[ImageJob]:
    """What to decode for a sample whose first tile is tile ``first`` of the microbatch."""
    degrade = settings.augment and index.datasets[int(index.samples["dataset"][sample])].augment
    jobs = []
    for image, ref in enumerate(refs):
        qualities = jpeg_qualities(settings.seed, sample, visit, image, ref.num_tiles) if degrade else None
        jobs.append(ImageJob(sample, ref, first, qualities))
        first += ref.num_tiles
    return jobs
