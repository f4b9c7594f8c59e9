"""Builds preference data from a model's own answers (spec §4.4); ranks share the questions out.

    meta.json ─► questions ─► Request(num answers) ─► Generator ─► replies ─► verdicts ─► OUT/samples/rank-….jsonl
                 rank::size                                                                 │ all ranks done: rank 0
    OUT/{dataset}.jsonl, OUT/meta.json, OUT/summary.json ◄── preference_merge ◄─────────────┘

A build that is started again goes on where it ended. Samples stay, with their verdicts: other rules need no new
samples, and what a model says depends on seed, question and number of the answer alone.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from evovlm.csrc.random import choice_index, keys
from evovlm.data.answers.prompts import ask
from evovlm.data.answers.rules import CORRECT_ABOVE, Scorer, judge, open_scorers
from evovlm.data.errors import SampleError
from evovlm.data.images import read_size
from evovlm.data.meta import DatasetMeta, load_meta
from evovlm.data.preference_pairs import keep_beginning, without_images
from evovlm.data.questions import Question, num_questions, read_questions
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.generation import Generator, Request
from evovlm.engine.preference_merge import merge
from evovlm.engine.preference_settings import BuildSettings
from evovlm.parallel.world import World

_READING = ("method", "meta", "prompt")  # what samples are read by; the rest only made them

OpenGenerator = Callable[[int | None], Generator]
"""Called with a dataset's tile cap (None: the model's own) when there is something to generate for it."""

Report = Callable[[int, int], None]
"""Called as (questions done, questions in all), both of this rank's share."""


def build_preferences(
    meta: Path,
    out: Path,
    settings: BuildSettings,
    world: World,
    open_generator: OpenGenerator | None,
    *,
    model: str = "",
    report: Report | None = None,
) -> dict[str, Any]:
    """Sample, judge and pair; every rank calls this.

    Args:
        meta: InternVL's meta JSON of the questions, conversations or preference pairs.
        out: Folder to write; it is made, or holds an earlier start of the same build.
        settings: What to do.
        world: The ranks; they need a process group.
        open_generator: What answers; None: judge and pair the samples that are there.
        model: Name of what answers: a folder takes samples of one model only.
        report: Told how far this rank is.

    Returns:
        The summary, which is also written to ``OUT/summary.json``; empty on ranks other than 0.

    Raises:
        FileNotFoundError: No such meta JSON, or no samples to be judged again.
        FileExistsError: ``out`` holds something else.
        MetaError: The meta JSON, or a dataset of it, cannot be used.
        ValueError: ``out`` holds samples of other settings or other questions, or no pair came out.
        GenerationError: The model or server cannot answer.
    """
    datasets = load_meta(meta).datasets
    settings.rules.check_datasets(dataset.name for dataset in datasets)
    share = sum(len(range(world.rank, _num(dataset, settings), world.size)) for dataset in datasets)
    reuse = open_generator is None
    if world.is_main:
        _claim(out, settings.identity(meta, model), reuse=reuse)
    world.barrier()
    if reuse and settings.method == "correctness":
        settings = replace(settings, num_samples=json.loads((out / "settings.json").read_text())["num_samples"])
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers({settings.rules.of(dataset.name) for dataset in datasets}))
        store = stack.enter_context(AnswerStore(out / "samples", world.rank))
        world.barrier()  # a rank cuts a torn line off its file: not while others read it
        earlier = None
        if settings.chosen_from is not None:
            earlier = stack.enter_context(AnswerStore(settings.chosen_from / "samples"))
        sampler = _Sampler(settings, store, earlier, scorers, open_generator, report or (lambda *_: None), share)
        # One tile cap after the other: each may need a generator of its own.
        for dataset in sorted(datasets, key=lambda dataset: dataset.max_tiles or 0):
            sampler.sample(dataset, world.rank, world.size)
        world.barrier()
        if world.is_main:
            store.refresh()
            summary = merge(datasets, out, store, settings)
    world.barrier()
    return summary


@dataclass(frozen=True)
class _Asked:
    """A question that is under way: its request, and the beginning of its line in the store."""

    question: Question
    request: Request
    record: Record


