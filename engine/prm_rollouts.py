"""Continues solutions from the end of each step, and counts which answers come out; ranks share the questions out.

    OUT/samples ─► solutions ─► prefixes that lack rollouts ─► one Job a question ─► Generator ─► OUT/rollouts
                      ▲              (a solution's follow one another: they share prefill and KV)     │
                      └──────────── with early stop: again, for the next step of each ◄───────────────┘

A line of OUT/rollouts: {"solutions": which they are, "rule", "rollouts": [{"solution": 0, "steps": 1, "answers":
[["12", 10, 1.0], …] (text, how often, score), "unreadable": 2, "cut_off": 1}, …]}. Texts are not kept: 16 continuations
of every step are many times the data that come of them, and other rules need the answers alone.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from evovlm.csrc.random import key
from evovlm.data.answers.prompts import extract, true_answer
from evovlm.data.answers.rules import CORRECT_ABOVE, Scorer
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.questions import Question
from evovlm.data.step_rollouts import Solution, Tally, lacking, read_solution, whole_solution
from evovlm.engine.answer_jobs import Job, answer_jobs
from evovlm.engine.answer_sampler import OpenGenerator, Report
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.generation import Completion, Request
from evovlm.engine.prm_settings import PrmSettings

_WAVE = 64
"""Questions whose solutions go step by step together (early stop); what comes out does not depend on it."""


def solutions_of(samples: Record, settings: PrmSettings) -> list[Solution | None]:
    """Read a question's solutions from its line of samples; None where there is no whole step."""
    found = []
    for answer in samples["answers"]:
        text, finished, correct = answer["text"], answer["finished"], answer["score"] > CORRECT_ABOVE
        if settings.outcome:
            found.append(whole_solution(text, correct=correct))
        else:
            found.append(read_solution(text, finished=finished, correct=correct, max_steps=settings.max_steps))
    return found


def tallies_of(rollouts: Record | None, solutions: list[Solution | None]) -> dict[str, Tally]:
    """Count a question's rollouts by their prefix; none if they were never made, or refused."""
    tallies = {}
    for entry in (rollouts or {}).get("rollouts", ()):
        solution = solutions[entry["solution"]]
        assert solution is not None
        right = sum(count for _, count, score in entry["answers"] if score > CORRECT_ABOVE)
        total = sum(count for _, count, _ in entry["answers"]) + entry["unreadable"] + entry["cut_off"]
        tallies[solution.prefix(entry["steps"])] = Tally(right, total)
    return tallies


@dataclass
class _Question:
    """A question whose solutions are rolled out."""

    question: Question
    images: tuple[Path, ...]
    text: str
    solutions: list[Solution | None]
    record: Record

    def lacking(self, settings: PrmSettings) -> list[tuple[int, int]]:
        tallies = tallies_of(self.record, self.solutions)
        return lacking(self.solutions, tallies, early_stop=settings.early_stop)

    def prefix(self, number: int, num_steps: int) -> str:
        solution = self.solutions[number]
        assert solution is not None
        return solution.prefix(num_steps)


