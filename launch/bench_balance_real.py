"""Trains real steps on forked gloo ranks with balance on and off: seconds of a step, and how long ranks are idle.

    rank 0   encode ▓▓▓▓▓▓▓▓│ LLM ▓▓▓▓    │ gradients of tiles ▓▓▓▓▓▓▓▓│     the step ends with the slowest rank
    rank 1   encode ▓       │ LLM ▓▓▓▓▓▓▓▓│ gradients of tiles ▓       │     ▓ busy: processor time of the rank
                     idle              idle                    idle          idle share = 1 - busy / step

All ways (``bench_balance_real_step.py``) run the same steps in turn with a learning rate of 0: whole optimizer steps
from the same weights, so their losses must be equal. Data is loaded and images are decoded before.

Ranks compute on one thread each. Waiting for another rank takes no processor time, which is measured, too
(``waiting_cpu``). **Where ranks are more than cores**, a rank that waits lends its core to another: the step with
balance off takes less time than it would on a core for each rank, and every rank seems idle while its core works for
another. What would bound the step there is told apart: ``bound_seconds``, the processor time of the busiest rank in
each of the phases above and in the optimizer, added up. Ranks are never a phase apart, since ZeRO's gathers and
reductions wait for all; inside the LLM's phase they wait in every microbatch, so a step takes a little longer than the
bound. What other programs take of the cores counts as idle time in the step, too, but not in the bound.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from evovlm.data.index import Index
from evovlm.data.step_plan import StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import random_weights
from evovlm.engine.settings import OptimSettings
from evovlm.launch.bench_balance_real_step import WAYS, Mix, load, write_data
from evovlm.launch.ranks import num_cores
from evovlm.launch.report import make_report
from evovlm.models.internvl import InternVL
from evovlm.models.table import num_parameters
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan, Zero
from evovlm.parallel.world import World

PHASES = ("encode", "llm", "return", "optimizer")
TOLERANCE = 1e-5
_PROBE = 0.5  # seconds that all ranks but one wait, to see what waiting costs
_NAMES = {"off": "off", "vision_only": "vision", "llm_only": "LLM", "on": "on"}
_CAPTION = (
    "seconds; bound: processor time of the busiest rank in each phase, added up\n"
    "idle: % of the slowest and the fastest rank; LLM, tiles: largest / mean load"
)
Floats = NDArray[np.float64]


@dataclass
class Timed:
    """What a rank did in the steps of all repetitions.

    Attributes:
        wall: float64 ``[ways, repetitions, steps]``, seconds until the rank had taken the step.
        busy: float64 ``[ways, repetitions, steps, phases]``, seconds of processor time of the rank, all threads.
        losses: float64 ``[ways, repetitions, steps]``.
        plans: For each way, the plan of each step.
        waiting_cpu: Processor time per second of waiting for another rank.
    """

    wall: Floats
    busy: Floats
    losses: Floats
    plans: list[list[StepPlan]]
    waiting_cpu: float


@dataclass
class _Clocked:
    """A part of the engine; the processor time of some of its calls is added up by phase."""

    part: object
    phases: dict[str, str]
    spent: dict[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.part, name)
        return partial(self._call, self.phases[name], value) if name in self.phases else value

    def _call(self, phase: str, call: Callable[..., Any], *args: Any) -> Any:
        began = time.process_time()
        result = call(*args)
        self.spent[phase] = time.process_time() - began
        return result


def measure(
    ranks: Sequence[int] = (2, 4), steps: int = 6, repetitions: int = 3, mix: Mix | None = None, zero: Zero = 2
) -> dict[str, Any]:
    """Make data and train on it in every way, on each number of ranks.

    Args:
        ranks: Numbers of ranks to fork; each divides the packs of a step.
        steps: Steps that are timed.
        repetitions: How often each of them is timed in each way.
        mix: Data and model.
        zero: ZeRO level of all modules, which are data parallel over all ranks.

    Returns:
        ``ranks``: for each number what :func:`summarize` says of it; the settings; ``load_average`` of the machine
        over the last minute, before and after.

    Raises:
        RuntimeError: Two ways had different losses.
    """
    mix = mix or Mix()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        index, tokenizer = write_data(Path(folder), mix, num_cores())
        decoder = replace(mix.model.decoder, vocab_size=tokenizer.vocab_size)
        mix = replace(mix, model=replace(mix.model, decoder=decoder))
        found = {str(r): _measure(r, (index, tokenizer), mix, zero, steps, repetitions) for r in ranks}
    return {
        "ranks": found,
        "mix": asdict(mix),
        "parameters": num_parameters(mix.model),
        "zero": zero,
        "steps": steps,
        "repetitions": repetitions,
        "load_average": [before, os.getloadavg()[0]],
    }


def _measure(
    ranks: int, data: tuple[Index, Tokenizer], mix: Mix, zero: Zero, steps: int, repetitions: int
) -> dict[str, Any]:
    work = partial(_train, data=data, mix=mix, zero=zero, steps=steps, repetitions=repetitions)
    return summarize(run_ranks(ranks, work, timeout=1800.0))


def _train(world: World, data: tuple[Index, Tokenizer], mix: Mix, zero: Zero, steps: int, repetitions: int) -> Timed:
    """One rank's part: steps in every way, in turn, each way first as often as another."""
    layout = Layout(dp=world.size, zero=zero)
    engine = Engine.build(
        lambda: InternVL(mix.model),
        ParallelPlan.for_llm(layout),
        world,
        optim=OptimSettings(lr=1e-3),
        weights=random_weights(mix.model, mix.seed),
    )
    spent: dict[str, float] = {}
    engine.vision = cast(Any, _Clocked(engine.vision, {"encode": "encode", "backward": "return"}, spent))
    engine.language = cast(Any, _Clocked(engine.language, {"train": "llm"}, spent))
    loaded = [list(load(data, mix, way, world.rank, world.size, steps)) for way in WAYS]
    for batches in loaded:  # warms up
        engine.train_step(batches[0][1], batches[0][0].loss_denominator, lr_factor=0.0)
    wall, losses = np.empty((2, len(WAYS), repetitions, steps))
    busy = np.empty((*wall.shape, len(PHASES)))
    for repetition in range(repetitions):
        for step in range(steps):
            for turn in range(len(WAYS)):
                way = (turn + repetition + step) % len(WAYS)
                plan, batch = loaded[way][step]
                world.barrier()
                began, began_busy = time.perf_counter(), time.process_time()
                result = engine.train_step(batch, plan.loss_denominator, lr_factor=0.0)
                total = time.process_time() - began_busy
                wall[way, repetition, step] = time.perf_counter() - began
                losses[way, repetition, step] = result.loss
                rest = total - sum(spent.values())
                busy[way, repetition, step] = [spent.get(phase, rest) for phase in PHASES]
    plans = [[plan for plan, _ in batches] for batches in loaded]
    return Timed(wall, busy, losses, plans, _probe_waiting(world))


