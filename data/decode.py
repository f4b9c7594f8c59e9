"""Decoding as jobs that another process can do: plain values in, tiles written into shared memory, errors as values.

    TileJob  name, file, grid, tiles, qualities, offset ──load_rgb, write_tiles──► float32 tiles at ``offset``
                                                        └─ error ──► Fault ──raise_error──► the same error elsewhere

Jobs, faults and settings are JSON, so that nothing is run that arrives. Like ``images``, this file does without torch:
``decode_worker`` starts with it in a fraction of a second.
"""

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evovlm.data.errors import SampleError
from evovlm.data.images import Normalization, load_rgb, write_tiles

_FAULT_BYTES = 1 << 16  # what Linux maps around a page that is read


class DecodeOptions(NamedTuple):
    """What all jobs of a loader have in common.

    Attributes:
        tile_size: side S of a tile in pixels.
        normalization: mean and standard deviation of pixels.
        max_pixels: images with more pixels are errors.
    """

    tile_size: int
    normalization: Normalization
    max_pixels: int

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile, float32 [3, S, S]."""
        return 12 * self.tile_size**2


class TileJob(NamedTuple):
    """Some tiles of one image, and where they go.

    Attributes:
        name: the sample's, for error messages.
        path: file that holds the image.
        frame: frame of an animated file; -1 for a still image.
        cols: columns of the tile grid.
        rows: rows of the tile grid.
        thumbnail: whether one more tile holds the whole image, after the grid.
        begin: first tile wanted.
        end: tile after the last one wanted.
        jpeg_qualities: degrade each of these tiles to its quality; None: do not.
        offset: where the first of them begins, in bytes of the shared memory.
    """

    name: str
    path: str
    frame: int
    cols: int
    rows: int
    thumbnail: bool
    begin: int
    end: int
    jpeg_qualities: list[int] | None
    offset: int


class Fault(NamedTuple):
    """Why a job failed.

    Attributes:
        job: its number in the chunk.
        sample: ``reason``, ``detail`` and ``name`` of a ``SampleError``; None: it was another error.
        text: the error in words.
    """

    job: int
    sample: tuple[str, str, str | None] | None
    text: str

    def error(self) -> Exception:
        """Make the error again."""
        return SampleError(*self.sample) if self.sample else RuntimeError(self.text)


class Outcome(NamedTuple):
    """What became of a chunk of jobs.

    Attributes:
        seconds: how long it took.
        cpu_seconds: processor time that it took.
        faults: jobs that failed.
    """

    seconds: float
    cpu_seconds: float
    faults: list[Fault]


def decode_chunk(jobs: Sequence[TileJob], options: DecodeOptions, memory: memoryview, base: int = 0) -> Outcome:
    """Do jobs one after the other; one that fails does not keep the others from being done.

    Args:
        jobs: what to decode.
        options: see ``DecodeOptions``.
        memory: writable bytes that the tiles are written into.
        base: offset, as jobs count, at which ``memory`` begins.
    """
    began, cpu_began = time.perf_counter(), time.thread_time()
    faults = []
    size = options.tile_size
    for number, job in enumerate(jobs):
        try:
            tiles = range(job.begin, job.end)
            start = job.offset - base
            room = memory[start : start + len(tiles) * options.tile_bytes]
            # Where another worker has written before, reading maps 16 pages at once, and writing only one.
            np.frombuffer(room, np.uint8)[::_FAULT_BYTES].max(initial=0)
            out = np.frombuffer(room, np.float32).reshape(len(tiles), 3, size, size)
            image = load_rgb(job.path, job.frame, max_pixels=options.max_pixels, name=job.name)
            write_tiles(image, job.cols, job.rows, job.thumbnail, tiles, options.normalization, job.jpeg_qualities, out)
        except SampleError as error:
            faults.append(Fault(number, (error.reason, error.detail, error.name), str(error)))
        except Exception as error:  # noqa: BLE001 - raised again where the step is asked for
            text = f"sample '{job.name}': decoding image '{job.path}' failed: {type(error).__name__}: {error}"
            faults.append(Fault(number, None, text))
    return Outcome(time.perf_counter() - began, time.thread_time() - cpu_began, faults)


def pack_chunk(number: int, jobs: Sequence[TileJob]) -> bytes:
    """Write a chunk as a message."""
    return json.dumps([number, jobs]).encode()


def unpack_chunk(message: bytes) -> tuple[int, list[TileJob]]:
    """Read what ``pack_chunk`` wrote."""
    number, jobs = json.loads(message)
    return number, [TileJob(*job) for job in jobs]


def pack_outcome(number: int, outcome: Outcome | None) -> bytes:
    """Write what became of a chunk as a message; None: it has only been begun."""
    return json.dumps([number, outcome]).encode()


def unpack_outcome(message: bytes) -> tuple[int, Outcome | None]:
    """Read what ``pack_outcome`` wrote."""
    number, values = json.loads(message)
    if values is None:
        return number, None
    seconds, cpu_seconds, faults = values
    return number, Outcome(
        seconds, cpu_seconds, [Fault(job, None if s is None else tuple(s), text) for job, s, text in faults]
    )
