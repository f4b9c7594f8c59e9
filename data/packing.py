"""Fills packs with samples under two budgets, tokens and tiles, window by window.

    samples in order   │◄── window ──►│◄── window ──►│ …      a window knows nothing of its neighbours
                             ▼
    packs              ▇▇▇▇▇▇▇▇▇▇▇▇▇▏  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇         Σ tokens ≤ max_tokens, Σ tiles ≤ max_tiles

Best fit decreasing: samples are placed longest first (equal ones in the order given, which training shuffles), each
into the open pack that has the least room left among those where it fits. The loops are C++ (``csrc/plan.cpp``).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evovlm.csrc import _plan


def pack(tokens: ArrayLike, tiles: ArrayLike, max_tokens: int, max_tiles: int) -> tuple[NDArray[np.int32], int]:
    """Pack samples; equal input gives equal packs on every machine.

    Args:
        tokens: integers [n], expanded length of each sample, 1 to ``max_tokens``.
        tiles: integers [n], tiles of each sample, 0 to ``max_tiles``.
        max_tokens: most tokens of a pack.
        max_tiles: most tiles of a pack.

    Returns:
        The pack int32 [n] that each sample goes to, and the number of packs. Packs are numbered as they are opened.

    Raises:
        ValueError: a sample does not fit into an empty pack (leave such samples out first), or shapes differ.
    """
    pack_of, counts = pack_windows(tokens, tiles, max(np.size(tokens), 1), max_tokens, max_tiles)
    return pack_of, int(counts.sum())


def pack_windows(
    tokens: ArrayLike, tiles: ArrayLike, window: int, max_tokens: int, max_tiles: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pack each window of ``window`` successive samples by itself; arguments and errors as ``pack``.

    Returns:
        The pack int32 [n] of each sample, counted from 0 in each window, and the packs int32 [windows] of each window.
    """
    return _plan.pack_windows(_int32(tokens, "tokens"), _int32(tiles, "tiles"), window, max_tokens, max_tiles)


def _int32(values: ArrayLike, name: str) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.dtype != np.int32 and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
        raise ValueError(f"{name}: {array.max()} does not fit into int32")
    return np.ascontiguousarray(array, dtype=np.int32)
