"""Text corpora in Megatron's ``.bin``/``.idx`` format: already tokenised documents, one after the other.

    corpus.idx  dtype, where each sequence and document begins ──► megatron-core's ``IndexedDataset``
    corpus.bin  token ids, nothing else                        ──► memory-mapped, never copied

megatron-core is imported only inside the functions that need it: it takes seconds to import, and must not be used in
a forked child process. Training needs it no more: the index holds each document's place in the ``.bin``.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evovlm.data.errors import MetaError

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = ("uint8", "uint16", "int8", "int16", "int32", "int64")


@dataclass(frozen=True)
class Corpus:
    """A corpus' table of documents.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: NumPy name of the ids' type in the ``.bin``.
        offsets: int64 [documents], first token of each document, in elements.
        lengths: int64 [documents], tokens of each document.
        num_bytes: size of the ``.bin``.
    """

    prefix: Path
    dtype: str
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_bytes: int

    @property
    def bin_path(self) -> Path:
        """The file of token ids."""
        return Path(f"{self.prefix}.bin")

    def __len__(self) -> int:
        return len(self.offsets)

    def map_tokens(self) -> NDArray[Any]:
        """Memory-map all token ids, in the file's own dtype."""
        return np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)


def _megatron() -> ModuleType:
    """Import megatron-core's module of corpora, without its remarks on CUDA libraries that are not needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return cast(ModuleType, indexed_dataset)


def corpus_files(prefix: str | Path) -> tuple[Path, Path]:
    """Return the ``.bin`` and ``.idx`` of a corpus.

    Raises:
        MetaError: one of them does not exist.
    """
    files = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in files:
        if not file.is_file():
            raise MetaError(f"corpus '{prefix}': '{file}' does not exist; give the path without .bin and .idx")
    return files


def open_corpus(prefix: str | Path) -> Corpus:
    """Read a corpus' document table through megatron-core; do not call it in a forked child process.

    Raises:
        MetaError: a file is missing, the ``.idx`` is not Megatron's, or the two files do not belong together.
    """
    bin_path, idx_path = corpus_files(prefix)
    # Looked at first: megatron-core's objects complain again, on standard error, when they die half made.
    num_bytes = bin_path.stat().st_size
    if num_bytes == 0:
        raise MetaError(f"corpus '{prefix}' holds no tokens: '{bin_path}' is empty")
    with idx_path.open("rb") as file:
        head = file.read(len(_IDX_MAGIC))
    if head != _IDX_MAGIC:
        raise MetaError(f"'{idx_path}' is not the .idx of a Megatron text corpus: it begins with {head!r}")
    try:
        dataset = _megatron().IndexedDataset(str(prefix))
    except (AssertionError, ValueError, IndexError, EOFError, OSError) as error:
        raise MetaError(f"corpus '{prefix}' cannot be read, its .idx is damaged: {error}") from error
    dtype = np.dtype(dataset.index.dtype)
    if dtype.name not in _TYPES:
        raise MetaError(f"corpus '{prefix}' stores {dtype.name}, which cannot be token ids")
    ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    bounds = ends[np.asarray(dataset.document_indices)]
    if num_bytes != int(ends[-1]) * dtype.itemsize:
        raise MetaError(
            f"corpus '{prefix}': the .idx describes {int(ends[-1])} tokens of {dtype.itemsize} bytes, the .bin holds "
            f"{num_bytes} bytes: they do not belong together, or one is truncated"
        )
    return Corpus(Path(prefix), dtype.name, bounds[:-1], np.diff(bounds), num_bytes)


def check_ids(tokens: NDArray[Any], first: int, vocab_size: int, corpus: str | Path) -> None:
    """Check that a stretch of a corpus holds token ids of the tokenizer in use.

    Args:
        tokens: integer [n].
        first: place of ``tokens[0]`` in the ``.bin``, for the message.
        vocab_size: ids must be in [0, vocab_size).
        corpus: the corpus' prefix, for the message.

    Raises:
        MetaError: an id is outside; it was written with another tokenizer.
    """
    if len(tokens) == 0:
        return
    for worst in (int(tokens.argmax()), int(tokens.argmin())):
        if not 0 <= int(tokens[worst]) < vocab_size:
            raise MetaError(
                f"corpus '{corpus}': token {first + worst} is id {int(tokens[worst])}, but the tokenizer has "
                f"{vocab_size} ids (0 to {vocab_size - 1}): the corpus was written with another tokenizer"
            )


def write_corpus(
    prefix: str | Path, documents: Iterable[Sequence[int] | NDArray[np.integer[Any]]], dtype: DTypeLike = np.int32
) -> None:
    """Write a corpus through megatron-core, one sequence per document.

    Args:
        prefix: path without ``.bin`` and ``.idx``; its folder is made.
        documents: token ids of each document.
        dtype: integer type of the ``.bin``.

    Raises:
        ValueError: an id does not fit ``dtype``.
    """
    import torch

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(dtype)
    builder = _megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind.type)
    limits = np.iinfo(kind)
    for number, document in enumerate(documents):
        ids = np.asarray(document, dtype=np.int64)
        if ids.size and not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max:
            raise ValueError(f"document {number}: ids {int(ids.min())} to {int(ids.max())} do not fit {kind.name}")
        builder.add_item(torch.from_numpy(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
