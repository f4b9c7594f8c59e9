"""``evovlm bench ops``: every case right at small shapes, ratios that follow from the times, a complete report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evovlm.launch import bench_ops
from evovlm.launch.bench_ops import CASES, Case, Size, measure, run

TINY = Size(tokens=256, hidden=16, heads=2, kv_heads=1, head_dim=8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ratios_follow_from_the_times(case: Case) -> None:
    result = measure(case, TINY, 2, compiled=False)
    ms = result["ms"]
    assert result["vs_torch"] == ms["torch"] / ms["ours"]
    assert result["vs_compiled"] is None
    assert result["of_fresh_copy_bandwidth"] == ms["clone"] / ms["ours"]
    assert result["of_copy_bandwidth"] == (ms["copy"] / ms["into"] if case.into else None)
    assert result["megabytes"] == case.num_bytes(TINY) / 1e6


def test_a_wrong_operator_is_not_timed() -> None:
    wrong = replace(CASES[0], ours=lambda x, index: x[index] + 1)
    with pytest.raises(RuntimeError, match="gather_rows differs from PyTorch's composition"):
        measure(wrong, TINY, 1, compiled=False)


def test_the_report_names_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "SIZES", {"small": TINY, "large": replace(TINY, tokens=512)})
    file = tmp_path / "ops.json"
    report = run(file, repetitions=1, compiled=False)
    assert json.loads(file.read_text()) == report
    assert list(report["results"]) == [case.name for case in CASES]
    for result in report["results"].values():
        assert result["threads"] == torch.get_num_threads()
        assert result["megabytes"] == pytest.approx(2 * result["small"]["megabytes"])
