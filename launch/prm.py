"""What ``evovlm prm build`` does: options to settings, a generator, progress, and a table of what came out.

Imports stand inside the functions: the command line's help pays for none of them.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    from evovlm.engine.prm_settings import PrmSettings


@dataclass(frozen=True)
class Options(SamplingOptions):
    """What the command line says about solutions, rollouts and labels; see ``PrmSettings`` and ``Sampling``."""

    num_solutions: int | None
    num_rollouts: int
    max_steps: int
    early_stop: bool
    mc_threshold: float
    until_first_error: bool
    outcome: bool
    prm_system_prompt: str | None
    solutions: Path | None

    def settings(self) -> "PrmSettings":
        """Turn them into settings; see there for the errors."""
        from evovlm.data.answers.prompts import PromptStyle
        from evovlm.data.answers.rules import parse_rules
        from evovlm.data.solution_steps import PRM_SYSTEM_PROMPT
        from evovlm.engine.prm_settings import PrmSettings

        return PrmSettings(
            sampling=self.sampling,
            rules=parse_rules(self.verify),
            style=PromptStyle(self.prompt),
            num_solutions=self.num_solutions,
            num_rollouts=self.num_rollouts,
            max_steps=self.max_steps,
            early_stop=self.early_stop,
            mc_threshold=self.mc_threshold,
            until_first_error=self.until_first_error,
            outcome=self.outcome,
            prm_system_prompt=PRM_SYSTEM_PROMPT if self.prm_system_prompt is None else self.prm_system_prompt or None,
            solutions=self.solutions,
            system_prompt=self.system_prompt,
            limit=self.limit,
            start=self.start,
        )


def check(meta: Path, options: Options, source: Source) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options or the meta JSON."""
    check_questions(meta, options.settings().rules)
    check_source(source)


def build(meta: Path, out: Path, options: Options, source: Source, ranks: RankInfo) -> None:
    """Build process reward data as one of the ranks, and print what came out.

    Raises:
        ValueError: As ``build_prm``; also for what a generator cannot do.
    """
    from rich.console import Console

    from evovlm.engine.prm_build import build_prm

    started = time.monotonic()
    with sampling_ranks(ranks) as (world, report):
        opener = source.opener(world.device)
        summary = build_prm(meta, out, options.settings(), world, opener, model=source.name, report=report)
    if ranks.rank == 0:
        _print(summary, out, time.monotonic() - started, Console())


def _print(summary: dict[str, Any], out: Path, seconds: float, console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def share(part: int, whole: int) -> str:
        return f"{part / whole:.1%}" if whole else "–"

    table = Table("dataset", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{out}: {summary['method']}")
    for column in ("questions", "right", "cut off", "rollouts", "kept", "steps", '"+"'):
        table.add_column(column, justify="right")
    for name, counts in summary["datasets"].items():
        numbers = [f"{counts[key]:,}" for key in ("cut_off", "rollouts", "conversations", "steps")]
        right, good = share(counts["correct"], counts["solutions"]), share(counts["good"], counts["steps"])
        table.add_row(name, f"{counts['questions']:,}", right, *numbers, good)
    console.print(table)
    by_step = ", ".join(f"{row['step']}: {row['share_good']:.0%} of {row['steps']:,}" for row in summary["by_step"])
    lines = [f'"+" by step: {by_step}']
    made = f"{summary['conversations']:,} conversations of {summary['solutions']:,} solutions"
    left = listed_reasons({"left out": summary["left_out"], "questions skipped": summary["skipped"]})
    lines.append(f"{made}, {summary['rollouts']:,} rollouts, in {seconds:.1f} s{left}")
    if unusable := summary["unusable_lines"]["count"]:
        first = summary["unusable_lines"]["first"][0]
        lines.append(f"{unusable:,} lines of the candidate file cannot be used; the first: {first}")
    if summary["good"] in (0, summary["steps"]):
        only = "+" if summary["good"] else "-"
        lines.append(f'every step is "{only}": there is nothing to learn from; see --mc-threshold and --verify')
    lines.append(f"next: evovlm index {out / 'meta.json'}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
