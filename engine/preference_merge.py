"""Turns all ranks' samples into preference data that ``evovlm index --kind preference`` reads.

    OUT/samples ──pairs of each question──► OUT/charts.jsonl, OUT/charts_format_rules.jsonl   {"image", "question",
                                            OUT/meta.json (InternVL's meta JSON)               "chosen", "rejected", …}
                                            OUT/summary.json (what came of questions and samples)

The result depends on samples and settings, not on the ranks: questions come in the order of the data.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evovlm.csrc.random import key
from evovlm.data.annotation import image_value
from evovlm.data.answers.rules import CORRECT_ABOVE
from evovlm.data.errors import SampleError
from evovlm.data.meta import DatasetMeta
from evovlm.data.preference_pairs import JudgedAnswer, correctness_pairs, pairs_per_question, thin_out
from evovlm.data.questions import Question, num_questions, read_questions
from evovlm.engine.answer_store import AnswerStore, Record
from evovlm.engine.build_folder import free_name, meta_entry, write_json
from evovlm.engine.preference_settings import BuildSettings

FORMAT_RULES = "format_rules"
"""Ending of the name of a dataset whose rejected answers are not in the form that was asked for."""

_MAIN_COUNTS = {
    "correctness": ("questions", "samples", "correct", "unreadable", "cut_off", "all_correct", "all_wrong", "pairs"),
    "dropout-ntp": ("questions", "samples", "cut_off", "pairs"),
}

_Line = tuple[bool, dict[str, Any]]
"""Whether it belongs to the set of format rules, and the line."""


class _Counts:
    """What came of a dataset's questions and samples."""

    def __init__(self) -> None:
        self.main: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(self, other: "_Counts") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)

    def summary(self, method: str) -> dict[str, Any]:
        """Return all counts as they stand in summary.json."""
        counts: dict[str, Any] = {name: self.main[name] for name in _MAIN_COUNTS[method]}
        if method == "correctness":
            samples = self.main["samples"]
            counts |= {"format_pairs": self.main[FORMAT_RULES]}
            counts |= {"share_correct": self.main["correct"] / samples if samples else None}
        skipped, left_out = (dict(sorted(counter.items())) for counter in (self.skipped, self.left_out))
        return {**counts, "skipped": skipped, "left_out": {name: count for name, count in left_out.items() if count}}


def merge(datasets: Sequence[DatasetMeta], out: Path, store: AnswerStore, settings: BuildSettings) -> dict[str, Any]:
    """Write the pairs of all samples that belong to the settings' questions.

    Args:
        datasets: Of the meta JSON.
        out: Folder to write; what an earlier merge left there is replaced.
        store: The samples of all ranks.
        settings: Of the build.

    Returns:
        The summary.

    Raises:
        ValueError: There is no pair; the message says what there is instead.
    """
    (out / "meta.json").unlink(missing_ok=True)  # written last: where it stands, the rest is complete
    for old in out.glob("*.jsonl"):
        old.unlink()
    all_counts, by_dataset = _Counts(), {}
    sets: dict[str, tuple[DatasetMeta, int]] = {}
    for dataset in datasets:
        counts = _Counts()
        names = [free_name(f"{dataset.name}{ending}", sets) for ending in ("", f"_{FORMAT_RULES}")]
        numbers = [0, 0]
        with (out / f"{names[0]}.jsonl").open("wb") as pairs, (out / f"{names[1]}.jsonl").open("wb") as unreadable:
            for is_format, line in _lines(dataset, store, settings, counts):
                (pairs, unreadable)[is_format].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                numbers[is_format] += 1
        sets |= {name: (dataset, number) for name, number in zip(names, numbers, strict=True)}
        all_counts.add(counts)
        by_dataset[dataset.name] = counts.summary(settings.method)
    total = sum(number for _, number in sets.values())
    kept = _thin_out({name: number for name, (_, number) in sets.items()}, out, settings)
    all_counts.left_out["thinned out"] = total - sum(kept.values())
    summary = {
        "method": settings.method,
        **all_counts.summary(settings.method),
        "sets": {name: number for name, number in kept.items() if number},
        "datasets": by_dataset,
    }
    write_json(out / "summary.json", summary)
    if not total:
        raise ValueError(_nothing(out, all_counts, settings))
    meta = {name: meta_entry(dataset, name, kept[name]) for name, (dataset, _) in sets.items() if kept[name]}
    write_json(out / "meta.json", meta)
    return summary


