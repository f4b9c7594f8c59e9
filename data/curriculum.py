"""A run whose mixture changes at given steps: phases, each with its own weights.

    steps   0 ─────── 100 ─────────────── 350 ──────────────────────────────►
    phase   digit pages │ digits and letters │ the last mixture

A tiny model needs this: what it must learn first (to look at an image at all) is lost among many tasks at once. It is
also how a long run gets another dataset or other weights at a step: what was trained before becomes a phase.

Every phase takes over where the one before left each dataset: draws go on, and what its last window had drawn but not
trained on comes first. So nothing is lost or repeated, and a plan is still a pure function of the step.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import PlanIndex
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.parallel.cost import IntegerCosts


class Phase(BaseModel):
    """The first steps of a run, or the steps after an earlier phase. Give ``weights`` or ``datasets``.

    Attributes:
        steps: how many optimizer steps it lasts.
        weights: relative number of draws of each dataset; datasets that are not named are not drawn.
        datasets: datasets to draw from, as the index has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    datasets: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_choice(self) -> "Phase":
        if bool(self.weights) == bool(self.datasets):
            raise ValueError(f"phase of {self.steps} steps: give exactly one of weights, datasets")
        return self

    def mixture(self, base: MixtureSettings) -> MixtureSettings:
        """Return the mixture of this phase; ratio and replacement are those of ``base``."""
        return base.model_copy(update={"weights": self.weights, "datasets": self.datasets or tuple(self.weights)})


class Curriculum:
    """Plans a run of phases; safe to use from several threads.

    Args:
        index: the index.
        phases: (steps, mixture) of each phase, in order.
        last: mixture of every step after them.
        settings: of the plans.
        costs: what packs cost the LLM, see ``Planner``.

    Raises:
        ValueError: a phase ends inside of steps that are planned together.
    """

    def __init__(
        self,
        index: PlanIndex,
        phases: Sequence[tuple[int, MixtureSettings]],
        last: MixtureSettings,
        settings: PlanSettings,
        costs: IntegerCosts | None = None,
    ) -> None:
        for steps, _ in phases:
            if steps % settings.balance_steps:
                raise ValueError(
                    f"a phase of {steps} steps ends inside of balance_steps = {settings.balance_steps} that are "
                    "planned together: choose a multiple"
                )
        self.settings = settings
        self._index = index
        self._steps = [steps for steps, _ in phases]
        self._mixtures = [*(mixture for _, mixture in phases), last]
        self._costs = costs
        self._lock = threading.Lock()
        self._planners = [self._planner(Mixture(index, self._mixtures[0], settings.seed))]
        for mixture in self._mixtures[1:]:  # a dataset that the index lacks is found now, not in a week
            Mixture(index, mixture, settings.seed)

    @property
    def last(self) -> Planner:
        """The planner of the steps after all phases; plans the phases if that was not done yet."""
        return self._phase(len(self._steps))

    @property
    def num_steps(self) -> int | None:
        """None: endless."""
        return self.last.num_steps

    @property
    def phase_steps(self) -> int:
        """Steps before the last mixture begins."""
        return sum(self._steps)

    def check_layout(self, layout: DataLayout) -> None:
        """Raise ``ValueError`` unless ranks × microbatches is the number of packs of a step."""
        self._planners[0].check_layout(layout)

    def plan_step(self, step: int, layout: DataLayout) -> StepPlan:
        """Plan a step, counted from 0 over the whole run; see ``Planner.plan_step``."""
        first = number = 0
        while number < len(self._steps) and step >= first + self._steps[number]:
            first += self._steps[number]
            number += 1
        return replace(self._phase(number).plan_step(step - first, layout), step=step)

    def _phase(self, number: int) -> Planner:
        with self._lock:
            while len(self._planners) <= number:
                before, steps = self._planners[-1], self._steps[len(self._planners) - 1]
                epoch, window, unused = before.stream.unused(steps)
                ended = before.order
                assert isinstance(ended, Mixture)
                start = ended.after(epoch, window, self.settings.window, unused)
                mixture = self._mixtures[len(self._planners)]
                self._planners.append(self._planner(Mixture(self._index, mixture, self.settings.seed, start=start)))
            return self._planners[number]

    def _planner(self, mixture: Mixture) -> Planner:
        return Planner(self._index, mixture, self.settings, self._costs)
