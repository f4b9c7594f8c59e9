"""The loader: steps in order and the same after a resume, errors named, prefetch bounded, threads gone."""

import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evovlm.data import loader as loader_module
from evovlm.data.batch import V2PESettings
from evovlm.data.errors import SampleError
from evovlm.data.images import load_tiles
from evovlm.data.index import Index
from evovlm.data.loader import LoaderSettings
from evovlm.data.plan import DataLayout, StepPlan
from evovlm.data.tokenizer import Tokenizer

from .batch_support import TILE, G, T, equal_steps, in_order, load_ranks, make_loader, make_planner, open_index


def running_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("plan", "decode"))]


def test_resume_gives_the_same_batches(index: Index, tokenizer: Tokenizer) -> None:
    v2pe = V2PESettings(mode="random")
    through = list(make_loader(index, tokenizer, DataLayout(2, 4, 3), 1, 2, v2pe=v2pe).steps(0, 6))
    resumed = list(make_loader(index, tokenizer, DataLayout(2, 4, 3), 1, 2, v2pe=v2pe).steps(3, 6))
    assert [plan.step for plan, _ in through] == list(range(6))
    for (plan, batch), (other_plan, other) in zip(resumed, through[3:], strict=True):
        assert plan.digest() == other_plan.digest()
        assert equal_steps(batch, other)
    assert not equal_steps(through[0][1], through[1][1])


@pytest.mark.parametrize("layout", [DataLayout(4, 2), DataLayout(4, 2, 3), DataLayout(2, 4, 8)], ids=str)
def test_an_encoder_decodes_only_its_images(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, layout: DataLayout
) -> None:
    decoded: list[tuple[str, int]] = []

    def record(ref: Any, *args: Any, name: str, **keys: Any) -> np.ndarray:
        decoded.append((name, ref.insert_at))
        return load_tiles(ref, *args, name=name, **keys)

    monkeypatch.setattr(loader_module, "load_tiles", record)
    for encoder in range(layout.encoders):
        decoded.clear()
        ((plan, _),) = make_loader(index, tokenizer, layout, 0, encoder).steps(2, 3)
        images = [
            (index.name(s), ref.insert_at)
            for pack in plan.packs
            for s in pack.samples.tolist()
            for ref in index.image_refs(s)
        ]
        mine = [image for image, chosen in zip(images, plan.encoder_rank.tolist(), strict=True) if chosen == encoder]
        assert sorted(decoded) == sorted(mine)


def test_sequential_pass_and_empty_packs(index: Index, tokenizer: Tokenizer) -> None:
    planner = make_planner(index, sequential=True)
    assert planner.num_steps is not None
    seen: Counter[int] = Counter()
    for step in range(planner.num_steps):
        plan, ranks = load_ranks(index, tokenizer, DataLayout(2, 4), step, planner, augment=False)
        assert [len(batch.tiles) for batch in ranks] == ranks[0].routes.num_tiles.tolist()
        for pack, batch in zip(plan.packs, in_order(plan, ranks), strict=True):
            seen.update(pack.samples.tolist())
            if not len(pack.samples):
                assert batch.cu_seqlens.tolist() == [0, T]
                assert batch.visual_rows.shape == (0,)
                assert batch.weights.sum() == 0
    assert seen == Counter(range(len(index)))
    padded = not all(len(pack.samples) for pack in plan.packs)
    assert padded == (planner.num_packs(1) % G != 0)
    steps = [plan.step for plan, _ in make_loader(index, tokenizer, DataLayout(2, 4), 0, planner=planner)]
    assert steps == list(range(planner.num_steps))  # ends by itself


def damage(folder: Path, tokenizer_dir: Path) -> Index:
    """An index of which one image is truncated after indexing."""
    index = open_index(folder, tokenizer_dir)
    file = folder / "7.png"
    file.write_bytes(file.read_bytes()[:200])
    return index


