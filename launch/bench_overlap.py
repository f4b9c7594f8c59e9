"""Shows that weights are gathered while the block before them computes: a trace of a decoder under InternEVO's ISP.

    block 0   gather ▓▓│ compute ░░░░░░░░░░ │            ZeRO 3 over all ranks, hp = all ranks: weights sharded and
    block 1            │ gather ▓▓▓▓        │ ░░░░░░░    gathered ahead of use, rows of the pack sharded throughout,
    block 2                                 │ ▓▓▓▓       all-to-all around attention alone

Forked gloo ranks run a few steps under ``torch.profiler``; all numbers come from the trace of rank 0. Two ways:

| way | what a prefetch does on the CPU |
|---|---|
| `waiting` | FSDP2's default: the gather is issued ahead, and waited for at once (on CUDA a stream runs it) |
| `async` | the gather is issued ahead, runs in gloo's thread, and is waited for where its block starts |

A gather is *under compute* while this rank's main thread is inside a block's forward or backward (its all-to-alls
included). The rest of the gather holds the main thread up.
"""

import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from evovlm.launch.report import make_report
from evovlm.models.config import DecoderConfig
from evovlm.models.decoder import Decoder
from evovlm.models.sharding import INTERNVL
from evovlm.parallel.attention import ShardedAttend
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout
from evovlm.parallel.mesh import build_mesh
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.sharded_data import accumulate, shard_module
from evovlm.parallel.world import World

Pass = Literal["forward", "backward"]
WAYS = {"waiting": False, "async": True}
SHAPE = DecoderConfig(
    vocab_size=1024, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1536
)
"""About 3 million parameters a block."""
_CAPTION = "milliseconds; issued and done are counted from when the compute of the block before begins"


@dataclass(frozen=True)
class Span:
    """An event of a trace that lasts; times in µs."""

    name: str
    start: float
    end: float

    def overlap(self, others: Iterable["Span"]) -> float:
        """Time in which one of some disjoint spans lasts, too."""
        return sum(max(0.0, min(self.end, o.end) - max(self.start, o.start)) for o in others)


@dataclass(frozen=True)
class Gather:
    """One gather of a block's weights.

    Attributes:
        unit: Path of the block.
        which: Of which pass.
        issued: When the main thread called the collective.
        run: When gloo's thread ran it.
        needed: When the block's compute began.
        before: Compute of the block before it in this pass; None for a pass's first block.
        hidden: Time of ``run`` under any block's compute.
    """

    unit: str
    which: Pass
    issued: float
    run: Span
    needed: float
    before: Span | None
    hidden: float

    @property
    def share(self) -> float:
        """Part of the gather that is under compute."""
        return self.hidden / (self.run.end - self.run.start)


