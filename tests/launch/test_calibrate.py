"""``evovlm calibrate``: measures a tiny model in seconds and writes a file that plans can be made from."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evovlm.engine.calibration import Measurements, measure
from evovlm.engine.settings import RunSettings
from evovlm.launch import calibrate
from evovlm.launch.ranks import RankInfo
from evovlm.launch.settings import load_settings
from evovlm.parallel.cost import CostModel

RECIPE = """
out = "run"
steps = 1
[stage]
name = "sft"
[model]
size = "tiny"
tokenizer = "{tokenizer}"
[data]
index = "nowhere"
packs_per_step = 1
pack_tokens = 96
[optim]
lr = 1e-3
[parallel]
encode_tiles = 4
"""


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_dir: Path) -> RunSettings:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(tokenizer=tiny_tokenizer_dir))
    return load_settings(RunSettings, recipe)


def steady(*cases: Any, **options: Any) -> Measurements:
    """Run all work, and say times that grow with it: on a busy machine those of a tiny model may not."""
    found = measure(*cases, **options)
    measured = [replace(one, seconds=(1e-5 + 1e-12 * one.case.weight,) * found.rounds) for one in found.measured]
    return replace(found, measured=measured)


def test_a_table_and_a_file(
    settings: RunSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "measure", steady)
    file = tmp_path / "costs" / "cost.json"
    model = calibrate.run(settings, RankInfo(), out=file, max_seconds=300.0, max_rounds=5)
    assert CostModel.load(file) == model
    assert (model.source, model.unit) == ("calibrated", "ns")
    assert model.about["pack_tokens"] == "96"
    assert model.about["torch"] == torch.__version__
    assert model.about["rounds"] == "5"
    assert set(model.fits) == {"vit", "projector", "llm"}
    assert model.vit.per_tile > 0
    costs = model.integers(96, 44)
    assert costs.pack_costs(np.array([96]), np.array([96]), 96)[0] > 0
    out = capsys.readouterr().out
    for part in (
        "96 rows: 1 × 96, 96 targets",
        "4 tiles",
        "16 visual tokens",
        "held out",
        "per_square",
        "by shape",
        f"wrote {file}",
    ):
        assert part in out
    assert "rows with a target: 100%, assumed, as there is no index at nowhere" in out
    assert f"{model.machine}; 5 rounds in" in out
    assert not torch.distributed.is_initialized()


def test_mistakes(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cost.json"
    with pytest.raises(ValueError, match="calibrate runs in one process, but 2 were started"):
        calibrate.run(settings, RankInfo(world_size=2), out=out)
    monkeypatch.setattr(calibrate, "free_memory", lambda _: 2**20)
    with pytest.raises(
        ValueError, match=r"weights and gradients take 0\.0 GiB on one rank, and 0\.0 GiB are free on cpu"
    ):
        calibrate.run(settings, RankInfo(), out=out)
    torch.distributed.destroy_process_group()

    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(calibrate, "free_memory", lambda _: None)
    monkeypatch.setattr(calibrate, "make_cases", too_much)
    wanted = r"ran out of memory with packs of 96 tokens and chunks of 4 tiles: lower data.pack_tokens .* 3 GiB\.\)"
    with pytest.raises(ValueError, match=wanted):
        calibrate.run(settings, RankInfo(), out=out)
    torch.distributed.destroy_process_group()
    assert not out.exists()


def test_the_share_of_targets_comes_from_the_index(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SimpleNamespace(meta=SimpleNamespace(num_supervised=15, num_tokens=60))
    monkeypatch.setattr(calibrate.Index, "open", lambda _: opened)
    assert calibrate._supervised(settings, None) == (0.25, "of the index's tokens")
    assert calibrate._supervised(settings, 0.5) == (0.5, "as given")


def test_the_memory_that_is_free() -> None:
    free = calibrate.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
