"""Names and shapes: against a list made from the spec, against our model, against transformers' files."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from evovlm.models.config import InternVLConfig
from evovlm.models.hf.names import canonical, model_shapes, published_names
from evovlm.models.internvl import InternVL
from evovlm.models.table import SIZES

from .hf_support import model_configs, random_model, transformers_twin

# Spec §1.5, spelled out for one layer; three names where q, k and v are split.
LAYER = "vision_model.encoder.layers.7."
THEIRS = "vision_tower.encoder.layer.7."
SPEC_NAMES = {
    "mlp1.0.weight": "multi_modal_projector.layer_norm.weight",
    "mlp1.0.bias": "multi_modal_projector.layer_norm.bias",
    "mlp1.1.weight": "multi_modal_projector.linear_1.weight",
    "mlp1.1.bias": "multi_modal_projector.linear_1.bias",
    "mlp1.3.weight": "multi_modal_projector.linear_2.weight",
    "mlp1.3.bias": "multi_modal_projector.linear_2.bias",
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.patch_embedding.weight": "vision_tower.embeddings.patch_embeddings.projection.weight",
    "vision_model.embeddings.patch_embedding.bias": "vision_tower.embeddings.patch_embeddings.projection.bias",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    f"{LAYER}norm1.weight": f"{THEIRS}layernorm_before.weight",
    f"{LAYER}norm1.bias": f"{THEIRS}layernorm_before.bias",
    f"{LAYER}norm2.weight": f"{THEIRS}layernorm_after.weight",
    f"{LAYER}norm2.bias": f"{THEIRS}layernorm_after.bias",
    f"{LAYER}attn.q_norm.weight": f"{THEIRS}attention.q_norm.weight",
    f"{LAYER}attn.k_norm.weight": f"{THEIRS}attention.k_norm.weight",
    f"{LAYER}attn.proj.weight": f"{THEIRS}attention.projection_layer.weight",
    f"{LAYER}attn.proj.bias": f"{THEIRS}attention.projection_layer.bias",
    f"{LAYER}mlp.fc1.weight": f"{THEIRS}mlp.fc1.weight",
    f"{LAYER}mlp.fc2.bias": f"{THEIRS}mlp.fc2.bias",
    f"{LAYER}ls1": f"{THEIRS}lambda_1",
    f"{LAYER}ls2": f"{THEIRS}lambda_2",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.model.layers.3.self_attn.q_proj.bias": "model.language_model.layers.3.self_attn.q_proj.bias",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
}

# Spec §1.1 [X]: ViT, projector and total of each size.
SPEC_COUNTS = {
    "1B": (304_012_288, 4_482_816, 938_193_024),
    "2B": (304_012_288, 8_662_016, 2_088_957_440),
    "8B": (304_012_288, 27_540_480, 7_944_373_760),
    "9B": (304_012_288, 33_570_816, 9_141_898_240),
    "14B": (304_012_288, 47_204_352, 15_117_256_704),
    "38B": (5_536_496_000, 91_786_240, 38_388_164_992),
    "78B": (5_536_496_000, 172_008_448, 78_408_318_336),
}


@pytest.mark.parametrize(("ours", "theirs"), SPEC_NAMES.items())
def test_names_of_the_spec(ours: str, theirs: str) -> None:
    assert published_names(ours, "internvl") == (ours,)
    (name,) = published_names(ours, "transformers")
    assert name == canonical(theirs)
    assert canonical(f"model.{name}" if name.startswith(("vision_tower", "multi_modal")) else name) == name


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_fused_projection_is_split_into_thirds(leaf: str) -> None:
    names = published_names(f"{LAYER}attn.qkv.{leaf}", "transformers")
    assert names == tuple(f"{THEIRS}attention.{part}_proj.{leaf}" for part in "qkv")


def test_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"vision_model\.encoder\.layers\.0\.norm3"):
        published_names("vision_model.encoder.layers.0.norm3.weight", "transformers")


@settings(max_examples=25, deadline=None)
@given(model_configs())
def test_names_and_shapes_are_those_of_the_model_and_of_transformers(config: InternVLConfig) -> None:
    model = random_model(config)
    shapes = model_shapes(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    transformers_twin(config, model, image_token=0)  # asserts that both have the same names, and loads strictly


@pytest.mark.parametrize("name", SPEC_COUNTS)
def test_published_sizes_have_the_parameters_of_the_spec(name: str) -> None:
    shapes = model_shapes(SIZES[name])

    def total(prefix: str) -> int:
        return sum(math.prod(shape) for tensor, shape in shapes.items() if tensor.startswith(prefix))

    assert (total("vision_model."), total("mlp1."), total("")) == SPEC_COUNTS[name]
    with torch.device("meta"):
        model = InternVL(SIZES[name])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes


def test_files_of_transformers_have_the_names_that_we_write(tmp_path: Path) -> None:
    """What save_pretrained of the installed transformers puts on disk."""
    config = SIZES["tiny"]
    twin = transformers_twin(config, random_model(config), image_token=5)
    twin.save_pretrained(tmp_path, max_shard_size="500KB")
    on_disk = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert on_disk == {name for ours in model_shapes(config) for name in published_names(ours, "transformers")}
