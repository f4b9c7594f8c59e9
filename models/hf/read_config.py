"""Read ``config.json`` of both published formats, of bare ViTs and of bare language models (spec §1.1–1.3).

    {"architectures": ["InternVLChatModel"], "vision_config": …, "llm_config": …}                  internvl
    {"architectures": ["InternVLForConditionalGeneration"], "vision_config": …, "text_config": …}   transformers

A setting that evovlm's model cannot honour (another activation, another rotary scaling, …) is an error, never ignored.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig

Json = dict[str, Any]
T = TypeVar("T")

Kind = Literal["internvl", "transformers", "vision", "llm"]
"""What a directory holds: a whole model in one of two formats, a bare ViT, or a bare language model."""

_KINDS: dict[str, Kind] = {
    "internvl_chat": "internvl",
    "internvl": "transformers",
    "intern_vit_6b": "vision",  # both ViTs say so; the name is older than the 300M one
    "internvl_vision": "vision",
    "qwen2": "llm",
    "llama": "llm",
    "internlm3": "llm",
    "internlm2": "llm",
}
_FAMILIES: dict[str, Literal["qwen2", "internlm3"]] = {
    "qwen2": "qwen2",
    "llama": "internlm3",
    "internlm3": "internlm3",
    "internlm2": "internlm3",  # the same computation; its files differ (see internlm2.py)
}
_ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "InternLM3ForCausalLM": "internlm3",
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
}
# What the published classes assume where a file is silent; transformers writes only what differs.
_DEFAULTS: dict[str, Json] = {
    "internvl_vision": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 448,
        "norm_type": "layer_norm",
        "attention_bias": False,
        "use_qk_norm": False,
    },
    "intern_vit_6b": {
        "hidden_size": 3200,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": 224,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "internlm3": {
        "vocab_size": 128512,
        "hidden_size": 4096,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 10240,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    },
    "internlm2": {
        "vocab_size": 103168,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bias": True,  # a file that is silent means biases, which are refused
    },
}


class ConfigError(ValueError):
    """A ``config.json`` that evovlm cannot read or a configuration that a format cannot hold."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Tell what a ``config.json`` describes, by its ``model_type``.

    Raises:
        ConfigError: It is none of the supported kinds.
    """
    model_type = config.get("model_type")
    if model_type not in _KINDS:
        raise ConfigError(f"config.json: model_type is {model_type!r}; supported are {', '.join(_KINDS)}")
    return _KINDS[model_type]


def _need(config: Mapping[str, Any], where: str, key: str, kind: type[T]) -> T:
    if key not in config:
        raise ConfigError(f"config.json: {where}.{key} is missing")
    value = config[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"config.json: {where}.{key} is {value!r}, expected {kind.__name__}")
    return value


def _only(config: Mapping[str, Any], where: str, **allowed: object) -> None:
    """Refuse settings other than the one that our model has; an absent key means that one."""
    for key, value in allowed.items():
        if config.get(key, value) != value:
            raise ConfigError(f"config.json: {where}.{key} is {config[key]!r}; evovlm supports only {value!r}")


def _edge(value: object, where: str) -> int:
    """Edge of a square given as ``448`` or ``[448, 448]``."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"config.json: {where} is {value!r}, expected one edge length")
    return value


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """Base of the rotary frequencies, from today's ``rope_parameters`` or the older pair of keys.

    ``dynamic`` scaling changes nothing below ``max_position_embeddings`` and is off in InternVL3's training (spec §2).
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "dynamic"):
        raise ConfigError(f"config.json: {where} has rotary scaling {rope_type!r}; supported are default and dynamic")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))  # the default of both published classes
    return float(theta)


def read_vision(config: Mapping[str, Any]) -> VisionConfig:
    """Read a ViT's ``config.json`` or ``vision_config``, of OpenGVLab or of transformers.

    Raises:
        ConfigError: A key is missing or has a value that the ViT cannot honour.
    """
    where = "vision_config"
    hf = config.get("model_type") == "internvl_vision"
    full = _DEFAULTS["internvl_vision" if hf else "intern_vit_6b"] | dict(config)
    _only(full, where, hidden_act="gelu", num_channels=3)
    if hf:
        _only(full, where, use_absolute_position_embeddings=True, use_mask_token=False, use_mean_pooling=True)
    norm = full["norm_type"]
    if norm not in ("layer_norm", "rms_norm"):
        raise ConfigError(f"config.json: {where}.norm_type is {norm!r}; supported are layer_norm and rms_norm")
    return VisionConfig(
        hidden_size=_need(full, where, "hidden_size", int),
        num_layers=_need(full, where, "num_hidden_layers", int),
        num_heads=_need(full, where, "num_attention_heads", int),
        ffn_size=_need(full, where, "intermediate_size", int),
        tile_size=_edge(full["image_size"], f"{where}.image_size"),
        patch_size=_edge(full.get("patch_size", 14), f"{where}.patch_size"),
        norm=norm,
        norm_eps=float(full.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(full["attention_bias" if hf else "qkv_bias"]),
        qk_norm=bool(full["use_qk_norm" if hf else "qk_normalization"]),
        layer_scale_init=float(full.get("layer_scale_init_value" if hf else "initializer_factor", 0.1)),
        drop_path_rate=float(full.get("drop_path_rate", 0.0)),
        initializer_range=float(full.get("initializer_range", 0.02)),
    )


def llm_type(config: Mapping[str, Any]) -> str:
    """Tell a language model's ``model_type``, from its architecture where ``config.json`` does not name it."""
    architecture = (config.get("architectures") or [""])[0]
    return config.get("model_type") or _ARCHITECTURES.get(architecture, "qwen2")


