"""What a step really sends equals the closed formulas: each collective's ranks, calls and bytes, under every axis."""

import contextlib
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from evovlm.data.share_out import share_out
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine
from evovlm.engine.equality import OPTIM, SMALL, denominator, make_steps, make_weights, tied
from evovlm.engine.options import EngineOptions
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

CONFIG = replace(
    SMALL,
    decoder=replace(SMALL.decoder, num_layers=2),
    vision=replace(SMALL.vision, norm="rms_norm", qk_norm=True),
)
DECODER, VISION = CONFIG.decoder, CONFIG.vision
HEADS = comm.Heads(DECODER.num_heads, DECODER.num_kv_heads, DECODER.head_dim)
B, T, CHUNK_TILES, CHUNK_ROWS = 8, 64, 2, 2048
PACKS = make_steps(CONFIG, num_packs=11, num_rows=T)[0][3:]
"""Two for each data-parallel rank; some have images, one of them more than a chunk holds."""
Seen = Counter[tuple[tuple[int, ...], comm.Collective, int]]


def ranks_of(axis: comm.Axis, layout: Layout, rank: int) -> tuple[int, ...]:
    """The ranks between which an axis sends, from the picture at the top of ``parallel/layout.py``."""
    everyone = range(layout.size)
    if axis == "all":
        return tuple(everyone)
    if axis in AXES:
        place = layout.coordinates(rank)
        others = [a for a in AXES if a != axis]
        return tuple(r for r in everyone if all(getattr(layout.coordinates(r), a) == getattr(place, a) for a in others))

    def data(r: int) -> tuple[int, int, int, int]:
        stage, inside = divmod(r, layout.data_ranks * layout.tp)
        index, tp = divmod(inside, layout.tp)
        return stage, tp, *divmod(index, layout.shard_size)

    stage, tp, replica, shard = data(rank)
    wanted = (stage, tp, replica) if axis == "shard" else (stage, tp, shard)
    return tuple(r for r in everyone if (*data(r)[:2], data(r)[2 if axis == "shard" else 3]) == wanted)


def held(part: Part, options: dict[str, Any], shapes: dict[str, torch.Size], **more: bool) -> comm.Held:
    names = [name for name, _ in part.root.named_parameters()]
    return comm.Held(
        layout=part.mesh.layout,
        tp_rank=part.mesh.place.tp,
        shapes={name: shapes[part.prefix + part.copies.get(name, name)] for name in names},
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
        matrix = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in module.shapes]
        if options.get("tied") and matrix:
            calls += comm.tied_calls(module, matrix[0], 0, B)  # its plan has whole copies
        if part.is_last:
            calls += comm.loss_calls(layout, T, hidden, targets, CHUNK_ROWS, B)
    return calls


def expected(engine: Engine, plan: ParallelPlan, rank: int, batch: StepBatch, options: dict[str, Any]) -> Seen:
    per_tile, shapes = CONFIG.tokens_per_tile, engine.parts.shapes
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
        width = CONFIG.shuffled_size if shared else DECODER.hidden_size
        by_module["vit"] += comm.share_calls(tiles, per_tile, width, plan.vit.tp, B)
    seen: Seen = Counter()
    for module, calls in by_module.items():
        for (axis, collective, num_bytes), count in comm.count_calls(calls).items():
            seen[ranks_of(axis, plan.layouts[module], rank), collective, num_bytes] += count
    return seen


def one_step(world: World, plan: ParallelPlan, options: dict[str, Any], *, torch_counts: bool = False) -> Any:
    """What a step sends and what the formulas say; calls as torch's own mode counts them."""
    config = tied(CONFIG) if options.get("tied") else CONFIG
    engine = Engine.build(
        lambda: InternVL(config),
        plan,
        world,
        optim=OPTIM,
        weights=make_weights(config),
        options=EngineOptions(
            **{"precision": "float64", "encode_tiles": CHUNK_TILES, "encoder_activations": "keep"}
            | {name: value for name, value in options.items() if name != "tied"}
        ),
    )
    packs = PACKS[: plan.llm.dp * (1 if torch_counts else 2)]
    batch = share_out(packs, plan, world.rank, CONFIG.tokens_per_tile)
    if plan.llm.pp > 1:  # torch's schedules open their connections in the first step, by sends of 4 bytes
        engine.train_step(batch, denominator(packs))
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
    "dp2 zero3": case(Layout(dp=2)),
    "dp2, copies, one unit": case(Layout(dp=2, shard=1), min_unit=10**9),
    "frozen vit": case(Layout(dp=2), freeze=("vit",)),
    "frozen encoder, zero2": case(Layout(dp=2, zero=2), freeze=("vit", "projector")),
    "frozen llm": case(Layout(tp=2), freeze=("llm",)),
    "tp2, vit and projector tp2": case(Layout(tp=2), vit=Layout(tp=2), projector=Layout(tp=2)),
    "hp2": case(Layout(hp=2)),
    "cp2": case(Layout(cp=2)),
    "pp2": case(Layout(pp=2)),
    "dp4, hybrid zero2": case(Layout(dp=4, zero=2, shard=2)),
    "cp2 hp2": case(Layout(cp=2, hp=2)),
    "cp4, double ring": case(Layout(cp=4, window=2)),
    "tp2 dp2, vit tp2": case(Layout(tp=2, dp=2), vit=Layout(tp=2, dp=2)),
    "pp2 dp2, copies, tied": case(Layout(pp=2, dp=2, shard=1), tied=True),
}


