"""What the quickstart says at its end: a table of tasks, a table of ways to choose, and ``summary.json``.

evaluations by stage ───┐
OUT/best_of_8           ├─► OUT/summary.json, tables
step scores, index      │
seconds of each phase ──┘
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

TaskScores = Mapping[str, Mapping[str, Any]]
"""Task → what ``evovlm evaluate`` says about it."""
_WAYS = {
    "pass@1": "a solution at random",
    "majority": "the most frequent answer",
    "prm": "the best by the process reward model",
    "oracle": "a right one, if there is one",
}


class Finished(Protocol):
    """What is asked of the quickstart: see ``quickstart.Quickstart``."""

    out: Path
    short: bool
    ranks: int
    seed: int
    console: Console
    seconds: dict[str, float]

    @property
    def step_scores(self) -> Path:
        """Where it says how well steps are judged."""
        ...


def summarize(run: Finished, scores: Mapping[str, TaskScores]) -> None:
    """Write ``summary.json`` and print what was learned.

    Args:
        run: The finished quickstart.
        scores: By the name of the model's state: ``before``, then one for each stage.
    """
    made = json.loads((run.out / "data" / "summary.json").read_text())["tasks"]
    tasks = {
        task: {
            **{name: by_task[task]["exact_match"] for name, by_task in scores.items()},
            "constant_baseline": final["constant_baseline"],
            "num_train": made[task]["num_train"],
            "num_test": final["num_test"],
        }
        for task, final in scores["mpo"].items()
    }
    choosing = json.loads((run.out / "best_of_8" / "summary.json").read_text())["datasets"]["steps"]
    steps = json.loads(run.step_scores.read_text())["overall"]
    summary = {
        "tasks": tasks,
        "pairs": json.loads((run.out / "index" / "mpo" / "index.json").read_text())["num_samples"],
        "best_of_8": choosing["n"]["8"],
        "steps": steps,
        "short": run.short,
        "ranks": run.ranks,
        "seed": run.seed,
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    run.console.print(_tasks(tasks, list(scores)))
    run.console.print(_choices(choosing["n"]["8"], choosing["num_questions"]))
    run.console.print(_judged(steps), highlight=False, soft_wrap=True)
    _show_answers(run)
    run.console.print(f"summary: {run.out / 'summary.json'}", highlight=False)
    run.console.print(f"the model, for transformers: {run.out / 'mpo' / 'export'}", highlight=False)
    run.console.print(f"the process reward model: {run.out / 'prm' / 'export'}", highlight=False)


def _tasks(tasks: Mapping[str, Mapping[str, Any]], states: list[str]) -> Table:
    table = Table("task", box=SIMPLE_HEAD, title="Exact match on held-out questions")
    for column in ("best constant", "before", "pre-trained", "after SFT", "after MPO", "train", "test"):
        table.add_column(column, justify="right")
    for task, row in tasks.items():
        shares = (f"{row[key]:.1%}" for key in ("constant_baseline", *states))
        table.add_row(task, *shares, f"{row['num_train']:,}", f"{row['num_test']:,}")
    return table


def _choices(by_way: Mapping[str, Mapping[str, float]], num_questions: int) -> Table:
    table = Table(
        "choice among 8",
        box=SIMPLE_HEAD,
        title=f"Right answers to {num_questions} held-out questions of the task steps",
    )
    for column in ("share", "95 % interval"):
        table.add_column(column, justify="right")
    for way, name in _WAYS.items():
        share = by_way[way]
        table.add_row(name, f"{share['mean']:.1%}", f"{share['low']:.1%} – {share['high']:.1%}")
    return table


def _judged(steps: Mapping[str, Any]) -> str:
    constant = steps["best_constant"]
    return (
        f"{steps['accuracy']:.1%} of {steps['steps']:,} held-out steps judged right, macro-F1 {steps['macro_f1']:.3f} "
        f"(always {constant['answer']!r}: {constant['accuracy']:.1%}, {constant['macro_f1']:.3f})"
    )


def _show_answers(run: Finished, per_task: int = 2) -> None:
    files = sorted((run.out / "mpo" / "evaluations").glob("*.answers.jsonl"))
    shown: dict[str, int] = {}
    for line in files[-1].read_text().splitlines():
        answer = json.loads(line)
        if shown.setdefault(answer["task"], 0) < per_task:
            shown[answer["task"]] += 1
            mark = "right" if answer["correct"] else "wrong"
            text = f"  {answer['name']}: expected {answer['expected']!r}, answered {answer['given']!r} ({mark})"
            run.console.print(text, highlight=False, markup=False)
