"""The plan of one step: its packs, where each goes, who encodes its images, and what the loss is divided by.

packs       0  1  2  3                the same under every layout
            │
assignment  rank 0: 0 3               [ranks, microbatches]
            rank 1: 1 2
images      a b c d e f               each whole on one encoder, encoders equally loaded
W = Σ n·w(n) over the step's samples  the loss of the step is Σ w·CE / W
"""

import hashlib
import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LossWeighting = Literal["token", "sample", "square"]
"""How much a target of a sample with n targets weighs: 1, 1/n or 1/√n (spec §3.5)."""


@dataclass(frozen=True)
class DataLayout:
    """How the packs and images of a step are spread.

    Attributes:
        num_ranks: data-parallel ranks of the LLM.
        num_microbatches: packs that each of them trains on, one after another, in a step.
        num_encoders: data-parallel ranks of the ViT; 0 means as many as of the LLM.
    """

    num_ranks: int
    num_microbatches: int
    num_encoders: int = 0

    @property
    def encoders(self) -> int:
        """Data-parallel ranks of the ViT."""
        return self.num_encoders or self.num_ranks


@dataclass(frozen=True, eq=False)
class Pack:
    """One LLM sequence; without samples it is nothing but padding.

    Attributes:
        samples: int64 [S], rows of the index, one segment each, in this order.
        visits: int64 [S], how often each was drawn before in the run.
        num_tokens: tokens without padding.
        num_tiles: tiles of all samples.
        num_supervised: targets of the loss.
    """

    samples: NDArray[np.int64]
    visits: NDArray[np.int64]
    num_tokens: int
    num_tiles: int
    num_supervised: int


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Everything about a step that ranks must agree on.

    Attributes:
        step: counted from 0.
        epoch: that of the first pack.
        packs: the packs of the step, the same under every layout.
        assignment: int32 [R, M], the pack of each data-parallel rank and microbatch.
        image_tiles: int32 [images], tiles of each image; images in the order of packs, of samples in a pack, of
            images in a sample.
        encoder_rank: int32 [images], the data-parallel rank of the ViT that encodes each image.
        loss_denominator: W = Σ n·w(n) over all samples; the step's loss is Σ w·CE / W.
        num_samples: segments.
        num_tokens: LLM tokens without padding.
        num_tiles: tiles.
        num_visual_tokens: tokens made of tiles.
        num_supervised: targets.
    """

    step: int
    epoch: int
    packs: tuple[Pack, ...]
    assignment: NDArray[np.int32]
    image_tiles: NDArray[np.int32]
    encoder_rank: NDArray[np.int32]
    loss_denominator: float
    num_samples: int
    num_tokens: int
    num_tiles: int
    num_visual_tokens: int
    num_supervised: int

    def digest(self) -> str:
        """Hash of all that the plan says, 32 hex digits; equal on every rank, process and platform."""
        state = hashlib.blake2b(digest_size=16)
        numbers = [self.step, self.epoch, len(self.packs), *self.assignment.shape]
        for p in self.packs:
            numbers += [len(p.samples), p.num_tokens, p.num_tiles, p.num_supervised]
        arrays = [array for p in self.packs for array in (p.samples, p.visits)]
        for array in (np.array(numbers), *arrays, self.assignment, self.image_tiles, self.encoder_rank):
            state.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        state.update(self.loss_denominator.hex().encode())
        return state.hexdigest()


def loss_weights(num_supervised: ArrayLike, weighting: LossWeighting) -> NDArray[np.float64]:
    """Weight of each target of a sample with n targets: 1, 1/n or 1/√n; 0 if n is 0 (spec §3.5).

    Args:
        num_supervised: integers of any shape, n of each sample.
        weighting: "token", "sample" or "square".
    """
    n = np.asarray(num_supervised, dtype=np.float64)
    safe = np.maximum(n, 1.0)
    weights = {"token": np.ones_like(safe), "sample": 1.0 / safe, "square": 1.0 / np.sqrt(safe)}[weighting]
    return np.where(n > 0, weights, 0.0)


def assign(costs: list[int], layout: DataLayout) -> NDArray[np.int32]:
    """Share packs out so that ranks have equal work, and packs of one microbatch cost alike on all ranks.

    Packs go out in rounds, dearest first; in each round the rank with the least work so far takes the dearest pack
    (longest processing time first, one pack per rank and round). Round m is microbatch m, so ranks that meet in a
    collective in every microbatch wait little for each other.

    Args:
        costs: integer cost of each pack.
        layout: ranks R and microbatches M; R · M packs.

    Returns:
        int32 [R, M], the pack of each rank and microbatch.
    """
    assignment = np.empty((layout.num_ranks, layout.num_microbatches), np.int32)
    dearest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    load = [0] * layout.num_ranks
    for m in range(layout.num_microbatches):
        least_first = sorted(range(layout.num_ranks), key=lambda r: (load[r], r))
        for i, rank in enumerate(least_first):
            number = dearest_first[m * layout.num_ranks + i]
            assignment[rank, m] = number
            load[rank] += costs[number]
    return assignment


def assign_images(num_tiles: NDArray[np.int32], home: NDArray[np.int32], num_encoders: int) -> NDArray[np.int32]:
    """Share images out over encoders so that these have equally many tiles.

    The largest image goes first, each to the encoder with the fewest tiles so far (longest processing time first).
    Among equals, an image stays where the pack is that it belongs to, and its visual tokens need not travel.

    Args:
        num_tiles: int32 [images], tiles of each image.
        home: int32 [images], the encoder beside each image's pack.
        num_encoders: encoders.

    Returns:
        int32 [images], the encoder of each image.
    """
    load = [0] * num_encoders
    least = [(0, encoder) for encoder in range(num_encoders)]
    chosen = np.empty(len(num_tiles), np.int32)
    for image in np.argsort(-num_tiles.astype(np.int64), kind="stable").tolist():
        while least[0][0] != load[least[0][1]]:
            heapq.heappop(least)  # from before that encoder was given more
        encoder = int(home[image])
        if load[encoder] != least[0][0]:
            encoder = least[0][1]
        load[encoder] += int(num_tiles[image])
        heapq.heappush(least, (load[encoder], encoder))
        chosen[image] = encoder
    return chosen
