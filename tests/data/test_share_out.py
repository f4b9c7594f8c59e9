"""Steps given whole: every rank's part fits every other's, and what cannot be shared out is an error."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.batch import Pairs
from evovlm.data.share_out import WholePack, share_out
from evovlm.data.step_batch import StepBatch
from evovlm.parallel.layout import Layout, ParallelPlan

from .batch_support import exchange, received, sent

T, PER_TILE, SIDE = 48, 3, 2


def make_pack(seed: int, images: Sequence[int], gaps: Sequence[int] = ()) -> WholePack:
    """A pack of images of so many tiles, some rows of text before each."""
    generator = torch.Generator().manual_seed(seed)
    rows, begin = [torch.empty(0, dtype=torch.int64)], 0
    for image, tiles in enumerate(images):
        begin += gaps[image] if image < len(gaps) else 0
        rows.append(torch.arange(begin, begin + tiles * PER_TILE))
        begin += tiles * PER_TILE
    assert begin <= T
    num_tiles = sum(images)
    return WholePack(
        tokens=torch.randint(0, 9, (T,), generator=generator),
        labels=torch.randint(0, 9, (T,), generator=generator),
        weights=torch.rand(T, generator=generator),
        positions=torch.arange(T, dtype=torch.float32),
        cu_seqlens=torch.tensor([0, T], dtype=torch.int32),
        visual_rows=torch.cat(rows),
        tiles=torch.randn(num_tiles, 3, SIDE, SIDE, generator=generator),
        tile_keys=torch.randint(0, 1 << 62, (num_tiles,), generator=generator),
        image_tiles=list(images),
    )


def parallel_plan(vit_tp: int, **llm: int) -> ParallelPlan:
    layout = Layout(**llm)  # type: ignore[arg-type]
    vit = Layout(dp=layout.size // vit_tp, tp=vit_tp)
    return ParallelPlan(llm=layout, vit=vit, projector=vit)


PLANS = [
    parallel_plan(1),
    parallel_plan(1, dp=4),
    parallel_plan(2, dp=2, cp=2),
    parallel_plan(4, dp=4),
    parallel_plan(1, tp=2, pp=2),
    parallel_plan(4, pp=3, dp=4),
    parallel_plan(2, dp=2, cp=2, hp=2),
]


@st.composite
def steps(draw: st.DrawFn) -> tuple[ParallelPlan, list[WholePack]]:
    plan = draw(st.sampled_from(PLANS))
    packs = []
    for number in range(plan.llm.dp * draw(st.integers(1, 3))):
        images = draw(st.lists(st.integers(1, 4), max_size=3))
        room = T - sum(images) * PER_TILE
        packs.append(make_pack(number, images, draw(st.lists(st.integers(0, room // 3), min_size=3, max_size=3))))
    return plan, packs


def parts(packs: Sequence[WholePack], plan: ParallelPlan) -> list[StepBatch]:
    return [share_out(packs, plan, rank, PER_TILE) for rank in range(plan.size)]


@given(steps(), st.sampled_from([1, 2, 1000]))
def test_both_ends_agree_and_every_token_arrives(step: tuple[ParallelPlan, list[WholePack]], chunk_tiles: int) -> None:
    plan, packs = step
    batches = parts(packs, plan)
    dp, num_tiles = plan.llm.dp, sum(len(pack.tiles) for pack in packs)
    sends, receives = set(), set()
    for rank, batch in enumerate(batches):
        assert all(a is b for a, b in zip(batch.packs, packs[plan.llm.coordinates(rank).dp :: dp], strict=True))
        assert batch.tokens_per_tile == PER_TILE
        assert (len(batch.tiles), len(batch.tile_keys)) == (batch.routes.num_tiles[plan.vit.coordinates(rank).dp],) * 2
        sends |= set(sent(batch, plan.vit.coordinates(rank).dp))
        receives |= set(received(batch, plan.llm.coordinates(rank).dp))
    assert sends == receives
    assert sorted(use[0] for use in sends) == list(range(num_tiles))

    tiles, keys = (torch.cat([getattr(pack, name) for pack in packs]) for name in ("tiles", "tile_keys"))
    of_encoder = {plan.vit.coordinates(rank).dp: batch for rank, batch in enumerate(batches)}
    for number, encoder, slot, *_ in sends:
        assert torch.equal(of_encoder[encoder].tiles[slot], tiles[number])
        assert of_encoder[encoder].tile_keys[slot] == keys[number]

    arrived = exchange(plan, batches, T, chunk_tiles)
    for number, pack in enumerate(packs):
        expected, rows = np.full((T, 2), -1), pack.visual_rows.numpy()
        expected[rows, 0] = np.repeat(pack.tile_keys.numpy(), PER_TILE)
        expected[rows, 1] = np.tile(np.arange(PER_TILE), len(pack.tiles))
        np.testing.assert_array_equal(arrived[number % dp, number // dp], expected)


@given(steps())
def test_encoders_are_balanced(step: tuple[ParallelPlan, list[WholePack]]) -> None:
    plan, packs = step
    encoder_of = {
        number: encoder
        for rank, batch in enumerate(parts(packs, plan))
        for number, encoder, *_ in received(batch, plan.llm.coordinates(rank).dp)
    }
    load = np.bincount(list(encoder_of.values()), minlength=plan.vit.dp)
    assert load.sum() == sum(len(pack.tiles) for pack in packs)
    assert load.max() <= max(int(1.005 * load.mean()), -(-load.sum() // plan.vit.dp))


def test_no_image_anywhere() -> None:
    plan = parallel_plan(1, dp=2, cp=2)
    for batch in parts([make_pack(i, []) for i in range(4)], plan):
        assert batch.tiles.shape == (0, 3, SIDE, SIDE)
        assert batch.tile_keys.shape == (0,)
        assert sent(batch, 0) == received(batch, 0) == []
        assert batch.routes.num_tiles.tolist() == [0] * 4


def test_tiles_of_a_pack_may_fill_rows_in_any_order() -> None:
    pack = make_pack(0, [2, 1])
    moved = replace(pack, visual_rows=pack.visual_rows.reshape(3, PER_TILE)[[2, 0, 1]].flatten())
    arrived = exchange(parallel_plan(1, cp=2), parts([moved], parallel_plan(1, cp=2)), T, 1)[0, 0]
    assert arrived[: 3 * PER_TILE : PER_TILE, 0].tolist() == pack.tile_keys[[1, 2, 0]].tolist()


def of_pairs(pack: WholePack, numbers: Sequence[int]) -> WholePack:
    """The pack as one of preference pairs, told by their numbers alone."""
    none = torch.full((T,), -1)
    return replace(pack, pairs=Pairs(torch.tensor(numbers) + 7, torch.tensor(numbers), none, none))


def test_pairs_stay_with_their_packs() -> None:
    plan = parallel_plan(1, dp=2)
    packs = [of_pairs(make_pack(i, [i + 1]), numbers) for i, numbers in enumerate([(1, 2), (0,), (), (4, 3)])]
    for rank, batch in enumerate(parts(packs, plan)):
        assert all(a is b for a, b in zip(batch.packs, packs[rank::2], strict=True))
    other = make_pack(9, [])
    with pytest.raises(ValueError, match=r"3 of 4 packs are of preference pairs"):
        share_out([*packs[:3], other], plan, 0, PER_TILE)
    with pytest.raises(ValueError, match=r"4 preference pairs have 3 different numbers from 0 to 3: .* each once"):
        share_out([of_pairs(other, (0, 1)), of_pairs(other, (1, 3))], plan, 0, PER_TILE)


def test_packs_that_cannot_be_shared_out_are_errors() -> None:
    plan, pack = parallel_plan(1, dp=2), make_pack(0, [2, 1])
    with pytest.raises(ValueError, match=r"3 packs cannot be shared out over 2 data-parallel ranks"):
        share_out([pack] * 3, plan, 0, PER_TILE)
    with pytest.raises(ValueError, match=r"0 packs cannot be shared out over 2 data-parallel ranks"):
        share_out([], plan, 0, PER_TILE)
    fitting = make_pack(1, [])
    for wrong in (
        replace(pack, image_tiles=[2]),
        replace(pack, visual_rows=pack.visual_rows[:-1]),
        replace(pack, tiles=pack.tiles[:2]),
    ):
        with pytest.raises(
            ValueError, match=r"pack 1: \d tiles in images of \[.*\], and \d visual rows; a tile takes 3"
        ):
            share_out([fitting, wrong], plan, 0, PER_TILE)
    with pytest.raises(ValueError, match=r"pack 0: 3 tiles and 2 keys of drop path"):
        share_out([replace(pack, tile_keys=pack.tile_keys[:2]), fitting], plan, 0, PER_TILE)
    rows = pack.visual_rows.clone()
    rows[PER_TILE + 1] += 1
    with pytest.raises(ValueError, match=r"pack 1: visual rows of tile 1 are \[3, 5, 5\], not consecutive"):
        share_out([fitting, replace(pack, visual_rows=rows)], plan, 0, PER_TILE)
