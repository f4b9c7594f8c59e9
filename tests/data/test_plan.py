"""The step plan: pure, layout-independent, nothing lost or repeated, budgets kept, exact denominator."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.packs import Pack, Packs
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout, StepPlan, describe_outliers, imbalance, loss_weights
from evovlm.parallel.cost import IntegerCosts

MakeIndex = Callable[..., Any]
NATURAL = MixtureSettings(language_ratio=None)
TOKENS, TILES = 64, 6


def random_index(make_index: MakeIndex, seed: int, size: int = 60, longest: int = TOKENS) -> Any:
    """Text and images of random sizes; some samples have several images, some no target."""
    rng = np.random.default_rng(seed)
    num_text = int(rng.integers(1, size))
    tiles = rng.integers(0, TILES + 1, size - num_text)
    tokens = [rng.integers(1, longest + 1, n) for n in (num_text, size - num_text)]
    return make_index(
        {"name": "text", "tokens": tokens[0], "supervised": rng.integers(0, tokens[0])},
        {
            "name": "chart",
            "tokens": tokens[1],
            "tiles": tiles,
            "images": rng.integers(np.minimum(tiles, 1), tiles + 1),
            "supervised": rng.integers(0, tokens[1]),
        },
    )


def make_planner(index: Any, mix: MixtureSettings = NATURAL, **changes: Any) -> Planner:
    s = PlanSettings(
        **{"seed": 1, "pack_tokens": TOKENS, "pack_tiles": TILES, "packs_per_step": 8, "window": 16} | changes
    )
    return Planner(index, Mixture(index, mix, s.seed), s)


def drawn(packs: list[Pack]) -> list[tuple[int, int]]:
    return [(int(s), int(v)) for p in packs for s, v in zip(p.samples, p.visits, strict=True)]


def as_lists(packs: Sequence[Pack]) -> list[list[int]]:
    return [[*p.samples.tolist(), -1, *p.visits.tolist()] for p in packs]


@given(seed=st.integers(0, 2**32), mix=st.sampled_from([NATURAL, MixtureSettings(), MixtureSettings(replacement=True)]))
@settings(max_examples=40, deadline=None)
def test_stream_of_packs_is_the_order(make_index: MakeIndex, seed: int, mix: MixtureSettings) -> None:
    """Nothing is lost, repeated or put in another epoch, and both budgets hold."""
    index = random_index(make_index, seed)
    planner = make_planner(index, mix)
    ends = [planner.num_packs(epochs) for epochs in range(4)]
    packs = [p for step in range(-(-ends[-1] // 8)) for p in planner.plan_step(step, DataLayout(4, 2)).packs]
    for epoch in range(3):
        windows = [planner.order.window(epoch, number, 16) for number in range(planner.order.num_windows(16))]
        expected = Counter((s, v) for w in windows for s, v in zip(w.samples.tolist(), w.visits.tolist(), strict=True))
        assert Counter(drawn(packs[ends[epoch] : ends[epoch + 1]])) == expected
    rows = index.samples
    for p in packs:
        assert len(p.samples) > 0
        assert p.num_tokens == rows["num_tokens"][p.samples].sum() <= TOKENS
        assert p.num_tiles == rows["num_tiles"][p.samples].sum() <= TILES
        assert p.lengths.tolist() == rows["num_tokens"][p.samples].tolist()
        assert not p.begins.any()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_packs_of_a_step_do_not_depend_on_the_layout(make_index: MakeIndex, seed: int) -> None:
    index = random_index(make_index, seed)
    for step in (0, 3):
        plans = [
            make_planner(index).plan_step(step, DataLayout(ranks, 8 // ranks))  # a planner each, as ranks have
            for ranks in (1, 2, 4, 8)
        ]
        for plan in plans:
            assert as_lists(plan.packs) == as_lists(plans[0].packs)
            assert plan.loss_denominator == plans[0].loss_denominator
            assert plan.image_tiles.tolist() == plans[0].image_tiles.tolist()
            assert sorted(plan.assignment.ravel().tolist()) == list(range(8))  # each pack on one rank, once
        assert make_planner(index).plan_step(step, DataLayout(4, 2)).digest() == plans[2].digest()
        assert len({plan.digest() for plan in plans}) == 4


@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 20), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_step_can_be_jumped_to(make_index: MakeIndex, seed: int, steps: list[int]) -> None:
    index, layout = random_index(make_index, seed), DataLayout(2, 4)
    walked = make_planner(index)
    digests = [walked.plan_step(step, layout).digest() for step in range(21)]
    jumper = make_planner(index)
    for step in steps:  # forwards and backwards, with one planner and with a fresh one
        assert jumper.plan_step(step, layout).digest() == digests[step]
        assert make_planner(index).plan_step(step, layout).digest() == digests[step]


def test_layout_changes_in_the_middle_lose_nothing(make_index: MakeIndex) -> None:
    index = random_index(make_index, 7, size=300)
    num_packs = make_planner(index).num_packs(1)
    packs: list[Pack] = []
    for step, ranks in zip(range(-(-num_packs // 8)), [1, 4, 4, 8, 2] * 20, strict=False):
        plan = make_planner(index).plan_step(step, DataLayout(ranks, 8 // ranks))
        packs += [plan.packs[number] for number in sorted(plan.assignment.ravel())]
    assert sorted(s for s, _ in drawn(packs[:num_packs])) == list(range(300))


def totals(index: Any, plan: StepPlan) -> dict[str, int]:
    samples = np.array([s for s, _ in drawn(list(plan.packs))], dtype=np.int64)
    columns = ("num_tokens", "num_tiles", "num_supervised")
    sums = {name: int(index.samples[name][samples].sum()) for name in columns}
    visual = sums["num_tiles"] * index.meta.tokens_per_tile
    return {"num_samples": len(samples), "num_visual_tokens": visual, **sums}


@given(seed=st.integers(0, 2**32), weighting=st.sampled_from(["token", "sample", "square"]))
@settings(max_examples=30, deadline=None)
def test_totals_and_denominator(make_index: MakeIndex, seed: int, weighting: str) -> None:
    index = random_index(make_index, seed)
    plan = make_planner(index, loss_weighting=weighting).plan_step(1, DataLayout(2, 4))
    expected = totals(index, plan)
    assert {name: getattr(plan, name) for name in expected} == expected
    total = 0.0
    for sample, _ in drawn(list(plan.packs)):
        n = int(index.samples["num_supervised"][sample])
        total += {"token": n, "sample": min(n, 1), "square": math.sqrt(n)}[weighting]  # n · w(n)
    assert plan.loss_denominator == pytest.approx(total, rel=1e-12)


def test_loss_weights_of_the_spec() -> None:
    assert loss_weights([4, 16, 0], "token").tolist() == [1, 1, 0]
    assert loss_weights([4, 16, 0], "sample").tolist() == [1 / 4, 1 / 16, 0]
    assert loss_weights([4, 16, 0], "square").tolist() == [1 / 2, 1 / 4, 0]


def test_balance_beats_the_order_of_packs(make_index: MakeIndex) -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 9, 4000)
    index = make_index({"name": "a", "tokens": rng.integers(1, 200, 4000), "tiles": tiles, "images": tiles > 0})
    planner = make_planner(index, pack_tokens=1024, pack_tiles=60, packs_per_step=64, window=4000, even_packs="never")
    plan = planner.plan_step(0, DataLayout(8, 8))
    # Linear layers cost every pack the same, and tiles are encoded elsewhere: attention is what differs.
    squares = [(p.lengths**2).sum() + (1024 - p.num_tokens) ** 2 for p in plan.packs]
    assert plan.pack_costs.tolist() == squares
    assert imbalance(plan.llm_load) < 1.002
    assert imbalance(plan.pack_costs.reshape(8, 8).sum(axis=1)) > 1.01
    assert plan.vit_load.sum() == plan.num_tiles
    assert plan.vit_load.max() == -(-plan.num_tiles // 8)  # no encoder has a tile more than needed
    assert imbalance(plan.packs.num_tiles[plan.assignment].sum(axis=1)) > 1.02


@pytest.mark.parametrize(("longest", "even"), [(100, True), (512, True), (513, False)])
def test_packs_are_made_even_where_no_sample_is_long(make_index: MakeIndex, longest: int, even: bool) -> None:
    rng = np.random.default_rng(0)
    index = make_index({"name": "a", "tokens": [longest, *rng.integers(1, longest + 1, 2000)]})
    settings_of = {"pack_tokens": 1024, "window": 2001}
    digests = {
        wish: [
            make_planner(index, even_packs=wish, **settings_of).plan_step(s, DataLayout(8, 1)).digest() for s in (0, 5)
        ]
        for wish in ("auto", "always", "never")
    }
    assert digests["auto"] == digests["always" if even else "never"] != digests["never" if even else "always"]


def test_costs_of_a_model_decide_the_balance(make_index: MakeIndex) -> None:
    index = random_index(make_index, 3, size=300)
    settings = PlanSettings(seed=1, pack_tokens=TOKENS, pack_tiles=TILES, packs_per_step=8, window=64)
    costs = IntegerCosts(5, 2, 100, 1, 1, max_tokens=TOKENS, max_tiles=TILES, per_target=7)
    plan = Planner(index, Mixture(index, NATURAL, 1), settings, costs).plan_step(0, DataLayout(4, 2))
    plain = make_planner(index, window=64).plan_step(0, DataLayout(4, 2))
    targets = np.array([plan.supervised[plan.packs.pack_of == number].sum() for number in range(len(plan.packs))])
    assert targets.any()
    assert plan.pack_costs.tolist() == (5 * TOKENS + 2 * plain.pack_costs + 7 * targets + 100).tolist()
    assert as_lists(plan.packs) == as_lists(plain.packs)  # what a step trains on is no matter of costs


def test_steps_planned_together_cost_alike(make_index: MakeIndex) -> None:
    """Dealing packs out over several steps loses none and makes the steps' costs equal."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(1, 8, 3000), rng.integers(30, 60, 200)])
    index = make_index({"name": "a", "tokens": tokens})
    alone, dealt = (make_planner(index, window=3200, balance_steps=k) for k in (1, 4))
    layout = DataLayout(8, 1)
    one, four = ([p.plan_step(step, layout) for step in range(8)] for p in (alone, dealt))
    for group in (slice(0, 4), slice(4, 8)):
        assert sorted(drawn([p for plan in one[group] for p in plan.packs])) == sorted(
            drawn([p for plan in four[group] for p in plan.packs])
        )
        spreads = [np.ptp([int(plan.pack_costs.sum()) for plan in plans[group]]) for plans in (one, four)]
        assert spreads[1] * 10 < spreads[0]
    assert make_planner(index, window=3200, balance_steps=4).plan_step(6, layout).digest() == four[6].digest()


