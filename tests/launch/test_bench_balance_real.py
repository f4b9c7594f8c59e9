"""``evovlm bench balance --real``: every way trains on the same samples, shared out as it says; numbers are summed up
as described.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evovlm.data.index import Index
from evovlm.data.step_plan import DataLayout, StepPlan
from evovlm.data.synthetic.build import QuickstartData
from evovlm.data.tokenizer import Tokenizer
from evovlm.launch import bench_balance_real, bench_balance_real_step
from evovlm.launch.bench_balance_real import PHASES, Timed, measure, run, summarize
from evovlm.launch.bench_balance_real_step import WAYS, Mix, WayPlanner, load, write_data
from evovlm.models.table import TINY

LAYOUT = DataLayout(2, 4)
SMALL = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32),
    decoder=replace(TINY.decoder, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=48),
)


def _write_small(tokenizer: Path, out: Path) -> QuickstartData:
    """Data in the place of the quickstart's: pages of three images of one to five tiles, and text."""
    out.mkdir()
    (out / "tokenizer").symlink_to(tokenizer)
    random = np.random.default_rng(0)
    pages, texts = [], []
    for number in range(24):
        names = [f"{number}_{i}.png" for i in range(3)]
        for i, name in enumerate(names):
            pixels = random.integers(0, 256, (56, 56 * (1 + (number + i) % 4), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out / name)
        document = "".join(f"<image>\n{number} shown {i} times\n" for i in range(3))
        pages.append({"image": names, "conversations": [{"from": "pretrain", "value": document}]})
        words = "the red car " * int(random.integers(5, 60))
        texts.append({"conversations": [{"from": "pretrain", "value": words}]})
    meta = {}
    for name, lines in (("pages", pages), ("text", texts)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl"}
    (out / "pretrain.json").write_text(json.dumps(meta))
    return QuickstartData(out, {})


@pytest.fixture(scope="module")
def mix(tiny_tokenizer_dir: Path) -> Mix:
    decoder = replace(SMALL.decoder, vocab_size=Tokenizer.load(tiny_tokenizer_dir).vocab_size)
    return Mix(model=replace(SMALL, decoder=decoder), pack_tokens=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path, mix: Mix) -> tuple[Index, Tokenizer]:
    """Index and tokenizer; of ``write_data``, but for the quickstart's own data, which takes half a minute to make."""
    asked: list[tuple[int, float]] = []

    def make(out: Path, *, seed: int, scale: float, num_workers: int, passage: int) -> QuickstartData:
        asked.append((seed, scale))
        assert num_workers == 1
        assert passage > 10**6  # whole documents
        return _write_small(tiny_tokenizer_dir, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_balance_real_step, "build_quickstart_data", make)
        made = write_data(tmp_path_factory.mktemp("real"), mix, num_workers=1)
    assert asked == [(mix.seed, mix.scale)]
    return made


@pytest.fixture(scope="module")
def measured(data: tuple[Index, Tokenizer], mix: Mix) -> dict[str, Any]:
    """Two ranks train two steps in each way, twice; the vocabulary is filled in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_balance_real, "write_data", lambda *_: data)
        return measure((2,), steps=2, repetitions=2, mix=replace(mix, model=SMALL))


def _plans(data: tuple[Index, Tokenizer], mix: Mix, step: int) -> dict[str, StepPlan]:
    return {way: WayPlanner(data[0], mix, way).plan_step(step, LAYOUT) for way in WAYS}


def _homes(index: Index, plan: StepPlan) -> list[int]:
    """The rank that trains on each image's pack, image by image."""
    rank_of = {int(pack): rank for rank, packs in enumerate(plan.assignment) for pack in packs}
    return [
        rank_of[number]
        for number, pack in enumerate(plan.packs)
        for sample in pack.samples.tolist()
        for _ in range(int(index.samples["num_images"][sample]))
    ]


@pytest.mark.parametrize("step", range(3))
def test_ways_share_the_same_packs_out_as_they_say(data: tuple[Index, Tokenizer], mix: Mix, step: int) -> None:
    plans = _plans(data, mix, step)
    on = plans["on"]
    assert on.num_tiles > 0
    for way, plan in plans.items():
        assert (plan.packs.samples == on.packs.samples).all()
        assert (plan.packs.starts == on.packs.starts).all()
        assert sorted(plan.assignment.flatten()) == list(range(8))
        assert plan.vit_load.sum() == on.num_tiles
        if way in ("off", "llm_only"):
            assert plan.pieces.image.tolist() == list(range(len(on.image_tiles)))
            assert (plan.pieces.tiles == on.image_tiles).all()
            assert not plan.pieces.first.any()
            assert plan.pieces.encoder.tolist() == _homes(data[0], plan)
        else:
            assert np.ptp(plan.vit_load) <= 1
    for way in ("off", "vision_only"):
        assert plans[way].assignment.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert (plans["llm_only"].assignment == on.assignment).all()


def test_steps_are_skewed_and_balance_evens_them_out(data: tuple[Index, Tokenizer], mix: Mix) -> None:
    steps = [_plans(data, mix, step) for step in range(6)]
    gap = {way: sum(int(np.ptp(plans[way].llm_load)) for plans in steps) for way in WAYS}
    tiles = {way: sum(int(np.ptp(plans[way].vit_load)) for plans in steps) for way in WAYS}
    assert gap["off"] == gap["vision_only"] > 2 * gap["llm_only"] == 2 * gap["on"]
    assert min(tiles["off"], tiles["llm_only"]) > 10 * max(tiles["vision_only"], tiles["on"])


def test_a_rank_gets_its_packs_and_decodes_what_it_encodes(data: tuple[Index, Tokenizer], mix: Mix) -> None:
    for way in WAYS:
        plan = WayPlanner(data[0], mix, way).plan_step(1, LAYOUT)
        for rank in range(2):
            _, (loaded, batch) = load(data, mix, way, rank, 2, steps=2)
            assert loaded.digest() == plan.digest()
            assert len(batch.tiles) == plan.vit_load[rank]
            assert len(batch.packs) == 4
            assert batch.tiles.isfinite().all()


def test_ranks_train_and_their_losses_are_equal(measured: dict[str, Any]) -> None:
    (line,) = measured["ranks"].values()
    assert list(measured["ranks"]) == ["2"]
    assert len(line["loss"]) == 2
    assert all(4 < loss < 8 for loss in line["loss"])  # ln 384 = 5.95: random weights
    for name in ("step_seconds", "spread", "bound_seconds", "idle", "idle_of_bound", "phase_imbalance"):
        assert list(line[name]) == list(WAYS)
    assert all(seconds > 0 for way in WAYS for seconds in (line["step_seconds"][way], line["bound_seconds"][way]))
    for way in WAYS:
        for name in ("idle", "idle_of_bound"):
            assert line[name][way]["slowest"] <= line[name][way]["fastest"] < 1
        assert line["idle_of_bound"][way]["slowest"] >= 0
        assert list(line["phase_imbalance"][way]) == list(PHASES)
        for imbalance in (*line["phase_imbalance"][way].values(), line["busy_imbalance"][way]):
            assert 1 <= imbalance <= 2
    assert line["tiles_imbalance"]["on"] < line["tiles_imbalance"]["off"]
    assert line["llm_imbalance"]["on"] == line["llm_imbalance"]["llm_only"] <= line["llm_imbalance"]["off"]
    assert len(line["packs"]["tiles"]) == len(line["packs"]["llm_cost"]) == 8
    assert sum(line["packs"]["llm_cost"]) == pytest.approx(8)
    assert 0 <= line["waiting_cpu"] < 1


def test_report_and_table(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(*args: Any) -> dict[str, Any]:
        asked.append(args)
        return measured

    monkeypatch.setattr(bench_balance_real, "measure", answer)
    monkeypatch.setenv("COLUMNS", "80")
    report = run(tmp_path / "new" / "b.json", ranks=(2,), steps=2, repetitions=5)
    assert asked == [((2,), 2, 5)]
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == report
    assert report["results"] == measured
    shown = capsys.readouterr().out
    assert "vision" in shown
    assert "…" not in shown  # fits
    assert "lend theirs" not in shown
    monkeypatch.setattr(bench_balance_real, "num_cores", lambda: 1)
    run(ranks=(2,))
    assert "more ranks than the 1 cores" in capsys.readouterr().out


def _timed(data: tuple[Index, Tokenizer], mix: Mix, wall: float, phases: list[float]) -> Timed:
    """What a rank measured in three repetitions of a step, with off taking four times as long to wait; the second
    repetition was disturbed.
    """
    factor = np.array([4.0, 2.0, 2.0, 1.0])[:, None, None]
    noise = np.array([1.0, 9.0, 1.0])[None, :, None]
    shape = (len(WAYS), 3, 1)
    busy = np.broadcast_to(phases, (*shape, len(PHASES))) * noise[..., None]
    plans = [[plan] for plan in _plans(data, mix, 0).values()]
    return Timed(wall * factor * noise, busy, np.full(shape, 6.0), plans, 0.25)


def test_steps_and_ranks_are_summed_up(data: tuple[Index, Tokenizer], mix: Mix) -> None:
    ranks = [_timed(data, mix, 9.0, [1, 2, 1, 1]), _timed(data, mix, 10.0, [3, 1, 3, 1])]
    ranks[1].waiting_cpu = 0.75  # it was the one that the others waited for
    found = summarize(ranks)
    assert found["step_seconds"] == {"off": 40.0, "vision_only": 20.0, "llm_only": 20.0, "on": 10.0}
    assert found["ratio"] == 0.25
    assert found["spread"]["on"] == 8.0
    assert found["bound_seconds"]["on"] == 3 + 2 + 3 + 1
    assert found["bound_ratio"] == 1.0
    assert found["idle"]["off"] == pytest.approx({"slowest": 1 - 8 / 40, "fastest": 1 - 5 / 40})
    assert found["idle"]["on"] == pytest.approx({"slowest": 1 - 8 / 10, "fastest": 1 - 5 / 10})
    assert found["idle_of_bound"]["off"] == pytest.approx({"slowest": 1 - 8 / 9, "fastest": 1 - 5 / 9})
    assert found["busy_imbalance"]["on"] == pytest.approx(8 / 6.5)
    assert found["phase_imbalance"]["on"] == pytest.approx(dict(zip(PHASES, [1.5, 4 / 3, 1.5, 1], strict=True)))
    load = _plans(data, mix, 0)["off"].vit_load
    assert found["tiles_imbalance"]["off"] == pytest.approx(load.max() / load.mean())
    assert found["waiting_cpu"] == 0.25


def test_other_losses_are_an_error(data: tuple[Index, Tokenizer], mix: Mix) -> None:
    ranks = [_timed(data, mix, 1.0, [1, 1, 1, 1]) for _ in range(2)]
    ranks[0].losses[2, 1, 0] *= 1 + 1e-6
    summarize(ranks)
    ranks[0].losses[2, 1, 0] *= 1 + 1e-4
    with pytest.raises(RuntimeError, match="losses of off, vision_only, llm_only, on differ"):
        summarize(ranks)
