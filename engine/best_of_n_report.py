"""What came of Best-of-N: accuracy against n, and what every critic chose.

    OUT/samples ─┬─ each question ─► Judged ─► row ──all questions──► OUT/summary.json
    OUT/scores ──┘                        └──► choices of N ────────► OUT/selected.jsonl

Nothing here depends on the ranks: questions come in the order of the data.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evovlm.data.answers.rules import CORRECT_ABOVE, Scorer
from evovlm.data.candidates import CandidateSet
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.selection import equality, same_answers, sizes
from evovlm.data.selection_table import Judged, choose, row, table
from evovlm.engine.answer_store import AnswerStore
from evovlm.engine.best_of_n_candidates import stored
from evovlm.engine.best_of_n_settings import BestOfNSettings
from evovlm.engine.build_folder import write_json
from evovlm.engine.score_store import ScoreStore
from evovlm.engine.step_scores import reduction_of

_LISTED = 20
_MAIN = ("questions", "candidates", "unreadable", "cut_off", "fewer")


@dataclass
class Counts:
    """What came of questions and candidates.

    Attributes:
        main: Questions, candidates, unreadable ones, those cut off, and questions with fewer candidates than N.
        skipped: Questions left out, by reason.
        unscored: Candidates without a reward, by ``critic: reason``.
        listed: The first questions left out, in words.
    """

    main: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def skip(self, error: SampleError) -> None:
        """Count a question that is left out."""
        self.skipped[error.reason] += 1
        self.listed += [f"{error.name}: {error.detail}"] if len(self.listed) < _LISTED else []

    def add(self, made: CandidateSet, num: int) -> None:
        """Count a question and its candidates."""
        self.main.update(questions=1, candidates=len(made.candidates), fewer=len(made.candidates) < num)
        self.main["unreadable"] += sum(candidate.answer is None for candidate in made.candidates)
        self.main["cut_off"] += sum(not candidate.finished for candidate in made.candidates)

    def include(self, other: "Counts") -> None:
        """Add those of another dataset."""
        for name in ("main", "skipped", "unscored"):
            getattr(self, name).update(getattr(other, name))
        self.listed += other.listed[: _LISTED - len(self.listed)]

    def summary(self) -> dict[str, Any]:
        """Return them as they stand in summary.json."""
        counts: dict[str, Any] = {f"num_{name}": self.main[name] for name in _MAIN}
        return counts | {"skipped": dict(sorted(self.skipped.items())), "unscored": dict(sorted(self.unscored.items()))}


class Merger:
    """Puts verdicts and rewards of all ranks together.

    Args:
        samples: Candidates of all ranks.
        scores: Rewards of all ranks, by critic; of a critic that is not here those of the candidate file count.
        scorers: Of the rules.
        settings: Of the measurement.
    """

    def __init__(
        self,
        samples: AnswerStore,
        scores: Mapping[str, ScoreStore],
        scorers: Mapping[str, Scorer],
        settings: BestOfNSettings,
    ) -> None:
        self.samples, self.scores, self.scorers, self.settings = samples, scores, scorers, settings
        self.reduce = None if settings.reduction is None else reduction_of(settings.reduction)

    def sets(self, datasets: Sequence[DatasetMeta], critic: str | None = None) -> Iterator[CandidateSet]:
        """Read all candidates, with the rewards of a critic if one is named."""
        for dataset in datasets:
            for found in stored(dataset, self.settings.asking, self.samples):
                if not isinstance(found, SampleError):
                    yield found[1] if critic is None else self._rewarded(found[1], critic)

    def write(self, datasets: Sequence[DatasetMeta], out: Path, unusable: Sequence[SampleError]) -> dict[str, Any]:
        """Write ``summary.json`` and ``selected.jsonl``; return the summary.

        Args:
            datasets: Of the meta JSON.
            out: Folder to write.
            unusable: Lines of the candidate file that cannot be used, to be counted.

        Raises:
            ValueError: There is no candidate, or rewards are no votes.
        """
        settings, seed, total = self.settings, self.settings.sampling.seed, Counts()
        columns, by_dataset = sizes(settings.num), dict[str, Any]()
        rows: list[NDArray[np.float64]] = []
        for error in unusable:
            total.skip(error)
        (out / "summary.json").unlink(missing_ok=True)  # written last: where it stands, the rest is complete
        with (out / "selected.jsonl").open("w", encoding="utf-8") as file:
            for dataset in datasets:
                counts, begin, rule = Counts(), len(rows), settings.rules.of(dataset.name)
                same = equality(rule, self.scorers[rule])
                for found in stored(dataset, settings.asking, self.samples):
                    if isinstance(found, SampleError):
                        counts.skip(found)
                        continue
                    counts.add(found[1], settings.num)
                    judged = self._judged(found[1], same, counts)
                    rows.append(row(judged, columns, settings.critics, seed=seed))
                    file.write(json.dumps(self._line(found[1], judged), ensure_ascii=False) + "\n")
                total.include(counts)
                by_dataset[dataset.name] = counts.summary()
                if len(rows) > begin:
                    accuracy = table(np.stack(rows[begin:]), columns, settings.critics, seed=seed)
                    by_dataset[dataset.name]["n"] = accuracy
        if not rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in total.skipped.items()) or "none was read"
            first = f"; first: {total.listed[0]}" if total.listed else ""
            raise ValueError(f"no question has candidates ({reasons}{first})")
        overall = {**total.summary(), "n": table(np.stack(rows), columns, settings.critics, seed=seed)}
        summary = {"critics": list(settings.critics), "datasets": by_dataset, "overall": overall}
        summary |= {"left_out": total.listed}
        write_json(out / "summary.json", summary)
        return summary

    def _rewarded(self, made: CandidateSet, critic: str) -> CandidateSet:
        """Write a critic's rewards into a question's candidates."""
        scored = self.scores[critic].get(made) if critic in self.scores else made
        if scored is None:
            raise RuntimeError(f"question '{made.name}' has no scores of {critic}")
        if self.reduce is None:
            return scored
        rewards = [
            self.reduce([step.score for step in candidate.steps]) if candidate.steps else candidate.reward
            for candidate in scored.candidates
        ]
        pairs = zip(scored.candidates, rewards, strict=True)
        return replace(scored, candidates=tuple(replace(candidate, reward=reward) for candidate, reward in pairs))

    def _rewards(self, made: CandidateSet, critic: str, counts: Counts) -> NDArray[np.float64]:
        candidates = self._rewarded(made, critic).candidates
        for candidate in candidates:
            if candidate.reward is None:
                counts.unscored[f"{critic}: {(candidate.unscored or 'not scored').partition(':')[0]}"] += 1
            elif candidate.reward < 0 and "prm-majority" in self.settings.critics:
                raise ValueError(
                    f"question '{made.name}': a reward of {candidate.reward} is no weight of a vote: prm-majority "
                    "needs rewards of at least 0"
                )
        rewards = [np.nan if candidate.reward is None else candidate.reward for candidate in candidates]
        return np.array(rewards, np.float64)

    def _judged(self, made: CandidateSet, same: Callable[[str, str], bool], counts: Counts) -> Judged:
        correct = np.array([(candidate.score or 0.0) > CORRECT_ABOVE for candidate in made.candidates])
        answers = same_answers([candidate.answer for candidate in made.candidates], same)
        rewards = {critic: self._rewards(made, critic, counts) for critic in self.settings.reward_models}
        return Judged(made.name, correct, answers, rewards)

    def _line(self, made: CandidateSet, judged: Judged) -> dict[str, Any]:
        """Say what each critic chooses among all candidates."""
        everything = np.arange(len(made.candidates))[None]
        chosen = {}
        for critic in self.settings.critics:
            number = int(choose(critic, judged, everything, seed=self.settings.sampling.seed)[0])
            candidate = made.candidates[number]
            chosen[critic] = {"candidate": number, "text": candidate.text, "answer": candidate.answer}
            chosen[critic]["correct"] = bool(judged.correct[number])
            rewards = judged.rewards.get(critic.partition("-")[0])
            if rewards is not None and not np.isnan(rewards[number]):
                chosen[critic]["reward"] = float(rewards[number])
        line: dict[str, Any] = {"name": made.name, "image": [str(image) for image in made.images]}
        line |= {"question": made.question, "answer_gt": made.truth, "num_candidates": len(made.candidates)}
        return {**line, "num_correct": int(judged.correct.sum()), "chosen": chosen}
