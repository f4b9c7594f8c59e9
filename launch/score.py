"""What ``evovlm score`` does: options to settings, progress, and what came out.

Imports stand inside the functions: the command line's help pays for none of them.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.sampling import A_WEEK, phase_progress

if TYPE_CHECKING:
    from rich.console import Console

    from evovlm.engine.score_candidates import ScoreSettings

_SHOWN = 10  # lines that could not be used; summary.json lists all


@dataclass(frozen=True)
class Options:
    """What the command line says; see ``ScoreSettings``.

    Attributes:
        image_root: Where relative image paths begin.
    """

    model: str
    reduction: str
    system_prompt: str | None
    max_steps: int
    outcome: bool
    max_tiles: int | None
    image_root: Path | None

    def settings(self) -> "ScoreSettings":
        """Turn them into settings; see there for the errors."""
        from evovlm.engine.score_candidates import ScoreSettings

        return ScoreSettings(
            model=self.model,
            reduction=self.reduction,
            system_prompt=self.system_prompt,
            max_steps=self.max_steps,
            outcome=self.outcome,
            max_tiles=self.max_tiles,
        )


def check(candidates: Path, out: Path, options: Options) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options."""
    if not candidates.is_file():
        raise FileNotFoundError(f"there is no file {candidates}: CANDIDATES is a .jsonl of questions with solutions")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name the .jsonl to write")
    if not Path(options.model).is_dir():
        raise FileNotFoundError(f"there is no folder {options.model}: --model names a run or an exported model")
    options.settings()


def score(candidates: Path, out: Path, options: Options, ranks: RankInfo) -> None:
    """Score a candidate file as one of the ranks, and print what came out; errors as ``score_candidates``."""
    from rich.console import Console

    from evovlm.engine.score_candidates import score_candidates

    console, started = Console(stderr=True), time.monotonic()
    # Ranks end when their questions do: the first may have to wait for the last one for days.
    with process_group(ranks, timeout=A_WEEK) as world, phase_progress(console, show=world.is_main) as report:
        summary = score_candidates(
            candidates, out, options.settings(), world, image_root=options.image_root, report=partial(report, "scoring")
        )
    if ranks.rank == 0:
        _print(summary, out, time.monotonic() - started, Console())


def _print(summary: dict[str, Any], out: Path, seconds: float, console: "Console") -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    for line in summary["skipped_lines"][:_SHOWN]:
        say(f"skipped: {line}")
    more = len(summary["skipped_lines"]) - _SHOWN
    if more > 0:
        say(f"skipped: {more} more, all listed in {out}.parts/summary.json")
    text = f"{out}: {summary['scored']:,} of {summary['candidates']:,} candidates of {summary['questions']:,} questions"
    if summary["scored"]:
        text += f" scored, mean reward {summary['mean_reward']:.4f} ({summary['reduction']} over steps)"
    say(f"{text}, {seconds:.1f} s")
    for what, name in (("not scored", "unscored"), ("lines skipped", "skipped")):
        if summary[name]:
            say(f"{what}: " + ", ".join(f"{count:,} {reason}" for reason, count in summary[name].items()))
