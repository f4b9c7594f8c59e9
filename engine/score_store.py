"""Scores of candidates by a critic, on disk; ranks share the questions out, a start goes on where the last one ended.

    questions ─► groups of 16 ─ rank::size ─► all scored already? ── no ──► critic ─► FOLDER/rank-….jsonl
                                                ▲                                       │
                                                └───────────────────────────────────────┘
A line counts only for the very candidates, and the very critic, that it was made with. A group is what may share packs,
so one rank scores it whole: scores depend neither on the number of ranks nor on where an earlier start was cut off.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from evovlm.csrc.random import key
from evovlm.data.candidates import CandidateSet, candidate_from_json, candidate_json
from evovlm.data.errors import Reason
from evovlm.engine.answer_sampler import Report
from evovlm.engine.answer_store import AnswerStore
from evovlm.engine.step_scores import GROUP


class RewardModel(Protocol):
    """Scores candidates; see ``evovlm.engine.step_scores.Critic``."""

    def score(self, sets: Iterable[CandidateSet]) -> Iterator[CandidateSet]:
        """Give each candidate steps and a reward, or the reason why it has none; sets stay in order."""
        ...


class ScoreStore:
    """What one critic made of candidates.

    Args:
        store: Its lines.
        identity: What scores depend on apart from the candidates; those of another identity do not count.
    """

    def __init__(self, store: AnswerStore, identity: Mapping[str, Any]) -> None:
        self.store, self.identity = store, dict(identity)

    def get(self, made: CandidateSet) -> CandidateSet | None:
        """Return candidates with their scores; None if this critic has not scored these very ones."""
        record = self.store.get(made.name)
        if record is None or record["critic"] != self.identity or record["of"] != _fingerprint(made):
            return None
        scored = []
        for candidate, content in zip(made.candidates, record["scores"], strict=True):
            read = candidate_from_json({"text": candidate.text, **content}, made.name)
            scored.append(replace(candidate, steps=read.steps, reward=read.reward, unscored=read.unscored))
        return replace(made, candidates=tuple(scored))

    def put(self, scored: CandidateSet) -> None:
        """Keep a question's scores."""
        names = ("steps", "reward", "unscored")
        contents = [candidate_json(candidate) for candidate in scored.candidates]
        scores = [{name: content[name] for name in names if name in content} for content in contents]
        self.store.append(scored.name, {"critic": self.identity, "of": _fingerprint(scored), "scores": scores})


class ScoreShare:
    """A rank's share of questions, some of which have been scored.

    Args:
        sets: Reads all questions, the same each time.
        scores: Where their scores are.
        rank: Which share.
        size: Of how many.
    """

    def __init__(self, sets: Callable[[], Iterable[CandidateSet]], scores: ScoreStore, rank: int, size: int) -> None:
        self.sets, self.scores, self.rank, self.size = sets, scores, rank, size

    def groups(self) -> Iterator[list[CandidateSet]]:
        """Yield its groups of consecutive questions."""
        found = iter(self.sets())
        for number, group in enumerate(iter(lambda: list(islice(found, GROUP)), [])):
            if number % self.size == self.rank:
                yield group

    def waiting(self) -> Iterator[CandidateSet]:
        """Yield the questions of groups that are not scored whole, without scores of others."""
        for group in self.groups():
            if not all(map(self._is_settled, group)):
                yield from map(_bare, group)

    def _is_settled(self, made: CandidateSet) -> bool:
        """Whether there are scores, or reasons that another start would find again; images may have come back."""
        found = self.scores.get(made)
        if found is None:
            return False
        reasons = [candidate.unscored or "" for candidate in found.candidates]
        return not any(reason.startswith((Reason.MISSING_IMAGE, Reason.BAD_IMAGE)) for reason in reasons)


def score_shares(shares: Sequence[tuple[ScoreShare, Callable[[], RewardModel]]], report: Report) -> None:
    """Score what is not scored yet, one share after the other.

    Args:
        shares: Each with what opens its critic, which is done only if something waits for it.
        report: Told at the beginning and after each question.
    """
    total = sum(len(group) for share, _ in shares for group in share.groups())
    done = total - sum(1 for share, _ in shares for _ in share.waiting())
    report(done, total)
    for share, open_critic in shares:
        if next(share.waiting(), None) is None:
            continue
        for scored in open_critic().score(share.waiting()):
            share.scores.put(scored)
            done += 1
            report(done, total)


def _bare(made: CandidateSet) -> CandidateSet:
    candidates = (replace(candidate, steps=None, reward=None, unscored=None) for candidate in made.candidates)
    return replace(made, candidates=tuple(candidates))


def _fingerprint(made: CandidateSet) -> int:
    texts = [candidate.text for candidate in made.candidates]
    return key("scored", json.dumps([made.question, made.system, [str(image) for image in made.images], texts]))
