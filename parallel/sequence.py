"""Which rows of a pack each rank holds, before and after the sequence is split.

    pack [T]            0 1 2 3 4 5 6 7          cp = 2: 2·cp chunks a b c d
    cp    (zigzag)      rank 0: a d   rank 1: b c      so that causal attention costs both the same
    hp    (contiguous)  a | d                    each cp rank's rows in hp equal parts
    tp    (contiguous)  each hp part in tp equal parts: what a rank holds between blocks

Tensor parallelism gathers its parts before a block's matmuls, so attention sees the rows of (cp, hp).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evovlm.parallel.layout import Coordinates, Layout


@dataclass(frozen=True)
class SequenceShards:
    """The split of T rows over cp × hp × tp ranks.

    Raises:
        ValueError: T is not a multiple of 2·cp·hp·tp (of hp·tp without context parallelism).
    """

    num_rows: int
    cp: int = 1
    hp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        chunks = 2 * self.cp if self.cp > 1 else 1
        unit = chunks * self.hp * self.tp
        if self.num_rows % unit:
            formula = "2·cp·hp·tp" if self.cp > 1 else "hp·tp"
            lower, upper = self.num_rows // unit * unit, -(-self.num_rows // unit) * unit
            raise ValueError(
                f"a pack of T = {self.num_rows} rows cannot be split over cp = {self.cp}, hp = {self.hp}, "
                f"tp = {self.tp}: T must be a multiple of {formula} = {unit}; take {lower or upper} or {upper}"
            )

    @classmethod
    def of(cls, layout: Layout, num_rows: int) -> "SequenceShards":
        """The split of a pack under a layout."""
        return cls(num_rows, layout.cp, layout.hp, layout.tp)

    @property
    def chunk(self) -> int:
        """Rows of one zigzag chunk."""
        return self.num_rows // (2 * self.cp) if self.cp > 1 else self.num_rows

    def ring_rows(self, cp: int) -> NDArray[np.int64]:
        """Rows of a cp rank, ``[T / cp]``: chunk ``cp``, then chunk ``2·CP − 1 − cp``."""
        if self.cp == 1:
            return np.arange(self.num_rows)
        parts = [np.arange(c * self.chunk, (c + 1) * self.chunk) for c in (cp, 2 * self.cp - 1 - cp)]
        return np.concatenate(parts)

    def block_rows(self, cp: int, hp: int) -> NDArray[np.int64]:
        """Rows that a (cp, hp) rank's matmuls see, ``[T / (cp·hp)]``."""
        return np.split(self.ring_rows(cp), self.hp)[hp]

    def rows(self, place: Coordinates) -> NDArray[np.int64]:
        """Rows that a rank holds between blocks, ``[T / (cp·hp·tp)]``, in the order in which it holds them."""
        return np.split(self.block_rows(place.cp, place.hp), self.tp)[place.tp]

    def owners(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Who holds rows between blocks.

        Args:
            rows: int64 ``[n]``, rows of the pack.

        Returns:
            ``place`` int64 ``[3, n]`` (cp, hp and tp of the holder) and ``local`` int64 ``[n]``, its number there.
        """
        if self.cp == 1:
            cp, inside = np.zeros_like(rows), rows
        else:
            chunk, offset = np.divmod(rows, self.chunk)
            second = chunk >= self.cp
            cp = np.where(second, 2 * self.cp - 1 - chunk, chunk)
            inside = offset + second * self.chunk
        hp, inside = np.divmod(inside, self.num_rows // (self.cp * self.hp))
        tp, local = np.divmod(inside, self.num_rows // (self.cp * self.hp * self.tp))
        return np.stack((cp, hp, tp)), local
