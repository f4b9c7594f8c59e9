"""Microbatches of a real index: every row right, nothing dependent on the layout, errors named, threads gone."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evovlm.csrc import random
from evovlm.data import loader as loader_module
from evovlm.data.batch import BatchSettings, MicroBatch, V2PESettings, build_microbatch, run_deltas
from evovlm.data.build_index import IndexSettings, build_index
from evovlm.data.chat import expand
from evovlm.data.errors import SampleError
from evovlm.data.images import jpeg_qualities, load_tiles
from evovlm.data.index import Index
from evovlm.data.loader import Loader, LoaderSettings
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.order import Sequential
from evovlm.data.plan import DataLayout, LossWeighting, Pack, Planner, PlanSettings, StepPlan, loss_weights
from evovlm.data.tokenizer import Tokenizer
from evovlm.models.v2pe import DELTAS, segment_positions

TILE, TOKENS_PER_TILE = 28, 4
SEED = 11
T = 256
G = 8


def line(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    turns = [("system", "Read."), ("human", question), ("gpt", answer)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def write_corpus(folder: Path) -> Path:
    """Pictures of noise in several shapes; text, single images (with JPEG degradation), several images, pretrain."""
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (56, 28), (30, 90), (60, 60)]
    for i in range(12):
        width, height = sizes[i % 4]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    pretrain = {"conversations": [{"from": "pretrain", "value": "a <image> and <image>"}], "image": ["0.png", "1.png"]}
    datasets: dict[str, tuple[bool, list[dict[str, Any]]]] = {
        "text": (False, [line("How many?" * (1 + i % 3), "the answer is " + "7 " * (i % 5)) for i in range(20)]),
        "chart": (True, [line("Which?", "bar " * (1 + i % 4), image=f"{i}.png") for i in range(12)]),
        "pair": (
            False,
            [line("<image> or\n<image>?", "both", image=[f"{i}.png", f"{i + 1}.png"]) for i in range(6)] + [pretrain],
        ),
    }
    meta = {}
    for name, (augment, lines) in datasets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        meta[name] = {"root": str(folder), "annotation": str(folder / f"{name}.jsonl"), "data_augment": augment}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def open_index(folder: Path, tokenizer_dir: Path) -> Index:
    build_index(
        IndexSettings(
            meta=write_corpus(folder),
            tokenizer=tokenizer_dir,
            out=folder / "index",
            tile_size=TILE,
            tokens_per_tile=TOKENS_PER_TILE,
            max_tiles=4,
            num_workers=1,
        )
    )
    return Index.open(folder / "index")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Index:
    return open_index(tmp_path_factory.mktemp("corpus"), tiny_tokenizer_dir)


def make_planner(index: Index, *, sequential: bool = False, **changes: Any) -> Planner:
    plain = {"seed": SEED, "pack_tokens": T, "pack_tiles": 12, "packs_per_step": G, "window": 64}
    s = PlanSettings(**(plain | changes))
    mixture = Mixture(index, MixtureSettings(language_ratio=None), SEED)
    return Planner(index, Sequential(index) if sequential else mixture, s)


def make_loader(
    index: Index, tokenizer: Tokenizer, layout: DataLayout, rank: int, planner: Planner | None = None, **changes: Any
) -> Loader:
    ids = {"image_context": tokenizer.image_context, "padding": tokenizer.end_of_text}
    return Loader(index, planner or make_planner(index), layout, rank, **(ids | changes))


def load_step(
    index: Index,
    tokenizer: Tokenizer,
    layout: DataLayout,
    step: int = 0,
    planner: Planner | None = None,
    **changes: Any,
) -> tuple[StepPlan, list[MicroBatch]]:
    """A step's batches of all ranks, in the order of its packs."""
    batches: dict[int, MicroBatch] = {}
    for rank in range(layout.num_ranks):
        loader = make_loader(index, tokenizer, layout, rank, planner, **changes)
        ((plan, mine),) = loader.steps(step, step + 1)
        batches |= zip(plan.assignment[rank].tolist(), mine, strict=True)
    return plan, [batches[number] for number in range(len(plan.packs))]


