"""Mixed preference optimisation of one small VLM on the same pairs, by our engine and by TRL's DPOTrainer.

    pairs, weights (``bench_mpo_pairs``) ─┬─► ours: packs, shared prefixes        (``bench_mpo_ours``)
                                          └─► TRL: [chosen; rejected], padded     (``bench_mpo_trl``)
                                                                │ epochs in turn
    pairs/s, ratios with the reference pass and without it ◄────┤ (``bench_mpo_report``)
    log π_ref and first losses equal to 1e-4, or an error ◄─────┤
    each of our ideas off in turn ◄─────────────────────────────┘ (``bench_mpo_switches``)

Everything runs in one process with all of its threads: TRL on two ranks was slower, whose tiles nothing balances. TRL
first trains a few pairs at each batch size, and the fastest one competes; so does the faster of its two kinds of
reference model where the reference counts. Both sides see a pair's images decoded: TRL's are prepared before the clock
starts, ours are decoded by the loader while it runs. TRL's ``bco_pair`` has no running shift δ; ours has, at no cost.
On a CPU, TRL's chunked output head scores every row of the prompts, too; on CUDA only those of answers.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from evovlm.engine.model_source import random_weights
from evovlm.launch.bench_mpo_ours import Epoch, OurTrainer
from evovlm.launch.bench_mpo_pairs import Task, write_pairs
from evovlm.launch.bench_mpo_report import best, check_agreement, split, table
from evovlm.launch.bench_mpo_switches import Switches
from evovlm.launch.bench_mpo_trl import TrlTrainer, check_installed
from evovlm.launch.ranks import num_cores
from evovlm.launch.report import make_report
from evovlm.models.hf.save import save_pretrained
from evovlm.models.table import num_parameters
from evovlm.parallel.world import World

SWITCHES = {
    "evovlm": Switches(),
    "tiles for each answer": Switches(tiles_once=False),
    "prefix for each answer": Switches(prefix_once=False),
    "both for each answer": Switches(tiles_once=False, prefix_once=False),
    "one pair in a pack": Switches(packed=False),
}
"""Our ways: with everything, and with ideas off."""


@dataclass(frozen=True)
class Settings:
    """How the sides are compared.

    Attributes:
        repetitions: How often each way is timed.
        step_pairs: Pairs of an optimizer step of TRL's; ours takes packs, of about as many.
        batches: Pairs of a forward pass of TRL's among which the fastest is chosen.
        tune_pairs: Pairs that are trained on to choose it.
        trl: Compare with TRL.
    """

    repetitions: int = 2
    step_pairs: int = 4
    batches: tuple[int, ...] = (1, 2, 4)
    tune_pairs: int = 4
    trl: bool = True

    def check(self, num_pairs: int) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: TRL is not installed, or numbers do not divide.
        """
        if self.trl:
            check_installed()
        for batch in self.batches:
            if self.step_pairs % batch or num_pairs % self.step_pairs or self.tune_pairs % self.step_pairs:
                raise ValueError(
                    f"bench mpo: {num_pairs} pairs in steps of {self.step_pairs} and batches of {batch}: batches must "
                    "divide steps, and steps the pairs"
                )


def measure(task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Train in every way.

    Args:
        task: Model and pairs.
        settings: How the sides are compared.

    Returns:
        ``ours`` and ``ours_resident``, see :func:`evovlm.launch.bench_mpo_report.best`; ``split``, by name of
        what is off, ``seconds`` of an epoch and ``gain``, those over ours; sizes. With TRL: ``trl``, by name of the
        reference, as of ours; ``batch``, chosen from ``tuned``, seconds by batch size; ``ratio_vs_trl``, seconds of
        its faster reference over ours, reference pass counted in, and ``ratio_vs_trl_cached``, of training alone;
        ``agreement``, see :func:`evovlm.launch.bench_mpo_report.check_agreement`.

    Raises:
        ValueError: TRL is not installed, or settings do not fit together.
        RuntimeError: The sides do not score or train the same.
    """
    task, settings = task or Task(), settings or Settings()
    settings.check(task.num_pairs)
    with tempfile.TemporaryDirectory() as folder, _one_rank(Path(folder)) as world:
        index, tokenizer = write_pairs(Path(folder), task)
        exported = Path(folder, "exported")
        save_pretrained(
            task.model, random_weights(task.model, task.seed), exported, tokenizer_dir=Path(folder, "tokenizer")
        )
        ours = OurTrainer(world, (index, tokenizer), task)
        theirs = TrlTrainer((index, tokenizer), task, exported, settings.step_pairs) if settings.trl else None
        tuned = {} if theirs is None else _tune(theirs, settings)
        batch = min(tuned, key=lambda size: tuned[size], default=0)
        mine: dict[bool, list[Epoch]] = {False: [], True: []}  # by resident
        peers: dict[bool, list[Epoch]] = {False: [], True: []}
        for _ in range(settings.repetitions):
            for resident in (False, True):
                mine[resident].append(ours.epoch(resident=resident))
                if theirs is not None:
                    peers[resident].append(theirs.epoch(batch, resident=resident))
        results: dict[str, Any] = {
            "ours": best(mine[False], task.num_pairs),
            "ours_resident": best(mine[True], task.num_pairs),
            "split": split(ours.switched(SWITCHES, settings.repetitions)),
            "parameters": num_parameters(task.model)["total"],
            "pairs": task.num_pairs,
            "tiles": int(index.samples["num_tiles"].sum()),
            "tokens": int(index.samples["num_tokens"].sum()),
            "steps": ours.num_steps,
            "threads": torch.get_num_threads(),
            "repetitions": settings.repetitions,
        }
        if theirs is not None:
            results |= {"batch": batch, "tuned": tuned, **_compare(results["ours"], peers, task.num_pairs)}
            num_chosen = index.samples["num_chosen"].astype(np.int64)
            results["agreement"] = check_agreement(mine[False][0], peers[False][0], num_chosen)
    return results


def _tune(theirs: TrlTrainer, settings: Settings) -> dict[int, float]:
    """Seconds of TRL's training on a few pairs, references known, by batch size."""
    return {batch: theirs.epoch(batch, pairs=settings.tune_pairs).train_seconds for batch in settings.batches}


def _compare(ours: dict[str, float], peers: dict[bool, list[Epoch]], num_pairs: int) -> dict[str, Any]:
    precomputed, resident = (best(peers[kind], num_pairs) for kind in (False, True))
    return {
        "trl": {"precomputed reference": precomputed, "resident reference": resident},
        "ratio_vs_trl": min(precomputed["seconds"], resident["seconds"]) / ours["seconds"],
        "ratio_vs_trl_cached": precomputed["train_seconds"] / ours["train_seconds"],
    }


@contextmanager
def _one_rank(folder: Path) -> Iterator[World]:
    """A world of this process alone, which computes with all cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    store = dist.FileStore(str(folder / "store"), 1)  # type: ignore[attr-defined]  # documented, not in its stubs
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield World(0, 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def run(json_file: Path | None = None, task: Task | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Train and print a table.

    Args:
        json_file: Where to write the report, too.
        task: Model and pairs.
        settings: How the sides are compared.
    """
    from rich.console import Console

    results = measure(task, settings)
    report = make_report("mpo", results, json_file)
    Console().print(table(results, report["machine"]["cpu"]))
    return report
