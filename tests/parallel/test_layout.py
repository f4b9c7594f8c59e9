"""Layouts: what divides what, and the meshes that come of it."""

import pytest

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World


def test_all_ranks_shard_by_default() -> None:
    assert Layout(dp=4).shard_size == 4
    assert Layout(dp=4, shard=2).shard_size == 2
    assert Layout(dp=6, shard=1).shard_size == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"dp": 0}, "dp = 0; at least one"),
        ({"dp": 6, "shard": 4}, r"shard = 4 does not divide dp = 6; it can be one of \[1, 2, 3, 6\]"),
        ({"dp": 2, "shard": 4}, r"shard = 4 does not divide dp = 2; it can be one of \[1, 2\]"),
        ({"dp": 2, "shard": -1}, "shard = -1"),
    ],
)
def test_layouts_that_cannot_be_are_errors(layout: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**layout)  # type: ignore[arg-type]


def test_modules_must_use_the_same_ranks() -> None:
    with pytest.raises(ValueError, match="'vit': 2, 'projector': 4, 'llm': 4"):
        ParallelPlan(vit=Layout(dp=2), projector=Layout(dp=4), llm=Layout(dp=4))


def test_meshes() -> None:
    def job(world: World) -> list[tuple[tuple[int, ...], tuple[str, ...], list[int]]]:
        found = []
        for shard in (0, 4, 2, 1):
            mesh = Layout(dp=4, shard=shard).mesh("cpu")
            found.append((tuple(mesh.shape), mesh.mesh_dim_names, list(mesh.get_coordinate())))
        return found

    for rank, meshes in enumerate(run_ranks(4, job)):
        assert meshes == [
            ((4,), ("shard",), [rank]),
            ((4,), ("shard",), [rank]),
            ((2, 2), ("replicate", "shard"), [rank // 2, rank % 2]),  # neighbours shard, strangers replicate
            ((4, 1), ("replicate", "shard"), [rank, 0]),
        ]