def segments(pack: Pack, batch: MicroBatch) -> Iterator[tuple[int, int, int, int]]:
    """(sample, visit, first row, last row + 1) of each segment; padding left out."""
    borders = batch.cu_seqlens.tolist()
    for (sample, visit), (begin, end) in zip(
        zip(pack.samples.tolist(), pack.visits.tolist(), strict=True), itertools.pairwise(borders), strict=False
    ):
        yield sample, visit, begin, end


def equal(a: MicroBatch, b: MicroBatch) -> bool:
    return all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def running_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("plan", "decode"))]


def test_shapes_and_dtypes(index: Index, tokenizer: Tokenizer) -> None:
    plan, batches = load_step(index, tokenizer, DataLayout(2, 4))
    for pack, batch in zip(plan.packs, batches, strict=True):
        n = pack.num_tiles
        assert {
            name: (value.dtype, tuple(value.shape)) for name, value in vars(batch).items() if name != "cu_seqlens"
        } == {
            "tokens": (torch.int64, (T,)),
            "labels": (torch.int64, (T,)),
            "weights": (torch.float32, (T,)),
            "positions": (torch.float32, (T,)),
            "tiles": (torch.float32, (n, 3, TILE, TILE)),
            "tile_keys": (torch.int64, (n,)),
            "visual_rows": (torch.int64, (n * TOKENS_PER_TILE,)),
        }


def test_rows_of_every_segment(index: Index, tokenizer: Tokenizer) -> None:
    """Tokens, borders and padding; every supervised token is a label once, in the row before it, and nowhere else."""
    for step in range(3):
        plan, batches = load_step(index, tokenizer, DataLayout(4, 2), step)
        for pack, batch in zip(plan.packs, batches, strict=True):
            lengths = index.samples["num_tokens"][pack.samples]
            ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
            assert batch.cu_seqlens.tolist() == ends + ([T] if ends[-1] < T else [])
            for sample, _, begin, end in segments(pack, batch):
                refs = index.image_refs(sample)
                ids, supervised = expand(
                    *index.tokens(sample),
                    [ref.insert_at for ref in refs],
                    [ref.num_tiles * TOKENS_PER_TILE for ref in refs],
                    tokenizer.image_context,
                )
                assert batch.tokens[begin:end].tolist() == ids.tolist()
                labels = batch.labels[begin:end].tolist()
                assert labels[-1] == -100  # the next token belongs to another sample
                expected = [int(i) if s else -100 for i, s in zip(ids[1:], supervised[1:], strict=True)]
                assert labels[:-1] == expected
            assert (batch.tokens[ends[-1] :] == tokenizer.end_of_text).all()
            assert (batch.labels[ends[-1] :] == -100).all()
            assert int((batch.labels != -100).sum()) == pack.num_supervised
            assert ((batch.weights > 0) == (batch.labels != -100)).all()


@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_weights_sum_to_the_denominator(index: Index, tokenizer: Tokenizer, weighting: LossWeighting) -> None:
    planner = make_planner(index, loss_weighting=weighting)
    for layout in (DataLayout(1, 8), DataLayout(4, 2)):
        plan, batches = load_step(index, tokenizer, layout, 1, planner)
        total = sum(batch.weights.double().sum().item() for batch in batches)
        assert total == pytest.approx(plan.loss_denominator, rel=1e-6)
        for pack, batch in zip(plan.packs, batches, strict=True):
            for sample, _, begin, end in segments(pack, batch):
                n = int(index.samples["num_supervised"][sample])
                weights = batch.weights[begin:end]
                each = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[weighting]
                assert weights[weights > 0].tolist() == pytest.approx([each] * n)
                assert each == pytest.approx(float(loss_weights(n, weighting)))


