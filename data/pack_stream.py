"""The endless row of packs that steps are cut from, whatever the layout: any part of it can be asked for.

    Order (mixture or sequential)      window 0 │ window 1 │ …   of epoch 0, of epoch 1, …
      │ long texts split, packed         w w w      w w w        two budgets: tokens and tiles
      ▼ packs of a window shuffled
    stream of packs                    ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
                                       └step 0┘└step 1┘└step 2┘ …                 G packs each

A window knows nothing of its neighbours. Windows before a step are packed once to count their packs (millions of
samples a second), so any step can be jumped to, and nothing is kept but one number per window.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from evovlm.csrc import random
from evovlm.data.branches import squared_lengths
from evovlm.data.order import Draws, Order, PlanIndex
from evovlm.data.packing import pack
from evovlm.data.packs import Packs
from evovlm.data.plan_settings import PlanSettings
from evovlm.parallel.balance import balance_packs


class PackStream:
    """Packs of a run, numbered from 0; safe to use from several threads.

    Args:
        index: the index.
        order: draws samples, window by window; every one of them fits into a pack or is a text that may be split.
        settings: sizes and seed.
    """

    def __init__(self, index: PlanIndex, order: Order, settings: PlanSettings) -> None:
        self.order = order
        self._settings = settings
        self._tokens, self._tiles = index.samples["num_tokens"], index.samples["num_tiles"]
        pairs = index.meta.kind == "preference"
        self._branches = (index.samples["chosen_at"], index.samples["rejected_at"]) if pairs else None
        self._together = settings.balance_steps if order.shuffled else 1
        self._num_windows = order.num_windows(settings.window)  # of an epoch
        self._ends: list[int] = []  # packs before the end of each window, over all epochs
        self._windows: _Memo[Packs] = _Memo(4)
        self._dealt: _Memo[NDArray[np.int64]] = _Memo(1)
        self._lock = threading.Lock()

    def num_packs(self, num_epochs: int) -> int:
        """Packs of the first ``num_epochs`` epochs; packs those that were not yet."""
        with self._lock:
            while len(self._ends) < num_epochs * self._num_windows:
                self._count_window()
            return self._ends[num_epochs * self._num_windows - 1] if num_epochs else 0

    def of_step(self, step: int) -> tuple[int, Packs]:
        """Return the epoch of a step's first pack, and its packs, empty ones where a sequential pass has ended.

        Raises:
            IndexError: a negative step, or one after the end of a sequential pass.
        """
        with self._lock:
            return self._of_step(step)

    def unused(self, steps: int) -> tuple[int, int, Draws]:
        """Say what is left over when a run leaves this planner after some steps.

        Args:
            steps: a multiple of ``balance_steps``.

        Returns:
            Epoch and number of the last window that was begun, and the draws up to its end that were not trained on.

        Raises:
            ValueError: packs of these steps and of later ones were dealt out together.
        """
        if steps % self._together:
            raise ValueError(f"{steps} steps end inside of balance_steps = {self._together} that are planned together")
        used = steps * self._settings.packs_per_step
        with self._lock:
            last = self._window_of(used - 1) or 0
            left = self._take(np.arange(used, self._ends[last]))
        split = left.lengths != self._tokens[left.samples]
        parts = np.where(split, left.begins // self._settings.pack_tokens, -1)
        return *divmod(last, self._num_windows), Draws(left.samples, left.visits, parts)

    def _of_step(self, step: int) -> tuple[int, Packs]:
        size = self._settings.packs_per_step
        window = self._window_of(step * size) if step >= 0 else None
        if window is None:
            steps = "" if step < 0 else f": the pass has {-(-self._ends[-1] // size)}"
            raise IndexError(f"there is no step {step}{steps}")
        numbers = np.arange(step * size, (step + 1) * size)
        if self._together > 1:
            numbers = self._deal(step // self._together)[step % self._together]
            window = self._window_of(int(numbers[0])) or 0
        return window // self._num_windows, self._take(numbers).padded(size)

    def _deal(self, group: int) -> NDArray[np.int64]:
        """Numbers of the packs, int64 [steps, G], of steps that are planned together; all of them cost alike."""
        count = self._together * self._settings.packs_per_step

        def deal() -> NDArray[np.int64]:
            T, numbers = self._settings.pack_tokens, np.arange(group * count, (group + 1) * count)
            # Attention is what packs differ in; a run's cost model must not decide what a step trains on.
            squares = self._take(numbers).sum_squares(T)
            dealt = balance_packs(squares, self._together, self._settings.packs_per_step).assignment
            return np.sort(numbers[dealt], axis=1)

        return self._dealt.get(group, deal)

    def _take(self, numbers: NDArray[np.int64]) -> Packs:
        """Packs of the stream, ascending numbers; fewer where the stream ends."""
        parts, window = [], 0
        while len(numbers):
            found = self._window_of(int(numbers[0]))
            if found is None:
                break
            window = found
            first = self._ends[window - 1] if window else 0
            here = int(np.searchsorted(numbers, self._ends[window]))
            parts.append(self._window(window).take(numbers[:here] - first))
            numbers = numbers[here:]
        return Packs.concatenate(parts)

    def _window_of(self, number: int) -> int | None:
        """The window, counted over all epochs, that a pack of the stream is in; None after the end of the last."""
        while not self._ends or self._ends[-1] <= number:
            if self.order.num_epochs is not None and len(self._ends) == self.order.num_epochs * self._num_windows:
                return None
            self._count_window()
        return bisect_right(self._ends, number)

    def _count_window(self) -> None:
        """Pack the next window to learn how many packs it has."""
        window = len(self._ends)
        self._ends.append((self._ends or [0])[-1] + len(self._window(window)))

    def _window(self, window: int) -> Packs:
        """The packs of a window, shuffled when the order is; samples of a pack as they were drawn."""
        return self._windows.get(window, lambda: self._pack_window(window))

    def _pack_window(self, window: int) -> Packs:
        s = self._settings
        epoch, number = divmod(window, self._num_windows)
        draws, begins, lengths = self._split(self.order.window(epoch, number, s.window))
        tiles = self._tiles[draws.samples].astype(np.int64)
        even = s.even_packs == "always" or (s.even_packs == "auto" and 2 * lengths.max(initial=0) <= s.pack_tokens)
        squares = self._squares(draws.samples, lengths)
        pack_of, count = pack(lengths, tiles, s.pack_tokens, s.pack_tiles, squares if even else None)
        packs = Packs.of(
            pack_of,
            count,
            samples=draws.samples,
            visits=draws.visits,
            begins=begins,
            lengths=lengths,
            tiles=tiles,
            squares=squares,
        )
        return packs.take(random.permutation(count, "order", s.seed, "packs", window)) if self.order.shuffled else packs

    def _squares(self, samples: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Work of attention in each segment, see ``Packs.squares``; pairs are never in parts."""
        if self._branches is None:
            return lengths**2
        chosen_at, rejected_at = self._branches
        return squared_lengths(lengths, chosen_at[samples], rejected_at[samples])

    def _split(self, draws: Draws) -> tuple[Draws, NDArray[np.int64], NDArray[np.int64]]:
        """Cut texts that are longer than a pack: the draws by parts, and first token and length of each."""
        T = self._settings.pack_tokens
        tokens = self._tokens[draws.samples].astype(np.int64)
        whole = draws.parts < 0
        counts = np.where(whole, -(-tokens // T), 1)
        if (counts == 1).all() and whole.all():
            return draws, np.zeros(len(draws), np.int64), tokens
        ends = np.cumsum(counts)
        inside = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        part = np.repeat(np.maximum(draws.parts, 0), counts) + inside
        begins = part * T
        return (
            draws[np.repeat(np.arange(len(draws)), counts)],
            begins,
            np.minimum(np.repeat(tokens, counts) - begins, T),
        )


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
