"""Orders of samples: what planning asks of a mixture, and the plain order of a validation pass.

Order.order(epoch) ──► samples 4 0 7 4 …        rows of the index
                       visits  0 0 0 1 …        how often each was drawn before in the run
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evovlm.data.index import DatasetInfo, IndexMeta


class PlanIndex(Protocol):
    """What planning reads of an index: per-sample costs, never tokens or pixels."""

    @property
    def samples(self) -> NDArray[np.void]:
        """``SAMPLE`` rows."""

    @property
    def images(self) -> NDArray[np.void]:
        """``IMAGE`` rows; planning reads their numbers of tiles."""

    @property
    def meta(self) -> IndexMeta:
        """The description of the index: tokens per tile."""

    @property
    def datasets(self) -> tuple[DatasetInfo, ...]:
        """Datasets, each a contiguous range of samples."""

    def name(self, sample: int) -> str:
        """Name of a sample for messages, such as ``chart/17``."""


class Order(Protocol):
    """An order of samples, epoch by epoch: ``Mixture`` or ``Sequential``."""

    @property
    def num_epochs(self) -> int | None:
        """Number of epochs; None: endless."""

    @property
    def shuffled(self) -> bool:
        """Whether packs made of this order are shuffled too."""

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return samples int64 [n] of an epoch in order, and the visit int64 [n] that each is."""

    def without(self, samples: NDArray[np.int64]) -> "Order":
        """Return the same order over an index that lacks these samples."""


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
        self._excluded = np.empty(0, np.int64) if excluded is None else excluded

    def without(self, samples: NDArray[np.int64]) -> "Sequential":
        """Return the same pass less these samples."""
        return Sequential(self._index, np.concatenate([self._excluded, samples]))

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all samples int64 [n] in index order, and zeros.

        Raises:
            IndexError: ``epoch`` is not 0.
        """
        if epoch != 0:
            raise IndexError(f"a sequential pass has one epoch, there is no epoch {epoch}")
        samples = np.delete(np.arange(len(self._index.samples), dtype=np.int64), self._excluded)
        return samples, np.zeros(len(samples), np.int64)
