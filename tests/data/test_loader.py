"""The loader: steps in order and the same after a resume, errors named, memory bounded, workers gone."""

import gc
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evovlm.data import decode, decode_pool
from evovlm.data import loader as loader_module
from evovlm.data.batch import V2PESettings
from evovlm.data.decode import Outcome, TileJob
from evovlm.data.decode_pool import DecodePool, WorkerDiedError
from evovlm.data.errors import SampleError
from evovlm.data.index import Index
from evovlm.data.loader import LoaderSettings
from evovlm.data.step_batch import StepBatch
from evovlm.data.step_plan import DataLayout, Pieces, StepPlan
from evovlm.data.tile_buffers import TileBuffers
from evovlm.data.tokenizer import Tokenizer

from .batch_support import G, T, equal_steps, in_order, load_ranks, make_loader, make_planner, open_index


def running_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("plan", "decode"))]


def with_workers(num_workers: int, prefetch: int = 2) -> LoaderSettings:
    return LoaderSettings(num_workers=num_workers, prefetch=prefetch)


def record_chunks(monkeypatch: pytest.MonkeyPatch, note: Callable[[Sequence[TileJob]], object]) -> None:
    """Call ``note`` before a loader without workers decodes jobs."""

    def decode_chunk(jobs: Sequence[TileJob], *args: Any) -> Outcome:
        note(jobs)
        return decode.decode_chunk(jobs, *args)

    monkeypatch.setattr(decode_pool, "decode_chunk", decode_chunk)


