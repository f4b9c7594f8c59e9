"""``evovlm bench train``: baselines train on the same samples as ours with the same losses; numbers are summed up as
described; a rank that fails or is too slow is told of.
"""

import json
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evovlm.data.index import Index
from evovlm.data.sample import IGNORE
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.synthetic import sources
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.flops import Flops
from evovlm.launch import bench_train, bench_train_peers, bench_train_report
from evovlm.launch.bench_train import Settings, measure, measure_text, run
from evovlm.launch.bench_train_gemm import GemmRate, gemm_rate, model_gemms
from evovlm.launch.bench_train_peers import Way
from evovlm.launch.bench_train_report import Timed, check_losses, compare, table
from evovlm.launch.bench_train_samples import SHRUNK, Task, load_steps, planner, step_samples, write_samples
from evovlm.launch.bench_train_worlds import ForkedWorld, Turn, WorldError, WorldTimeoutError
from evovlm.models.table import num_parameters, size
from evovlm.parallel.world import World

from .small_model import SMALL

TASK = Task(model=SMALL, num_samples=24, pack_tokens=192, longest=64, shortest=8, merges=400, lr=1e-2)
EAGER = ("ddp-one-eager", "ddp-padded-eager", "fsdp2-one-eager", "fsdp2-padded-eager")


@pytest.fixture(scope="module", autouse=True)
def small_sources() -> Any:
    """Finding all documents and photographs imports large packages, which takes seconds."""
    documents = tuple(sources.Document(name, text) for name, text in sorted(topics.items())[:20])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    photos = tuple((f"photo:{number}", Image.fromarray(each)) for number, each in enumerate(pixels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "documents", lambda: documents)
        patch.setattr(sources, "photos", lambda split: photos if split == "train" else ())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Tokenizer]:
    return write_samples(tmp_path_factory.mktemp("samples"), TASK)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure(TASK, Settings(batch=2, repetitions=1, baselines=EAGER))


def test_the_model_has_the_proportions_of_the_1b() -> None:
    small, large = num_parameters(SHRUNK), num_parameters(size("1B"))
    assert 25e6 < small["total"] < 100e6

    def head_share(parameters: dict[str, int], config: Any) -> float:
        head: int = config.decoder.vocab_size * config.decoder.hidden_size
        # Untied, the published configuration would have the matrix twice.
        return head / (parameters["llm"] - (0 if config.decoder.tie_embeddings else head))

    assert head_share(small, SHRUNK) == pytest.approx(head_share(large, size("1B")), abs=0.01)
    assert (SHRUNK.vision.tile_size, SHRUNK.vision.num_patches, SHRUNK.tokens_per_tile) == (448, 1024, 256)


def test_samples_are_skewed_and_the_same_every_time(data: tuple[Index, Tokenizer], tmp_path: Path) -> None:
    index, _ = data
    assert set(index.samples["num_tiles"].tolist()) >= {0, 1, 3}
    assert max(index.samples["num_tiles"].tolist()) <= 5
    lengths = index.samples["num_tokens"]
    assert lengths.max() > 4 * lengths.min()
    again, _ = write_samples(tmp_path, TASK)
    for column in ("num_tokens", "num_tiles", "num_supervised"):
        np.testing.assert_array_equal(again.samples[column], index.samples[column])
    text, _ = write_samples(tmp_path / "text", TASK.text_only())
    assert not text.samples["num_tiles"].any()


@pytest.mark.parametrize("batch", [1, 3])
def test_baselines_train_on_the_samples_of_our_step(data: tuple[Index, Tokenizer], batch: int) -> None:
    index, tokenizer = data
    (plan, first), (_, second) = (load_steps(data, TASK, rank, 2, 1)[0] for rank in range(2))
    ranks = [
        bench_train_peers._load(data, TASK, 0, World(rank, 2, bench_train_peers.torch.device("cpu")), batch)
        for rank in range(2)
    ]
    batches = [each for mine, _ in ranks for each in mine]
    assert all(targets == plan.num_supervised for _, targets in ranks)
    assert sum(len(each.tokens) for each in batches) == plan.num_samples
    assert sum(len(each.tiles) for each in batches) == plan.num_tiles == len(first.tiles) + len(second.tiles)
    assert sum(int((each.labels != IGNORE).sum()) for each in batches) == plan.num_supervised
    visual = sum(int((each.tokens == tokenizer.image_context).sum()) for each in batches)
    assert visual == plan.num_tiles * SMALL.tokens_per_tile
    pixels = [float(tiles.double().sum()) for tiles in (*(b.tiles for b in batches), first.tiles, second.tiles)]
    assert sum(pixels[:-2]) == pytest.approx(sum(pixels[-2:]), rel=1e-6)
    for mine, _ in ranks:  # images last
        some = [len(each.tiles) > 0 for each in mine]
        assert some == sorted(some)
    assert all(len(each.tokens) <= batch for each in batches)
    assert (max(len(each.tokens) for each in batches) > 1) == (batch > 1)
    assert sorted(step_samples(plan, TASK)) == sorted(plan.packs.samples.tolist())
    assert len(index.samples) == TASK.num_samples


