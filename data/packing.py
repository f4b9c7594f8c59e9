"""Fills packs with samples under two budgets, tokens and tiles, window by window; on wish, packs that cost alike.

    samples in order   │◄── window ──►│◄── window ──►│ …      a window knows nothing of its neighbours
                             ▼
    packs              ▇▇▇▇▇▇▇▇▇▇▇▇▇▏  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇         Σ tokens ≤ max_tokens, Σ tiles ≤ max_tiles

Best fit decreasing. Samples are placed largest first, where a tile counts as 3/4 · max_tokens / max_tiles tokens: what
is rich in tiles comes early, and text, which fits into any gap, late. Each goes into one of two open packs: those with
the least and the second least number of free tokens among all where it fits (of equally many, the one with most free
tiles, then the one opened first). It takes the one with less room, tiles counted as before; if none fits, a new pack.

**Packs that cost alike.** A pack's cost is the sum of its samples' costs, such as tokens² (the work of attention). The
target is the mean cost of as few packs as the budgets allow. These are opened at once, and the large samples go,
largest first, each to one of the eight packs that cost least so far: the one whose tiles then stand to its tokens most
nearly as in the whole window. Then the small samples (20 % of all room) fill every gap by best fit, together with the
large ones that fitted into none of the eight. A sample that alone costs more than the target has a pack of its own,
filled up with small ones. Where this opens more than one pack in a thousand more than plain packing does, it is done
again with more small samples (50 %), and else left out: costs are evened out as far as that costs no fill.

The loops are C++ (``csrc/pack.cpp``), integers only. Samples of equal size are placed in the order given, which
training shuffles with the run's key: so the key alone decides which of several equal samples share a pack.
"""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from evovlm.csrc import _plan


def pack(
    tokens: ArrayLike, tiles: ArrayLike, max_tokens: int, max_tiles: int, costs: ArrayLike | None = None
) -> tuple[NDArray[np.int32], int]:
    """Pack samples; equal input gives equal packs on every machine.

    Args:
        tokens: integers [n], expanded length of each sample, 1 to ``max_tokens``.
        tiles: integers [n], tiles of each sample, 0 to ``max_tiles``.
        max_tokens: most tokens of a pack.
        max_tiles: most tiles of a pack.
        costs: integers [n], at least 0, work that each sample makes, in any unit; packs are then made to cost alike.

    Returns:
        The pack int32 [n] that each sample goes to, and the number of packs. Packs are numbered as they are opened.

    Raises:
        ValueError: a sample does not fit into an empty pack (leave such samples out first), a cost is negative, or
            shapes differ.
    """
    pack_of, counts = pack_windows(tokens, tiles, max(np.size(tokens), 1), max_tokens, max_tiles, costs)
    return pack_of, int(counts.sum())


def pack_windows(
    tokens: ArrayLike, tiles: ArrayLike, window: int, max_tokens: int, max_tiles: int, costs: ArrayLike | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pack each window of ``window`` successive samples by itself; arguments and errors as ``pack``.

    Returns:
        The pack int32 [n] of each sample, counted from 0 in each window, and the packs int32 [windows] of each window.
    """
    return _plan.pack_windows(
        _integers(tokens, "tokens", np.int32),
        _integers(tiles, "tiles", np.int32),
        window,
        max_tokens,
        max_tiles,
        None if costs is None else _integers(costs, "costs", np.int64),
    )


def _integers(values: ArrayLike, name: str, dtype: DTypeLike) -> NDArray[np.signedinteger]:
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, dtype)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    limits = np.iinfo(dtype)
    if array.dtype != dtype and (int(array.max()) > limits.max or int(array.min()) < limits.min):
        raise ValueError(f"{name}: {array.max()} does not fit into {limits.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)
