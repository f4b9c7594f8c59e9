"""``evovlm evaluate DIR --suite``: runs lmms-eval or lm-evaluation-harness on an exported model, collects its results.

DIR ─┬─ lmms-eval ── the model as it is (transformers' format) ──────────────┐
     └─ lm-eval ──── its language model, written to OUT/language-model first ─┴─► python -m SUITE … (a process)
                                                                                      │ OUT/SUITE/…results….json
                                                                                      ▼
                                                                a table, OUT/SUITE.json {"tasks": {task: {metrics, …}}}
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evovlm.launch.ranks import RankInfo

LANGUAGE_MODEL = "language-model"
_NO_METRICS = ("sample_len", "sample_count", "samples")


@dataclass(frozen=True)
class Suite:
    """A collection of benchmarks that somebody else maintains.

    Attributes:
        name: As on the command line; also how pip calls it.
        module: What ``python -m`` starts.
        model: Its name for a model of the kind that evovlm exports.
        about: What it is, for messages.
    """

    name: str
    module: str
    model: str
    about: str


SUITES = {
    "lmms-eval": Suite("lmms-eval", "lmms_eval", "internvl_hf", "benchmarks with images and videos"),
    "lm-eval": Suite("lm-eval", "lm_eval", "hf", "language benchmarks"),
}


@dataclass(frozen=True)
class SuiteOptions:
    """What the command line says.

    Attributes:
        suite: Name of the suite.
        tasks: Its tasks, as it calls them.
        arguments: More options for it, appended as they are; one given twice counts as given last.
        out: Folder for results.
        python: Interpreter of the environment that the suite is installed in.
        ranks: Processes, started by accelerate; 1: no launcher.
    """

    suite: str
    tasks: tuple[str, ...]
    arguments: tuple[str, ...]
    out: Path
    python: str
    ranks: int = 1


def parse_options(
    target: Path,
    suite: str,
    tasks: str | None,
    arguments: str | None,
    out: Path | None,
    python: Path | None,
    ranks: int | None,
) -> SuiteOptions:
    """Check what the command line says.

    Raises:
        ValueError: No tasks, or unbalanced quotes in the suite's own options.
    """
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if not names:
        raise ValueError(f"--suite {suite} needs --tasks, such as --tasks mmmu_val,chartqa")
    try:
        more = tuple(shlex.split(arguments or ""))
    except ValueError as error:
        raise ValueError(f"--suite-args {arguments!r}: {error}") from error
    return SuiteOptions(suite, names, more, out or target / "evaluations", str(python or sys.executable), ranks or 1)


def command(target: Path, options: SuiteOptions) -> list[str]:
    """Build the command that runs a suite on an exported model.

    Raises:
        FileNotFoundError: The target is no directory of a model.
        ValueError: It is a run, or exported in a format that the suite cannot load.
    """
    suite = SUITES[options.suite]
    model, more = _model(target, options)
    start = ["-m", suite.module]
    if options.ranks > 1:
        start = ["-m", "accelerate.commands.launch", "--num_processes", str(options.ranks), *start]
    return [
        *(options.python, *start),
        *("--model", suite.model, "--model_args", ",".join([f"pretrained={model}", *more])),
        *("--tasks", ",".join(options.tasks)),
        *("--batch_size", "1"),
        *("--output_path", str(options.out / suite.name)),
        *(() if "--device" in options.arguments else ("--device", _device())),
        *options.arguments,
    ]


def run(target: Path, options: SuiteOptions) -> dict[str, Any]:
    """Run a suite and collect what it has measured.

    Returns:
        What ``OUT/SUITE.json`` holds: ``{"suite", "target", "tasks": {task: {"metrics": {metric: {"value", "stderr"}},
        "num", "command", "results"}}}``; tasks of earlier calls stay.

    Raises:
        FileNotFoundError: The target is no directory of a model.
        ValueError: See ``command``; the suite is not installed, fails, or leaves no results.
    """
    suite = SUITES[options.suite]
    words = command(target, options)
    _check_installed(suite, options.python)
    raw = options.out / suite.name
    raw.mkdir(parents=True, exist_ok=True)
    if _needs_language_model(target, options):
        from evovlm.engine.evaluate_language import current_language_model

        current_language_model(target, options.out / LANGUAGE_MODEL)
    before = set(_results_in(raw))
    ended = subprocess.run(words, check=False)
    if ended.returncode:
        raise ValueError(f"{suite.name} ended with exit code {ended.returncode}; what it said stands above")
    new = [file for file in _results_in(raw) if file not in before]
    if not new:
        raise ValueError(f"{suite.name} reported no failure, but left no results in {raw}; what it said stands above")
    file = max(new, key=lambda path: path.stat().st_mtime_ns)
    return _collect(target, options, words, file)


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Read a result file of either suite.

    Returns:
        ``{task: {"metrics": {metric: {"value", "stderr"}}, "num"}}``; a metric that comes from another filter than
        "none" is named "metric (filter)"; ``stderr`` and ``num`` are None where the suite does not say them.

    Raises:
        ValueError: The file is no such JSON.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results = content["results"]
        counts = content.get("n-samples") or {}
        return {task: {"metrics": _metrics(values), "num": _num(counts.get(task))} for task, values in results.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no result file of a suite: {error!r}") from error


def show(result: dict[str, Any], tasks: Sequence[str] | None = None) -> None:
    """Print the metrics of tasks, by default of all."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", box=SIMPLE_HEAD, title=f"{result['target']}: {result['suite']}")
    for column in ("value", "± standard error", "questions"):
        table.add_column(column, justify="right")
    for task, found in result["tasks"].items():
        if tasks is not None and task not in tasks:
            continue
        for metric, one in found["metrics"].items():
            stderr = "" if one["stderr"] is None else f"{one['stderr']:.4f}"
            num = "" if found["num"] is None else f"{found['num']:,}"
            table.add_row(task, metric, f"{one['value']:.4f}", stderr, num)
    Console().print(table)


