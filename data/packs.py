"""Packs as a table: which samples lie in which pack, in flat arrays, however many there are.

starts   0       3     5         packs 0, 1, …: segments starts[i] to starts[i + 1] - 1
samples  7 2 9 │ 4 1 │ …         one segment each; a long text may be split into several
begins   0 0 0 │ 0 T │           first token of the segment in its sample
squares  . . . │ . . │           work of attention: length², less in preference pairs
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
_COLUMNS = ("samples", "visits", "begins", "lengths", "tiles", "squares")


@dataclass(frozen=True, eq=False)
class Pack:
    """One LLM sequence; without segments it is nothing but padding.

    Attributes:
        samples: int64 [S], rows of the index, one segment each, in this order.
        visits: int64 [S], tell the draws of a sample apart.
        begins: int64 [S], first token of the segment in its sample: 0 unless the sample is split.
        lengths: int64 [S], tokens of the segment.
        num_tokens: tokens without padding.
        num_tiles: tiles of all segments.
    """

    samples: Longs
    visits: Longs
    begins: Longs
    lengths: Longs
    num_tokens: int
    num_tiles: int


@dataclass(frozen=True, eq=False)
class Packs(Sequence[Pack]):
    """Packs in flat arrays; ``packs[i]`` is a ``Pack``.

    Attributes:
        samples: int64 [S], see ``Pack``.
        visits: int64 [S].
        begins: int64 [S].
        lengths: int64 [S].
        tiles: int64 [S], tiles of each segment.
        squares: int64 [S], squared length; of a preference pair that of a segment with as much work for attention
            (``branches.squared_lengths``).
        starts: int64 [G + 1], first segment of each pack, and S.
    """

    samples: Longs
    visits: Longs
    begins: Longs
    lengths: Longs
    tiles: Longs
    squares: Longs
    starts: Longs

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, number: int) -> Pack: ...
    @overload
    def __getitem__(self, number: slice) -> "Packs": ...
    def __getitem__(self, number: int | slice) -> "Pack | Packs":
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no pack {number} of {len(self)}")
        part = slice(*self.starts[number % len(self) :][:2])
        return Pack(
            self.samples[part],
            self.visits[part],
            self.begins[part],
            self.lengths[part],
            int(self.lengths[part].sum()),
            int(self.tiles[part].sum()),
        )

    def __iter__(self) -> Iterator[Pack]:
        return (self[number] for number in range(len(self)))

    @property
    def pack_of(self) -> Longs:
        """int64 [S], the pack of each segment."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @property
    def num_tokens(self) -> Longs:
        """int64 [G], tokens of each pack without padding."""
        return self.sums(self.lengths)

    @property
    def num_tiles(self) -> Longs:
        """int64 [G], tiles of each pack."""
        return self.sums(self.tiles)

    def sums(self, of_segment: Longs) -> Longs:
        """Add up numbers of segments, int64 [S], over each pack: int64 [G]."""
        total = np.concatenate([[0], np.cumsum(of_segment)])
        sums: Longs = total[self.starts[1:]] - total[self.starts[:-1]]
        return sums

    def sum_squares(self, num_rows: int) -> Longs:
        """int64 [G], ``squares`` of each pack, summed; what fills it up to ``num_rows`` is a segment, too."""
        return self.sums(self.squares) + (num_rows - self.num_tokens) ** 2

    def take(self, numbers: NDArray[Any]) -> "Packs":
        """These packs, in this order."""
        counts = np.diff(self.starts)[numbers]
        ends = np.cumsum(counts)
        segments = np.repeat(self.starts[:-1][numbers] - (ends - counts), counts) + np.arange(counts.sum())
        columns = {name: column[segments] for name, column in self._columns().items()}
        return Packs(**columns, starts=np.concatenate([[0], ends]))

    def padded(self, count: int) -> "Packs":
        """These packs and empty ones, ``count`` in all."""
        return Packs(**self._columns(), starts=np.pad(self.starts, (0, count - len(self)), "edge"))

    @classmethod
    def concatenate(cls, parts: "Sequence[Packs]") -> "Packs":
        """The packs of all parts, one part after another."""
        none = np.empty(0, np.int64)
        columns = {name: np.concatenate([none, *(p._columns()[name] for p in parts)]) for name in _COLUMNS}
        counts = np.concatenate([none, *(np.diff(p.starts) for p in parts)])
        return cls(**columns, starts=np.concatenate([[0], np.cumsum(counts)]))

    @classmethod
    def of(cls, pack_of: NDArray[Any], count: int, **columns: Longs) -> "Packs":
        """Group segments by pack; those of one pack keep their order.

        Args:
            pack_of: integers [S], the pack of each segment.
            count: packs.
            columns: int64 [S], samples, visits, begins, lengths, tiles and squares, as in the class.
        """
        order = np.argsort(pack_of, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=count))])
        return cls(**{name: column[order] for name, column in columns.items()}, starts=starts)

    def _columns(self) -> dict[str, Longs]:
        return {name: getattr(self, name) for name in _COLUMNS}
