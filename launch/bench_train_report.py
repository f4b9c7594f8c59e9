"""What ``bench train`` says of its turns: losses that must agree, seconds, rates, memory and imbalance.

turns of a way ─► seconds of a step: slowest rank ─► least and median over repetitions ─► mean over steps
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evovlm.data.step_plan import StepPlan
from evovlm.engine.flops import Flops
from evovlm.launch.bench_train_gemm import GemmRate
from evovlm.launch.bench_train_worlds import Turn

TOLERANCE = 1e-4


@dataclass
class Timed:
    """What a way did.

    Attributes:
        losses: Of every step that it has taken, in order.
        turns: Step → what the ranks did, each time it was timed.
        failure: Why it was given up, if it was.
    """

    losses: list[float] = field(default_factory=list)
    turns: dict[int, list[list[Turn]]] = field(default_factory=dict)
    failure: str | None = None

    def add(self, step: int, turns: list[Turn], *, warm_up: bool) -> None:
        """Note a turn; the times of a warm-up do not count."""
        self.losses.append(turns[0].loss)
        if not warm_up:
            self.turns.setdefault(step, []).append(turns)

    def seconds(self, of: Callable[[list[float]], float] = min) -> float:
        """Seconds of a step, mean over steps; ``of`` picks one of the repetitions' of each."""
        return statistics.mean(of([max(turn.wall for turn in ranks) for ranks in each]) for each in self.turns.values())

    def imbalance(self) -> float:
        """Processor time of the busiest rank over the mean of the ranks, all steps and repetitions added up."""
        every = [[turn.busy for turn in ranks] for each in self.turns.values() for ranks in each]
        return sum(max(ranks) for ranks in every) / sum(statistics.mean(ranks) for ranks in every)

    def peak_bytes(self) -> int:
        """Most memory of a rank in any timed turn."""
        return max(turn.peak_bytes for each in self.turns.values() for ranks in each for turn in ranks)


def check_losses(ours: str, timed: dict[str, Timed]) -> None:
    """Make sure that all ways did the same work.

    Raises:
        RuntimeError: A way's losses differ from ours by more than 1e-4 of them.
    """
    wanted = timed[ours].losses
    for name, way in timed.items():
        # A way that was given up has fewer steps.
        for step, (theirs, loss) in enumerate(zip(way.losses, wanted, strict=False)):
            if not abs(theirs - loss) <= TOLERANCE * abs(loss):
                raise RuntimeError(
                    f"bench train: loss of {name} in its step {step} is {theirs:.6f}, that of {ours} {loss:.6f}: they "
                    f"differ by more than {TOLERANCE:g}, so they do not train on the same samples in the same way"
                )