def read_decoder(config: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """Read a decoder's ``config.json``, ``llm_config`` or ``text_config``.

    Args:
        config: The JSON object.
        tied: Whether the head is the embedding, where the object does not say.

    Raises:
        ConfigError: A key is missing or has a value that the decoder cannot honour.
    """
    where = "llm_config"
    model_type = llm_type(config)
    if model_type not in _FAMILIES:
        raise ConfigError(f"config.json: {where}.model_type is {model_type!r}; supported are {', '.join(_FAMILIES)}")
    full = _DEFAULTS[model_type] | dict(config)
    _only(full, where, hidden_act="silu", use_sliding_window=False, mlp_bias=False, bias=False)
    if model_type == "llama":
        _only(full, where, attention_bias=False)  # it would also put a bias on the output projection
    hidden, heads = _need(full, where, "hidden_size", int), _need(full, where, "num_attention_heads", int)
    return DecoderConfig(
        vocab_size=_need(full, where, "vocab_size", int),
        hidden_size=hidden,
        num_layers=_need(full, where, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=full.get("num_key_value_heads") or heads,
        head_dim=full.get("head_dim") or hidden // heads,
        ffn_size=_need(full, where, "intermediate_size", int),
        qkv_bias=model_type == "qwen2" or bool(full.get("qkv_bias", full.get("attention_bias", False))),
        rope_theta=_rope_theta(full, where),
        norm_eps=float(full.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(full.get("tie_word_embeddings", tied)),
        family=_FAMILIES[model_type],
        max_positions=_need(full, where, "max_position_embeddings", int),
        initializer_range=float(full.get("initializer_range", 0.02)),
    )


def read_model(config: Mapping[str, Any], preprocessor: Mapping[str, Any], *, tied: bool) -> InternVLConfig:
    """Read a whole model's ``config.json`` of either format.

    Args:
        config: The JSON object.
        preprocessor: ``preprocessor_config.json`` or ``{}``: where ``transformers`` keeps the tiling settings.
        tied: Whether the head is the embedding, where ``config.json`` does not say.

    Raises:
        ConfigError: A key is missing or has a value that the model cannot honour.
    """
    kind = kind_of(config)
    if kind not in ("internvl", "transformers"):
        raise ConfigError(f"config.json describes a bare {config['model_type']} model, not a vision-language model")
    vision_json = _need(config, "config", "vision_config", dict)
    # The outer file decides the dialect: published ports carry over the original's inner model_type.
    dialect = "internvl_vision" if kind == "transformers" else "intern_vit_6b"
    vision = read_vision({**vision_json, "model_type": dialect})
    ratio = float(config.get("downsample_ratio", 0.5))
    downsample = round(1 / ratio)
    if abs(ratio * downsample - 1) > 1e-9:
        raise ConfigError(f"config.json: downsample_ratio {ratio} is not 1 over an integer")
    if kind == "transformers":
        _only(config, "config", projector_hidden_act="gelu", vision_feature_layer=-1)
        _only(config, "config", vision_feature_select_strategy="default")
        tiles = (int(preprocessor.get("min_patches", 1)), int(preprocessor.get("max_patches", 12)))
        if not preprocessor.get("crop_to_patches", True):
            tiles = (1, 1)
        thumbnail = True
        text = _need(config, "config", "text_config", dict)
    else:
        _only({"ps_version": "v1", **config}, "config", select_layer=-1, ps_version="v2")
        if config.get("force_image_size") is not None:
            _only(config, "config", force_image_size=vision.tile_size)
        tiles = (int(config.get("min_dynamic_patch", 1)), int(config.get("max_dynamic_patch", 6)))
        if not config.get("dynamic_image_size", False):
            tiles = (1, 1)
        thumbnail = bool(config.get("use_thumbnail", False))
        text = _need(config, "config", "llm_config", dict)
    return InternVLConfig(
        vision=vision,
        decoder=read_decoder(text, tied=tied),
        downsample=downsample,
        min_tiles=tiles[0],
        max_tiles=tiles[1],
        thumbnail=thumbnail,
    )
