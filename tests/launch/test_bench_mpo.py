"""``evovlm bench mpo``: ideas are switched off without another loss, TRL scores the same pairs alike, numbers are
summed up as described, and a missing TRL is said in one line.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evovlm.data.index import Index
from evovlm.data.step_batch import StepBatch
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.engine import Engine
from evovlm.engine.model_source import random_weights
from evovlm.engine.options import EngineOptions
from evovlm.engine.preference import PreferenceTraining, score_pairs
from evovlm.engine.settings import OptimSettings
from evovlm.launch import bench_mpo, bench_mpo_report, bench_mpo_trl
from evovlm.launch.bench_mpo import SWITCHES, Settings, measure, run
from evovlm.launch.bench_mpo_ours import LOSS, Epoch, OurTrainer
from evovlm.launch.bench_mpo_pairs import SHRUNK, Task, write_pairs
from evovlm.launch.bench_mpo_report import best, check_agreement, expected_loss, split
from evovlm.launch.bench_mpo_switches import Switches, rearrange
from evovlm.launch.cli import main
from evovlm.models.internvl import InternVL
from evovlm.models.table import num_parameters
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

from .small_model import SMALL

TASK = Task(model=SMALL, num_pairs=8, pack_tokens=320, shortest=4, longest=20, merges=400, lr=1e-2)
TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not TRL, reason="TRL, the peer, is not installed")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run beside each other."""
    monkeypatch.setattr(bench_mpo, "num_cores", lambda: 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Tokenizer]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), TASK)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with bench_mpo._one_rank(tmp_path) as made:
        yield made


def _float64_engine(world: World) -> Engine:
    return Engine.build(
        partial(InternVL, SMALL),
        ParallelPlan.for_llm(Layout()),
        world,
        optim=OptimSettings(lr=0.1),
        weights=random_weights(SMALL, 1),
        options=EngineOptions(precision="float64"),
    )


def test_pairs_are_of_one_to_five_tiles_and_the_same_every_time(data: tuple[Index, Tokenizer], tmp_path: Path) -> None:
    index, _ = data
    assert index.meta.kind == "preference"
    assert set(index.samples["num_tiles"].tolist()) == {1, 2, 3, 4, 5}
    again, _ = write_pairs(tmp_path, TASK)
    for column in ("num_tokens", "num_tiles", "num_supervised", "chosen_at", "rejected_at", "num_chosen"):
        np.testing.assert_array_equal(again.samples[column], index.samples[column])


def test_the_model_is_what_it_says() -> None:
    parameters = num_parameters(SHRUNK)
    assert parameters["total"] == pytest.approx(12e6, rel=0.05)
    head = SHRUNK.decoder.vocab_size * SHRUNK.decoder.hidden_size
    assert head / parameters["llm"] == pytest.approx(0.27, abs=0.01)
    assert (SHRUNK.vision.tile_size, SHRUNK.tokens_per_tile) == (448, 256)


def _gradients(engine: Engine, batch: StepBatch, reference: Tensor, num_chosen: int) -> dict[str, Any]:
    terms, _ = PreferenceTraining(engine, LOSS).backward(batch, reference, num_chosen)
    found: dict[str, Any] = {name: value.clone() for name, value in engine.named_full_gradients()}
    engine.state.zero_gradients()
    return {"loss": torch.tensor(terms.loss, dtype=torch.float64), **found}


def test_ideas_are_switched_off_without_another_loss_or_gradient(data: tuple[Index, Tokenizer], world: World) -> None:
    trainer, engine = OurTrainer(world, data, TASK), _float64_engine(world)
    steps = [batch for _, batch in trainer._loader(trainer._planner).steps(0, trainer.num_steps)]
    for batch in steps:
        pairs = batch.packs[0].pairs
        assert pairs is not None
        samples = pairs.samples.numpy()
        scores = score_pairs(engine, batch, len(samples))
        reference = scores + torch.arange(scores.numel(), dtype=torch.float64).view_as(scores).sin()
        num_chosen = int(data[0].samples["num_chosen"][samples].sum())
        wanted = _gradients(engine, batch, reference, num_chosen)
        for switches in SWITCHES.values():
            arranged = rearrange(batch, switches)
            copies = 1 if switches.tiles_once else 2
            assert sum(len(one.tiles) for one in arranged) == copies * len(batch.tiles)
            rows = sum(len(one.packs[0].tokens) for one in arranged)
            lengths, prefixes = (data[0].samples[name][samples].sum() for name in ("num_tokens", "chosen_at"))
            assert rows == lengths + (0 if switches.prefix_once else prefixes)
            if switches.packed:
                (one,) = arranged
                found = _gradients(engine, one, reference, num_chosen)
                assert found.keys() == wanted.keys()
                for name, value in wanted.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=f"{switches}: {name}")
            else:
                assert len(arranged) == len(samples)
                alone = torch.cat([score_pairs(engine, one, 1) for one in arranged])
                torch.testing.assert_close(alone, scores, rtol=1e-12, atol=1e-10)


