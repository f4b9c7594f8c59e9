"""A rank that dies or fails on another node, where no agent sees it: the others end soon and name it."""

import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.roll_call import PeerFailedError
from evovlm.parallel.world import World

SIZE = 3
NODE = platform.node()
TIMEOUT = 60.0  # of collectives: what a rank would wait without the roll call
PATIENCE = 1.5


def launch(folder: Path, work: Callable[[World], None]) -> tuple[list[int], list[str], float]:
    """Run ``work`` on forked ranks whose launcher, like torchrun's, keeps the store in a process of its own.

    Returns:
        Each rank's exit code, what it printed last, and the seconds until all had ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def rank_of(rank: int) -> None:
        sys.stderr = (folder / f"{rank}").open("w")
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in (names | where).items()})
        torch.set_num_threads(1)
        code = 0
        try:
            with process_group(RankInfo.from_environment(), "cpu", TIMEOUT, PATIENCE) as world:
                work(world)
        except Exception as error:  # noqa: BLE001 - what a rank's command prints
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            code = 1
        os._exit(code)

    ranks = [multiprocessing.get_context("fork").Process(target=rank_of, args=(rank,)) for rank in range(SIZE)]
    began = time.monotonic()
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT / 2)
        took = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = [["", *(folder / f"{rank}").read_text().splitlines()][-1] for rank in range(SIZE)]
    return [process.exitcode or 0 for process in ranks], said, took


def reduce_all(world: World) -> None:
    dist.all_reduce(torch.ones(1000))
    world.barrier()


def test_a_killed_rank_is_named_by_one_that_fails_and_by_one_that_hangs(tmp_path: Path) -> None:
    def work(world: World) -> None:
        reduce_all(world)
        if world.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if world.rank == 1:
            time.sleep(TIMEOUT)  # like a rank that waits for one that lives, over NCCL
        dist.recv(torch.empty(1), src=2)

    codes, said, took = launch(tmp_path, work)
    assert codes == [1, 1, -signal.SIGKILL]
    cause = f"rank 2 ({NODE}) does not answer within {PATIENCE} s: its process has died"
    assert said[0].startswith(f"PeerFailedError: {cause}")
    assert said[1].startswith(f"evovlm: {cause}")
    assert took < 20


def test_several_killed_ranks_are_all_named(tmp_path: Path) -> None:
    def work(world: World) -> None:
        reduce_all(world)
        if world.rank > 0:
            os._exit(3)
        reduce_all(world)

    codes, said, _ = launch(tmp_path, work)
    assert codes == [1, 3, 3]
    assert f"rank 1 ({NODE}), rank 2 ({NODE}) do not answer" in said[0]


def test_an_error_on_one_rank_is_named_by_the_others(tmp_path: Path) -> None:
    def work(world: World) -> None:
        reduce_all(world)
        if world.rank == 1:
            raise ValueError("tile 7 is odd\nand so is tile 9")
        reduce_all(world)

    codes, said, took = launch(tmp_path, work)
    assert codes == [1, 1, 1]
    assert said[1] == "and so is tile 9"  # its own error, as it was raised
    assert said[0].endswith(f"rank 1 ({NODE}) failed: ValueError: tile 7 is odd")
    assert said[2].endswith(f"rank 1 ({NODE}) failed: ValueError: tile 7 is odd")
    assert took < 20


def test_an_error_that_all_ranks_raise_stays_what_it_is(tmp_path: Path) -> None:
    def work(world: World) -> None:
        reduce_all(world)
        raise ValueError(f"no sample has a target, says {world.rank}")

    codes, said, took = launch(tmp_path, work)
    assert codes == [1, 1, 1]
    assert said == [f"ValueError: no sample has a target, says {rank}" for rank in range(SIZE)]
    assert took < 20


def test_a_run_without_failures_ends_well(tmp_path: Path) -> None:
    codes, said, _ = launch(tmp_path, reduce_all)
    assert (codes, said) == ([0] * SIZE, [""] * SIZE)


def test_a_run_of_its_own_raises_what_went_wrong() -> None:
    with pytest.raises(RuntimeError, match="odd") as caught, process_group(RankInfo(), "cpu", 20):
        raise RuntimeError("tile 7 is odd")
    assert not isinstance(caught.value, PeerFailedError)
    dist.destroy_process_group()