def _probe_waiting(world: World) -> float:
    """Let all ranks wait for the last one; return the processor time that this takes, per second."""
    world.barrier()
    began, began_busy = time.perf_counter(), time.process_time()
    if world.rank == world.size - 1:
        time.sleep(_PROBE)
    dist.all_reduce(torch.zeros(1))
    return (time.process_time() - began_busy) / (time.perf_counter() - began)


def summarize(ranks: Sequence[Timed]) -> dict[str, Any]:
    """Sum up what the ranks of one world measured.

    A number of a step is the median over its repetitions; steps are then added up. "Largest" is of the ranks, in each
    step.

    Returns:
        By way: ``step_seconds``, mean over steps; ``spread``, (largest - least) / median over repetitions of all steps'
        seconds; ``bound_seconds``, see the head of this file; ``idle``, the share of the step in which the ``slowest``
        and the ``fastest`` rank are not busy, ``idle_of_bound``, the same of the bound; largest over mean of ranks:
        ``busy_imbalance``, of processor time, ``phase_imbalance``, of that in a phase, ``llm_imbalance`` and
        ``tiles_imbalance``, of the plan's loads. On over off: ``ratio`` of step seconds, ``bound_ratio``. ``packs``:
        tiles, and LLM cost over the mean, of each pack of the first step; ``loss`` of each step; ``waiting_cpu``,
        processor time per second of waiting for another rank.

    Raises:
        RuntimeError: Two ways had different losses.
    """
    losses = ranks[0].losses
    wanted = losses[0, 0]
    if not np.allclose(losses, wanted, rtol=TOLERANCE, atol=0.0):
        raise RuntimeError(
            f"bench balance: losses of {', '.join(WAYS)} differ: {losses.tolist()}; they train on the same samples"
        )
    wall = np.max([rank.wall for rank in ranks], axis=0)  # a step ends when its last rank does
    seconds = np.median(wall, axis=1)  # [ways, steps]
    busy = np.median([rank.busy for rank in ranks], axis=2)  # [ranks, ways, steps, phases]
    whole = busy.sum(-1)
    bound = busy.max(0).sum((1, 2)) / seconds.shape[1]
    loads = {
        "busy_imbalance": whole,
        "llm_imbalance": _loads(ranks[0].plans, "llm_load"),
        "tiles_imbalance": _loads(ranks[0].plans, "vit_load"),
    }
    spread = np.ptp(wall.sum(2), axis=1) / np.median(wall.sum(2), axis=1)
    on, off = WAYS.index("on"), WAYS.index("off")
    first = ranks[0].plans[off][0]
    return {
        "step_seconds": _by_way(seconds.mean(1)),
        "ratio": float(seconds[on].sum() / seconds[off].sum()),
        "spread": _by_way(spread),
        "bound_seconds": _by_way(bound),
        "bound_ratio": float(bound[on] / bound[off]),
        "idle": _idle(whole, seconds.mean(1)),
        "idle_of_bound": _idle(whole, bound),
        **{name: _by_way(_over_mean(load)) for name, load in loads.items()},
        "phase_imbalance": {
            way: {phase: float(_over_mean(busy[..., p])[w]) for p, phase in enumerate(PHASES)}
            for w, way in enumerate(WAYS)
        },
        "packs": {
            "tiles": first.packs.num_tiles.tolist(),
            "llm_cost": (first.pack_costs / first.pack_costs.mean()).tolist(),
        },
        "loss": wanted.tolist(),
        "waiting_cpu": statistics.mean(rank.waiting_cpu for rank in ranks[:-1]),
    }


