"""Turns a task into rows of the index: what the worker processes do.

line ─parse─► Sample ─read sizes, tile─► images ─┐
                 └─render─► collapsed ids ───────┴─► SAMPLE row, IMAGE rows, ids, paths    or a Skip with its reason
line ─parse─► Pair ─ likewise, both answers rendered, what they share stored once

document of a corpus ─check ids─► SAMPLE rows that point into the corpus' .bin
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import key
from evovlm.data.annotation import Sample, parse_sample, with_system
from evovlm.data.chat import ChatTokens, Turn, place_frames, render
from evovlm.data.corpus import check_ids
from evovlm.data.errors import Reason, SampleError
from evovlm.data.images import read_size
from evovlm.data.index_format import IMAGE, SAMPLE, Kind, sample_dtype
from evovlm.data.index_settings import IndexSettings
from evovlm.data.index_tasks import DocumentTask, LineTask, Task
from evovlm.data.index_writer import Chunk, Skip
from evovlm.data.meta import DatasetMeta
from evovlm.data.preference import Pair, SharedPair, parse_pair, share_prefix, with_answer
from evovlm.data.tiling import Grid, choose_grid, max_tiles_per_image, num_tiles
from evovlm.data.tokenizer import Tokenizer
from evovlm.data.video import open_video, select_frames


def work(task: Task) -> Chunk:
    """Do one task; called in worker processes.

    Raises:
        MetaError: a corpus holds ids that the tokenizer lacks.
    """
    return _documents(task) if isinstance(task, DocumentTask) else _lines(task)


_tokenizer = lru_cache(maxsize=1)(Tokenizer.load)  # loading takes longer than a task


@dataclass(frozen=True)
class _Image:
    """One image of a sample, before it has a row."""

    path: Path
    frame: int
    grid: Grid
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return num_tiles(self.grid, self.thumbnail)


def _lines(task: LineTask) -> Chunk:
    tokenizer = _tokenizer(task.settings.tokenizer)
    settings, kind = task.settings, task.settings.kind
    parse = parse_pair if kind == "preference" else parse_sample
    rows = _Rows(task.dataset.root, kind)
    skips: list[Skip] = []
    for line, raw in _read_lines(task):
        sample: Sample | None = None
        try:
            parsed = parse(raw, task.dataset.name, line)
            sample = parsed.sample if isinstance(parsed, Pair) else parsed
            images, turns = _look_at_images(sample, settings, task.dataset)
            turns = with_system(turns, settings.system_prompt)
            pair: SharedPair | None = None
            if isinstance(parsed, Pair):
                chosen, rejected = (
                    render(with_answer(turns, answer), len(images), tokenizer, name=sample.name)
                    for answer in (parsed.chosen, parsed.rejected)
                )
                pair = share_prefix(chosen, rejected, name=sample.name)
                chat = pair.tokens
            else:
                chat = render(turns, len(images), tokenizer, name=sample.name)
            _check_fit(chat, images, sample, settings)
            rows.add(line, chat, images, settings.tokens_per_tile, pair)
        except SampleError as error:
            sample_id = sample.id if sample is not None else _id_of(raw)
            skips.append(Skip(line, sample_id, error.reason, error.detail))
    return rows.finish(task.num_lines, skips)


def _read_lines(task: LineTask) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of the lines that are not blank, ``num_lines`` of them."""
    with task.dataset.annotation.open("rb") as file:
        file.seek(task.start)
        block = file.read(task.end - task.start)
    left = task.num_lines
    for line, raw in enumerate(block.split(b"\n"), start=task.first_line):
        if left and raw and not raw.isspace():
            left -= 1
            yield line, raw


def _id_of(raw: bytes) -> str | None:
    """Find the id of a line that could not be parsed to a sample, if it can be read at all."""
    try:
        content = json.loads(raw)
    except ValueError:
        return None
    return str(content["id"]) if isinstance(content, dict) and content.get("id") is not None else None


def _look_at_images(
    sample: Sample, settings: IndexSettings, dataset: DatasetMeta
) -> tuple[list[_Image], tuple[Turn, ...]]:
    """Find a sample's images or frames, read their sizes and choose their grids (spec §1.7).

    Raises:
        SampleError: an image is missing or damaged.
    """
    decode = settings.check_images == "decode"
    if sample.video is not None:
        video = open_video(
            dataset.root / sample.video,
            folder_fps=settings.video_folder_fps,
            max_pixels=settings.max_pixels,
            name=sample.name,
        )
        frames = select_frames(
            video,
            sampling=settings.video_sampling,
            min_frames=settings.video_min_frames,
            max_frames=settings.video_max_frames,
            clip=sample.clip,
            random_key=key("video", settings.seed, sample.dataset, sample.line),
            name=sample.name,
        )
        for path in sorted({path for path, _ in frames}):
            read_size(path, max_pixels=settings.max_pixels, decode=decode, name=sample.name)
        images = [_Image(path, frame, Grid(1, 1), thumbnail=False) for path, frame in frames]
        return images, tuple(place_frames(sample.turns, len(images), name=sample.name))

    cap = dataset.max_tiles or settings.max_tiles
    if len(sample.images) > 1:
        cap = max_tiles_per_image(cap, len(sample.images))
    images = []
    for name in sample.images:
        path = dataset.root / name
        width, height = read_size(path, max_pixels=settings.max_pixels, decode=decode, name=sample.name)
        grid = choose_grid(width, height, min(settings.min_tiles, cap), cap, settings.tile_size)
        images.append(_Image(path, -1, grid, settings.thumbnail and grid.cols * grid.rows > 1))
    return images, sample.turns


