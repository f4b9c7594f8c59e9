"""What ``evovlm best-of-n`` does: options to settings, models opened one at a time, progress, and the table.

Imports stand inside the functions: the command line's help pays for none of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    import torch
    from rich.console import Console

    from evovlm.engine.best_of_n_settings import BestOfNSettings
    from evovlm.engine.generation import Generator
    from evovlm.engine.score_candidates import ScoreSettings
    from evovlm.engine.step_scores import Critic


@dataclass(frozen=True)
class Options(SamplingOptions):
    """What the command line says; see ``BestOfNSettings``, ``Sampling`` and ``ScoreSettings``."""

    critics: Sequence[str]
    critic_models: Sequence[str]
    critic_system_prompt: str | None
    max_steps: int
    reduction: str | None
    num: int
    candidates: Path | None
    generate_only: bool

    def settings(self) -> "BestOfNSettings":
        """Turn them into settings; see there for the errors."""
        from evovlm.data.answers.prompts import PromptStyle
        from evovlm.data.answers.rules import parse_rules
        from evovlm.data.selection import critics_named
        from evovlm.engine.best_of_n_settings import BestOfNSettings

        return BestOfNSettings(
            sampling=self.sampling,
            rules=parse_rules(self.verify),
            critics=() if self.generate_only else critics_named(self.critics),
            style=PromptStyle(self.prompt),
            num=self.num,
            system_prompt=self.system_prompt,
            reduction=self.reduction,
            limit=self.limit,
            start=self.start,
        )

    def reward_models(self) -> "dict[str, ScoreSettings]":
        """Read ``[CRITIC=]MODEL``, for the critics that need one; those without are left out.

        Raises:
            ValueError: Two models for one critic, or one that no critic asks for.
        """
        from evovlm.engine.best_of_n_settings import REWARD_MODELS
        from evovlm.engine.score_candidates import ScoreSettings

        given: dict[str, str] = {}
        for word in self.critic_models:
            critic, equals, model = word.partition("=")
            critic, model = (critic, model) if equals and critic in REWARD_MODELS else ("", word)
            if given.setdefault(critic, model) != model:
                raise ValueError(f"two reward models for the same critic, {given[critic]} and {model}: keep one")
        if self.generate_only:
            return {}
        needed = self.settings().reward_models
        for critic, model in given.items():
            if critic not in needed and (critic or not needed):
                raise ValueError(f"--critic-model {model}: no critic asks for it; add --critic {critic or 'prm'}")
        models = {critic: given.get(critic, given.get("")) for critic in needed}
        return {
            critic: ScoreSettings(
                model,
                reduction=self.reduction or "mean",
                system_prompt=self.critic_system_prompt,
                max_steps=self.max_steps,
                outcome=critic == "orm",
            )
            for critic, model in models.items()
            if model is not None
        }


def check(meta: Path, options: Options, source: Source) -> None:
    """Raise a ``ValueError`` or ``FileNotFoundError`` for what is wrong with the options or the files."""
    from evovlm.engine.best_of_n import check_rewards
    from evovlm.engine.best_of_n_candidates import CandidateFile

    settings, models = options.settings(), options.reward_models()
    datasets = check_questions(meta, settings.rules)
    for critic in models.values():
        if not Path(critic.model).is_dir():
            raise FileNotFoundError(f"there is no folder {critic.model}: --critic-model names a run or an export")
    file = None
    if options.candidates is not None:
        if source.model is not None or options.generate_only:
            other = "--model" if source.model is not None else "--generate-only"
            raise ValueError(f"--candidates and {other}: candidates are read from a file, or generated, not both")
        file = CandidateFile(options.candidates, datasets, settings.asking)
    check_rewards(settings, models, file)
    check_source(source)


def measure(meta: Path, out: Path, options: Options, source: Source, ranks: RankInfo) -> None:
    """Measure Best-of-N as one of the ranks, and print the table.

    Raises:
        ValueError: As ``best_of_n``; also for what a generator cannot do.
    """
    from rich.console import Console

    from evovlm.engine.best_of_n import best_of_n

    started, settings = time.monotonic(), options.settings()
    with sampling_ranks(ranks) as (world, report):
        models = _Models(source, options.reward_models(), world.device)
        summary = best_of_n(
            meta,
            out,
            settings,
            world,
            open_generator=None if options.candidates is not None else models.generator,
            candidates=options.candidates,
            model=source.name,
            open_critic=models.critic,
            reward_models={name: model.identity() for name, model in models.critics.items()},
            report=report,
        )
    if ranks.rank == 0:
        _print(summary, meta, out, time.monotonic() - started, Console(), options)


class _Models:
    """Generator and critics, one of them in memory at a time."""

    def __init__(self, source: Source, critics: "dict[str, ScoreSettings]", device: "torch.device") -> None:
        self.source, self.critics, self.device = source, critics, device
        self.opened: dict[tuple[str, int | None], Any] = {}

    def generator(self, max_tiles: int | None) -> "Generator":
        """Open the generator for a tile cap."""
        generator: Generator = self._keep("generator", max_tiles, lambda: self.source.open(max_tiles, self.device))
        return generator

    def critic(self, name: str, max_tiles: int | None) -> "Critic":
        """Open a critic for a tile cap."""
        wanted = replace(self.critics[name], max_tiles=max_tiles)
        critic: Critic = self._keep(name, max_tiles, lambda: wanted.open(self.device))
        return critic

    def _keep(self, name: str, max_tiles: int | None, open_model: Callable[[], Any]) -> Any:
        if (name, max_tiles) not in self.opened:
            self.opened.clear()  # before another model is read
            self.opened[name, max_tiles] = open_model()
        return self.opened[name, max_tiles]


def _print(
    summary: dict[str, Any], meta: Path, out: Path, seconds: float, console: "Console", options: Options
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    columns = ["pass@1", *summary["critics"], "oracle"]
    groups = {name: counts for name, counts in summary["datasets"].items() if "n" in counts}
    if len(groups) > 1:
        groups["all"] = summary["overall"]
    for name, counts in groups.items():
        title = f"{escape(name)}: accuracy in % over {counts['num_questions']:,} questions, ± half its 95 % interval"
        table = Table("n", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for size, cells in counts["n"].items():
            table.add_row(size, *(_percent(cells[column]) for column in columns))
        console.print(table)
    overall = summary["overall"]
    line = f"{overall['num_candidates']:,} candidates to {overall['num_questions']:,} questions in {seconds:.1f} s"
    remarks = {"without an answer": "num_unreadable", "cut off": "num_cut_off", "questions with fewer": "num_fewer"}
    line += "".join(f"; {overall[key]:,} {what}" for what, key in remarks.items() if overall[key])
    line += listed_reasons({"left out": overall["skipped"], "not scored": overall["unscored"]})
    lines = [line]
    if overall["num_unreadable"] == overall["num_candidates"]:
        lines.append(f"no candidate has an answer in the form that --prompt {options.prompt} asks for")
    if options.generate_only:
        lines.append(f"next: evovlm best-of-n {meta} --candidates {out / 'candidates.jsonl'} --out … --critic …")
    for text in lines:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _percent(cell: dict[str, Any]) -> str:
    return f"{100 * cell['mean']:.1f} ±{50 * (cell['high'] - cell['low']):.1f}"
