"""Turns all ranks' solutions and rollouts into process reward data that ``evovlm index`` reads.

    OUT/samples ─┬─ values of steps ─► OUT/steps/charts.jsonl   raw rows: the share of right rollouts of each step
    OUT/rollouts ┘                     OUT/charts.jsonl         conversations with "+" and "-"
                                       OUT/meta.json            InternVL's meta JSON of these
                                       OUT/summary.json         what came of questions, solutions and rollouts

The result depends on samples, rollouts and settings, not on the ranks: questions come in the order of the data.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evovlm.data.answers.rules import CORRECT_ABOVE
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.prm_rows import conversation, labels, raw_row, until_first_error
from evovlm.data.questions import Question
from evovlm.data.solution_steps import GOOD
from evovlm.data.step_rollouts import StepValue, step_values
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.build_folder import free_name, meta_entry, write_json
from evovlm.engine.prm_rollouts import solutions_of, tallies_of
from evovlm.engine.prm_settings import PrmSettings

_MAIN_COUNTS = ("questions", "solutions", "correct", "unreadable", "cut_off", "rollouts", "conversations")

_LISTED = 20  # unusable lines of a candidate file


class _Counts:
    """What came of a dataset's questions and solutions."""

    def __init__(self) -> None:
        self.main: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.steps: Counter[int] = Counter()  # labelled, by their number in the solution
        self.good: Counter[int] = Counter()

    def add(self, other: "_Counts") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)

    def summary(self) -> dict[str, Any]:
        """Return all counts as they stand in summary.json."""
        steps, good = self.steps.total(), self.good.total()
        by_step = [
            {"step": number, "steps": count, "good": self.good[number], "share_good": self.good[number] / count}
            for number, count in sorted(self.steps.items())
        ]
        return {
            **{name: self.main[name] for name in _MAIN_COUNTS},
            "steps": steps,
            "good": good,
            "share_good": good / steps if steps else None,
            "by_step": by_step,
            "skipped": dict(sorted(self.skipped.items())),
            "left_out": dict(sorted(self.left_out.items())),
        }


def merge(
    datasets: Sequence[DatasetMeta],
    out: Path,
    samples: AnswerStore,
    rollouts: AnswerStore,
    settings: PrmSettings,
    unusable: Sequence[SampleError] = (),
) -> dict[str, Any]:
    """Write the data that come of all solutions of the settings' questions.

    Args:
        datasets: Of the meta JSON.
        out: Folder to write; what an earlier merge left there is replaced.
        samples: The solutions of all ranks.
        rollouts: Theirs.
        settings: Of the build.
        unusable: Lines of the candidate file that could not be read; the summary counts them and lists the first.

    Returns:
        The summary.

    Raises:
        ValueError: There is no conversation; the message says what there is instead.
    """
    (out / "meta.json").unlink(missing_ok=True)  # written last: where it stands, the rest is complete
    for old in out.glob("*.jsonl"):
        old.unlink()
    shutil.rmtree(out / "steps", ignore_errors=True)
    (out / "steps").mkdir()
    all_counts, by_dataset = _Counts(), {}
    meta: dict[str, Any] = {}
    for dataset in datasets:
        counts, name = _Counts(), free_name(dataset.name, meta)
        with (out / "steps" / f"{name}.jsonl").open("wb") as raw, (out / f"{name}.jsonl").open("wb") as lines:
            for row, line in _lines(dataset, samples, rollouts, settings, counts):
                raw.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if counts.main["conversations"]:
            meta[name] = meta_entry(dataset, name, counts.main["conversations"])
        else:
            (out / "steps" / f"{name}.jsonl").unlink()
            (out / f"{name}.jsonl").unlink()
        all_counts.add(counts)
        by_dataset[dataset.name] = counts.summary()
    summary = {
        "method": "outcome" if settings.outcome else "prm",
        **all_counts.summary(),
        "sets": {name: entry["length"] for name, entry in meta.items()},
        "unusable_lines": {"count": len(unusable), "first": [str(error) for error in unusable[:_LISTED]]},
        "datasets": by_dataset,
    }
    write_json(out / "summary.json", summary)
    if not meta:
        raise ValueError(_nothing(out, all_counts))
    write_json(out / "meta.json", meta)
    return summary


def _lines(
    dataset: DatasetMeta, samples: AnswerStore, rollouts: AnswerStore, settings: PrmSettings, counts: _Counts
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Make the raw row and the conversation of each solution of a dataset."""
    for question in settings.asking.questions(dataset):
        if isinstance(question, SampleError):
            counts.skipped[question.reason] += 1
            continue
        record, rolled_out = samples.get(question.name), rollouts.get(question.name)
        if record is None or "skipped" in record:
            counts.skipped["not sampled" if record is None else record["skipped"]] += 1
            continue
        if rolled_out is not None and "skipped" in rolled_out and not settings.outcome:
            counts.skipped[rolled_out["skipped"]] += 1
            continue
        yield from _of_question(question, dataset, record, rolled_out, settings, counts)


def _of_question(
    question: Question,
    dataset: DatasetMeta,
    record: Record,
    rolled_out: Record | None,
    settings: PrmSettings,
    counts: _Counts,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    answers, solutions = record["answers"], solutions_of(record, settings)
    tallies = {} if settings.outcome else tallies_of(rolled_out, solutions)
    counts.main["questions"] += 1
    counts.main["solutions"] += len(answers)
    counts.main["correct"] += sum(answer["score"] > CORRECT_ABOVE for answer in answers)
    counts.main["unreadable"] += sum(answer["finished"] and answer["answer"] is None for answer in answers)
    counts.main["cut_off"] += sum(not answer["finished"] for answer in answers)
    counts.main["rollouts"] += sum(tally.num_total for tally in tallies.values())
    texts = {"question": record["question"]}
    seen = set()
    for number, (answer, solution) in enumerate(zip(answers, solutions, strict=True)):
        if solution is None:
            blank = answer["finished"] or not answer["text"].strip()
            counts.left_out["no steps" if blank else "cut off in the first step"] += 1
            continue
        if solution in seen:
            counts.left_out["duplicates"] += 1
            continue
        seen.add(solution)
        values = step_values(solution, tallies, early_stop=settings.early_stop)
        if values is None:
            counts.left_out["not rolled out"] += 1
            continue
        source = f"{question.name}#{number}"
        row = raw_row(
            values,
            images=[str((dataset.root / image).absolute()) for image in question.images],
            **texts,
            question_orig=question.text,
            answer=question.truth,
            num_rollouts=settings.num_rollouts,
            source=source,
        )
        yield row, _conversation(values, question, texts["question"], source, settings, counts)


def _conversation(
    values: list[StepValue], question: Question, text: str, source: str, settings: PrmSettings, counts: _Counts
) -> dict[str, Any]:
    if settings.until_first_error:
        values = until_first_error(values, settings.mc_threshold)
    counts.main["conversations"] += 1
    for number, label in enumerate(labels(values, settings.mc_threshold), start=1):
        counts.steps[number] += 1
        counts.good[number] += label == GOOD
    return conversation(
        values,
        images=question.images,
        question=text,
        threshold=settings.mc_threshold,
        system=settings.prm_system_prompt,
        source=source,
    )


def _nothing(out: Path, counts: _Counts) -> str:
    main = counts.main
    reasons = counts.left_out if main["questions"] else counts.skipped
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none was read"
    if not main["questions"]:
        return f"no question could be used ({listed}); see {out / 'summary.json'}"
    return (
        f"no solution of {main['solutions']} to {main['questions']} questions has a step that could be valued "
        f"({listed}); see {out / 'summary.json'}"
    )
