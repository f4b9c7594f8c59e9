"""From answer files to a report: the table of benchmarks, and what happens to every row.

files ──read_rows──► Row ──not judged before?──► join ──► with its truth ──► judge ──► Judged ─┐
                      │              │            │                            │               ├─► table ─► Report
                      └──────────────┴────────────┴────────────────────────────┴─► RowError ───┘
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evovlm.data.answers.prompts import PromptStyle, extract
from evovlm.data.benchmarks import choice, grounding, mathvista, pope, reading, vsibench
from evovlm.data.benchmarks.annotations import Annotations
from evovlm.data.benchmarks.report import NUM_RIGHT, Judged, Report, Table
from evovlm.data.benchmarks.rows import Row, RowError, read_rows, split_name

_Question = tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is scored.

    Attributes:
        title: What it is, for a table's head.
        metric: The metric that is quoted.
        judge: Scores one row; raises ``RowError`` if it cannot.
        table: Adds rows up to groups and metrics.
        leave_out: Called with judged and bad rows (without those that came again and were judged then), where a bad row
            makes others useless: returns those that stay, and an error for each of the others.
    """

    title: str
    metric: str
    judge: Callable[[Row], Judged]
    table: Callable[[Sequence[Judged]], Table]
    leave_out: Callable[[Sequence[Judged], Sequence[Row]], tuple[list[Judged], list[RowError]]] | None = None


BENCHMARKS = {
    "mmmu": Benchmark("MMMU", "accuracy", choice.judge_mmmu, choice.table_mmmu),
    "ai2d": Benchmark("AI2D", "accuracy", choice.judge_ai2d, choice.table_ai2d),
    "mmbench": Benchmark(
        "MMBench", "accuracy", choice.judge_mmbench, choice.table_mmbench, choice.leave_out_broken_circles
    ),
    "chartqa": Benchmark("ChartQA", "relaxed accuracy", reading.judge_chartqa, reading.table_chartqa),
    "docvqa": Benchmark("DocVQA", "ANLS", reading.judge_anls, reading.table_anls),
    "infovqa": Benchmark("InfoVQA", "ANLS", reading.judge_anls, reading.table_anls),
    "textvqa": Benchmark("TextVQA", "accuracy", reading.judge_vqa, reading.table_vqa),
    "vqa": Benchmark("VQA", "accuracy", reading.judge_vqa, reading.table_vqa),
    "ocrbench": Benchmark("OCRBench", NUM_RIGHT, reading.judge_ocrbench, reading.table_ocrbench),
    "pope": Benchmark("POPE", pope.F1, pope.judge_pope, pope.table_pope),
    "refcoco": Benchmark("RefCOCO", "IoU ≥ 0.5", grounding.judge_refcoco, grounding.table_refcoco),
    "screenspot": Benchmark("ScreenSpot", "accuracy", grounding.judge_screenspot, grounding.table_screenspot),
    "vsibench": Benchmark("VSI-Bench", vsibench.SCORE, vsibench.judge_vsibench, vsibench.table_vsibench),
    "mathvista": Benchmark("MathVista", "accuracy", mathvista.judge_mathvista, mathvista.table_mathvista),
}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise ValueError(f"'{name}' is no benchmark: {hint}")
    return BENCHMARKS[name]


def score_files(
    files: Sequence[Path],
    name: str,
    *,
    annotations: Sequence[Path] = (),
    style: PromptStyle = PromptStyle.DIRECT,
    answer_key: str | None = None,
    truth_key: str | None = None,
) -> Report:
    """Score answer files of one benchmark.

    Args:
        files: One, or those of its splits; see ``read_rows``.
        name: Of the benchmark.
        annotations: Files that hold the truths, where the answer files do not; see ``Annotations``.
        style: Where the answer stands in what the model said; a reply that has none there is scored as empty.
        answer_key: Key of the model's answer; by default the usual ones.
        truth_key: Key of the truth; by default the usual ones.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Unknown benchmark, an unreadable file, or no row at all can be scored.
    """
    benchmark = find_benchmark(name)
    truths = Annotations(annotations)
    judged: list[Judged] = []
    bad: list[RowError] = []
    bad_rows: list[Row] = []
    asked: dict[_Question, str] = {}
    for row in _rows(files, answer_key, truth_key):
        if isinstance(row, RowError):
            bad.append(row)
            continue
        question = _question(row)
        if question is not None and question in asked:
            bad.append(RowError(row.where, f"the question of {asked[question]} again (id {row.id})"))
            continue
        try:
            joined = truths.join(row)
            judged.append(benchmark.judge(joined if style is PromptStyle.DIRECT else _extracted(joined, style)))
        except RowError as error:
            bad.append(error)
            bad_rows.append(row)
            continue
        if question is not None:
            asked[question] = row.where
    if benchmark.leave_out is not None:
        judged, left_out = benchmark.leave_out(judged, [row for row in bad_rows if _question(row) not in asked])
        bad += left_out
    if not judged:
        raise ValueError(f"none of {len(bad):,} rows can be scored as {benchmark.title}; the first: {bad[0]}")
    return Report(name, benchmark.metric, benchmark.table(judged), judged, bad)


def _rows(files: Sequence[Path], answer_key: str | None, truth_key: str | None) -> Iterator[Row | RowError]:
    for file in files:
        split = split_name(file) if len(files) > 1 else None
        yield from read_rows(file, split=split, answer_key=answer_key, truth_key=truth_key)


def _question(row: Row) -> _Question | None:
    """Return what a question is known by: inference on several ranks may pad the last batch with rows it has done."""
    if row.id is None:
        return None
    about = (row.split, row.text("split"), row.text("category"), row.text("question"), row.text("image"))
    return row.id, *(text or "" for text in about)


def _extracted(row: Row, style: PromptStyle) -> Row:
    return replace(row, extracted=extract(row.answer(), style) or "")
