"""Shows how far the building of an index is: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evovlm.data.build_index import Progress as Report


@contextmanager
def show_progress(console: Console | None = None, *, seconds_between_lines: float = 10.0) -> Iterator[Report]:
    """Give a callback for ``build_index`` that draws a bar, or prints a line now and then where there is no terminal.

    Args:
        console: where to show it; default: standard error.
        seconds_between_lines: least time between two plain lines; the last state is always printed.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines(console, seconds_between_lines)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lines"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("index", total=None)

        def draw(dataset: str, done: int, total: int) -> None:
            bar.update(task, description=dataset, completed=done, total=total)

        yield draw


class _PlainLines:
    """Prints ``index 'chart': 2048 of 10000 lines, 1800/s`` at most every few seconds."""

    def __init__(self, console: Console, seconds_between: float) -> None:
        self.console = console
        self.seconds_between = seconds_between
        self.started = self.last = time.monotonic()

    def __call__(self, dataset: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last < self.seconds_between:
            return
        self.last = now
        rate = done / max(now - self.started, 1e-9)
        self.console.print(f"index '{dataset}': {done} of {total} lines, {rate:.0f}/s", highlight=False)
