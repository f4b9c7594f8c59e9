"""Where log-probabilities under the reference model come from, for each step of preference optimisation.

precompute   INDEX/reference/ID.safetensors [samples, 2] ── rows of the step's pairs ──────────► [N, 2]
               made once, in one pass over the index (reference_pass.py)
resident     a second, frozen model ── its own batches, or the policy's ── forward ──► summed ─► [N, 2]
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evovlm.data.index import Index
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import StepPlan
from evovlm.engine.preference import score_pairs
from evovlm.engine.sharded_model import ShardedModel

Batches = Callable[[int], Iterator[tuple[StepPlan, StepBatch]]]
"""Steps of the run, from a step on, as the reference model's own layout shares them out."""


class Reference(Protocol):
    """A reference model."""

    def log_probs(self, plan: StepPlan, batch: StepBatch) -> Tensor:
        """Return float64 ``[N, 2]``, log π_ref of a step's pairs in the order of the plan. Collective."""
        ...


class NoReference:
    """For a loss that compares with none."""

    def log_probs(self, plan: StepPlan, batch: StepBatch) -> Tensor:  # noqa: ARG002 - the protocol's name
        """Return zeros, which weigh nothing."""
        return torch.zeros(plan.num_samples, 2, dtype=torch.float64)


class PrecomputedReference:
    """Scores of a pass over the index.

    Args:
        index: The index.
        table: Float64 ``[samples, 2]``; NaN where a sample has none.
    """

    def __init__(self, index: Index, table: NDArray[np.float64]) -> None:
        self._index, self._table = index, table

    def log_probs(self, plan: StepPlan, batch: StepBatch) -> Tensor:  # noqa: ARG002 - the protocol's name
        """Look the step's pairs up.

        Raises:
            ValueError: A pair has no score.
        """
        found = self._table[plan.packs.samples]
        for missing in np.flatnonzero(np.isnan(found).any(1))[:1]:
            raise ValueError(
                f"the reference model's scores lack sample '{self._index.name(int(plan.packs.samples[missing]))}': "
                "delete their file, and they are made anew"
            )
        return torch.from_numpy(found)


class ResidentReference:
    """A second model, frozen, that scores each step.

    Args:
        model: The model.
        batches: Its own share of each step; None: that of the policy, under the same layout.
    """

    def __init__(self, model: ShardedModel, batches: Batches | None = None) -> None:
        self._model, self._batches = model, batches
        self._steps: Iterator[tuple[StepPlan, StepBatch]] | None = None
        self._next = 0

    def log_probs(self, plan: StepPlan, batch: StepBatch) -> Tensor:
        """Score the step's pairs, with the paths dropped that the policy drops. Collective."""
        if self._batches is not None:
            if self._steps is None or plan.step != self._next:
                self._steps = self._batches(plan.step)
            own, batch = next(self._steps)
            if own.step != plan.step or not np.array_equal(own.packs.samples, plan.packs.samples):
                raise RuntimeError(f"the reference model was given step {own.step} instead of {plan.step}")
            self._next = plan.step + 1
        return score_pairs(self._model, batch, plan.num_samples, drop_path=True)
