"""Trains one model on the same real samples in our engine and in transformers under DDP and FSDP2, and compares them.

    samples, weights (``bench_train_samples``) ─┬─► ours: engine, packed, balanced    (``bench_train_ours``)
                                                └─► baselines, eager and compiled     (``bench_train_peers``)
                                                                                      │ steps in turn
    seconds, tokens/s, ratio, MFU, memory, imbalance (``bench_train_report``) ◄───────┤
    losses equal to 1e-4, or an error ◄───────────────────────────────────────────────┘

Every way has forked ranks of its own, of one thread each, that take turns (``bench_train_worlds``). It trains really:
the weights change from step to step, so equal losses show equal gradients and optimizers, too. Each baseline takes
turns with ours, built anew, the eager ones first; a ratio is of times of the same turns.

MFU is model FLOPs (:mod:`evovlm.engine.flops`) over what the ranks' matrix products reach at the model's own shapes,
measured in the same run while all ranks compute (``bench_train_gemm``).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evovlm.data.index import Index
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.flops import Flops, forward_flops, training_flops
from evovlm.engine.model_source import random_weights
from evovlm.launch.bench_train_gemm import GemmRate, gemm_rate
from evovlm.launch.bench_train_ours import OurTrainer
from evovlm.launch.bench_train_peers import WRAPS, PeerTrainer, Way
from evovlm.launch.bench_train_report import Timed, check_losses, compare, table, text_table
from evovlm.launch.bench_train_samples import Task, planner, write_samples
from evovlm.launch.bench_train_worlds import ForkedWorld, WorldTimeoutError
from evovlm.launch.report import make_report
from evovlm.models.hf.save import save_pretrained
from evovlm.models.table import num_parameters
from evovlm.parallel.layout import Zero
from evovlm.parallel.world import World

OURS = "evovlm"


@dataclass(frozen=True)
class Settings:
    """How ways are compared.

    Attributes:
        ranks: Ranks of each way.
        steps: Steps of different samples.
        repetitions: How often each of them is timed in each way.
        zero: ZeRO level of ours.
        batch: Samples of a padded batch of a baseline.
        baselines: Names of those to train (:attr:`Way.name`); None: all eight.
        compile_limit: Seconds that a compiled baseline has for its first step, which compiles, and for each other.
    """

    ranks: int = 2
    steps: int = 2
    repetitions: int = 2
    zero: Zero = 1
    batch: int = 4
    baselines: tuple[str, ...] | None = None
    compile_limit: float = 180.0

    def ways(self) -> list[list[Way]]:
        """The baselines, eager ones first, in rounds that take turns with ours: one in each, for want of memory.

        Raises:
            ValueError: There is no baseline of such a name.
        """
        every = [
            Way(wrap, batch, compiled) for compiled in (False, True) for wrap in WRAPS for batch in (1, self.batch)
        ]
        names = [way.name for way in every]
        wanted = names if self.baselines is None else self.baselines
        unknown = set(wanted) - set(names)
        if unknown:
            raise ValueError(f"bench train: no baseline {sorted(unknown)[0]!r}; there are: {', '.join(names)}")
        return [[way] for way in every if way.name in wanted] or [[]]


@dataclass(frozen=True)
class Work:
    """What the steps are and cost.

    Attributes:
        plans: The plan of each step.
        flops: Model FLOPs of each, forward and backward.
    """

    plans: list[StepPlan]
    flops: list[Flops]

    @classmethod
    def of(cls, data: tuple[Index, Tokenizer], task: Task, settings: Settings) -> "Work":
        """Plan the steps and count them."""
        layout = DataLayout(settings.ranks, task.packs_per_step // settings.ranks)
        planned = planner(data[0], task)
        plans = [planned.plan_step(step, layout) for step in range(settings.steps)]
        forwards = [forward_flops(task.model, p.num_tiles, p.packs.lengths, p.num_supervised) for p in plans]
        return cls(plans, [training_flops(forward, ()) for forward in forwards])


def measure(task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Train in every way.

    Args:
        task: Model and samples.
        settings: How ways are compared.

    Returns:
        See :func:`evovlm.launch.bench_train_report.compare`.

    Raises:
        RuntimeError: A baseline's losses are not ours, or a rank failed.
        ValueError: There is no baseline of such a name.
        FileNotFoundError: A package that brings source material is not installed.
    """
    task, settings = task or Task(), settings or Settings()
    settings.ways()  # raises for names that it does not know
    with tempfile.TemporaryDirectory() as folder:
        data = write_samples(Path(folder), task)
        exported = Path(folder, "exported")
        weights = random_weights(task.model, task.seed)
        save_pretrained(task.model, weights, exported, tokenizer_dir=Path(folder, "tokenizer"))
        _import_peers()
        work = Work.of(data, task, settings)
        ours = partial(OurTrainer, data=data, task=task, steps=settings.steps, zero=settings.zero)
        rounds, rates = [], []
        peer = partial(PeerTrainer, data=data, task=task, steps=settings.steps, directory=exported)
        for ways in settings.ways():
            builds: dict[str, Any] = {OURS: ours, **{way.name: partial(peer, way=way) for way in ways}}
            compiled = any(way.compiled for way in ways)
            warm_up = range(settings.steps) if compiled else range(1)
            limit = settings.compile_limit if compiled else None
            timed, rate = _take_turns(builds, task, settings, work, warm_up, limit)
            check_losses(OURS, timed)
            rounds.append(timed)
            rates.append(rate)
    return {
        **compare(OURS, rounds, rates, work.plans, work.flops),
        "parameters": num_parameters(task.model),
        "ranks": settings.ranks,
        "zero": settings.zero,
        "batch": settings.batch,
        "steps": settings.steps,
        "repetitions": settings.repetitions,
    }


