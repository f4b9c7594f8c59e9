"""``evovlm verify``: does every layout train the same model here? The equality matrix on this machine's ranks.

    each plan ─► its ranks train a small model for three steps ─┐
    one process, without the engine ────────────────────────────┴─► largest relative difference of loss, gradients and
                                                                    weights

On a laptop ranks are forked processes and every plan runs. Under torchrun or SLURM the plans of exactly that many ranks
run on the ranks that were started, GPUs included: the first thing to do on a new cluster.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evovlm.engine.equality import SMALL, Difference, Trained, compare, make_steps, tied, train_alone, train_under
from evovlm.engine.equality_pairs import make_pair_steps, train_pairs_alone, train_pairs_under
from evovlm.engine.equality_plans import PlanCase, all_cases
from evovlm.engine.layout_check import check_layouts
from evovlm.engine.preference_loss import PreferenceLossSettings
from evovlm.engine.settings import RunSettings
from evovlm.launch.ranks import RankInfo, process_group
from evovlm.launch.report import make_report
from evovlm.parallel.fork import RankFailedError, run_ranks
from evovlm.parallel.world import World

TOLERANCE: dict[str, float] = {"float64": 1e-10, "float32": 1e-5}
NUM_ROWS = 64
Precision = Literal["float32", "float64"]
Loss = Literal["cross_entropy", "mpo"]


@dataclass(frozen=True)
class Verdict:
    """One row of the table.

    Attributes:
        name: Of the case.
        plan: Its layouts.
        ranks: How many it needs.
        difference: From one process; None where it failed.
        seconds: That it took.
        error: Why it failed, its last line; empty where it did not.
        passed: Whether the differences are within the tolerance.
    """

    name: str
    plan: str
    ranks: int
    difference: Difference | None
    seconds: float
    error: str
    passed: bool


def select(patterns: Sequence[str], *, max_ranks: int, exact: bool = False) -> list[PlanCase]:
    """Pick cases whose name fits one of the patterns (``*`` and ``?`` as in file names, or a part of the name).

    Raises:
        ValueError: None fits.
    """
    cases = [case for case in all_cases() if case.plan.size == max_ranks or (case.plan.size < max_ranks and not exact)]
    chosen = [
        case for case in cases if not patterns or any(fnmatchcase(case.name, p) or p in case.name for p in patterns)
    ]
    if not chosen:
        size, asked = f"{'exactly' if exact else 'at most'} {max_ranks} ranks", " or ".join(map(repr, patterns))
        there = "; ".join(case.name for case in cases) or "none"
        raise ValueError(f"no plan of {size} is called {asked}; there are: {there}")
    return chosen


def recipe_case(settings: RunSettings, ranks: int) -> PlanCase:
    """The layouts and options of a recipe, for the small model.

    Raises:
        ValueError: The recipe's layouts do not fit that number of ranks, or the small model.
    """
    chosen = settings.parallel
    plan = chosen.plan(ranks)
    packs = PlanCase("", plan).num_packs
    check_layouts(settings, SMALL, ranks, pack_tokens=NUM_ROWS, packs_per_step=packs)
    options = {
        "schedule": chosen.schedule,
        "virtual_stages": chosen.virtual_stages,
        "encoder_activations": chosen.encoder_activations,
        "encoder_memory": chosen.encoder_memory,
        "min_unit": chosen.min_unit,
        "recompute": {"vit": settings.recompute.vit, "llm": settings.recompute.llm},
        "freeze": settings.model.freeze,
    }
    return PlanCase("the recipe's own", plan, options)


class References:
    """Trainings in one process, each made when it is first needed."""

    def __init__(self, precision: Precision, loss: Loss) -> None:
        self._precision, self._loss, self._made = precision, loss, dict[tuple[bool, int, tuple[str, ...]], Trained]()

    def of(self, case: PlanCase) -> Trained:
        """What a case is compared with."""
        key = (case.tied, case.num_packs, tuple(case.options.get("freeze", ())))
        if key not in self._made:
            config, freeze, precision = (tied() if case.tied else SMALL), key[2], self._precision
            if self._loss == "mpo":
                pairs = make_pair_steps(config, num_packs=case.num_packs)
                mpo = PreferenceLossSettings()
                self._made[key] = train_pairs_alone(mpo, config, pairs, freeze=freeze, precision=precision)[0]
            else:
                steps = make_steps(config, num_packs=case.num_packs)
                self._made[key] = train_alone(config, steps, freeze=freeze, precision=precision)
        return self._made[key]


def run_forked(
    cases: Sequence[PlanCase], precision: Precision, loss: Loss = "cross_entropy", timeout: float = 300.0
) -> Iterator[Verdict]:
    """Run cases one after another, each on ranks forked from this process."""
    torch.set_num_threads(1)  # ranks share the cores
    references = References(precision, loss)
    for case in cases:
        began = time.perf_counter()
        theirs = references.of(case)
        try:
            job = partial(_train, case, precision=precision, loss=loss)
            ours: Trained | None = run_ranks(case.plan.size, job, timeout=timeout)[0]
            error = ""
        except RankFailedError as problem:
            ours, error = None, str(problem).strip().splitlines()[-1]
        yield _verdict(case, ours, theirs, time.perf_counter() - began, error, precision)


def run_here(
    cases: Sequence[PlanCase], world: World, precision: Precision, loss: Loss = "cross_entropy"
) -> Iterator[Verdict]:
    """Run cases on the ranks of this run; every rank calls this and iterates, verdicts are those of rank 0."""
    references = References(precision, loss)
    for case in cases:
        began = time.perf_counter()
        ours = _train(case, world, precision=precision, loss=loss)
        if world.is_main:
            yield _verdict(case, ours, references.of(case), time.perf_counter() - began, "", precision)
        world.barrier()


def _train(case: PlanCase, world: World, *, precision: Precision, loss: Loss) -> Trained:
    config, options = (tied() if case.tied else SMALL), case.engine_options(precision=precision)
    if loss == "mpo":
        pairs = make_pair_steps(config, num_packs=case.num_packs)
        return train_pairs_under(PreferenceLossSettings(), case.plan, world, options, config, pairs)[0]
    return train_under(case.plan, world, options, config, make_steps(config, num_packs=case.num_packs))


def _verdict(
    case: PlanCase, ours: Trained | None, theirs: Trained, seconds: float, error: str, precision: Precision
) -> Verdict:
    difference = None if ours is None else compare(ours, theirs)
    passed = difference is not None and difference.largest <= TOLERANCE[precision]
    return Verdict(case.name, str(case.plan), case.plan.size, difference, seconds, error, passed)


def verify(
    settings: RunSettings | None,
    me: RankInfo,
    *,
    patterns: Sequence[str],
    ranks: int,
    precision: Precision,
    json_file: Path | None,
    loss: Loss = "cross_entropy",
) -> bool:
    """Run the matrix, or a recipe's own plan, and print the table; returns whether everything is equal.

    Args:
        settings: A recipe, whose plan alone is run; None runs the matrix.
        me: This process among those that were started; of one, ranks are forked.
        patterns: Names of plans to run; none means all.
        ranks: Most ranks to fork.
        precision: Of the trainings.
        json_file: Where to write the results, too.
        loss: Of the trainings: on conversations, or on preference pairs.

    Raises:
        ValueError: No such plan, or a recipe that does not fit.
    """
    launched = me.launched
    size = me.world_size if launched else ranks
    cases = [recipe_case(settings, size)] if settings else select(patterns, max_ranks=size, exact=launched)
    verdicts: list[Verdict] = []
    with suppress(KeyboardInterrupt):
        if launched:
            with process_group(me) as world:
                for verdict in run_here(cases, world, precision, loss):
                    _progress(verdicts, verdict, len(cases))
        else:
            for verdict in run_forked(cases, precision, loss):
                _progress(verdicts, verdict, len(cases))
    if me.rank:
        return True
    _print(verdicts, precision)
    results = {
        "loss": loss,
        "precision": precision,
        "tolerance": TOLERANCE[precision],
        "plans": [asdict(v) for v in verdicts],
    }
    make_report("verify", {"ranks": "launched" if launched else "forked", **results}, json_file)
    return len(verdicts) == len(cases) and all(verdict.passed for verdict in verdicts)


def _progress(verdicts: list[Verdict], verdict: Verdict, total: int) -> None:
    verdicts.append(verdict)
    mark = "equal" if verdict.passed else "DIFFERS" if verdict.difference else "FAILED"
    line = f"{len(verdicts)}/{total}  {verdict.name}: {mark}, {verdict.seconds:.1f} s  {verdict.error}"
    Console(stderr=True).print(line, highlight=False, markup=False)


def _print(verdicts: Sequence[Verdict], precision: Precision) -> None:
    table = Table(box=SIMPLE_HEAD, title=f"Largest relative difference from one process, {precision}, 3 steps")
    for column in ("plan", "ranks", "loss", "gradients", "weights", ""):
        table.add_column(column, justify="left" if column in ("plan", "") else "right")
    for v in verdicts:
        d = v.difference
        numbers = [f"{x:.0e}" for x in (d.loss, d.gradient, d.weight)] if d else ["-"] * 3
        table.add_row(v.name, str(v.ranks), *numbers, "equal" if v.passed else v.error or "DIFFERS")
    console = Console()
    console.print(table)
    passed = sum(v.passed for v in verdicts)
    tolerance = f"within {TOLERANCE[precision]:.0e}"
    console.print(f"{passed} of {len(verdicts)} plans equal one process {tolerance}", highlight=False)
