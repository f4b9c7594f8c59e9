"""Writes the arrays of an index, chunk after chunk, into a folder that appears under its name only when complete.

    Chunk, Chunk, …  ──append──►  .NAME.partial-PID/   samples/*.bin, images/*.bin, tokens.bin, paths.bin, skipped.jsonl
                                       │ finish: index.json, then one rename
                                       ▼
                                  NAME/

A chunk has rows, and counts its offsets from its own start; ``append`` moves them to where the files stand and takes
the rows apart into the files of their fields. Nothing but the chunk at hand is in memory.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from evovlm.data.errors import MetaError
from evovlm.data.index_format import (
    IMAGE,
    IMAGE_FILES,
    IMAGES_FOLDER,
    INDEX_FILE,
    PATHS_FILE,
    SAMPLES_FOLDER,
    SKIPPED_FILE,
    TOKENS_FILE,
    IndexMeta,
    Kind,
    sample_files,
)


@dataclass(frozen=True)
class Skip:
    """A line that did not become a sample.

    Attributes:
        line: counted from 1.
        id: the line's own ``id``, where it has one.
        reason: the kind of fault.
        detail: the whole message.
    """

    line: int
    id: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """What some consecutive lines became; offsets count from the chunk's own start.

    Attributes:
        num_lines: lines read.
        samples: ``sample_dtype`` [n]; ``dataset`` and ``token_source`` are set by the writer.
        images: ``IMAGE`` [m].
        tokens: int32, for the own store; empty for a corpus, whose ``token_offset`` is already final.
        paths: UTF-8.
        skips: lines left out.
    """

    num_lines: int
    samples: NDArray[np.void]
    images: NDArray[np.void] = field(default_factory=lambda: np.empty(0, dtype=IMAGE))
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    paths: bytes = b""
    skips: tuple[Skip, ...] = ()


@dataclass
class Totals:
    """Sums over the chunks of a dataset."""

    num_lines: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    num_images: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_tiles: int = 0

    def add(self, chunk: Chunk) -> None:
        """Count one more chunk."""
        self.num_lines += chunk.num_lines
        self.num_samples += len(chunk.samples)
        self.num_skipped += len(chunk.skips)
        self.num_images += len(chunk.images)
        for name in ("num_tokens", "num_supervised", "num_tiles"):
            setattr(self, name, getattr(self, name) + int(chunk.samples[name].sum(dtype=np.int64)))


class IndexWriter:
    """Context manager around the files of an index being written; leaving it unfinished removes them.

    Args:
        out: folder that the index gets. What stands there is replaced at the end if it is an index or empty.
        kind: what the samples are: it decides the files.

    Raises:
        FileExistsError: ``out`` holds something that is not an index.
    """

    def __init__(self, out: Path, kind: Kind = "conversations") -> None:
        self.out = out
        self._tables = {SAMPLES_FOLDER: sample_files(kind), IMAGES_FOLDER: IMAGE_FILES}
        if out.exists() and not (out / INDEX_FILE).exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"'{out}' exists and is not an index: give another folder or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        self.num_samples = 0
        self.num_images = 0
        self.num_tokens = 0  # stored in tokens.bin
        self.path_bytes = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        names = [TOKENS_FILE, PATHS_FILE, SKIPPED_FILE]
        for table, files in self._tables.items():
            (self.folder / table).mkdir()
            names += [f"{table}/{name}.bin" for name in files]
        self._files: dict[str, BinaryIO] = {name: (self.folder / name).open("wb") for name in names}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already if finish() has renamed it

    def append(self, chunk: Chunk, *, dataset: int, dataset_name: str, source: int) -> None:
        """Write one chunk's rows, tokens, paths and skips.

        Args:
            chunk: rows with offsets from the chunk's own start.
            dataset: row of the dataset.
            dataset_name: its name, for ``skipped.jsonl``.
            source: row of the token source; 0 is the own store.

        Raises:
            MetaError: a number is larger than the index can hold.
        """
        samples, images = chunk.samples.copy(), chunk.images.copy()
        samples["dataset"] = dataset
        samples["token_source"] = source
        samples["first_image"] += self.num_images
        images["path_offset"] += self.path_bytes
        if source == 0:
            samples["token_offset"] += self.num_tokens
        self._write_rows(SAMPLES_FOLDER, samples, lambda row: f"sample '{dataset_name}/{samples['line'][row]}'")
        owner = chunk.samples["first_image"]
        self._write_rows(
            IMAGES_FOLDER,
            images,
            lambda row: (
                f"an image of sample '{dataset_name}/{samples['line'][np.searchsorted(owner, row, side='right') - 1]}'"
            ),
        )
        self._files[TOKENS_FILE].write(chunk.tokens.astype("<i4", copy=False).tobytes())
        self._files[PATHS_FILE].write(chunk.paths)
        for skip in chunk.skips:
            row = {
                "dataset": dataset_name,
                "line": skip.line,
                "id": skip.id,
                "reason": skip.reason,
                "detail": skip.detail,
            }
            self._files[SKIPPED_FILE].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.num_samples += len(samples)
        self.num_images += len(images)
        self.num_tokens += len(chunk.tokens)
        self.path_bytes += len(chunk.paths)

    def _write_rows(self, table: str, rows: NDArray[np.void], name: Callable[[int], str]) -> None:
        """Write each field of some rows to its file; ``name`` names a row in an error."""
        for file, dtype in self._tables[table].items():
            stored = np.empty(len(rows), dtype)
            for part in dtype.names or (file,):
                column = stored[part] if dtype.names else stored
                column[...] = rows[part]
                wrong = np.flatnonzero(column != rows[part])
                if len(wrong):
                    raise MetaError(
                        f"{name(int(wrong[0]))} has {part} = {rows[part][wrong[0]]}, but an index holds at most "
                        f"{np.iinfo(column.dtype).max}: leave it out or make several indexes"
                    )
            self._files[f"{table}/{file}.bin"].write(stored.tobytes())

    def finish(self, meta: IndexMeta) -> None:
        """Write ``index.json`` last and give the folder its name; an index that stood there goes."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with (self.folder / INDEX_FILE).open("w", encoding="utf-8") as file_json:
            file_json.write(meta.model_dump_json(indent=1))
            file_json.flush()
            os.fsync(file_json.fileno())
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.folder.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
