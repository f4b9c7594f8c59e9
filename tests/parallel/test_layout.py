"""Layouts: what divides what, where a rank stands, and the meshes that come of it."""

from collections import Counter
from itertools import product

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import AXES, Coordinates, Layout, ParallelPlan, divisors
from evovlm.parallel.mesh import build_meshes
from evovlm.parallel.world import World

from .strategies import layouts, plans


def test_all_data_ranks_shard_by_default() -> None:
    assert Layout(dp=4).shard_size == 4
    assert Layout(dp=4, shard=2).shard_size == 2
    assert Layout(dp=6, shard=1).shard_size == 1
    assert Layout(pp=2, dp=2, cp=3, hp=2, tp=4).shard_size == 12  # dp · cp · hp, neither stages nor tp


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"dp": 0}, "dp = 0; every axis needs at least one rank"),
        ({"cp": -2}, "cp = -2"),
        ({"dp": 6, "shard": 4}, r"shard = 4 does not divide dp = 6; it can be one of \[1, 2, 3, 6\]"),
        ({"dp": 2, "shard": 4}, r"shard = 4 does not divide dp = 2; it can be one of \[1, 2\]"),
        ({"dp": 2, "cp": 3, "shard": 4}, r"shard = 4 does not divide dp·cp·hp = 6; it can be one of \[1, 2, 3, 6\]"),
        ({"dp": 2, "shard": -1}, "shard = -1"),
        ({"cp": 4, "window": 3}, r"window = 3 does not divide cp = 4; it can be one of \[1, 2, 4\]"),
        ({"window": -1}, "window = -1"),
    ],
)
def test_layouts_that_cannot_be_are_errors(layout: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**layout)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vit", "projector", "llm", "message"),
    [
        (Layout(dp=2), Layout(dp=4), Layout(dp=4), r"vit 2 \(dp2·zero3\), projector 4 \(dp4·zero3\), llm 4"),
        (Layout(dp=2, cp=2), Layout(dp=4), Layout(dp=4), "layout of the vit: cp = 2; it has dp and tp only"),
        (Layout(dp=4), Layout(pp=4), Layout(dp=4), "layout of the projector: pp = 4"),
        (Layout(dp=4), Layout(dp=2, tp=2), Layout(dp=4), "tp = 2; it can be 1 or the ViT's tp = 1"),
    ],
)
def test_plans_that_cannot_be_are_errors(vit: Layout, projector: Layout, llm: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelPlan(vit=vit, projector=projector, llm=llm)


def test_modules_without_a_layout_are_data_parallel() -> None:
    plan = ParallelPlan.for_llm(Layout(pp=2, cp=2, tp=2, zero=1))
    assert plan.vit == plan.projector == Layout(dp=8, zero=1)
    assert (plan.size, str(plan)) == (8, "llm pp2·cp2·tp2·zero1 | vit dp8·zero1 | projector dp8·zero1")
    assert str(Layout(cp=4, hp=2, shard=4, placement="context_first", window=2)) == (
        "cp4·hp2·zero3/4·context-first·window2"
    )


@given(layouts())
def test_every_place_has_one_rank(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.size)]
    assert [layout.rank_of(place) for place in places] == list(range(layout.size))
    sizes = (range(getattr(layout, axis)) for axis in AXES)
    assert {(p.pp, p.dp, p.cp, p.hp, p.tp) for p in places} == set(product(*sizes))


@given(layouts(), st.data())
def test_neighbours(layout: Layout, data: st.DataObject) -> None:
    """tp ranks are neighbours, then those of hp (or of cp, if context comes first); stages lie farthest apart."""
    place = layout.coordinates(data.draw(st.integers(0, layout.size - 1)))
    inner = ("hp", "cp") if layout.placement == "head_first" else ("cp", "hp")
    distance = 1
    for axis in ("tp", *inner, "dp", "pp"):
        where = {name: getattr(place, name) for name in AXES}
        ranks = [layout.rank_of(Coordinates(**{**where, axis: n})) for n in range(getattr(layout, axis))]
        assert ranks == [ranks[0] + distance * n for n in range(len(ranks))]
        distance *= getattr(layout, axis)


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    assert divisors(number) == sorted({n for n in range(1, number + 1) if number / n == number // n})


@given(plans())
def test_random_plans_use_all_ranks(plan: ParallelPlan) -> None:
    assert set(Counter(layout.size for layout in plan.layouts.values())) == {plan.size}


MESHED = [
    Layout(dp=8),
    Layout(dp=8, shard=2),
    Layout(dp=2, cp=2, hp=2),
    Layout(dp=2, cp=2, hp=2, placement="context_first"),
    Layout(pp=2, cp=2, tp=2, shard=1),
    Layout(dp=4, tp=2, shard=2),
    Layout(pp=2, dp=2, hp=2),
    Layout(tp=8),
]


def test_meshes_of_eight_ranks() -> None:
    def job(world: World) -> list[tuple[dict[str, list[int]], list[str], list[list[int]], list[int] | None]]:
        found = []
        for layout in MESHED:
            mesh = build_meshes(ParallelPlan.for_llm(layout), world.rank, "cpu")["llm"]
            assert mesh.place == layout.coordinates(world.rank)
            groups = {axis: dist.get_process_group_ranks(group) for axis, group in mesh.groups.items()}
            tensor = None if mesh.tensor is None else mesh.tensor.mesh.tolist()
            names = list(mesh.data.mesh_dim_names or ())
            found.append((groups, names, mesh.data.mesh.reshape(-1, mesh.data.mesh.shape[-1]).tolist(), tensor))
        return found

    for rank, meshes in enumerate(run_ranks(8, job)):
        for layout, (groups, names, data, tensor) in zip(MESHED, meshes, strict=True):
            place = layout.coordinates(rank)
            where = {axis: getattr(place, axis) for axis in AXES}
            expected = {
                axis: [layout.rank_of(Coordinates(**{**where, axis: n})) for n in range(getattr(layout, axis))]
                for axis in AXES
                if getattr(layout, axis) > 1
            }
            assert groups == expected
            assert tensor == expected.get("tp")
            # Rows of the data mesh share one copy; all ranks in it hold the same stage and the same tp part.
            hybrid = layout.shard_size < layout.data_ranks
            assert names == (["replicate", "shard"] if hybrid else ["shard"])
            assert {len(row) for row in data} == {layout.shard_size}
            assert sorted(other for row in data for other in row) == [
                other
                for other in range(8)
                if (layout.coordinates(other).pp, layout.coordinates(other).tp) == (place.pp, place.tp)
            ]
            assert all(max(row) - min(row) == (len(row) - 1) * layout.tp for row in data)  # neighbours shard


def test_modules_of_one_layout_share_their_meshes() -> None:
    def job(world: World) -> list[bool]:
        meshes = build_meshes(ParallelPlan.for_llm(Layout(dp=1, tp=2)), world.rank, "cpu")
        return [meshes["vit"] is meshes["projector"], meshes["vit"] is meshes["llm"]]

    assert run_ranks(2, job) == [[True, False]] * 2
