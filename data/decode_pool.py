"""Spreads the images of steps over processes, which write tiles straight into shared memory.

    submit(step 8) ─chunks─► one socket ─┬─► worker 0 ─┐
    submit(step 9) ─chunks─►             └─► worker 1 ─┴─► begun, done ──► thread ──► Future of the step

All workers read the same socket, so a chunk goes to whichever is free, with no word from this process; chunks with many
tiles go first, so that the end of a step does not wait for one of them. Workers are programs of their own
(``decode_worker``), not forks: this process may hold threads, CUDA and gloo. They are started with signals blocked,
get their chunks as JSON, and end with this process in whatever way it ends. Nothing that they share has a name that
could be left behind.

With no workers the calling thread decodes (``InlineDecoder``), by the same function.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from evovlm.data.decode import DecodeOptions, Outcome, TileJob, decode_chunk, pack_chunk, unpack_outcome
from evovlm.data.decode_worker import MESSAGE_BYTES, WorkerSettings

_CHUNK_TILES = 8  # small images travel together until they are as many tiles
_CHUNKS_PER_WORKER = 4  # or, in a small step, this share of what a worker has to do
_PATIENCE = 5.0  # seconds of silence after which workers are looked at


class WorkerDiedError(RuntimeError):
    """A process that decoded images is gone; the message says how it ended and what it was decoding."""


class DecodingTime(NamedTuple):
    """What decoding a step took, added up over workers.

    Attributes:
        seconds: time.
        cpu_seconds: processor time.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class _Step:
    """A step of which chunks are still being decoded; ``errors`` by the number of their job in the step."""

    future: "Future[DecodingTime]" = field(default_factory=Future)
    chunks: int = 0
    time: DecodingTime = field(default_factory=DecodingTime)
    errors: dict[int, Exception] = field(default_factory=dict)

    def add(self, outcome: Outcome, numbers: Sequence[int]) -> None:
        """Take in a chunk; the last one completes the step. The error of the step's first bad image is the step's."""
        self.chunks -= 1
        self.time = DecodingTime(self.time.seconds + outcome.seconds, self.time.cpu_seconds + outcome.cpu_seconds)
        self.errors |= {numbers[fault.job]: fault.error() for fault in outcome.faults}
        if self.chunks > 0:
            return
        if self.errors:
            self.future.set_exception(self.errors[min(self.errors)])
        else:
            self.future.set_result(self.time)


class _Chunk(NamedTuple):
    step: _Step
    numbers: list[int]
    jobs: list[TileJob]


@dataclass(eq=False)
class _Worker:
    process: "subprocess.Popen[bytes]"
    outcomes: socket.socket
    chunk: int | None = None


