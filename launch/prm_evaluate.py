"""What ``evovlm prm evaluate`` does: a critic opened, progress, a table of step accuracy, and the numbers as JSON.

Imports stand inside the functions: the command line's help pays for none of them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.sampling import A_WEEK, phase_progress

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 10  # lines that could not be used; --json lists all


@dataclass(frozen=True)
class Options:
    """What the command line says; see :func:`evovlm.engine.step_accuracy.step_accuracy`."""

    model: str
    threshold: float
    mc_threshold: float
    until_first_error: bool
    system_prompt: str | None
    max_tiles: int | None
    image_root: Path | None


def check(files: Sequence[Path], options: Options, json_file: Path | None) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}: STEPS is a .jsonl of solutions with labelled steps")
    if not Path(options.model).is_dir():
        raise FileNotFoundError(f"there is no folder {options.model}: --model names a run or an exported model")
    for name, value in (("--threshold", options.threshold), ("--mc-threshold", options.mc_threshold)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is outside [0, 1): nothing, or everything, would be above it")
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json {json_file} is a folder: name the file to write")


def evaluate(files: Sequence[Path], options: Options, json_file: Path | None, ranks: RankInfo) -> None:
    """Measure a critic as one of the ranks, and print how well it does; errors as ``step_accuracy``."""
    from rich.console import Console

    from evovlm.engine.step_accuracy import step_accuracy
    from evovlm.engine.step_scores import open_critic

    console, started = Console(stderr=True), time.monotonic()
    with process_group(ranks, timeout=A_WEEK) as world, phase_progress(console, show=world.is_main) as report:
        result = step_accuracy(
            files,
            partial(
                open_critic,
                options.model,
                world.device,
                system_prompt=options.system_prompt,
                max_tiles=options.max_tiles,
            ),
            world,
            threshold=options.threshold,
            mc_threshold=options.mc_threshold,
            until_first_error=options.until_first_error,
            image_root=options.image_root,
            report=partial(report, "judging"),
        )
    if ranks.rank:
        return
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        whole = {"model": options.model, "files": [str(file) for file in files], **result}
        json_file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(result, options.model, time.monotonic() - started, Console())


def _print(result: dict[str, Any], model: str, seconds: float, console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    title = f'{model}: a step is "+" above {result["threshold"]:g}'
    table = Table("source", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    columns = ("steps", "accuracy", "macro-F1", "AUC", "+ prec", "+ rec", "- prec", "- rec")
    for column in columns:
        table.add_column(column, justify="right")
    rows = dict(result["sources"]) if len(result["sources"]) > 1 else {}
    rows["overall"] = result["overall"]
    for source, found in rows.items():
        if not found["steps"]:
            table.add_row(source, "0", *["–"] * (len(columns) - 1))
            continue
        table.add_row(
            source,
            f"{found['steps']:,}",
            share(found["accuracy"]),
            share(found["macro_f1"]),
            "–" if found["auc"] is None else f"{found['auc']:.3f}",
            *(share(quality[name]) for quality in found["classes"].values() for name in ("precision", "recall")),
        )
    console.print(table)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    overall, skipped = result["overall"], result["skipped_lines"]
    constant = overall["best_constant"]
    beaten = f"accuracy {share(constant['accuracy'])}, macro-F1 {share(constant['macro_f1'])}"
    say(f'the best constant answer, "{constant["answer"]}" for every step: {beaten}')
    for line in skipped[:_SHOWN]:
        say(f"skipped: {line}")
    if len(skipped) > _SHOWN:
        say(f"skipped: {len(skipped) - _SHOWN} more; --json lists all")
    text = (
        f"{overall['solutions']:,} solutions, {overall['steps']:,} steps, {overall['neutral']:,} neutral ones left out"
    )
    if result["until_first_error"]:
        text += f", {overall['after_error']:,} behind a wrong one not counted"
    if overall["skipped"]:
        text += "; skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in overall["skipped"].items())
    say(f"{text}; {seconds:.1f} s")
