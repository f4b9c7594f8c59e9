"""Asks a data set's questions and judges the replies; ranks share the questions out, and a store keeps what was said.

questions ─► in the store? ── no ──► Request(num answers) ─► Generator ─► verdicts ─► store
rank::size        └─ yes: judged again, where the rule is another ───────────────────────▲
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evovlm.data.answers.prompts import PromptStyle, ask
from evovlm.data.answers.rules import Rules, Scorer, judge
from evovlm.data.errors import SampleError
from evovlm.data.images import read_size
from evovlm.data.meta import DatasetMeta
from evovlm.data.questions import Question, num_questions, read_questions
from evovlm.engine.answer_jobs import Job, answer_jobs
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.generation import Generator, Request, Sampling

OpenGenerator = Callable[[int | None], Generator]
"""Called with a dataset's tile cap (None: the model's own) when there is something to generate for it."""

Report = Callable[[int, int], None]
"""Called as (questions done, questions in all), both of this rank's share."""


@dataclass(frozen=True)
class Asking:
    """What is asked, how often, and by what answers are judged.

    Attributes:
        sampling: How answers are drawn.
        rules: Which rule checks which dataset's answers.
        style: How a question asks for a checkable answer.
        num: Answers to each question.
        system_prompt: System turn of questions that bring none; None: the one that the model was trained with.
        limit: Most lines of each dataset; None: all.
        start: First line of each dataset, from 0.
    """

    sampling: Sampling
    rules: Rules
    style: PromptStyle
    num: int
    system_prompt: str | None
    limit: int | None
    start: int

    def questions(self, dataset: DatasetMeta, rank: int = 0, size: int = 1) -> Iterator[Question | SampleError]:
        """Read a dataset's questions, or a rank's share of them; see ``read_questions``."""
        return read_questions(dataset, limit=self.limit, start=self.start, rank=rank, size=size)

    def share(self, datasets: Sequence[DatasetMeta], rank: int, size: int) -> int:
        """Count a rank's questions, unusable lines among them."""
        counts = [num_questions(dataset, limit=self.limit, start=self.start) for dataset in datasets]
        return sum(len(range(rank, count, size)) for count in counts)


class AnswerSampler:
    """Asks a rank's questions that a store has no answers to.

    Args:
        asking: What is asked.
        store: Where answers are kept.
        scorers: Of the rules.
        open_generator: What answers; None: what is there is judged again, nothing is asked.
        report: Told after each question.
        share: Questions of this rank in all datasets.
    """

    def __init__(
        self,
        asking: Asking,
        store: AnswerStore,
        scorers: Mapping[str, Scorer],
        open_generator: OpenGenerator | None,
        report: Report,
        share: int,
    ) -> None:
        self.asking, self.store, self.scorers = asking, store, scorers
        self.open_generator, self.report, self.share = open_generator, report, share
        self.done = 0

    def sample(self, dataset: DatasetMeta, rank: int, size: int) -> None:
        """Ask a dataset's questions that have no answers yet; judge the others again where the rule is another.

        Raises:
            ValueError: The store's answers are to other questions.
            GenerationError: The model or server cannot answer.
        """
        open_generator = self.open_generator
        if open_generator is None:
            for _ in self._jobs(dataset, rank, size):
                pass
            return
        jobs = self._jobs(dataset, rank, size)
        for (question, record), said in answer_jobs(
            lambda: open_generator(dataset.max_tiles), jobs, self.asking.sampling
        ):
            if isinstance(said, SampleError):
                self._skip(question, said)
            else:
                answers = [asdict(completion) for completion in said[0]]
                self._store(question, self.judged({**record, "answers": answers}, question))

    def request(self, question: Question, dataset: DatasetMeta) -> tuple[Request, Record]:
        """Make a question's request, and the beginning of its line in the store.

        Raises:
            SampleError: It cannot be asked.
        """
        text = ask(question.text, self.asking.style)
        images = tuple(dataset.root / image for image in question.images)
        for image in images:
            read_size(image, decode=True, name=question.name)
        turns = question.turns(text, self.asking.system_prompt)
        return Request(question.name, turns, images, num=self.asking.num), question_record(question, text)

    def judged(self, record: Record, question: Question) -> Record:
        """Write each answer's verdict into a record."""
        rule = self.asking.rules.of(question.dataset)
        answers = []
        for answer in record["answers"]:
            verdict = judge(
                answer["text"], question.truth, self.scorers[rule], self.asking.style, finished=answer["finished"]
            )
            answers.append({**answer, "answer": verdict.answer, "score": verdict.score})
        return {**record, "rule": rule, "answers": answers}

    def _jobs(self, dataset: DatasetMeta, rank: int, size: int) -> Iterator[Job[tuple[Question, Record]]]:
        """Yield the questions that must be asked."""
        for question in self.asking.questions(dataset, rank, size):
            if isinstance(question, SampleError):  # read again, and counted, when samples are merged
                self._count()
                continue
            record = self.store.get(question.name)
            if record is not None and "skipped" not in record:
                check_same(record, ask(question.text, self.asking.style), question)
                judged = self.judged(record, question)
                if judged != record:
                    self.store.append(question.name, judged)
                self._count()
            elif self.open_generator is not None:
                try:
                    request, record = self.request(question, dataset)
                except SampleError as error:
                    self._skip(question, error)
                else:
                    yield Job((question, record), (request,))

    def _skip(self, question: Question, error: SampleError) -> None:
        self._store(question, {"skipped": error.reason, "detail": error.detail})

    def _store(self, question: Question, record: Record) -> None:
        self.store.append(question.name, record)
        self._count()

    def _count(self) -> None:
        self.done += 1
        self.report(self.done, self.share)


def question_record(question: Question, text: str) -> dict[str, Any]:
    """Return how a question stands at the beginning of its line in a store."""
    return {"image": list(question.images), "question": text, "answer_gt": question.truth}


def check_same(record: Record, text: str, question: Question) -> None:
    """Raise a ``ValueError`` if a store's answers are to another question than the data now have."""
    if (record["question"], record["answer_gt"]) != (text, question.truth):
        raise ValueError(
            f"sample '{question.name}': the samples are of the question {record['question'][:60]!r} with the answer "
            f"{record['answer_gt'][:40]!r}, the data have another: use a new folder"
        )
