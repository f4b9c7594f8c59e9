"""A process reward model as a critic: P("+") of every step of every candidate, and a reward of each candidate.

    CandidateSet ─ split ─► steps of each candidate ─► StepJudge (packs, one prefix and one encoding a question)
    Candidate(steps=(step, P("+")), …), reward = mean ◄────────┘

Source: spec §5.2.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evovlm.data.batch import V2PESettings
from evovlm.data.candidates import Candidate, CandidateSet, StepScore
from evovlm.data.errors import SampleError
from evovlm.data.solution_steps import MAX_SCORED_STEPS, PRM_SYSTEM_PROMPT, split_steps
from evovlm.engine.open_model import OpenModel, is_run, open_dir, open_run
from evovlm.engine.score_judge import GROUP, Ask, StepJudge
from evovlm.engine.score_packs import PackLimits
from evovlm.models.hf.load import system_message

__all__ = ["GROUP", "REDUCTIONS", "Ask", "Critic", "open_critic", "reduction_of", "split_solution"]

REDUCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}
"""How the scores of a solution's steps become its reward; ``mean`` is what VisualPRM does."""


class Critic(StepJudge):
    """Scores candidates step by step.

    Args:
        opened: A process reward model.
        system_prompt: System turn of the conversations in which it judges; None: the chat template's own.
        max_steps: Most steps of a candidate; neighbours of more are joined.
        outcome: Judge whole solutions, in one turn each.
        limits: How much is computed at a time.

    Raises:
        ValueError: Its vocabulary has no "+" or "-", or ``max_steps`` is below 1.
    """

    def __init__(
        self,
        opened: OpenModel,
        *,
        system_prompt: str | None = PRM_SYSTEM_PROMPT,
        max_steps: int = MAX_SCORED_STEPS,
        outcome: bool = False,
        limits: PackLimits | None = None,
    ) -> None:
        super().__init__(opened, system_prompt, limits or PackLimits())
        if max_steps < 1:
            raise ValueError(f"max_steps = {max_steps} is below 1")
        self.max_steps, self.outcome = max_steps, outcome

    def split(self, text: str) -> list[str]:
        """Split a candidate as it is judged; see :func:`split_solution`."""
        return split_solution(text, self.max_steps, outcome=self.outcome)

    def score(self, sets: Iterable[CandidateSet], *, reduction: str = "mean") -> Iterator[CandidateSet]:
        """Score candidates.

        Args:
            sets: Questions with candidates; few are read ahead.
            reduction: One of ``REDUCTIONS``.

        Yields:
            The same sets, in order. Every candidate has ``steps`` and ``reward``, or else ``unscored``: why it could
            not be judged (blank, beyond the model's positions, images that are missing or do not match).

        Raises:
            ValueError: No such reduction.
        """
        reduce = reduction_of(reduction)
        waiting: deque[tuple[CandidateSet, Sequence[Sequence[str]]]] = deque()

        def asks() -> Iterator[Ask]:
            for made in sets:
                solutions = [self.split(candidate.text) for candidate in made.candidates]
                waiting.append((made, solutions))
                yield Ask(made.name, made.question, made.images, solutions)

        for judged in self.judge(asks()):
            made, solutions = waiting.popleft()
            scored = map(_scored, made.candidates, solutions, judged)
            yield replace(made, candidates=tuple(_rewarded(candidate, reduce) for candidate in scored))

    def step_scores(
        self, question: str, images: Sequence[str | Path], solutions: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Score solutions of one question that are split already; ``judge`` takes many questions.

        Args:
            question: Its text, with an ``<image>`` for each image (a single one may be left out).
            images: Files of its images.
            solutions: Steps of each solution, at least one.

        Returns:
            P("+") of each solution's steps, ``[steps]``, float32 (float64 if the model is) on the CPU.

        Raises:
            SampleError: A solution has no steps or is too long, or the images are missing or do not match.
        """
        (judged,) = self.judge([Ask("question", question, tuple(map(Path, images)), solutions)])
        scores = []
        for found in judged:
            if isinstance(found, SampleError):
                raise found
            scores.append(found)
        return scores


def open_critic(
    model: str | Path,
    device: torch.device | None = None,
    *,
    dtype: torch.dtype | None = None,
    system_prompt: str | None = None,
    max_steps: int = MAX_SCORED_STEPS,
    max_tiles: int | None = None,
    outcome: bool = False,
    pack_tokens: int = PackLimits.tokens,
    pack_tiles: int = PackLimits.tiles,
    v2pe: V2PESettings | None = None,
) -> Critic:
    """Open a process reward model.

    Args:
        model: A run, or a directory of either published format.
        device: The CPU by default.
        dtype: By default float32 on a CPU, elsewhere what the run computed in, or as the weights are stored.
        system_prompt: System turn of the conversations in which it judges; "": the chat template's own; None: that of
            the project's training data (``PRM_SYSTEM_PROMPT``), of a published reward model its ``system_message``,
            or else the chat template's own.
        max_steps: Most steps of a candidate; neighbours of more are joined.
        max_tiles: Most tiles of a question's images; None: as the model's configuration says.
        outcome: Judge whole solutions, in one turn each.
        pack_tokens: Most tokens that are computed at a time.
        pack_tiles: Most tiles that are encoded at a time.
        v2pe: Visual stride; None: that of the run, and of a directory ordinary positions.

    Raises:
        FileNotFoundError: No such run or directory.
        CheckpointError: The directory is not a whole checkpoint.
        ConfigError: A setting that evovlm's model cannot honour.
        TokenizerError: The tokenizer cannot be used.
        ValueError: The model is no critic: its vocabulary lacks "+" or "-", or is not the tokenizer's.
    """
    if not Path(model).is_dir():
        raise FileNotFoundError(f"there is no folder {model}: name a run or an exported process reward model")
    run = is_run(model)
    if system_prompt is None:
        published, message = (False, None) if run else system_message(model)
        system_prompt = message if published else PRM_SYSTEM_PROMPT
    opener = open_run if run else open_dir
    opened = opener(model, device=device, dtype=dtype, v2pe=v2pe, max_tiles=max_tiles)
    return Critic(
        opened,
        system_prompt=system_prompt or None,
        max_steps=max_steps,
        outcome=outcome,
        limits=PackLimits(pack_tokens, pack_tiles),
    )


def split_solution(text: str, max_steps: int, *, outcome: bool) -> list[str]:
    """Split a solution into what is judged: its steps or, for an outcome reward model, all of it; none if it is blank.

    Raises:
        ValueError: ``max_steps`` is below 1.
    """
    if outcome:
        return [text] if text.strip() else []
    return split_steps(text, max_steps)


def reduction_of(name: str) -> Callable[[Sequence[float]], float]:
    """Look a reduction up.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"reduction {name!r} is not one of {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


def _scored(candidate: Candidate, steps: Sequence[str], found: Tensor | SampleError) -> Candidate:
    if isinstance(found, SampleError):
        return replace(candidate, steps=None, unscored=f"{found.reason}: {found.detail}")
    made = tuple(StepScore(step, score) for step, score in zip(steps, found.tolist(), strict=True))
    return replace(candidate, steps=made, unscored=None)


def _rewarded(candidate: Candidate, reduce: Callable[[Sequence[float]], float]) -> Candidate:
    steps = candidate.steps
    return replace(candidate, reward=None if steps is None else reduce([step.score for step in steps]))
