"""The index that training reads: what every sample costs and where it lies.

    meta.json ─┐                       index.json     settings, datasets, totals, skips   (``IndexMeta``)
    *.jsonl   ─┼─► build_index.py ──►  samples/       a row per sample: columns for planning, and details.bin
    *.bin/idx ─┘                       images/        a row per image, in sample order; likewise
                                       tokens.bin     collapsed token ids, int32 (``~id``: not supervised)
                                       paths.bin      UTF-8 paths, relative to the dataset's root
                                       skipped.jsonl  every line that did not become a sample, and why

Token ids are stored **collapsed**: an image is ``<img></img>`` with nothing between, and ``insert_at`` says where its
visual tokens go (``evovlm.data.sample`` expands them). Text corpora in Megatron's format are not copied: their rows
point into the corpus' own ``.bin``.

Opening an index maps files and reads ``index.json``, nothing else. Columns are mapped: planning makes those resident
that it looks at, 16 bytes a sample and 1 an image (``index_format``). Details, tokens and paths are read a sample at a
time and never become resident.
"""

import os
from bisect import bisect_right
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evovlm.data.columns import Columns, check_size, map_table
from evovlm.data.file_reader import FileReader
from evovlm.data.index_format import (
    DETAILS,
    IMAGE,
    IMAGE_FILES,
    IMAGES_FOLDER,
    PATHS_FILE,
    REBUILD,
    SAMPLE,
    SAMPLE_FILES,
    SAMPLES_FOLDER,
    DatasetInfo,
    ImageRef,
    IndexMeta,
    IndexMismatchError,
    TokenSource,
    read_meta,
    sample_files,
)

__all__ = [
    "IMAGE",
    "SAMPLE",
    "Columns",
    "DatasetInfo",
    "ImageRef",
    "Index",
    "IndexMeta",
    "IndexMismatchError",
    "TokenSource",
    "read_meta",
]


class TokenizerLike(Protocol):
    """What ``Index.check_tokenizer`` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's definition."""


_OPEN_SOURCES = 64  # token files open at once: a mixture may have more corpora than a process may open files
_SAMPLE_DETAILS = SAMPLE_FILES[DETAILS]
_IMAGE_DETAILS = IMAGE_FILES[DETAILS]