class Traces:
    """What loaders have made: processes, and tile memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[DecodePool] = []
        self.buffers: list[TileBuffers] = []
        traces = self

        class Pool(DecodePool):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                traces.pools.append(self)

        class Buffers(TileBuffers):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                traces.buffers.append(self)

        monkeypatch.setattr(loader_module, "DecodePool", Pool)
        monkeypatch.setattr(loader_module, "TileBuffers", Buffers)

    def processes(self) -> list[int]:
        """Workers that have not been ended and waited for."""
        return [pid for pool in self.pools for pid in pool.processes if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(monkeypatch)


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
    decoded: list[tuple[str, str, int, int]] = []
    record_chunks(monkeypatch, lambda jobs: decoded.extend((j.name, j.path, j.begin, j.end) for j in jobs))
    for encoder in range(layout.encoders):
        decoded.clear()
        ((plan, _),) = make_loader(index, tokenizer, layout, 0, encoder).steps(2, 3)
        images = [(index.name(s), str(ref.path)) for s in plan.packs.samples.tolist() for ref in index.image_refs(s)]
        p = plan.pieces
        mine = [
            (*images[image], first, first + tiles)
            for image, first, tiles, chosen in zip(p.image, p.first, p.tiles, p.encoder, strict=True)
            if chosen == encoder
        ]
        assert sorted(decoded) == sorted(mine)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_batches_of_this_process(index: Index, tokenizer: Tokenizer, num_workers: int) -> None:
    def load(num_workers: int, start: int) -> list[tuple[StepPlan, StepBatch]]:
        loader = make_loader(index, tokenizer, DataLayout(2, 4, 3), 1, 2, settings=with_workers(num_workers))
        return list(loader.steps(start, 5))

    for start in (0, 3):
        expected, got = load(0, start), load(num_workers, start)
        assert [plan.step for plan, _ in got] == list(range(start, 5))
        assert all(len(batch.tiles) for _, batch in got)
        assert all(equal_steps(one, other) for (_, one), (_, other) in zip(got, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_parts_of_images_are_those_of_the_whole(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    layout = DataLayout(2, 4, 3)
    planner = make_planner(index)
    whole = planner.plan_step(1, layout)

    def all_tiles() -> dict[int, torch.Tensor]:
        found = {}
        for encoder in range(3):
            loader = make_loader(
                index, tokenizer, layout, 0, encoder, planner, settings=with_workers(num_workers, prefetch=1)
            )
            ((_, batch),) = loader.steps(1, 2)
            sends = batch.routes.sends
            found |= {n: batch.tiles[slot] for n, slot in zip(sends.number.tolist(), sends.slot.tolist(), strict=True)}
        return found

    expected = all_tiles()
    parts = []
    for image, _, tiles, encoder in zip(*(vars(whole.pieces)[n].tolist() for n in Pieces.__annotations__), strict=True):
        cut = tiles // 2
        parts += [(image, 0, cut, (encoder + 1) % 3)] if cut else []
        parts.append((image, cut, tiles - cut, encoder))
    split = replace(whole, pieces=Pieces(*np.array(parts, np.int32).T))
    assert len(parts) > len(whole.pieces.image)
    monkeypatch.setattr(planner, "plan_step", lambda step, layout: split)
    got = all_tiles()
    assert got.keys() == expected.keys() == set(range(whole.num_tiles))
    assert all(torch.equal(got[number], expected[number]) for number in got)


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_named_where_its_step_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, tiny_tokenizer_dir: Path, traces: Traces, num_workers: int
) -> None:
    index = damage(tmp_path, tiny_tokenizer_dir)
    sample = next(i for i in range(len(index)) if index.name(i) == "chart/8")
    planner = make_planner(index, packs_per_step=1)
    plans = [planner.plan_step(step, DataLayout(1, 1)) for step in range(planner.num_packs(1))]
    bad = next(plan.step for plan in plans if sample in plan.packs[0].samples)
    reached = -1
    loader = make_loader(
        index, tokenizer, DataLayout(1, 1), 0, planner=planner, settings=with_workers(num_workers, prefetch=4)
    )
    with pytest.raises(SampleError, match=r"sample 'chart/8': image '.*7.png' is truncated") as caught:
        for plan, _ in loader:
            reached = plan.step
    assert (caught.value.reason, caught.value.name) == ("unreadable image", "chart/8")
    assert reached == bad - 1  # steps before it are whole, though the error was known earlier
    assert running_threads() == []
    assert traces.processes() == []


def test_tiles_outside_their_step_are_an_error(
    index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_step = loader_module.build_step

    def one_too_far(*args: Any, **keys: Any) -> Any:
        batch, jobs = build_step(*args, **keys)
        return batch, [replace(job, slot=job.slot + 1) for job in jobs]

    monkeypatch.setattr(loader_module, "build_step", one_too_far)
    with pytest.raises(ValueError, match=r"sample '.*': [1-5] tiles of image '.*' from slot \d+ on, of \d+ slots"):
        list(make_loader(index, tokenizer, DataLayout(1, 8), 0).steps(0, 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_that_are_kept_are_not_overwritten(
    index: Index, tokenizer: Tokenizer, traces: Traces, num_workers: int
) -> None:
    loader = make_loader(index, tokenizer, DataLayout(1, 8), 0, settings=with_workers(num_workers))
    kept = [(batch.tiles, batch.tiles.clone()) for _, batch in loader.steps(0, 8)]
    assert all(torch.equal(tiles, copy) for tiles, copy in kept)
    assert len({tiles.data_ptr() for tiles, _ in kept}) == traces.buffers[0].num_buffers == 8


@pytest.mark.parametrize("prefetch", [1, 3])
def test_memory_is_that_of_the_steps_in_the_making(
    index: Index, tokenizer: Tokenizer, traces: Traces, prefetch: int
) -> None:
    loader = make_loader(index, tokenizer, DataLayout(1, 8), 0, settings=with_workers(0, prefetch))
    sizes = []
    for _, batch in loader.steps(0, 30):
        sizes.append(batch.tiles.nbytes)
        assert 1 <= traces.buffers[0].num_buffers <= prefetch + 2
        used = traces.buffers[0].num_bytes
    assert len(set(sizes)) > 1
    assert used <= (prefetch + 2) * (max(sizes) + 4096)


@pytest.mark.parametrize("end", ["close", "error", "garbage"])
def test_nothing_is_left_when_the_consumer_ends(index: Index, tokenizer: Tokenizer, traces: Traces, end: str) -> None:
    gc.collect()
    files = len(list(Path("/proc/self/fd").iterdir()))

    def consume() -> None:
        steps = make_loader(index, tokenizer, DataLayout(1, 8), 0, settings=with_workers(2)).steps()
        next(steps)
        assert len(traces.processes()) == 2
        if end == "close":
            steps.close()
        elif end == "error":
            steps.throw(KeyError("a training step"))

    if end == "error":
        with pytest.raises(KeyError, match="a training step"):
            consume()
    else:
        consume()
    gc.collect()
    assert traces.processes() == []
    assert running_threads() == []
    assert list(Path("/dev/shm").glob("*evovlm*")) == []
    traces.buffers.clear()  # a free buffer is a mapping, which keeps a file number
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_a_killed_worker_is_an_error_and_not_a_hang(index: Index, tokenizer: Tokenizer, traces: Traces) -> None:
    loader = make_loader(index, tokenizer, DataLayout(1, 8), 0, settings=with_workers(2))
    steps = loader.steps()
    next(steps)
    os.kill(traces.processes()[0], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"which decodes images, was killed by SIGKILL .* short of memory"):
        for _ in steps:
            pass
    assert traces.processes() == []
    assert running_threads() == []


def test_timings_say_what_a_step_took(index: Index, tokenizer: Tokenizer) -> None:
    loader = make_loader(index, tokenizer, DataLayout(1, 8), 0)
    assert loader.timings is None
    for plan, batch in loader.steps(0, 2):
        timings = loader.timings
        assert timings is not None
        assert (timings.images, timings.tiles) == (len(plan.pieces.image), len(batch.tiles))
        assert min(timings.planning, timings.building, timings.decoding, timings.decoding_cpu) > 0
        assert timings.images_per_second == timings.images / timings.decoding


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

    monkeypatch.setattr(planner, "plan_step", record)
    record_chunks(monkeypatch, lambda _: decoding_threads.add(threading.current_thread().name))
    loader = make_loader(index, tokenizer, DataLayout(2, 4), 0, planner=planner, settings=LoaderSettings(prefetch=3))
    steps = loader.steps(5)
    for taken in range(1, 4):
        assert next(steps)[0].step == 4 + taken
        deadline = time.monotonic() + 10
        while len(planned) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.02)
        assert planned == list(range(5, 5 + taken + 3))  # three steps ahead, and no more
    assert decoding_threads == {"plan_0"}
    assert running_threads()
    steps.close()
    assert running_threads() == []


def test_wait_is_measured(index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once for each decoded image, and only then."""
    ticks, asked = itertools.count(), threading.Event()
    now = 0

    def clock() -> float:
        if threading.current_thread() is threading.main_thread():
            asked.set()  # the consumer begins to wait
        return float(now)

    def tick(_: Sequence[TileJob]) -> None:
        nonlocal now
        asked.wait()
        now = next(ticks) + 1

    record_chunks(monkeypatch, tick)
    monkeypatch.setattr(loader_module.time, "perf_counter", clock)
    planner, layout = make_planner(index), DataLayout(1, 8)
    images = [len(planner.plan_step(step, layout).pieces.image) for step in range(2)]
    one = LoaderSettings(prefetch=1)
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
