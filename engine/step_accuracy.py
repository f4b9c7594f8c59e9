"""``evovlm prm evaluate``: how well a process reward model tells right steps of solutions from wrong ones.

    labelled solutions ─ same question: together ─ rank::size ─► Critic.judge ─► P("+") of each step
                                                                                   │ gathered: rank 0
    accuracy, macro-F1, … by source and overall, against the best constant ◄── labels, > threshold

Steps are judged as they stand in the file: neighbours are not joined, however many there are.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist

from evovlm.data.errors import SampleError
from evovlm.data.step_labels import LabelledSolution, read_step_labels
from evovlm.data.step_metrics import best_constant, step_quality
from evovlm.engine.step_scores import Ask, Critic
from evovlm.parallel.world import World

OFFICIAL_THRESHOLD = 0.85
"""A step is said to be right above this on VisualProcessBench (spec §5.2)."""

Report = Callable[[int, int], None]
"""Called as (questions done, questions in all), both of this rank's share."""


@dataclass
class _Tally:
    """Scores and labels of a source's steps; neutral ones, and those that are not to count, are left out."""

    scores: list[float] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    solutions: int = 0
    neutral: int = 0
    after_error: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, solution: LabelledSolution, scores: Sequence[float], until_first_error: bool) -> None:
        self.solutions += 1
        counted = len(solution.labels)
        if until_first_error and False in solution.labels:
            counted = solution.labels.index(False) + 1
        self.after_error += len(solution.labels) - counted
        for score, label in zip(scores[:counted], solution.labels[:counted], strict=True):
            if label is None:
                self.neutral += 1
            else:
                self.scores.append(score)
                self.labels.append(label)

    def extend(self, other: "_Tally") -> None:
        self.scores += other.scores
        self.labels += other.labels
        self.solutions += other.solutions
        self.neutral += other.neutral
        self.after_error += other.after_error
        self.skipped += other.skipped

    def summary(self, threshold: float) -> dict[str, Any]:
        counts = {
            "solutions": self.solutions,
            "neutral": self.neutral,
            "after_error": self.after_error,
            "skipped": dict(sorted(self.skipped.items())),
        }
        if not self.labels:
            return {**counts, "steps": 0}
        sign, constant = best_constant(self.labels)
        beaten = {"answer": sign, "accuracy": constant.accuracy, "macro_f1": constant.macro_f1}
        return {**counts, **step_quality(self.scores, self.labels, threshold).to_json(), "best_constant": beaten}


def step_accuracy(
    files: Sequence[Path],
    open_with: Callable[[], Critic],
    world: World,
    *,
    threshold: float = OFFICIAL_THRESHOLD,
    mc_threshold: float = 0.0,
    until_first_error: bool = False,
    image_root: Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Measure a critic on files of labelled solutions; every rank calls this.

    Args:
        files: Of the kinds that :func:`evovlm.data.step_labels.read_step_labels` reads.
        open_with: Opens the critic.
        world: The ranks; they need a process group.
        threshold: A step is said to be right iff its score is above this.
        mc_threshold: Steps of rollouts are right iff their share of right ones is above this.
        until_first_error: Count a solution's steps up to its first wrong one: for a critic that was trained on such,
            as a step is scored behind "+" alone, and what follows a wrong one is wrong by its history.
        image_root: Where relative image paths begin; None: each file's folder.
        report: Told how far this rank is.

    Returns:
        ``{"threshold", "mc_threshold", "until_first_error", "overall": {…}, "sources": {source: {…}},
        "skipped_lines": […]}``; the same on every rank. An inner object holds the counts ``solutions``, ``neutral``,
        ``after_error`` (steps that did not count), ``skipped`` and ``steps`` and, where there are steps, what
        :class:`evovlm.data.step_metrics.StepQuality` says and the ``best_constant`` answer.

    Raises:
        FileNotFoundError: No such file.
        ValueError: There is no step to measure; the message says what there is instead. Or the model is no critic.
    """
    solutions: list[LabelledSolution] = []
    errors: list[tuple[str, SampleError]] = []
    for file in files:
        for found in read_step_labels(file, mc_threshold=mc_threshold, image_root=image_root):
            if isinstance(found, LabelledSolution):
                solutions.append(found)
            else:
                errors.append((file.stem, found))
    if not solutions:
        shown = f": {errors[0][1]}" if errors else ""
        raise ValueError(f"{', '.join(map(str, files))}: none of {len(errors)} lines is a labelled solution{shown}")
    tallies, unjudged = _judge_share(solutions, open_with, world, until_first_error, report or (lambda *_: None))
    if world.is_main:
        for source, error in errors:
            tallies.setdefault(source, _Tally()).skipped[error.reason] += 1
        unjudged = [str(error) for _, error in errors] + unjudged
    overall, by_source, listed = _gather(tallies, unjudged, world)
    if not overall.labels:
        reasons = ", ".join(f"{count} {reason}" for reason, count in overall.skipped.items())
        shown = f"; first: {listed[0]}" if listed else ""
        raise ValueError(
            f"{', '.join(map(str, files))}: no labelled step could be judged ({overall.neutral} neutral steps; lines "
            f"skipped: {reasons or 'none'}{shown})"
        )
    return {
        "threshold": threshold,
        "mc_threshold": mc_threshold,
        "until_first_error": until_first_error,
        "overall": overall.summary(threshold),
        "sources": {source: tally.summary(threshold) for source, tally in sorted(by_source.items())},
        "skipped_lines": listed,
    }


def _judge_share(
    solutions: Sequence[LabelledSolution],
    open_with: Callable[[], Critic],
    world: World,
    until_first_error: bool,
    report: Report,
) -> tuple[dict[str, _Tally], list[str]]:
    """Judge this rank's questions; returns a tally by source, and the solutions that could not be judged."""
    groups = [list(group) for _, group in groupby(solutions, key=lambda found: (found.question, found.images))]
    mine = groups[world.rank :: world.size]
    tallies: dict[str, _Tally] = {}
    unjudged: list[str] = []
    if not mine:
        return tallies, unjudged

    def asks() -> Iterator[Ask]:
        for group in mine:
            yield Ask(group[0].name, group[0].question, group[0].images, [found.steps for found in group])

    for done, (group, judged) in enumerate(zip(mine, open_with().judge(asks()), strict=True), start=1):
        for solution, found in zip(group, judged, strict=True):
            tally = tallies.setdefault(solution.source, _Tally())
            if isinstance(found, SampleError):
                tally.skipped[found.reason] += 1
                unjudged.append(f"{solution.name}: {found.detail}")
            else:
                tally.add(solution, found.tolist(), until_first_error)
        report(done, len(mine))
    return tallies, unjudged


def _gather(
    tallies: dict[str, _Tally], unjudged: list[str], world: World
) -> tuple[_Tally, dict[str, _Tally], list[str]]:
    """Put all ranks' tallies together; every rank gets them."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, (tallies, unjudged))
    overall, by_source, listed = _Tally(), dict[str, _Tally](), list[str]()
    for theirs, lines in gathered:
        listed += lines
        for source, tally in theirs.items():
            by_source.setdefault(source, _Tally()).extend(tally)
            overall.extend(tally)
    return overall, by_source, listed
