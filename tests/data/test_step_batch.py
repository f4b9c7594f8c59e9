"""A rank's part of a step: each tile decoded on one encoder, both ends of its way agreed, the layout of no matter."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evovlm.csrc import random
from evovlm.data.batch import BatchSettings, V2PESettings, build_microbatch
from evovlm.data.images import jpeg_qualities, load_tiles
from evovlm.data.index import Index
from evovlm.data.loader import LoaderSettings
from evovlm.data.step_batch import StepBatch, build_step
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.parallel.layout import Layout, ParallelPlan

from .batch_support import (
    SEED,
    TILE,
    TOKENS_PER_TILE,
    G,
    T,
    Use,
    equal,
    exchange,
    in_order,
    load_ranks,
    make_planner,
    received,
    sent,
)

LAYOUTS = [(1, 1), (2, 2), (8, 8), (2, 4), (4, 2), (1, 8), (8, 1), (4, 3), (2, 16)]
"""Data-parallel ranks of the LLM, and encoders."""


def data_layout(ranks: int, encoders: int) -> DataLayout:
    return DataLayout(ranks, G // ranks, encoders)


def settings_of(tokenizer: Tokenizer) -> BatchSettings:
    return BatchSettings(SEED, T, "square", tokenizer.image_context, tokenizer.end_of_text, V2PESettings(), True)


def expected_tiles(index: Index, plan: StepPlan, augment: bool) -> list[list[tuple[Tensor, int]]]:
    """(pixels, key of drop path) of every tile of every pack, decoded here and now."""
    packs = []
    for pack in plan.packs:
        tiles: list[tuple[Tensor, int]] = []
        for sample, visit in zip(pack.samples.tolist(), pack.visits.tolist(), strict=True):
            degraded = augment and index.name(sample).startswith("chart/")
            for image, ref in enumerate(index.image_refs(sample)):
                qualities = jpeg_qualities(SEED, sample, visit, image, ref.num_tiles) if degraded else None
                pixels = torch.from_numpy(load_tiles(ref, TILE, "clip", qualities))
                keys = [random.key("drop_path", SEED, sample, visit, image, tile) for tile in range(ref.num_tiles)]
                tiles += zip(pixels, keys, strict=True)
        packs.append(tiles)
    return packs


def all_uses(batches: list[StepBatch], layout: DataLayout) -> list[Use]:
    """Every use of a tile in a step; senders and receivers must say the same, and every slot be used once."""
    sends = [use for e in range(layout.encoders) for use in sent(batches[e], e)]
    receives = [use for r in range(layout.num_ranks) for use in received(batches[r], r)]
    assert sorted(sends) == sorted(receives)
    slots = sorted((encoder, slot) for _, encoder, slot, *_ in sends)
    assert slots == [(e, slot) for e in range(layout.encoders) for slot in range(len(batches[e].tiles))]
    for i, batch in enumerate(batches):
        assert batch.routes.num_tiles.dtype == np.int64
        assert batch.routes.num_tiles.tolist() == [len(batches[e].tiles) for e in range(layout.encoders)]
        # A rank beyond the encoders, or beyond the data-parallel ranks, says what the first of its kind says.
        assert sent(batch, i % layout.encoders) == sent(batches[i % layout.encoders], i % layout.encoders)
        assert received(batch, i % layout.num_ranks) == received(batches[i % layout.num_ranks], i % layout.num_ranks)
    return sorted(sends)


@pytest.mark.parametrize(("ranks", "encoders"), LAYOUTS)
@pytest.mark.parametrize("augment", [True, False])
def test_tiles_keys_and_rows_of_every_pack(
    index: Index, tokenizer: Tokenizer, ranks: int, encoders: int, augment: bool
) -> None:
    """Through the routes every pack finds its tiles, in order, under every layout; nothing else is made."""
    layout, settings = data_layout(ranks, encoders), LoaderSettings(normalization="clip")
    plan, batches = load_ranks(index, tokenizer, layout, 1, augment=augment, settings=settings)
    packs, expected = in_order(plan, batches), expected_tiles(index, plan, augment)
    assert sum(map(len, expected)) == plan.num_tiles > 20
    uses = all_uses(batches, layout)
    assert [use[0] for use in uses] == list(range(plan.num_tiles))  # tiles are numbered in the order of packs
    for number, (pack, tiles) in enumerate(zip(packs, expected, strict=True)):
        ((rank, microbatch),) = np.argwhere(plan.assignment == number).tolist()
        assert {use[3:5] for use in uses[: len(tiles)]} <= {(rank, microbatch)}
        rows = [row + i for *_, row in uses[: len(tiles)] for i in range(TOKENS_PER_TILE)]
        assert pack.visual_rows.tolist() == rows
        for (_, encoder, slot, *_), (pixels, key) in zip(uses[: len(tiles)], tiles, strict=True):
            batch = batches[encoder]
            assert torch.equal(batch.tiles[slot], pixels)
            assert int(batch.tile_keys[slot]) % 2**64 == key
        uses = uses[len(tiles) :]
    keys = [key for tiles in expected for _, key in tiles]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("step", [0, 4])
def test_packs_do_not_depend_on_the_layout(index: Index, tokenizer: Tokenizer, step: int) -> None:
    v2pe = V2PESettings(mode="random")
    expected = None
    for ranks, encoders in LAYOUTS:
        plan, batches = load_ranks(index, tokenizer, data_layout(ranks, encoders), step, v2pe=v2pe)
        packs = in_order(plan, batches)
        expected = expected or packs
        assert all(equal(a, b) for a, b in zip(packs, expected, strict=True))


def test_each_piece_is_on_the_encoder_of_the_plan(index: Index, tokenizer: Tokenizer) -> None:
    for ranks, encoders in LAYOUTS:
        layout = data_layout(ranks, encoders)
        plan = make_planner(index).plan_step(2, layout)
        of_tile = dict(enumerate(np.repeat(plan.pieces.encoder, plan.pieces.tiles).tolist()))
        for encoder in range(layout.encoders):
            batch, jobs = build_step(index, plan, settings_of(tokenizer), data_rank=0, encoder=encoder)
            assert {number for number, e in of_tile.items() if e == encoder} == set(batch.routes.sends.number.tolist())
            assert (batch.tiles.dtype, batch.tiles.shape[1:]) == (torch.float32, (3, TILE, TILE))
            assert (batch.tile_keys.dtype, len(batch.tile_keys)) == (torch.int64, len(batch.tiles))
            filled = sorted((job.slot, job.slot + job.end - job.begin) for job in jobs)
            assert [a for a, _ in filled] + [len(batch.tiles)] == [0, *(b for _, b in filled)]  # no gap, no overlap


RUNS: dict[str, tuple[dict[str, int], int]] = {
    "alone": ({}, 1),
    "data parallel": ({"dp": 4}, 1),
    "ring, encoders of two": ({"dp": 2, "cp": 4}, 2),
    "heads and tensors": ({"hp": 2, "tp": 2, "dp": 2}, 1),
    "three stages, encoders of four": ({"pp": 3, "dp": 4}, 4),
    "one encoder": ({"dp": 8}, 8),
    "everything": ({"pp": 2, "dp": 2, "cp": 2, "hp": 2, "tp": 2}, 4),
}
"""Layout of the LLM, and tensor-parallel ranks of an encoder."""


def parallel_plan(llm: dict[str, int], vit_tp: int) -> ParallelPlan:
    layout = Layout(**llm)  # type: ignore[arg-type]
    vit = Layout(dp=layout.size // vit_tp, tp=vit_tp)
    return ParallelPlan(llm=layout, vit=vit, projector=vit)


def world_batches(index: Index, plan: StepPlan, tokenizer: Tokenizer, parallel: ParallelPlan) -> list[StepBatch]:
    """The batch of every rank of a run, not decoded."""
    return [
        build_step(
            index,
            plan,
            settings_of(tokenizer),
            data_rank=parallel.llm.coordinates(rank).dp,
            encoder=parallel.vit.coordinates(rank).dp,
        )[0]
        for rank in range(parallel.size)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_the_exchange_brings_every_token_to_its_row(index: Index, tokenizer: Tokenizer, name: str) -> None:
    parallel = parallel_plan(*RUNS[name])
    for (step, chunk_tiles), pack_tiles in itertools.product([(0, 2), (3, 1000)], [12, 0]):
        planner = make_planner(index, pack_tiles=pack_tiles)  # no tiles: samples with an image are left out
        plan = planner.plan_step(step, data_layout(parallel.llm.dp, parallel.vit.dp))
        assert (plan.num_tiles == 0) == (pack_tiles == 0)
        batches = world_batches(index, plan, tokenizer, parallel)
        packs = exchange(parallel, batches, T, chunk_tiles)
        for rank, row in enumerate(plan.assignment.tolist()):
            for microbatch, number in enumerate(row):
                pack, expected = plan.packs[number], np.full((T, 2), -1)
                keys = [
                    random.key("drop_path", SEED, sample, visit, image, tile)
                    for sample, visit in zip(pack.samples.tolist(), pack.visits.tolist(), strict=True)
                    for image, ref in enumerate(index.image_refs(sample))
                    for tile in range(ref.num_tiles)
                ]
                rows = build_microbatch(index, pack, settings_of(tokenizer)).visual_rows.numpy()
                expected[rows, 0] = np.repeat(np.array(keys, np.uint64).view(np.int64), TOKENS_PER_TILE)
                expected[rows, 1] = np.tile(np.arange(TOKENS_PER_TILE), len(keys))
                np.testing.assert_array_equal(packs[rank, microbatch], expected)


def assert_nothing_travels(batch: StepBatch, encoders: int) -> None:
    assert sent(batch, 0) == received(batch, 0) == []
    assert (batch.routes.num_tiles.dtype, batch.routes.num_tiles.tolist()) == (np.int64, [0] * encoders)
    assert (batch.tile_keys.dtype, batch.tile_keys.shape) == (torch.int64, (0,))


def test_a_step_without_images(index: Index, tokenizer: Tokenizer) -> None:
    layout = DataLayout(2, 4, 3)
    plan, batches = load_ranks(index, tokenizer, layout, planner=make_planner(index, pack_tiles=0))
    assert plan.num_samples > 8
    for batch in batches:
        assert_nothing_travels(batch, 3)
        assert batch.tiles.shape == (0, 3, TILE, TILE)
        assert all(pack.visual_rows.shape == (0,) for pack in batch.packs)


def test_a_step_of_a_model_without_an_encoder(index: Index, tokenizer: Tokenizer) -> None:
    plan = make_planner(index, pack_tiles=0).plan_step(0, DataLayout(1, G))
    packs = [build_microbatch(index, pack, settings_of(tokenizer)) for pack in plan.packs]
    batch = StepBatch.of_text(packs)
    assert batch.packs is packs
    assert len(batch.tiles) == 0
    assert_nothing_travels(batch, 0)


def test_a_sample_that_another_rank_trains_on_is_not_read(index: Index, tokenizer: Tokenizer) -> None:
    """An encoder needs the places of images in other ranks' packs, and no token of them."""
    plan = make_planner(index).plan_step(0, DataLayout(8, 1, 2))
    blind: Any = Index.open(index.path)
    read: list[int] = []
    blind.tokens = lambda sample: (read.append(sample), index.tokens(sample))[1]
    build_step(blind, plan, settings_of(tokenizer), data_rank=3, encoder=1)
    assert sorted(read) == sorted(plan.packs[int(plan.assignment[3, 0])].samples.tolist())
