"""The memory-mapped index that training reads: what every sample costs and where it lies.

    meta.json ─┐                       index.json     settings, datasets, totals, skips   (``IndexMeta``)
    *.jsonl   ─┼─► build_index.py ──►  samples.bin    one ``SAMPLE`` row each
    *.bin/idx ─┘                       images.bin     one ``IMAGE`` row each, in sample order
                                       tokens.bin     collapsed token ids, int32 (``~id``: not supervised)
                                       paths.bin      UTF-8 paths, relative to the dataset's root
                                       skipped.jsonl  every line that did not become a sample, and why

Token ids are stored **collapsed**: an image is ``<img></img>`` with nothing between, and ``insert_at`` says where its
visual tokens go (``evovlm.data.sample`` expands them). Text corpora in Megatron's format are not copied: their rows
point into the corpus' own ``.bin``. Opening an index maps files and reads ``index.json``, nothing else.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evovlm.data.index_format import (
    IMAGE,
    IMAGES_FILE,
    PATHS_FILE,
    REBUILD,
    SAMPLE,
    SAMPLES_FILE,
    DatasetInfo,
    ImageRef,
    IndexMeta,
    IndexMismatchError,
    TokenSource,
    read_meta,
)

__all__ = [
    "IMAGE",
    "SAMPLE",
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


class Index:
    """A memory-mapped index; see the head of this file for the files behind it.

    Attributes:
        path: the index folder.
        meta: ``index.json``.
        samples: ``SAMPLE`` rows, read-only.
        images: ``IMAGE`` rows, read-only; those of a sample lie together, in order of appearance.
        datasets: one entry per dataset, each a contiguous range of samples.
    """

    def __init__(self, path: Path, meta: IndexMeta) -> None:
        self.path = path
        self.meta = meta
        self.datasets: tuple[DatasetInfo, ...] = meta.datasets
        self.samples: NDArray[np.void] = _map(path / SAMPLES_FILE, SAMPLE, meta.num_samples)
        self.images: NDArray[np.void] = _map(path / IMAGES_FILE, IMAGE, meta.num_images)
        self._paths: NDArray[np.uint8] = _map(path / PATHS_FILE, np.uint8, meta.path_bytes)

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

    @cached_property
    def _token_files(self) -> tuple[NDArray[Any], ...]:
        files = []
        for source in self.meta.sources:
            dtype = np.dtype(source.dtype)
            files.append(_map(self.path / source.path, dtype, source.num_bytes // dtype.itemsize))
        return tuple(files)

    def tokens(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the collapsed token ids int32 [num_stored] of a sample, and bool [num_stored]: is it supervised."""
        row = self.samples[sample]
        source = int(row["token_source"])
        offset = int(row["token_offset"])
        stored = self._token_files[source][offset : offset + int(row["num_stored"])]
        if not self.meta.sources[source].own:
            return stored.astype(np.int32), np.ones(len(stored), dtype=np.bool_)
        supervised = np.asarray(stored >= 0)
        return np.where(supervised, stored, ~stored).astype(np.int32, copy=False), supervised

    def image_refs(self, sample: int) -> list[ImageRef]:
        """Return the images of a sample in order of appearance."""
        row = self.samples[sample]
        first, count = int(row["first_image"]), int(row["num_images"])
        root = Path(self.datasets[int(row["dataset"])].root)
        refs = []
        for image in self.images[first : first + count]:
            start = int(image["path_offset"])
            name = self._paths[start : start + int(image["path_length"])].tobytes()
            refs.append(
                ImageRef(
                    path=root / os.fsdecode(name),
                    frame=int(image["frame"]),
                    cols=int(image["cols"]),
                    rows=int(image["rows"]),
                    thumbnail=bool(image["thumbnail"]),
                    num_tiles=int(image["num_tiles"]),
                    insert_at=int(image["insert_at"]),
                )
            )
        return refs

    def name(self, sample: int) -> str:
        """Name a sample as error messages do: dataset and line (from 1), such as ``chart/17``."""
        row = self.samples[sample]
        return f"{self.datasets[int(row['dataset'])].name}/{int(row['line'])}"

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


def _map(file: Path, dtype: DTypeLike, count: int) -> NDArray[Any]:
    """Map ``count`` elements of a file, read-only; the file must hold exactly that many."""
    expected = count * np.dtype(dtype).itemsize
    size = file.stat().st_size if file.exists() else -1
    if size != expected:
        found = f"{size} bytes" if size >= 0 else "nothing"
        raise IndexMismatchError(f"'{file}' should hold {expected} bytes, found {found}: {REBUILD}")
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)
