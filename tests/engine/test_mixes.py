"""Random mixes from the index to the gradient: four ranks train on what one process does, whatever a step holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evovlm.data.batch import BatchSettings, V2PESettings
from evovlm.data.images import load_tiles
from evovlm.data.index import Index
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_batch import StepBatch, build_step
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.equality import plain_model as plain_model_of
from evovlm.models.config import InternVLConfig
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

from .support import OPTIM, TILE, build, plain_loss, weights_of, whole_packs

MIXES = 10
G = 8
PLANS = {
    "data parallel": ParallelPlan(llm=Layout(dp=4), vit=Layout(dp=4), projector=Layout(dp=4)),
    "two encoders": ParallelPlan(llm=Layout(dp=4, zero=2), vit=Layout(dp=2, tp=2), projector=Layout(dp=4)),
    "stages": ParallelPlan(llm=Layout(pp=2, dp=2, zero=1), vit=Layout(dp=4), projector=Layout(dp=4)),
    "sequence": ParallelPlan(llm=Layout(dp=1, cp=2, tp=2), vit=Layout(dp=4), projector=Layout(dp=4)),
    "heads": ParallelPlan(llm=Layout(dp=2, hp=2), vit=Layout(dp=4), projector=Layout(dp=4)),
}


def planner_of(index: Index, number: int) -> tuple[Planner, int]:
    """A planner of a random mix, and a step to train."""
    rng = np.random.default_rng(number)
    on = [("shapes",), ("text",), ("shapes", "text")][number % 3]
    mixture = MixtureSettings(
        datasets=on,
        weights={name: float(rng.choice([0.1, 1.0, 3.0])) for name in on},
        language_ratio=None,
        replacement=bool(rng.random() < 0.3),
    )
    s = PlanSettings(
        seed=number,
        pack_tokens=int(rng.choice([120, 160, 256])),
        pack_tiles=int(rng.choice([5, 16])),
        packs_per_step=G,
        window=int(rng.choice([8, 64])),
        even_packs=str(rng.choice(["always", "never"])),
        balance_steps=int(rng.choice([1, 2])),
        long_samples="split",
    )
    return Planner(index, Mixture(index, mixture, number), s), int(rng.integers(0, 5))


def batch_of(
    index: Index, planner: Planner, plan: StepPlan, tokenizer: Tokenizer, rank: int, encoder: int
) -> StepBatch:
    s = planner.settings
    settings = BatchSettings(
        s.seed,
        s.pack_tokens,
        s.loss_weighting,
        tokenizer.image_context,
        tokenizer.end_of_text,
        V2PESettings(mode="random"),
        augment=False,
    )
    batch, jobs = build_step(index, plan, settings, data_rank=rank, encoder=encoder)
    for job in jobs:
        tiles = load_tiles(job.ref, TILE)[job.begin : job.end]
        batch.tiles[job.slot : job.slot + len(tiles)] = torch.from_numpy(tiles)
    return batch


@pytest.fixture(scope="module")
def trained(
    indexes: dict[str, Path], tokenizer: Tokenizer, small_config: InternVLConfig
) -> dict[tuple[int, str], dict[str, Any]]:
    """Loss and gradient norm of a step of every mix under two plans each, on four ranks."""
    index = Index.open(indexes["train"])

    def job(world: World) -> dict[tuple[int, str], dict[str, Any]]:
        seen = {}
        for place, (name, parallel) in enumerate(PLANS.items()):
            engine = build(world, small_config, plan=parallel, weights=weights_of(small_config))
            llm, vit = parallel.llm, parallel.vit
            rank, encoder = llm.coordinates(world.rank).dp, vit.coordinates(world.rank).dp
            for number in range(MIXES):
                if (number - place) % len(PLANS) not in (0, 2):
                    continue
                planner, step = planner_of(index, number)
                plan = planner.plan_step(step, DataLayout(llm.dp, G // llm.dp, vit.dp, llm.pp))
                batch = batch_of(index, planner, plan, tokenizer, rank, encoder)
                # A learning rate of 0 leaves the weights as they are for the next mix.
                result = engine.train_step(batch, plan.loss_denominator, 0.0)
                seen[number, name] = {"loss": result.loss, "grad_norm": result.grad_norm, "vit_load": plan.vit_load}
        return seen

    return run_ranks(4, job, timeout=300)[0]


@pytest.mark.parametrize("number", range(MIXES))
def test_four_ranks_train_on_any_mix_as_one_process_does(
    trained: dict[tuple[int, str], dict[str, Any]],
    indexes: dict[str, Path],
    tokenizer: Tokenizer,
    small_config: InternVLConfig,
    number: int,
) -> None:
    index = Index.open(indexes["train"])
    planner, step = planner_of(index, number)
    plan = planner.plan_step(step, DataLayout(1, G))
    packs = whole_packs(batch_of(index, planner, plan, tokenizer, 0, 0))
    model = plain_model_of(small_config)
    total = sum((plain_loss(model, pack) for pack in packs), torch.zeros((), dtype=torch.float64))
    (total / plan.loss_denominator).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm))
    found = {name: result for (mix, name), result in trained.items() if mix == number}
    assert len(found) == 2
    for name, result in found.items():
        assert result["loss"] == pytest.approx(float(total.detach()) / plan.loss_denominator, rel=1e-10), name
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-9), name
        assert result["vit_load"].sum() == plan.num_tiles


def test_mixes_differ_in_what_they_hold(indexes: dict[str, Path]) -> None:
    """Text alone, images alone, and both; some with fewer images than encoders."""
    index = Index.open(indexes["train"])
    plans = [
        planner.plan_step(step, DataLayout(1, G)) for planner, step in (planner_of(index, n) for n in range(MIXES))
    ]
    shares = [plan.num_visual_tokens / plan.num_tokens for plan in plans]
    assert min(shares) == 0.0
    assert max(shares) > 0.1
    assert len({plan.num_tiles for plan in plans}) > 5


@pytest.mark.parametrize("weighting", ["square", "token"])
def test_the_loss_does_not_depend_on_the_packing(
    indexes: dict[str, Path], tokenizer: Tokenizer, small_config: InternVLConfig, weighting: Any
) -> None:
    """The same samples in other packs, in another order, beside other neighbours: the same loss and gradients."""
    index = Index.open(indexes["train"])
    seen = []
    for window, even_packs, pack_tokens in (
        (8, "never", 224),
        (64, "never", 224),
        (64, "always", 224),
        (16, "never", 300),
    ):
        s = PlanSettings(
            seed=1,
            pack_tokens=pack_tokens,
            pack_tiles=16,
            packs_per_step=24,
            loss_weighting=weighting,
            window=window,
            even_packs=even_packs,
        )
        planner = Planner(index, Sequential(index), s)
        assert planner.num_steps == 1
        plan = planner.plan_step(0, DataLayout(1, 24))
        assert plan.num_samples == len(index)
        model = plain_model_of(small_config)
        packs = whole_packs(batch_of(index, planner, plan, tokenizer, 0, 0))
        total = sum((plain_loss(model, pack) for pack in packs), torch.zeros((), dtype=torch.float64))
        (total / plan.loss_denominator).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        seen.append(
            (float(total.detach()) / plan.loss_denominator, gradients, [p.samples.tolist() for p in plan.packs])
        )
    first = seen[0]
    assert len({str(packs) for _, _, packs in seen}) == len(seen)
    for loss, gradients, _ in seen[1:]:
        # Loss weights are float32, so that 1/√n is rounded, but alike in every packing.
        assert loss == pytest.approx(first[0], rel=1e-10)
        torch.testing.assert_close(gradients, first[1], rtol=1e-9, atol=1e-12)
