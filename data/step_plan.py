"""The plan of one step: its packs, where each goes, who encodes its images, and what the loss is divided by.

packs       0  1  2  3                the same under every layout
            │
assignment  rank 0: 0 3               [ranks, microbatches]
            rank 1: 1 2
pieces      a b c d d e f             images, whole unless one alone is too much for an encoder
            │
encoder     0 1 1 0 1 0 0             encoders equally loaded
W = Σ n·w(n) over the step's samples  the loss of the step is Σ w·CE / W
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evovlm.data.order import PlanIndex
from evovlm.data.packs import Packs

LossWeighting = Literal["token", "sample", "square"]
"""How much a target of a sample with n targets weighs: 1, 1/n or 1/√n (spec §3.5)."""


@dataclass(frozen=True)
class DataLayout:
    """How the packs and images of a step are spread.

    Attributes:
        num_ranks: data-parallel ranks of the LLM.
        num_microbatches: packs that each of them trains on, one after another, in a step.
        num_encoders: data-parallel ranks of the ViT; 0 means as many as of the LLM.
        num_stages: pipeline stages of the LLM; visual tokens go to ranks of the first.
        node_encoders: data-parallel ranks of the ViT on one node; 0: all.
    """

    num_ranks: int
    num_microbatches: int
    num_encoders: int = 0
    num_stages: int = 1
    node_encoders: int = 0

    @property
    def encoders(self) -> int:
        """Data-parallel ranks of the ViT."""
        return self.num_encoders or self.num_ranks

    def home(self, rank: NDArray[Any]) -> NDArray[np.int32]:
        """An encoder for each image that lies beside the rank that holds the image's pack.

        Args:
            rank: integers [images], the data-parallel rank of each image's pack. Where several encoders lie beside
                it, its images take them in turn.

        Returns:
            int32 [images].
        """
        first = rank.astype(np.int64) * self.encoders // (self.num_ranks * self.num_stages)
        beside = max(1, self.encoders // (self.num_ranks * self.num_stages))
        home: NDArray[np.int32] = (first + np.arange(len(rank)) % beside).astype(np.int32)
        return home


@dataclass(frozen=True, eq=False)
class Pieces:
    """What each encoder encodes: images, whole or in parts.

    Attributes:
        image: int32 [P], the image among those of the step.
        first: int32 [P], first tile in the image; 0 unless the image is split.
        tiles: int32 [P], tiles of the piece.
        encoder: int32 [P], the data-parallel rank of the ViT that encodes it.
    """

    image: NDArray[np.int32]
    first: NDArray[np.int32]
    tiles: NDArray[np.int32]
    encoder: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Everything about a step that ranks must agree on.

    Attributes:
        step: counted from 0.
        epoch: that of the first pack.
        packs: the packs of the step, the same under every layout.
        pack_costs: int64 [G], work of the LLM for each pack, in units of the cost model.
        assignment: int32 [R, M], the pack of each data-parallel rank and microbatch.
        image_tiles: int32 [images], tiles of each image; images in the order of packs, of samples in a pack, of
            images in a sample.
        pieces: what each encoder encodes, in the order of images.
        num_encoders: data-parallel ranks of the ViT.
        supervised: int64 [S], targets of each segment.
        loss_denominator: W = Σ n·w(n) over all segments; the step's loss is Σ w·CE / W.
        outliers: int64, samples whose cost alone is more than the mean cost of a rank.
        num_tokens: LLM tokens without padding.
        num_tiles: tiles.
        num_visual_tokens: tokens made of tiles.
        num_chosen: targets of the chosen answers of preference pairs; 0 without pairs.
    """

    step: int
    epoch: int
    packs: Packs
    pack_costs: NDArray[np.int64]
    assignment: NDArray[np.int32]
    image_tiles: NDArray[np.int32]
    pieces: Pieces
    num_encoders: int
    supervised: NDArray[np.int64]
    loss_denominator: float
    outliers: NDArray[np.int64]
    num_tokens: int
    num_tiles: int
    num_visual_tokens: int
    num_chosen: int = 0

    @property
    def num_samples(self) -> int:
        """Segments of the step."""
        return len(self.packs.samples)

    @property
    def num_supervised(self) -> int:
        """Targets of the step."""
        return int(self.supervised.sum())

    @property
    def llm_load(self) -> NDArray[np.int64]:
        """int64 [R], cost of each data-parallel rank of the LLM."""
        load: NDArray[np.int64] = self.pack_costs[self.assignment].sum(axis=1)
        return load

    @property
    def vit_load(self) -> NDArray[np.int64]:
        """int64 [encoders], tiles of each."""
        load = np.bincount(self.pieces.encoder, weights=self.pieces.tiles, minlength=self.num_encoders)
        return load.astype(np.int64)

    def digest(self) -> str:
        """Hash of all that the plan says, 32 hex digits; equal on every rank, process and platform."""
        state = hashlib.blake2b(digest_size=16)
        p, pieces = self.packs, self.pieces
        numbers = np.array([self.step, self.epoch, len(p), *self.assignment.shape, self.num_encoders])
        arrays = [p.samples, p.visits, p.begins, p.lengths, p.tiles, p.starts, self.supervised]
        if self.num_chosen:  # without pairs, lengths say it all
            arrays += [p.squares, np.array([self.num_chosen])]
        pieces_arrays = (pieces.image, pieces.first, pieces.tiles, pieces.encoder)
        for array in (numbers, *arrays, self.assignment, self.image_tiles, *pieces_arrays):
            state.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        state.update(self.loss_denominator.hex().encode())
        return state.hexdigest()


def describe_outliers(plan: StepPlan, index: PlanIndex, cp: int) -> str:
    """Say which samples cost more than a rank's share of their step.

    Args:
        plan: a step with outliers.
        index: the index that it was planned from.
        cp: context-parallel ranks of the LLM, which share a sample's rows.
    """
    sample = int(plan.outliers[0])
    remedy = f"its rows are spread over cp = {cp} ranks" if cp > 1 else "[parallel.llm] cp = 2 would share it"
    return (
        f"samples that cost more than the mean rank: {len(plan.outliers)}, such as '{index.name(sample)}' of "
        f"{index.samples['num_tokens'][sample]} tokens; {remedy}"
    )


def imbalance(load: NDArray[np.int64]) -> float:
    """Largest load of a rank over the mean, 1 if there is none."""
    return float(load.max() / load.mean()) if load.any() else 1.0


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
