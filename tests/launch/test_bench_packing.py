"""``evovlm bench packing``: peers pack as their originals do, numbers follow from the packs, the report is complete."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evovlm.data.synthetic.lengths import LengthMix, length_mix
from evovlm.launch.bench_packing import PEERS, judge, least_std, measure_ours, measure_peer, run, spread
from evovlm.launch.bench_packing_peers import best_fit, greedy_buffer, next_fit


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def test_next_fit_keeps_one_pack_open() -> None:
    tokens, tiles = ints(6, 3, 2, 7, 1, 1), ints(0, 1, 1, 1, 2, 1)
    assert next_fit(tokens, tiles, 10, 3).tolist() == [0, 0, 1, 1, 2, 2]


def test_greedy_buffer_takes_the_first_that_fits_most_tiles_first() -> None:
    # Packs are 6 tokens/2 tiles and 5/3; the third sample fits both and joins the one with more tiles, the fourth
    # only the other. A text sample counts as a tile.
    tokens, tiles = ints(6, 5, 2, 4), ints(2, 3, 1, 0)
    assert greedy_buffer(tokens, tiles, 10, 4, 20).tolist() == [0, 1, 1, 0]
    assert greedy_buffer(ints(1, 1, 1), ints(0, 0, 0), 10, 2, 20).tolist() == [0, 0, 1]


def test_greedy_buffer_gives_up_the_pack_with_most_tiles() -> None:
    tokens, tiles = ints(9, 8, 1, 2), ints(3, 1, 1, 1)
    assert greedy_buffer(tokens, tiles, 10, 9, 1).tolist() == [0, 1, 1, 2]  # 0 left when 1 came; 1 is never full
    assert greedy_buffer(tokens, tiles, 10, 9, 2).tolist() == [0, 1, 0, 1]  # 0 leaves full of tokens


@given(st.lists(st.integers(1, 20), max_size=60), st.sampled_from([20, 32, 33]))
@settings(deadline=None, derandomize=True)
def test_best_fit_is_best_fit(lengths: list[int], max_tokens: int) -> None:
    tokens = np.array(lengths, np.int32)
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [f for f in free if f >= length]
        if room:
            free.remove(min(room))
        free.append((min(room) if room else max_tokens) - length)
    number = best_fit(tokens, np.zeros_like(tokens), max_tokens, 0)
    used = np.bincount(number, weights=tokens, minlength=len(free))
    assert sorted(used) == sorted(max_tokens - f for f in free)


def test_judge_counts_what_is_over() -> None:
    mix = LengthMix(ints(4, 5, 8), ints(1, 3, 0), ints(1, 1, 0), ints(1, 3))
    found = judge(mix, np.array([0, 0, 1]), 10, 3, 0.5)
    assert found == {
        "fill": pytest.approx(17 / 20),
        "samples_per_s": 6.0,
        "packs": 2,
        "most_tokens": 9,
        "most_tiles": 4,
        "keeps_budgets": False,
        "packs_over": 1,
    }


def test_spread_and_its_bound() -> None:
    assert spread(np.array([1.0, 1.0, 4.0])) == pytest.approx({"largest": 2.0, "p99": 1.97, "std": 0.5**0.5})
    # Nine of ten alone, the rest shared out over two packs.
    assert least_std(np.array([9, 1, 1, 1, 1]), 3) == pytest.approx(spread(np.array([9.0, 2.0, 2.0]))["std"])
    assert least_std(np.array([2, 2, 2, 2]), 2) == 0.0
    assert least_std(np.array([5, 3]), 2) == pytest.approx(0.25)


def test_ours_is_fuller_than_peers_that_keep_the_budgets() -> None:
    mix = length_mix(20_000, 0)
    plain, alike = measure_ours(mix, 16384, 48, 20_000, 1)
    peers = {name: measure_peer(peer, mix, 16384, 48) for name, (_, peer) in PEERS.items()}
    assert plain["keeps_budgets"]
    assert alike["keeps_budgets"]
    assert not peers["trl_bfd"]["keeps_budgets"]
    for name in ("greedy_buffer_20", "greedy_buffer_100", "next_fit"):
        assert peers[name]["keeps_budgets"]
        assert peers[name]["fill"] < min(plain["fill"], alike["fill"])
    assert alike["least_std"] <= alike["cost"]["std"] < alike["plain_cost"]["std"]


def test_report_has_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "new" / "p.json", samples=3000, repetitions=1)
    assert json.loads((tmp_path / "new" / "p.json").read_text()) == report
    results = report["results"]
    assert report["bench"] == "packing"
    assert (results["samples"], results["mix"], results["max_tokens"], results["max_tiles"]) == (
        3000,
        "internvl",
        16384,
        48,
    )
    assert 0.9 < results["fill"] <= 1
    assert results["samples_per_s"] > 0
    assert set(results["peers"]) == set(PEERS)
    assert {"fill", "samples_per_s", "packs", "keeps_budgets"} <= set(results["peers"]["next_fit"])
    assert {"fill", "cost", "plain_cost", "least_std"} <= set(results["with_cost_target"])
    assert {case["mix"] for case in results["cases"]} == {"internvl", "short", "bimodal"}
    assert "costs evened out" in capsys.readouterr().out
