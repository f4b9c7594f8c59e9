"""Compiled blocks train as eager ones do, on one rank and on two, recomputed or not, from few graphs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from evovlm.data.share_out import WholePack, share_out
from evovlm.engine.equality import make_pack
from evovlm.engine.settings import KernelSettings
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

from .support import SMALL, TOKENS_PER_TILE, build, data_plan, denominator

COMPILED = KernelSettings(compile="block")
PACKS: Sequence[WholePack] = [
    make_pack(SMALL, borders, seed, images)
    for seed, (borders, images) in enumerate(
        [([0, 20, 29, 32], [1]), ([0, 5, 32], [2]), ([0, 9, 14, 32], [1]), ([0, 32], [1])]
    )
]
"""No two packs have the same segments; the tiles of each half of them are as many."""


def gradients(world: World, drop_path: float, **options: Any) -> tuple[float, dict[str, Tensor], dict[str, int]]:
    """Loss and gradients of a step in float64, all tiles in one chunk, and what the compiler has counted."""
    counters.clear()
    torch.compiler.reset()
    config = replace(SMALL, vision=replace(SMALL.vision, drop_path_rate=drop_path))
    engine = build(world, config, encode_tiles=16, **options)
    plan = data_plan(world.size)
    loss = engine.backward(share_out(PACKS, plan, world.rank, TOKENS_PER_TILE), denominator(PACKS))
    counted = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    return loss, dict(engine.named_full_gradients(everywhere=True)), counted


@pytest.mark.parametrize(
    ("ranks", "drop_path", "options"),
    [
        pytest.param(1, 0.4, {}, id="one rank, drop path"),
        pytest.param(2, 0.0, {"recompute": {"vit": "full", "llm": "full"}}, id="two ranks, recomputed"),
    ],
)
def test_compiled_blocks_compute_the_same(ranks: int, drop_path: float, options: dict[str, Any]) -> None:
    eager = run_ranks(ranks, lambda world: gradients(world, drop_path, **options))
    compiled = run_ranks(ranks, lambda world: gradients(world, drop_path, kernels=COMPILED, **options), timeout=300)
    for (loss, ours, counted), (expected, theirs, none) in zip(compiled, eager, strict=True):
        assert loss == pytest.approx(expected, rel=1e-10)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        # One graph for the blocks of the ViT (one more for a block that drops paths), one or two (of any number of
        # segments) for those of the LLM.
        assert none["graphs"] == 0
        assert 2 <= counted["graphs"] <= 3 + (drop_path > 0)
        assert counted["breaks"] == 0
