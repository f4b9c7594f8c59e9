"""Forked worlds: results in order, failures with their cause, nothing left behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.world import World


@pytest.mark.parametrize("size", [1, 3])
def test_results_come_in_rank_order(size: int) -> None:
    def job(world: World) -> tuple[int, int, torch.Tensor]:
        time.sleep(0.05 * (size - world.rank))  # the last rank is done first
        total = torch.full((2,), float(world.rank + 1))
        dist.all_reduce(total)
        return world.rank, world.size, total

    results = run_ranks(size, job)
    assert [(rank, count) for rank, count, _ in results] == [(rank, size) for rank in range(size)]
    assert all(total.tolist() == [size * (size + 1) / 2] * 2 for _, _, total in results)


def test_the_function_sees_this_process_as_it_was() -> None:
    here = {"number": 5}
    assert run_ranks(2, lambda world: here["number"] + world.rank) == [5, 6]


def test_an_exception_carries_the_ranks_traceback() -> None:
    def job(world: World) -> None:
        if world.rank == 1:
            raise ValueError("what went wrong")
        world.barrier()  # never comes together: the caller must not wait for it

    began = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1:\n(.|\n)*in job(.|\n)*ValueError: what went wrong"):
        run_ranks(2, job, timeout=60)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os._exit(7), "rank 1 died with exit code 7"),
        (lambda: os._exit(0), "rank 1 died with exit code 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_is_named_and_ends_the_others(die: Callable[[], None], how: str) -> None:
    def job(world: World) -> None:
        world.barrier()
        if world.rank == 1:
            die()
        if world.rank == 2:
            time.sleep(60)  # sees nothing
        world.barrier()  # the others see a closed connection, before or after the parent sees the death

    began = time.monotonic()
    with pytest.raises(RankFailedError, match=rf"^{how}$"):
        run_ranks(3, job, timeout=60)
    assert time.monotonic() - began < 10
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("ForkProcess")]


def test_ranks_that_hang_are_ended_and_named() -> None:
    # Rank 0 is done, but waits for the other at the closing barrier: neither has a result.
    with pytest.raises(RankFailedError, match=r"ranks \[0, 1\] did not finish in time"):
        run_ranks(2, lambda world: time.sleep(60 * world.rank) if world.rank else None, timeout=2.0)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("ForkProcess")]