def test_positions_follow_v2pe(index: Index, tokenizer: Tokenizer) -> None:
    drawn: Counter[float] = Counter()
    for v2pe in (V2PESettings(), V2PESettings(mode="fixed", delta=0.125), V2PESettings(mode="random")):
        plan, batches = load_step(index, tokenizer, DataLayout(2, 4), v2pe=v2pe)
        for pack, batch in zip(plan.packs, batches, strict=True):
            for sample, visit, begin, end in segments(pack, batch):
                runs, shift = [], 0
                for ref in index.image_refs(sample):
                    runs.append((ref.insert_at + shift, ref.num_tiles * TOKENS_PER_TILE))
                    shift += runs[-1][1]
                if v2pe.mode == "random":
                    keys = [random.key("v2pe", SEED, sample, visit, image) for image in range(len(runs))]
                    deltas = [DELTAS[int(random.choice_index(np.array(k, np.uint64), 9))] for k in keys]
                    drawn.update(deltas)
                else:
                    deltas = [1.0 if v2pe.mode == "off" else 0.125] * len(runs)
                positions = batch.positions[begin:end]
                assert positions.tolist() == segment_positions(end - begin, runs, deltas).tolist()
                if v2pe.mode == "off":
                    assert positions.tolist() == list(range(end - begin))
            padding = batch.positions[pack.num_tokens :]
            assert padding.tolist() == list(range(len(padding)))
    assert len(drawn) >= 5


def test_random_strides_differ_between_visits_and_images() -> None:
    deltas = [run_deltas(V2PESettings(mode="random"), 0, 5, visit, 200) for visit in range(2)]
    assert set(deltas[0]) == set(DELTAS)
    assert deltas[0] != deltas[1]


@pytest.mark.parametrize("augment", [True, False])
def test_tiles_and_their_places(index: Index, tokenizer: Tokenizer, augment: bool) -> None:
    plan, batches = load_step(
        index, tokenizer, DataLayout(2, 4), augment=augment, settings=LoaderSettings(normalization="clip")
    )
    keys = []
    for pack, batch in zip(plan.packs, batches, strict=True):
        visual = batch.tokens == tokenizer.image_context
        assert batch.visual_rows.tolist() == visual.nonzero().flatten().tolist()
        tiles = []
        for sample, visit, _, _ in segments(pack, batch):
            degraded = augment and index.name(sample).startswith("chart/")
            for image, ref in enumerate(index.image_refs(sample)):
                qualities = jpeg_qualities(SEED, sample, visit, image, ref.num_tiles) if degraded else None
                tiles.append(torch.from_numpy(load_tiles(ref, TILE, "clip", qualities)))
                keys += [random.key("drop_path", SEED, sample, visit, image, tile) for tile in range(ref.num_tiles)]
        if tiles:
            assert torch.equal(batch.tiles, torch.cat(tiles))
    assert [key % 2**64 for batch in batches for key in batch.tile_keys.tolist()] == keys
    assert len(set(keys)) == len(keys)


