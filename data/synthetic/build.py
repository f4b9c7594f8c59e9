"""Writes the quickstart's data in InternVL's own format.

    OUT/images/…                 PNG
    OUT/jsonl/…                  one conversation or one pre-training document a line
    OUT/text.{bin,idx}           real plain text as a Megatron corpus
    OUT/tokenizer/               a small byte-level BPE
    OUT/{pretrain,sft,checks,val,test}.json    InternVL meta files
    OUT/summary.json             counts, and the best constant answer of each task; written last

Pre-training reads *pages* (several one-tile images, each followed by what it shows), captions, conversations and plain
text; fine-tuning reads conversations. What is held out never appears in either (see ``sources``).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from evovlm.data.corpus import write_corpus
from evovlm.data.synthetic import charts, digits, sources, steps, words
from evovlm.data.synthetic.sample import Sample
from evovlm.data.synthetic.sources import Split
from evovlm.data.tokenizer import Tokenizer
from evovlm.data.tokenizer_training import build_tokenizer

TASKS = ("digits", "words", "charts", "steps")
VOCAB_SIZE = 640
Line = dict[str, Any]
Make = Callable[[int, Split, int], Sample]


@dataclass(frozen=True)
class _Part:
    """Samples of one kind: where they come from, how many there are, and in which forms they are written."""

    name: str
    make: Make
    split: Split
    count: int
    page: int = 0
    """Images of a page; 0: the sample stands alone."""
    caption: bool = False
    chat: bool = False
    checks: bool = False
    pretrain: bool = True
    """Whether pre-training reads it, and the tokenizer is made for it."""


_PARTS = (
    _Part("digit_pages", partial(digits.make, one_tile=True), "train", 1200, page=8),
    _Part("letter_pages", partial(words.make_letters, one_tile=True), "train", 2000, page=8),
    _Part("chart_pages", partial(charts.make, one_tile=True), "train", 1000, page=6),
    _Part("letters", words.make_letters, "train", 7000, caption=True),
    _Part("digits", digits.make, "train", 6000, caption=True, chat=True),
    _Part("words", words.make, "train", 8000, caption=True, chat=True),
    _Part("charts", charts.make, "train", 6000, caption=True, chat=True),
    _Part("steps", steps.make, "train", 6000, chat=True, checks=True, pretrain=False),
    _Part("digits", digits.make, "val", 60, chat=True),
    _Part("words", words.make, "val", 60, chat=True),
    _Part("charts", charts.make, "val", 60, chat=True),
    _Part("steps", steps.make, "val", 300, chat=True),
    _Part("digits", digits.make, "test", 300, chat=True),
    _Part("words", words.make, "test", 300, chat=True),
    _Part("charts", charts.make, "test", 300, chat=True),
    _Part("steps", steps.make, "test", 300, chat=True),
)


# In pre-training. Pages teach most per token; a few conversations make the template known before fine-tuning.
_REPEAT = {"page": 2, "caption": 1, "chat": 0.25}


@dataclass(frozen=True)
class QuickstartData:
    """What was written.

    Attributes:
        directory: where it all is.
        tasks: ``{task: {"num_train", "num_test", "constant_baseline"}}``.
    """

    directory: Path
    tasks: dict[str, dict[str, float]]


def build_quickstart_data(
    out_dir: str | Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    num_workers: int = 2,
    passage: int = 1500,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuickstartData:
    """Make all data of the quickstart.

    Args:
        out_dir: folder to write; files in it are replaced.
        seed: of the splits and of everything drawn.
        scale: share of the full number of samples, for a short run.
        num_workers: processes that draw images.
        passage: characters that plain text is cut to: an epoch draws few of its samples, which should not differ much.
        progress: called as (part, samples done, samples in all).

    Raises:
        FileNotFoundError: a package that brings source material is not installed.
    """
    out = Path(out_dir)
    (out / "jsonl").mkdir(parents=True, exist_ok=True)
    parts = [(part, max(4, round(part.count * scale))) for part in _PARTS]
    total = sum(count for _, count in parts)
    answers: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    files: dict[str, Path] = {}
    texts: list[str] = []
    done = 0
    with get_context("spawn").Pool(num_workers) as pool:
        for part, count in parts:
            (out / "images" / part.split / part.name).mkdir(parents=True, exist_ok=True)
            with _writers(out, part, files) as write:
                jobs = ((out, seed, part, number) for number in range(count))
                for number, lines in enumerate(pool.imap(_draw, jobs, chunksize=32)):
                    for form, line in lines:
                        write(form, line)
                        if part.split == "train" and part.pretrain and number < 400:
                            texts.append(_plain(line))
                        if part.split == "test":
                            answers[part.name][line["conversations"][-1]["value"]] += 1
                    done += 1
                    if progress is not None and (done % 200 == 0 or done == total):
                        progress(part.name, done, total)
    _write_text(out, seed, texts, passage)
    _write_metas(out, files)
    counts = {(part.name, part.split): count for part, count in parts}
    tasks: dict[str, dict[str, float]] = {
        task: {
            "num_train": counts[task, "train"],
            "num_test": counts[task, "test"],
            "constant_baseline": max(given.values()) / given.total(),
        }
        for task, given in answers.items()
    }
    (out / "summary.json").write_text(json.dumps({"seed": seed, "scale": scale, "tasks": tasks}, indent=2) + "\n")
    return QuickstartData(out, tasks)


def _draw(job: tuple[Path, int, _Part, int]) -> list[tuple[str, Line]]:
    """Draw one sample or page, save its images, and return its lines by form, such as ``page`` or ``chat``."""
    out, seed, part, number = job
    numbers = range(number * part.page, (number + 1) * part.page) if part.page else (number,)
    samples = [part.make(seed, part.split, each) for each in numbers]
    paths: list[str] = []
    for sample in samples:
        for image in sample.images:
            path = f"{part.split}/{part.name}/{number:06d}_{len(paths)}.png"
            image.save(out / "images" / path, compress_level=1)
            paths.append(path)
    line: Line = {"id": number, "image": paths if len(paths) > 1 else paths[0]}
    told = [text for sample in samples for text in sample.transcripts]
    document = "\n".join(f"<image>\n{text}" for text in told)
    lines: list[tuple[str, Line]] = []
    if part.page or part.caption:
        turns = [{"from": "pretrain", "value": document}]
        lines.append(("page" if part.page else "caption", {**line, "conversations": turns}))
    if part.chat:
        pairs = [(("human", question), ("gpt", answer)) for question, answer in samples[0].questions]
        turns = [{"from": role, "value": text} for pair in pairs for role, text in pair]
        lines.append(("chat", {**line, "conversations": turns}))
    if part.checks:
        shown = [int(digit) for digit in samples[0].transcripts[0]]
        checks = steps.make_checks(seed, part.split, number, shown)
        lines += [("checks", {**line, "conversations": list(turns)}) for turns in checks]
    return lines


@contextmanager
def _writers(out: Path, part: _Part, files: dict[str, Path]) -> Iterator[Callable[[str, Line], None]]:
    """Open a part's files as they are needed; registers each under ``split/name/form``."""
    opened: dict[str, Any] = {}

    def write(form: str, line: Line) -> None:
        if form not in opened:
            path = out / "jsonl" / f"{part.split}_{part.name}_{form}.jsonl"
            files[f"{part.split}/{part.name}/{form}"] = path
            opened[form] = path.open("w", encoding="utf-8")
        opened[form].write(json.dumps(line, ensure_ascii=False) + "\n")

    try:
        yield write
    finally:
        for file in opened.values():
            file.close()


