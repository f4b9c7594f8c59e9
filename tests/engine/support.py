"""What the tests of the engine share: a very small model, packs, and engines built with defaults for tests."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# Imported on first use otherwise, by every forked rank anew.
import torch._dynamo
import torch.distributed.fsdp
from torch import Tensor

from evovlm.data.share_out import WholePack, share_out
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine
from evovlm.engine.equality import (
    Trained,
    compare,
    denominator,
    make_pack,
    make_weights,
    plain_loss,
    train_alone,
)
from evovlm.engine.equality import plain_model as plain_model_of
from evovlm.engine.options import EngineOptions
from evovlm.engine.settings import OptimSettings
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.internvl import InternVL
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

__all__ = [
    "OPTIM",
    "SMALL",
    "STEPS",
    "Trained",
    "assert_same_training",
    "build",
    "data_plan",
    "denominator",
    "microbatch",
    "plain_loss",
    "plain_model",
    "run_steps",
    "train_plainly",
    "weights_of",
    "whole_packs",
]

VOCAB = 37
T = 32
TILE = 8
TOKENS_PER_TILE = 4

SMALL = InternVLConfig(
    vision=VisionConfig(
        hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, tile_size=TILE, patch_size=2, drop_path_rate=0.4
    ),
    decoder=DecoderConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24
    ),
)
"""About 10,000 parameters; drop path on."""

OPTIM = OptimSettings(lr=0.01, lr_scale={"vit": 0.5, "projector": 2.0}, weight_decay=0.1, clip_norm=1.0)

Job = Callable[[World], Any]
weights_of = make_weights


def microbatch(seed: int, num_tiles: int, *, supervised: float = 0.5) -> WholePack:
    """One pack of two segments and padding, with images of up to two tiles."""
    images = [2] * (num_tiles // 2) + [1] * (num_tiles % 2)
    return make_pack(SMALL, [0, 20, 29, T], seed, images, supervised=supervised)


STEPS = [
    [microbatch(0, 0), microbatch(1, 2), microbatch(2, 0), microbatch(3, 4)],  # half the packs have text only
    [microbatch(10 + i, 0) for i in range(4)],  # no image anywhere
    [microbatch(20, 1), microbatch(21, 0, supervised=0.0), microbatch(22, 3), microbatch(23, 2)],  # nothing to learn
]
"""Three steps of four packs each."""


def data_plan(size: int, **layout: Any) -> ParallelPlan:
    """Every module data parallel over all ranks, alike."""
    one = Layout(dp=size, **layout)
    return ParallelPlan(vit=one, projector=one, llm=one)


def build(
    world: World,
    config: InternVLConfig = SMALL,
    *,
    plan: ParallelPlan | None = None,
    optim: OptimSettings = OPTIM,
    weights: Iterator[tuple[str, Tensor]] | None = None,
    **options: Any,
) -> Engine:
    """Build an engine: float64 and ZeRO 3 unless told otherwise."""
    return Engine.build(
        lambda: InternVL(config),
        plan or data_plan(world.size),
        world,
        optim=optim,
        weights=weights or weights_of(config),
        options=EngineOptions(**({"precision": "float64", "encode_tiles": 2} | options)),
    )


def run_steps(
    engine: Engine, plan: ParallelPlan | None = None, steps: Sequence[Sequence[WholePack]] = STEPS
) -> Trained:
    """Train; weights come out on every rank."""
    world = engine.world
    plan = plan or data_plan(world.size)
    results = [
        engine.train_step(share_out(step, plan, world.rank, TOKENS_PER_TILE), denominator(step)) for step in steps
    ]
    return Trained(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        clipped=[result.clipped for result in results],
        weights=dict(engine.named_full_tensors(everywhere=True)),
    )


def whole_packs(batch: StepBatch) -> list[WholePack]:
    """The packs of a run of one rank, each with its tiles."""
    receives, packs = batch.routes.receives, []
    for number, pack in enumerate(batch.packs):
        slots = torch.from_numpy(receives.slot[receives.microbatch == number])
        packs.append(
            WholePack(**vars(pack), tiles=batch.tiles[slots], tile_keys=batch.tile_keys[slots], image_tiles=[])
        )
    return packs


def plain_model(config: InternVLConfig = SMALL, seed: int = 0) -> InternVL:
    """The model in one process, in float64."""
    return plain_model_of(config, seed)


def train_plainly(
    config: InternVLConfig = SMALL,
    steps: Sequence[Sequence[WholePack]] = STEPS,
    *,
    freeze: Sequence[str] = (),
    optim: OptimSettings = OPTIM,
) -> Trained:
    """The same training in one process, without the engine."""
    return train_alone(config, steps, freeze=freeze, optim=optim)


def assert_same_training(ours: Trained, theirs: Trained, rtol: float = 1e-10) -> None:
    """Losses, gradient norms and all weights, each relative to its size."""
    difference = compare(
        Trained(ours.losses, ours.norms, ours.clipped, ours.weights),
        Trained(theirs.losses, theirs.norms, theirs.clipped, theirs.weights),
    )
    assert difference.largest <= rtol, difference
