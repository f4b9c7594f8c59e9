"""The files of an index: row types, which fields lie in which file, and ``index.json`` as typed models.

samples/  num_tokens, num_tiles, …   a file for each column that planning looks at
          branches.bin               of preference pairs only: where the two answers begin (``preference.py``)
          details.bin                the other fields, row by row: read for the samples that a rank trains on
              └── token_source, token_offset, num_stored ──► ``IndexMeta.sources``: tokens.bin, or the .bin of a corpus
images/   num_tiles.bin, details.bin ──path_offset──► paths.bin
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

FORMAT_VERSION = 2
INDEX_FILE = "index.json"
SAMPLES_FOLDER = "samples"
IMAGES_FOLDER = "images"
DETAILS = "details"
TOKENS_FILE = "tokens.bin"
PATHS_FILE = "paths.bin"
SKIPPED_FILE = "skipped.jsonl"
REBUILD = "rebuild it with `evovlm index`"
MAX_GRID_TILES = 254  # with the thumbnail an image's tiles fit in a byte

Kind = Literal["conversations", "preference"]
"""What the lines of a .jsonl are: conversations, or pairs of a preferred and a rejected answer to a question."""

# Rows in memory, while an index is built.
SAMPLE = np.dtype(
    [
        ("dataset", "<i4"),  # row of Index.datasets
        ("line", "<i4"),  # line of the .jsonl, or document of the corpus, counted from 1
        ("token_source", "<i4"),  # row of IndexMeta.sources
        ("token_offset", "<i8"),  # first token, in elements of the source's dtype
        ("num_stored", "<i4"),  # collapsed tokens on disk
        ("num_tokens", "<i4"),  # expanded length in the LLM, visual tokens included
        ("num_supervised", "<i4"),  # targets after the causal shift (position 0 is never a target)
        ("num_tiles", "<i4"),
        ("num_images", "<i4"),
        ("first_image", "<i8"),  # row of Index.images
    ]
)
BRANCHES = np.dtype(
    [
        ("chosen_at", "<i4"),  # expanded position of the row that predicts the first token of the chosen answer alone
        ("rejected_at", "<i4"),  # likewise of the rejected answer
        ("num_chosen", "<i4"),  # targets of the chosen answer, those shared with the rejected one included
    ]
)
IMAGE = np.dtype(
    [
        ("insert_at", "<i4"),  # collapsed position that the first visual token is put before (that of </img>)
        ("num_tiles", "<i4"),  # thumbnail included
        ("cols", "<i2"),
        ("rows", "<i2"),
        ("thumbnail", "?"),
        ("frame", "<i4"),  # frame of an animated file; -1: a still image
        ("path_offset", "<i8"),
        ("path_length", "<i4"),  # bytes
    ]
)

# On disk, NAME.bin for each entry. A rank's memory holds what it touches of a file, and planning touches all of the
# columns in the end: 16 bytes a sample and 1 an image, so these are narrow. The writer checks that values fit.
SAMPLE_FILES: dict[str, np.dtype[Any]] = {
    "num_tokens": np.dtype("<i4"),
    "num_supervised": np.dtype("<i4"),
    "num_tiles": np.dtype("<i2"),
    "num_images": np.dtype("<i2"),
    "first_image": np.dtype("<u4"),
    DETAILS: np.dtype(
        [("token_offset", "<i8"), ("num_stored", "<i4"), ("line", "<i4"), ("dataset", "<i2"), ("token_source", "<i2")]
    ),
}
IMAGE_FILES: dict[str, np.dtype[Any]] = {
    "num_tiles": np.dtype("u1"),
    DETAILS: np.dtype(
        [
            ("path_offset", "<i8"),
            ("path_length", "<i4"),
            ("insert_at", "<i4"),
            ("frame", "<i4"),
            ("cols", "u1"),
            ("rows", "u1"),
            ("thumbnail", "?"),
        ]
    ),
}


def sample_dtype(kind: Kind) -> np.dtype[Any]:
    """Rows of samples in memory: ``SAMPLE``, for pairs with the fields of ``BRANCHES``."""
    return np.dtype([*SAMPLE.descr, *BRANCHES.descr]) if kind == "preference" else SAMPLE


def sample_files(kind: Kind) -> dict[str, np.dtype[Any]]:
    """Files of samples/ on disk: ``SAMPLE_FILES``, for pairs ``branches`` too."""
    return SAMPLE_FILES | {"branches": BRANCHES} if kind == "preference" else SAMPLE_FILES


class IndexMismatchError(ValueError):
    """An index does not fit its files, the tokenizer or the model; the message names both values."""


@dataclass(frozen=True)
class ImageRef:
    """One image of a sample, as the loader decodes it.

    Attributes:
        path: file that holds the image.
        frame: frame of an animated file such as a gif; -1 for a still image.
        cols: columns of the tile grid.
        rows: rows of the tile grid.
        thumbnail: whether one more tile holds the whole image, after the grid.
        num_tiles: ``cols * rows``, plus one with a thumbnail.
        insert_at: collapsed token position before which the image's visual tokens go.
    """

    path: Path
    frame: int
    cols: int
    rows: int
    thumbnail: bool
    num_tiles: int
    insert_at: int


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenSource(_Strict):
    """A file of token ids: the index's own ``tokens.bin`` or the ``.bin`` of a Megatron corpus.

    Attributes:
        path: ``tokens.bin`` for the own store, otherwise an absolute path.
        dtype: NumPy name of the stored integer type.
        num_bytes: size of the file when the index was built.
        own: True for the own store, whose unsupervised ids are kept as ``~id``; False: every token is supervised.
    """

    path: str
    dtype: str
    num_bytes: int
    own: bool


class SourceFile(_Strict):
    """A file that the index was built from, to tell whether it has changed since."""

    path: str
    num_bytes: int
    mtime_ns: int


class DatasetInfo(_Strict):
    """One dataset of the index: samples ``first`` to ``first + count - 1``.

    Attributes:
        name: key in the meta JSON.
        kind: "language" when no sample has an image, else "multimodal".
        first: first sample.
        count: number of samples.
        repeat_time: how often an epoch draws each sample, at least 1; a ``repeat_time`` below 1 in the meta JSON has
            already cut the dataset (``cut_to``) and appears here as 1.
        cut_to: lines kept by a ``repeat_time`` below 1; None: all.
        augment: JPEG degradation wanted (``data_augment``).
        weight: sampling weight given in the meta JSON, or None.
        root: folder that image paths are relative to.
        annotation: the .jsonl, or the prefix of a corpus.
        max_tiles: tile cap that was in force (``max_dynamic_patch`` or the index's).
        num_lines: lines read (after ``cut_to``).
        num_skipped: lines that did not become samples.
        num_tokens: expanded tokens of all samples.
        num_supervised: targets of all samples.
        num_tiles: tiles of all samples.
        num_images: images of all samples.
    """

    name: str
    kind: Literal["language", "multimodal"]
    first: int
    count: int
    repeat_time: float
    cut_to: int | None
    augment: bool
    weight: float | None
    root: str
    annotation: str
    max_tiles: int
    num_lines: int
    num_skipped: int
    num_tokens: int
    num_supervised: int
    num_tiles: int
    num_images: int


class IndexMeta(_Strict):
    """The content of ``index.json``.

    Attributes:
        format_version: ``FORMAT_VERSION`` of the writer.
        kind: what a sample is: a conversation (or text), or a preference pair.
        tokenizer_fingerprint: hash of the tokenizer's definition.
        vocab_size: ids of the tokenizer, added tokens included.
        tile_size: pixels per tile side.
        tokens_per_tile: visual tokens per tile.
        min_tiles: fewest tiles of a grid.
        max_tiles: most tiles of a grid, before a dataset's ``max_dynamic_patch`` (without the thumbnail).
        thumbnail: whether images of more than one tile get a thumbnail.
        datasets: in the order of the meta JSON.
        sources: token files.
        num_samples: rows of the files in samples/.
        num_images: rows of the files in images/.
        num_tokens: expanded tokens of all samples.
        num_supervised: targets of all samples.
        num_tiles: tiles of all samples.
        path_bytes: size of paths.bin.
        skipped: number of lines left out, by reason.
        warnings: remarks on the meta JSON, such as unknown keys.
        files: what the index was built from, with sizes and times.
        settings: the settings as given.
        settings_hash: hash over what decides the content.
    """

    format_version: int
    kind: Kind = "conversations"
    tokenizer_fingerprint: str
    vocab_size: int
    tile_size: int
    tokens_per_tile: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    datasets: tuple[DatasetInfo, ...]
    sources: tuple[TokenSource, ...]
    num_samples: int
    num_images: int
    num_tokens: int
    num_supervised: int
    num_tiles: int
    path_bytes: int
    skipped: dict[str, int]
    warnings: tuple[str, ...]
    files: tuple[SourceFile, ...]
    settings: dict[str, Any]
    settings_hash: str


def read_meta(path: str | Path) -> IndexMeta:
    """Read ``index.json`` of an index folder.

    Raises:
        FileNotFoundError: there is no index there.
        IndexMismatchError: it was written in another format, or is damaged.
    """
    file = Path(path) / INDEX_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"'{path}' holds no index ('{INDEX_FILE}' is missing): build it with `evovlm index`"
        ) from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise IndexMismatchError(f"'{file}' is damaged ({error}): {REBUILD}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise IndexMismatchError(f"index '{path}' has format {version}, this version reads {FORMAT_VERSION}: {REBUILD}")
    try:
        return IndexMeta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IndexMismatchError(f"'{file}' is damaged ({where}: {first['msg']}): {REBUILD}") from None
