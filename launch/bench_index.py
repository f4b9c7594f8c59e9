"""Measures what an index of millions of samples costs a rank: time to open it, memory while planning and reading.

    made-up index ─► fresh process: imports │ open │ plan steps all over an epoch │ read their samples
                                    └ memory here is the baseline that is subtracted

Memory is what Linux says of the process (``/proc/self/status``). ``rss`` is all that is resident; ``private`` its
anonymous part, which no other process shares. The rest of ``rss`` are pages of the index in the page cache: ranks of
a node share them, yet each rank's figure has them in full. The index was just written, so its pages are in the cache;
opening reads only ``index.json`` and the sizes of files, so a cold disk adds a few accesses, however large the index.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from evovlm.data.index import Index
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout
from evovlm.data.synthetic.index import write_index

_LAYOUT = DataLayout(8, 8)
_MB = 1e6


def measure_index(folder: Path, samples: int, num_steps: int = 20) -> dict[str, Any]:
    """Write an index and measure a fresh process that plans from it and reads it.

    Args:
        folder: gets the index, about 70 bytes a sample; an index that stands there is replaced.
        samples: samples of the index.
        num_steps: steps planned and read, spread evenly over the first epoch.

    Returns:
        ``samples``, ``images``; ``write_s``: seconds to write the index; ``open_s``: to open it; ``first_plan_s``: to
        make the mixture, the planner and the first step; ``count_epoch_s``: to pack a whole epoch, so that any step
        of it can be jumped to; ``plan_step_ms``: median of the steps; ``read_us``: mean to read a sample's tokens and
        image rows. Memory in 10⁶ bytes above that just before opening, when everything was imported: ``open_rss_mb``
        after opening, ``plan_rss_mb`` and ``plan_private_mb`` after planning, ``read_rss_mb`` and ``read_private_mb``
        after reading, ``peak_rss_mb`` the most at any moment from opening on.

    Raises:
        ValueError: fewer samples than it takes to fill the packs of ``num_steps`` steps.
    """
    began = time.perf_counter()
    meta = write_index(folder, samples)
    written = time.perf_counter() - began
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(_use, folder, num_steps).result()
    return {"samples": samples, "images": meta.num_images, "write_s": written, **measured}


def rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Return lines (what, value) of a table for people."""
    return [
        ("samples, images", f"{measured['samples']:,}, {measured['images']:,}"),
        ("open", f"{measured['open_s'] * 1e3:,.1f} ms"),
        ("first plan", f"{measured['first_plan_s'] * 1e3:,.0f} ms"),
        ("packing an epoch", f"{measured['count_epoch_s']:,.1f} s"),
        ("a step's plan", f"{measured['plan_step_ms']:,.1f} ms"),
        ("reading a sample", f"{measured['read_us']:,.0f} µs"),
        ("memory after opening", f"{measured['open_rss_mb']:,.0f} MB"),
        ("after planning", f"{measured['plan_rss_mb']:,.0f} MB ({measured['plan_private_mb']:,.0f} private)"),
        ("after reading", f"{measured['read_rss_mb']:,.0f} MB ({measured['read_private_mb']:,.0f} private)"),
        ("at most", f"{measured['peak_rss_mb']:,.0f} MB"),
    ]


@dataclass(frozen=True)
class Memory:
    """Memory of this process in bytes: resident, its private anonymous part, and the most that was resident."""

    rss: int
    private: int
    peak: int

    @classmethod
    def now(cls) -> "Memory":
        """Read ``/proc/self/status``."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines if " kB" in line)}
        return cls(1024 * kib["VmRSS"], 1024 * kib["RssAnon"], 1024 * kib["VmHWM"])


def _use(folder: Path, num_steps: int) -> dict[str, float]:
    """What the fresh process does."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = Memory.now()
    result: dict[str, float] = {}

    def note(name: str) -> None:
        now = Memory.now()
        result[f"{name}_rss_mb"] = (now.rss - before.rss) / _MB
        result[f"{name}_private_mb"] = (now.private - before.private) / _MB

    began = time.perf_counter()
    index = Index.open(folder)
    result["open_s"] = time.perf_counter() - began
    note("open")

    began = time.perf_counter()
    settings = PlanSettings(packs_per_step=_LAYOUT.num_ranks * _LAYOUT.num_microbatches)
    planner = Planner(index, Mixture(index, MixtureSettings(), settings.seed), settings)
    planner.plan_step(0, _LAYOUT)
    result["first_plan_s"] = time.perf_counter() - began
    began = time.perf_counter()
    steps_of_epoch = planner.num_packs(1) // settings.packs_per_step
    result["count_epoch_s"] = time.perf_counter() - began
    if steps_of_epoch < num_steps:
        raise ValueError(f"{len(index)} samples make {steps_of_epoch} steps, {num_steps} are wanted: take more samples")
    plan_seconds = []
    drawn = []
    for step in np.linspace(0, steps_of_epoch - 1, num_steps).astype(int).tolist():
        began = time.perf_counter()
        plan = planner.plan_step(step, _LAYOUT)
        plan_seconds.append(time.perf_counter() - began)
        drawn.append(plan.packs.samples)
    result["plan_step_ms"] = statistics.median(plan_seconds) * 1e3
    note("plan")

    samples = np.concatenate(drawn).tolist()
    began = time.perf_counter()
    for sample in samples:
        index.tokens(sample)
        index.image_refs(sample)
    result["read_us"] = (time.perf_counter() - began) / len(samples) * 1e6
    note("read")
    result["peak_rss_mb"] = (Memory.now().peak - before.rss) / _MB
    return result
