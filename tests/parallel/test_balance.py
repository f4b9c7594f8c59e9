"""Balance: nothing lost, loads as stated, between the proven bound and plain references; the optimum by search."""

import heapq
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.csrc import _plan
from evovlm.parallel.balance import ImageBalance, balance_images, balance_packs

Longs = NDArray[np.int64]


def best_possible(costs: list[int], ranks: int, most: int) -> int:
    """Least largest load of all ways to give every item to a rank, at most ``most`` items on each, by search."""
    costs = sorted(costs, reverse=True)
    load, held, best = [0] * ranks, [0] * ranks, math.inf

    def place(i: int) -> None:
        nonlocal best
        if i == len(costs):
            best = max(load)
            return
        tried = set()
        for r in range(ranks):
            state = (load[r], held[r])
            if held[r] == most or state in tried or load[r] + costs[i] >= best:
                continue
            tried.add(state)
            load[r], held[r] = load[r] + costs[i], held[r] + 1
            place(i + 1)
            load[r], held[r] = state

    place(0)
    return int(best)


def longest_first(costs: list[int], ranks: int, most: int) -> int:
    """Largest load when each item, dearest first, goes to the rank with least to do that has room."""
    waiting, largest = [(0, r, 0) for r in range(ranks)], 0
    for cost in sorted(costs, reverse=True):
        load, r, held = heapq.heappop(waiting)
        largest = max(largest, load + cost)
        if held + 1 < most:
            heapq.heappush(waiting, (load + cost, r, held + 1))
    return largest


def longest_first_in_rounds(costs: list[int], ranks: int) -> int:
    """The same when nobody gets a second pack before all have a first, and so on."""
    load = [0] * ranks
    dearest = sorted(costs, reverse=True)
    for begin in range(0, len(costs), ranks):
        load = [a + b for a, b in zip(sorted(load), dearest[begin : begin + ranks], strict=True)]
    return max(load)