def compare(
    ours: str,
    rounds: Sequence[dict[str, Timed]],
    rates: Sequence[Sequence[GemmRate]],
    plans: Sequence[StepPlan],
    flops: Sequence[Flops],
) -> dict[str, Any]:
    """Sum up.

    Args:
        ours: Name of our way, which is in every round.
        rounds: Ways that took turns with each other, by name.
        rates: For each round, rates of matrix products of the ranks.
        plans: Of the steps.
        flops: Model FLOPs of the steps.

    Returns:
        ``ours`` and, by name, ``baselines``: ``seconds`` and ``median_seconds`` of a step, least and median of the
        repetitions, slowest rank; ``tokens_per_second``, text and visual tokens of samples, without padding;
        ``model_flops_per_second``; ``mfu``, over what matrix products reach; ``imbalance`` of processor time;
        ``peak_memory_gib`` of a rank; ``losses``; of baselines also ``ratio``, their seconds over ours of the same
        round, or only ``failure``. ``ratio_vs_best_baseline``, the least of these, with ``best_baseline``;
        ``peak_memory_ratio``, ours over that of the best baseline; ``mfu``, ours; ``flops`` of a step by module;
        ``gemm_flops_per_second`` of all ranks and ``gemm_shapes``; ``tokens``, ``visual_tokens``, ``tiles``,
        ``samples`` of each step. What needs a baseline is None without any.
    """
    gemm = max(sum(rate.rate for rate in ranks) for ranks in rates)
    total = statistics.mean(each.total for each in flops)
    tokens = statistics.mean(plan.num_tokens for plan in plans)

    def line(way: Timed) -> dict[str, Any]:
        if way.failure is not None:
            return {"failure": way.failure, "losses": way.losses}
        seconds = way.seconds()
        return {
            "seconds": seconds,
            "median_seconds": way.seconds(statistics.median),
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": total / seconds,
            "mfu": total / seconds / gemm,
            "imbalance": way.imbalance(),
            "peak_memory_gib": way.peak_bytes() / 2**30,
            "losses": way.losses,
        }

    lines = [{name: line(way) for name, way in each.items()} for each in rounds]
    own = min((each.pop(ours) for each in lines), key=lambda one: float(one["seconds"]))
    baselines: dict[str, Any] = {}
    for each, ways in zip(lines, rounds, strict=True):
        for name, one in each.items():
            if "failure" not in one:
                one["ratio"] = one["seconds"] / ways[ours].seconds()
            baselines[name] = one
    done = {name: one for name, one in baselines.items() if "failure" not in one}
    best = min(done, key=lambda name: float(done[name]["ratio"]), default=None)
    return {
        "ours": own,
        "baselines": baselines,
        "best_baseline": best,
        "ratio_vs_best_baseline": None if best is None else done[best]["ratio"],
        "peak_memory_ratio": None if best is None else own["peak_memory_gib"] / done[best]["peak_memory_gib"],
        "mfu": own["mfu"],
        "flops": {
            module: statistics.mean(getattr(each, module) for each in flops) for module in ("vit", "projector", "llm")
        },
        "gemm_flops_per_second": gemm,
        "gemm_shapes": rates[0][0].shapes,
        "tokens": [plan.num_tokens for plan in plans],
        "visual_tokens": [plan.num_visual_tokens for plan in plans],
        "tiles": [plan.num_tiles for plan in plans],
        "samples": [plan.num_samples for plan in plans],
    }


def table(results: dict[str, Any], cpu: str) -> Any:
    """Lay the results of all ways out as a rich table; ``cpu`` names the processor."""
    flops = results["flops"]
    shares = ", ".join(f"{module} {value / 1e9:,.0f}" for module, value in flops.items())
    caption = (
        f"GFLOP of a step: {shares}\nmatrix products: {results['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s on "
        f"{results['ranks']} ranks\nimbal.: busiest rank over the mean; GiB: peak of a rank\n{cpu}"
    )
    made = _empty("way", caption)
    _add(made, "evovlm", results["ours"], 1.0)
    for name, line in results["baselines"].items():
        _add(made, name, line, line.get("ratio", 0.0))
    return made


def text_table(results: dict[str, Any], cpu: str) -> Any:
    """Lay the results with and without images out as a rich table; ``cpu`` names the processor."""
    efficiency = results["vlm_text_efficiency"]
    made = _empty("samples", f"model FLOP/s with images over those of text alone: {efficiency:.3f}\n{cpu}")
    for name in ("with_images", "text_only"):
        line = results[name]["ours"]
        _add(made, name.replace("_", " "), line, line["seconds"] / results["with_images"]["ours"]["seconds"])
    return made


def _empty(what: str, caption: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)
    made.add_column(what, no_wrap=True)
    for heading in ("step, s", "median", "/ ours", "tokens/s", "MFU", "imbal.", "GiB"):
        made.add_column(heading, justify="right")
    return made


def _add(made: Any, name: str, line: dict[str, Any], ratio: float) -> None:
    if "failure" in line:
        made.add_row(name, line["failure"])
        return
    made.add_row(
        name,
        f"{line['seconds']:.2f}",
        f"{line['median_seconds']:.2f}",
        f"{ratio:.2f}",
        f"{line['tokens_per_second']:,.0f}",
        f"{line['mfu']:.2f}",
        f"{line['imbalance']:.2f}",
        f"{line['peak_memory_gib']:.2f}",
    )
