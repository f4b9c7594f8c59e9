"""Scores a candidate file with a critic; ranks share its questions out, and a start goes on where the last one ended.

    candidates.jsonl ─ groups of 16 questions ─ rank::size ─► Critic ─► OUT.parts/rank-….jsonl   scores alone
                                                                            │ all ranks done: rank 0
    OUT: every line with steps, reward or why not ◄── reduction ────────────┘
    OUT.parts/summary.json: counts, lines that could not be used

A group is what may share packs, so it is scored whole by one rank: scores depend neither on the number of ranks nor
on where an earlier start was cut off. Scores stay in OUT.parts: another reduction computes nothing anew.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from evovlm.data.candidates import Candidate, CandidateSet, StepScore, read_candidates, write_candidates
from evovlm.data.errors import SampleError
from evovlm.data.solution_steps import MAX_SCORED_STEPS
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.build_folder import claim, model_stamps, write_json
from evovlm.engine.open_model import is_run
from evovlm.engine.runs import newest_checkpoint
from evovlm.engine.step_scores import GROUP, Critic, open_critic, reduction_of, split_solution
from evovlm.parallel.world import World

Report = Callable[[int, int], None]
"""Called as (questions done, questions in all), both of this rank's share."""


@dataclass(frozen=True)
class ScoreSettings:
    """What scores depend on.

    Attributes:
        model: Run or directory of the critic.
        reduction: From the scores of the steps to one.
        system_prompt: See :func:`evovlm.engine.step_scores.open_critic`.
        max_steps: Most steps of a candidate.
        outcome: Judge whole solutions.
        max_tiles: Most tiles of a question's images; None: the model's own.

    Raises:
        ValueError: No such reduction, or ``max_steps`` is below 1.
    """

    model: str
    reduction: str = "mean"
    system_prompt: str | None = None
    max_steps: int = MAX_SCORED_STEPS
    outcome: bool = False
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        reduction_of(self.reduction)
        if self.max_steps < 1:
            raise ValueError(f"max_steps = {self.max_steps} is below 1")

    def identity(self) -> Record:
        """Return what the scores of a folder must have in common."""
        folder = Path(self.model).absolute()
        checkpoint = newest_checkpoint(folder).name if is_run(folder) else model_stamps(folder)
        own = {name: value for name, value in asdict(self).items() if name != "reduction"}
        return {**own, "model": str(folder), "checkpoint": checkpoint}

    def open(self, device: torch.device) -> Critic:
        """Open the critic; see :func:`evovlm.engine.step_scores.open_critic` for the errors."""
        return open_critic(
            self.model,
            device,
            system_prompt=self.system_prompt,
            max_steps=self.max_steps,
            max_tiles=self.max_tiles,
            outcome=self.outcome,
        )


def score_candidates(
    candidates: Path,
    out: Path,
    settings: ScoreSettings,
    world: World,
    *,
    image_root: Path | None = None,
    report: Report | None = None,
    open_with: Callable[[], Critic] | None = None,
) -> dict[str, Any]:
    """Score a candidate file; every rank calls this.

    Args:
        candidates: The file; see :mod:`evovlm.data.candidates`.
        out: File to write. Beside it, ``OUT.parts`` keeps the scores.
        settings: What to do.
        world: The ranks; they need a process group.
        image_root: Where relative image paths begin; None: the candidate file's folder.
        report: Told how far this rank is.
        open_with: Opens the critic, once, if there is anything to score; None: as the settings say.

    Returns:
        The summary, which is also written to ``OUT.parts/summary.json``; empty on ranks other than 0.

    Raises:
        FileNotFoundError: No such file, run or directory.
        FileExistsError: ``OUT.parts`` holds something else.
        ValueError: ``out`` is the candidate file, ``OUT.parts`` holds scores of another critic, no line can be used,
            or the model is no critic.
    """
    if out.absolute() == candidates.absolute():
        raise ValueError(f"--out {out} is the candidate file itself: write the scores to another")
    folder = out.with_name(f"{out.name}.parts")
    if world.is_main:
        claim(folder, settings.identity(), kind="scores")
    world.barrier()
    summary: dict[str, Any] = {}
    with AnswerStore(folder, world.rank) as store:
        world.barrier()  # a rank cuts a torn line off its file: not while others read it
        share = _Share(candidates, image_root, world, store, report or (lambda *_: None))
        if next(share.wanted(), None) is not None:
            critic = open_with() if open_with else settings.open(world.device)
            for made in critic.score(share.wanted()):
                share.keep(made)
        world.barrier()
        if world.is_main:
            store.refresh()
            summary = _merge(candidates, image_root, out, store, settings)
            write_json(folder / "summary.json", summary)
    world.barrier()
    return summary


