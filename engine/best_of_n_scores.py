"""Scores of Best-of-N's candidates by a reward model; ranks share the questions out, and a store keeps the scores.

OUT/samples ─► groups of 16 questions ─► all scored already? ── no ──► Critic ─► OUT/scores/prm/rank-….jsonl
               rank::size                  ▲                                       │
                                           └───────────────────────────────────────┘
A line counts only for the very candidates, and the very model, that it was made with. A group is what may share packs,
so one rank scores it whole: scores depend neither on the number of ranks nor on where an earlier start was cut off.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Protocol

from evovlm.csrc.random import key
from evovlm.data.candidates import CandidateSet, candidate_from_json, candidate_json
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.engine.answer_sampler import Asking, Report
from evovlm.engine.answer_store import AnswerStore
from evovlm.engine.best_of_n_candidates import bare, stored
from evovlm.engine.step_scores import GROUP


class RewardModel(Protocol):
    """Scores candidates; see ``evovlm.engine.step_scores.Critic``."""

    def score(self, sets: Iterable[CandidateSet]) -> Iterator[CandidateSet]:
        """Give each candidate steps and a reward, or the reason why it has none; sets stay in order."""
        ...


OpenCritic = Callable[[str, int | None], RewardModel]
"""Called as (``prm`` or ``orm``, a dataset's tile cap) when there is something to score for it."""


class ScoreStore:
    """What one reward model made of candidates.

    Args:
        name: ``prm`` or ``orm``.
        store: Its lines.
        identity: What scores depend on apart from the candidates; those of another identity do not count.
    """

    def __init__(self, name: str, store: AnswerStore, identity: Mapping[str, Any]) -> None:
        self.name, self.store, self.identity = name, store, dict(identity)

    def get(self, made: CandidateSet) -> CandidateSet | None:
        """Return candidates with their scores; None if this model has not scored these very ones."""
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

    def score(
        self,
        datasets: Sequence[DatasetMeta],
        asking: Asking,
        samples: AnswerStore,
        open_critic: OpenCritic,
        report: Report,
        rank: int,
        size: int,
    ) -> None:
        """Score a rank's share of what has candidates, and is not scored yet.

        Args:
            datasets: Their questions are shared out.
            asking: How they are asked.
            samples: The candidates of all ranks.
            open_critic: Opens the model.
            report: Told after each question.
            rank: Which share.
            size: Of how many.
        """

        def groups(dataset: DatasetMeta) -> Iterator[list[CandidateSet]]:
            found = (one[1] for one in stored(dataset, asking, samples) if not isinstance(one, SampleError))
            for number, group in enumerate(iter(lambda: list(islice(found, GROUP)), [])):
                if number % size == rank:
                    yield group

        def waiting(dataset: DatasetMeta) -> Iterator[CandidateSet]:
            for group in groups(dataset):
                if any(self.get(made) is None for made in group):
                    yield from map(bare, group)

        share = sum(len(group) for dataset in datasets for group in groups(dataset))
        done = share - sum(1 for dataset in datasets for _ in waiting(dataset))
        report(done, share)
        # One tile cap after the other: each may need a critic of its own.
        for dataset in sorted(datasets, key=lambda dataset: dataset.max_tiles or 0):
            sets = waiting(dataset)
            first = next(sets, None)
            if first is None:
                continue
            for scored in open_critic(self.name, dataset.max_tiles).score(chain([first], sets)):
                self.put(scored)
                done += 1
                report(done, share)


def _fingerprint(made: CandidateSet) -> int:
    texts = [candidate.text for candidate in made.candidates]
    return key("scored", json.dumps([made.question, made.system, [str(image) for image in made.images], texts]))