def test_a_damaged_image_is_named_where_its_step_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, tiny_tokenizer_dir: Path
) -> None:
    index = damage(tmp_path, tiny_tokenizer_dir)
    sample = next(i for i in range(len(index)) if index.name(i) == "chart/8")
    planner = make_planner(index, packs_per_step=1)
    plans = [planner.plan_step(step, DataLayout(1, 1)) for step in range(planner.num_packs(1))]
    bad = next(plan.step for plan in plans if sample in plan.packs[0].samples)
    reached = -1
    with pytest.raises(SampleError, match=r"sample 'chart/8': image '.*7.png' is truncated"):
        for plan, _ in make_loader(index, tokenizer, DataLayout(1, 1), 0, planner=planner):
            reached = plan.step
    assert reached == bad - 1  # steps before it are whole, though the error was known earlier
    assert running_threads() == []


def test_wrong_number_of_tiles_is_an_error(index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "load_tiles", lambda *args, **keys: np.zeros((1, 3, TILE, TILE), np.float32))
    with pytest.raises(ValueError, match=r"sample '.*': image '.*' gave 1 tiles, planned [3-5]"):
        list(make_loader(index, tokenizer, DataLayout(1, 8), 0).steps(0, 3))


def test_prefetch_is_bounded_in_order_and_closes(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = make_planner(index)
    planned: list[int] = []
    decoding_threads = set()
    plan_step = planner.plan_step

    def record(step: int, layout: DataLayout) -> StepPlan:
        planned.append(step)
        return plan_step(step, layout)

    def decode(ref: Any, *args: Any, **keys: Any) -> np.ndarray:
        decoding_threads.add(threading.current_thread().name)
        return load_tiles(ref, *args, **keys)

    monkeypatch.setattr(planner, "plan_step", record)
    monkeypatch.setattr(loader_module, "load_tiles", decode)
    loader = make_loader(index, tokenizer, DataLayout(2, 4), 0, planner=planner, settings=LoaderSettings(prefetch=3))
    steps = loader.steps(5)
    for taken in range(1, 4):
        assert next(steps)[0].step == 4 + taken
        deadline = time.monotonic() + 10
        while len(planned) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.02)
        assert planned == list(range(5, 5 + taken + 3))  # three steps ahead, and no more
    assert decoding_threads
    assert all(name.startswith("decode") for name in decoding_threads)
    assert running_threads()
    steps.close()
    assert running_threads() == []


def test_wait_is_measured(index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once for each decoded image, and only then."""
    ticks, asked = itertools.count(), threading.Event()
    now = 0

    def clock() -> float:
        asked.set()  # somebody begins to wait
        return float(now)

    def decode(ref: Any, *args: Any, **keys: Any) -> np.ndarray:
        nonlocal now
        asked.wait()
        now = next(ticks) + 1
        return load_tiles(ref, *args, **keys)

    monkeypatch.setattr(loader_module, "load_tiles", decode)
    monkeypatch.setattr(loader_module.time, "perf_counter", clock)
    planner, layout = make_planner(index), DataLayout(1, 8)
    images = [len(planner.plan_step(step, layout).encoder_rank) for step in range(2)]
    one = LoaderSettings(num_workers=1, prefetch=1)
    loader = make_loader(index, tokenizer, layout, 0, planner=planner, settings=one)
    waits = []
    for _ in loader.steps(0, 2):
        waits.append(loader.wait_seconds)
        while now < sum(images):  # a training step longer than decoding the next one
            time.sleep(0.01)
    assert waits == [images[0], 0.0]
    assert images[0] > 0
    assert loader.total_wait_seconds == sum(waits)


def test_bad_ranks_and_layouts_are_errors(index: Index, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make_loader(index, tokenizer, DataLayout(2, 4), 2, 0)
    with pytest.raises(ValueError, match="encoder 3 of 3"):
        make_loader(index, tokenizer, DataLayout(2, 4, 3), 1, 3)
    with pytest.raises(ValueError, match="encoder 2 of 2"):
        make_loader(index, tokenizer, DataLayout(2, 4), 1, 2)
    with pytest.raises(ValueError, match="packs_per_step = 8"):
        make_loader(index, tokenizer, DataLayout(3, 4), 0)
