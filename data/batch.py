"""Turns a planned pack into tensors: tokens, shifted labels, loss weights, V2PE positions, and the rows of its images.

    pack      │ sample 0        │ sample 1     │ padding │      T = pack_tokens, always
    tokens    │ a <img> v v v b │ c d e        │ p p p p │
    labels    │ . .     . . b . │ d e .        │ . . . . │      target of each row; the last row of a sample has none
    positions │ 0 1     … …   … │ 0 1 2        │ 0 1 2 3 │      restart in every segment
    cu_seqlens 0                 6              9         13

    visual rows  ▲ ▲ ▲ ◄── visual tokens of image 0, from whoever encodes it (``step_batch.py``)

A preference pair is a sample that ``cu_seqlens`` cuts in three (``branches.py``).
Nothing here depends on ranks: random numbers are keyed by (seed, sample, visit, image).
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evovlm.csrc import random
from evovlm.csrc.ops import v2pe_positions
from evovlm.data.branches import Pairs, Span, borders, no_prefixes, pair_targets, prefixes, restart
from evovlm.data.index import Index
from evovlm.data.packs import Pack
from evovlm.data.sample import IGNORE, expand_sample, read_part
from evovlm.data.step_plan import LossWeighting, loss_weights
from evovlm.models.v2pe import DELTAS

__all__ = ["BatchSettings", "MicroBatch", "Pairs", "V2PESettings", "build_microbatch", "run_deltas"]


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
    """One pack as CPU tensors, whole, before any split over ranks; T tokens, S segments (padding included).

    Attributes:
        tokens: int64 [T], ``<IMG_CONTEXT>`` at visual rows, ``<|endoftext|>`` as padding.
        labels: int64 [T], already shifted: the target of each row, -100 where there is none.
        weights: float32 [T], loss weight of each row's target, 0 where there is none. 1 in pairs: their losses are of
            whole answers.
        positions: float32 [T], restarting in every segment. Never cast them down: fractions would be lost.
        cu_seqlens: int32 [S + 1], segment borders from 0 to T; padding is one last segment, a pair three. Stays on the
            CPU.
        visual_rows: int64 [n · tokens per tile], rows of T that visual tokens fill, tile by tile.
        prefixes: int32 [n, 4], (query start, query end, key start, key end): these rows see all of these keys, besides
            what they see of their own segment. Ascending, never overlapping. Stays on the CPU.
        pairs: the preference pairs; None in a pack of another index. Stays on the CPU, too.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    visual_rows: Tensor
    prefixes: Tensor = field(default_factory=no_prefixes, kw_only=True)
    pairs: Pairs | None = field(default=None, kw_only=True)


def build_microbatch(index: Index, pack: Pack, settings: BatchSettings, *, first_segment: int = 0) -> MicroBatch:
    """Make the tensors of a pack.

    Args:
        index: the index that the pack was planned from.
        pack: the samples.
        settings: see ``BatchSettings``.
        first_segment: segments of the step before this pack, for ``Pairs.numbers``.

    Raises:
        ValueError: a sample is not what its row in the index says.
    """
    T = settings.pack_tokens
    tokens = np.full(T, settings.padding, np.int64)
    labels = np.full(T, IGNORE, np.int64)
    weights = np.zeros(T, np.float64)
    ends = [0]
    runs: list[tuple[int, int]] = []  # first row in the pack and length
    deltas: list[float] = []
    rows = [np.empty(0, np.int64)]
    spans: list[Span] = []
    columns = (pack.samples, pack.visits, pack.begins, pack.lengths)
    for sample, visit, first, length in zip(*(column.tolist() for column in columns), strict=True):
        whole = length == index.samples["num_tokens"][sample]
        begin, end = ends[-1], ends[-1] + length
        if end > T:
            raise ValueError(f"sample '{index.name(sample)}' ends at token {end} of a pack of {T}")
        if whole:
            expanded = expand_sample(index, sample, image_context=settings.image_context)
        else:
            expanded = read_part(index, sample, first, length)
        tokens[begin:end] = expanded.tokens
        labels[begin:end] = expanded.labels
        supervised = expanded.labels != IGNORE
        count, planned = int(supervised.sum()), int(index.samples["num_supervised"][sample])
        if whole and count != planned:
            raise ValueError(
                f"sample '{index.name(sample)}' has {count} targets, but the index says {planned}: rebuild the index"
            )
        weight = loss_weights(count, settings.loss_weighting) if expanded.branches is None else 1.0
        weights[begin:end] = np.where(supervised, weight, 0.0)
        deltas += run_deltas(settings.v2pe, settings.seed, sample, visit, len(expanded.runs))
        runs += [(begin + start, count) for start, count in expanded.runs]
        rows += [np.arange(begin + start, begin + start + count) for start, count in expanded.runs]
        if expanded.branches is not None:
            chosen, rejected = expanded.branches
            spans.append(Span(begin, begin + chosen, begin + rejected, end))
        ends.append(end)
    run_table = torch.tensor(runs, dtype=torch.int64).view(-1, 2)
    strides = torch.tensor(deltas, dtype=torch.float64)
    positions = v2pe_positions(borders(ends, (), T), run_table, strides, T)
    restart(positions, spans)
    of_pairs = index.meta.kind == "preference"
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights.astype(np.float32)),
        positions=positions,
        cu_seqlens=borders(ends, spans, T),
        visual_rows=torch.from_numpy(np.concatenate(rows)),
        prefixes=prefixes(spans),
        pairs=pair_targets(spans, pack.samples, first_segment, labels != IGNORE) if of_pairs else None,
    )


def run_deltas(v2pe: V2PESettings, seed: int, sample: int, visit: int, num_images: int) -> list[float]:
    """Return the stride δ of each image of a sample; random ones are keyed by the image, never by a rank."""
    if v2pe.mode != "random":
        return [v2pe.delta if v2pe.mode == "fixed" else 1.0] * num_images
    keys = random.keys("v2pe", seed, sample, visit, np.arange(num_images))
    return [DELTAS[i] for i in random.choice_index(keys, len(DELTAS)).tolist()]
