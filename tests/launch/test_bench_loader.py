"""``evovlm bench loader``: real images and steps, medians and ratios as described, a report that names the machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.launch import bench_index, bench_loader
from evovlm.launch.bench_loader import Mix, draw_image, measure, run, summarize, write_data

SMALL = Mix(images=16, pixels=20_000, tile_size=28, max_tiles=4, warm_steps=1, steps=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Tokenizer]:
    return write_data(tmp_path_factory.mktemp("bench"), SMALL)


def test_images_differ_in_shape_and_are_about_as_large_as_asked_for() -> None:
    sizes = [draw_image(number, 40_000).size for number in range(16)]
    assert len(set(sizes)) == 16
    assert all(19_000 < width * height < 61_000 for width, height in sizes)
    assert {width > height for width, height in sizes} == {True, False}
    assert draw_image(3, 40_000) == draw_image(3, 40_000) != draw_image(3, 50_000)


@pytest.mark.parametrize("workers", [1, 2])
def test_plain_loops_decode_what_the_loader_did(data: tuple[Index, Tokenizer], workers: int) -> None:
    measured = measure(*data, SMALL, workers)
    assert 0 < measured["images"] < measured["tiles"] == measured["plain_tiles"]
    times = ("seconds", "worker_cpu_s", "rank_cpu_s", "plain_seconds", "plain_cpu_s")
    assert min(measured[name] for name in times) > 0
    assert 0 < measured["buffers"] <= SMALL.prefetch + 2
    assert measured["tile_memory_mb"] > 0
    assert measured["waited_s"] <= measured["seconds"]


def test_medians_and_ratios() -> None:
    def repetition(seconds: float, plain: float) -> dict[str, Any]:
        return {
            "images": 100,
            "seconds": seconds,
            "plain_seconds": plain,
            "worker_cpu_s": 4.0,
            "rank_cpu_s": 1.0,
            "plain_cpu_s": 4.5,
            "tile_memory_mb": seconds,
            "tile_memory_bound_mb": 50.0,
        }

    repetitions = [repetition(5.0, 8.0), repetition(10.0, 10.0), repetition(2.0, 4.0)]
    found = summarize(2, repetitions)
    assert found["images_per_s_per_core"] == 10.0
    assert found["plain_loop_images_per_s"] == 12.5
    assert found["ratio"] == 0.8  # of the first: not the ratio of the medians
    assert found["cpu_ratio"] == 0.9
    assert (found["worker_cpu_ms_per_image"], found["rank_cpu_ms_per_image"]) == (40.0, 10.0)
    assert (found["tile_memory_mb"], found["tile_memory_bound_mb"]) == (10.0, 50.0)


def test_report_names_machine_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_loader, "Mix", lambda images: SMALL)
    monkeypatch.setattr(bench_index, "measure_index", lambda folder, samples: {"samples": samples})
    monkeypatch.setattr(bench_index, "rows", lambda measured: [("made-up samples", str(measured["samples"]))])
    report = run(tmp_path / "new" / "l.json", images=16, workers=[1], index_samples=123, repetitions=1)
    assert json.loads((tmp_path / "new" / "l.json").read_text()) == report
    assert report["bench"] == "loader"
    assert {"cpu", "cores"} <= set(report["machine"])
    assert {"torch", "evovlm", "pillow"} <= set(report["versions"])
    results = report["results"]
    assert [line["workers"] for line in results["decode"]] == [1]
    assert results["index"] == {"samples": 123}
    assert "made-up samples" in capsys.readouterr().out