@st.composite
def pack_problems(draw: st.DrawFn, most: int = 200) -> tuple[Longs, Longs, int, int]:
    """Costs, tokens, ranks, microbatches."""
    ranks = draw(st.integers(1, min(most, 40)))
    microbatches = draw(st.integers(1, most // ranks))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    highest = draw(st.sampled_from([0, 1, 10, 1000, 10**12]))
    costs = draw(st.sampled_from([0, 5, 10**6])) + rng.integers(0, highest + 1, ranks * microbatches)
    return costs, rng.integers(0, 100, len(costs)), ranks, microbatches


@st.composite
def image_problems(draw: st.DrawFn, most: int = 150) -> tuple[NDArray[np.int32], int, NDArray[np.int32], int]:
    """Tiles, encoders, homes, node size."""
    encoders = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(0, most))
    tiles = rng.integers(1, draw(st.sampled_from([1, 2, 13, 300])) + 1, size).astype(np.int32)
    return tiles, encoders, rng.integers(0, encoders, size).astype(np.int32), draw(st.integers(0, 9))


@given(pack_problems())
@settings(deadline=None, derandomize=True, max_examples=300)
@example((np.array([3, 1, 4, 1]), np.arange(4), 1, 4))
@example((np.array([7]), np.array([0]), 1, 1))
def test_every_pack_goes_to_one_place_and_loads_are_as_stated(problem: tuple[Longs, Longs, int, int]) -> None:
    costs, tokens, ranks, microbatches = problem
    found = balance_packs(costs, ranks, microbatches, tokens)
    assert found.assignment.dtype == np.int32
    assert found.assignment.shape == (ranks, microbatches)
    assert sorted(found.assignment.ravel().tolist()) == list(range(len(costs)))
    loads = costs[found.assignment].sum(1)
    assert found.largest == loads.max()
    assert max(-(-int(costs.sum()) // ranks), int(costs.max())) <= found.bound <= found.largest
    assert found.largest <= longest_first_in_rounds(costs.tolist(), ranks)
    assert (np.diff(costs[found.assignment], axis=1) <= 0).all()  # dearest first: microbatches alike on all ranks
    again = balance_packs(costs, ranks, microbatches, tokens)
    assert (again.assignment == found.assignment).all()


@given(pack_problems())
@settings(deadline=None, derandomize=True)
def test_tokens_come_second(problem: tuple[Longs, Longs, int, int]) -> None:
    costs, tokens, ranks, microbatches = problem
    without, found = balance_packs(costs, ranks, microbatches), balance_packs(costs, ranks, microbatches, tokens)
    assert found.bound == without.bound
    assert found.largest <= without.largest
    assert (costs[found.assignment].max(0) <= costs[without.assignment].max(0)).all()  # nor is a microbatch dearer
    squares = [int((tokens[way.assignment].sum(1) ** 2).sum()) for way in (without, found)]
    assert squares[1] <= squares[0]


def test_tokens_are_equal_where_costs_leave_the_choice() -> None:
    tokens = np.arange(64)
    assert np.ptp(tokens[balance_packs(np.full(64, 9), 8, 8).assignment].sum(1)) > 50
    assert np.ptp(tokens[balance_packs(np.full(64, 9), 8, 8, tokens).assignment].sum(1)) <= 2


@given(pack_problems(most=10))
@settings(deadline=None, derandomize=True, max_examples=300)
@example((np.array([9, 9, 9, 1, 1, 1]), np.arange(6), 2, 3))
def test_packs_against_the_optimum(problem: tuple[Longs, Longs, int, int]) -> None:
    costs, _, ranks, microbatches = problem
    found, optimum = balance_packs(costs, ranks, microbatches), best_possible(costs.tolist(), ranks, microbatches)
    assert found.bound <= optimum <= found.largest <= optimum * 1.15
    if microbatches <= 2:
        assert found.bound == found.largest


def test_swaps_reach_what_longest_first_does_not() -> None:
    costs = [57, 56, 27, 27, 24, 23, 19, 18, 18, 12, 11, 1]
    assert longest_first_in_rounds(costs, 3) == 109
    found = balance_packs(costs, 3, 4)
    assert (found.largest, found.bound) == (98, 98)


def test_microbatches_stay_as_alike_as_they_can_be() -> None:
    rng = np.random.default_rng(3)
    costs = 10**6 + rng.integers(0, 10**5, 64 * 8)
    found = balance_packs(costs, 64, 8)
    assert found.largest <= 1.0001 * found.bound
    # However packs are shared out, some microbatch outside of any m has one of the 64·m + 1 dearest packs.
    least, random = np.sort(costs)[::-1][::64].sum(), costs.reshape(64, 8).max(0).sum()
    assert least <= costs[found.assignment].max(0).sum() <= 1.002 * least < 0.98 * random


def test_packs_bound_sees_outliers_and_divisors() -> None:
    # One pack of 100 needs three others, of 10 at least; the mean is 32.5.
    assert balance_packs([100] + [10] * 7, 2, 4).bound == 130
    # Three packs of 100 on two ranks: two of them meet.
    assert balance_packs([100] * 3 + [1] * 5, 2, 4).bound == 202
    # Two dear packs are on two ranks, with the four cheapest at best: (200 + 60) / 2; the mean is 117.
    assert balance_packs([100, 100, 0, *[20] * 3, *[30] * 3], 3, 3).bound == 130
    # Loads are 40 plus multiples of 6: the mean of 49 cannot be had.
    assert balance_packs([10, 10, 16, 10, 16, 16, 10, 10], 2, 4).bound == 52


def test_a_large_step_is_balanced_to_a_thousandth() -> None:
    rng = np.random.default_rng(0)
    costs = 10**9 + rng.integers(0, 3 * 10**8, 512 * 8)
    found = balance_packs(costs, 512, 8)
    assert found.largest <= 1.001 * found.bound
    tiles = rng.integers(1, 14, 512 * 40).astype(np.int32)
    images = balance_images(tiles, 512)
    assert images.largest == images.bound == -(-int(tiles.sum()) // 512)


def check_pieces(found: ImageBalance, tiles: NDArray[np.int32], encoders: int) -> Longs:
    """Every tile once, loads as stated, sorted; returns the loads."""
    order = list(zip(found.image.tolist(), found.first.tolist(), strict=True))
    assert order == sorted(order)
    assert all(a.dtype == np.int32 for a in (found.image, found.first, found.tiles, found.encoder))
    covered = [(i, f + t) for i, f, n in zip(found.image, found.first, found.tiles, strict=True) for t in range(n)]
    assert covered == [(i, t) for i, n in enumerate(tiles) for t in range(n)]
    if len(found.tiles):
        assert found.tiles.min() >= 1
        assert found.encoder.min() >= 0
    loads = np.bincount(found.encoder, found.tiles, minlength=encoders).astype(np.int64)
    assert len(loads) == encoders
    assert found.largest == loads.max()
    return loads


def limit_of(tiles: NDArray[np.int32], encoders: int, tolerance: Fraction) -> int:
    mean = Fraction(int(tiles.sum()), encoders)
    return max(math.floor((1 + tolerance) * mean), math.ceil(mean))


@given(image_problems())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_images_are_cut_only_where_they_must(
    problem: tuple[NDArray[np.int32], int, NDArray[np.int32], int],
) -> None:
    tiles, encoders, _, _ = problem
    whole, found = balance_images(tiles, encoders, split=False), balance_images(tiles, encoders)
    check_pieces(whole, tiles, encoders)
    check_pieces(found, tiles, encoders)
    assert whole.image.tolist() == list(range(len(tiles)))
    assert whole.bound <= whole.largest <= longest_first(tiles.tolist(), encoders, len(tiles) + 1)
    limit = limit_of(tiles, encoders, Fraction(5, 1000))
    assert found.bound <= found.largest <= limit or found.largest == whole.largest <= limit
    if whole.largest <= limit:
        assert (found.encoder == whole.encoder).all()
    cut = [i for i, n in Counter(found.image.tolist()).items() if n > 1]
    assert len(cut) <= encoders - 1  # one encoder at least is not overloaded; each other one needs a cut image or none
    for i in cut:
        assert len(set(found.encoder[found.image == i].tolist())) == (found.image == i).sum()


@given(image_problems(most=9))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_images_against_the_optimum(problem: tuple[NDArray[np.int32], int, NDArray[np.int32], int]) -> None:
    tiles, encoders, _, _ = problem
    found, optimum = balance_images(tiles, encoders, split=False), best_possible(tiles.tolist(), encoders, 9)
    assert found.bound <= optimum <= found.largest <= optimum * 1.15


@given(image_problems(), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_staying_home_is_free_and_as_frequent_as_it_can_be(
    problem: tuple[NDArray[np.int32], int, NDArray[np.int32], int], split: bool
) -> None:
    tiles, encoders, home, node_size = problem
    without = balance_images(tiles, encoders, split=split)
    found = balance_images(tiles, encoders, home, node_size, split=split)
    loads = check_pieces(found, tiles, encoders)
    assert (loads == check_pieces(without, tiles, encoders)).all()
    assert (found.largest, found.bound, without.home_tiles) == (without.largest, without.bound, 0)
    assert (found.image == without.image).all()
    node = np.arange(encoders) // (node_size or encoders)
    wanted = home[found.image]
    assert found.home_tiles == found.tiles[found.encoder == wanted].sum()
    assert found.node_tiles == found.tiles[node[found.encoder] == node[wanted]].sum()
    whole = np.bincount(found.image, minlength=len(tiles))[found.image] == 1
    for size in set(found.tiles[whole].tolist()):
        same = whole & (found.tiles == size)
        for place in (lambda e: e, lambda e: node[e]):
            had, sought = Counter(place(without.encoder[same]).tolist()), Counter(place(wanted[same]).tolist())
            assert (place(found.encoder[same]) == place(wanted[same])).sum() == (had & sought).total()


def test_an_image_larger_than_the_mean_is_cut() -> None:
    found = balance_images([100], 8)
    assert (found.tiles.max(), found.tiles.min(), found.largest, found.bound) == (13, 9, 13, 13)
    assert sorted(found.encoder.tolist()) == list(range(8))
    whole = balance_images([100, 3], 8, split=False)
    assert (whole.largest, whole.bound, len(whole.image)) == (100, 100, 2)


def test_tolerance_decides_whether_an_image_is_cut() -> None:
    tiles = [7, 7, 7, 7, 1]  # 29 tiles on 3 encoders: whole images leave 14 somewhere
    assert balance_images(tiles, 3, tolerance=0.5).largest == 14
    found = balance_images(tiles, 3)
    assert found.largest == 10
    assert len(set(found.image[found.first > 0].tolist())) == 1
    # (1 + 0.1) · 10 is 11 exactly; in floats it is above.
    assert balance_images([11, 9], 2, tolerance=0.1).image.tolist() == [0, 1]


@pytest.mark.parametrize("encoders", [1, 5])
def test_steps_without_images(encoders: int) -> None:
    found = balance_images([], encoders, [])
    assert (len(found.image), found.largest, found.bound, found.home_tiles) == (0, 0, 0, 0)


def test_wrong_packs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"costs of shape \[5\]: 2 ranks x 3 microbatches need 6 packs"):
        balance_packs([1] * 5, 2, 3)
    with pytest.raises(ValueError, match="costs: pack 1 has -4, which is below 0"):
        balance_packs([1, -4], 2, 1)
    with pytest.raises(ValueError, match=r"tokens of shape \[1\]"):
        balance_packs([1, 4], 2, 1, [3])
    with pytest.raises(ValueError, match="costs must be integers, got float64"):
        balance_packs([1.0, 4.0], 2, 1)
    with pytest.raises(ValueError, match="0 ranks and 1 microbatches"):
        balance_packs([], 0, 1)
    with pytest.raises(ValueError, match="use a larger unit"):
        balance_packs([1 << 60] * 5, 5, 1)
    with pytest.raises(ValueError, match="use a larger unit"):
        balance_packs([1 << 61], 1, 1)
    assert balance_packs([1 << 60] * 4, 2, 2).largest == 1 << 61
    with pytest.raises(ValueError, match="ranks x microbatches numbers"):
        _plan.balance_packs(np.zeros(3, np.int64), 2, 2, np.empty(0, np.int64))


def test_wrong_images_are_errors() -> None:
    with pytest.raises(ValueError, match="image 1 has 0 tiles; an image has 1 to 1048576"):
        balance_images([3, 0], 2)
    with pytest.raises(ValueError, match="image 0: home 2; encoders are 0 to 1"):
        balance_images([3], 2, [2])
    with pytest.raises(ValueError, match="1 homes of 2 images"):
        balance_images([3, 4], 2, [0])
    with pytest.raises(ValueError, match="0 encoders"):
        balance_images([3], 0)
    with pytest.raises(ValueError, match="tolerance -1"):
        balance_images([3], 1, tolerance=-1)
    with pytest.raises(ValueError, match="tiles must be integers"):
        balance_images([1.5], 1)
    with pytest.raises(ValueError, match="do not fit into int32"):
        balance_images([1 << 40], 1)
    with pytest.raises(ValueError, match="a vector is needed"):
        balance_images([[1]], 1)
    with pytest.raises(ValueError, match="vectors of one length"):
        _plan.balance_images(np.ones(3, np.int32), 2, np.zeros(1, np.int32), 1, 5, False)
