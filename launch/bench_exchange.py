"""Measures the vision exchange against its lower bound and two other ways to deliver the same rows.

Forked gloo ranks, a seeded mix of packs whose images have 0 to 13 tiles, each image on the encoder with least to do:

| way | what travels |
|---|---|
| `exchange` | each visual token straight to the rank that holds its row (`parallel/exchange.py`) |
| `all_gather` | every visual token to every rank, which picks its rows |
| `two_exchange` | each token to the rank its image belongs to in the data's order, then to the row's holder |

`overlapped` and `serial` time encoding (a stand-in of matrix products) together with the exchange: chunks sent while
the next is encoded, or one after the other. Every way must deliver the same rows, bit for bit. Bytes are counted from
the collectives that were issued, without what stays on a rank; the lower bound comes from a map of owners instead.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer

from evovlm.launch.bench_exchange_step import Mix, Tokens, draw, hop, plans, tokens_of
from evovlm.launch.report import make_report
from evovlm.parallel.exchange import start_exchange
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.routes import Chunk, plan_exchange
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.traffic import TileUses
from evovlm.parallel.world import World

WAYS = ("exchange", "all_gather", "two_exchange", "overlapped", "serial")


def measure(plan: ParallelPlan, mix: Mix, repetitions: int) -> dict[str, Any]:
    """Exchange one step in every way.

    Args:
        plan: Layouts of the run; as many ranks are forked.
        mix: Size of the step.
        repetitions: How often each way is timed.

    Returns:
        Bytes over all ranks (``all_gather_bytes`` without the padding to equal parts that the collective asks for,
        ``all_gather_padded_bytes`` with it); median seconds until the last rank has its rows.

    Raises:
        RuntimeError: Two ways delivered different rows.
    """
    uses, home = draw(plan, mix)
    tokens = tokens_of(plan, mix, uses, home)
    ranks = run_ranks(plan.size, lambda w: _deliver(w, plan, mix, uses, tokens, repetitions), timeout=600.0)
    for way in WAYS:
        wrong = [number for number, (same, _, _) in enumerate(ranks) if not same[way]]
        if wrong:
            raise RuntimeError(f"bench exchange: {way} delivered other rows than all_gather on ranks {wrong} of {plan}")
    row_bytes = 4 * mix.hidden
    num_bytes = {way: row_bytes * sum(moved[way] for _, moved, _ in ranks) for way in ranks[0][1]}
    visits = np.stack((tokens.holder, tokens.held, tokens.owner), 1)[tokens.holder != tokens.owner]
    seconds = {way: [max(times) for times in zip(*(t[way] for _, _, t in ranks), strict=True)] for way in WAYS}
    return {
        "plan": str(plan),
        "ranks": plan.size,
        "tiles": int(uses.num_tiles.sum()),
        "tiles_of_encoders": uses.num_tiles.tolist(),
        "chunks": max(1, math.ceil(int(uses.num_tiles.max()) / mix.chunk_tiles)),
        "row_bytes": row_bytes,
        "bytes": num_bytes["exchange"],
        "lower_bound_bytes": len(np.unique(visits, axis=0)) * row_bytes,
        "all_gather_bytes": int(uses.num_tiles.sum()) * mix.tokens_per_tile * (plan.size - 1) * row_bytes,
        "all_gather_padded_bytes": num_bytes["all_gather"],
        "two_exchange_bytes": num_bytes["two_exchange"],
        "seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "spread": {way: (max(times) - min(times)) / statistics.median(times) for way, times in seconds.items()},
        "repetitions": repetitions,
    }


def _deliver(
    world: World, plan: ParallelPlan, mix: Mix, uses: TileUses, tokens: Tokens, repetitions: int
) -> tuple[dict[str, bool], dict[str, int], dict[str, list[float]]]:
    """One rank's part: whether each way's rows are right, rows that left this rank, seconds of each repetition."""
    rank, size, hidden = world.rank, world.size, mix.hidden
    shards = SequenceShards.of(plan.llm, mix.num_rows)
    planned = plan_exchange(uses.routes(plan, rank), plan, rank, shards, mix.tokens_per_tile, mix.chunk_tiles)
    generator = torch.Generator().manual_seed(rank)
    pixels = [torch.randn(chunk.num_rows, hidden, generator=generator) for chunk in planned.chunks]
    weight = torch.randn(hidden, hidden, generator=generator) / hidden**0.5

    def encode(part: torch.Tensor) -> torch.Tensor:
        for _ in range(mix.layers):
            part = torch.tanh(part @ weight)
        return part

    parts = [encode(part) for part in pixels]
    rows = torch.cat(parts)
    width = mix.num_rows // plan.llm.sequence_ranks
    num_microbatches = mix.num_microbatches(plan)
    borders = [planned.of_microbatch(m) for m in range(num_microbatches)]
    filled = torch.from_numpy(np.concatenate([m * width + local for m, (local, _) in enumerate(borders)]))
    sources = torch.from_numpy(np.concatenate([source for _, source in borders]))
    begins = np.cumsum([0, *(c.num_received for c in planned.chunks)]).tolist()

    def place(local: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_microbatches * width, hidden).index_copy_(0, local, values)

    def ours(encoded: Callable[[int], torch.Tensor], *, wait: bool) -> torch.Tensor:
        into = torch.empty(begins[-1], hidden)
        pending = []
        for k, chunk in enumerate(planned.chunks):
            out = into[begins[k] : begins[k + 1]]
            pending.append(start_exchange(encoded(k), chunk, out=out))
            if wait:
                pending[-1].wait()
        for work in () if wait else pending:
            work.wait()
        return place(filled, into[sources])

    most = int(np.bincount(tokens.holder, minlength=size).max(initial=0))
    mine = np.flatnonzero(tokens.owner == rank)
    picked = torch.from_numpy(tokens.holder[mine] * most + tokens.held[mine])
    mine_local = torch.from_numpy(tokens.local[mine])

    def all_gather() -> torch.Tensor:
        padded = torch.zeros(most, hidden)
        padded[: len(rows)] = rows
        everything = torch.empty(size * most, hidden)
        dist.all_gather_single(everything, padded)
        return place(mine_local, everything[picked])

    first, _, at_home = hop(rank, size, tokens.holder, tokens.held, tokens.home)
    second, arrived, _ = hop(rank, size, tokens.home, at_home, tokens.owner)
    arrived_local = torch.from_numpy(tokens.local[arrived])

    def two_exchange() -> torch.Tensor:
        back = start_exchange(rows, first).wait()
        return place(arrived_local, start_exchange(back, second).wait())

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "exchange": lambda: ours(lambda k: parts[k], wait=False),
        "all_gather": all_gather,
        "two_exchange": two_exchange,
        "overlapped": lambda: ours(lambda k: encode(pixels[k]), wait=False),
        "serial": lambda: ours(lambda k: encode(pixels[k]), wait=True),
    }
    wanted = all_gather()
    same = {way: torch.equal(deliver(), wanted) for way, deliver in ways.items()}  # warms up, too
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, deliver in ways.items():
            world.barrier()
            began = time.perf_counter()
            deliver()
            seconds[way].append(time.perf_counter() - began)

    def leave(*chunks: Chunk) -> int:
        return sum(int(chunk.send_splits.sum() - chunk.send_splits[rank]) for chunk in chunks)

    moved = {"exchange": leave(*planned.chunks), "all_gather": most * (size - 1), "two_exchange": leave(first, second)}
    return same, moved, seconds


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks to fork, a power of two.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 5,
) -> dict[str, Any]:
    """Measure the vision exchange over several plans and print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    results = [measure(plan, Mix(), repetitions) for plan in plans(ranks)]
    report = make_report("exchange", results, json_file)
    table = Table(
        "plan", "way", box=SIMPLE_HEAD, caption=f"lower bound: bytes that must move; {report['machine']['cpu']}"
    )
    for heading in ("MB moved", "× lower bound", "median", "spread"):
        table.add_column(heading, justify="right")
    for line in results:
        names = line["plan"].split(" | ")
        for number, way in enumerate(WAYS):
            moved = line[{"all_gather": "all_gather_bytes", "two_exchange": "two_exchange_bytes"}.get(way, "bytes")]
            ratio = moved / line["lower_bound_bytes"]
            seconds, spread = f"{line['seconds'][way] * 1e3:,.1f} ms", f"{line['spread'][way]:.0%}"
            name = names[number] if number < len(names) else ""
            table.add_row(
                name, way, f"{moved / 1e6:,.1f}", f"{ratio:.2f}", seconds, spread, end_section=way == WAYS[-1]
            )
    Console().print(table)
    return report
