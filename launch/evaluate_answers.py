"""``evovlm evaluate ANSWERS --benchmark``: scores answer files, prints a table and the rows that cannot be scored.

answers.json ──score_files──► Report ─┬─► table on the terminal
                                      └─► OUT.json (all groups, bad rows), OUT.rows.jsonl (every row)   with --out
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evovlm.data.benchmarks.report import Report

_COUNTS = {"num": "questions", "num_right": "right answers"}
_SHOWN_BAD = 5
_SHOWN_GROUPS = 40


@dataclass(frozen=True)
class AnswerOptions:
    """What the command line says; see ``score_files``."""

    benchmark: str
    annotations: Sequence[Path]
    prompt: str
    answer_key: str | None
    truth_key: str | None
    out: Path | None


def evaluate_answers(files: Sequence[Path], options: AnswerOptions) -> None:
    """Score answer files and say what came out; see ``score_files`` for the errors."""
    from evovlm.data.answers.prompts import PromptStyle
    from evovlm.data.benchmarks.registry import score_files

    report = score_files(
        files,
        options.benchmark,
        annotations=options.annotations,
        style=PromptStyle(options.prompt),
        answer_key=options.answer_key,
        truth_key=options.truth_key,
    )
    show(report, files)
    if options.out is not None:
        write(report, files, options.out)


def show(report: "Report", files: Sequence[Path]) -> None:
    """Print a report's table and its first bad rows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from evovlm.data.benchmarks.registry import BENCHMARKS

    console = Console()
    title = f"{BENCHMARKS[report.benchmark].title}: {', '.join(str(file) for file in files)}"
    groups = list(report.table.items())
    metrics = list(groups[-1][1])
    table = Table("group", box=SIMPLE_HEAD, title=title)
    for metric in metrics:
        table.add_column(_COUNTS.get(metric, metric), justify="right")
    for name, values in [*groups[:-1][:_SHOWN_GROUPS], groups[-1]]:
        table.add_row(name, *(_cell(metric, values[metric]) for metric in metrics))
    console.print(table)
    if len(groups) - 1 > _SHOWN_GROUPS:
        console.print(f"{len(groups) - 1 - _SHOWN_GROUPS} more groups: --out FILE.json lists all", highlight=False)
    if report.bad:
        rows = len(report.bad) + len(report.judged)
        console.print(f"{len(report.bad):,} of {rows:,} rows cannot be scored and do not count:", highlight=False)
        for error in report.bad[:_SHOWN_BAD]:
            console.print(f"  {error}", highlight=False, markup=False, soft_wrap=True)
        if len(report.bad) > _SHOWN_BAD:
            console.print(f"  … and {len(report.bad) - _SHOWN_BAD:,} more: --out FILE.json lists all", highlight=False)


def write(report: "Report", files: Sequence[Path], out: Path) -> None:
    """Write a report as JSON, and every scored row beside it as JSON lines."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"files": [str(file) for file in files], **report.to_json()}
    out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = out.with_suffix(".rows.jsonl")
    with rows.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in report.judged)
    sys.stdout.write(f"wrote {out} and {rows}\n")


def _cell(metric: str, value: float) -> str:
    return f"{value:,.0f}" if metric in _COUNTS else f"{value:.1%}"
