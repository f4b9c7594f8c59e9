"""Runs a function on several gloo ranks forked from this process: a world in a fraction of a second.

    parent (torch and evovlm already imported) ─ fork ─┬─ rank 0: function(world) ─┐
                                                       └─ rank 1: function(world) ─┴─► results, in rank order

For tests and for checks on a laptop: forking is safe only before this process has used CUDA. A training run is started
by ``launch/`` instead.
"""

import multiprocessing
import pickle  # noqa: TID251 - carries results of our own ranks, never data from outside
import queue
import signal
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
_POLL = 0.1  # seconds between looks at whether ranks are alive
_SETTLE = 0.3  # seconds after a rank's error in which a peer may turn out to have died before it


class RankFailedError(RuntimeError):
    """A forked rank raised or died; the message names it and holds its traceback, or how it died."""


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
    errors: dict[int, str] = {}
    settled = deadline
    while len(values) < len(ranks):
        try:
            rank, value, error = results.get(timeout=max(0.0, min(_POLL, deadline - time.monotonic())))
        except queue.Empty:
            dead = [n for n, each in enumerate(ranks) if not each.is_alive() and n not in values and n not in errors]
            if dead and results.empty():
                raise RankFailedError(f"rank {dead[0]} {_how_it_died(ranks[dead[0]].exitcode)}") from None
            if errors and time.monotonic() > settled:
                break
            if time.monotonic() >= deadline:
                missing = [n for n in range(len(ranks)) if n not in values]
                raise RankFailedError(f"ranks {missing} did not finish in time") from None
            continue
        if error is None:
            values[rank] = pickle.loads(value)
            continue
        # Where a rank was killed, its peers' "connection closed" can come before the system says that it is dead.
        settled = settled if errors else min(deadline, time.monotonic() + _SETTLE)
        errors[rank] = error
    if errors:
        rank, error = next(iter(errors.items()))
        raise RankFailedError(f"rank {rank}:\n{error}")
    return [values[rank] for rank in range(len(ranks))]


def _how_it_died(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
