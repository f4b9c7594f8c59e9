"""Attention of a pack over cp × hp ranks equals one process's: output and gradients, every row by itself."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.csrc.ops import packed_attention
from evovlm.parallel.attention import ShardedAttend
from evovlm.parallel.attention.heads import check_heads
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Coordinates, Layout
from evovlm.parallel.mesh import build_mesh
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.world import World

from .attend_support import Case, attend_rows, check_cases, run_cases

T = 96  # a multiple of 2·cp·hp for all layouts here


def packs(layout: Layout) -> list[tuple[int, ...]]:
    """One segment; one of a row each; borders at the ends of chunks and shards, and a row to each side; mixed sizes."""
    chunk, shard = T // (2 * layout.cp), T // (layout.cp * layout.hp)
    edges = {row + shift for step in (chunk, shard) for row in range(step, T, step) for shift in (-1, 0, 1)}
    inner: list[list[int]] = [
        [],
        list(range(1, T)),
        list(range(chunk, T, chunk)),
        sorted(row for row in edges if 0 < row < T),
        [1, 2, 3, 5, 40, 41, 44, 47, 48, 49, T - 1],
    ]
    return [(0, *rows, T) for rows in inner]


LAYOUTS = [
    *(Layout(cp=cp, dp=8 // cp) for cp in (2, 4, 8)),
    *(Layout(hp=hp, dp=8 // hp) for hp in (2, 4)),
    *(Layout(cp=8, window=window) for window in (1, 2, 4)),
    Layout(cp=4, window=2, dp=2),
    *(
        Layout(cp=cp, hp=hp, dp=8 // (cp * hp), window=window, placement=placement)
        for cp, hp, window in ((2, 2, 0), (2, 4, 0), (4, 2, 0), (4, 2, 2))
        for placement in ("head_first", "context_first")
    ),
    Layout(cp=2, hp=2, tp=2),
]
"""Each fills eight ranks."""


def test_every_layout_and_pack_on_eight_ranks() -> None:
    cases = [
        Case(layout, borders, 4, num_kv_heads)
        for number, layout in enumerate(LAYOUTS)
        for index, borders in enumerate(packs(layout))
        # All packs with other numbers of KV heads in turn: fewer than hp ranks, as many, more.
        for num_kv_heads in ((1, 2, 4)[(number + index) % 3],)
    ]
    check_cases(8, cases)


def test_kv_heads_fewer_and_more_than_ranks() -> None:
    borders = (0, 13, 48, 49, T)
    cases = [
        Case(Layout(cp=8 // hp // dp, hp=hp, dp=dp), borders, num_heads, num_kv_heads)
        for hp, dp in ((2, 1), (2, 4), (4, 1), (4, 2))
        for num_heads, num_kv_heads in ((8, 1), (8, 2), (8, 4), (8, 8), (4, 2), (12, 4))
    ]
    check_cases(8, cases)


def test_rings_whose_size_is_no_power_of_two() -> None:
    layouts = [Layout(cp=3, dp=2), Layout(cp=3, hp=2), Layout(cp=6), Layout(cp=6, window=2), Layout(cp=6, window=3)]
    check_cases(6, [Case(layout, borders, 4, 2) for layout in layouts for borders in packs(layout)])


@settings(max_examples=5)
@given(
    st.lists(
        st.builds(
            Case,
            layout=st.sampled_from([Layout(cp=4), Layout(cp=2, hp=2), Layout(hp=4), Layout(cp=4, window=2)]),
            borders=st.sets(st.integers(1, 47)).map(lambda inner: (0, *sorted(inner), 48)),
            num_kv_heads=st.sampled_from([1, 2, 4]),
            recompute=st.sampled_from(["none", "selective", "full"]),
            strided=st.booleans(),
        ),
        min_size=4,
        max_size=12,
    )
)
def test_random_packs_on_four_ranks(cases: list[Case]) -> None:
    check_cases(4, cases)


def test_recomputed_and_non_contiguous_inputs_and_narrow_dtypes() -> None:
    layouts = [Layout(cp=4), Layout(cp=2, hp=2), Layout(hp=4), Layout(cp=4, window=2)]
    borders = (0, 11, 12, 36, 37, 90, T)
    cases = [
        Case(layout, borders, 4, num_kv_heads, dtype, recompute, strided)
        for layout in layouts
        for num_kv_heads in (1, 4)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for recompute, strided in (("none", True), ("selective", False), ("full", False))
    ]
    tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
    check_cases(4, cases, lambda case: tolerances[case.dtype])


def test_a_double_ring_computes_what_one_ring_does() -> None:
    borders = (0, 5, 60, T)
    one, *others = run_cases(4, [Case(Layout(cp=4, window=window), borders) for window in (0, 1, 2, 4)])
    for other in others:
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    # A window of all ranks is one ring, to the bit.
    assert all(torch.equal(x, y) for x, y in zip(one, others[-1], strict=True))


def test_outer_hops_may_have_a_group_of_their_own() -> None:
    case = Case(Layout(cp=4, window=2), (0, 5, 60, T))

    def job(world: World) -> bool:
        mesh = build_mesh(case.layout, world.rank, "cpu")
        outer = [dist.new_group([start, start + 2]) for start in (0, 1)][world.rank % 2]
        shared, own = (
            attend_rows(replace(mesh, groups=mesh.groups | extra), case) for extra in ({}, {"cp_outer": outer})
        )
        return all(torch.equal(x, y) for x, y in zip(shared, own, strict=True))

    assert all(run_ranks(4, job))


def test_one_rank_is_packed_attention() -> None:
    attend = ShardedAttend([0, 5, 12], SequenceShards(12), Coordinates(0, 0, 0, 0, 0), {})
    q, k, v = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    assert torch.equal(attend(0, q, k, v), packed_attention(q, k, v, [0, 5, 12]))
    assert attend.num_pairs == 5 * 6 // 2 + 7 * 8 // 2


def test_work_of_all_ranks_is_the_causal_pairs_of_the_segments() -> None:
    """Nothing masked is computed; one long segment costs all ranks the same."""

    def job(world: World) -> list[int]:
        mesh = build_mesh(Layout(cp=4, window=2), world.rank, "cpu")
        shards = SequenceShards(T, cp=4)
        packs = ([0, T], [0, 5, 60, T], list(range(T + 1)))
        return [ShardedAttend(borders, shards, mesh.place, mesh.groups, window=2).num_pairs for borders in packs]

    long, mixed, tiny = zip(*run_ranks(4, job), strict=True)
    assert set(long) == {T * (T + 1) // 2 // 4}
    assert sum(mixed) == sum(n * (n + 1) // 2 for n in (5, 55, 36))
    assert sum(tiny) == T


def test_impossible_requests_are_explained() -> None:
    place, shards = Coordinates(0, 0, 0, 0, 0), SequenceShards(12)
    with pytest.raises(ValueError, match="must reach from 0 to 12, got 0 … 11"):
        ShardedAttend([0, 11], shards, place, {})
    with pytest.raises(ValueError, match="no hp process group"):
        ShardedAttend([0, 12], SequenceShards(12, hp=2), place, {})
    with pytest.raises(ValueError, match="window = 3 does not divide cp = 4"):
        ShardedAttend([0, 16], SequenceShards(16, cp=4), place, {}, window=3)
    with pytest.raises(ValueError, match=r"hp = 4 does not divide A = 6 .* \[1, 2, 3, 6\]"):
        check_heads(6, 6, 4)
    with pytest.raises(ValueError, match=r"K = 6 KV heads .* hp = 4 ranks"):
        check_heads(12, 6, 4)
    attend = ShardedAttend([0, 12], shards, place, {})
    with pytest.raises(ValueError, match=r"got 11 queries, 11 keys and 11 values; .* holds 12 of the pack's T = 12"):
        attend(0, *(torch.zeros(11, 2, 8) for _ in range(3)))
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32, torch.float32 and torch.float64"):
        attend(0, torch.zeros(12, 2, 8), torch.zeros(12, 2, 8), torch.zeros(12, 2, 8).double())


def test_a_group_of_another_axis_is_refused() -> None:
    def job(world: World) -> str:
        mesh = build_mesh(Layout(cp=2, dp=2), world.rank, "cpu")
        try:
            ShardedAttend([0, 8], SequenceShards(8, cp=2), mesh.place, {"cp": mesh.groups["dp"]})
        except ValueError as error:
            return str(error)
        return ""

    # Ranks 1 (cp 1 of dp 0) and 2 (cp 0 of dp 1) stand elsewhere in that group; 0 and 3 cannot know.
    assert run_ranks(4, job) == [
        "",
        "this rank is number 1 of cp = 2, but number 0 of 2 in that group",
        "this rank is number 0 of cp = 2, but number 1 of 2 in that group",
        "",
    ]
