"""What a step really sends equals the closed formulas: each collective's ranks, calls and bytes, under every axis."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from evovlm.data.share_out import share_out
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine, EngineOptions
from evovlm.engine.equality import OPTIM, SMALL, denominator, make_steps, make_weights
from evovlm.engine.parts import Part
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import INTERNVL
from evovlm.parallel import communication as comm
from evovlm.parallel.collective_counter import CollectiveCounter
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import AXES, Layout, ParallelPlan
from evovlm.parallel.routes import plan_exchange
from evovlm.parallel.sequence import SequenceShards
from evovlm.parallel.world import World

DECODER, VISION = SMALL.decoder, SMALL.vision
HEADS = comm.Heads(DECODER.num_heads, DECODER.num_kv_heads, DECODER.head_dim)
B, T, CHUNK_TILES, CHUNK_ROWS = 8, 64, 2, 2048
STEP = make_steps(num_rows=T)[0]
Seen = Counter[tuple[tuple[int, ...], comm.Collective, int]]


def ranks_of(axis: comm.Axis, layout: Layout, rank: int) -> tuple[int, ...]:
    """The ranks between which an axis sends, from the picture at the top of ``parallel/layout.py``."""
    everyone = range(layout.size)
    if axis == "all":
        return tuple(everyone)
    if axis in AXES:
        place = layout.coordinates(rank)
        others = [a for a in AXES if a != axis]
        return tuple(
            r for r in everyone if all(getattr(layout.coordinates(r), a) == getattr(place, a) for a in others)
        )

    def data(r: int) -> tuple[int, int, int, int]:
        stage, inside = divmod(r, layout.data_ranks * layout.tp)
        index, tp = divmod(inside, layout.tp)
        return stage, tp, *divmod(index, layout.shard_size)

    stage, tp, replica, shard = data(rank)
    wanted = (stage, tp, replica) if axis == "shard" else (stage, tp, shard)
    return tuple(r for r in everyone if (*data(r)[:2], data(r)[2 if axis == "shard" else 3]) == wanted)


def held(part: Part, options: dict[str, Any], shapes: dict[str, torch.Size], **more: bool) -> comm.Held:
    names = [name.removeprefix(part.prefix) for name, _, _ in part.named_parameters()]
    return comm.Held(
        layout=part.mesh.layout,
        tp_rank=part.mesh.place.tp,
        shapes={name: shapes[part.prefix + name] for name in names},
        styles=INTERNVL.tensor[part.module],
        blocks=INTERNVL.blocks.get(part.module),
        min_unit=options.get("min_unit", 0),
        trained=part.module not in options.get("freeze", ()),
        **more,
    )


def language_calls(engine: Engine, batch: StepBatch, options: dict[str, Any]) -> list[comm.Calls]:
    layout, uses, hidden = engine.language.mesh.layout, len(batch.packs), DECODER.hidden_size
    place, shards = engine.language.mesh.place, SequenceShards.of(engine.language.mesh.layout, T)
    rows = torch.from_numpy(shards.block_rows(place.cp, place.hp))
    targets = [int((pack.labels[rows] != -100).sum()) for pack in batch.packs]
    calls = []
    for part in engine.parts.stages:
        module = held(part, options, engine.parts.shapes)
        layers = len({name.split(".")[2] for name in module.shapes if ".layers." in f".{name}"})
        calls += comm.data_calls(module, uses, B)
        calls += comm.tensor_calls(module, [len(rows)] * uses, B)
        calls += comm.head_calls(layout, T, HEADS, layers * uses, B)
        calls += comm.context_calls(layout, T, HEADS, layers * uses, B)
        calls += comm.pipeline_calls(layout, T, hidden, part.stage, part.num_stages, uses, B)
        if part.is_last:
            calls += comm.loss_calls(layout, T, hidden, targets, CHUNK_ROWS, B)
    return calls


def expected(engine: Engine, plan: ParallelPlan, rank: int, batch: StepBatch, options: dict[str, Any]) -> Seen:
    per_tile, shapes = SMALL.tokens_per_tile, engine.parts.shapes
    exchange = plan_exchange(batch.routes, plan, rank, SequenceShards.of(plan.llm, T), per_tile, CHUNK_TILES)
    chunks = exchange.chunks
    frozen = options.get("freeze", ())
    vit_passes, passes = "vit" not in frozen, not {"vit", "projector"} <= set(frozen)
    tiles, shared = [len(chunk.slots) for chunk in chunks], plan.projector.tp == 1
    vit = held(engine.parts.encoder["vit"], options, shapes, passes=vit_passes)
    projector = held(engine.parts.encoder["projector"], options, shapes, passes=passes)
    by_module = {
        "vit": comm.data_calls(vit, len(chunks), B)
        + comm.tensor_calls(vit, [n * (1 + VISION.num_patches) for n in tiles], B),
        "projector": comm.data_calls(projector, len(chunks), B)
        + comm.tensor_calls(projector, [n * per_tile for n in tiles], B),
        "llm": language_calls(engine, batch, options)
        + comm.exchange_calls(chunks, DECODER.hidden_size, B, passes=passes)
        + comm.scalar_calls(),
    }
    if vit_passes if shared else passes:
        width = SMALL.shuffled_size if shared else DECODER.hidden_size
        by_module["vit"] += comm.share_calls(tiles, per_tile, width, plan.vit.tp, B)
    seen: Seen = Counter()
    for module, calls in by_module.items():
        for (axis, collective, num_bytes), count in comm.count_calls(calls).items():
            seen[ranks_of(axis, plan.layouts[module], rank), collective, num_bytes] += count
    return seen


def one_step(world: World, plan: ParallelPlan, options: dict[str, Any], *, torch_counts: bool = False) -> Any:
    """What a step sends and what the formulas say; calls as torch's own mode counts them."""
    engine = Engine.build(
        lambda: InternVL(SMALL),
        plan,
        world,
        hidden_size=DECODER.hidden_size,
        optim=OPTIM,
        weights=make_weights(SMALL),
        options=EngineOptions(**{"precision": "float64", "encode_tiles": CHUNK_TILES} | options),
    )
    packs = STEP[: plan.llm.dp] if torch_counts else STEP
    batch = share_out(packs, plan, world.rank, SMALL.tokens_per_tile)
    theirs = CommDebugMode() if torch_counts else contextlib.nullcontext()
    with theirs, CollectiveCounter() as counter:
        engine.train_step(batch, denominator(packs))
    by_torch = {str(name): count for name, count in theirs.get_comm_counts().items()} if torch_counts else {}
    return counter.seen, expected(engine, plan, world.rank, batch, options), by_torch


