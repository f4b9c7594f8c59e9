"""A step is decided before it starts: ``plan_step`` says which samples train where, and what the loss is divided by.

    PackStream   ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇      packs of samples, whatever the layout (``pack_stream.py``)
                 └step 0┘└step 1┘└step 2┘ …
                             ▼ balanced over the layout (``parallel/balance.py``)
    StepPlan     assignment [ranks, microbatches], encoders of images, loss denominator (``step_plan.py``)

All of it is a pure function of (seed, step, index, settings) and, for the assignment only, of the layout: every rank
computes the same plan, in integers, and a run resumes from one integer and may change its number of ranks.
"""

import math

import numpy as np
from numpy.typing import NDArray

from evovlm.data.mixture import Mixture, Share
from evovlm.data.order import Order, PlanIndex
from evovlm.data.pack_stream import PackStream
from evovlm.data.packs import Packs
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout, Pieces, StepPlan, loss_weights
from evovlm.parallel.balance import balance_images, balance_packs
from evovlm.parallel.cost import IntegerCosts

_CHUNK = 1 << 20  # rows looked at in one go when all sizes of an index are compared with the budgets


class Planner:
    """Makes the plan of any step; safe to call from several threads.

    Args:
        index: the index.
        order: ``Mixture`` to train, ``Sequential`` for one pass in index order.
        settings: sizes, weighting, seed.
        costs: what packs cost the LLM; by default attention alone, in squared tokens.

    Attributes:
        order: the order, less what is left out.
        stream: the packs that steps are made of.
        dropped: int64, samples that are left out of the order because they do not fit into an empty pack.

    Raises:
        ValueError: no sample fits; or one does not, and the settings say that this is an error.
    """

    def __init__(
        self, index: PlanIndex, order: Order, settings: PlanSettings, costs: IntegerCosts | None = None
    ) -> None:
        self.index = index
        self.settings = settings
        squares = IntegerCosts(0, 1, 0, 1, 0, max_tokens=settings.pack_tokens, max_tiles=settings.pack_tiles)
        self._costs = costs or squares
        self._tokens, self._tiles = index.samples["num_tokens"], index.samples["num_tiles"]
        self._pairs = index.meta.kind == "preference"
        self.dropped = self._too_large()
        if len(self.dropped) == len(self._tokens):
            raise ValueError(
                f"none of {len(self._tokens)} samples fits into a pack of {settings.pack_tokens} tokens and "
                f"{settings.pack_tiles} tiles" + "".join(f"; {line}" for line in self.describe_dropped(3))
            )
        if len(self.dropped) and settings.long_samples == "error":
            count, ways = len(self.dropped), "'skip'" if self._pairs else "'skip' or 'split'"
            raise ValueError(
                f"{self.describe_dropped(1)[0]} ({count} such samples): raise the budget, or choose "
                f"long_samples = {ways}"
            )
        self.order = order.without(self.dropped) if len(self.dropped) else order
        self.stream = PackStream(index, self.order, settings)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each dataset contributes to an epoch of a mixture; nothing is said of another order."""
        return self.order.shares if isinstance(self.order, Mixture) else ()

    @property
    def num_steps(self) -> int | None:
        """Steps of a sequential pass, the last perhaps padded with empty packs; None: endless."""
        if self.order.num_epochs is None:
            return None
        return -(-self.num_packs(self.order.num_epochs) // self.settings.packs_per_step)

    def num_packs(self, num_epochs: int) -> int:
        """Packs of the first ``num_epochs`` epochs; packs those that were not yet."""
        return self.stream.num_packs(num_epochs)

    def describe_dropped(self, limit: int | None = None) -> list[str]:
        """One line for each sample in ``dropped`` (at most ``limit``): its name, its size and the budget."""
        most = f"a pack holds {self.settings.pack_tokens} tokens and {self.settings.pack_tiles} tiles"
        return [
            f"{'pair' if self._pairs else 'sample'} '{self.index.name(int(i))}': {self._tokens[i]} tokens"
            f"{self._parts(int(i)) if self._pairs else ''} and {self._tiles[i]} tiles; {most}"
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
        epoch, packs = self.stream.of_step(step)
        T = self.settings.pack_tokens
        supervised = self._supervised(packs)
        targets = np.bincount(packs.pack_of, supervised, len(packs)).astype(np.int64)
        costs = self._costs.pack_costs(packs.sum_squares(T), targets, T)
        assignment = balance_packs(costs, layout.num_ranks, layout.num_microbatches, packs.num_tokens).assignment
        image_tiles, pieces = self._encode(packs, assignment, layout)
        weights = loss_weights(supervised, self.settings.loss_weighting)
        mean_load = int(costs.sum()) // layout.num_ranks
        num_tiles = int(packs.tiles.sum())
        work = self._costs.sample_costs(packs.lengths, supervised, packs.squares)
        of_chosen = self.index.samples["num_chosen"][packs.samples] if self._pairs else np.empty(0)
        return StepPlan(
            step=step,
            epoch=epoch,
            packs=packs,
            pack_costs=costs,
            assignment=assignment,
            image_tiles=image_tiles,
            pieces=pieces,
            num_encoders=layout.encoders,
            supervised=supervised,
            # fsum rounds once, so the sum does not depend on order or platform.
            loss_denominator=math.fsum(supervised * weights),
            outliers=packs.samples[work > mean_load],
            num_tokens=int(packs.lengths.sum()),
            num_tiles=num_tiles,
            num_visual_tokens=num_tiles * self.index.meta.tokens_per_tile,
            num_chosen=int(of_chosen.sum()),
        )

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

    def _parts(self, pair: int) -> str:
        """Lengths of a pair's parts."""
        chosen, rejected = (int(self.index.samples[name][pair]) for name in ("chosen_at", "rejected_at"))
        return f" (prompt {chosen}, chosen {rejected - chosen}, rejected {self._tokens[pair] - rejected})"

    def _too_large(self) -> NDArray[np.int64]:
        """Samples that no pack can hold, ascending; column by column in parts, so that memory stays small."""
        s, found = self.settings, [np.empty(0, np.int64)]
        for first in range(0, len(self._tokens), _CHUNK):
            part = slice(first, first + _CHUNK)
            tokens, tiles = self._tokens[part], self._tiles[part]
            over = (tokens > s.pack_tokens) | (tiles > s.pack_tiles)
            if s.long_samples == "split" and not self._pairs:
                over &= tiles > 0
            found.append(first + np.flatnonzero(over))
        return np.concatenate(found).astype(np.int64)

    def _encode(
        self, packs: Packs, assignment: NDArray[np.int32], layout: DataLayout
    ) -> tuple[NDArray[np.int32], Pieces]:
        """Tiles of every image of the step, in order, and who encodes them."""
        counts = self.index.samples["num_images"][packs.samples].astype(np.int64)
        rows = np.repeat(self.index.samples["first_image"][packs.samples] - (np.cumsum(counts) - counts), counts)
        tiles: NDArray[np.int32] = self.index.images["num_tiles"][rows + np.arange(len(rows))].astype(np.int32)
        rank_of = np.empty(len(packs), np.int64)
        rank_of[assignment] = np.arange(layout.num_ranks)[:, None]
        home = layout.home(np.repeat(rank_of[packs.pack_of], counts))
        made = balance_images(tiles, layout.encoders, home, layout.node_encoders)
        return tiles, Pieces(made.image, made.first, made.tiles, made.encoder)

    def _supervised(self, packs: Packs) -> NDArray[np.int64]:
        """Targets of each segment; those of a split text are counted in its tokens, unless they are all that can be."""
        counts: NDArray[np.int64] = self.index.samples["num_supervised"][packs.samples].astype(np.int64)
        tokens = self._tokens[packs.samples].astype(np.int64)
        # Row t has the label t + 1, so the last row of a part has the first token of the next as its target.
        everything = counts == tokens - 1
        counts = np.where(everything, np.minimum(packs.lengths, tokens - 1 - packs.begins), counts)
        for i in np.flatnonzero((packs.lengths != tokens) & ~everything).tolist():
            _, supervised = self.index.tokens(int(packs.samples[i]))
            first = int(packs.begins[i]) + 1
            counts[i] = np.count_nonzero(supervised[first : first + int(packs.lengths[i])])
        return counts
