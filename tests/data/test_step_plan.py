"""Who encodes an image: one encoder each, encoders equally loaded, and nothing moves that need not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.order import Sequential
from evovlm.data.plan import DataLayout, Planner, PlanSettings, StepPlan
from evovlm.data.step_plan import assign_images

MakeIndex = Callable[..., Any]
G = 8

sizes = st.lists(st.integers(0, 13), max_size=60)


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Tiles of images, their homes, and the number of encoders."""
    num_tiles, encoders = draw(sizes), draw(st.integers(1, 9))
    home = draw(st.lists(st.integers(0, encoders - 1), min_size=len(num_tiles), max_size=len(num_tiles)))
    return np.array(num_tiles, np.int32), np.array(home, np.int32), encoders


def loads(num_tiles: np.ndarray, chosen: np.ndarray, encoders: int) -> list[int]:
    return [int(num_tiles[chosen == e].sum()) for e in range(encoders)]


@given(steps())
def test_encoders_are_as_equally_loaded_as_whole_images_allow(step: tuple[np.ndarray, np.ndarray, int]) -> None:
    num_tiles, home, encoders = step
    chosen = assign_images(num_tiles, home, encoders)
    assert (chosen.dtype, chosen.shape) == (np.int32, num_tiles.shape)
    assert set(chosen.tolist()) <= set(range(encoders))
    load, largest = loads(num_tiles, chosen, encoders), int(num_tiles.max(initial=0))
    assert max(load) <= sum(load) / encoders + largest
    assert max(load) - min(load) <= largest  # the last image of the fullest found it no fuller than the emptiest


@given(steps())
def test_largest_first_and_home_where_home_is_no_fuller(step: tuple[np.ndarray, np.ndarray, int]) -> None:
    num_tiles, home, encoders = step
    load = [0] * encoders
    expected = [-1] * len(num_tiles)
    for image in sorted(range(len(num_tiles)), key=lambda i: (-num_tiles[i], i)):
        at_home = load[home[image]] == min(load)
        expected[image] = int(home[image]) if at_home else load.index(min(load))
        load[expected[image]] += int(num_tiles[image])
    assert assign_images(num_tiles, home, encoders).tolist() == expected


@given(steps(), st.randoms(use_true_random=False))
def test_how_packs_are_assigned_decides_homes_but_no_load(
    step: tuple[np.ndarray, np.ndarray, int], random: Any
) -> None:
    num_tiles, home, encoders = step
    other = np.array([random.randrange(encoders) for _ in home], np.int32)
    one, two = (sorted(loads(num_tiles, assign_images(num_tiles, h, encoders), encoders)) for h in (home, other))
    assert one == two


def test_images_stay_where_their_pack_is_when_that_is_balanced() -> None:
    home = np.array([2, 0, 1, 1, 2, 0, 0, 1, 2], np.int32)
    tiles = np.array([9, 9, 9, 4, 4, 4, 1, 1, 1], np.int32)
    assert assign_images(tiles, home, 3).tolist() == home.tolist()
    assert assign_images(tiles, np.zeros(9, np.int32), 3).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


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
            row = index.samples[sample]
            first, count = int(row["first_image"]), int(row["num_images"])
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
    assert plan.image_tiles.dtype == plan.encoder_rank.dtype == plan.assignment.dtype == np.int32

    count = encoders or ranks
    assert layout.encoders == count
    rank_of = {int(number): rank for rank, row in enumerate(plan.assignment) for number in row}
    home = np.array([rank_of[number] * count // ranks for number, _ in images], np.int32)
    assert plan.encoder_rank.tolist() == assign_images(plan.image_tiles, home, count).tolist()
    assert plan.digest() == plan_of(index, layout, step).digest()
    whole = plan_of(index, DataLayout(1, G, count), step)
    assert sorted(loads(plan.image_tiles, plan.encoder_rank, count)) == sorted(
        loads(whole.image_tiles, whole.encoder_rank, count)
    )


def test_digests_tell_encoders_apart(make_index: MakeIndex) -> None:
    index = make_index_of_images(make_index, 0)
    digests = {plan_of(index, DataLayout(2, 4, encoders)).digest() for encoders in (1, 2, 3, 4)}
    assert len(digests) == 4
    assert plan_of(index, DataLayout(2, 4)).digest() in digests  # as many encoders as ranks


def test_a_step_without_images(make_index: MakeIndex) -> None:
    plan = plan_of(make_index({"name": "text", "tokens": [5, 9, 64]}), DataLayout(2, 4, 3))
    assert plan.image_tiles.shape == plan.encoder_rank.shape == (0,)
    assert plan.num_tiles == 0
