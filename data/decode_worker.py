"""A process that decodes images for a rank: ``python -m evovlm.data.decode_worker SETTINGS``; see ``decode_pool``.

    jobs (a socket that all workers of the rank read) ──► decode ──► tiles in the rank's shared memory
                                                            └──► begun, done (a socket of this worker alone)

The rank starts it with all signals blocked: those that end a group of processes are the rank's to handle, which may
want to finish its step. The worker ends when the rank does, however that came about: its sockets then say so.
"""

import contextlib
import json
import mmap
import os
import socket
import sys
from typing import NamedTuple

_PATIENCE = 5.0  # seconds between looks at whether the rank is alive, should a fork of it keep the sockets open
MESSAGE_BYTES = 1 << 17
"""Limit of a message in bytes."""


class WorkerSettings(NamedTuple):
    """What a worker is started with, as JSON.

    Attributes:
        rank: process id of the rank.
        jobs: file number of the socket that chunks arrive on.
        outcomes: file number of the socket that outcomes are sent on.
        memory: file number of the shared memory, which may grow.
        options: fields of ``DecodeOptions``.
    """

    rank: int
    jobs: int
    outcomes: int
    memory: int
    options: tuple[int, str, int]


def main() -> None:
    """Decode chunks until the rank is gone."""
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # NumPy would start a thread for each core of the node and use none
    from evovlm.data.decode import DecodeOptions, decode_chunk, pack_outcome, unpack_chunk

    settings = WorkerSettings(*json.loads(sys.argv[1]))
    options = DecodeOptions(*settings.options)  # type: ignore[arg-type]  # the rank has checked them
    jobs, outcomes = socket.socket(fileno=settings.jobs), socket.socket(fileno=settings.outcomes)
    memory, room = None, memoryview(b"")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the rank has ended while this worker decoded
        while message := _receive(jobs, settings.rank):
            number, chunk = unpack_chunk(message)
            outcomes.send(pack_outcome(number, None))
            needed = max(job.offset + (job.end - job.begin) * options.tile_bytes for job in chunk)
            if needed > len(room):  # the file has grown, or this is the first chunk
                room.release()
                memory = mmap.mmap(settings.memory, os.fstat(settings.memory).st_size)
                room = memoryview(memory)
            outcomes.send(pack_outcome(number, decode_chunk(chunk, options, room)))


def _receive(jobs: socket.socket, rank: int) -> bytes:
    """Wait for a message; empty: the rank is gone."""
    jobs.settimeout(_PATIENCE)
    while True:
        if os.getppid() != rank:
            return b""
        with contextlib.suppress(TimeoutError):
            return jobs.recv(MESSAGE_BYTES)


if __name__ == "__main__":
    main()
