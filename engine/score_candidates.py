"""Scores a candidate file with a critic; ranks share its questions out, and a start goes on where the last one ended.

    candidates.jsonl ─ rank::size ─► Critic ─► OUT.parts/rank-….jsonl       scores alone (see score_store)
                                                                            │ all ranks done: rank 0
    OUT: every line with steps, reward or why not ◄── reduction ────────────┘
    OUT.parts/summary.json: counts, lines that could not be used

Scores stay in OUT.parts: another reduction computes nothing anew.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evovlm.data.candidates import Candidate, CandidateSet, read_candidates, write_candidates
from evovlm.data.errors import SampleError
from evovlm.data.solution_steps import MAX_SCORED_STEPS
from evovlm.engine.answer_sampler import Report
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.build_folder import claim, write_json
from evovlm.engine.model_fingerprint import model_fingerprint
from evovlm.engine.score_store import ScoreShare, ScoreStore, score_shares
from evovlm.engine.step_scores import Critic, open_critic, reduction_of
from evovlm.parallel.world import World


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
        own = {name: value for name, value in asdict(self).items() if name != "reduction"}
        return {**own, "model": str(folder), "fingerprint": model_fingerprint(folder)}

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
        scores = ScoreStore(store, {})  # the folder's claim says which critic
        share = ScoreShare(partial(_usable, candidates, image_root), scores, world.rank, world.size)
        open_critic = open_with or partial(settings.open, world.device)
        score_shares([(share, open_critic)], report or (lambda *_: None))
        world.barrier()
        if world.is_main:
            store.refresh()
            summary = _merge(candidates, image_root, out, scores, settings)
            write_json(folder / "summary.json", summary)
    world.barrier()
    return summary


def _usable(candidates: Path, image_root: Path | None) -> Iterator[CandidateSet]:
    return (made for made in read_candidates(candidates, image_root) if isinstance(made, CandidateSet))


def _merge(
    candidates: Path, image_root: Path | None, out: Path, scores: ScoreStore, settings: ScoreSettings
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
            found = scores.get(made)
            if found is None:
                raise ValueError(f"{candidates} changed while it was scored (at '{made.name}'): start again")
            both = tuple(_rewarded(candidate, settings.reduction) for candidate in found.candidates)
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


def _rewarded(candidate: Candidate, reduction: str) -> Candidate:
    """Reduce the scores of the steps, which are the same for every reduction."""
    if candidate.steps is None:
        return candidate
    return replace(candidate, reward=reduction_of(reduction)([step.score for step in candidate.steps]))
