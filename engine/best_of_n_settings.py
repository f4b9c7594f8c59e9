"""How Best-of-N is measured: every choice in one frozen object."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import Rules
from evovlm.data.selection import Critic, critics_named, sizes
from evovlm.engine.answer_sampler import Asking
from evovlm.engine.generation import Sampling
from evovlm.engine.step_scores import reduction_of

REWARD_MODELS = ("prm", "orm")
"""The critics whose rewards a model computes."""


@dataclass(frozen=True)
class BestOfNSettings:
    """How candidates are made, judged and chosen from (spec §5.2).

    Attributes:
        sampling: How candidates are drawn; its seed also keys subsets, blind choices and intervals.
        rules: Which rule checks which dataset's answers.
        critics: Who chooses.
        style: How a question asks for a checkable answer.
        num: N, candidates to each question; of a candidate file the first so many.
        system_prompt: System turn of questions that bring none; None: the one that the model was trained with.
        reduction: How the scores of steps become a reward; None: the mean, or what a candidate file has.
        limit: Most lines of each dataset; None: all.
        start: First line of each dataset, from 0.

    Raises:
        ValueError: A setting is out of its range.
    """

    sampling: Sampling
    rules: Rules
    critics: tuple[Critic, ...] = ("majority", "random")
    style: PromptStyle = PromptStyle.DIRECT
    num: int = 32
    system_prompt: str | None = None
    reduction: str | None = None
    limit: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        sizes(self.num)  # raises where it is below 1
        critics_named(self.critics)
        if self.reduction is not None:
            reduction_of(self.reduction)
        if self.sampling.temperature == 0 and self.num > 1:
            raise ValueError(
                f"temperature = 0 gives the same candidate {self.num} times: raise it to draw different ones"
            )

    @property
    def reward_models(self) -> list[str]:
        """The reward models that the critics need."""
        needed = {critic.partition("-")[0] for critic in self.critics}
        return [name for name in REWARD_MODELS if name in needed]

    @property
    def asking(self) -> Asking:
        """What is asked, and by what answers are judged."""
        system, limit, start = self.system_prompt, self.limit, self.start
        return Asking(self.sampling, self.rules, self.style, self.num, system, limit, start)

    def identity(self, meta: Path, model: str, candidates: Path | None) -> Mapping[str, Any]:
        """Return what the candidates depend on: those that differ here cannot share a folder."""
        source: dict[str, Any] = {"meta": str(meta.absolute())}
        if candidates is not None:
            return {**source, "candidates": str(candidates.absolute())}
        source |= {"model": model, "num": self.num, "prompt": str(self.style), "system_prompt": self.system_prompt}
        return {**source, **asdict(self.sampling)}
