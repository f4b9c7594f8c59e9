"""config.json of both formats: round trips, files as they are published, and what must be refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.models.config import InternVLConfig
from evovlm.models.hf.names import Format
from evovlm.models.hf.read_config import ConfigError, read_decoder, read_model, read_vision
from evovlm.models.hf.write_config import write_model
from evovlm.models.table import SIZES

from .hf_support import model_configs

FORMATS: tuple[Format, ...] = ("internvl", "transformers")


def written(config: InternVLConfig, format: Format) -> dict[str, Any]:
    value = write_model(config, format, dtype=torch.bfloat16, image_token=7, eos=1, bos=None)
    result: dict[str, Any] = json.loads(json.dumps(value))
    return result


def tiling(config: InternVLConfig) -> dict[str, Any]:
    return {"crop_to_patches": True, "min_patches": config.min_tiles, "max_patches": config.max_tiles}


@settings(max_examples=50, deadline=None)
@given(model_configs(), st.sampled_from(FORMATS))
def test_round_trip(config: InternVLConfig, format: Format) -> None:
    assert read_model(written(config, format), tiling(config), tied=not config.decoder.tie_embeddings) == config


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SIZES)
def test_round_trip_of_published_sizes(name: str, format: Format) -> None:
    assert read_model(written(SIZES[name], format), tiling(SIZES[name]), tied=False) == SIZES[name]


@settings(max_examples=25, deadline=None)
@given(model_configs())
def test_transformers_reads_every_setting(config: InternVLConfig) -> None:
    """Its config classes keep our keys, fill in the rest, and what they write back we read as the same model."""
    from transformers import InternVLConfig as TheirConfig

    theirs = TheirConfig.from_dict(written(config, "transformers"))
    assert theirs.image_seq_length == config.tokens_per_tile
    assert theirs.image_token_id == 7
    back = read_model(json.loads(json.dumps(theirs.to_dict())), tiling(config), tied=False)
    assert back == config
    short = read_model(json.loads(theirs.to_json_string(use_diff=True)), tiling(config), tied=False)
    assert replace(short, decoder=replace(short.decoder, tie_embeddings=back.decoder.tie_embeddings)) == config


def test_internvl_config_as_published() -> None:
    """The keys of InternVL3-1B's file that concern the model (spec §1.1, §1.2), values included."""
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151674,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.1,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 448,
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }
    expected = SIZES["1B"]
    vision = replace(expected.vision, drop_path_rate=0.1, initializer_range=1e-10)
    assert read_model(config, {}, tied=True) == replace(expected, vision=vision)


def test_published_port_leaves_defaults_out() -> None:
    """transformers writes only what differs from its classes; the inner model_type may be the original's."""
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 151667,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"},
            "vocab_size": 151674,
        },
        "vision_config": {"model_type": "intern_vit_6b", "attention_bias": True},
    }
    assert read_model(config, {}, tied=False) == SIZES["8B"]
    assert read_model(config, {}, tied=True).decoder.tie_embeddings


def test_both_published_vits() -> None:
    vit_6b = {
        "model_type": "intern_vit_6b",
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": 448,
        "patch_size": 14,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
        "initializer_factor": 0.1,
    }
    assert read_vision(vit_6b) == SIZES["78B"].vision
    assert read_vision({"model_type": "intern_vit_6b", "image_size": 448}).num_layers == 48  # the first 6B, by default


def test_internlm3_as_published_and_as_llama() -> None:
    internlm3 = {
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "hidden_act": "silu",
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10240,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
        "rope_theta": 50000000,
        "tie_word_embeddings": False,
        "vocab_size": 128521,
    }
    assert read_decoder(internlm3, tied=True) == SIZES["9B"].decoder
    llama = {key: value for key, value in internlm3.items() if key not in ("bias", "qkv_bias")}
    assert read_decoder({**llama, "model_type": "llama", "attention_bias": False}, tied=True) == SIZES["9B"].decoder


@pytest.mark.parametrize(
    ("format", "path", "value", "message"),
    [
        ("internvl", ("select_layer",), -4, "select_layer is -4"),
        ("internvl", ("ps_version",), "v1", "ps_version is 'v1'"),
        ("internvl", ("ps_version",), None, "ps_version is 'v1'"),
        ("internvl", ("force_image_size",), 224, "force_image_size is 224"),
        ("internvl", ("downsample_ratio",), 0.4, "downsample_ratio 0.4"),
        ("internvl", ("vision_config", "hidden_act"), "quick_gelu", "hidden_act is 'quick_gelu'"),
        ("internvl", ("vision_config", "norm_type"), "batch_norm", "norm_type is 'batch_norm'"),
        ("internvl", ("vision_config", "image_size"), [56, 28], r"image_size is \[56, 28\]"),
        ("internvl", ("vision_config", "hidden_size"), "wide", "hidden_size is 'wide', expected int"),
        ("internvl", ("llm_config",), None, "llm_config is missing"),
        ("internvl", ("llm_config", "model_type"), "phi3", "model_type is 'phi3'"),
        ("internvl", ("llm_config", "model_type"), "internlm2", "bias is True"),
        ("internvl", ("llm_config", "use_sliding_window"), True, "use_sliding_window is True"),
        ("internvl", ("llm_config", "rope_scaling"), {"type": "yarn", "factor": 4.0}, "scaling 'yarn'"),
        ("internvl", ("model_type",), "llava", "model_type is 'llava'"),
        ("internvl", ("model_type",), "qwen2", "bare qwen2"),
        ("transformers", ("vision_feature_layer",), -2, "vision_feature_layer is -2"),
        ("transformers", ("projector_hidden_act",), "relu", "projector_hidden_act is 'relu'"),
        ("transformers", ("vision_config", "use_mean_pooling"), False, "use_mean_pooling is False"),
        ("transformers", ("text_config", "hidden_act"), "gelu", "hidden_act is 'gelu'"),
        ("transformers", ("text_config", "rope_parameters", "rope_type"), "llama3", "scaling 'llama3'"),
    ],
)
def test_what_the_model_cannot_honour_is_refused(
    format: Format, path: tuple[str, ...], value: object, message: str
) -> None:
    config = written(SIZES["tiny"], format)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value is None:
        del inner[path[-1]]
    with pytest.raises(ConfigError, match=message):
        read_model(config, {}, tied=False)


def test_llama_with_attention_bias_is_refused() -> None:
    """In a Llama the flag also puts a bias on the output projection, which our decoder has not."""
    with pytest.raises(ConfigError, match="attention_bias is True"):
        read_decoder({"model_type": "llama", "attention_bias": True}, tied=False)


def test_what_a_format_cannot_hold_is_refused() -> None:
    tiny = SIZES["tiny"]
    normed = replace(tiny, vision=replace(tiny.vision, qk_norm=True, norm_eps=1e-5))
    with pytest.raises(ConfigError, match="epsilon of the query and key norms"):
        written(normed, "transformers")
    assert read_model(written(normed, "internvl"), {}, tied=False) == normed
    no_bias = replace(tiny, decoder=replace(tiny.decoder, qkv_bias=False))
    with pytest.raises(ConfigError, match="no Qwen2 without q, k, v biases"):
        written(no_bias, "internvl")
    assert written(no_bias, "transformers")["text_config"]["model_type"] == "llama"


def test_tiling_of_a_port_lies_with_its_processor() -> None:
    config = written(SIZES["tiny"], "transformers")
    assert read_model(config, {"crop_to_patches": False, "max_patches": 12}, tied=False).max_tiles == 1
    assert read_model(config, {"max_patches": 6, "min_patches": 2}, tied=False).min_tiles == 2