class RolloutSampler:
    """Rolls out the solutions of a rank's questions.

    Args:
        settings: Of the build.
        samples: The solutions, judged.
        store: Where rollouts are kept.
        scorers: Of the rules.
        open_generator: What answers; None: what is there is judged again, nothing is rolled out.
        report: Told after each question.
        share: Questions of this rank in all datasets.
    """

    def __init__(
        self,
        settings: PrmSettings,
        samples: AnswerStore,
        store: AnswerStore,
        scorers: Mapping[str, Scorer],
        open_generator: OpenGenerator | None,
        report: Report,
        share: int,
    ) -> None:
        self.settings, self.samples, self.store, self.scorers = settings, samples, store, scorers
        self.open_generator, self.report, self.share = open_generator, report, share
        self.done = 0

    def roll_out(self, dataset: DatasetMeta, rank: int, size: int) -> None:
        """Roll out what a dataset's solutions lack; judge the other rollouts again where the rule is another.

        Raises:
            ValueError: The store's rollouts are of other solutions.
            GenerationError: The model or server cannot answer.
        """
        questions = self._questions(dataset, rank, size)
        if not self.settings.early_stop:
            for _ in self._next(questions, dataset):
                pass
            return
        while wave := list(islice(questions, _WAVE)):
            while wave:
                wave = list(self._next(wave, dataset))

    def _next(self, questions: Iterable[_Question], dataset: DatasetMeta) -> Iterator[_Question]:
        """Make the rollouts that questions lack by now; yields those that then lack more."""
        open_generator = self.open_generator
        if open_generator is None:
            for _ in questions:
                self._count()
            return
        jobs = self._jobs(questions)
        for asked, said in answer_jobs(lambda: open_generator(dataset.max_tiles), jobs, self.settings.sampling):
            if isinstance(said, SampleError):
                self.store.append(asked.question.name, {"skipped": said.reason, "detail": said.detail})
                self._count()
                continue
            made = [
                self._entry(asked, number, num_steps, completions)
                for (number, num_steps), completions in zip(asked.lacking(self.settings), said, strict=True)
            ]
            asked.record = self._judged({**asked.record, "rollouts": asked.record["rollouts"] + made}, asked.question)
            self.store.append(asked.question.name, asked.record)
            if asked.lacking(self.settings):
                yield asked
            else:
                self._count()

    def _jobs(self, questions: Iterable[_Question]) -> Iterator[Job[_Question]]:
        for asked in questions:
            wanted = asked.lacking(self.settings)
            if not wanted:
                self._count()
                continue
            turns, num = asked.question.turns(asked.text, self.settings.system_prompt), self.settings.num_rollouts
            requests = (
                Request(
                    f"{asked.question.name}#{number}.{steps}", turns, asked.images, asked.prefix(number, steps), num
                )
                for number, steps in wanted
            )
            yield Job(asked, tuple(requests))

    def _questions(self, dataset: DatasetMeta, rank: int, size: int) -> Iterator[_Question]:
        """Yield the questions that have solutions, with the rollouts that there are."""
        for question in self.settings.asking.questions(dataset, rank, size):
            samples = None if isinstance(question, SampleError) else self.samples.get(question.name)
            if isinstance(question, SampleError) or samples is None or "skipped" in samples:
                self._count()  # counted by its reason when all are merged
                continue
            fingerprint = _fingerprint(samples)
            record = self.store.get(question.name)
            if record is None or "skipped" in record:
                record = {"solutions": fingerprint, "rule": "", "rollouts": []}
            if record["solutions"] != fingerprint:
                raise ValueError(
                    f"question '{question.name}': the rollouts are of other solutions than the samples now hold: "
                    "use a new folder"
                )
            judged = self._judged(record, question)
            if judged != record and record["rollouts"]:
                self.store.append(question.name, judged)
            images = tuple(dataset.root / image for image in question.images)
            yield _Question(question, images, samples["question"], solutions_of(samples, self.settings), judged)

    def _entry(self, asked: _Question, number: int, num_steps: int, said: list[Completion]) -> dict[str, Any]:
        """Count what rollouts of one prefix answered; they are judged by ``_judged``."""
        prefix, style = asked.prefix(number, num_steps), self.settings.style
        found = [extract(prefix + rollout.text, style) for rollout in said if rollout.finished]
        counts = Counter(answer for answer in found if answer is not None)
        return {
            "solution": number,
            "steps": num_steps,
            "answers": [[answer, count, None] for answer, count in sorted(counts.items())],
            "unreadable": found.count(None),
            "cut_off": len(said) - len(found),
        }

    def _judged(self, record: Record, question: Question) -> Record:
        """Write the verdict on each answer into a record; those that the same rule has given stay."""
        rule, truths = self.settings.rules.of(question.dataset), [true_answer(question.truth)]
        scores: dict[str, float | None] = {
            answer: score if rule == record["rule"] else None
            for entry in record["rollouts"]
            for answer, _, score in entry["answers"]
        }
        for answer, score in scores.items():
            scores[answer] = self.scorers[rule](answer, truths) if score is None else score
        rollouts = [
            {**entry, "answers": [[answer, count, scores[answer]] for answer, count, _ in entry["answers"]]}
            for entry in record["rollouts"]
        ]
        return {**record, "rule": rule, "rollouts": rollouts}

    def _count(self) -> None:
        self.done += 1
        self.report(self.done, self.share)


def _fingerprint(samples: Record) -> int:
    """Say in a number which solutions a line of samples holds."""
    return key(json.dumps([[answer["text"], answer["finished"]] for answer in samples["answers"]]))
