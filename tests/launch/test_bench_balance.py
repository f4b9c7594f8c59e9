"""``evovlm bench balance``: loads add up, each way is what it says, the report has the numbers that are asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from evovlm.launch.bench_balance import measure, run
from evovlm.launch.bench_balance_step import WAYS, draw_step, share_out, solve
from evovlm.models.table import size


def test_a_step_has_its_packs_and_their_images() -> None:
    step = draw_step(300, 16_384, 48, key=1)
    assert len(step.costs) == len(step.tokens) == 300
    assert step.tokens.max() <= 16_384
    assert step.tokens.sum() > 0.98 * 300 * 16_384
    assert step.samples == len(step.sample_costs) == len(step.sample_tiles)
    assert step.sample_tiles.sum() == step.image_tiles.sum()
    assert np.bincount(step.image_pack, step.image_tiles, minlength=300).max() <= 48
    assert (draw_step(300, 16_384, 48, key=1).costs == step.costs).all()
    assert (draw_step(300, 16_384, 48, key=2).costs != step.costs).any()


def test_packs_differ_by_attention_alone() -> None:
    step, decoder = draw_step(300, 16_384, 48, key=1), size("8B").decoder
    matrices = decoder.hidden_size * 128 * (2 * 28 + 2 * 4) + 3 * decoder.hidden_size * decoder.ffn_size
    # A pack that is one segment of T tokens against one without attention: 1 + T · (4 · 28 · 128 / 2) / (2 · matrices).
    most = 1 + 16_384 * 28 * 128 / matrices
    assert most == pytest.approx(1.252, abs=1e-3)
    assert 1.1 < step.costs.max() / step.costs.min() < most


def test_even_packs_are_more_alike() -> None:
    costs = [draw_step(300, 16_384, 48, key=1, even_packs=even).costs for even in (False, True)]
    assert np.ptp(np.percentile(costs[1], [5, 90])) < 0.8 * np.ptp(np.percentile(costs[0], [5, 90]))


def test_every_way_shares_out_the_same_work() -> None:
    step = draw_step(64, 16_384, 48, key=0)
    solved = solve(step, 8)
    found = {way: share_out(step, 8, way, solved) for way in WAYS}
    assert all(line["llm"] >= 1 and line["vit"] >= 1 for line in found.values())
    balanced = found.pop("balanced")
    assert balanced["llm"] == found["llm_only"]["llm"] < min(found[way]["llm"] for way in ("random", "pack_only"))
    assert balanced["vit"] < min(line["vit"] for line in found.values())
    assert found["unpacked"]["llm"] > balanced["llm"]
    assert balanced["lockstep"] >= balanced["llm"]


@pytest.mark.parametrize("ranks", [8, 64])
def test_enough_packs_are_balanced_within_half_a_percent(ranks: int) -> None:
    found = measure(ranks, 6, 16_384, 48, repetitions=1)
    assert found["samples_per_rank"] >= 16
    assert 1 <= found["llm_bound"] <= found["llm"] <= 1.005
    assert 1 <= found["vit_bound"] <= found["vit"] <= 1.005
    assert found["ways"]["balanced"]["llm"] == pytest.approx(found["llm"])
    assert found["ways"]["balanced"]["vit"] == pytest.approx(found["vit"])
    assert found["lockstep_bound"] <= found["ways"]["balanced"]["lockstep"]
    assert 1 / ranks < found["local_tiles"] <= found["node_tiles"] <= 1


@pytest.mark.parametrize("packs", [1, 2, 3])
def test_small_steps_are_within_one_percent_of_the_bound(packs: int) -> None:
    found = measure(64, packs, 16_384, 48, repetitions=1)
    assert found["llm"] <= 1.01 * found["llm_bound"]
    assert found["vit"] <= 1.01 * found["vit_bound"]


def test_report_has_the_numbers_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "new" / "b.json", ranks=(2, 8), packs_per_rank=4, small=(1,), repetitions=2)
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == report
    assert report["bench"] == "balance"
    results = report["results"]
    assert set(results["ranks"]) == set(results["small_steps"]["1"]) == {"2", "8"}
    for line in results["ranks"].values():
        assert {"llm", "vit", "llm_bound", "vit_bound", "solve_ms", "samples_per_rank", "local_tiles"} <= set(line)
        assert line["solve_ms"] > 0
        assert set(line["ways"]) == set(WAYS)
    assert "pack_only" in capsys.readouterr().out
