"""What a training loop asks of a stage: a step, a validation pass, and what a checkpoint keeps besides the model.

    _Loop ─ plan, batch ─► Steps.train_step ─► loss, gradient norm, the stage's own metrics
          ─ val_index ───► Steps.validate
          ─ checkpoint ──► Steps.state / Steps.restore

Pre-training and tuning are ``SupervisedSteps``; mixed preference optimisation has its own (``preference_steps.py``).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import StepPlan
from evovlm.engine.engine import Engine

Planned = Iterable[tuple[StepPlan, StepBatch]]


@dataclass(frozen=True)
class Validation:
    """What a validation pass found.

    Attributes:
        loss: Over the whole index; NaN if it has no target.
        tokens: Supervised tokens.
        metrics: The stage's own.
    """

    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


class Steps(Protocol):
    """Steps of a stage."""

    def train_step(self, plan: StepPlan, batch: StepBatch, lr_factor: float) -> dict[str, Any]:
        """Run one optimizer step. Collective.

        Returns:
            ``loss``, ``grad_norm``, ``clipped``, and the stage's own metrics.
        """
        ...

    def validate(self, steps: Planned) -> Validation:
        """Run over held-out steps. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides model and optimizer, as JSON."""
        ...

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave, from a checkpoint's meta."""
        ...


class SupervisedSteps:
    """Weighted cross-entropy.

    Args:
        engine: What is trained.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def train_step(self, plan: StepPlan, batch: StepBatch, lr_factor: float) -> dict[str, Any]:
        """Run one optimizer step. Collective."""
        return asdict(self._engine.train_step(batch, plan.loss_denominator, lr_factor))

    def validate(self, steps: Planned) -> Validation:
        """Run over held-out steps. Collective."""
        tokens = 0

        def batches() -> Iterator[StepBatch]:
            nonlocal tokens
            for plan, batch in steps:
                tokens += plan.num_supervised
                yield batch

        loss, weight = self._engine.evaluate(batches())
        return Validation(loss / weight if weight else math.nan, tokens)

    def state(self) -> dict[str, Any]:
        """Nothing: model and optimizer are all there is."""
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back nothing."""
