"""What ``evovlm preference build`` does: options to settings, a generator, progress, and a table of what came out.

Imports stand inside the functions: the command line's help pays for none of them.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evovlm.launch.ranks import RankInfo
from evovlm.launch.sampling import (
    SamplingOptions,
    Source,
    check_questions,
    check_source,
    listed_reasons,
    sampling_ranks,
)

if TYPE_CHECKING:
    from rich.console import Console

    from evovlm.engine.preference_settings import BuildSettings


@dataclass(frozen=True)
class Options(SamplingOptions):
    """What the command line says about sampling and pairing; see ``BuildSettings`` and ``Sampling``."""

    method: Literal["correctness", "dropout-ntp"]
    num_samples: int
    max_pairs: int
    max_lines: int
    start_ratio: float
    chosen_from: Path | None

    def settings(self) -> "BuildSettings":
        """Turn them into settings; see there for the errors."""
        from evovlm.data.answers.prompts import PromptStyle
        from evovlm.data.answers.rules import parse_rules
        from evovlm.engine.preference_settings import BuildSettings

        return BuildSettings(
            method=self.method,
            sampling=self.sampling,
            rules=parse_rules(self.verify),
            style=PromptStyle(self.prompt),
            num_samples=self.num_samples,
            max_pairs=self.max_pairs,
            max_lines=self.max_lines,
            start_ratio=self.start_ratio,
            chosen_from=self.chosen_from,
            system_prompt=self.system_prompt,
            limit=self.limit,
            start=self.start,
        )


def check(meta: Path, options: Options, source: Source) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options or the meta JSON."""
    check_questions(meta, options.settings().rules)
    check_source(source)


def build(meta: Path, out: Path, options: Options, source: Source, ranks: RankInfo) -> None:
    """Build preference data as one of the ranks, and print what came out.

    Raises:
        ValueError: As ``build_preferences``; also for what a generator cannot do.
    """
    from rich.console import Console

    from evovlm.engine.preference_build import build_preferences

    started = time.monotonic()
    with sampling_ranks(ranks) as (world, report):
        opener, told = source.opener(world.device), partial(report, "sampling")
        summary = build_preferences(meta, out, options.settings(), world, opener, model=source.name, report=told)
    if ranks.rank == 0:
        _print(summary, out, time.monotonic() - started, Console())


def _print(summary: dict[str, Any], out: Path, seconds: float, console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    judged = summary["method"] == "correctness"
    table = Table("dataset", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{out}: {summary['method']}")
    columns = {"cut off": "cut_off", "pairs": "pairs"}
    if judged:
        columns = {"all right": "all_correct", "none": "all_wrong", "unreadable": "unreadable"}
        columns |= {"format": "format_pairs", "pairs": "pairs"}
    for column in ("questions", *(["right"] if judged else []), *columns):
        table.add_column(column, justify="right")
    for name, counts in summary["datasets"].items():
        share = counts.get("share_correct")
        shown = [f"{counts['questions']:,}", *(["–" if share is None else f"{share:.1%}"] if judged else [])]
        table.add_row(name, *shown, *(f"{counts[key]:,}" for key in columns.values()))
    console.print(table)
    pairs = f"{sum(summary['sets'].values()):,} pairs of {summary['samples']:,} answers in {seconds:.1f} s"
    pairs += listed_reasons({"left out": summary["left_out"], "questions skipped": summary["skipped"]})
    console.print(pairs, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"next: evovlm index {out / 'meta.json'} --kind preference", highlight=False, markup=False, soft_wrap=True
    )
