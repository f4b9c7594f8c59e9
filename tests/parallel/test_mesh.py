"""Groups of a layout: who is in them, that all ranks make the same ones, and the second ring of a double ring."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import AXES, Layout, ParallelPlan
from evovlm.parallel.mesh import build_mesh, build_meshes
from evovlm.parallel.world import World

LAYOUTS = [
    Layout(dp=8),
    Layout(dp=8, shard=2),
    Layout(pp=2, dp=2, tp=2),
    Layout(cp=4, hp=2),
    Layout(cp=4, hp=2, placement="context_first", window=2),
    Layout(pp=2, cp=2, hp=2, placement="context_first"),
    Layout(dp=2, cp=4, window=2),
    Layout(cp=4, tp=2, window=1),
    Layout(cp=4, tp=2, window=4),
    Layout(dp=4, tp=2, shard=2),
]


@pytest.fixture(scope="module")
def seen() -> list[list[dict[str, Any]]]:
    """What each of 8 ranks finds in the meshes of each layout."""

    def job(world: World) -> list[dict[str, Any]]:
        found = []
        for layout in LAYOUTS:
            mesh = build_mesh(layout, world.rank, "cpu")
            groups = {axis: dist.get_process_group_ranks(group) for axis, group in mesh.groups.items()}
            sums = {}
            for axis, group in mesh.groups.items():  # a group that ranks made in another order would not come together
                total = torch.full((1,), float(world.rank))
                dist.all_reduce(total, group=group)
                sums[axis] = int(total)
            found.append(
                {
                    "groups": groups,
                    "sums": sums,
                    "place": mesh.place,
                    "data": (mesh.data.mesh_dim_names, mesh.data.mesh.tolist()),
                    "tensor": None if mesh.tensor is None else mesh.tensor.mesh.tolist(),
                    "own outer": mesh.groups.get("cp_outer") is not mesh.groups.get("cp"),
                }
            )
        plan = ParallelPlan(vit=Layout(dp=8), projector=Layout(dp=8), llm=Layout(cp=4, hp=2))
        meshes = build_meshes(plan, world.rank, "cpu")
        found.append({"shared": meshes["vit"] is meshes["projector"], "llm": meshes["llm"].layout == plan.llm})
        return found

    return run_ranks(8, job, timeout=60)


def places(layout: Layout) -> dict[tuple[int, ...], int]:
    """Coordinates, in the order of the axes, to rank; written out from the picture in ``layout.py``."""
    order = AXES if layout.placement == "head_first" else ("pp", "dp", "hp", "cp", "tp")
    ranks = {}
    for rank, at in enumerate(product(*(range(getattr(layout, axis)) for axis in order))):
        named = dict(zip(order, at, strict=True))
        ranks[tuple(named[axis] for axis in AXES)] = rank
    return ranks


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_groups_hold_the_ranks_that_differ_along_one_axis(seen: list[list[dict[str, Any]]], number: int) -> None:
    layout = LAYOUTS[number]
    for at, rank in places(layout).items():
        found = seen[rank][number]
        expected = {}
        for dim, axis in enumerate(AXES):
            if (size := getattr(layout, axis)) > 1:
                expected[axis] = [places(layout)[(*at[:dim], i, *at[dim + 1 :])] for i in range(size)]
        if 0 < layout.window < layout.cp:
            expected["cp_outer"] = expected["cp"]
            assert found["own outer"]
        assert found["groups"] == expected
        assert found["sums"] == {axis: sum(ranks) for axis, ranks in expected.items()}
        assert found["tensor"] == expected.get("tp")
        assert tuple(getattr(found["place"], axis) for axis in AXES) == at


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_state_is_sharded_over_all_data_ranks_of_a_stage(seen: list[list[dict[str, Any]]], number: int) -> None:
    layout = LAYOUTS[number]
    for rank in range(8):
        pp, tp = seen[rank][number]["place"].pp, seen[rank][number]["place"].tp
        mine = [r for r in range(8) if (p := layout.coordinates(r)).pp == pp and p.tp == tp]
        names, ranks = seen[rank][number]["data"]
        if layout.shard_size == layout.data_ranks:
            assert (names, ranks) == (("shard",), mine)
        else:
            step = layout.shard_size
            assert (names, ranks) == (
                ("replicate", "shard"),
                [mine[i : i + step] for i in range(0, len(mine), step)],
            )


def test_modules_of_one_layout_share_their_meshes(seen: list[list[dict[str, Any]]]) -> None:
    assert [found[-1] for found in seen] == [{"shared": True, "llm": True}] * 8