class Index:
    """An open index; see the head of this file for the files behind it. Threads and forked processes may share it.

    Attributes:
        path: the index folder.
        meta: ``index.json``.
        samples: a row per sample, with the fields of ``SAMPLE`` as mapped, read-only columns; in an index of
            preference pairs with those of ``BRANCHES``, too.
        images: a row per image, with the fields of ``IMAGE``; those of a sample lie together, in order of appearance.
        datasets: one entry per dataset, each a contiguous range of samples.
    """

    def __init__(self, path: Path, meta: IndexMeta) -> None:
        self.path = path
        self.meta = meta
        self.datasets: tuple[DatasetInfo, ...] = meta.datasets
        self.samples = map_table(path / SAMPLES_FOLDER, sample_files(meta.kind), meta.num_samples)
        self.images = map_table(path / IMAGES_FOLDER, IMAGE_FILES, meta.num_images)
        check_size(path / PATHS_FILE, meta.path_bytes)
        self._sample_details = FileReader(path / SAMPLES_FOLDER / f"{DETAILS}.bin")
        self._image_details = FileReader(path / IMAGES_FOLDER / f"{DETAILS}.bin")
        self._paths = FileReader(path / PATHS_FILE)
        self._source_files = lru_cache(_OPEN_SOURCES)(partial(_open_source, path, meta.sources))
        self._source_dtypes = [np.dtype(source.dtype) for source in meta.sources]
        self._firsts = [dataset.first for dataset in meta.datasets]
        self._roots = [Path(dataset.root) for dataset in meta.datasets]

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Map the index in folder ``path``; takes well under a second whatever its size.

        Raises:
            FileNotFoundError: no index there, or a corpus it points into is gone.
            IndexMismatchError: another format version, or a file that has another size than the index says.
        """
        folder = Path(path)
        meta = read_meta(folder)
        for source in meta.sources:
            file = folder / source.path  # an absolute path of a corpus replaces the folder
            if not file.exists():
                raise FileNotFoundError(
                    f"index '{folder}' points into '{file}', which is not there: restore it or rebuild"
                )
            if file.stat().st_size != source.num_bytes:
                raise IndexMismatchError(
                    f"index '{folder}': '{file}' had {source.num_bytes} bytes when the index was built, "
                    f"now {file.stat().st_size}: {REBUILD}"
                )
        return cls(folder, meta)

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(
        self, sample: int, begin: int = 0, end: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the collapsed token ids int32 [num_stored] of a sample, and bool [num_stored]: is it supervised.

        Args:
            sample: row of ``samples``.
            begin: first token wanted, at least 0.
            end: token after the last one wanted; None, or behind the last: all.

        Raises:
            IndexError: there is no such sample.
            IndexMismatchError: the file of its tokens was cut off since the index was opened.
        """
        offset, num_stored, _, _, source = self._details(sample)
        dtype = self._source_dtypes[source]
        count = max(0, min(num_stored, num_stored if end is None else end) - begin)
        raw = self._source_files(source).read((offset + begin) * dtype.itemsize, count * dtype.itemsize)
        stored = np.frombuffer(raw, dtype)
        if not self.meta.sources[source].own:
            return stored.astype(np.int32), np.ones(count, dtype=np.bool_)
        # The shift gives -1 for ~id, 0 for id: the exclusive or turns ~id to id.
        return np.bitwise_xor(stored, stored >> 31), stored >= 0

    def image_refs(self, sample: int) -> list[ImageRef]:
        """Return the images of a sample in order of appearance.

        Raises:
            IndexError: there is no such sample.
            IndexMismatchError: a file was cut off since the index was opened.
        """
        self._check(sample)
        count = int(self.samples["num_images"][sample])
        if not count:
            return []
        first = int(self.samples["first_image"][sample])
        size = _IMAGE_DETAILS.itemsize
        rows = np.frombuffer(self._image_details.read(first * size, count * size), _IMAGE_DETAILS).tolist()
        tiles = self.images["num_tiles"][first : first + count].tolist()
        root = self._roots[self._dataset_number(sample)]
        place, path = (-1, -1), root
        refs = []
        for (begin, length, insert_at, frame, cols, grid_rows, thumbnail), num_tiles in zip(rows, tiles, strict=True):
            if (begin, length) != place:  # frames of a file come one after the other
                place, path = (begin, length), root / os.fsdecode(self._paths.read(begin, length))
            refs.append(ImageRef(path, frame, cols, grid_rows, thumbnail, num_tiles, insert_at))
        return refs

    def dataset_of(self, sample: int) -> DatasetInfo:
        """Return the dataset of a sample; nothing of the files is touched.

        Raises:
            IndexError: there is no such sample.
        """
        self._check(sample)
        return self.datasets[self._dataset_number(sample)]

    def name(self, sample: int) -> str:
        """Name a sample as error messages do: dataset and line (from 1), such as ``chart/17``."""
        _, _, line, dataset, _ = self._details(sample)
        return f"{self.datasets[dataset].name}/{line}"

    def _details(self, sample: int) -> tuple[int, int, int, int, int]:
        """Token offset, stored tokens, line, dataset and token source of a sample."""
        self._check(sample)
        raw = self._sample_details.read(sample * _SAMPLE_DETAILS.itemsize, _SAMPLE_DETAILS.itemsize)
        row: tuple[int, int, int, int, int] = np.frombuffer(raw, _SAMPLE_DETAILS).item()
        return row

    def _dataset_number(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1  # an empty dataset begins where the next does

    def _check(self, sample: int) -> None:
        if not 0 <= sample < len(self.samples):
            raise IndexError(f"index '{self.path}' has {len(self.samples)} samples, there is no sample {sample}")

    def check_tokenizer(self, tokenizer: TokenizerLike) -> None:
        """Raise ``IndexMismatchError`` unless the index was built with this very tokenizer."""
        if tokenizer.vocab_size != self.meta.vocab_size:
            raise IndexMismatchError(
                f"index '{self.path}' was built with a tokenizer of {self.meta.vocab_size} ids, this one has "
                f"{tokenizer.vocab_size}: use the tokenizer of the index or {REBUILD}"
            )
        if tokenizer.fingerprint != self.meta.tokenizer_fingerprint:
            raise IndexMismatchError(
                f"index '{self.path}' was built with tokenizer {self.meta.tokenizer_fingerprint}, this one is "
                f"{tokenizer.fingerprint}: same size but other tokens; use the tokenizer of the index or rebuild it"
            )

    def check_model(self, vocab_size: int, tile_size: int, tokens_per_tile: int) -> None:
        """Raise ``IndexMismatchError`` unless a model can be trained on this index.

        Args:
            vocab_size: rows of the model's embedding; more than the tokenizer's ids is fine (padding).
            tile_size: pixels per tile side of the model's ViT.
            tokens_per_tile: visual tokens that the model makes of a tile.
        """
        if vocab_size < self.meta.vocab_size:
            raise IndexMismatchError(
                f"the model embeds {vocab_size} ids, index '{self.path}' uses {self.meta.vocab_size}: "
                "resize the embedding to the tokenizer or rebuild the index with the model's tokenizer"
            )
        for what, model, index in (
            ("tile_size", tile_size, self.meta.tile_size),
            ("tokens_per_tile", tokens_per_tile, self.meta.tokens_per_tile),
        ):
            if model != index:
                raise IndexMismatchError(
                    f"the model has {what} = {model}, index '{self.path}' was built for {index}: rebuild the index"
                )


def _open_source(folder: Path, sources: tuple[TokenSource, ...], number: int) -> FileReader:
    return FileReader(folder / sources[number].path)  # an absolute path of a corpus replaces the folder
