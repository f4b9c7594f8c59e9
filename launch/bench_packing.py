"""Measures packing: how full packs are, how fast they are found, how alike they cost; beside other algorithms.

    length mix ─► samples ─┬─► ours, plain and with costs     C++, windows, both budgets
                           └─► greedy buffers, best fit decreasing, next fit     Python, as their originals are

| word | meaning |
|---|---|
| `fill` | tokens of all samples / (packs × max_tokens) |
| `samples_per_s` | per second of CPU time of the one thread that packs, so that what else runs counts little |
| `most_tiles`, `most_tokens` | of any pack |
| `keeps_budgets` | no pack has more tokens or tiles than allowed; `packs_over` counts those that have |
| `cost` | of a pack: Σ tokens² over its samples; `largest`, `p99` and `std` are in parts of the mean |
| `least_std` | what no packing into as many packs can go below: samples over the mean alone, the rest equal |

All pack the same samples. Ours is timed several times (median), others once.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from evovlm.data.packing import pack_windows
from evovlm.data.synthetic.lengths import LengthMix, length_mix
from evovlm.launch.bench_packing_peers import best_fit, greedy_buffer, next_fit
from evovlm.launch.report import make_report

Peer = Callable[[NDArray[np.int32], NDArray[np.int32], int, int], NDArray[np.int64]]

PEERS: dict[str, tuple[str, Peer]] = {
    "greedy_buffer_20": ("greedy buffer of 20", partial(greedy_buffer, buffer_size=20)),
    "greedy_buffer_100": ("greedy buffer of 100", partial(greedy_buffer, buffer_size=100)),
    "trl_bfd": ("TRL bfd", best_fit),
    "next_fit": ("next fit", next_fit),
}

# Mix, most tokens, most tiles, window: what ours is measured on beside the case asked for.
CASES: tuple[tuple[str, int, int, int], ...] = (
    ("internvl", 16384, 48, 16384),
    ("internvl", 16384, 48, 65536),
    ("internvl", 32768, 96, 16384),
    ("internvl", 32768, 96, 65536),
    ("internvl", 32768, 96, 1 << 20),
    ("short", 16384, 48, 65536),
    ("bimodal", 16384, 48, 65536),
)


def measure_ours(
    mix: LengthMix, max_tokens: int, max_tiles: int, window: int, repetitions: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pack with and without costs.

    Returns:
        What ``judge`` says of plain packing; the same of packing with costs, and ``cost``: its spread, ``plain_cost``:
        the spread without, ``least_std``.
    """
    squares = mix.tokens.astype(np.int64) ** 2
    results, spreads = [], []
    for costs in (None, squares):
        seconds = []
        for _ in range(repetitions):
            began = time.thread_time()
            pack_of, counts = pack_windows(mix.tokens, mix.tiles, window, max_tokens, max_tiles, costs)
            seconds.append(time.thread_time() - began)
        first = np.cumsum(counts) - counts
        number = pack_of + first[np.arange(len(pack_of)) // window]
        results.append(judge(mix, number, max_tokens, max_tiles, statistics.median(seconds)))
        results[-1]["spread"] = (max(seconds) - min(seconds)) / statistics.median(seconds)
        spreads.append(spread(np.bincount(number, weights=squares).astype(np.float64)))
    plain, alike = results
    least = least_std(squares, alike["packs"])
    return plain, alike | {"cost": spreads[1], "plain_cost": spreads[0], "least_std": least}


def measure_peer(peer: Peer, mix: LengthMix, max_tokens: int, max_tiles: int) -> dict[str, Any]:
    """Pack in another way; see ``judge``."""
    began = time.thread_time()
    number = peer(mix.tokens, mix.tiles, max_tokens, max_tiles)
    return judge(mix, number, max_tokens, max_tiles, time.thread_time() - began)


def judge(mix: LengthMix, number: NDArray[np.int64], max_tokens: int, max_tiles: int, seconds: float) -> dict[str, Any]:
    """Say how good a packing is.

    Args:
        mix: n samples.
        number: int64 [n], pack of each sample; every number up to the largest is used.
        max_tokens: most tokens of a pack.
        max_tiles: most tiles of a pack.
        seconds: that it took.
    """
    tokens, tiles = np.bincount(number, weights=mix.tokens), np.bincount(number, weights=mix.tiles)
    over = int(np.count_nonzero((tokens > max_tokens) | (tiles > max_tiles)))
    return {
        "fill": float(mix.tokens.sum() / (len(tokens) * max_tokens)),
        "samples_per_s": len(number) / seconds,
        "packs": len(tokens),
        "most_tokens": int(tokens.max()),
        "most_tiles": int(tiles.max()),
        "keeps_budgets": over == 0,
        "packs_over": over,
    }


def spread(costs: NDArray[np.float64]) -> dict[str, float]:
    """How unlike the costs of packs are, each number in parts of the mean."""
    mean = costs.mean()
    p99 = np.quantile(costs, 0.99)
    return {"largest": float(costs.max() / mean), "p99": float(p99 / mean), "std": float(costs.std() / mean)}


def least_std(costs: NDArray[np.int64], packs: int) -> float:
    """A bound on the standard deviation of the costs of packs, in parts of the mean, from the costs of samples."""
    largest = np.sort(costs)[::-1][:packs].astype(np.float64)
    rest = costs.sum() - np.concatenate(([0.0], np.cumsum(largest)))[:-1]
    alone = int(np.argmin(largest > rest / np.arange(packs, 0, -1)))  # the first that does not stand out
    equal = np.full(packs - alone, rest[alone] / (packs - alone))
    return spread(np.concatenate((largest[:alone], equal)))["std"]


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to pack.")] = 1_000_000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often ours is timed.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a pack, at least 16,384.")] = 16_384,
    max_tiles: Annotated[int, typer.Option(help="Most tiles of a pack, at least 32.")] = 48,
    window: Annotated[int, typer.Option(min=1, help="Samples packed together by ours.")] = 65_536,
) -> dict[str, Any]:
    """Measure packing on an InternVL-like length mix, beside other algorithms, and print tables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    mix = length_mix(samples, 0)
    plain, alike = measure_ours(mix, max_tokens, max_tiles, window, repetitions)
    peers = {name: measure_peer(peer, mix, max_tokens, max_tiles) for name, (_, peer) in PEERS.items()}
    cases: list[dict[str, Any]] = []
    for about in CASES:
        drawn = length_mix(samples, 0, about[0])
        case_plain, case_alike = measure_ours(drawn, *about[1:], repetitions)
        names = ("mix", "max_tokens", "max_tiles", "window")
        cases.append(dict(zip(names, about, strict=True)) | case_plain | {"with_cost_target": case_alike})
    budgets = {"max_tokens": max_tokens, "max_tiles": max_tiles, "window": window, "repetitions": repetitions}
    needed = {"tokens": int(mix.tokens.sum()) / max_tokens, "tiles": int(mix.tiles.sum()) / max_tiles}
    results = {"samples": samples, "mix": "internvl", **budgets, "packs_needed": needed, **plain}
    results |= {"with_cost_target": alike, "peers": peers, "cases": cases}
    report = make_report("packing", results, json_file)

    console = Console()
    caption = f"{samples:,} samples, packs of {max_tokens:,} tokens, {max_tiles} tiles; {report['machine']['cpu']}"
    table = Table("way", box=SIMPLE_HEAD, caption=caption)
    for heading in ("fill", "samples/s", "packs", "tiles", "over budget"):
        table.add_column(heading, justify="right")
    ways = {"ours": plain, "ours, costs evened out": alike}
    for way, line in (ways | {about: peers[name] for name, (about, _) in PEERS.items()}).items():
        speed, over = f"{line['samples_per_s'] / 1e6:.2f} M", f"{line['packs_over']:,}"
        table.add_row(way, f"{line['fill']:.3%}", speed, f"{line['packs']:,}", str(line["most_tiles"]), over)
    console.print(table)
    table = Table("mix, packs, window", box=SIMPLE_HEAD, caption="plain → costs evened out; std of cost / mean")
    for heading in ("fill, %", "million/s", "std", "least"):
        table.add_column(heading, justify="right")
    for case in cases:
        costly = case["with_cost_target"]
        name = f"{case['mix']} {case['max_tokens'] // 1024}k×{case['max_tiles']} {case['window'] // 1024}k"
        fill = f"{100 * case['fill']:.2f} → {100 * costly['fill']:.2f}"
        speed = f"{case['samples_per_s'] / 1e6:.1f} → {costly['samples_per_s'] / 1e6:.1f}"
        std = f"{costly['plain_cost']['std']:.2f} → {costly['cost']['std']:.2f}"
        table.add_row(name, fill, speed, std, f"{costly['least_std']:.2f}")
    console.print(table)
    return report
