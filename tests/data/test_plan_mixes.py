"""Ten thousand mixes of modalities: whatever the data is like, a plan holds each sample once and keeps its promises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout, StepPlan

MIXES = 10_000
PARTS = 20
"""Tests that the mixes are spread over, so that a failure is found again quickly."""

LAYOUTS = [DataLayout(1, 8), DataLayout(2, 4, 4), DataLayout(4, 2, 3), DataLayout(8, 1, 16), DataLayout(4, 2, 4, 2, 2)]


def random_mix(make_index: Callable[..., Any], rng: np.random.Generator) -> tuple[Any, int, int]:
    """An index of only text, only images or both, short or long, and budgets that fit most of it or little."""
    pack_tokens, pack_tiles = int(rng.choice([16, 64, 300])), int(rng.choice([0, 1, 6, 40]))
    datasets = []
    for number in range(int(rng.integers(1, 4))):
        count, longest = int(rng.integers(1, 40)), int(rng.choice([3, pack_tokens, 2 * pack_tokens]))
        tokens = np.minimum(1 + rng.exponential(longest / 3, count).astype(int), longest)
        dataset: dict[str, Any] = {"name": f"d{number}", "tokens": tokens, "supervised": rng.integers(0, tokens)}
        if rng.random() < 0.6:
            most = int(rng.choice([1, 5, max(1, 2 * pack_tiles)]))
            tiles = rng.integers(0, most + 1, count) * (rng.random(count) < rng.random())
            images = np.where(tiles > 0, rng.integers(1, np.maximum(tiles, 1) + 1), 0)
            dataset |= {"tiles": tiles, "images": images}
        datasets.append(dataset | {"repeat_time": float(rng.choice([1, 1, 2.5]))})
    index = make_index(*datasets)
    index.tokens = lambda sample: (None, np.ones(index.samples["num_tokens"][sample], np.bool_))
    return index, pack_tokens, pack_tiles


def check_step(index: Any, plan: StepPlan, layout: DataLayout, pack_tokens: int, pack_tiles: int) -> None:
    packs, pieces = plan.packs, plan.pieces
    assert len(packs) == 8
    assert packs.num_tokens.max(initial=0) <= pack_tokens
    assert packs.num_tiles.max(initial=0) <= pack_tiles
    assert np.bincount(plan.assignment.ravel(), minlength=8).tolist() == [1] * 8
    # Every tile of every image is in one piece, on an encoder that there is.
    counts = index.samples["num_images"][packs.samples]
    rows = [r for first, n in zip(index.samples["first_image"][packs.samples], counts, strict=True)
            for r in range(first, first + n)]  # fmt: skip
    assert plan.image_tiles.tolist() == index.images["num_tiles"][rows].tolist()
    tiles = [(i, first + t) for i, first, n in zip(pieces.image, pieces.first, pieces.tiles, strict=True)
             for t in range(n)]  # fmt: skip
    assert tiles == [(i, t) for i, n in enumerate(plan.image_tiles) for t in range(n)]
    assert pieces.encoder.min(initial=0) >= 0
    assert pieces.encoder.max(initial=0) < layout.encoders
    assert plan.vit_load.max() <= max(-(-plan.num_tiles // layout.encoders), int(1.005 * plan.vit_load.mean()))
    assert plan.num_tokens == packs.lengths.sum() <= 8 * pack_tokens
    assert 0 <= plan.num_supervised <= plan.num_tokens
    assert plan.loss_denominator >= 0


@pytest.mark.parametrize("part", range(PARTS))
def test_plans_of_random_mixes(make_index: Callable[..., Any], part: int) -> None:
    rng = np.random.default_rng(part)
    planned = 0
    for number in range(part, MIXES, PARTS):
        index, pack_tokens, pack_tiles = random_mix(make_index, rng)
        s = PlanSettings(
            seed=number,
            pack_tokens=pack_tokens,
            pack_tiles=pack_tiles,
            packs_per_step=8,
            window=int(rng.choice([4, 32, 1000])),
            balance_steps=int(rng.choice([1, 1, 2])),
            long_samples="split" if number % 3 == 0 else "skip",
        )
        order = (
            Sequential(index) if number % 2 else Mixture(index, MixtureSettings(replacement=number % 8 == 4), number)
        )
        try:
            planner = Planner(index, order, s)
        except ValueError as error:
            assert "none of" in str(error) or "nothing to draw" in str(error)
            continue
        planned += 1
        layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
        steps = range(planner.num_steps) if planner.num_steps is not None else (0, int(rng.integers(1, 6)))
        plans = [planner.plan_step(step, layout) for step in steps]
        for plan in plans:
            check_step(index, plan, layout, pack_tokens, pack_tiles)
        trained = [(s, b) for plan in plans for s, b in zip(plan.packs.samples, plan.packs.begins, strict=True)]
        if planner.num_steps is not None:
            parts = {i: -(-int(n) // pack_tokens) for i, n in enumerate(index.samples["num_tokens"])}
            dropped = set(planner.dropped.tolist())
            expected = [(i, p * pack_tokens) for i, n in parts.items() if i not in dropped for p in range(n)]
            assert sorted(trained) == expected
    assert planned > 0.5 * MIXES / PARTS
