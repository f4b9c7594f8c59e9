"""Builds preference data from a model's own answers (spec §4.4); ranks share the questions out.

    meta.json ─► questions ─► Request(num answers) ─► Generator ─► replies ─► verdicts ─► OUT/samples/rank-….jsonl
                 rank::size                                                                 │ all ranks done: rank 0
    OUT/{dataset}.jsonl, OUT/meta.json, OUT/summary.json ◄── preference_merge ◄─────────────┘

A build that is started again goes on where it ended. Samples stay, with their verdicts: other rules need no new
samples, and what a model says depends on seed, question and number of the answer alone.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from evovlm.csrc.random import choice_index, keys
from evovlm.data.answers.prompts import ask
from evovlm.data.answers.rules import CORRECT_ABOVE, open_scorers
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta, load_meta
from evovlm.data.preference_pairs import keep_beginning, without_images
from evovlm.data.questions import Question
from evovlm.engine.answer_sampler import AnswerSampler, OpenGenerator, Report, check_same, question_record
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.build_folder import claim, stored_settings
from evovlm.engine.generation import Request
from evovlm.engine.preference_merge import merge
from evovlm.engine.preference_settings import BuildSettings
from evovlm.parallel.world import World

_READING = ("method", "meta", "prompt")  # what samples are read by; the rest only made them


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
    reuse = open_generator is None
    if world.is_main:
        claim(out, settings.identity(meta, model), kind="preference data", reading=_READING if reuse else None)
    world.barrier()
    if reuse and settings.method == "correctness":
        settings = replace(settings, num_samples=stored_settings(out)["num_samples"])
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers({settings.rules.of(dataset.name) for dataset in datasets}))
        store = stack.enter_context(AnswerStore(out / "samples", world.rank))
        world.barrier()  # a rank cuts a torn line off its file: not while others read it
        earlier = None
        if settings.chosen_from is not None:
            earlier = stack.enter_context(AnswerStore(settings.chosen_from / "samples"))
        asking = settings.asking
        share = asking.share(datasets, world.rank, world.size)
        common = (asking, store, scorers, open_generator, report or (lambda *_: None), share)
        dropout = settings.method == "dropout-ntp"
        sampler = _DropoutSampler(settings, earlier, *common) if dropout else AnswerSampler(*common)
        # One tile cap after the other: each may need a generator of its own.
        for dataset in sorted(datasets, key=lambda dataset: dataset.max_tiles or 0):
            sampler.sample(dataset, world.rank, world.size)
        world.barrier()
        if world.is_main:
            store.refresh()
            summary = merge(datasets, out, store, settings)
    world.barrier()
    return summary


class _DropoutSampler(AnswerSampler):
    """Has good answers finished without the image; nothing is judged."""

    def __init__(self, settings: BuildSettings, earlier: AnswerStore | None, *sampler: Any) -> None:
        super().__init__(*sampler)
        self.settings, self.earlier = settings, earlier

    def request(self, question: Question, dataset: DatasetMeta) -> tuple[Request, Record]:
        """Make a question's request; raises ``SampleError`` if there is nothing to continue."""
        del dataset  # its images are not shown
        text = ask(question.text, self.asking.style)
        chosen = question.reference if self.earlier is None else self._correct(question, self.earlier)
        prefix = keep_beginning(chosen, self.settings.start_ratio)
        turns = question.turns(without_images(text), self.asking.system_prompt)
        record = {**question_record(question, text), "chosen": chosen, "prefix": prefix}
        return Request(question.name, turns, prefix=prefix), record

    def judged(self, record: Record, question: Question) -> Record:
        """Return the record as it is."""
        del question
        return record

    def _correct(self, question: Question, earlier: AnswerStore) -> str:
        """Choose one of the correct replies of an earlier build, by key."""
        record = earlier.get(question.name) or {}
        right = [answer["text"] for answer in record.get("answers", ()) if answer.get("score", 0.0) > CORRECT_ABOVE]
        if not right:
            raise SampleError("no correct answer", f"'{question.name}' has none in {self.settings.chosen_from}")
        check_same(record, ask(question.text, self.asking.style), question)
        return str(right[int(choice_index(keys("chosen", self.asking.sampling.seed, question.name), len(right)))])
