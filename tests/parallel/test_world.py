"""What a world of ranks can be asked."""

import pytest
import torch

from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.world import World


def test_reductions_and_agreement() -> None:
    def job(world: World) -> tuple[list[float], list[float], bool, str]:
        sums = world.sum([world.rank, 2**40 + 1 if world.rank == 0 else 0.0, 0.1])
        largest = world.max([-world.rank, 10.0 * world.rank])
        world.barrier()
        world.agree("the plan", "same")
        try:
            world.agree("the plan of step 4", "abc" if world.rank != 2 else "xyz")
        except RuntimeError as error:
            return sums, largest, world.is_main, str(error)
        return sums, largest, world.is_main, ""

    results = run_ranks(3, job)
    for sums, largest, _, message in results:  # every rank gets the same
        assert sums == [3.0, float(2**40 + 1), pytest.approx(0.3, abs=1e-15)]  # float64
        assert largest == [0.0, 20.0]
        assert message == (
            "the plan of step 4 differs between ranks: rank 0 has abc, rank 2 has xyz (1 of 3 ranks differ from rank 0)"
        )
    assert [main for _, _, main, _ in results] == [True, False, False]


def test_a_world_is_a_value() -> None:
    world = World(0, 1, torch.device("cpu"))
    assert world == World(0, 1, torch.device("cpu"))
    with pytest.raises(AttributeError):
        world.rank = 1  # type: ignore[misc]


def test_disagreement_stops_every_rank() -> None:
    with pytest.raises(RankFailedError, match="settings differs between ranks"):
        run_ranks(2, lambda world: world.agree("settings", str(world.rank)))