def test_every_eager_way_has_our_losses(measured: dict[str, Any]) -> None:
    assert set(measured["baselines"]) == set(EAGER)
    wanted = measured["ours"]["losses"]
    assert len(wanted) == 1 + 2
    assert len(set(wanted)) == len(wanted)  # it trains
    for line in measured["baselines"].values():
        np.testing.assert_allclose(line["losses"], wanted, rtol=1e-5)


def test_a_report_holds_what_is_judged(measured: dict[str, Any]) -> None:
    numbers = {"seconds", "median_seconds", "tokens_per_second", "model_flops_per_second", "mfu", "imbalance"}
    for line in (measured["ours"], *measured["baselines"].values()):
        assert numbers | {"peak_memory_gib", "losses"} <= set(line)
        assert line["median_seconds"] >= line["seconds"] > 0
        assert line["imbalance"] >= 1
    assert measured["best_baseline"] in EAGER
    assert measured["ratio_vs_best_baseline"] == min(line["ratio"] for line in measured["baselines"].values())
    assert measured["mfu"] == measured["ours"]["mfu"] > 0
    assert measured["peak_memory_ratio"] > 0
    assert set(measured["flops"]) == {"vit", "projector", "llm"}
    rows = [name for line in [table(measured, "a processor")] for name in line.columns[0]._cells]
    assert rows == ["evovlm", *EAGER]


def test_text_alone_is_compared_with_images() -> None:
    found = measure_text(TASK, Settings(repetitions=1))
    assert found["with_images"]["flops"]["vit"] > 0 == found["text_only"]["flops"]["vit"]
    rates = [found[name]["ours"]["model_flops_per_second"] for name in ("with_images", "text_only")]
    assert found["vlm_text_efficiency"] == pytest.approx(rates[0] / rates[1])


def test_run_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench_train, "Task", lambda: TASK)
    file = tmp_path / "out" / "train.json"
    run(file, Settings(repetitions=1, baselines=()))
    written = json.loads(file.read_text())
    assert written["bench"] == "train"
    assert written["results"]["baselines"] == {}
    assert written["results"]["ratio_vs_best_baseline"] is None
    assert "evovlm" in capsys.readouterr().out


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(ValueError, match=r"no baseline 'ddp-two'.*ddp-one-eager"):
        measure(TASK, Settings(baselines=("ddp-two",)))


def test_names_of_ways() -> None:
    assert [way.name for (way,) in Settings().ways()[:4]] == list(EAGER)
    assert Way("fsdp2", 4, compiled=True).name == "fsdp2-padded-compile"


def _turn(wall: float, busy: float, loss: float, peak: int = 2**30) -> Turn:
    return Turn(wall, busy, loss, peak)


