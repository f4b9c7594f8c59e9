"""A model's name follows its weights, not its place or the times of its files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evovlm.engine import model_fingerprint as module
from evovlm.engine.model_fingerprint import model_fingerprint


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return model_fingerprint(folder)


def test_a_copy_keeps_its_name(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, ns=(1, 1))
    assert model_fingerprint(tmp_path / "copy") == model_fingerprint(model_dir)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_another_value_is_another_model(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Training changes all of a tensor, so one value in each place that is read stands for it."""
    folder = tmp_path_factory.mktemp("models")
    sizes = data.draw(st.lists(st.integers(1, 900), min_size=1, max_size=4))
    tensors = {f"{i}": torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)}
    before = write(folder, tensors)
    assert write(folder, tensors) == before
    tensors[data.draw(st.sampled_from(sorted(tensors)))] += 1
    assert write(folder, tensors) != before


def test_names_shapes_and_settings_count(tmp_path: Path) -> None:
    ones = torch.ones(8)
    names = {write(tmp_path / str(i), tensors) for i, tensors in enumerate([{"a": ones}, {"b": ones}, {"a": ones[:4]}])}
    (tmp_path / "0" / "config.json").write_text("{}")
    assert len(names | {model_fingerprint(tmp_path / "0")}) == 4


def test_a_run_is_named_by_its_newest_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = model_fingerprint(run)
    (file,) = sorted((run / "checkpoints").iterdir())[-1].glob("*.safetensors")
    tensors = load_file(file)

    def rewrite(change: Callable[[str], bool]) -> str:
        save_file({name: value + change(name) for name, value in tensors.items()}, file)
        return model_fingerprint(run)

    assert rewrite(lambda name: name.startswith("optimizer.")) == before  # answers do not depend on it
    assert rewrite(lambda name: name.startswith("model.")) != before
    shutil.rmtree(file.parent)
    assert model_fingerprint(run) != before


def test_of_very_many_tensors_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TENSORS", 3)
    tensors = {f"{i:02d}": torch.zeros(2) for i in range(10)}
    before = write(tmp_path, tensors)
    assert write(tmp_path, {name: value + 1 for name, value in tensors.items()}) != before


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        model_fingerprint(tmp_path)
