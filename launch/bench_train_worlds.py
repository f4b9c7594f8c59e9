"""Worlds of forked gloo ranks that take turns: each trains a step when it is told to, while the others are idle.

    parent ─┬─ world "ours"          rank 0 │ rank 1      built once, its own process group, one thread a rank
            ├─ world "ddp-one-eager" rank 0 │ rank 1
            └─ …                        ▲
               "step 3" ───────────────►│ both ranks train it ─► wall, busy, loss ─► parent ─► the next world's turn

So ways of training are timed in turn, minutes of other load on the machine meet all of them, and each has the memory of
processes of its own.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from evovlm.parallel.world import World

_TIMEOUT = 1800.0  # seconds of a collective


class Trainer(Protocol):
    """What a rank of a way does."""

    def step(self, number: int) -> float:
        """Train on the samples of a step; returns the loss over all ranks."""


@dataclass(frozen=True)
class Turn:
    """What a rank did in one turn.

    Attributes:
        wall: Seconds from the ranks' common start until this rank was done.
        busy: Processor time of the rank in it, all threads.
        loss: Loss of the step, over all ranks.
        peak_bytes: Most resident memory of the rank in this turn, less what it had when it was forked.
    """

    wall: float
    busy: float
    loss: float
    peak_bytes: int


class WorldTimeoutError(RuntimeError):
    """Ranks did not finish their turn in the time that they were given; they were ended."""


class WorldError(RuntimeError):
    """A rank raised, or died; the message holds its traceback."""


class ForkedWorld:
    """Ranks that were forked from this process, and wait for their turns.

    Args:
        name: What messages call it.
        size: R.
        build: Makes a rank's trainer; called once in each rank.
    """

    def __init__(self, name: str, size: int, build: Callable[[World], Trainer]) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._ranks: list[Any] = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("fork")
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name, "store"))
            process = context.Process(target=_serve, args=(rank, size, store, build, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(process)
            self._pipes.append(ours)

    def step(self, number: int, timeout: float = _TIMEOUT) -> list[Turn]:
        """Train a step; returns what each rank did.

        Raises:
            WorldError: A rank raised or died.
            WorldTimeoutError: It took longer than ``timeout`` seconds; the world is ended.
        """
        turns: list[Turn] = self._ask(number, timeout)
        return turns

    def call(self, function: Callable[[World, Any], Any], timeout: float = _TIMEOUT) -> list[Any]:
        """Call a function (importable by name) with world and trainer in every rank; returns the results by rank."""
        return self._ask(function, timeout)

    def _ask(self, request: Any, timeout: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(request)
        answers: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise WorldTimeoutError(f"{self.name}: not done after {timeout:.0f} s")
            for answering in ready:
                rank = self._pipes.index(cast(Connection, answering))
                try:
                    answers[rank], error = self._pipes[rank].recv()
                except EOFError:
                    error = f"died with exit code {self._ranks[rank].exitcode}"
                if error:
                    self.close()
                    raise WorldError(f"bench train: {self.name}, rank {rank}: {error}")
        return [answers[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End the ranks."""
        for process in self._ranks:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._ranks, self._pipes = [], []
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, build: Callable[[World], Trainer], pipe: Connection) -> None:
    """A rank's life: build, then train a step, or call a function, whenever it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),  # type: ignore[attr-defined]  # documented, not in its stubs
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_TIMEOUT),
        )
        world = World(rank, size, torch.device("cpu"))
        at_start = _resident("VmRSS")
        trainer = build(world)
        while True:
            request = pipe.recv()
            pipe.send(
                (request(world, trainer) if callable(request) else _turn(world, trainer, request, at_start), None)
            )
    except EOFError:
        os._exit(0)  # the parent is gone
    except BaseException:  # noqa: BLE001 - whatever ended the rank is what the parent must show
        pipe.send((None, traceback.format_exc()))


def _turn(world: World, trainer: Trainer, number: int, at_start: int) -> Turn:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    world.barrier()
    began, began_busy = time.perf_counter(), time.process_time()
    loss = trainer.step(number)
    wall, busy = time.perf_counter() - began, time.process_time() - began_busy
    return Turn(wall, busy, loss, _resident("VmHWM") - at_start)


def _resident(entry: str) -> int:
    """Bytes that the kernel counts for this process: ``VmRSS``, resident now, or ``VmHWM``, the most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == entry:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {entry}")