RECOMPUTED = "tp2, recomputed"
TORCH_NAMES = {
    "all_gather": "c10d._allgather_base_",
    "reduce_scatter": "c10d._reduce_scatter_base_",
    "all_reduce": "c10d.allreduce_",
    "all_to_all": "c10d.alltoall_base_",
}


def counted_by_torch(world: World) -> tuple[Seen, dict[str, int]]:
    """What torch's own mode counts; it fails where a module runs twice: one microbatch, one chunk."""
    plan, options = case(Layout(tp=2), vit=Layout(tp=2), encode_tiles=100)
    seen, _, by_torch = one_step(world, plan, options, torch_counts=True)
    return seen, by_torch


@pytest.mark.parametrize("size", [2, 4])
def test_calls_and_bytes_of_a_step_equal_the_formulas(size: int) -> None:
    def job(world: World) -> tuple[dict[str, Any], tuple[Seen, dict[str, int]] | None]:
        warnings.simplefilter("ignore")
        steps = {name: one_step(world, *CASES[name])[:2] for name in CASES if CASES[name][0].size == size}
        if size == 4:
            return steps, None
        steps |= {RECOMPUTED: one_step(world, *case(Layout(tp=2), recompute={"llm": "full"}))[:2]}
        return steps, counted_by_torch(world)

    wrong: dict[tuple[str, int], Any] = {}
    for rank, (steps, by_torch) in enumerate(run_ranks(size, job)):
        for name, (seen, wanted) in steps.items():
            if name == RECOMPUTED:  # both gathers of a block, and the reduce-scatter after attention
                hidden, blocks = T * DECODER.hidden_size * B, 2 * DECODER.num_layers
                wanted.update({((0, 1), "all_gather", hidden): 2 * blocks, ((0, 1), "reduce_scatter", hidden): blocks})
            if seen != wanted:
                wrong[name, rank] = {"not in the formulas": seen - wanted, "not seen": wanted - seen}
        if by_torch is not None:
            seen, theirs = by_torch
            ours: Counter[str] = Counter()
            for (_, collective, _), count in seen.items():
                ours[TORCH_NAMES[collective]] += count
            assert ours == theirs
            assert len(ours) == 4
    assert not wrong


def test_bytes_of_the_published_38b_by_hand() -> None:
    """ISP as hp8 with ZeRO 3 over 64 ranks, bfloat16: numbers worked out from the table of the docs."""
    layout, heads = Layout(dp=8, hp=8), comm.Heads(40, 8, 128)
    calls = comm.sum_by_axis(comm.head_calls(layout, 32768, heads, 64, 2))
    assert calls == {("hp", "all_to_all"): (256, 64 * 2 * 2 * 128 * 4096 * (40 + 2 * 8 + 40))}
    block = {"layers.0.a.weight": (5120, 5120), "layers.0.b.weight": (7, 3), "head.weight": (151674, 5120)}
    held = comm.Held(layout=layout, tp_rank=0, shapes=block, styles={}, blocks="layers.*")
    assert comm.count_calls(comm.data_calls(held, 4, 2)) == {
        ("shard", "all_gather", 2 * (5120 * 5120 + 64 * 3)): 8,
        ("shard", "reduce_scatter", 4 * (5120 * 5120 + 64 * 3)): 4,
        ("shard", "all_gather", 2 * 151680 * 5120): 8,
        ("shard", "reduce_scatter", 4 * 151680 * 5120): 4,
    }
    # Of 151,674 rows the first 63 of 64 ranks hold 2,370 each.
    assert comm.tied_calls(held, "head.weight", 63, 2)[0] == comm.Calls("pp", "send", 1, 4 * 2364 * 5120)


def test_the_counter_refuses_what_it_does_not_know() -> None:
    def job(world: World) -> str:
        with CollectiveCounter(), pytest.raises(NotImplementedError) as error:
            dist.broadcast(torch.zeros(1), 0)
        return str(error.value)

    assert "broadcast" in run_ranks(1, job)[0]