def measure_text(task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Train our engine on samples with images and on text alone, as many rows of the LLM in each step.

    Returns:
        ``vlm_text_efficiency``, model FLOP/s with images over that without; ``with_images`` and ``text_only``, what
        :func:`evovlm.launch.bench_train_report.compare` says of ours.

    Raises:
        RuntimeError: A rank failed.
        FileNotFoundError: A package that brings source material is not installed.
    """
    task, settings = task or Task(), settings or Settings()
    tasks = {"with_images": task, "text_only": task.text_only()}
    with tempfile.TemporaryDirectory() as folder:
        data = {name: write_samples(Path(folder, name), each) for name, each in tasks.items()}
        works = {name: Work.of(data[name], each, settings) for name, each in tasks.items()}
        builds = {
            name: partial(OurTrainer, data=data[name], task=each, steps=settings.steps, zero=settings.zero)
            for name, each in tasks.items()
        }
        timed, rate = _take_turns(builds, task, settings, works["with_images"], range(1), None)
    found = {name: compare(name, [{name: timed[name]}], [rate], work.plans, work.flops) for name, work in works.items()}
    rates = {name: line["ours"]["model_flops_per_second"] for name, line in found.items()}
    return {"vlm_text_efficiency": rates["with_images"] / rates["text_only"], **found}


def _import_peers() -> None:
    """Import before forking what every baseline's ranks need: once, not once a rank."""
    import transformers.models.internvl.modeling_internvl
    import transformers.models.qwen2.modeling_qwen2
    import transformers.trainer_pt_utils  # noqa: F401


def _take_turns(
    builds: Mapping[str, Any],
    task: Task,
    settings: Settings,
    work: Work,
    warm_up: Sequence[int],
    limit: float | None,
) -> tuple[dict[str, Timed], list[GemmRate]]:
    """Train in several ways in turn; a way that takes longer than ``limit`` seconds for a step drops out and says so.

    Returns:
        What each way did, and the rate of matrix products of each rank.
    """
    worlds: dict[str, ForkedWorld] = {}
    timed = {name: Timed() for name in builds}
    try:
        for name, build in builds.items():
            worlds[name] = ForkedWorld(name, settings.ranks, build)
        for world in worlds.values():
            world.call(_ready)  # nothing is timed while others are still being built
        shapes = partial(gemm_rate, model=task.model, plan=work.plans[0])
        rates: list[GemmRate] = next(iter(worlds.values())).call(shapes)
        order = [*warm_up, *(step for _ in range(settings.repetitions) for step in range(settings.steps))]
        for turn, step in enumerate(order):
            for name, world in list(worlds.items()):
                try:
                    turns = world.step(step, **({} if limit is None else {"timeout": limit}))
                except WorldTimeoutError:
                    timed[name].failure = f"not done with its step {turn} after {limit:.0f} s"
                    del worlds[name]
                    continue
                timed[name].add(step, turns, warm_up=turn < len(warm_up))
    finally:
        for world in worlds.values():
            world.close()
    return timed, rates


def _ready(_world: World, _trainer: object) -> None:
    """Answers as soon as a rank is built."""


def run(json_file: Path | None = None, settings: Settings | None = None, *, text_only: bool = False) -> dict[str, Any]:
    """Train and print a table.

    Args:
        json_file: Where to write the report, too.
        settings: How ways are compared.
        text_only: Compare ours with images and without, instead.
    """
    from rich.console import Console

    results = measure_text(settings=settings) if text_only else measure(settings=settings)
    report = make_report("train_text" if text_only else "train", results, json_file)
    made = text_table if text_only else table
    Console().print(made(results, report["machine"]["cpu"]))
    return report
