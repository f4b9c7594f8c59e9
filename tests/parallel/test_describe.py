"""Who holds what, read back from the text."""

import pytest
from hypothesis import given, settings

from evovlm.parallel.describe import WIDTH, describe_plan, groups_of
from evovlm.parallel.layout import AXES, Layout, ParallelPlan

from .strategies import layouts, plans


def table(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[lines.index("") + 1 : lines.index("groups of ranks") - 1]


def numbers(cell: str) -> set[int]:
    """The numbers that ``0-3,6`` stands for."""
    found: set[int] = set()
    for run in cell.split(","):
        first, _, last = run.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@settings(max_examples=50)
@given(plans())
def test_table_says_where_every_rank_stands(plan: ParallelPlan) -> None:
    text = describe_plan(plan, ranks_per_node=4)
    head, *lines = table(text)
    assert head.split() == ["rank", "node", "|", "llm:", *AXES, "|", "vit:", "dp", "tp", "|", "projector:", "dp", "tp"]
    covered: set[int] = set()
    for line in lines:
        (ranks, node), llm, vit, projector = ([numbers(cell) for cell in part.split()] for part in line.split("|"))
        covered |= ranks
        assert node == {rank // 4 for rank in ranks}
        assert len(ranks) == 1 or plan.size > 32
        for name, axes, cells in (
            ("llm", AXES, llm),
            ("vit", ("dp", "tp"), vit),
            ("projector", ("dp", "tp"), projector),
        ):
            places = [plan.layouts[name].coordinates(rank) for rank in ranks]
            assert cells == [{getattr(place, axis) for place in places} for axis in axes]
    assert covered == set(range(plan.size))
    assert max(map(len, text.splitlines())) <= WIDTH


@given(layouts())
def test_groups_differ_along_one_axis(layout: Layout) -> None:
    for axis in AXES:
        groups = groups_of(layout, axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
        for group in groups:
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(place, axis) for place in places] == list(range(getattr(layout, axis)))
            assert len({tuple(getattr(place, other) for other in AXES if other != axis) for place in places}) == 1
    for axis, size in (("shard", layout.shard_size), ("replicate", layout.data_ranks // layout.shard_size)):
        groups = groups_of(layout, axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
        assert {len(group) for group in groups} == {size}
        for group in groups:
            assert len({(layout.coordinates(rank).pp, layout.coordinates(rank).tp) for rank in group}) == 1


def test_text_of_a_small_plan() -> None:
    plan = ParallelPlan(vit=Layout(dp=4), projector=Layout(dp=4, shard=2), llm=Layout(pp=2, tp=2, zero=1))
    assert describe_plan(plan, ranks_per_node=2).splitlines() == [
        "4 ranks on 2 nodes",
        "  vit        dp4·zero3",
        "  projector  dp4·zero3/2",
        "  llm        pp2·tp2·zero1",
        "",
        "rank  node | llm: pp  dp  cp  hp  tp | vit: dp  tp | projector: dp  tp",
        "   0     0 |       0   0   0   0   0 |       0   0 |             0   0",
        "   1     0 |       0   0   0   0   1 |       1   0 |             1   0",
        "   2     1 |       1   0   0   0   0 |       2   0 |             2   0",
        "   3     1 |       1   0   0   0   1 |       3   0 |             3   0",
        "",
        "groups of ranks",
        "  vit dp: 1 group of 4, each with packs or tiles of its own",
        "      0-3",
        "  projector dp: 1 group of 4, each with packs or tiles of its own",
        "      0-3",
        "  projector shard: 2 groups of 2, one copy of weights, gradients and optimizer state",
        "      0,1 | 2,3",
        "  projector replicate: 2 groups of 2, the same part of different copies",
        "      0,2 | 1,3",
        "  llm pp: 2 groups of 2, stages of one pipeline",
        "      0,2 | 1,3",
        "  llm tp: 2 groups of 2, columns and rows of the same weights",
        "      0,1 | 2,3",
    ]


def test_large_worlds_stay_short() -> None:
    plan = ParallelPlan.for_llm(Layout(pp=4, dp=8, cp=2, hp=4, tp=4, shard=16))
    text = describe_plan(plan)
    lines = text.splitlines()
    assert len(lines) < 70
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "1024 ranks on 128 nodes"
    assert "… 96 more nodes" in lines
    assert table(text)[-1].split()[:7] == ["1016-1023", "127", "|", "3", "7", "1", "2-3"]
    assert "  llm shard: 64 groups of 16, one copy of weights, gradients and optimizer state" in lines
    assert any(line.startswith("      0,4,…,60 | 1,5,…,61 |") and line.endswith("| …") for line in lines)


def test_one_rank() -> None:
    text = describe_plan(ParallelPlan.for_llm(Layout()))
    assert text.startswith("1 rank on 1 node\n")
    assert text.endswith("groups of ranks")
    with pytest.raises(ValueError, match="ranks_per_node = 0"):
        describe_plan(ParallelPlan.for_llm(Layout()), ranks_per_node=0)
