"""A step is decided before it starts: ``plan_step`` says which samples train where, and what the loss is divided by.

    Order (mixture or sequential)      samples of epoch 0 │ samples of epoch 1 │ …
      │ packed window by window          w w w w            w w w w               two budgets: tokens and tiles
      ▼ packs of a window shuffled
    stream of packs                    ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
                                       └step 0┘└step 1┘└step 2┘ …                 G packs each, whatever the layout
      ▼ balanced over the layout
    StepPlan                           assignment [ranks, microbatches], encoder ranks, loss denominator

All of it is a pure function of (seed, step, index, settings) and, for the assignment only, of the layout: every rank
computes the same plan, a run resumes from one integer and may change its number of ranks. The packs of all windows
of an epoch are counted the first time that a step needs it (packing runs at millions of samples a second), so any
step can be jumped to.
"""

import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from evovlm.csrc import random
from evovlm.data.order import Order, PlanIndex
from evovlm.data.packing import pack, pack_windows
from evovlm.data.step_plan import DataLayout, LossWeighting, Pack, StepPlan, assign, assign_images, loss_weights

__all__ = ["DataLayout", "LossWeighting", "Pack", "PlanSettings", "Planner", "StepPlan", "loss_weights"]


class PlanSettings(BaseModel):
    """What a step is made of, and how it is shared out.

    Attributes:
        seed: seed of the run, for everything random about its data.
        pack_tokens: tokens of a pack; every microbatch has this length.
        pack_tiles: most tiles of a pack.
        packs_per_step: packs of a step (G), over all ranks and microbatches.
        loss_weighting: weight of a target in a sample with n of them: 1, 1/n or 1/√n.
        window: samples that are packed together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    pack_tokens: int = Field(16384, gt=0, lt=2**31 - 1)
    pack_tiles: int = Field(48, ge=0, lt=2**31)
    packs_per_step: int = Field(gt=0)
    loss_weighting: LossWeighting = "square"
    window: int = Field(16384, gt=0, lt=2**31)


class Planner:
    """Makes the plan of any step; safe to call from several threads.

    Args:
        index: the index.
        order: ``Mixture`` to train, ``Sequential`` for one pass in index order.
        settings: sizes, weighting, seed.

    Attributes:
        dropped: int64, samples that do not fit into an empty pack; they are left out of the order.

    Raises:
        ValueError: no sample fits.
    """

    def __init__(self, index: PlanIndex, order: Order, settings: PlanSettings) -> None:
        self.index = index
        self.settings = settings
        # Columns are copied out of the mapped rows: a window gathers from them at random.
        self._tokens = np.ascontiguousarray(index.samples["num_tokens"], dtype=np.int32)
        self._tiles = np.ascontiguousarray(index.samples["num_tiles"], dtype=np.int32)
        over = (self._tokens > settings.pack_tokens) | (self._tiles > settings.pack_tiles)
        self.dropped: NDArray[np.int64] = np.flatnonzero(over).astype(np.int64)
        if len(self.dropped) == len(over):
            raise ValueError(
                f"none of {len(over)} samples fits into a pack of {settings.pack_tokens} tokens and "
                f"{settings.pack_tiles} tiles" + "".join(f"; {line}" for line in self.describe_dropped(3))
            )
        self.order = order.without(self.dropped) if len(self.dropped) else order
        self._epoch_ends: list[int] = []  # packs before the end of each epoch
        self._window_ends: list[NDArray[np.int64]] = []  # per epoch: packs before the end of each window
        self._orders: _Memo[tuple[NDArray[np.int64], NDArray[np.int64]]] = _Memo(2)
        self._windows: _Memo[list[NDArray[np.int64]]] = _Memo(4)
        self._lock = threading.Lock()

    @property
    def num_steps(self) -> int | None:
        """Steps of a sequential pass, the last perhaps padded with empty packs; None: endless."""
        if self.order.num_epochs is None:
            return None
        return -(-self.num_packs(self.order.num_epochs) // self.settings.packs_per_step)

    def num_packs(self, num_epochs: int) -> int:
        """Packs of the first ``num_epochs`` epochs; packs those that were not yet."""
        with self._lock:
            while len(self._epoch_ends) < num_epochs:
                self._count_epoch()
            return self._epoch_ends[num_epochs - 1] if num_epochs else 0

    def describe_dropped(self, limit: int | None = None) -> list[str]:
        """One line for each sample in ``dropped`` (at most ``limit``): its name, its size and the budget."""
        most = f"a pack holds {self.settings.pack_tokens} tokens and {self.settings.pack_tiles} tiles"
        return [
            f"sample '{self.index.name(int(i))}': {self._tokens[i]} tokens and {self._tiles[i]} tiles; {most}"
            for i in self.dropped[:limit]
        ]

    def plan_step(self, step: int, layout: DataLayout) -> StepPlan:
        """Plan a step.

        Args:
            step: counted from 0 over the whole run.
            layout: ranks and microbatches; their product must be ``packs_per_step``.

        Raises:
            ValueError: the step's packs cannot be shared out evenly.
            IndexError: a negative step, or one after the end of a sequential pass.
        """
        self.check_layout(layout)
        with self._lock:
            epoch, packs = self._packs_of(step)
        rows = [self.index.samples[p.samples] for p in packs]
        costs = [self._cost(p) for p in packs]
        assignment = assign(costs, layout)
        rank_of = np.empty(len(packs), np.int32)
        rank_of[assignment] = np.arange(layout.num_ranks, dtype=np.int32)[:, None]
        images = [int(r["num_images"].sum()) for r in rows]
        image_tiles = self._image_tiles(np.concatenate(rows))
        # The encoder beside a pack, where there are as many encoders as data-parallel ranks, or a multiple.
        home = np.repeat(rank_of, images) * layout.encoders // layout.num_ranks
        n = np.concatenate([r["num_supervised"] for r in rows])
        num_tiles = sum(p.num_tiles for p in packs)
        return StepPlan(
            step=step,
            epoch=epoch,
            packs=packs,
            assignment=assignment,
            image_tiles=image_tiles,
            encoder_rank=assign_images(image_tiles, home, layout.encoders),
            # fsum rounds once, so the sum does not depend on order or platform.
            loss_denominator=math.fsum(n * loss_weights(n, self.settings.loss_weighting)),
            num_samples=len(n),
            num_tokens=sum(p.num_tokens for p in packs),
            num_tiles=num_tiles,
            num_visual_tokens=num_tiles * self.index.meta.tokens_per_tile,
            num_supervised=int(n.sum(dtype=np.int64)),
        )

    def _image_tiles(self, rows: NDArray[np.void]) -> NDArray[np.int32]:
        """Tiles of every image of these samples, in order."""
        counts = rows["num_images"].astype(np.int64)
        starts = np.repeat(rows["first_image"].astype(np.int64) - (np.cumsum(counts) - counts), counts)
        tiles: NDArray[np.int32] = self.index.images["num_tiles"][starts + np.arange(len(starts))].astype(np.int32)
        return tiles

    def check_layout(self, layout: DataLayout) -> None:
        """Raise ``ValueError`` unless ranks × microbatches is the number of packs of a step."""
        size, ranks, microbatches = self.settings.packs_per_step, layout.num_ranks, layout.num_microbatches
        if ranks < 1 or microbatches < 1 or ranks * microbatches != size:
            remedy = f"choose packs_per_step as a multiple of {ranks}"
            if ranks > 0 and size % ranks == 0:
                remedy = f"use {size // ranks} microbatches"
            raise ValueError(
                f"packs_per_step = {size} cannot be shared out over {ranks} data-parallel ranks × {microbatches} "
                f"microbatches = {ranks * microbatches} packs: {remedy}"
            )

    def _cost(self, p: Pack) -> int:
        """Work beyond the linear layers of the LLM, which is the same for every pack; in squared tokens."""
        lengths = self._tokens[p.samples].astype(np.int64)
        return int((lengths * lengths).sum())

    def _packs_of(self, step: int) -> tuple[int, tuple[Pack, ...]]:
        """The step's packs, and the epoch of the first."""
        size = self.settings.packs_per_step
        first = self._epoch_of(step * size) if step >= 0 else None
        if first is None:
            steps = "" if step < 0 else f": the pass has {-(-self._epoch_ends[-1] // size)}"
            raise IndexError(f"there is no step {step}{steps}")
        numbers = range(step * size, (step + 1) * size)
        return first, tuple(self._pack(number, self._epoch_of(number)) for number in numbers)

    def _epoch_of(self, number: int) -> int | None:
        """Epoch of a pack of the stream; None after the end of the last."""
        while not self._epoch_ends or self._epoch_ends[-1] <= number:
            if len(self._epoch_ends) == self.order.num_epochs:
                return None
            self._count_epoch()
        return bisect_right(self._epoch_ends, number)

    def _count_epoch(self) -> None:
        """Pack all windows of the next epoch to learn how many packs it has."""
        samples, _ = self._order(len(self._epoch_ends))
        s = self.settings
        _, counts = pack_windows(self._tokens[samples], self._tiles[samples], s.window, s.pack_tokens, s.pack_tiles)
        self._window_ends.append(np.cumsum(counts, dtype=np.int64))
        self._epoch_ends.append((self._epoch_ends or [0])[-1] + int(counts.sum()))

    def _pack(self, number: int, epoch: int | None) -> Pack:
        """A pack of the stream."""
        if epoch is None:
            nothing = np.empty(0, np.int64)
            return Pack(nothing, nothing, 0, 0, 0)
        ends = self._window_ends[epoch]
        in_epoch = number - (self._epoch_ends[epoch - 1] if epoch else 0)
        window = int(np.searchsorted(ends, in_epoch, side="right"))
        in_window = in_epoch - (int(ends[window - 1]) if window else 0)
        places = self._windows.get((epoch, window), lambda: self._pack_window(epoch, window))[in_window]
        samples, visits = (column[places] for column in self._order(epoch))
        return Pack(
            samples,
            visits,
            int(self._tokens[samples].sum()),
            int(self._tiles[samples].sum()),
            int(self.index.samples["num_supervised"][samples].sum()),
        )

    def _pack_window(self, epoch: int, window: int) -> list[NDArray[np.int64]]:
        """The packs of a window, shuffled when the order is: places in the epoch's order, ascending, for each."""
        s = self.settings
        first = window * s.window
        samples = self._order(epoch)[0][first : first + s.window]
        pack_of, count = pack(self._tokens[samples], self._tiles[samples], s.pack_tokens, s.pack_tiles)
        ends = np.cumsum(np.bincount(pack_of, minlength=count))
        packs = np.split(first + np.argsort(pack_of, kind="stable"), ends[:-1])
        if not self.order.shuffled:
            return packs
        return [packs[i] for i in random.permutation(count, "order", s.seed, "packs", epoch, window)]

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._orders.get(epoch, lambda: self.order.order(epoch))


V = TypeVar("V")


class _Memo(Generic[V]):
    """Keeps the last few results of a pure function."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
