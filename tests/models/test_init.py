"""Random weights: a function of seed and name, with the stated spread."""

from dataclasses import replace

import pytest
import torch

from evovlm.models.hf.names import EMBEDDING, model_shapes
from evovlm.models.init import initial_value
from evovlm.models.internvl import InternVL
from evovlm.models.table import TINY

CONFIG = replace(
    TINY,
    vision=replace(TINY.vision, initializer_range=0.05, layer_scale_init=0.25),
    decoder=replace(TINY.decoder, initializer_range=0.03),
)
SHAPES = {name: torch.Size(shape) for name, shape in model_shapes(CONFIG).items()}


def value(name: str, seed: int = 0) -> torch.Tensor:
    return initial_value(name, SHAPES[name], CONFIG, seed)


def test_every_parameter_of_a_model_is_made() -> None:
    with torch.device("meta"):
        parameters = dict(InternVL(CONFIG).named_parameters())
    assert set(parameters) == set(SHAPES)
    for name, parameter in parameters.items():
        made = value(name)
        assert (made.shape, made.dtype) == (parameter.shape, torch.float32)
        assert made.isfinite().all()


def test_values_depend_on_seed_and_name_alone() -> None:
    name, other = "mlp1.1.weight", "language_model.model.layers.0.mlp.up_proj.weight"
    first = value(name)
    torch.manual_seed(7)  # torch's own generator has no say
    torch.randn(100)
    assert torch.equal(value(name), first)
    assert not torch.equal(value(name, seed=1), first)
    q, k = (f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    assert not torch.equal(value(q), value(k))
    assert not torch.equal(value(other).flatten()[:100], first.flatten()[:100])


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("mlp1.1.weight", (4 * 128) ** -0.5),
        ("mlp1.3.weight", 128**-0.5),
        ("vision_model.encoder.layers.2.attn.qkv.weight", 0.05),
        ("vision_model.embeddings.position_embedding", 0.05),
        ("vision_model.embeddings.patch_embedding.weight", 0.05),
        ("language_model.lm_head.weight", 0.03),
        (EMBEDDING, 0.03),
    ],
)
def test_spread_of_matrices(name: str, std: float) -> None:
    made = value(name)
    assert abs(float(made.std()) / std - 1) < 0.03
    assert abs(float(made.mean())) < 5 * std / made.numel() ** 0.5


def test_vectors() -> None:
    assert value("vision_model.encoder.layers.0.ls2").unique().tolist() == [0.25]
    assert value("vision_model.encoder.layers.0.norm1.weight").unique().tolist() == [1.0]
    assert value("mlp1.0.weight").unique().tolist() == [1.0]
    assert value("language_model.model.norm.weight").unique().tolist() == [1.0]
    assert value("vision_model.encoder.layers.0.mlp.fc1.bias").unique().tolist() == [0.0]
    assert value("language_model.model.layers.1.self_attn.q_proj.bias").unique().tolist() == [0.0]
