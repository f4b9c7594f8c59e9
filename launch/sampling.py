"""What commands that sample from a model share: how and which generator, opened when it is needed, and progress.

--model, --backend, --url ─► Source ─► check_source   mistakes show before any rank starts
                                    ─► opener         one model in memory, opened for a tile cap
META, --verify ─► check_questions                     likewise
sampling_ranks ─► (world, report)                     a process group, and a bar for each phase
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evovlm.launch.ranks import RankInfo, process_group

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from evovlm.data.answers.rules import Rules
    from evovlm.data.meta import DatasetMeta
    from evovlm.engine.generation import Generator, Sampling
    from evovlm.parallel.world import World

A_WEEK = 7 * 24 * 3600.0
"""Seconds that ranks wait for one another: they end when their questions do."""

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class SamplingOptions:
    """What the command line says about questions and how answers to them are drawn."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    prompt: str
    verify: Sequence[str]
    limit: int | None
    start: int
    system_prompt: str | None
    seed: int

    @property
    def sampling(self) -> "Sampling":
        """How answers are drawn; see there for the errors."""
        from evovlm.engine.generation import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.max_new_tokens, self.seed)


@dataclass(frozen=True)
class Source:
    """What the command line says about the generator.

    Attributes:
        model: Run, exported directory, or a server's name for it.
        backend: What generates.
        url: Of the server.
        api_key: For the server.
        reuse: Nothing is generated.
    """

    model: str | None
    backend: Literal["evovlm", "transformers", "server"]
    url: str | None = None
    api_key: str | None = None
    reuse: bool = False

    @property
    def name(self) -> str:
        """What samples are attributed to: a server's model, or a folder and what its weights are."""
        from evovlm.engine.model_fingerprint import model_fingerprint

        if self.backend == "server" or self.reuse:
            return str(self.model)
        folder = Path(self.model or "").absolute()
        return f"{folder} ({model_fingerprint(folder)})"

    def open(self, max_tiles: int | None, device: "torch.device") -> "Generator":
        """Open the generator; a server tiles images by its own settings."""
        from evovlm.engine.generation import open_generator

        options: dict[str, Any] = {"device": device, "max_tiles": max_tiles}
        if self.backend == "server":
            options = {"url": self.url, "api_key": self.api_key}
        return open_generator(self.model or "", backend=self.backend, **options)

    def opener(self, device: "torch.device") -> "Callable[[int | None], Generator] | None":
        """Return what opens the generator for a tile cap, and keeps the last one; None if nothing is generated."""
        opened: dict[int | None, Generator] = {}

        def open_generator(max_tiles: int | None) -> "Generator":
            if max_tiles not in opened:
                opened.clear()  # before another copy of the model is read
                opened[max_tiles] = self.open(max_tiles, device)
            return opened[max_tiles]

        return None if self.reuse else open_generator


def check_source(source: Source) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options about the generator."""
    if source.reuse:
        return
    if source.model is None:
        raise ValueError("--model is missing: name a run, an exported model, or a server's model")
    if (source.backend == "server") != (source.url is not None):
        raise ValueError("--backend server and --url go together: the address of an OpenAI-compatible server")
    if source.backend != "server" and not Path(source.model).is_dir():
        raise FileNotFoundError(f"there is no folder {source.model}: --model names a run or an exported model")


def check_questions(meta: Path, rules: "Rules") -> "tuple[DatasetMeta, ...]":
    """Read a meta JSON and see that its answers can be checked.

    Returns:
        Its datasets.

    Raises:
        ValueError: The meta JSON or a dataset of it cannot be used, or a rule is for a dataset that it does not have,
            or needs a package that is missing.
        FileNotFoundError: No such meta JSON.
    """
    from evovlm.data.answers.rules import open_scorers
    from evovlm.data.meta import load_meta

    datasets = load_meta(meta).datasets
    rules.check_datasets(dataset.name for dataset in datasets)
    with open_scorers({rules.of(dataset.name) for dataset in datasets}):
        pass  # a package that a rule needs may be missing
    return datasets


@contextmanager
def sampling_ranks(ranks: RankInfo) -> "Iterator[tuple[World, Callable[[str, int, int], None]]]":
    """Join the other ranks, and give them with what reports progress (see ``phase_progress``).

    Raises:
        ValueError: For a ``GenerationError`` inside the block: what a generator cannot do is a user's mistake.
    """
    from rich.console import Console

    from evovlm.engine.generation import GenerationError

    console = Console(stderr=True)
    with (
        process_group(ranks, timeout=A_WEEK) as world,
        phase_progress(console, show=world.is_main) as report,
    ):
        try:
            yield world, report
        except GenerationError as error:
            raise ValueError(str(error)) from error


@contextmanager
def phase_progress(console: "Console", *, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Give a callback that draws a bar for each phase on a terminal, and prints lines now and then where there is none.

    It is called as (phase, questions done, questions in all), the first time when a phase begins or soon after.
    """
    if not show:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("questions of rank 0"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield draw


def listed_reasons(groups: Mapping[str, Mapping[str, int]]) -> str:
    """Return the end of a line that counts what was left out: ``; left out: 3 duplicates, 1 empty``, or nothing."""
    text = ""
    for what, reasons in groups.items():
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        text += f"; {what}: {listed}" if listed else ""
    return text


class _Lines:
    """Prints how far a phase is, each few seconds and at its end. Phases may take turns: each has its own clock."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.last = self.printed = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
        if done < total and now - self.printed < _SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        rate = done / max(self.seconds[phase], 1e-9)
        self.console.print(f"{phase}: {done} of {total} questions of rank 0, {rate:.1f}/s", highlight=False)
