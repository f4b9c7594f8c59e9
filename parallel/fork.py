"""Runs a function on several gloo ranks forked from this process: a world in a fraction of a second.

    parent (torch and evovlm already imported) ─ fork ─┬─ rank 0: function(world) ─┐
                                                       └─ rank 1: function(world) ─┴─► results, in rank order

For tests and for checks on a laptop: forking is safe only before this process has used CUDA. A training run is started
by ``launch/`` instead.
"""

import multiprocessing
import pickle  # noqa: TID251 - carries results of our own ranks, never data from outside
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from evovlm.parallel.world import World

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """A forked rank raised or died; the message holds its traceback."""


def run_ranks(size: int, function: Callable[[World], T], *, timeout: float = 120.0) -> list[T]:
    """Call ``function`` on ``size`` forked ranks of one gloo world.

    Args:
        size: R.
        function: Called once per rank; its result must be picklable.
        timeout: Seconds until ranks that have not finished are killed; also the timeout of every collective.

    Returns:
        The results, in rank order.

    Raises:
        RankFailedError: A rank raised, died, or did not finish in time.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        ranks = [
            context.Process(target=_run, args=(rank, size, str(store), function, results, timeout), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _run(rank: int, size: int, store: str, function: Callable[[World], Any], results: Any, timeout: float) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),  # type: ignore[attr-defined]  # documented, not in its stubs
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        value = function(World(rank, size, torch.device("cpu")))
        dist.barrier()
        # Plain bytes: tensors would travel as handles that die with this process.
        results.put((rank, pickle.dumps(value), None))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever ended the rank is what the parent must show
        results.put((rank, None, traceback.format_exc()))


def _collect(ranks: list[Any], results: Any, deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(ranks):
        try:
            rank, value, error = results.get(timeout=0.5)
        except queue.Empty:
            dead = [n for n, process in enumerate(ranks) if not process.is_alive() and n not in values]
            if dead and results.empty():
                code = ranks[dead[0]].exitcode
                raise RankFailedError(f"rank {dead[0]} died with exit code {code}") from None
            if time.monotonic() > deadline:
                missing = [n for n in range(len(ranks)) if n not in values]
                raise RankFailedError(f"ranks {missing} did not finish in time") from None
            continue
        if error is not None:
            raise RankFailedError(f"rank {rank}:\n{error}")
        values[rank] = pickle.loads(value)
    return [values[rank] for rank in range(len(ranks))]
