"""Orders of samples, window by window: what planning asks of a mixture, and the plain order of a validation pass.

    epoch 0                     epoch 1
    │ window 0 │ window 1 │ … │ window 0 │ …          about ``size`` draws each
        ▼
    Draws: samples 4 0 7 4 …   rows of the index
           visits  0 0 0 1 …   tell the draws of one sample apart

Any window can be asked for by itself and costs only its own size, so an index of 10⁷ samples needs no order in memory.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evovlm.data.index import DatasetInfo, IndexMeta


class Table(Protocol):
    """Columns of an index by name."""

    def __getitem__(self, name: str, /) -> NDArray[Any]: ...

    def __len__(self) -> int: ...


class PlanIndex(Protocol):
    """What planning reads of an index: sizes, never pixels; tokens only of texts that are split."""

    @property
    def samples(self) -> Table:
        """Sizes of every sample."""

    @property
    def images(self) -> Table:
        """Sizes of every image."""

    @property
    def meta(self) -> IndexMeta:
        """The description of the index: tokens per tile."""

    @property
    def datasets(self) -> tuple[DatasetInfo, ...]:
        """Datasets, each a contiguous range of samples."""

    def name(self, sample: int) -> str:
        """Name of a sample for messages, such as ``chart/17``."""

    def tokens(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of a sample, and which are supervised."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Samples in the order in which they were drawn.

    Attributes:
        samples: int64 [n], rows of the index.
        visits: int64 [n], different for all draws of one sample in a run; all other randomness of the data is keyed
            by it.
        parts: int64 [n], which part of a text that is split over packs; -1: the whole sample.
    """

    samples: NDArray[np.int64]
    visits: NDArray[np.int64]
    parts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, places: slice | NDArray[Any]) -> "Draws":
        return Draws(self.samples[places], self.visits[places], self.parts[places])

    @classmethod
    def whole(cls, samples: NDArray[np.int64], visits: NDArray[np.int64] | int) -> "Draws":
        """Whole samples; one visit for all, or one for each."""
        return cls(samples, np.full(len(samples), visits, np.int64), np.full(len(samples), -1, np.int64))

    @classmethod
    def none(cls) -> "Draws":
        """No draws."""
        return cls.whole(np.empty(0, np.int64), 0)

    @classmethod
    def concatenate(cls, several: "list[Draws]") -> "Draws":
        """One after another."""
        several = [cls.none(), *several]
        return cls(*(np.concatenate([getattr(d, name) for d in several]) for name in ("samples", "visits", "parts")))


class Order(Protocol):
    """An order of samples: ``Mixture`` or ``Sequential``."""

    @property
    def num_epochs(self) -> int | None:
        """Number of epochs; None: endless."""

    @property
    def shuffled(self) -> bool:
        """Whether packs made of this order are shuffled too."""

    def num_windows(self, size: int) -> int:
        """Windows of about ``size`` samples in an epoch, at least 1."""

    def window(self, epoch: int, number: int, size: int) -> Draws:
        """Return the draws of one window."""

    def without(self, samples: NDArray[np.int64]) -> "Order":
        """Return the same order over an index that lacks these samples."""


class Members:
    """A contiguous range of samples less some of them, numbered from 0.

    Args:
        first: first sample of the range.
        count: samples in it.
        excluded: int64, ascending, samples left out; those outside the range are of no matter.
    """

    def __init__(self, first: int, count: int, excluded: NDArray[np.int64]) -> None:
        begin, end = np.searchsorted(excluded, [first, first + count])
        self.excluded = excluded[begin:end]
        self.count = count - len(self.excluded)
        self._first = first
        # Members before each excluded sample: a number is moved on by the excluded samples that it comes after.
        self._before = self.excluded - first - np.arange(len(self.excluded))

    def samples(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the index, int64 [n], of these members."""
        if len(self._before):
            numbers = numbers + np.searchsorted(self._before, numbers, side="right")
        return numbers + self._first


class Sequential:
    """One pass over an index in its own order: validation and evaluation.

    Args:
        index: the index to walk through.
        excluded: samples left out.
    """

    num_epochs: int | None = 1
    shuffled: bool = False

    def __init__(self, index: PlanIndex, excluded: NDArray[np.int64] | None = None) -> None:
        self._index = index
        self._excluded = np.unique(np.empty(0, np.int64) if excluded is None else excluded)
        self._members = Members(0, len(index.samples), self._excluded)

    def without(self, samples: NDArray[np.int64]) -> "Sequential":
        """Return the same pass less these samples."""
        return Sequential(self._index, np.concatenate([self._excluded, samples]))

    def num_windows(self, size: int) -> int:
        """Windows of ``size`` samples, the last perhaps shorter."""
        return max(1, -(-self._members.count // size))

    def window(self, epoch: int, number: int, size: int) -> Draws:
        """Return ``size`` samples in index order, with visits of 0.

        Raises:
            IndexError: ``epoch`` is not 0.
        """
        if epoch != 0:
            raise IndexError(f"a sequential pass has one epoch, there is no epoch {epoch}")
        numbers = np.arange(number * size, min((number + 1) * size, self._members.count), dtype=np.int64)
        return Draws.whole(self._members.samples(numbers), 0)