def test_a_sample_that_costs_more_than_a_rank_is_told(make_index: MakeIndex) -> None:
    index = make_index({"name": "a", "tokens": [64] + [4] * 400})
    planner = make_planner(index, window=401)
    found = [plan for step in range(4) if len((plan := planner.plan_step(step, DataLayout(8, 1))).outliers)]
    assert [plan.outliers.tolist() for plan in found] == [[0]]
    assert not len(planner.plan_step(found[0].step, DataLayout(1, 8)).outliers)
    assert describe_outliers(found[0], index, 1) == (
        "samples that cost more than the mean rank: 1, such as 'a/1' of 64 tokens; [parallel.llm] cp = 2 would share it"
    )
    assert describe_outliers(found[0], index, 4).endswith("its rows are spread over cp = 4 ranks")


@given(seed=st.integers(0, 2**32), longest=st.integers(1, 400), shuffled=st.booleans())
@settings(max_examples=30, deadline=None)
def test_long_texts_are_split_and_nothing_is_lost(
    make_index: MakeIndex, seed: int, longest: int, shuffled: bool
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, longest + 1, 30)
    supervised = [rng.random(n) < 0.5 for n in tokens]
    index = make_index(
        {"name": "text", "tokens": tokens, "supervised": [int(s[1:].sum()) for s in supervised]},
        {"name": "chart", "tokens": [TOKENS + 1, 5], "tiles": [1, 1]},
    )
    index.tokens = lambda sample: (np.zeros(tokens[sample], np.int32), supervised[sample])
    s = PlanSettings(
        seed=1, pack_tokens=TOKENS, pack_tiles=TILES, packs_per_step=8, window=16, long_samples="split"
    )  # fmt: skip
    planner = Planner(index, Mixture(index, NATURAL, 1) if shuffled else Sequential(index), s)
    assert planner.dropped.tolist() == [30]  # an image cannot be cut
    plans = [planner.plan_step(step, DataLayout(4, 2)) for step in range(-(-planner.num_packs(1) // 8))]
    packs = [p for plan in plans for p in plan.packs][: planner.num_packs(1)]
    covered = {(i, t) for p in packs for i, b, n in zip(p.samples, p.begins, p.lengths, strict=True)
               for t in range(b, b + n)}  # fmt: skip
    assert covered == {(i, t) for i, n in enumerate([*tokens, 0, 5]) for t in range(n)}
    assert sum(p.num_tokens for p in packs) == len(covered)
    assert max(p.num_tokens for p in packs) <= TOKENS
    if not shuffled:  # the last step of an endless order goes on into the next epoch
        assert sum(plan.num_supervised for plan in plans) == sum(int(s[1:].sum()) for s in supervised) + 4


def test_a_window_of_very_long_documents(make_index: MakeIndex) -> None:
    """60,000 parts in a window; nothing is read, since every token but a document's first is a target."""
    T, tokens = 16384, np.random.default_rng(0).integers(500_000, 1_500_000, 1000)
    index = make_index({"name": "books", "tokens": tokens})  # has no tokens to read
    planner = make_planner(index, pack_tokens=T, window=1000, packs_per_step=512, long_samples="split")
    total, num_packs = int(tokens.sum()), planner.num_packs(1)
    assert num_packs <= 1.001 * total / T
    plans = [planner.plan_step(step, DataLayout(64, 8)) for step in range(num_packs // 512)]
    packs = Packs.concatenate([plan.packs for plan in plans])
    assert packs.num_tokens.max() <= T
    last = packs.begins + packs.lengths == tokens[packs.samples]
    assert sum(plan.num_supervised for plan in plans) == packs.lengths.sum() - last.sum()
    begins = packs.samples << 32 | packs.begins
    assert len(np.unique(begins)) == len(begins)
    assert (packs.begins % T == 0).all()
    assert (packs.lengths[~last] == T).all()


def test_split_documents_keep_the_ratio_of_tokens(make_index: MakeIndex) -> None:
    """A draw of a long document counts with all of its tokens."""
    charts = {"name": "chart", "tokens": [20] * 300, "tiles": [1] * 300}
    for text in ([1000] * 20, [50] * 400):
        index = make_index({"name": "text", "tokens": text}, charts)
        planner = make_planner(index, MixtureSettings(language_ratio="1:3"), window=1000, long_samples="split")
        assert planner.shares[0].token_share == 0.25
        packs = [planner.stream.of_step(step)[1] for step in range(planner.num_packs(50) // 8)]
        is_text = np.concatenate([p.samples for p in packs]) < len(text)
        lengths = np.concatenate([p.lengths for p in packs])
        assert lengths[is_text].sum() / lengths.sum() == pytest.approx(0.25, abs=0.005)


def test_long_samples_can_be_errors(make_index: MakeIndex) -> None:
    index = make_index({"name": "text", "tokens": [10, 65, 64]})
    with pytest.raises(ValueError, match=r"sample 'text/2': 65 tokens .* \(1 such samples\): raise the budget"):
        make_planner(index, long_samples="error")
    make_planner(make_index({"name": "text", "tokens": [10, 64]}), long_samples="error")


def test_layouts_that_do_not_divide_a_step_are_errors(make_index: MakeIndex) -> None:
    planner = make_planner(random_index(make_index, 0))
    with pytest.raises(ValueError, match=r"packs_per_step = 8 .* 3 data-parallel ranks × 2 .*multiple of 3"):
        planner.plan_step(0, DataLayout(3, 2))
    with pytest.raises(ValueError, match="use 4 microbatches"):
        planner.plan_step(0, DataLayout(2, 2))
    with pytest.raises(ValueError, match="0 data-parallel ranks"):
        planner.plan_step(0, DataLayout(0, 2))
    with pytest.raises(IndexError, match="no step -1"):
        planner.plan_step(-1, DataLayout(2, 4))


def test_samples_over_a_budget_are_dropped_and_listed(make_index: MakeIndex) -> None:
    index = make_index(
        {"name": "text", "tokens": [10, 65, 64]}, {"name": "chart", "tokens": [30, 31, 90], "tiles": [7, 6, 8]}
    )
    planner = make_planner(index)
    assert planner.dropped.tolist() == [1, 3, 5]
    assert planner.describe_dropped() == [
        "sample 'text/2': 65 tokens and 0 tiles; a pack holds 64 tokens and 6 tiles",
        "sample 'chart/1': 30 tokens and 7 tiles; a pack holds 64 tokens and 6 tiles",
        "sample 'chart/3': 90 tokens and 8 tiles; a pack holds 64 tokens and 6 tiles",
    ]
    assert len(planner.describe_dropped(limit=1)) == 1
    packs = [p for step in range(planner.num_packs(2)) for p in planner.plan_step(step, DataLayout(8, 1)).packs]
    assert {s for s, _ in drawn(packs)} == {0, 2, 4}
    with pytest.raises(ValueError, match=r"none of 6 samples fits .* sample 'text/1': 10 tokens"):
        make_planner(index, pack_tokens=9)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_sequential_pass_holds_every_sample_once(make_index: MakeIndex, seed: int, size: int) -> None:
    index = random_index(make_index, seed, size=size + 1, longest=TOKENS + 3)
    s = PlanSettings(seed=0, pack_tokens=TOKENS, pack_tiles=TILES, packs_per_step=8, window=16)
    planner = Planner(index, Sequential(index), s)
    assert planner.num_steps is not None
    plans = [planner.plan_step(step, DataLayout(4, 2)) for step in range(planner.num_steps)]
    packs = [p for plan in plans for p in plan.packs]
    expected = set(range(size + 1)) - set(planner.dropped.tolist())
    assert Counter(drawn(packs)) == Counter((sample, 0) for sample in expected)
    num_packs = planner.num_packs(1)
    assert [len(p.samples) > 0 for p in packs] == [number < num_packs for number in range(len(packs))]
    assert len(packs) - num_packs < 8  # only the last step is padded
    with pytest.raises(IndexError, match=f"no step {planner.num_steps}: the pass has {planner.num_steps}"):
        planner.plan_step(planner.num_steps, DataLayout(4, 2))


def test_training_packs_are_shuffled_and_endless(make_index: MakeIndex) -> None:
    index = make_index({"name": "a", "tokens": [1 + i % 60 for i in range(200)]})
    planner = make_planner(index, window=200)
    assert planner.num_steps is None
    epochs = []
    for first in (0, planner.num_packs(1)):
        plans = [planner.plan_step(step, DataLayout(8, 1)) for step in range(first // 8, first // 8 + 2)]
        epochs.append([sorted(p.samples.tolist()) for plan in plans for p in plan.packs])
    assert epochs[0] != epochs[1]
    # Best fit decreasing opens packs with ever shorter samples; training must not see them in that order.
    longest = [max(index.samples["num_tokens"][p]) for p in epochs[0]]
    assert longest != sorted(longest, reverse=True)
    assert planner.plan_step(10_000 // 8, DataLayout(8, 1)).epoch > 100


EXAMPLE_TOKENS = [1 + (i * i) % 60 for i in range(50)]
EXAMPLE = (
    {"name": "text", "tokens": EXAMPLE_TOKENS},
    {"name": "chart", "tokens": EXAMPLE_TOKENS, "tiles": [i % 5 for i in range(50)]},
)
RECORDED = ["a628a4d232f790ab39d754712e10461c", "9d1c30999ade937862b04ab1a80fe8b3"]


def example_digests(index: Any) -> list[str]:
    planner = make_planner(index, MixtureSettings(), seed=5)
    return [planner.plan_step(step, DataLayout(2, 4)).digest() for step in (0, 9)]


def test_recorded_digests(make_index: MakeIndex) -> None:
    """A refactoring must not change plans: a run that is resumed would train on other data."""
    assert example_digests(make_index(*EXAMPLE)) == RECORDED


def test_another_process_makes_the_same_plan(request: pytest.FixtureRequest) -> None:
    code = (
        "import json, runpy\n"
        f"fakes = runpy.run_path({str(request.path.with_name('conftest.py'))!r})\n"
        f"tests = runpy.run_path({str(request.path)!r})\n"
        "index = fakes['fake_index'](*(fakes['FakeDataset'](**d) for d in tests['EXAMPLE']))\n"
        "print(json.dumps(tests['example_digests'](index)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert json.loads(done.stdout) == RECORDED
