"""How process reward data are built from a model's solutions: every choice in one frozen object."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import Rules
from evovlm.data.solution_steps import MAX_STEPS, PRM_SYSTEM_PROMPT
from evovlm.engine.answer_sampler import Asking
from evovlm.engine.generation import Sampling

NUM_SOLUTIONS = 4


@dataclass(frozen=True)
class PrmSettings:
    """How process reward data are built (spec §5.1).

    Attributes:
        sampling: How solutions and rollouts are drawn.
        rules: Which rule checks which dataset's answers.
        style: How a question asks for a checkable answer.
        num_solutions: Solutions of each question; of a file, the first ones. None: 4, or all that the file has.
        num_rollouts: Continuations of each prefix.
        max_steps: Most steps of a solution.
        early_stop: Once no rollout is right, later steps are 0 and are not rolled out. Solutions then go step by step,
            so that their prefixes share no prefill.
        mc_threshold: A step is good iff its share of right rollouts is above this.
        until_first_error: Conversations end with the first step that is not good.
        outcome: The whole solution is one step, labelled by its own answer, for an outcome reward model; nothing is
            rolled out.
        prm_system_prompt: System turn of the conversations; None: the chat template's own.
        solutions: A candidate file whose solutions are labelled; None: they are sampled.
        system_prompt: System turn of questions that bring none, for the policy; None: the one it was trained with.
        limit: Most lines of each dataset; None: all.
        start: First line of each dataset, from 0.

    Raises:
        ValueError: A setting is out of its range.
        FileNotFoundError: ``solutions`` is no file.
    """

    sampling: Sampling
    rules: Rules
    style: PromptStyle = PromptStyle.DIRECT
    num_solutions: int | None = None
    num_rollouts: int = 16
    max_steps: int = MAX_STEPS
    early_stop: bool = False
    mc_threshold: float = 0.0
    until_first_error: bool = False
    outcome: bool = False
    prm_system_prompt: str | None = PRM_SYSTEM_PROMPT
    solutions: Path | None = None
    system_prompt: str | None = None
    limit: int | None = 3072
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("num_solutions", "num_rollouts", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} is below 1")
        if not 0 <= self.mc_threshold < 1:
            raise ValueError(f"mc_threshold = {self.mc_threshold} is not in [0, 1): no step could be good")
        drawn = {"solution": self._num_solutions if self.solutions is None else 1}
        drawn["rollout"] = 1 if self.outcome else self.num_rollouts
        for what, count in drawn.items():
            if self.sampling.temperature == 0 and count > 1:
                raise ValueError(
                    f"temperature = 0 gives the same {what} {count} times: raise it to draw different ones"
                )
        if self.outcome and (self.until_first_error or self.early_stop):
            raise ValueError("an outcome reward model judges whole solutions: neither early_stop nor until_first_error")
        if self.solutions is not None and not self.solutions.is_file():
            raise FileNotFoundError(f"there is no candidate file {self.solutions}")

    @property
    def _num_solutions(self) -> int:
        return self.num_solutions or (NUM_SOLUTIONS if self.solutions is None else sys.maxsize)

    @property
    def asking(self) -> Asking:
        """What questions are asked, and how."""
        return Asking(
            self.sampling, self.rules, self.style, self._num_solutions, self.system_prompt, self.limit, self.start
        )

    def identity(self, meta: Path, model: str) -> dict[str, Any]:
        """Return what samples and rollouts depend on: builds that differ here cannot share a folder."""
        of_file = {"solutions": None if self.solutions is None else str(self.solutions.absolute())}
        numbers = {"num_solutions": self._num_solutions, "num_rollouts": self.num_rollouts, "max_steps": self.max_steps}
        common = {"method": "prm", "meta": str(meta.absolute()), "model": model, "prompt": str(self.style)}
        return {**common, "system_prompt": self.system_prompt, **of_file, **numbers, **asdict(self.sampling)}