def read_trace(events: Iterable[Mapping[str, Any]]) -> list[Gather]:
    """Find the gathers of blocks in a chrome trace of one rank.

    Args:
        events: Its ``traceEvents``, times in µs, of whole steps.

    Returns:
        The gathers in the order in which they were issued; the root's (embedding, last norm, head) are left out.

    Raises:
        ValueError: Calls and runs of gathers do not match: it is not a trace of gloo ranks.
    """
    spans = [Span(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X"]
    spans.sort(key=lambda span: span.start)
    calls = [span for span in spans if span.name == "c10d::_allgather_base_"]
    runs = [span for span in spans if span.name == "gloo:all_gather"]
    if len(calls) != len(runs):
        raise ValueError(f"the trace has {len(calls)} calls of all-gather, and gloo ran {len(runs)}")
    windows = _windows(spans)
    computes = [span for _, span in windows]
    prefix, gathers = "FSDP::all_gather (", []
    issuers = [span for span in spans if span.name.startswith(prefix)]
    for call, run in zip(calls, runs, strict=True):
        issuer = next((i for i in issuers if i.start <= call.start <= i.end), None)
        if issuer is None:
            continue
        unit = issuer.name.removeprefix(prefix).removesuffix(")")
        at = next(n for n, (_, span) in enumerate(windows) if span.name == unit and span.start > call.start)
        which, use = windows[at]
        before = windows[at - 1][1] if at and windows[at - 1][0] == which else None
        gathers.append(Gather(unit, which, call.start, run, use.start, before, run.overlap(computes)))
    return gathers


def _windows(spans: Sequence[Span]) -> list[tuple[Pass, Span]]:
    """Computes of blocks, in order: after what FSDP does before a block, until what it does after it."""
    found: list[tuple[Pass, Span]] = []
    ready: dict[str, float] = {}
    running = ""
    for span in spans:
        hook, _, unit = span.name.removesuffix(")").partition(" (")
        if span.name.startswith("FSDP::forward_prefetch for ") and running:
            ready[running] = span.end
        elif unit and hook in ("FSDP::pre_forward", "FSDP::pre_backward"):
            ready[unit], running = span.end, unit
        elif unit and hook == "FSDP::post_forward":
            found.append(("forward", Span(unit, ready.pop(unit), span.start)))
        elif unit and hook == "FSDP::post_backward_accumulate" and unit in ready:
            found.append(("backward", Span(unit, ready.pop(unit), span.start)))
    return found


def record(world: World, path: str, *, wait: bool, num_rows: int, steps: int, shape: DecoderConfig = SHAPE) -> None:
    """Run a decoder under ISP and write rank 0's trace.

    Args:
        world: All ranks are one head-parallel group and share the weights.
        path: Chrome trace to write.
        wait: Whether a prefetched gather is waited for at once.
        num_rows: T, rows of the pack.
        steps: How many to record, after one that is not.
        shape: Of the decoder.
    """
    layout = Layout(hp=world.size)
    mesh = build_mesh(layout, world.rank, world.device.type)
    torch.manual_seed(0)
    model = Decoder(shape)
    shard_module(model, INTERNVL.blocks["llm"], mesh)
    assert isinstance(model, FSDPModule)  # shard_module has made it one
    model._set_unshard_async_op(not wait)
    shards = SequenceShards.of(layout, num_rows)
    rows = torch.from_numpy(shards.block_rows(mesh.place.cp, mesh.place.hp))
    tokens = torch.randint(0, shape.vocab_size, (num_rows,), generator=torch.Generator().manual_seed(1))
    attend = ShardedAttend([0, num_rows // 3, num_rows], shards, mesh.place, mesh.groups)

    def step() -> None:
        accumulate(model, mesh, last=True)
        model(tokens[rows], rows.float(), attend).square().sum().backward()

    step()
    world.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    if world.rank == 0:
        recorded.export_chrome_trace(path)


def measure(ranks: int, num_rows: int, steps: int, traces: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Record and read a trace for each way; medians over the steps for each block and pass."""
    lines = []
    for way, path in traces.items():
        run_ranks(
            ranks,
            partial(record, path=str(path), wait=not WAYS[way], num_rows=num_rows, steps=steps),
            timeout=600.0,
        )
        gathers = read_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
        order = dict.fromkeys((gather.which, gather.unit) for gather in gathers)
        for which, unit in order:
            same = [gather for gather in gathers if (gather.which, gather.unit) == (which, unit)]
            lines.append({"way": way, "pass": which, "block": unit, **_medians(same)})
    return lines


def _medians(gathers: Sequence[Gather]) -> dict[str, float | None]:
    """Milliseconds; of ``issued``, ``done`` and ``needed`` after the compute of the block before has begun."""
    befores = [gather.before for gather in gathers]
    result: dict[str, float | None] = {"issued": None, "done": None, "before": None, "needed": None}
    if all(befores):
        starts = [before.start for before in befores if before]
        values = {
            "issued": [g.issued - s for g, s in zip(gathers, starts, strict=True)],
            "done": [g.run.end - s for g, s in zip(gathers, starts, strict=True)],
            "before": [before.end - before.start for before in befores if before],
            "needed": [g.needed - s for g, s in zip(gathers, starts, strict=True)],
        }
        result = {name: statistics.median(numbers) / 1e3 for name, numbers in values.items()}
    result["gather"] = statistics.median(g.run.end - g.run.start for g in gathers) / 1e3
    result["under_compute"] = sum(g.hidden for g in gathers) / sum(g.run.end - g.run.start for g in gathers)
    return result


def run(
    out: Annotated[Path | None, typer.Option(help="Chrome trace of the async way to write.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks to fork: 2 or 4.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows of the pack, a multiple of the ranks.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps to record.")] = 5,
) -> dict[str, Any]:
    """Trace a decoder under ISP (weights sharded and gathered ahead, head parallel attention) and print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as folder:
        traces = {way: Path(folder, f"{way}.json") for way in WAYS}
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            traces["async"] = out
        results = measure(ranks, rows, steps, traces)
    report = make_report("overlap", results, json_file)
    table = Table("way", "pass", "block", box=SIMPLE_HEAD, caption=_CAPTION)
    for heading in ("issued", "done", "compute before", "gather", "under compute"):
        table.add_column(heading, justify="right")
    for number, line in enumerate(results):
        times = ["" if line[name] is None else f"{line[name]:,.1f}" for name in ("issued", "done", "before", "gather")]
        ends = number + 1 == len(results) or results[number + 1]["pass"] != line["pass"]
        block = line["block"].rpartition(".")[2]
        share = f"{line['under_compute']:.0%}"
        table.add_row(line["way"], line["pass"], block, *times, share, end_section=ends)
    Console().print(table)
    return report


if __name__ == "__main__":
    typer.run(run)
