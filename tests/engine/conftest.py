"""Fixtures of the engine's tests: one thread, a small model on disk, small indexes, one trained run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.settings import RunSettings
from evovlm.engine.trainer import train
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.save import save_pretrained
from evovlm.parallel.fork import run_ranks

from .small_data import MAX_TILES, MakeIndex, conversation, draw_shapes, small_index
from .support import SMALL, weights_of


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and several test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def small_config(tokenizer: Tokenizer) -> InternVLConfig:
    """The small model with the test tokenizer's vocabulary."""
    return replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=tokenizer.vocab_size), max_tiles=MAX_TILES)


@pytest.fixture(scope="session")
def model_dir(small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory of a small model, in float32."""
    out = tmp_path_factory.mktemp("model") / "small"
    weights = ((name, value.float()) for name, value in weights_of(small_config, seed=1))
    save_pretrained(small_config, weights, out, format="internvl", tokenizer_dir=tiny_tokenizer_dir)
    return out


@pytest.fixture(scope="session")
def make_index(tiny_tokenizer_dir: Path) -> MakeIndex:
    """Factory: ``make_index(folder, {dataset: lines})`` builds ``folder/index``; images lie in ``folder``."""

    def make(folder: Path, datasets: dict[str, list[dict[str, Any]]]) -> Path:
        meta = {}
        for name, lines in datasets.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            meta[name] = {"root": str(folder), "annotation": str(folder / f"{name}.jsonl"), "data_augment": True}
        (folder / "meta.json").write_text(json.dumps(meta))
        report = small_index(folder / "meta.json", tiny_tokenizer_dir, folder / "index")
        return report.path

    return make


@pytest.fixture(scope="session")
def indexes(make_index: MakeIndex, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``train`` and ``val``: drawn shapes in one to five tiles, two images in one sample, and plain text."""
    built = {}
    for split, count in (("train", 20), ("val", 5)):
        folder = tmp_path_factory.mktemp(split)
        shapes = draw_shapes(folder, count)
        asked = [conversation("Which shape?", shape, image=file) for file, shape in shapes]
        both = [
            conversation("<image> or <image>?", f"{a} and {b}", image=[first, second])
            for (first, a), (second, b) in zip(shapes[::3], shapes[1::3], strict=False)
        ]
        texts = [
            {"conversations": [{"from": "pretrain", "value": f"A {shape} is a shape; {i} of them. " * (1 + i % 3)}]}
            for i, (_, shape) in enumerate(shapes)
        ]
        built[split] = make_index(folder, {"shapes": [*asked, *both], "text": texts})
    return built


@pytest.fixture(scope="session")
def make_settings(model_dir: Path, indexes: dict[str, Path]) -> Callable[..., RunSettings]:
    """Factory of settings of a short run of six steps; keyword arguments replace sections' entries."""

    def make(out: Path, **changes: Any) -> RunSettings:
        sections: dict[str, Any] = {
            "out": out,
            "stage": {"name": "pretrain"},
            "model": {"from_dir": model_dir, "drop_path": 0.3},
            "data": {
                "index": indexes["train"],
                "val_index": indexes["val"],
                "pack_tokens": 224,
                "pack_tiles": 16,
                "packs_per_step": 4,
                "window": 32,
                "num_workers": 0,
            },
            "optim": {"lr": 3e-3, "warmup": 2},
            "steps": 6,
            "checkpoint": {"every": 2, "keep": 9},
            "validate_every": 4,
            "log": {"tensorboard": False, "peak_tflops": 0.1, "plan_hash_every": 2},
        }
        for name, value in changes.items():
            sections[name] = sections.get(name, {}) | value if isinstance(value, dict) else value
        return RunSettings.model_validate(sections)

    return make


@pytest.fixture(scope="session")
def finished_run(
    make_settings: Callable[..., RunSettings], indexes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps on one rank, with a test index and two checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    settings = make_settings(
        out,
        steps=2,
        stage={"name": "sft"},
        data={"test_index": indexes["val"], "packs_per_step": 2},
        checkpoint={"every": 1},
        validate_every=0,
    )
    run_ranks(1, lambda world: train(settings, world))
    return out
