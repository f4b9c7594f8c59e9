"""Who encodes what: every tile once, encoders equally loaded, homes beside the packs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.order import Sequential
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.parallel.balance import balance_images

MakeIndex = Callable[..., Any]
G = 8


def make_index_of_images(make_index: MakeIndex, seed: int) -> Any:
    """Text, and samples of up to five images of up to nine tiles."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, 40)
    tiles = np.where(images > 0, images + rng.integers(0, 9, 40), 0)
    return make_index(
        {"name": "text", "tokens": rng.integers(1, 64, 20)},
        {"name": "chart", "tokens": rng.integers(1, 64, 40), "tiles": tiles, "images": images},
    )


def plan_of(index: Any, layout: DataLayout, step: int = 0) -> StepPlan:
    settings = PlanSettings(seed=1, pack_tokens=128, pack_tiles=24, packs_per_step=G, window=16)
    return Planner(index, Sequential(index), settings).plan_step(step, layout)


def images_of(index: Any, plan: StepPlan) -> list[tuple[int, int]]:
    """(pack, tiles) of every image of a step, read off the index one by one."""
    listed = []
    for number, pack in enumerate(plan.packs):
        for sample in pack.samples.tolist():
            first, count = (int(index.samples[name][sample]) for name in ("first_image", "num_images"))
            listed += [(number, int(index.images["num_tiles"][image])) for image in range(first, first + count)]
    return listed


@pytest.mark.parametrize("step", [0, 1])
@given(
    seed=st.integers(0, 2**32), ranks=st.sampled_from([1, 2, 4, 8]), encoders=st.sampled_from([0, 1, 2, 3, 4, 8, 16])
)
def test_images_of_a_plan(make_index: MakeIndex, step: int, seed: int, ranks: int, encoders: int) -> None:
    index = make_index_of_images(make_index, seed)
    layout = DataLayout(ranks, G // ranks, encoders)
    plan = plan_of(index, layout, step)
    images = images_of(index, plan)
    assert plan.image_tiles.tolist() == [tiles for _, tiles in images]
    assert sum(plan.image_tiles.tolist()) == plan.num_tiles
    pieces = plan.pieces
    assert {array.dtype for array in (plan.image_tiles, plan.assignment, *vars(pieces).values())} == {np.dtype("<i4")}
    for image, tiles in enumerate(plan.image_tiles.tolist()):  # every tile of every image in one piece
        mine = pieces.image == image
        ends = np.cumsum(pieces.tiles[mine])
        assert pieces.first[mine].tolist() == [0, *ends.tolist()][: mine.sum()]
        assert ends[-1] == tiles

    count = encoders or ranks
    assert layout.encoders == plan.num_encoders == count
    rank_of = {int(number): rank for rank, row in enumerate(plan.assignment) for number in row}
    beside = max(1, count // ranks)
    home = np.array([rank_of[n] * count // ranks + i % beside for i, (n, _) in enumerate(images)], np.int32)
    expected = balance_images(plan.image_tiles, count, home)
    assert [vars(pieces)[name].tolist() for name in ("image", "encoder")] == [
        vars(expected)[name].tolist() for name in ("image", "encoder")
    ]
    assert plan.vit_load.tolist() == [int(pieces.tiles[pieces.encoder == e].sum()) for e in range(count)]
    assert plan.vit_load.max(initial=0) == expected.largest
    assert plan.digest() == plan_of(index, layout, step).digest()
    assert sorted(plan.vit_load) == sorted(plan_of(index, DataLayout(1, G, count), step).vit_load)


@pytest.mark.parametrize(
    ("layout", "homes"),
    [
        (DataLayout(4, 2), [0, 1, 2, 3]),  # encoders beside the ranks
        (DataLayout(4, 2, 8), [0, 3, 4, 7]),  # two beside each, in turn
        (DataLayout(4, 2, 2), [0, 0, 1, 1]),  # one for two of them
        (DataLayout(4, 2, 4, 2), [0, 0, 1, 1]),  # the first of two stages: ranks 0 to 3 of 8, encoders of two ranks
        (DataLayout(4, 2, 8, 2), [0, 1, 2, 3]),
    ],
)
def test_homes_lie_beside_the_first_stage(layout: DataLayout, homes: list[int]) -> None:
    assert layout.home(np.arange(4)).tolist() == homes


def test_digests_tell_encoders_apart(make_index: MakeIndex) -> None:
    index = make_index_of_images(make_index, 0)
    digests = {plan_of(index, DataLayout(2, 4, encoders)).digest() for encoders in (1, 2, 3, 4)}
    assert len(digests) == 4
    assert plan_of(index, DataLayout(2, 4)).digest() in digests  # as many encoders as ranks


def test_a_step_without_images(make_index: MakeIndex) -> None:
    plan = plan_of(make_index({"name": "text", "tokens": [5, 9, 64]}), DataLayout(2, 4, 3))
    assert plan.image_tiles.shape == plan.pieces.image.shape == (0,)
    assert plan.num_tiles == 0