class _Sampler:
    """Asks a rank's questions, and judges the replies."""

    def __init__(
        self,
        settings: BuildSettings,
        store: AnswerStore,
        earlier: AnswerStore | None,
        scorers: Mapping[str, Scorer],
        open_generator: OpenGenerator | None,
        report: Report,
        share: int,
    ) -> None:
        self.settings, self.store, self.earlier, self.scorers = settings, store, earlier, scorers
        self.open_generator, self.report, self.share = open_generator, report, share
        self.done = 0
        self.asked: deque[_Asked] = deque()

    def sample(self, dataset: DatasetMeta, rank: int, size: int) -> None:
        """Ask a dataset's questions that have no answers yet; judge the others again where the rule is another."""
        questions = self._questions(dataset, rank, size)
        again: list[_Asked] = [first for first in [next(questions, None)] if first is not None]
        while again and self.open_generator is not None:
            generator = self.open_generator(dataset.max_tiles)
            try:
                for completions in generator.generate(self._requests(chain(again, questions)), self.settings.sampling):
                    asked = self.asked.popleft()
                    answers = [asdict(completion) for completion in completions]
                    self._store(asked.question, self._judged({**asked.record, "answers": answers}, asked.question))
                again = []
            except SampleError as error:
                refused = [asked for asked in self.asked if asked.question.name == error.name]
                if not refused:
                    raise
                self._store(refused[0].question, {"skipped": error.reason, "detail": error.detail})
                again = [asked for asked in self.asked if asked is not refused[0]]
                again = again or [first for first in [next(questions, None)] if first is not None]
                self.asked.clear()

    def _requests(self, questions: Iterable["_Asked"]) -> Iterator[Request]:
        for asked in questions:
            self.asked.append(asked)
            yield asked.request

    def _questions(self, dataset: DatasetMeta, rank: int, size: int) -> Iterator["_Asked"]:
        """Yield the questions that must be asked."""
        settings = self.settings
        for question in read_questions(dataset, limit=settings.limit, start=settings.start, rank=rank, size=size):
            if isinstance(question, SampleError):  # read again, and counted, when samples are merged
                self._count()
                continue
            record = self.store.get(question.name)
            if record is not None and "skipped" not in record:
                _check_same(record, ask(question.text, settings.style), question)
                judged = self._judged(record, question)
                if judged != record:
                    self.store.append(question.name, judged)
                self._count()
            elif self.open_generator is not None:
                try:
                    yield self._ask(question, dataset)
                except SampleError as error:
                    self._store(question, {"skipped": error.reason, "detail": error.detail})

    def _ask(self, question: Question, dataset: DatasetMeta) -> "_Asked":
        """Make a question's request; raises ``SampleError`` if it cannot be asked."""
        settings = self.settings
        text = ask(question.text, settings.style)
        record: Record = {"image": list(question.images), "question": text, "answer_gt": question.truth}
        if settings.method == "dropout-ntp":
            chosen = question.reference if self.earlier is None else self._correct(question, self.earlier)
            prefix = keep_beginning(chosen, settings.start_ratio)
            record |= {"chosen": chosen, "prefix": prefix}
            turns = question.turns(without_images(text), settings.system_prompt)
            return _Asked(question, Request(question.name, turns, prefix=prefix), record)
        images = tuple(dataset.root / image for image in question.images)
        for image in images:
            read_size(image, decode=True, name=question.name)
        turns = question.turns(text, settings.system_prompt)
        return _Asked(question, Request(question.name, turns, images, num=settings.num_samples), record)

    def _correct(self, question: Question, earlier: AnswerStore) -> str:
        """Choose one of the correct replies of an earlier build, by key."""
        record = earlier.get(question.name) or {}
        right = [answer["text"] for answer in record.get("answers", ()) if answer.get("score", 0.0) > CORRECT_ABOVE]
        if not right:
            raise SampleError("no correct answer", f"'{question.name}' has none in {self.settings.chosen_from}")
        _check_same(record, ask(question.text, self.settings.style), question)
        return str(right[int(choice_index(keys("chosen", self.settings.sampling.seed, question.name), len(right)))])

    def _judged(self, record: Record, question: Question) -> Record:
        if self.settings.method == "dropout-ntp":
            return record
        rule = self.settings.rules.of(question.dataset)
        answers = []
        for answer in record["answers"]:
            verdict = judge(
                answer["text"], question.truth, self.scorers[rule], self.settings.style, finished=answer["finished"]
            )
            answers.append({**answer, "answer": verdict.answer, "score": verdict.score})
        return {**record, "rule": rule, "answers": answers}

    def _store(self, question: Question, record: Record) -> None:
        self.store.append(question.name, record)
        self._count()

    def _count(self) -> None:
        self.done += 1
        self.report(self.done, self.share)


def _num(dataset: DatasetMeta, settings: BuildSettings) -> int:
    return num_questions(dataset, limit=settings.limit, start=settings.start)


def _check_same(record: Record, text: str, question: Question) -> None:
    if (record["question"], record["answer_gt"]) != (text, question.truth):
        raise ValueError(
            f"sample '{question.name}': the samples are of the question {record['question'][:60]!r} with the answer "
            f"{record['answer_gt'][:40]!r}, the data have another: use a new folder"
        )


def _claim(out: Path, identity: Mapping[str, Any], *, reuse: bool) -> None:
    """Write down what the samples of a folder depend on, or check that it is the same."""
    file = out / "settings.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        for key in _READING if reuse else identity:
            value = identity[key]
            if there.get(key) != value:
                raise ValueError(
                    f"{out} holds samples made with {key} = {there.get(key)!r}, not {value!r}: use another folder"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is no folder of preference data: use another")
    if reuse:
        raise FileNotFoundError(f"{out} holds no samples that could be judged again")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
