"""Phases of a run: for its first steps a run may draw from a few datasets only, before the whole mixture begins.

    steps   0 ─────── 100 ─────────────── 350 ──────────────────────────────►
    phase   digit pages │ digits and letters │ the whole mixture (the run's own weights)

Each phase plans its own stream of packs, so a plan is still a pure function of the step. A tiny model needs this: what
it must learn first (to look at an image at all) is lost among many tasks at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from evovlm.data.plan import DataLayout, Planner, PlanSettings, StepPlan


class Phase(BaseModel):
    """The first steps of a run, or the steps after an earlier phase.

    Attributes:
        steps: how many optimizer steps it lasts.
        weights: relative number of draws of each dataset; datasets that are not named are not drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1)

    def over(self, names: Sequence[str]) -> Mapping[str, float]:
        """Return a weight for every dataset of an index: 0 for those that the phase does not name.

        Raises:
            ValueError: the phase names a dataset that the index does not have.
        """
        unknown = sorted(set(self.weights) - set(names))
        if unknown:
            raise ValueError(
                f"phase of {self.steps} steps: no dataset {unknown[0]!r}; the index has {', '.join(names)}"
            )
        return {name: self.weights.get(name, 0.0) for name in names}


class Curriculum:
    """Plans a run of phases; without phases it is its last planner.

    Args:
        phases: (steps, planner) of each phase, in order.
        last: plans every step after them.
    """

    def __init__(self, phases: Sequence[tuple[int, Planner]], last: Planner) -> None:
        self._phases = tuple(phases)
        self._last = last

    @property
    def settings(self) -> PlanSettings:
        """Settings of the plans: those of the last planner, which all share."""
        return self._last.settings

    @property
    def num_steps(self) -> int | None:
        """Steps of all phases and of the last planner's pass; None: endless."""
        last = self._last.num_steps
        return None if last is None else last + self.phase_steps

    @property
    def phase_steps(self) -> int:
        """Steps before the last planner begins."""
        return sum(steps for steps, _ in self._phases)

    def check_layout(self, layout: DataLayout) -> None:
        """Raise ``ValueError`` unless ranks × microbatches is the number of packs of a step."""
        self._last.check_layout(layout)

    def plan_step(self, step: int, layout: DataLayout) -> StepPlan:
        """Plan a step, counted from 0 over the whole run; see ``Planner.plan_step``."""
        first = 0
        for steps, planner in self._phases:
            if first <= step < first + steps:
                return replace(planner.plan_step(step - first, layout), step=step)
            first += steps
        local = step - first if step >= 0 else step  # a negative step is the planner's error to name
        return replace(self._last.plan_step(local, layout), step=step)
