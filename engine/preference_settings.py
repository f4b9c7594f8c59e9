"""How preference data are built from a model's answers: every choice in one frozen object."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import Rules
from evovlm.data.preference_pairs import keep_beginning
from evovlm.engine.answer_sampler import Asking
from evovlm.engine.generation import Sampling

Method = Literal["correctness", "dropout-ntp"]


@dataclass(frozen=True)
class BuildSettings:
    """How preference data are built (spec §4.4).

    Attributes:
        method: Pairs of correct and wrong answers, or chosen answers continued without the image.
        sampling: How answers are drawn; its seed also keys the choice of pairs.
        rules: Which rule checks which dataset's answers.
        style: How a question asks for a checkable answer.
        num_samples: Answers to each question (correctness).
        max_pairs: Most pairs of a question.
        max_pairs_of_many: The same where a dataset has more than ``many_replies``.
        many_replies: See there.
        max_lines: Most pairs in all; more are thinned out at random.
        start_ratio: Share of the chosen answer's words that is kept (DropoutNTP).
        chosen_from: Folder of an earlier build whose correct answers are continued (DropoutNTP); None: the data's own.
        system_prompt: System turn of questions that bring none; None: the one that the model was trained with.
        limit: Most lines of each dataset; None: all.
        start: First line of each dataset, from 0.

    Raises:
        ValueError: A setting is out of its range.
        FileNotFoundError: ``chosen_from`` holds no samples.
    """

    method: Method
    sampling: Sampling
    rules: Rules
    style: PromptStyle = PromptStyle.DIRECT
    num_samples: int = 32
    max_pairs: int = 15
    max_pairs_of_many: int = 3
    many_replies: int = 500_000
    max_lines: int = 1_200_000
    start_ratio: float = 0.5
    chosen_from: Path | None = None
    system_prompt: str | None = None
    limit: int | None = 7000
    start: int = 0

    def __post_init__(self) -> None:
        keep_beginning("", self.start_ratio)  # raises for a ratio out of range
        for name in ("num_samples", "max_pairs", "max_pairs_of_many", "max_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1")
        if self.method == "correctness" and self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature = 0 gives the same answer {self.num_samples} times: raise it to draw different ones"
            )
        if self.method == "correctness" and self.chosen_from is not None:
            raise ValueError("chosen_from is for the method dropout-ntp; correctness samples its own answers")
        if self.chosen_from is not None and not (self.chosen_from / "samples").is_dir():
            raise FileNotFoundError(f"{self.chosen_from} is not the folder of a build: it has no samples/")

    @property
    def asking(self) -> Asking:
        """What questions are asked, and how."""
        return Asking(
            self.sampling, self.rules, self.style, self.num_samples, self.system_prompt, self.limit, self.start
        )

    def identity(self, meta: Path, model: str) -> dict[str, Any]:
        """Return what the samples depend on: builds that differ here cannot share a folder."""
        own: dict[str, Any] = {"num_samples": self.num_samples, "prompt": str(self.style)}
        if self.method == "dropout-ntp":
            chosen_from = None if self.chosen_from is None else str(self.chosen_from.absolute())
            own = {"prompt": str(self.style), "start_ratio": self.start_ratio, "chosen_from": chosen_from}
        common = {"method": self.method, "meta": str(meta.absolute()), "model": model}
        return {**common, "system_prompt": self.system_prompt, **own, **asdict(self.sampling)}