def test_nothing_depends_on_the_layout(index: Index, tokenizer: Tokenizer) -> None:
    v2pe = V2PESettings(mode="random")
    for step in (0, 4):
        _, expected = load_step(index, tokenizer, DataLayout(1, 8), step, v2pe=v2pe)
        for ranks in (2, 4, 8):
            _, batches = load_step(index, tokenizer, DataLayout(ranks, 8 // ranks), step, v2pe=v2pe)
            assert all(equal(a, b) for a, b in zip(batches, expected, strict=True))


def test_resume_gives_the_same_batches(index: Index, tokenizer: Tokenizer) -> None:
    v2pe = V2PESettings(mode="random")
    through = list(make_loader(index, tokenizer, DataLayout(2, 4), 1, v2pe=v2pe).steps(0, 6))
    resumed = list(make_loader(index, tokenizer, DataLayout(2, 4), 1, v2pe=v2pe).steps(3, 6))
    assert [plan.step for plan, _ in through] == list(range(6))
    for (plan, batches), (other, others) in zip(resumed, through[3:], strict=True):
        assert plan.digest() == other.digest()
        assert all(equal(a, b) for a, b in zip(batches, others, strict=True))


def test_a_rank_decodes_only_its_images(index: Index, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []

    def record(ref: Any, *args: Any, name: str, **keys: Any) -> np.ndarray:
        decoded.append((name, ref.insert_at))
        return load_tiles(ref, *args, name=name, **keys)

    monkeypatch.setattr(loader_module, "load_tiles", record)
    for rank in range(4):
        decoded.clear()
        ((plan, _),) = make_loader(index, tokenizer, DataLayout(4, 2), rank).steps(2, 3)
        mine = [plan.packs[number] for number in plan.assignment[rank]]
        expected = [(index.name(s), ref.insert_at) for p in mine for s in p.samples for ref in index.image_refs(int(s))]
        assert sorted(decoded) == sorted(expected)


def test_sequential_pass_and_empty_packs(index: Index, tokenizer: Tokenizer) -> None:
    planner = make_planner(index, sequential=True)
    assert planner.num_steps is not None
    seen: Counter[int] = Counter()
    for step in range(planner.num_steps):
        plan, batches = load_step(index, tokenizer, DataLayout(2, 4), step, planner, augment=False)
        for pack, batch in zip(plan.packs, batches, strict=True):
            seen.update(pack.samples.tolist())
            if not len(pack.samples):
                assert batch.cu_seqlens.tolist() == [0, T]
                assert batch.tiles.shape == (0, 3, TILE, TILE)
                assert batch.visual_rows.shape == (0,)
                assert batch.weights.sum() == 0
    assert seen == Counter(range(len(index)))
    padded = not all(len(pack.samples) for pack in plan.packs)
    assert padded == (planner.num_packs(1) % G != 0)
    steps = [plan.step for plan, _ in make_loader(index, tokenizer, DataLayout(2, 4), 0, planner)]
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
        for plan, _ in make_loader(index, tokenizer, DataLayout(1, 1), 0, planner):
            reached = plan.step
    assert reached == bad - 1  # steps before it are whole, though the error was known earlier
    assert running_threads() == []


def test_an_index_that_does_not_fit_its_tokens_is_an_error(index: Index, tokenizer: Tokenizer) -> None:
    broken = Index.open(index.path)
    broken.samples = broken.samples.copy()
    broken.samples["num_supervised"][3] += 1
    pack = Pack(np.array([3]), np.array([0]), 0, 0, 0)
    s = BatchSettings(SEED, T, "square", tokenizer.image_context, tokenizer.end_of_text, V2PESettings(), True)
    with pytest.raises(ValueError, match=r"sample 'text/4' has (\d+) targets, but the index says"):
        build_microbatch(broken, pack, s)
    long = Pack(np.arange(20), np.zeros(20, np.int64), 0, 0, 0)
    with pytest.raises(ValueError, match=r"sample 'text/\d+' ends at token \d+ of a pack of 256"):
        build_microbatch(index, long, s)


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
    loader = make_loader(index, tokenizer, DataLayout(2, 4), 0, planner, settings=LoaderSettings(prefetch=3))
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
    def slow(ref: Any, *args: Any, **keys: Any) -> np.ndarray:
        time.sleep(0.03)
        return load_tiles(ref, *args, **keys)

    monkeypatch.setattr(loader_module, "load_tiles", slow)
    one = LoaderSettings(num_workers=1, prefetch=1)
    loader = make_loader(index, tokenizer, DataLayout(1, 8), 0, settings=one)
    waits = []
    for plan, _ in loader.steps(0, 2):
        waits.append(loader.wait_seconds)
        images = len(plan.encoder_rank)
        time.sleep(0.05 + 0.04 * images)  # a training step longer than decoding the next one
    assert waits[0] > 0.03 * images / 2
    assert waits[1] < 0.5 * waits[0]
    assert loader.total_wait_seconds == pytest.approx(sum(waits))


def test_bad_ranks_and_layouts_are_errors(index: Index, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make_loader(index, tokenizer, DataLayout(2, 4), 2)
    with pytest.raises(ValueError, match="packs_per_step = 8"):
        make_loader(index, tokenizer, DataLayout(3, 4), 0)


def test_to_moves_all_but_the_borders(index: Index, tokenizer: Tokenizer) -> None:
    _, batches = load_step(index, tokenizer, DataLayout(1, 8))
    moved = batches[0].to("meta")
    assert {name for name, value in vars(moved).items() if value.device.type == "cpu"} == {"cu_seqlens"}
    assert moved.positions.dtype == torch.float32
