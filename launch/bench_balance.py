"""Measures how equally a step's work is shared out over simulated ranks, and how long deciding that takes.

    lengths of an InternVL-like mix ─► packs of a step ─┬► packs over ranks, images over encoders   llm, vit
                                                        └► four simpler ways, side by side

``llm`` and ``vit`` are the largest over the mean of all ranks: of the decoder's FLOPs, and of tiles. ``llm_bound`` and
``vit_bound`` are the proven lower bounds of the same; ``solve_ms`` is the median time to decide both on one core.

The first table is a step with enough packs for each rank. In the second, too few packs make up for one that is a
single sample: it has far more attention than others and cannot be shared out, so the bound itself is above the mean.
Packs that are made alike (``even_packs``) make up for less; ranks then differ more, not less, from two packs each on.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evovlm.launch.bench_balance_step import WAYS, draw_step, share_out, solve
from evovlm.launch.report import make_report

RANKS = (8, 64, 512, 2560)


def measure(
    ranks: int,
    packs_per_rank: int,
    pack_tokens: int,
    pack_tiles: int,
    repetitions: int,
    key: int = 0,
    even_packs: bool = False,
) -> dict[str, Any]:
    """Balance one step.

    Args:
        ranks: Data-parallel ranks, with an encoder beside each.
        packs_per_rank: Microbatches.
        pack_tokens: Rows of a pack.
        pack_tiles: Most tiles of a pack.
        repetitions: How often it is timed.
        key: Another key draws another step.
        even_packs: Whether packing, too, makes packs cost alike.

    Returns:
        ``llm``, ``vit``, their bounds and ``solve_ms`` as above, ``solve_cpu_ms`` without waiting for a busy machine;
        ``local_tiles``: share of tiles encoded beside the rank of their pack, ``node_tiles``: in its node of eight;
        ``dearest_pack``: its cost over the mean of packs; ``split_images``; ``ways``: what :func:`share_out` says of
        each way; ``lockstep_bound``: no way has a smaller ``lockstep``.
    """
    step = draw_step(ranks * packs_per_rank, pack_tokens, pack_tiles, key, even_packs)
    packs, images = solved = solve(step, ranks)
    seconds, busy = [], []
    for _ in range(repetitions):
        began, began_busy = time.perf_counter(), time.thread_time()
        solve(step, ranks)
        seconds.append(time.perf_counter() - began)
        busy.append(time.thread_time() - began_busy)
    cost, tiles = int(step.costs.sum()) / ranks, int(step.image_tiles.sum()) / ranks
    return {
        "llm": packs.largest / cost,
        "vit": images.largest / tiles,
        "llm_bound": packs.bound / cost,
        "vit_bound": images.bound / tiles,
        "solve_ms": statistics.median(seconds) * 1e3,
        "solve_cpu_ms": statistics.median(busy) * 1e3,
        "samples_per_rank": step.samples / ranks,
        "local_tiles": images.home_tiles / (tiles * ranks),
        "node_tiles": images.node_tiles / (tiles * ranks),
        "packs_per_rank": packs_per_rank,
        "images": len(step.image_tiles),
        "split_images": len(set(images.image[images.first > 0].tolist())),
        "dearest_pack": int(step.costs.max()) / (cost / packs_per_rank),
        # Some microbatch outside of any m has one of the m·R + 1 dearest packs.
        "lockstep_bound": int(np.sort(step.costs)[::-1][::ranks].sum()) / cost,
        "ways": {way: share_out(step, ranks, way, solved) for way in WAYS},
    }


def run(
    json_file: Path | None = None,
    ranks: Sequence[int] = RANKS,
    packs_per_rank: int = 8,
    small: Sequence[int] = (1, 2, 4),
    pack_tokens: int = 16_384,
    pack_tiles: int = 48,
    repetitions: int = 9,
    even_packs: bool = False,
) -> dict[str, Any]:
    """Balance steps of several sizes and print tables.

    Args:
        json_file: Where to write the report, too.
        ranks: Simulated data-parallel ranks.
        packs_per_rank: Packs of each rank in the main table, ``results["ranks"]``.
        small: Packs of each rank in the table of small steps, ``results["small_steps"]``.
        pack_tokens: Rows of a pack.
        pack_tiles: Most tiles of a pack.
        repetitions: How often each is timed.
        even_packs: Whether packing, too, makes packs cost alike.
    """
    from rich.console import Console

    def measured(packs: int) -> dict[str, Any]:
        return {str(r): measure(r, packs, pack_tokens, pack_tiles, repetitions, even_packs=even_packs) for r in ranks}

    results: dict[str, Any] = {
        "model": "8B",
        "pack_tokens": pack_tokens,
        "pack_tiles": pack_tiles,
        "even_packs": even_packs,
        "repetitions": repetitions,
        "ranks": measured(packs_per_rank),
        "small_steps": {str(packs): measured(packs) for packs in small},
    }
    report = make_report("balance", results, json_file)
    console = Console()
    main = results["ranks"]
    about = f"{packs_per_rank} packs of {pack_tokens:,} tokens per rank; {report['machine']['cpu']}"
    console.print(_solved([(int(r), line) for r, line in main.items()], about), _ways(main))
    lines = [(int(r), line) for step in results["small_steps"].values() for r, line in step.items()]
    if lines:
        console.print(_solved(lines, "small steps: largest and bound, both over the mean"))
    return report


def _solved(lines: list[tuple[int, dict[str, Any]]], caption: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, caption=caption, padding=(0, 1, 0, 0))
    for heading in ("ranks", "packs each", "samples", "llm", "bound", "vit", "bound", "tiles at home", "solve, ms"):
        table.add_column(heading, justify="right")
    for number, line in lines:
        shares = (f"{line[name]:.4f}" for name in ("llm", "llm_bound", "vit", "vit_bound"))
        local, solve_ms = f"{line['local_tiles']:.0%}", f"{line['solve_ms']:.2f}"
        samples = f"{line['samples_per_rank']:.1f}"
        table.add_row(str(number), str(line["packs_per_rank"]), samples, *shares, local, solve_ms)
    return table


def _ways(lines: dict[str, Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("way", box=SIMPLE_HEAD, caption="largest/mean: LLM cost | tiles", padding=(0, 1, 0, 0))
    for number in lines:
        table.add_column(f"{number} ranks", justify="right", no_wrap=True)
    for way in WAYS:
        parts = ([line["ways"][way].get(name) for name in ("llm", "vit")] for line in lines.values())
        table.add_row(way, *(" | ".join("–" if x is None else f"{x:.3f}" for x in values) for values in parts))
    return table
