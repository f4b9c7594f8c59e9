"""Settings: defaults of the stages, and combinations that make no sense."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from evovlm.data.batch import V2PESettings
from evovlm.engine.settings import DTYPES, ModelSettings, RunSettings
from evovlm.engine.stages import PretrainStage, SFTStage

LEAST: dict[str, Any] = {
    "out": "runs/a",
    "stage": {"name": "sft"},
    "model": {"size": "tiny", "tokenizer": "tok"},
    "data": {"index": "index", "packs_per_step": 4},
    "optim": {"lr": 1e-3},
    "steps": 10,
}


def make(**changes: Any) -> RunSettings:
    return RunSettings.model_validate({k: v for k, v in (LEAST | changes).items() if v is not None})


def test_stages_are_tables_of_defaults() -> None:
    pretrain, sft = PretrainStage(name="pretrain"), SFTStage(name="sft")
    assert (pretrain.v2pe.mode, pretrain.language_ratio, pretrain.weighting) == ("random", "1:3", "square")
    assert (sft.v2pe, sft.language_ratio, sft.weighting) == (
        V2PESettings(mode="fixed", delta=0.25),
        "natural",
        "square",
    )
    assert isinstance(make().stage, SFTStage)
    chosen = make(stage={"name": "pretrain", "v2pe": {"mode": "off"}, "weighting": "token"}).stage
    assert isinstance(chosen, PretrainStage)
    assert (chosen.v2pe.mode, chosen.language_ratio, chosen.weighting) == ("off", "1:3", "token")


def test_settings_survive_json() -> None:
    settings = make(
        model={"vit_from": "a", "llm_from": "b", "freeze": ["vit"]},
        optim={"lr": 1e-5, "lr_scale": {"vit": 0.1}, "betas": [0.9, 0.95]},
        parallel={"vit": {"zero": 1, "shard": 2}},
        epochs=1.5,
        steps=None,
    )
    assert RunSettings.model_validate_json(settings.model_dump_json()) == settings
    assert settings.model.vit_from == Path("a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "exactly one of: steps, epochs"),
        ({"epochs": 1.0}, "exactly one of: steps, epochs"),
        ({"steps": 0}, "steps"),
        ({"validate_every": 5}, r"validate_every needs \[data\] val_index"),
        ({"stage": {"name": "rl"}}, "'pretrain', 'sft', 'mpo', 'prm'"),
        ({"stage": {"name": "sft", "v2pe": {"mode": "fixed", "delta": 2.0}}}, "delta"),
        ({"optim": {"lr": 0.0}}, "greater than 0"),
        ({"optim": {"lr": 1e-3, "lr_scale": {"vision": 0.1}}}, "'vit', 'projector' or 'llm'"),
        ({"optim": {"lr": 1e-3, "momentum": 0.9}}, r"optim\.momentum\n.*Extra inputs"),
        ({"data": {"index": "a", "packs_per_step": 0}}, "packs_per_step"),
        ({"parallel": {"llm": {"zero": 4}}}, "1, 2 or 3"),
        ({"model": {"size": "tiny", "freeze": ["vision_model"]}}, "'vit', 'projector' or 'llm'"),
        ({"model": {"size": "tiny", "drop_path": 1.0}}, "less than 1"),
        ({"precision": "float16"}, "'float32', 'bfloat16' or 'float64'"),
        ({"learning_rate": 1.0}, "learning_rate\n.*Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "exactly one of: size, from_dir, or vit_from with llm_from"),
        ({"size": "1B", "from_dir": "x"}, "exactly one of"),
        ({"from_dir": "x", "vit_from": "a", "llm_from": "b"}, "exactly one of"),
        ({"vit_from": "a"}, "vit_from and llm_from go together"),
        ({"size": "1B", "llm_from": "b"}, "vit_from and llm_from go together"),
    ],
)
def test_a_model_has_one_source(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSettings.model_validate(model)


def test_settings_do_not_change() -> None:
    settings = make()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]


def test_master_weights_are_never_narrow() -> None:
    assert {name: (d.master, d.compute) for name, d in DTYPES.items()} == {
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.float32, torch.bfloat16),
        "float64": (torch.float64, torch.float64),
    }
