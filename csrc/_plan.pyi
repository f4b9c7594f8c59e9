import numpy as np
from numpy.typing import NDArray

def balance_images(
    tiles: NDArray[np.int32], encoders: int, home: NDArray[np.int32], node_size: int, limit: int, split: bool
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], int, int, int, int]:
    """Equal tiles on every encoder: (image, first tile, tiles, encoder of each piece, largest, bound, home, node)."""

def balance_packs(
    costs: NDArray[np.int64], ranks: int, microbatches: int, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int32], int, int]:
    """Equal cost, then equal tokens on every rank: (pack of each rank and microbatch [R, M], largest, bound)."""

def pack_windows(
    tokens: NDArray[np.int32],
    tiles: NDArray[np.int32],
    window: int,
    max_tokens: int,
    max_tiles: int,
    costs: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pack each window of samples by best fit decreasing: (pack within the window [n], packs per window)."""

def permute(key: int, n: int, begin: int, end: int) -> NDArray[np.int64]:
    """Places begin..end-1 of a keyed permutation of range(n), int64 [end - begin]."""