def _check_fit(chat: ChatTokens, images: list[_Image], sample: Sample, settings: IndexSettings) -> None:
    """Raise ``SampleError`` if a sample is over-long, or nothing of it is supervised."""
    num_visual = sum(image.num_tiles for image in images) * settings.tokens_per_tile
    total, limit = len(chat.ids) + num_visual, settings.max_tokens
    if not chat.supervised[1:].any():
        raise SampleError(Reason.NO_TARGETS, f"none of its {total} tokens is a target of the loss", sample.name)
    if limit is not None and total > limit:
        raise SampleError(Reason.TOO_LONG, _too_long(total, num_visual, limit), sample.name)


def _too_long(total: int, num_visual: int, limit: int) -> str:
    visual = f" ({num_visual} of them visual)" if num_visual else ""
    return f"{total} tokens{visual}, the limit is {limit}: raise max_tokens, lower max_tiles or shorten it"


class _Rows:
    """Collects the rows of a chunk; offsets count from its start."""

    def __init__(self, root: Path, kind: Kind) -> None:
        self.root = root
        self.kind: Kind = kind
        self.samples: list[tuple[int, ...]] = []
        self.images: list[tuple[int | bool, ...]] = []
        self.tokens: list[NDArray[np.int32]] = []
        self.num_tokens = 0
        self.paths = bytearray()
        self.places: dict[Path, tuple[int, int]] = {}

    def add(
        self, line: int, chat: ChatTokens, images: list[_Image], tokens_per_tile: int, pair: SharedPair | None
    ) -> None:
        """Add a sample; unsupervised ids are stored as ``~id``."""
        tiles = sum(image.num_tiles for image in images)
        num_visual = tiles * tokens_per_tile
        stored, supervised = len(chat.ids), int(chat.supervised[1:].sum())
        # dataset, line, source, offset, stored, tokens, supervised, tiles, images, first image
        place = (0, line, 0, self.num_tokens, stored)
        row = (*place, stored + num_visual, supervised, tiles, len(images), len(self.images))
        # All images stand before the branches.
        branches = (pair.chosen_at + num_visual, pair.rejected_at + num_visual, pair.num_chosen) if pair else ()
        self.samples.append(row + branches)
        self.tokens.append(np.where(chat.supervised, chat.ids, ~chat.ids).astype(np.int32))
        self.num_tokens += len(chat.ids)
        for image, insert_at in zip(images, chat.insert_at, strict=True):
            # insert_at, tiles, cols, rows, thumbnail, frame, path
            self.images.append(
                (insert_at, image.num_tiles, *image.grid, image.thumbnail, image.frame, *self._place(image.path))
            )

    def _place(self, path: Path) -> tuple[int, int]:
        """Return where a path stands in the chunk's paths, putting it there the first time."""
        if path not in self.places:
            name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
            raw = os.fsencode(name)
            self.places[path] = (len(self.paths), len(raw))
            self.paths += raw
        return self.places[path]

    def finish(self, num_lines: int, skips: list[Skip]) -> Chunk:
        """Turn the collected rows into arrays."""
        return Chunk(
            num_lines=num_lines,
            samples=np.array(self.samples, dtype=sample_dtype(self.kind)),
            images=np.array(self.images, dtype=IMAGE),
            tokens=np.concatenate(self.tokens) if self.tokens else np.empty(0, dtype=np.int32),
            paths=bytes(self.paths),
            skips=tuple(skips),
        )


def _documents(task: DocumentTask) -> Chunk:
    """Check the ids of a stretch of a corpus and make rows of its documents, all at once."""
    first, end = int(task.offsets[0]), int(task.offsets[-1] + task.lengths[-1])
    if end > first:
        itemsize = np.dtype(task.dtype).itemsize
        tokens = np.memmap(task.bin_path, task.dtype, mode="r", offset=first * itemsize, shape=(end - first,))
        check_ids(tokens.view(np.ndarray), first, task.vocab_size, task.prefix)

    limit, lengths = task.settings.max_tokens, task.lengths
    usable = (lengths > 1) & (lengths <= (limit or lengths.max()))
    skips = []
    for number in np.flatnonzero(~usable).tolist():
        length = int(lengths[number])
        if length == 0:
            reason, detail = Reason.EMPTY_DOCUMENT, "the document has no tokens"
        elif length == 1:
            reason, detail = Reason.NO_TARGETS, "the document has one token, so no target"
        else:
            reason, detail = Reason.TOO_LONG, _too_long(length, 0, limit or length)
        skips.append(Skip(task.first_document + number, None, reason, detail))

    document = np.flatnonzero(usable)
    samples = np.zeros(len(document), dtype=SAMPLE)
    samples["line"] = task.first_document + document
    samples["token_offset"] = task.offsets[document]
    samples["num_stored"] = samples["num_tokens"] = lengths[document]
    samples["num_supervised"] = lengths[document] - 1
    return Chunk(num_lines=len(lengths), samples=samples, skips=tuple(skips))