class DecodePool:
    """Processes that decode images for one loader. ``submit`` is for one thread.

    Args:
        num_workers: processes.
        options: what all jobs have in common.
        memory: file number of the shared memory that ``TileJob.offset`` counts in.
    """

    def __init__(self, num_workers: int, options: DecodeOptions, memory: int) -> None:
        self._jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._chunks: dict[int, _Chunk] = {}
        self._count = 0
        self._error: Exception | None = None
        self._closing = False
        self._workers: list[_Worker] = []
        self._collector = threading.Thread(target=self._collect, name="decode-outcomes", daemon=True)
        try:
            with theirs:
                for _ in range(num_workers):
                    self._workers.append(_start(theirs, memory, options))
            self._collector.start()
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, jobs: Sequence[TileJob], tiles: Tensor, offset: int) -> "Future[DecodingTime]":  # noqa: ARG002
        """Start to decode a step.

        Args:
            jobs: the step's images.
            tiles: the tensor that they are written into, which lies at ``offset`` of the shared memory.
            offset: see ``tiles``.

        Returns:
            Done when the last image is; holds the error of the step's first bad image, if there is one.
        """
        step = _Step()
        chunks = [_Chunk(step, numbers, [jobs[n] for n in numbers]) for numbers in _split(jobs, len(self._workers))]
        step.chunks = len(chunks)
        if not chunks:
            step.future.set_result(step.time)
            return step.future
        with self._lock:
            if self._error is not None:
                raise self._error
            first, self._count = self._count, self._count + len(chunks)
            self._chunks |= dict(enumerate(chunks, first))
        with contextlib.suppress(BrokenPipeError):  # no worker is left: the collector says so
            for number, chunk in enumerate(chunks, first):
                self._jobs.send(pack_chunk(number, chunk.jobs), socket.MSG_NOSIGNAL)
        return step.future

    def close(self) -> None:
        """End the workers, whatever they are at; steps that are not done stay undone."""
        self._closing = True
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.outcomes.shutdown(socket.SHUT_RDWR)
        if self._collector.ident is not None:
            self._collector.join()
        for worker in self._workers:
            worker.outcomes.close()
        self._jobs.close()

    def _collect(self) -> None:
        """Read what workers say until all are gone."""
        try:
            with selectors.DefaultSelector() as selector:
                for worker in self._workers:
                    selector.register(worker.outcomes, selectors.EVENT_READ, worker)
                while living := [key.data for key in selector.get_map().values()]:
                    ready = [key.data for key, _ in selector.select(_PATIENCE)]
                    # Silence: has one ended whose socket a fork of this process keeps open?
                    for worker in ready or [w for w in living if w.process.poll() is not None]:
                        if message := _receive(worker):
                            self._take(worker, *unpack_outcome(message))
                        else:
                            selector.unregister(worker.outcomes)
                            self._lose(worker)
        except Exception as error:  # noqa: BLE001 - must reach those who wait for a step
            self._fail(error)

    def _take(self, worker: _Worker, number: int, outcome: Outcome | None) -> None:
        if outcome is None:
            worker.chunk = number
            return
        worker.chunk = None
        with self._lock:
            chunk = self._chunks.pop(number, None)
        if chunk is not None:  # otherwise another worker's end has already failed the step
            chunk.step.add(outcome, chunk.numbers)

    def _lose(self, worker: _Worker) -> None:
        code = worker.process.wait()
        if self._closing:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        chunk = self._chunks.get(-1 if worker.chunk is None else worker.chunk)
        what = "idle" if chunk is None else f"decoding {_names(chunk.jobs)}"
        hint = "; what it said stands in the standard error"
        if code == -signal.SIGKILL:
            hint = "; was the machine short of memory? Fewer num_workers or a smaller prefetch need less"
        self._fail(WorkerDiedError(f"process {worker.process.pid}, which decodes images, {how} while {what}{hint}"))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            chunks, self._chunks = self._chunks, {}
        for step in {id(chunk.step): chunk.step for chunk in chunks.values()}.values():
            step.future.set_exception(error)


class InlineDecoder:
    """Decodes in the calling thread, with the interface of ``DecodePool``."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._closing = False

    def submit(self, jobs: Sequence[TileJob], tiles: Tensor, offset: int) -> "Future[DecodingTime]":
        """Decode a step; see ``DecodePool.submit``."""
        step = _Step(chunks=len(jobs))
        if not jobs:
            step.future.set_result(step.time)
            return step.future
        memory = tiles.numpy().reshape(-1).view(np.uint8).data
        for number, job in enumerate(jobs):
            if self._closing:
                break
            step.add(decode_chunk([job], self._options, memory, offset), [number])
        return step.future

    def close(self) -> None:
        """Stop after the image that is being decoded."""
        self._closing = True


def _start(jobs: socket.socket, memory: int, options: DecodeOptions) -> _Worker:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = WorkerSettings(os.getpid(), jobs.fileno(), theirs.fileno(), memory, options)
    # Blocked for this thread and what it starts: signals to the whole group must not reach a worker, not even before
    # it could have said that it ignores them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "evovlm.data.decode_worker", json.dumps(settings)],
                pass_fds=(jobs.fileno(), theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Worker(process, ours)


def _receive(worker: _Worker) -> bytes:
    """Read a message; empty: the worker has ended."""
    with contextlib.suppress(ConnectionResetError, BlockingIOError):
        return worker.outcomes.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
    return b""


def _split(jobs: Sequence[TileJob], num_workers: int) -> Iterator[list[int]]:
    """Put small images together; chunks by falling number of tiles, each the numbers of its jobs."""
    tiles = [job.end - job.begin for job in jobs]
    limit = min(_CHUNK_TILES, sum(tiles) // (_CHUNKS_PER_WORKER * num_workers))
    chunks: list[tuple[int, list[int]]] = []
    for number, count in enumerate(tiles):
        if chunks and chunks[-1][0] + count <= limit:
            chunks[-1] = (chunks[-1][0] + count, [*chunks[-1][1], number])
        else:
            chunks.append((count, [number]))
    for _, numbers in sorted(chunks, key=lambda chunk: -chunk[0]):
        yield numbers


def _names(jobs: Sequence[TileJob]) -> str:
    return ", ".join(f"image '{job.path}' of sample '{job.name}'" for job in jobs)
