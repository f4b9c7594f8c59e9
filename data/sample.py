"""Expands one sample of the index to the token sequence that the LLM sees.

collapsed ids   … <img> </img> …          insert_at = 5, 2 tiles of 4 tokens
                      │ insert
tokens          … <img> C C C C C C C C </img> …       runs = [(5, 8)]
labels          the token one to the right where it is supervised, else -100

A preference pair is one sample: prefix │ chosen │ rejected (``preference.py``). Its labels are made alike: the prefix's
last row predicts the token that both branches start with, and nothing predicts the rejected branch's first token.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.data.chat import expand
from evovlm.data.index import ImageRef, Index

IGNORE = -100


@dataclass(frozen=True)
class ExpandedSample:
    """One sample as the LLM sees it; L is its expanded length.

    Attributes:
        tokens: int32 [L], the image-context id at every visual position.
        labels: int64 [L], already shifted: ``labels[t]`` is the target of row t; -100 where there is none, so always
            in the last row.
        runs: (start, length) of each image's visual tokens in ``tokens``, in order.
        refs: the images, in the order of ``runs``.
        branches: of a preference pair, first rows of the chosen and of the rejected branch; None: no pair.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int64]
    runs: list[tuple[int, int]]
    refs: list[ImageRef]
    branches: tuple[int, int] | None = None


def read_part(index: Index, sample: int, begin: int, length: int) -> ExpandedSample:
    """Read a part of a text that is split over packs; nothing else of it is read.

    Args:
        index: an open index.
        sample: row of ``index.samples``, without images.
        begin: first token of the part.
        length: its tokens.

    Returns:
        The part as a sample; its last row has the first token after it as its target.

    Raises:
        ValueError: the sample has images, or no such tokens.
    """
    ids, supervised = index.tokens(sample, begin, begin + length + 1)
    images = int(index.samples["num_images"][sample])
    if images or len(ids) < length:
        raise ValueError(
            f"sample '{index.name(sample)}': tokens {begin} to {begin + length} were planned as a part of a text, but "
            f"it has {images} images and {index.samples['num_tokens'][sample]} tokens"
        )
    labels = np.full(length, IGNORE, dtype=np.int64)
    np.copyto(labels[: len(ids) - 1], ids[1:], where=supervised[1:])
    return ExpandedSample(ids[:length], labels, [], [])


def expand_sample(index: Index, sample: int, *, image_context: int) -> ExpandedSample:
    """Read a sample and put its visual tokens and shifted labels in place.

    Args:
        index: an open index.
        sample: row of ``index.samples``.
        image_context: id of ``<IMG_CONTEXT>``.

    Returns:
        The expanded sample; its length is ``index.samples["num_tokens"][sample]``.

    Raises:
        ValueError: the expanded sample is not what its row in the index says (a damaged index).
    """
    ids, supervised = index.tokens(sample)
    refs = index.image_refs(sample)
    runs: list[tuple[int, int]] = []
    num_visual = 0
    for ref in refs:
        length = ref.num_tiles * index.meta.tokens_per_tile
        runs.append((ref.insert_at + num_visual, length))  # the runs before an image push it to the right
        num_visual += length

    total, planned = len(ids) + num_visual, int(index.samples["num_tokens"][sample])
    if total != planned:
        raise ValueError(
            f"sample '{index.name(sample)}': {len(ids)} stored and {num_visual} visual tokens, but the index says "
            f"{planned} in all: rebuild the index"
        )
    lengths = [length for _, length in runs]
    tokens, supervised = expand(ids, supervised, [ref.insert_at for ref in refs], lengths, image_context)
    labels = np.full(total, IGNORE, dtype=np.int64)
    np.copyto(labels[:-1], tokens[1:], where=supervised[1:])
    branches = None
    if index.meta.kind == "preference":
        branches = int(index.samples["chosen_at"][sample]), int(index.samples["rejected_at"][sample])
        _check_branches(index, sample, tokens, labels, runs, branches)
    return ExpandedSample(tokens, labels, runs, refs, branches)


def _check_branches(
    index: Index,
    sample: int,
    tokens: NDArray[np.int32],
    labels: NDArray[np.int64],
    runs: list[tuple[int, int]],
    branches: tuple[int, int],
) -> None:
    """Raise ``ValueError`` unless both branches begin behind all images, with one token, predicted by the prefix."""
    (chosen, rejected), begin = branches, max((start + length for start, length in runs), default=0)
    right = max(begin, 1) <= chosen < rejected < len(tokens) and tokens[chosen] == tokens[rejected]
    if not right or labels[rejected - 1] != IGNORE:
        raise ValueError(
            f"pair '{index.name(sample)}': branches at {chosen} and {rejected} of {len(tokens)} tokens, with visual "
            f"ones up to {begin}, do not begin alike behind one prefix: rebuild the index"
        )
    count, planned = int((labels[:rejected] != IGNORE).sum()), int(index.samples["num_chosen"][sample])
    if count != planned:
        raise ValueError(
            f"pair '{index.name(sample)}' has {count} targets in its chosen answer, but the index says {planned}: "
            "rebuild the index"
        )
