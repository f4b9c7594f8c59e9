"""Routes of the vision exchange: all ranks' plans, carried out in one process, bring every token to its row."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.routes import ExchangePlan, plan_exchange
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.traffic import TileUses, traffic

EMPTY = -1


def make_plan(llm: Layout, vit_tp: int = 1) -> ParallelPlan:
    return ParallelPlan(
        llm=llm, vit=Layout(dp=llm.size // vit_tp, tp=vit_tp), projector=Layout(dp=llm.size // vit_tp, tp=vit_tp)
    )


def make_uses(plan: ParallelPlan, packs: list[tuple[int, int, list[int]]], draw: Callable[[int, int], int]) -> TileUses:
    """Tiles at given rows of packs (dp, microbatch, rows); ``draw(low, high)`` picks encoders and tiles used again."""
    tiles: list[tuple[int, int]] = []
    count = [0] * plan.vit.dp
    uses: list[tuple[int, int, int, int, int]] = []
    for dp, microbatch, rows in packs:
        for row in rows:
            if tiles and draw(0, 3) == 0:
                encoder, slot = tiles[draw(0, len(tiles) - 1)]
            else:
                encoder = draw(0, plan.vit.dp - 1)
                slot, count[encoder] = count[encoder], count[encoder] + 1
                tiles.append((encoder, slot))
            uses.append((encoder, slot, dp, microbatch, row))
    columns = np.array(uses, dtype=np.int64).reshape(-1, 5).T
    return TileUses(*columns, num_tiles=np.array(count))


@st.composite
def steps(draw: st.DrawFn) -> tuple[ParallelPlan, SequenceShards, TileUses, int, int]:
    axis = st.sampled_from((1, 1, 2, 3))
    llm = Layout(
        pp=draw(st.sampled_from((1, 2))), dp=draw(axis), cp=draw(axis), hp=draw(axis), tp=draw(st.sampled_from((1, 2))),
        placement=draw(st.sampled_from(("head_first", "context_first"))),
    )  # fmt: skip
    plan = make_plan(llm, draw(st.sampled_from([tp for tp in (1, 2, 3, 4) if llm.size % tp == 0])))
    tokens = draw(st.integers(1, 6))
    num_rows = 2 * llm.sequence_ranks * draw(st.integers(1, 4))
    packs = []
    for dp, microbatch in product(range(llm.dp), range(draw(st.integers(1, 3)))):
        rows, begin = [], draw(st.integers(0, num_rows))
        while begin + tokens <= num_rows:
            rows.append(begin)
            begin += tokens + draw(st.integers(0, 5))
        packs.append((dp, microbatch, draw(st.permutations(rows))))
    uses = make_uses(plan, packs, lambda low, high: draw(st.integers(low, high)))
    return plan, SequenceShards.of(llm, num_rows), uses, tokens, draw(st.sampled_from((1, 2, 3, 1000)))


def all_ranks(
    plan: ParallelPlan, shards: SequenceShards, uses: TileUses, tokens: int, chunk: int
) -> list[ExchangePlan]:
    return [plan_exchange(uses.routes(plan, r), plan, r, shards, tokens, chunk) for r in range(plan.size)]


@given(steps())
def test_every_visual_row_is_filled_once_with_its_token(step: Any) -> None:
    plan, shards, uses, tokens, chunk_tiles = step
    exchanges = all_ranks(*step)
    first = np.cumsum(uses.num_tiles) - uses.num_tiles
    received: list[list[Any]] = [[] for _ in range(plan.size)]
    returned = np.zeros((int(uses.num_tiles.sum()), tokens))  # how often each token went out
    moved = 0
    num_chunks = len(exchanges[0].chunks)
    assert num_chunks == max(1, -(-int(uses.num_tiles.max()) // chunk_tiles))
    assert all(len(e.chunks) == num_chunks for e in exchanges)
    handed = []
    for k in range(num_chunks):
        parts = []
        for rank, e in enumerate(exchanges):
            chunk, encoder = e.chunks[k], plan.vit.coordinates(rank).dp
            tiles = first[encoder] + np.array(chunk.slots, dtype=np.int64)[list(chunk.tiles)]
            handed += tiles.tolist()
            rows = (tiles[:, None] * tokens + np.arange(tokens)).ravel()  # the token's number stands for its value
            assert len(rows) == chunk.num_rows
            parts.append(np.split(rows[chunk.send_rows], np.cumsum(chunk.send_splits)[:-1]))
            np.add.at(returned.reshape(-1), rows[chunk.send_rows], 1)
        for rank, e in enumerate(exchanges):
            assert [len(parts[source][rank]) for source in range(plan.size)] == e.chunks[k].recv_splits.tolist()
            received[rank] += [parts[source][rank] for source in range(plan.size)]
            moved += sum(len(parts[source][rank]) for source in range(plan.size) if source != rank)
    assert sorted(handed) == list(range(int(uses.num_tiles.sum())))  # tp ranks share tiles without overlap

    num_microbatches = int(uses.microbatch.max(initial=0)) + 1
    packs = np.full((plan.llm.dp, num_microbatches, shards.num_rows), EMPTY)
    for encoder, slot, dp, microbatch, row in zip(
        uses.encoder, uses.slot, uses.dp, uses.microbatch, uses.row, strict=True
    ):
        packs[dp, microbatch, row : row + tokens] = (first[encoder] + slot) * tokens + np.arange(tokens)
    for rank, e in enumerate(exchanges):
        place, arrived = plan.llm.coordinates(rank), np.concatenate(received[rank])
        if place.pp:
            assert len(arrived) == len(e.rows) == 0
            continue
        assert sorted(e.sources) == list(range(len(arrived)))  # nothing arrives in vain
        for microbatch in range(num_microbatches + 1):
            rows, sources = e.of_microbatch(microbatch)
            if microbatch == num_microbatches:
                assert len(rows) == len(sources) == 0
                continue
            assert (np.diff(rows) > 0).all()
            local = np.full(shards.num_rows // plan.llm.sequence_ranks, EMPTY)
            local[rows] = arrived[sources]
            np.testing.assert_array_equal(local, packs[place.dp, microbatch][shards.rows(place)])
    times_used = np.zeros(len(returned), dtype=np.int64)
    np.add.at(times_used, first[uses.encoder] + uses.slot, 1)
    np.testing.assert_array_equal(returned, np.repeat(times_used[:, None], tokens, 1))
    home = np.zeros_like(uses.row)
    assert traffic(uses, home, plan, shards, tokens, chunk_tiles, 10).moved == moved * 10


@given(steps(), st.integers(0, 2**32 - 1))
def test_traffic_equals_counting_token_by_token(step: Any, seed: int) -> None:
    plan, shards, uses, tokens, chunk_tiles = step
    home = np.random.default_rng(seed).integers(0, plan.size, len(uses.row))
    owners = {
        (place.dp, int(row)): rank
        for rank in range(plan.size)
        if (place := plan.llm.coordinates(rank)).pp == 0
        for row in shards.rows(place)
    }
    once, moved, twice = set(), 0, 0
    for use in range(len(uses.row)):
        encoder, slot = int(uses.encoder[use]), int(uses.slot[use])
        left = min(int(uses.num_tiles[encoder]) - slot // chunk_tiles * chunk_tiles, chunk_tiles)
        shares = [range(left * t // plan.vit.tp, left * (t + 1) // plan.vit.tp) for t in range(plan.vit.tp)]
        (holder,) = (encoder * plan.vit.tp + t for t, share in enumerate(shares) if slot % chunk_tiles in share)
        for token in range(tokens):
            owner = owners[int(uses.dp[use]), int(uses.row[use]) + token]
            moved += holder != owner
            twice += int(holder != home[use]) + int(home[use] != owner)
            if holder != owner:
                once.add((encoder, slot, token, owner))
    bytes_ = traffic(uses, home, plan, shards, tokens, chunk_tiles, 4)
    all_gather = int(uses.num_tiles.sum()) * tokens * (plan.size - 1)
    assert bytes_.moved == 4 * moved
    assert bytes_.lower_bound == 4 * len(once)
    assert bytes_.all_gather == 4 * all_gather
    assert bytes_.two_exchange == 4 * twice


def test_a_tile_twice_on_one_rank_moves_twice_and_that_is_the_only_excess() -> None:
    plan = make_plan(Layout(dp=2))
    two = np.array([0, 0])
    uses = TileUses(two, two, np.array([1, 1]), two, np.array([0, 4]), num_tiles=np.array([1, 0]))
    counted = traffic(uses, two, plan, SequenceShards(8), 4, 1, 1)
    assert (counted.moved, counted.lower_bound) == (8, 4)


PLAN = make_plan(Layout(dp=2, cp=2))
SHARDS = SequenceShards.of(PLAN.llm, 32)
# Two tiles of encoder 0 go to pack (dp 0, microbatch 0) and pack (dp 1, microbatch 1); rank 0 receives the first.
USES = TileUses(*(np.array(x) for x in ([0, 0], [0, 1], [0, 1], [0, 1], [3, 9], [2, 0, 0, 0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": [0, 2]}, r"tile use 1 has slot 2 of encoder 0; it must be in \[0, 2\)"),
        ({"slot": [0, -1]}, r"tile use 1 has slot -1 of encoder 0"),
        ({"dp": [0, 2]}, r"tile use 1 has dp 2; it must be in \[0, 2\)"),
        ({"microbatch": [0, -1]}, r"tile use 1 has microbatch -1"),
        ({"row": [3, 29]}, r"tile use 1 takes rows \[29, 33\) of microbatch 1; a pack has T = 32"),
        ({"row": [-1, 9]}, r"tile use 0 takes rows \[-1, 3\) of microbatch 0"),
        ({"dp": [0, 0], "microbatch": [0, 0], "row": [3, 6]}, r"uses 0 and 1 share rows of microbatch 0.* 3 and 6"),
        ({"num_tiles": [2, 0]}, r"tiles of 2 encoders are given; vit.dp = 4"),
    ],
)
def test_numbers_that_do_not_fit_are_named(change: dict[str, list[int]], message: str) -> None:
    uses = replace(USES, **{name: np.array(values) for name, values in change.items()})
    with pytest.raises(ValueError, match=message):
        plan_exchange(uses.routes(PLAN, 0), PLAN, 0, SHARDS, 4, 2)


def test_receivers_check_too() -> None:
    routes = USES.routes(PLAN, 1)
    for name, values, message in (
        ("encoder", [4], r"tile use 0 has encoder 4; it must be in \[0, 4\)"),
        ("slot", [2], r"tile use 0 has slot 2 of encoder 0"),
        ("row", [30], r"takes rows \[30, 34\)"),
    ):
        broken = replace(routes, receives=replace(routes.receives, **{name: np.array(values)}))
        with pytest.raises(ValueError, match=message):
            plan_exchange(broken, PLAN, 1, SHARDS, 4, 2)
    twice = replace(routes.receives, **{f: np.array([0, 0]) for f in ("encoder", "slot", "number", "microbatch")})
    with pytest.raises(ValueError, match="2 tile uses have number 0"):
        plan_exchange(replace(routes, receives=replace(twice, row=np.array([0, 4]))), PLAN, 1, SHARDS, 4, 2)


def test_settings_that_do_not_fit_are_named() -> None:
    routes = USES.routes(PLAN, 0)
    with pytest.raises(ValueError, match="chunk_tiles = 0; it must be at least 1"):
        plan_exchange(routes, PLAN, 0, SHARDS, 4, 0)
    with pytest.raises(ValueError, match="rank 4 is not one of the plan's 4 ranks"):
        plan_exchange(routes, PLAN, 4, SHARDS, 4, 2)
    with pytest.raises(ValueError, match=r"split over cp, hp, tp = 1, 1, 1, but the LLM's layout has 2, 1, 1"):
        plan_exchange(routes, PLAN, 0, SequenceShards(32), 4, 2)
