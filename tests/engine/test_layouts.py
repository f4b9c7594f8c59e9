"""Every layout trains the same model: the reduced matrix of ``evovlm verify``, and plans drawn at random.

Images in some packs only, images nowhere, one giant image; drop path on; a pack without targets; gradients clipped.
"""

from dataclasses import replace
from typing import Any

import pytest

# Imported on first use otherwise, by every forked rank anew.
import torch
import torch._dynamo
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evovlm.data.share_out import share_out
from evovlm.engine.engine import Engine
from evovlm.engine.equality import (
    OPTIM,
    SMALL,
    Trained,
    compare,
    make_pack,
    make_steps,
    make_weights,
    plain_loss,
    plain_model,
    tied,
    train_alone,
    train_under,
)
from evovlm.engine.equality_plans import PlanCase, all_cases
from evovlm.engine.options import EngineOptions
from evovlm.models.internvl import InternVL
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import AXES, Layout, ParallelPlan
from evovlm.parallel.world import World

CASES = {case.name: case for case in all_cases()}
FLOAT32 = ("pp2 cp2 tp2", "pp2 dp2", "hp2 tp2")
KNOWN: dict[Any, Trained] = {}


def alone(case: PlanCase, precision: Any = "float64") -> Trained:
    key = (case.tied, case.num_packs, tuple(case.options.get("freeze", ())), precision)
    if key not in KNOWN:
        config, steps = (tied() if case.tied else SMALL), make_steps(num_packs=case.num_packs)
        KNOWN[key] = train_alone(config, steps, freeze=key[2], precision=precision)
    return KNOWN[key]


def under(case: PlanCase, precision: Any = "float64") -> Trained:
    options = case.engine_options(precision=precision)
    config, steps = (tied() if case.tied else SMALL), make_steps(num_packs=case.num_packs)
    return run_ranks(case.plan.size, lambda world: train_under(case.plan, world, options, config, steps), timeout=300)[
        0
    ]


def test_the_matrix_covers_what_it_should() -> None:
    assert len(CASES) == len(all_cases()) >= 40
    layouts = [case.plan.llm for case in CASES.values()]
    alone_at = {axis: {getattr(x, axis) for x in layouts if x.size == getattr(x, axis)} for axis in AXES}
    assert all({2, 4} <= sizes for sizes in alone_at.values()), alone_at
    pairs = {tuple(axis for axis in AXES if getattr(x, axis) > 1) for x in layouts}
    assert {(a, b) for i, a in enumerate(AXES) for b in AXES[i + 1 :]} <= pairs
    assert ("pp", "cp", "tp") in pairs
    assert max(case.plan.size for case in CASES.values()) <= 8
    tiles = [[len(pack.tiles) for pack in step] for step in make_steps()]
    assert 0 in tiles[0]
    assert sum(tiles[1]) == 0 < max(tiles[2]) == sum(tiles[2])
    assert any(alone(CASES["one rank"]).clipped)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reduced])
def test_reduced_matrix(name: str) -> None:
    difference = compare(under(CASES[name]), alone(CASES[name]))
    assert difference.largest <= 1e-10, difference


@pytest.mark.parametrize("name", FLOAT32)
def test_float32(name: str) -> None:
    difference = compare(under(CASES[name], "float32"), alone(CASES[name], "float32"))
    assert difference.largest <= 1e-5, difference


@pytest.mark.parametrize(
    "llm",
    [Layout(cp=2, tp=2), Layout(hp=2, tp=2), Layout(cp=4, hp=2), Layout(pp=2, cp=2)],
    ids=lambda layout: str(layout),
)
def test_rows_at_borders_one_by_one(llm: Layout) -> None:
    """The loss of each single row beside a border of shards, chunks or segments: a long sum would hide it."""
    plan = ParallelPlan.for_llm(llm)
    segments = [0, 7, 8, 33, 47, 48, 63, 64]
    base = make_pack(SMALL, segments, 3, [2, 3], supervised=1.0)
    borders = {*range(0, 64, min(8, 64 // (2 * llm.sequence_ranks))), *segments}
    rows = sorted(row for border in borders for row in (border - 1, border) if 0 <= row < 64)
    rows = [row for row in rows if base.labels[row] != -100]
    packs = []
    for row in rows:
        weights = torch.zeros(64)
        weights[row] = 1.0
        packs.append(replace(base, labels=torch.where(weights > 0, base.labels, -100), weights=weights))

    def job(world: World) -> list[float]:
        engine = Engine.build(
            lambda: InternVL(SMALL),
            plan,
            world,
            optim=OPTIM,
            weights=make_weights(SMALL),
            options=EngineOptions(precision="float64", encode_tiles=2),
        )
        return [engine.evaluate([share_out([pack], plan, world.rank, SMALL.tokens_per_tile)])[0] for pack in packs]

    ours = run_ranks(plan.size, job, timeout=300)[0]
    model = plain_model().eval()
    with torch.no_grad():
        theirs = [float(plain_loss(model, pack)) for pack in packs]
    assert len(rows) >= 12
    for row, a, b in zip(rows, ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-10), row


@st.composite
def plans(draw: st.DrawFn) -> tuple[ParallelPlan, EngineOptions]:
    """Any plan of two or four ranks, with options that go together."""
    size = draw(st.sampled_from((2, 4)))
    axes = dict.fromkeys(("pp", "cp", "hp", "tp"), 1)
    left = size
    for axis in draw(st.permutations(list(axes))):
        axes[axis] = draw(st.sampled_from([n for n in (1, 2, 4) if left % n == 0]))
        left //= axes[axis]
    llm = Layout(
        **axes,
        dp=left,
        zero=draw(st.sampled_from((1, 2, 3))),
        shard=draw(st.sampled_from([n for n in (0, 1, 2) if left * axes["cp"] * axes["hp"] % (n or 1) == 0])),
    )
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if size % n == 0]))
    vit = Layout(dp=size // tp, tp=tp, zero=draw(st.sampled_from((1, 2, 3))))
    projector = draw(st.sampled_from([Layout(dp=size), Layout(dp=size // tp, tp=tp, zero=2)]))
    schedule = draw(st.sampled_from(("1f1b", "interleaved"))) if llm.pp == 2 else "1f1b"
    options = EngineOptions(
        precision="float64",
        encode_tiles=draw(st.integers(1, 5)),
        encoder_activations=draw(st.sampled_from(("keep", "recompute"))),
        schedule=schedule,
        virtual_stages=2 if schedule == "interleaved" else 1,
    )
    return ParallelPlan(llm=llm, vit=vit, projector=projector), options


@given(
    drawn=plans(),
    images=st.lists(st.lists(st.integers(1, 4), max_size=2), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=8, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)  # no shrinking: minutes
def test_random_plans_and_mixes(drawn: tuple[ParallelPlan, EngineOptions], images: list[list[int]], seed: int) -> None:
    plan, options = drawn
    config = replace(SMALL, vision=replace(SMALL.vision, num_layers=1))
    steps = [[make_pack(config, [0, 35 + i, 60, 64], seed + i, tiles) for i, tiles in enumerate(images)]]
    ours = run_ranks(plan.size, lambda world: train_under(plan, world, options, config, steps), timeout=300)[0]
    difference = compare(ours, train_alone(config, steps))
    assert difference.largest <= 1e-10, (str(plan), options, difference)