def evaluate_suite(target: Path, options: SuiteOptions, *, dry_run: bool) -> None:
    """Run a suite, print its table and where the results are; or print the command only.

    Raises:
        FileNotFoundError: See ``run``.
        ValueError: See ``run``; or this process is one of several ranks.
    """
    if RankInfo.from_environment().launched:
        raise ValueError("a suite starts its processes itself: leave the launcher out and give --ranks")
    if dry_run:
        sys.stdout.write(shlex.join(command(target, options)) + "\n")
        return
    result = run(target, options)
    show(result, result["newest"])
    sys.stdout.write(f"wrote {options.out / options.suite}.json\n")


def _model(target: Path, options: SuiteOptions) -> tuple[Path, list[str]]:
    """Return the directory that the suite shall load, and what else it must be told of the model."""
    kind = _kind(target)
    if options.suite == "lm-eval":
        return (options.out / LANGUAGE_MODEL if _needs_language_model(target, options) else target), []
    if kind != "transformers":
        raise ValueError(
            f"{target} is in format '{kind}', which lmms-eval could load only by running code from outside: "
            "export it with --format transformers"
        )
    return target, _tiles(target)


def _needs_language_model(target: Path, options: SuiteOptions) -> bool:
    return options.suite == "lm-eval" and _kind(target) in ("internvl", "transformers")


def _kind(target: Path) -> str:
    from evovlm.models.hf.load import detect

    if not target.is_dir():
        raise FileNotFoundError(f"no directory of a model at {target}")
    if (target / "settings.json").is_file() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is a run, which no suite can load: evovlm export {target} DIR, then evaluate DIR")
    return detect(target)


def _tiles(target: Path) -> list[str]:
    """Say how many tiles an image may have: the suite would otherwise take 12, whatever the model was trained with."""
    file = target / "preprocessor_config.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    return [f"{key}={content[key]}" for key in ("min_patches", "max_patches") if key in content]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_installed(suite: Suite, python: str) -> None:
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({suite.module!r}) is None)"
    try:
        missing = subprocess.run([python, "-c", look], check=False).returncode
    except OSError as error:
        raise ValueError(f"--suite-python {python} cannot be started: {error.strerror}") from error
    if missing:
        raise ValueError(
            f"{suite.name} ({suite.about}) is not installed for {python}: pip install {suite.name}, there or in an "
            "environment of its own whose interpreter --suite-python names"
        )


def _results_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*.json") if file.stem.startswith("results") or file.stem.endswith("results")]


def _collect(target: Path, options: SuiteOptions, words: Sequence[str], file: Path) -> dict[str, Any]:
    found = read_results(file)
    collected = options.out / f"{options.suite}.json"
    there = json.loads(collected.read_text()) if collected.is_file() else {}
    earlier = there["tasks"] if there.get("target") == str(target) else {}  # no table of two models
    about = {"command": shlex.join(words), "results": str(file)}
    tasks = earlier | {task: values | about for task, values in found.items()}
    result = {"suite": options.suite, "target": str(target), "newest": list(found), "tasks": tasks}
    collected.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        is_metric = name not in _NO_METRICS and "_stderr" not in name
        if is_metric and isinstance(value, int | float) and not isinstance(value, bool):
            stderr = values.get(f"{name}_stderr,{filtered}" if filtered else f"{name}_stderr")
            shown = name if filtered in ("", "none") else f"{name} ({filtered})"
            metrics[shown] = {"value": float(value), "stderr": stderr if isinstance(stderr, int | float) else None}
    return metrics


def _num(counts: Any) -> int | None:
    if isinstance(counts, dict):
        counts = counts.get("effective", counts.get("original"))
    return counts if isinstance(counts, int) else None
