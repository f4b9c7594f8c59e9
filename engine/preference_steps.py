"""The steps of a run of mixed preference optimisation: which reference model, what is reported, what is kept.

plan, batch ─► reference.log_probs ─► PreferenceTraining.train_step ─► loss, metrics
                                         └─ δ ─► checkpoint
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import StepPlan
from evovlm.engine.engine import Engine
from evovlm.engine.preference import PreferenceTraining, score_pairs
from evovlm.engine.preference_loss import PreferenceLossSettings, RewardShift
from evovlm.engine.reference import Reference
from evovlm.engine.steps import Planned, Validation

_STATE = "reward_shift"


class PreferenceSteps:
    """Mixed preference optimisation.

    Args:
        engine: The policy.
        settings: The loss.
        reference: Scores of the training index.
        held_out: Scores of the validation index; None where there is none.
    """

    def __init__(
        self, engine: Engine, settings: PreferenceLossSettings, reference: Reference, held_out: Reference | None
    ) -> None:
        self._training = PreferenceTraining(engine, settings)
        self._reference, self._held_out = reference, held_out

    def train_step(self, plan: StepPlan, batch: StepBatch, lr_factor: float) -> dict[str, Any]:
        """Run one optimizer step. Collective."""
        reference = self._reference.log_probs(plan, batch)
        result = self._training.train_step(batch, reference, plan.num_chosen, lr_factor)
        return {**asdict(result.step), **result.metrics, "pairs": plan.num_samples}

    def validate(self, steps: Planned) -> Validation:
        """Run over held-out pairs. Collective.

        Raises:
            ValueError: There is no reference for them.
        """
        if self._held_out is None:
            raise ValueError("held-out pairs have no reference model")
        tokens = num_chosen = 0
        scores: list[tuple[Tensor, Tensor]] = []
        for plan, batch in steps:
            tokens, num_chosen = tokens + plan.num_supervised, num_chosen + plan.num_chosen
            own = score_pairs(self._training.engine, batch, plan.num_samples).cpu()
            scores.append((own, self._held_out.log_probs(plan, batch)))
        # All at once: means of steps would depend on how many pairs each has.
        log_probs, reference = (torch.cat(parts) for parts in zip(*scores, strict=True))
        terms, metrics = self._training.evaluate(log_probs, reference, num_chosen)
        return Validation(terms.loss, tokens, metrics)

    def state(self) -> dict[str, Any]:
        """δ, exactly."""
        return {_STATE: self._training.shift.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take δ back.

        Raises:
            ValueError: The checkpoint is of a run that had none.
        """
        state = saved.get(_STATE)
        if state is None:
            raise ValueError(f"the checkpoint has no {_STATE}: it is of a run of another stage")
        self._training.shift = RewardShift(state["total"], state["count"])
