"""``evovlm bench ops``: every case right at small shapes, ratios that follow from the times, a complete report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evovlm.csrc import ops
from evovlm.launch import bench_ops, bench_ops_peers, bench_ops_timing
from evovlm.launch.bench_ops import run
from evovlm.launch.bench_ops_cases import CASES, Case
from evovlm.launch.bench_ops_inputs import Size
from evovlm.launch.bench_ops_timing import measure

TINY = Size(tokens=256, hidden=16, heads=2, kv_heads=1, head_dim=8, mlp=24, words=50)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops_timing, "TURN", 0.0001)
    monkeypatch.setattr(bench_ops_timing, "GEMM", 16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ratios_follow_from_the_times(case: Case) -> None:
    result = measure(case, TINY, 2, compiled=False)
    ms = result["ms"]
    for name in ("torch", *case.others):
        assert result[f"vs_{name}"] == ms[name] / ms["ours"]
    assert result["vs_compiled"] is None
    if case.flops is None:
        assert result["of_fresh_copy_bandwidth"] == ms["clone"] / ms["ours"]
        assert result["of_copy_bandwidth"] == (ms["copy"] / ms["into"] if case.into else None)
        assert case.num_bytes is not None
        assert result["megabytes"] == case.num_bytes(TINY) / 1e6
    else:
        peak = 2 * 16**3 / ms["gemm"]
        assert result["of_gemm_peak"] == pytest.approx(case.flops(TINY) / ms["ours"] / peak)


@pytest.mark.parametrize("way", ["ours", "loop"])
def test_a_wrong_way_is_not_timed(way: str) -> None:
    case = next(case for case in CASES if case.name == "v2pe_positions")

    def wrong(*tables: torch.Tensor) -> torch.Tensor:
        return case.composition(*tables) + 1

    changed = replace(case, ours=wrong) if way == "ours" else replace(case, others={"loop": lambda _: wrong})
    with pytest.raises(RuntimeError, match=r"v2pe_positions.* differs from PyTorch's composition"):
        measure(changed, TINY, 1, compiled=False)


def test_compositions_are_compiled() -> None:
    case = next(case for case in CASES if case.name == "gather_rows")
    result = measure(case, TINY, 1, compiled=True)
    assert result["vs_compiled"] == result["ms"]["compiled"] / result["ms"]["ours"]


def test_flops_of_attention_are_those_of_its_products() -> None:
    """Causal segments of 128, 64 and 64 rows: a pair of a query and a key costs a product of D channels, twice."""
    flops = {case.name: case.flops(TINY) for case in CASES if case.flops is not None}
    pairs = sum(n * (n + 1) // 2 for n in (128, 64, 64))
    assert flops["attention_causal"] == 2 * 2 * (2 * 8) * pairs
    assert flops["attention_causal_backward"] == 3.5 * flops["attention_causal"]
    assert flops["attention_tiles"] == 2 * 2 * (16 * 64) * 1025**2


def test_peers_agree_where_runs_touch_borders() -> None:
    borders = torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32)
    runs = torch.tensor([(0, 2), (2, 3), (9, 3), (12, 8)])
    deltas = torch.tensor([0.25, 0.5, 1.0, 1 / 64], dtype=torch.float64)
    expected = ops.v2pe_positions(borders, runs, deltas, 20)
    for way in (bench_ops_peers.positions_by_loop, bench_ops_peers.positions_at_once):
        assert torch.equal(way(borders, runs, deltas, 20), expected)


def test_the_report_names_the_chosen_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "SIZES", {"small": TINY, "large": replace(TINY, tokens=512)})
    file, threads = tmp_path / "ops.json", torch.get_num_threads()
    report = run(file, ["rotary", "swiglu"], threads=1, repetitions=1, compiled=False)
    assert json.loads(file.read_text()) == report
    assert list(report["results"]) == [case.name for case in CASES if case.name.startswith(("rotary", "swiglu"))]
    assert torch.get_num_threads() == threads
    for result in report["results"].values():
        assert result["threads"] == 1
        assert result["megabytes"] == pytest.approx(2 * result["small"]["megabytes"])


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match=r"no operator 'rotery'; there are gather_rows, "):
        run(None, ["rotery"])