def test_answers_that_begin_alike_are_rearranged_too(tmp_path: Path, world: World, monkeypatch: Any) -> None:
    """The tokens that both begin with are in the prefix, and count for both."""
    passage = bench_mpo.write_pairs.__globals__["_passage"]

    def alike(task: Task, number: int, side: str, text: str) -> str:
        return f"It says that {passage(task, number, side, text)}"

    monkeypatch.setitem(bench_mpo.write_pairs.__globals__, "_passage", alike)
    index, tokenizer = write_pairs(tmp_path, TASK)
    trainer, engine = OurTrainer(world, (index, tokenizer), TASK), _float64_engine(world)
    (_, batch), *_ = trainer._loader(trainer._planner).steps(0, 1)
    pack = batch.packs[0]
    assert pack.pairs is not None
    assert int(((pack.pairs.chosen >= 0) & (pack.pairs.rejected >= 0)).sum()) >= len(pack.pairs.samples)
    wanted = score_pairs(engine, batch, len(pack.pairs.samples))
    for switches in (Switches(prefix_once=False), Switches(False, False), Switches(False, False, False)):
        arranged = rearrange(batch, switches)
        found = torch.cat([score_pairs(engine, one, len(one.packs[0].pairs.samples)) for one in arranged])  # type: ignore[union-attr]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-10)
    of_trl = bench_mpo_trl.Pairs((index, tokenizer))
    assert [len(one["chosen_ids"]) for one in of_trl.examples] == index.samples["num_chosen"].tolist()
    for one in of_trl.examples:
        chosen, rejected = (tokenizer.decode(one[name]) for name in ("chosen_ids", "rejected_ids"))
        assert chosen.startswith("It says that") and rejected.startswith("It says that")
        assert tokenizer.decode(one["prompt_ids"]).endswith("<|im_start|>assistant\n")
        assert chosen.endswith("<|im_end|>")


def test_only_one_pack_of_pairs_is_rearranged(data: tuple[Index, Tokenizer], world: World) -> None:
    trainer = OurTrainer(world, data, TASK)
    (_, batch), *_ = trainer._loader(trainer._planner).steps(0, 1)
    with pytest.raises(ValueError, match="not one of 2"):
        rearrange(replace(batch, packs=2 * batch.packs), Switches())


def test_ours_alone(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out" / "mpo.json"
    run(file, TASK, Settings(repetitions=1, trl=False))
    written = json.loads(file.read_text())
    results = written["results"]
    assert written["bench"] == "mpo"
    assert set(results["split"]) == set(SWITCHES)
    assert "ratio_vs_trl" not in results
    assert results["ours"]["seconds"] == pytest.approx(
        results["ours"]["reference_seconds"] + results["ours"]["train_seconds"]
    )
    assert results["pairs"] == 8
    out = capsys.readouterr().out
    assert "evovlm" in out
    assert "TRL" not in out


@needs_trl
def test_trl_scores_and_trains_on_the_same_pairs() -> None:
    from trl.trainer import utils as trl_utils

    results = measure(TASK, Settings(repetitions=1, batches=(1, 2)))
    agreement = results["agreement"]
    assert agreement["reference_error"] < 1e-5
    for name in ("first_loss", "trl_first_loss"):
        assert agreement[name] == pytest.approx(agreement[f"{name}_expected"], rel=1e-5)
    assert set(results["tuned"]) == {1, 2}
    ours, theirs = results["ours"], results["trl"]
    for part in ("train_seconds", "reference_seconds"):
        assert theirs["precomputed reference"][part] <= min(one[part] for one in results["tuned"].values())
    shipped = [theirs[name]["seconds"] for name in ("precomputed reference", "resident reference")]
    assert results["ratio_vs_trl"] == min(shipped) / ours["seconds"]
    cached = theirs["precomputed reference"]["train_seconds"] / ours["train_seconds"]
    assert results["ratio_vs_trl_cached"] == cached
    assert trl_utils._use_triton(torch.device("cpu")) is False  # put back
    rows = bench_mpo_report.table(results, "a processor").columns[0]._cells
    assert rows[:3] == ["evovlm", "evovlm, resident reference", "TRL, precomputed reference"]


def test_a_missing_trl_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench_mpo_trl.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "mpo"]) == 2
    err = capsys.readouterr().err
    assert "pip install trl==1.16.0" in err
    assert "--no-trl" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("pairs", "settings"), [(10, Settings(trl=False)), (8, Settings(trl=False, batches=(3,)))])
