import numpy as np
from numpy.typing import NDArray

def pack_windows(
    tokens: NDArray[np.int32], tiles: NDArray[np.int32], window: int, max_tokens: int, max_tiles: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pack each window of samples by best fit decreasing: (pack within the window [n], packs per window)."""
