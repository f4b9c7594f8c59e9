"""Variable visual position encoding (V2PE): text steps by 1, visual tokens by a fraction δ (spec §2).

    tokens     a  b  <img>  v₁    v₂    …  v_N     </img>  c
    positions  0  1   2    2+δ   2+2δ   …  2+Nδ      q    q+1        q = ⌈2+Nδ⌉ + 1

Positions restart at 0 in every segment. They are float32: exact for every δ = 2⁻ᵏ, k ≤ 8, below position 65,536.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DELTAS = tuple(2.0**-k for k in range(9))
"""The strides that pre-training draws from: 1, 1/2, …, 1/256."""


def segment_positions(length: int, runs: Sequence[tuple[int, int]], deltas: Sequence[float]) -> NDArray[np.float32]:
    """Compute the positions of one segment.

    Args:
        length: Number of tokens of the segment.
        runs: ``(start, length)`` of each run of visual tokens (all tiles of one image), in order. The token before
            a run is its ``<img>``.
        deltas: δ of each run, in (0, 1].

    Returns:
        float32 ``[length]``. With every δ = 1 it is ``arange(length)``.

    Raises:
        ValueError: Runs overlap, are out of order or leave the segment, or their number is not that of the deltas.
    """
    if len(runs) != len(deltas):
        raise ValueError(f"V2PE: {len(runs)} visual runs but {len(deltas)} deltas")
    positions = np.empty(length, dtype=np.float64)
    done = 0  # tokens that have a position
    last = -1.0  # largest position so far, always an integer between runs
    for (start, run_length), delta in zip(runs, deltas, strict=True):
        if start < done or start + run_length > length:
            raise ValueError(f"V2PE: visual run at {start}, length {run_length}, does not fit {length} tokens in order")
        if not 0 < delta <= 1:
            raise ValueError(f"V2PE: delta {delta} is not in (0, 1]")
        text = start - done
        positions[done:start] = last + np.arange(1, text + 1)
        anchor = last + text
        positions[start : start + run_length] = anchor + delta * np.arange(1, run_length + 1)
        last = float(math.ceil(anchor + delta * run_length))
        done = start + run_length
    positions[done:] = last + np.arange(1, length - done + 1)
    return positions.astype(np.float32)


def next_position(length: int, runs: Sequence[tuple[int, int]], deltas: Sequence[float]) -> float:
    """Return the position of the first generated token after a prompt: its last position plus 1."""
    return float(segment_positions(length, runs, deltas)[-1]) + 1.0 if length else 0.0