def test_numbers_that_do_not_divide_are_named(pairs: int, settings: Settings) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs in steps of 4 and batches of"):
        measure(replace(TASK, num_pairs=pairs), settings)


SCORES = np.array([[-10.0, -12.0], [-30.0, -9.0], [-8.0, -8.0]])
NUM_CHOSEN = np.array([5, 10, 2])
CONSTANT = 0.8 * np.log(2) + 0.2 * 2 * np.log(2)


def test_expected_first_losses() -> None:
    assert expected_loss(SCORES, NUM_CHOSEN, [[0, 1]]) == pytest.approx(CONSTANT + 40 / 15)
    assert expected_loss(SCORES, NUM_CHOSEN, [[0], [1]]) == pytest.approx(CONSTANT + (2 + 3) / 2)


def _epoch(seconds: float, loss: float, first: list[list[int]], scores: Any = SCORES) -> Epoch:
    return Epoch(seconds / 4, seconds, [loss, 0.0], first, scores)


def test_sides_that_differ_are_an_error() -> None:
    ours, theirs = _epoch(1, CONSTANT + 40 / 15, [[0, 1]]), _epoch(2, CONSTANT + 3.5, [[1], [2]])
    found = check_agreement(ours, theirs, NUM_CHOSEN)
    assert found["reference_error"] == 0
    assert found["trl_first_loss_expected"] == pytest.approx(CONSTANT + 3.5)
    for wrong in (
        _epoch(2, CONSTANT + 3.501, [[1], [2]]),
        _epoch(2, CONSTANT + 3.5, [[0], [2]]),
        _epoch(2, CONSTANT + 3.5, [[1], [2]], SCORES * 1.001),
        _epoch(2, float("nan"), [[1], [2]]),
    ):
        with pytest.raises(RuntimeError, match=r"differ by more than 0\.0001"):
            check_agreement(ours, wrong, NUM_CHOSEN)


def test_numbers_are_summed_up_as_described() -> None:
    found = best([Epoch(3.0, 8.0, [], [], None), Epoch(2.0, 10.0, [], [], None)], 20)
    assert found == {
        "reference_seconds": 2.0,
        "train_seconds": 8.0,
        "seconds": 10.0,
        "pairs_per_second": 2.0,
        "pairs_per_second_cached": 2.5,
    }
    assert split({"evovlm": 2.0, "a": 3.0})["a"] == {"seconds": 3.0, "gain": 1.5}
    ours = {"seconds": 5.0, "train_seconds": 4.0}
    peers = {
        bench_mpo.PRECOMPUTED: [Epoch(3.0, 12.0, [], [], None)],
        bench_mpo.RESIDENT: [Epoch(0.0, 14.0, [], [], None)],
        bench_mpo.ANSWER_ROWS: [Epoch(2.0, 10.0, [], [], None)],
    }
    compared = bench_mpo.compare(ours, peers, 20)
    assert (compared["ratio_vs_trl"], compared["ratio_vs_trl_cached"]) == (14 / 5, 3.0)
    assert (compared["ratio_vs_trl_answer_rows"], compared["ratio_vs_trl_answer_rows_cached"]) == (12 / 5, 2.5)