def _timed(walls: list[float], losses: list[float] | None = None, peak: int = 2**30) -> Timed:
    """One step, warmed up once, the second rank 10 % faster; busy for 3 and 1 seconds."""
    made = Timed()
    for turn, wall in enumerate([99.0, *walls]):
        loss = (losses or [1.0] * (len(walls) + 1))[turn]
        made.add(0, [_turn(wall, 3.0, loss, peak), _turn(0.9 * wall, 1.0, loss, peak // 2)], warm_up=turn == 0)
    return made


def test_other_losses_are_an_error() -> None:
    ours, close, far = _timed([1.0], [5.0, 4.0]), _timed([1.0], [5.0, 4.0003]), _timed([1.0], [5.0, 4.0005])
    check_losses("ours", {"ours": ours, "close": close})
    with pytest.raises(RuntimeError, match=r"loss of far in its step 1 is 4.000500, that of ours 4.000000"):
        check_losses("ours", {"ours": ours, "far": far})
    with pytest.raises(RuntimeError, match="nan"):
        check_losses("ours", {"ours": ours, "nan": _timed([1.0], [5.0, float("nan")])})


def test_numbers_are_summed_up_as_described(data: tuple[Index, Tokenizer]) -> None:
    plan = planner(data[0], TASK).plan_step(0, DataLayout(2, 2))
    failed = Timed(losses=[1.0], failure="not done")
    rounds = [
        {"ours": _timed([2.0, 3.0, 4.0], peak=2**29), "a": _timed([4.0, 3.0, 5.0])},
        {"ours": _timed([4.0, 5.0, 6.0]), "b": _timed([5.0, 7.0, 6.0]), "c": failed},
    ]
    rates = [[GemmRate(10.0, []), GemmRate(20.0, [])], [GemmRate(5.0, [])] * 2]
    found = compare("ours", rounds, rates, [plan], [Flops(vit=30.0, projector=6.0, llm=24.0)])
    assert found["ours"]["seconds"] == 2.0  # of the faster round
    assert found["ours"]["median_seconds"] == 3.0
    assert found["ours"]["imbalance"] == 1.5
    assert found["ours"]["tokens_per_second"] == plan.num_tokens / 2.0
    assert found["ours"]["model_flops_per_second"] == 30.0
    assert found["mfu"] == pytest.approx(60.0 / 2.0 / 30.0)
    assert found["baselines"]["a"]["ratio"] == 1.5
    assert found["baselines"]["b"]["ratio"] == 1.25  # of the times of its own round
    assert found["baselines"]["c"] == {"failure": "not done", "losses": [1.0]}
    assert (found["best_baseline"], found["ratio_vs_best_baseline"]) == ("b", 1.25)
    assert found["peak_memory_ratio"] == 0.5


def test_products_are_those_of_the_model(data: tuple[Index, Tokenizer]) -> None:
    plan = planner(data[0], TASK).plan_step(0, DataLayout(2, 2))
    gemms = model_gemms(SMALL, plan, 1)
    flops = bench_train.Work.of(data, TASK, Settings(ranks=1, steps=1)).flops[0]
    heads = SMALL.decoder.num_heads * SMALL.decoder.head_dim
    squares = sum(length * (length + 1) // 2 for length in plan.packs.lengths.tolist())
    rows = SMALL.vision.num_patches + 1
    attention = 12.0 * SMALL.vision.num_layers * plan.num_tiles * rows**2 * SMALL.vision.hidden_size
    attention += 12.0 * SMALL.decoder.num_layers * squares * heads
    # The class token's row passes no patch product.
    extra = 6.0 * plan.num_tiles * 3 * SMALL.vision.patch_size**2 * SMALL.vision.hidden_size
    assert sum(gemm.flops for gemm in gemms) == pytest.approx(flops.total - attention + extra)


class _Counter:
    """A trainer that counts; step 7 raises, step 8 never ends."""

    def __init__(self, world: World) -> None:
        self.world = world

    def step(self, number: int) -> float:
        if number == 7 and self.world.rank == 1:
            raise ValueError("seven is too much")
        if number == 8:
            time.sleep(60)
        held = np.ones(2**number * 2**20, np.uint8)
        return float(held.sum())


def test_worlds_take_turns_and_tell_of_memory(data: tuple[Index, Tokenizer]) -> None:
    worlds = [ForkedWorld(name, 2, _Counter) for name in ("a", "b")]
    try:
        for _ in range(2):
            for world in worlds:
                small, large = world.step(0), world.step(6)
                assert [turn.loss for turn in (*small, *large)] == [2.0**20] * 2 + [2.0**26] * 2
                for before, after in zip(small, large, strict=True):
                    assert after.peak_bytes - before.peak_bytes == pytest.approx(63 * 2**20, rel=0.1)
        plan = planner(data[0], TASK).plan_step(0, DataLayout(2, 2))
        rates = worlds[0].call(partial(gemm_rate, model=SMALL, plan=plan))
        assert len(rates) == 2
        assert all(rate.rate > 0 for rate in rates)
    finally:
        for world in worlds:
            world.close()


def test_a_failing_rank_is_named() -> None:
    world = ForkedWorld("a way", 2, _Counter)
    with pytest.raises(WorldError, match=r"(?s)a way, rank 1: .*seven is too much"):
        world.step(7)


def test_a_slow_world_is_ended_and_reported(data: tuple[Index, Tokenizer]) -> None:
    world = ForkedWorld("slow", 2, _Counter)
    with pytest.raises(WorldTimeoutError, match="slow: not done after 1 s"):
        world.step(8, timeout=1.0)
    plans: list[StepPlan] = [planner(data[0], TASK).plan_step(0, DataLayout(2, 2))]
    work = bench_train.Work(plans, [Flops(1.0, 1.0, 1.0)])
    settings = Settings(steps=1, repetitions=1)
    timed, _ = bench_train._take_turns({"fast": _Counter, "slow": _Slow}, TASK, settings, work, range(1), 2.0)
    assert timed["fast"].failure is None
    assert timed["slow"].failure == "not done with its step 0 after 2 s"
    assert bench_train_report.compare("fast", [timed], [[GemmRate(1.0, [])]], plans, work.flops)["baselines"] == {
        "slow": {"failure": "not done with its step 0 after 2 s", "losses": []}
    }


class _Slow(_Counter):
    def step(self, number: int) -> float:
        return super().step(8 + number)