def case(llm: Layout, **more: Any) -> tuple[ParallelPlan, dict[str, Any]]:
    layouts = {name: more.pop(name) for name in ("vit", "projector") if name in more}
    return ParallelPlan.for_llm(llm, **layouts), more


CASES: dict[str, tuple[ParallelPlan, dict[str, Any]]] = {
    "dp2 zero1": case(Layout(dp=2, zero=1)),
    "dp2 zero2": case(Layout(dp=2, zero=2)),
    "dp2 zero3": case(Layout(dp=2)),
    "dp2, one unit": case(Layout(dp=2), min_unit=10**9),
    "copies": case(Layout(dp=2, shard=1)),
    "frozen vit": case(Layout(dp=2), freeze=("vit",)),
    "frozen encoder": case(Layout(dp=2, zero=2), freeze=("vit", "projector")),
    "frozen llm": case(Layout(tp=2), freeze=("llm",)),
    "tp2, vit tp2": case(Layout(tp=2), vit=Layout(tp=2)),
    "hp2": case(Layout(hp=2)),
    "cp2": case(Layout(cp=2)),
    "pp2": case(Layout(pp=2)),
    "pp2, interleaved": case(Layout(pp=2, zero=1), schedule="interleaved", virtual_stages=2),
    "dp4, hybrid zero1": case(Layout(dp=4, zero=1, shard=2)),
    "dp4, hybrid zero2": case(Layout(dp=4, zero=2, shard=2)),
    "dp4, hybrid zero3": case(Layout(dp=4, shard=2)),
    "hp4 zero3": case(Layout(hp=4)),
    "cp2 hp2": case(Layout(cp=2, hp=2)),
    "cp4, double ring": case(Layout(cp=4, window=2)),
    "tp2 dp2, vit tp2": case(Layout(tp=2, dp=2), vit=Layout(tp=2, dp=2)),
    "all tp2": case(Layout(cp=2, tp=2), vit=Layout(tp=2, dp=2), projector=Layout(tp=2, dp=2)),
    "pp2 dp2, hybrid": case(Layout(pp=2, dp=2, shard=1)),
}


def run_all(size: int) -> dict[str, list[Any]]:
    def job(world: World) -> dict[str, Any]:
        warnings.simplefilter("ignore")
        return {name: one_step(world, *CASES[name]) for name in CASES if CASES[name][0].size == size}

    results: Sequence[dict[str, Any]] = run_ranks(size, job)
    return {name: [result[name] for result in results] for name in results[0]}


@pytest.mark.parametrize("size", [2, 4])
def test_calls_and_bytes_of_a_step_equal_the_formulas(size: int) -> None:
    wrong = {}
    for name, ranks in run_all(size).items():
        for rank, (seen, wanted, _) in enumerate(ranks):
            if seen != wanted:
                wrong[name, rank] = {"not in the formulas": seen - wanted, "not seen": wanted - seen}
    assert not wrong