def _lines(dataset: DatasetMeta, store: AnswerStore, settings: BuildSettings, counts: _Counts) -> Iterator[_Line]:
    """Make all lines of a dataset, each only once."""
    seen: set[int] = set()
    make = _correctness if settings.method == "correctness" else _dropout
    num_replies = settings.num_samples * num_questions(dataset, limit=settings.limit, start=settings.start)
    many, few = settings.many_replies, settings.max_pairs_of_many
    max_pairs = pairs_per_question(num_replies, settings.max_pairs, many_replies=many, max_pairs_of_many=few)
    for question in read_questions(dataset, limit=settings.limit, start=settings.start):
        if isinstance(question, SampleError):
            counts.skipped[question.reason] += 1
            continue
        record = store.get(question.name)
        if record is None or "skipped" in record:
            counts.skipped["not sampled" if record is None else record["skipped"]] += 1
            continue
        counts.main["questions"] += 1
        counts.main["samples"] += len(record["answers"])
        counts.main["cut_off"] += sum(not answer["finished"] for answer in record["answers"])
        for is_format, chosen, rejected in make(record, question, settings, counts, max_pairs):
            line = _line(record, question, chosen, rejected)
            fingerprint = key(json.dumps([line.get("image"), line["question"], chosen, rejected]))
            if fingerprint in seen:
                counts.left_out["duplicates"] += 1
                continue
            seen.add(fingerprint)
            counts.main[FORMAT_RULES if is_format else "pairs"] += 1
            yield is_format, line


def _correctness(
    record: Record, question: Question, settings: BuildSettings, counts: _Counts, max_pairs: int
) -> Iterator[tuple[bool, str, str]]:
    answers = record["answers"]
    replies = [JudgedAnswer(a["text"], a["answer"], a["score"] > CORRECT_ABOVE) for a in answers]
    num_correct = sum(reply.correct for reply in replies)
    counts.main["correct"] += num_correct
    counts.main["unreadable"] += sum(reply.answer is None for reply in replies)
    counts.main["all_correct"] += num_correct == len(replies)
    counts.main["all_wrong"] += num_correct == 0
    found = correctness_pairs(replies, name=question.name, seed=settings.sampling.seed, max_pairs=max_pairs)
    counts.left_out["right answer inside the wrong one"] += found.contained
    counts.left_out["duplicates"] += found.duplicates
    counts.left_out["enough pairs"] += found.over_limit
    for is_format, pairs in ((False, found.pairs), (True, found.format_pairs)):
        for chosen, rejected in pairs:
            yield is_format, replies[chosen].text, replies[rejected].text


def _dropout(
    record: Record, question: Question, settings: BuildSettings, counts: _Counts, max_pairs: int
) -> Iterator[tuple[bool, str, str]]:
    del question, settings, max_pairs  # one pair a question
    chosen, (answer,) = record["chosen"], record["answers"]
    rejected = record["prefix"] + answer["text"]
    if not answer["finished"]:
        counts.left_out["cut off"] += 1
    elif not rejected.strip():
        counts.left_out["empty"] += 1
    elif rejected.strip() == chosen.strip():
        counts.left_out["same as the chosen one"] += 1
    else:
        yield False, chosen, rejected


def _line(record: Record, question: Question, chosen: str, rejected: str) -> dict[str, Any]:
    line: dict[str, Any] = {} if question.id is None else {"id": question.id}
    images = record["image"]
    if images:
        line["image"] = image_value(images)
    line |= {"question": record["question"], "chosen": chosen, "rejected": rejected}
    line |= {"answer_gt": record["answer_gt"], "source": question.name}
    if record["question"] != question.text:
        line["question_orig"] = question.text
    return line if question.system is None else {**line, "system": question.system}


def _thin_out(numbers: dict[str, int], out: Path, settings: BuildSettings) -> dict[str, int]:
    """Drop lines of all sets at random until there are no more than allowed; return how many each set has then."""
    total = sum(numbers.values())
    places = thin_out(total, settings.max_lines, settings.sampling.seed) if total > settings.max_lines else None
    kept, begin = dict(numbers), 0
    for name, number in numbers.items():
        path = out / f"{name}.jsonl"
        if places is not None:
            wanted = places[np.searchsorted(places, begin) : np.searchsorted(places, begin + number)] - begin
            rest = path.with_suffix(".part")
            with path.open("rb") as lines, rest.open("wb") as file:
                chosen = iter([*wanted.tolist(), -1])
                following = next(chosen)
                for place, line in enumerate(lines):
                    if place == following:
                        file.write(line)
                        following = next(chosen)
            rest.replace(path)
            kept[name] = len(wanted)
        if not kept[name]:
            path.unlink()
        begin += number
    return kept


def _nothing(out: Path, counts: _Counts, settings: BuildSettings) -> str:
    main = counts.main
    if not main["questions"]:
        skipped = ", ".join(f"{count} {reason}" for reason, count in counts.skipped.items()) or "none was read"
        return f"no question could be used ({skipped}); see {out / 'summary.json'}"
    if settings.method == "dropout-ntp":
        return f"no pair from {main['questions']} answers, see left_out in {out / 'summary.json'}"
    return (
        f"no pair from {main['samples']} answers to {main['questions']} questions: {main['all_correct']} questions "
        f"have correct answers only, {main['all_wrong']} have none; try another temperature or rule "
        f"(counts: {out / 'summary.json'})"
    )
