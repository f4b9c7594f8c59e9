"""Writes an index of made-up samples of any number, in the memory of one chunk: to measure planning and loading.

    length_mix ─► chunk of samples ─► IndexWriter ─► OUT/
                    └── tokens, paths: places in a small store that all samples share

A fifth of the samples comes from a dataset ``text``, the rest from ``pictures`` (which has texts as well). Everything
that planning reads is as in a real index of that size. Token ids are read from a store of ``STORE`` ids that samples
share, so tokens.bin stays small; images have rows and paths, but no files behind them.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc.random import choice_index, key, keys
from evovlm.data.index_format import FORMAT_VERSION, IMAGE, SAMPLE, TOKENS_FILE, DatasetInfo, IndexMeta, TokenSource
from evovlm.data.index_writer import Chunk, IndexWriter, Totals
from evovlm.data.synthetic.lengths import MARKS_PER_IMAGE, MAX_GRID, MAX_TOKENS, TOKENS_PER_TILE, length_mix

VOCAB_SIZE = 32_000
STORE = 1 << 20  # ids in tokens.bin
_CHUNK = 1 << 17
_NUM_PATHS = 1000
_TEXT = "text"
_TEXT_SHARE = 5  # one in so many samples is of the dataset of texts


def write_index(out: Path, num_samples: int, *, seed: int = 0, mix: str = "internvl") -> IndexMeta:
    """Write an index of made-up samples.

    Args:
        out: folder that it gets; an index that stands there is replaced.
        num_samples: samples, at least 2.
        seed: of lengths and ids.
        mix: name of the lengths of the dataset ``pictures`` (``length_mix``).

    Returns:
        Its ``index.json``.

    Raises:
        ValueError: fewer than 2 samples.
        FileExistsError: ``out`` holds something else than an index.
        KeyError: there is no such mix.
    """
    if num_samples < 2:
        raise ValueError(f"an index of {num_samples} samples cannot have two datasets: ask for 2 or more")
    num_text = max(1, num_samples // _TEXT_SHARE)
    datasets = []
    with IndexWriter(out) as writer:
        store = choice_index(keys("synthetic index", "tokens", seed, np.arange(STORE)), VOCAB_SIZE).astype(np.int32)
        paths = "".join(_path(number) for number in range(_NUM_PATHS)).encode()
        writer.append(Chunk(0, np.empty(0, SAMPLE), tokens=store, paths=paths), dataset=0, dataset_name=_TEXT, source=0)
        for number, (name, count) in enumerate(((_TEXT, num_text), ("pictures", num_samples - num_text))):
            first, totals = writer.num_samples, Totals()
            for line in range(0, count, _CHUNK):
                samples, images = _rows(min(_CHUNK, count - line), line, seed, _TEXT if name == _TEXT else mix)
                images["path_offset"] -= writer.path_bytes  # moved on by the writer, but paths are shared
                chunk = Chunk(len(samples), samples, images)
                writer.append(chunk, dataset=number, dataset_name=name, source=1)  # not 0: offsets are final
                totals.add(chunk)
            datasets.append(_info(name, first, totals))
        meta = _meta(tuple(datasets), writer)
        writer.finish(meta)
    return meta


def _path(number: int) -> str:
    return f"images/{number:06}.jpg"


def _rows(count: int, line: int, seed: int, mix: str) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Rows of samples ``line`` to ``line + count - 1`` of a dataset, and of their images."""
    lengths = length_mix(count, key("synthetic index", seed, mix, line), "internvl" if mix == _TEXT else mix)
    num_stored = np.maximum(2, lengths.tokens - TOKENS_PER_TILE * lengths.tiles)  # one target at least
    samples = np.zeros(count, SAMPLE)
    samples["line"] = 1 + line + np.arange(count)
    draws = keys("synthetic index", "offset", seed, mix, line + np.arange(count))
    samples["token_offset"] = choice_index(draws, STORE - MAX_TOKENS)
    samples["num_stored"] = num_stored
    samples["num_tokens"] = num_stored
    samples["num_supervised"] = num_stored - 1  # all ids are: visual tokens never
    if mix == _TEXT:
        return samples, np.empty(0, IMAGE)
    samples["num_tokens"] += TOKENS_PER_TILE * lengths.tiles
    samples["num_tiles"], samples["num_images"] = lengths.tiles, lengths.images
    first = np.cumsum(lengths.images, dtype=np.int64) - lengths.images
    samples["first_image"] = first

    num_images, size = len(lengths.image_tiles), len(_path(0))
    images = np.zeros(num_images, IMAGE)
    # An image's two marks are the first ids of the sample; its visual tokens go before the second mark.
    images["insert_at"] = 1 + MARKS_PER_IMAGE * (np.arange(num_images) - np.repeat(first, lengths.images))
    images["num_tiles"] = lengths.image_tiles
    images["thumbnail"] = lengths.image_tiles > 1
    images["cols"], images["rows"] = lengths.image_tiles - images["thumbnail"], 1
    images["frame"] = -1
    draws = keys("synthetic index", "path", seed, mix, line, np.arange(num_images))
    images["path_offset"], images["path_length"] = size * choice_index(draws, _NUM_PATHS), size
    return samples, images


def _info(name: str, first: int, totals: Totals) -> DatasetInfo:
    return DatasetInfo(
        name=name,
        kind="multimodal" if totals.num_images else "language",
        first=first,
        count=totals.num_samples,
        repeat_time=1.0,
        cut_to=None,
        augment=False,
        weight=None,
        root="",
        annotation="",
        max_tiles=MAX_GRID,
        num_lines=totals.num_lines,
        num_skipped=0,
        num_tokens=totals.num_tokens,
        num_supervised=totals.num_supervised,
        num_tiles=totals.num_tiles,
        num_images=totals.num_images,
    )


def _meta(datasets: tuple[DatasetInfo, ...], writer: IndexWriter) -> IndexMeta:
    store = TokenSource(path=TOKENS_FILE, dtype="int32", num_bytes=4 * writer.num_tokens, own=True)
    return IndexMeta(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint="synthetic",
        vocab_size=VOCAB_SIZE,
        tile_size=448,
        tokens_per_tile=TOKENS_PER_TILE,
        min_tiles=1,
        max_tiles=MAX_GRID,
        thumbnail=True,
        datasets=datasets,
        sources=(store, store),  # the second for samples, whose offsets the writer leaves as they are
        num_samples=writer.num_samples,
        num_images=writer.num_images,
        num_tokens=sum(info.num_tokens for info in datasets),
        num_supervised=sum(info.num_supervised for info in datasets),
        num_tiles=sum(info.num_tiles for info in datasets),
        path_bytes=writer.path_bytes,
        skipped={},
        warnings=(),
        files=(),
        settings={},
        settings_hash="synthetic",
    )
