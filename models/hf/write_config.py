"""Write ``config.json`` of both published formats (spec §1.1–1.3); the way back is in ``read_config.py``."""

import torch

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.names import Format
from evovlm.models.hf.read_config import ConfigError, Json

_QK_NORM_EPS = 1e-6  # transformers' port does not read it from config.json
_REMOTE = "OpenGVLab/InternVL3-8B--"  # where transformers finds the code of InternVLChatModel, which we do not copy


def write_vision(config: VisionConfig, format: Format) -> Json:
    """Write the ``vision_config`` of a format.

    Raises:
        ConfigError: The format cannot hold this ViT.
    """
    shared: Json = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "hidden_act": "gelu",
        "num_channels": 3,
        "norm_type": config.norm,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
    }
    if format == "internvl":
        return shared | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": config.tile_size,
            "patch_size": config.patch_size,
            "qkv_bias": config.qkv_bias,
            "qk_normalization": config.qk_norm,
            "initializer_factor": config.layer_scale_init,
            "drop_path_rate": config.drop_path_rate,
            "dropout": 0.0,
            "use_flash_attn": False,
        }
    if config.qk_norm and config.norm_eps != _QK_NORM_EPS:
        raise ConfigError(
            f"the transformers format fixes the epsilon of the query and key norms at {_QK_NORM_EPS}, "
            f"but vision.norm_eps is {config.norm_eps}; export with format 'internvl'"
        )
    return shared | {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "image_size": [config.tile_size, config.tile_size],
        "patch_size": [config.patch_size, config.patch_size],
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm,
        "layer_scale_init_value": config.layer_scale_init,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # means: no final norm
    }


def write_decoder(config: DecoderConfig, format: Format, eos: int | None, bos: int | None) -> Json:
    """Write the ``llm_config`` (internvl) or ``text_config`` (transformers).

    A decoder without biases is a Llama to transformers, one with q, k, v biases a Qwen2: there they compute the same.

    Raises:
        ConfigError: The format cannot hold this decoder.
    """
    if format == "internvl" and config.family == "qwen2" and not config.qkv_bias:
        raise ConfigError("the internvl format has no Qwen2 without q, k, v biases; set family = 'internlm3'")
    out: Json = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "eos_token_id": eos,
        "bos_token_id": bos,
    }
    if format == "internvl":
        out["rope_theta"] = config.rope_theta
        name = {"qwen2": "Qwen2ForCausalLM", "internlm3": "InternLM3ForCausalLM"}[config.family]
        out |= {"architectures": [name], "model_type": config.family}
        if config.family == "internlm3":
            out |= {"qkv_bias": config.qkv_bias, "bias": False}
        return out
    out["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.qkv_bias:
        return out | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    return out | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
    }


def write_model(
    config: InternVLConfig, format: Format, *, dtype: torch.dtype, image_token: int, eos: int | None, bos: int | None
) -> Json:
    """Write a whole model's ``config.json``.

    Args:
        config: The model's shape.
        format: Which published format.
        dtype: Of the stored weights.
        image_token: Id of ``<IMG_CONTEXT>``.
        eos: Id of the token that ends generation.
        bos: Id of the token that begins a text, if the tokenizer has one.

    Raises:
        ConfigError: The format cannot hold this model.
    """
    vision = write_vision(config.vision, format)
    decoder = write_decoder(config.decoder, format, eos, bos)
    shared: Json = {
        "downsample_ratio": 1 / config.downsample,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision,
    }
    name = str(dtype).removeprefix("torch.")
    if format == "transformers":
        return shared | {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "text_config": decoder,
            "image_token_id": image_token,
            "image_seq_length": config.tokens_per_tile,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "dtype": name,
        }
    return shared | {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {
            "AutoConfig": f"{_REMOTE}configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{_REMOTE}modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{_REMOTE}modeling_internvl_chat.InternVLChatModel",
        },
        "llm_config": decoder,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "internvl2_5",
        "force_image_size": config.vision.tile_size,
        "dynamic_image_size": config.max_tiles > 1,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.thumbnail,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": name,
    }