def _by_way(values: Floats) -> dict[str, float]:
    return dict(zip(WAYS, values.tolist(), strict=True))


def _idle(busy: Floats, seconds: Floats) -> dict[str, dict[str, float]]:
    """Share of a step, ``[ways]`` seconds, in which the busiest and the least busy rank, ``[ranks, ways, steps]``, are
    idle.
    """
    slowest, fastest = (1 - times.mean(1) / seconds for times in (busy.max(0), busy.min(0)))
    pairs = zip(slowest.tolist(), fastest.tolist(), strict=True)
    return {way: {"slowest": s, "fastest": f} for way, (s, f) in zip(WAYS, pairs, strict=True)}


def _loads(plans: list[list[StepPlan]], name: str) -> Floats:
    """Loads that the plans of every way and step name: float64 ``[ranks, ways, steps]``."""
    return np.moveaxis(np.array([[getattr(plan, name) for plan in steps] for steps in plans], np.float64), 2, 0)


def _over_mean(load: Floats) -> Floats:
    """Largest over mean of the ranks, the steps' added up: ``[ranks, ways, steps]`` to ``[ways]``."""
    largest: Floats = load.max(0).sum(1) / load.mean(0).sum(1)
    return largest


def table(results: dict[str, Any], cpu: str) -> Any:
    """Lay :func:`measure`'s results out as a rich table; ``cpu`` names the processor."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    cores = num_cores()
    few = any(int(r) > cores for r in results["ranks"])
    shared = f"\nmore ranks than the {cores} cores: idle ranks lend theirs, see the bound instead" if few else ""
    caption = f"{_CAPTION}{shared}\n{cpu}"
    table = Table("ranks", "balance", box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    for heading in ("step", "/ off", "idle", "bound", "/ off", "idle", "LLM", "tiles"):
        table.add_column(heading, justify="right")
    for r, line in results["ranks"].items():
        for way in WAYS:
            cells = [r if way == WAYS[0] else "", _NAMES[way]]
            for name, idle in (("step_seconds", "idle"), ("bound_seconds", "idle_of_bound")):
                value, shares = line[name][way], line[idle][way]
                cells += [f"{value:.2f}", f"{value / line[name]['off']:.2f}"]
                cells.append("–".join(f"{100 * shares[which]:.0f}" for which in ("slowest", "fastest")))
            cells += [f"{line[f'{load}_imbalance'][way]:.2f}" for load in ("llm", "tiles")]
            table.add_row(*cells, end_section=way == WAYS[-1])
    return table


def run(
    json_file: Path | None = None, ranks: Sequence[int] = (2, 4), steps: int = 6, repetitions: int = 3
) -> dict[str, Any]:
    """Train with balance on and off and print a table.

    Args:
        json_file: Where to write the report, too.
        ranks: Numbers of ranks to fork.
        steps: Steps that are timed.
        repetitions: How often each of them is timed in each way.
    """
    from rich.console import Console

    report = make_report("balance_real", measure(ranks, steps, repetitions), json_file)
    Console().print(table(report["results"], report["machine"]["cpu"]))
    return report