def _plain(line: Line) -> str:
    return "\n".join(turn["value"].replace("<image>", "") for turn in line["conversations"])


def _write_text(out: Path, seed: int, texts: list[str], passage: int) -> None:
    """Train the tokenizer and write the plain text as corpora.

    Words in capitals are kept out of the tokenizer's training: what the model must read from images stays a token a
    letter, while questions and the chat template become short.
    """
    documents = sources.text_split(seed)
    frame = ["system\nuser\nassistant\nImage-1: \nImage-2: \n"] * len(texts)
    prose = [document.text[:4000] for document in documents["train"]]
    capitals = re.compile(r"[A-Z]{2,}")
    build_tokenizer([capitals.sub("", text) for text in (*texts, *frame, *prose)], out / "tokenizer", VOCAB_SIZE)
    tokenizer = Tokenizer.load(out / "tokenizer")
    passages = [part for document in documents["train"] for part in _passages(document.text, passage)]
    write_corpus(out / "text", [[*tokenizer.encode(part), tokenizer.end_of_text] for part in passages])


def _passages(text: str, size: int) -> list[str]:
    """Cut a text at paragraphs into passages of about ``size`` characters."""
    passages = [""]
    for paragraph in text.split("\n\n"):
        if passages[-1] and len(passages[-1]) + len(paragraph) > size:
            passages.append("")
        passages[-1] += ("\n\n" if passages[-1] else "") + paragraph
    return passages


def _dataset_name(key: str) -> str:
    _, part, form = key.split("/")
    return part if form == "page" else f"{part}_{form}"


def _write_metas(out: Path, files: dict[str, Path]) -> None:
    def entry(key: str, repeat: float = 1) -> dict[str, Any]:
        return {"root": "images", "annotation": str(files[key].relative_to(out)), "repeat_time": repeat}

    training = [f"train/{part.name}/" for part in _PARTS if part.split == "train" and part.pretrain]
    metas = {
        "pretrain": {
            **{
                _dataset_name(key): entry(key, _REPEAT[key.split("/")[2]])
                for key in files
                if key.startswith(tuple(training))
            },
            "text": {"root": "", "annotation": "text", "format": "megatron"},
        },
        "sft": {task: entry(f"train/{task}/chat") for task in TASKS},
        "checks": {"checks": entry("train/steps/checks")},
        "val": {task: entry(f"val/{task}/chat") for task in TASKS},
        "test": {task: entry(f"test/{task}/chat") for task in TASKS},
    }
    for name, meta in metas.items():
        (out / f"{name}.json").write_text(json.dumps(meta, indent=2) + "\n")
