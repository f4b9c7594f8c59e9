"""Candidates of Best-of-N on disk: taken over from a file, and given to critics.

candidate file ──names, texts, answers as in the data?──► OUT/samples ──► CandidateSet ─► critics, candidates.jsonl
AnswerSampler ──────────────────────────────────────────────▲
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from evovlm.data.answers.prompts import ask, true_answer
from evovlm.data.answers.text import normalize
from evovlm.data.candidates import (
    CandidateSet,
    candidate_from_json,
    candidate_json,
    check_same_questions,
    read_candidates,
)
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.questions import Question, read_questions
from evovlm.engine.answer_sampler import Asking, question_record
from evovlm.engine.answer_store import AnswerStore, Record


class CandidateFile:
    """A candidate file that has been checked against the questions that it is used for.

    Args:
        path: The file; images are those of the questions.
        datasets: The questions' data sets; all their lines are compared, whichever are used.
        asking: How the questions are asked.

    Attributes:
        sets: Its lines, by the question's name.
        errors: Those that cannot be used.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is of other questions, or holds no candidates.
    """

    def __init__(self, path: Path, datasets: Iterable[DatasetMeta], asking: Asking) -> None:
        lines = list(read_candidates(path))
        self.path = path
        self.sets = {line.name: line for line in lines if isinstance(line, CandidateSet)}
        self.errors = [line for line in lines if isinstance(line, SampleError)]
        if not self.sets:
            first = f", the first because of {self.errors[0].reason}: {self.errors[0]}" if self.errors else ""
            raise ValueError(f"{path} holds no candidates ({len(self.errors)} lines cannot be used{first})")
        lines_of = (read_questions(dataset) for dataset in datasets)
        questions = {line.name: line for lines in lines_of for line in lines if isinstance(line, Question)}
        self._check(questions, asking)

    def has_rewards(self) -> bool:
        """Whether any candidate has been scored by a critic."""
        return any(candidate.reward is not None for made in self.sets.values() for candidate in made.candidates)

    @property
    def most(self) -> int:
        """Most candidates of a question."""
        return max(len(made.candidates) for made in self.sets.values())

    def copy(self, dataset: DatasetMeta, asking: Asking, store: AnswerStore, rank: int, size: int) -> None:
        """Put the candidates of a rank's questions into a store, unless the same are there."""
        for question in asking.questions(dataset, rank, size):
            if isinstance(question, SampleError):
                continue
            record: Record = {"skipped": "no candidates", "detail": f"{self.path.name} has no line for it"}
            if question.name in self.sets:
                answers = [candidate_json(candidate) for candidate in self.sets[question.name].candidates[: asking.num]]
                record = {**question_record(question, ask(question.text, asking.style)), "answers": answers}
            there = store.get(question.name)
            if there is None or _unjudged(there) != _unjudged(record):
                store.append(question.name, record)

    def _check(self, questions: dict[str, Question], asking: Asking) -> None:
        known = [name for name in self.sets if name in questions] or list(questions)
        try:
            check_same_questions(self.sets.values(), {name: questions[name].text for name in known})
        except ValueError:
            asked = {name: ask(questions[name].text, asking.style) for name in known}
            check_same_questions(self.sets.values(), asked)
        truths = {name: made.truth for name, made in self.sets.items() if made.truth is not None}
        other = [name for name, truth in truths.items() if not _same_truth(truth, questions[name].truth)]
        if other:
            shown = f"'{other[0]}': {truths[other[0]][:40]!r} against {questions[other[0]].truth[:40]!r}"
            raise ValueError(
                f"candidate file of another question set: {len(other)} of {len(truths)} questions have another answer "
                f"(first: {shown}). Use the questions that the candidates were made for"
            )


def candidate_set(question: Question, dataset: DatasetMeta, record: Record) -> CandidateSet:
    """Make what a critic is given, and what ``candidates.jsonl`` holds, of a line of the store."""
    candidates = tuple(candidate_from_json(answer, question.name) for answer in record["answers"])
    images = tuple(dataset.root / image for image in question.images)
    return CandidateSet(question.name, record["question"], images, candidates, question.truth, question.system)


def stored(
    dataset: DatasetMeta, asking: Asking, store: AnswerStore, rank: int = 0, size: int = 1
) -> Iterator[tuple[Question, CandidateSet] | SampleError]:
    """Read a dataset's questions, or a rank's share of them, with their candidates.

    Yields:
        A question that cannot be used, or has no candidates, as an error with the reason.
    """
    for question in asking.questions(dataset, rank, size):
        if isinstance(question, SampleError):
            yield question
            continue
        record = store.get(question.name)
        if record is None:
            yield SampleError("not sampled", "it has no candidates yet", question.name)
        elif "skipped" in record:
            yield SampleError(record["skipped"], record["detail"], question.name)
        else:
            yield question, candidate_set(question, dataset, record)


def _unjudged(record: Record) -> Record:
    answers = [{**answer, "answer": None, "score": None} for answer in record.get("answers", ())]
    return {**record, "rule": None, "answers": answers}


def _same_truth(a: str, b: str) -> bool:
    return normalize(true_answer(a)) == normalize(true_answer(b))