class _Share:
    """A rank's questions: which of them must be scored, and where their scores go."""

    def __init__(
        self, candidates: Path, image_root: Path | None, world: World, store: AnswerStore, report: Report
    ) -> None:
        self.candidates, self.image_root, self.world = candidates, image_root, world
        self.store, self.report = store, report
        self.total = sum(len(group) for group in self.groups())
        self.done = sum(len(group) for group in self.groups() if self._is_scored(group))

    def groups(self) -> Iterator[list[CandidateSet]]:
        """Yield this rank's groups of consecutive questions."""
        usable = _usable(self.candidates, self.image_root)
        number = 0
        while group := list(islice(usable, GROUP)):
            if number % self.world.size == self.world.rank:
                yield group
            number += 1

    def wanted(self) -> Iterator[CandidateSet]:
        """Yield the questions of groups that are not scored whole."""
        for group in self.groups():
            if not self._is_scored(group):
                yield from group

    def keep(self, made: CandidateSet) -> None:
        """Store a question's scores."""
        self.store.append(made.name, {"of": _digest(made), "candidates": [_scores(one) for one in made.candidates]})
        self.done += 1
        self.report(self.done, self.total)

    def _is_scored(self, group: Sequence[CandidateSet]) -> bool:
        return all(_stored(self.store, made) is not None for made in group)


def _usable(candidates: Path, image_root: Path | None) -> Iterator[CandidateSet]:
    return (made for made in read_candidates(candidates, image_root) if isinstance(made, CandidateSet))


def _digest(made: CandidateSet) -> str:
    """Name what scores are of, so that a file that was changed is scored again where it was."""
    content = [made.question, [str(image) for image in made.images], [one.text for one in made.candidates]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _scores(candidate: Candidate) -> Record:
    if candidate.steps is None:
        return {"unscored": candidate.unscored}
    return {"steps": [step.score for step in candidate.steps]}


def _stored(store: AnswerStore, made: CandidateSet) -> Record | None:
    record = store.get(made.name)
    return record if record is not None and record["of"] == _digest(made) else None


def _merge(
    candidates: Path, image_root: Path | None, out: Path, store: AnswerStore, settings: ScoreSettings
) -> dict[str, Any]:
    """Write the scored file in the order of the candidates, and count."""
    counts: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    refused: list[SampleError] = []
    rewards: list[float] = []

    def scored() -> Iterator[CandidateSet]:
        for made in read_candidates(candidates, image_root):
            if isinstance(made, SampleError):
                refused.append(made)
                continue
            record = _stored(store, made)
            if record is None:
                raise ValueError(f"{candidates} changed while it was scored (at '{made.name}'): start again")
            pairs = zip(made.candidates, record["candidates"], strict=True)
            both = tuple(_with_scores(candidate, scores, settings) for candidate, scores in pairs)
            counts.update(questions=1, candidates=len(both))
            unscored.update(one.unscored.partition(":")[0] for one in both if one.unscored is not None)
            rewards.extend(one.reward for one in both if one.reward is not None)
            yield replace(made, candidates=both)

    if next(_usable(candidates, image_root), None) is None:
        first = next((str(error) for error in read_candidates(candidates, image_root)), "the file is empty")
        raise ValueError(f"{candidates} has no line that can be scored: {first}")
    write_candidates(out, scored())
    return {
        "questions": counts["questions"],
        "candidates": counts["candidates"],
        "scored": len(rewards),
        "mean_reward": math.fsum(rewards) / len(rewards) if rewards else None,
        "reduction": settings.reduction,
        "unscored": dict(sorted(unscored.items())),
        "skipped": dict(sorted(Counter(error.reason for error in refused).items())),
        "skipped_lines": [str(error) for error in refused],
    }


def _with_scores(candidate: Candidate, scores: Record, settings: ScoreSettings) -> Candidate:
    if "unscored" in scores:
        return replace(candidate, steps=None, reward=None, unscored=scores["unscored"])
    steps = split_solution(candidate.text, settings.max_steps, outcome=settings.outcome)
    made = tuple(StepScore(step, score) for step, score in zip(steps, scores["steps"], strict=True))
    return replace(candidate, steps=made, reward=reduction_of(settings.reduction)(scores["steps"]), unscored=None)
