"""Cuts datasets into tasks of about equal work, small enough to be held in memory.

chart.jsonl   │ lines 1–1024 │ lines 1025–2048 │ …     found by one fast pass over the file
corpus.idx    │ documents 1–9000 │ documents 9001– …   cut by tokens
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evovlm.data.corpus import open_corpus
from evovlm.data.index_format import TokenSource
from evovlm.data.index_settings import IndexSettings
from evovlm.data.meta import DatasetMeta

_LINES = 1024
_BYTES = 4 << 20
_TOKENS = 16 << 20
_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class LineTask:
    """Consecutive lines of a .jsonl.

    Attributes:
        settings: of the index.
        dataset: that the lines belong to.
        start: first byte.
        end: byte after the last.
        first_line: number of the first line, from 1.
        num_lines: lines to read, blank ones not counted; there may be more in the stretch.
    """

    settings: IndexSettings
    dataset: DatasetMeta
    start: int
    end: int
    first_line: int
    num_lines: int


@dataclass(frozen=True)
class DocumentTask:
    """Consecutive documents of a Megatron corpus.

    Attributes:
        settings: of the index.
        prefix: of the corpus.
        bin_path: its file of ids.
        dtype: of the ids in the file.
        vocab_size: ids must be below.
        first_document: number of the first document, from 1.
        offsets: int64 [n], first token of each, in elements.
        lengths: int64 [n].
    """

    settings: IndexSettings
    prefix: Path
    bin_path: Path
    dtype: str
    vocab_size: int
    first_document: int
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


Task = LineTask | DocumentTask


def plan_lines(dataset: DatasetMeta, settings: IndexSettings) -> tuple[list[Task], int, int | None]:
    """Cut a .jsonl into tasks.

    Returns:
        the tasks, the number of lines that they read (blank lines are none), and that number again if a
        ``repeat_time`` below 1 cut it, else None.
    """
    found: list[LineTask] = []
    start = offset = 0
    first_line = line = 1
    count = 0
    with dataset.annotation.open("rb") as file:
        for raw in file:
            offset += len(raw)
            line += 1
            count += not raw.isspace()
            if count == _LINES or offset - start >= _BYTES:
                found.append(LineTask(settings, dataset, start, offset, first_line, count))
                start, first_line, count = offset, line, 0
    if count:
        found.append(LineTask(settings, dataset, start, offset, first_line, count))
    total = sum(task.num_lines for task in found)
    keep = _kept(total, dataset.repeat_time)
    tasks: list[Task] = []
    left = keep
    for task in found:
        num_lines = min(task.num_lines, left)
        if num_lines:
            tasks.append(LineTask(settings, dataset, task.start, task.end, task.first_line, num_lines))
        left -= num_lines
    return tasks, keep, keep if dataset.repeat_time < 1 else None


def plan_corpus(
    dataset: DatasetMeta, settings: IndexSettings, vocab_size: int
) -> tuple[list[Task], int, int | None, TokenSource]:
    """Cut a Megatron corpus into tasks; as ``plan_lines``, for documents, with the corpus as a token source."""
    corpus = open_corpus(dataset.annotation)
    keep = _kept(len(corpus), dataset.repeat_time)
    bounds = [0]
    tokens = np.cumsum(corpus.lengths[:keep])
    while bounds[-1] < keep:
        first = bounds[-1]
        before = int(tokens[first - 1]) if first else 0
        by_tokens = int(np.searchsorted(tokens, before + _TOKENS, side="right"))
        bounds.append(min(keep, first + _DOCUMENTS, max(first + 1, by_tokens)))
    tasks: list[Task] = [
        DocumentTask(
            settings=settings,
            prefix=corpus.prefix,
            bin_path=corpus.bin_path,
            dtype=corpus.dtype,
            vocab_size=vocab_size,
            first_document=first + 1,
            offsets=corpus.offsets[first:end],
            lengths=corpus.lengths[first:end],
        )
        for first, end in pairwise(bounds)
    ]
    source = TokenSource(path=str(corpus.bin_path), dtype=corpus.dtype, num_bytes=corpus.num_bytes, own=False)
    return tasks, keep, keep if dataset.repeat_time < 1 else None, source


def _kept(total: int, repeat_time: float) -> int:
    """Apply a ``repeat_time`` below 1: the first ``floor(total * repeat_time)`` (spec §3.1)."""
    return int(total * repeat_time) if repeat_time < 1 else total
