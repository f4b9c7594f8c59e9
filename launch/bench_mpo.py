"""Mixed preference optimisation of one small VLM on the same pairs, by our engine and by TRL's DPOTrainer.

    pairs, weights (``bench_mpo_pairs``) ─┬─► ours: packs, shared prefixes        (``bench_mpo_ours``)
                                          └─► TRL: [chosen; rejected], padded     (``bench_mpo_trl``)
                                                                │ epochs in turn
    pairs/s, ratios with the reference pass and without it ◄────┤ (``bench_mpo_report``)
    log π_ref and first losses equal to 1e-4, or an error ◄─────┤
    each of our ideas off in turn ◄─────────────────────────────┘ (``bench_mpo_switches``)

Everything runs in one process with all of its threads: on two ranks TRL was slower, whose tiles nothing balances. In
the first round TRL trains at each batch size, and the fastest ones of training and of scoring go on. Where the
reference counts, the faster of its two kinds of reference model competes. Both sides see decoded images: TRL's are
decoded before the clock starts, ours by the loader while it runs. TRL's ``bco_pair`` has no running shift δ; ours has,
at no cost. On a CPU, TRL passes all rows through its output head, prompts included, on CUDA only those of answers: it
is timed in both ways.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
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
PRECOMPUTED, RESIDENT, ANSWER_ROWS = "precomputed reference", "resident reference", "head on answers only"
"""TRL's ways."""
SCORED = (PRECOMPUTED, ANSWER_ROWS)
"""Those of them that score all pairs before."""


@dataclass(frozen=True)
class Settings:
    """How the sides are compared.

    Attributes:
        repetitions: How often each way is timed.
        step_pairs: Pairs of an optimizer step of TRL's; ours takes packs, of about as many.
        batches: Pairs of a forward pass of TRL's among which the fastest is chosen.
        trl: Compare with TRL.
    """

    repetitions: int = 2
    step_pairs: int = 4
    batches: tuple[int, ...] = (1, 2, 4)
    trl: bool = True

    def check(self, num_pairs: int) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: TRL is not installed, or numbers do not divide.
        """
        if self.trl:
            check_installed()
        for batch in self.batches:
            if self.step_pairs % batch or num_pairs % self.step_pairs:
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
        way, as of ours; ``tuned``, seconds by batch size; ``ratio_vs_trl``, seconds of its faster reference over ours,
        reference pass counted in, and ``ratio_vs_trl_cached``, of training alone; ``ratio_vs_trl_answer_rows`` and
        ``…_cached``, the same of TRL with its output head on rows of answers; ``agreement``, see
        :func:`evovlm.launch.bench_mpo_report.check_agreement`.

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
        peer: Peer | None = None
        if settings.trl:
            peer = Peer(TrlTrainer((index, tokenizer), task, exported, settings.step_pairs), settings.batches)
        mine: dict[bool, list[Epoch]] = {False: [], True: []}  # by whether the reference model is resident
        for _ in range(settings.repetitions):
            mine[False].append(ours.epoch())
            if peer is not None:
                peer.round()
            mine[True].append(ours.epoch(resident=True))
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
        if peer is not None:
            results |= compare(results["ours"], peer.epochs, task.num_pairs) | {"tuned": peer.tuned}
            num_chosen = index.samples["num_chosen"].astype(np.int64)
            checked = {way: check_agreement(mine[False][0], peer.epochs[way][0], num_chosen) for way in SCORED}
            results["agreement"] = checked[PRECOMPUTED]
            results["peer_versions"] = {name: version(name) for name in ("trl", "transformers")}
    return results


class Peer:
    """TRL's epochs: at every batch size at first, then at the best.

    Args:
        trainer: What trains.
        batches: Pairs of a forward pass.

    Attributes:
        epochs: By name of the way.
        tuned: ``train_seconds`` and ``reference_seconds`` by batch size, of the first round.
    """

    def __init__(self, trainer: TrlTrainer, batches: Sequence[int]) -> None:
        self._trainer, self._batches = trainer, batches
        self.epochs: dict[str, list[Epoch]] = {PRECOMPUTED: [], RESIDENT: [], ANSWER_ROWS: []}
        self.tuned: dict[int, dict[str, float]] = {}

    def round(self) -> None:
        """Train an epoch in every way."""
        if self.tuned:
            self.epochs[PRECOMPUTED].append(self._trainer.epoch(*self._best()))
        for batch in self._batches if not self.tuned else ():
            epoch = self._trainer.epoch(batch, batch)
            self.epochs[PRECOMPUTED].append(epoch)
            self.tuned[batch] = {
                "train_seconds": epoch.train_seconds,
                "reference_seconds": epoch.reference_seconds,
            }
        batch, scored = self._best()
        self.epochs[RESIDENT].append(self._trainer.epoch(batch, None))
        self.epochs[ANSWER_ROWS].append(self._trainer.epoch(batch, scored, answer_rows=True))

    def _best(self) -> tuple[int, int]:
        """Batch sizes of training and of scoring."""
        train, scored = (
            min(self.tuned, key=lambda size: self.tuned[size][part]) for part in ("train_seconds", "reference_seconds")
        )
        return train, scored


def compare(ours: dict[str, float], peers: dict[str, list[Epoch]], num_pairs: int) -> dict[str, Any]:
    """The peer's ways, and the ratios; see :func:`measure`."""
    ways = {name: best(epochs, num_pairs) for name, epochs in peers.items()}
    shipped, answer_rows = ways[PRECOMPUTED], ways[ANSWER_ROWS]
    return {
        "trl": ways,
        "ratio_vs_trl": min(shipped["seconds"], ways[RESIDENT]["seconds"]) / ours["seconds"],
        "ratio_vs_trl_cached": shipped["train_seconds"] / ours["train_seconds"],
        "ratio_vs_trl_answer_rows": answer_rows["seconds"] / ours["seconds"],
        "ratio_vs_trl_answer_rows_cached": answer_rows["train_seconds"] / ours["train_seconds"],
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
