"""``make bench`` measures, prints and writes what was measured together with the machine."""

import json
from pathlib import Path

import pytest
import typer

from evovlm.launch import bench
from evovlm.launch.bench import BENCHMARKS, run


def test_result_file_names_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["tiles"], tmp_path / "bench" / "b.json", repetitions=3)
    content = json.loads((tmp_path / "bench" / "b.json").read_text())
    (line,) = content["results"]
    assert line["name"] == "tiles"
    assert line["value"] == pytest.approx(10 / line["seconds"])
    assert line["repetitions"] == 3
    assert {"cpu", "cores", "torch", "evovlm", "gpu"} <= set(content["machine"])
    assert "tiles/s on one core" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["command", "model"])
def test_each_benchmark_gives_rates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NUM_TOKENS", 256)
    for line in BENCHMARKS[name](3):
        assert line.value > 0
        assert line.seconds > 0


def test_unknown_benchmark_lists_the_known() -> None:
    with pytest.raises(typer.BadParameter, match="matmul, tiles, model"):
        run(["speed"])
