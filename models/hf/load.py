"""Read published checkpoints: a whole model of either format, a bare ViT, a bare language model.

directory ─ config.json ─► configuration        (model_type tells which of the four kinds it is)
          └ *.safetensors ─► (name, tensor) …    streamed, under the names of evovlm's own model
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.internlm2 import fused_shapes, internlm2_names, split_fused
from evovlm.models.hf.names import (
    LM_HEAD,
    Format,
    Shapes,
    canonical,
    decoder_shapes,
    model_shapes,
    published_names,
    vision_shapes,
)
from evovlm.models.hf.qkv import stream_by_head
from evovlm.models.hf.read_config import ConfigError, Kind, kind_of, llm_type, read_decoder, read_model, read_vision
from evovlm.models.hf.shards import CheckpointError, Shards, read_shards

REWARD_MODEL = "InternVLRewardModel"
"""Architecture that published process reward models of the VisualPRM family name in ``config.json``."""

_TEMPLATE = "internvl2_5"

NamedTensors = Iterator[tuple[str, Tensor]]
"""A stream of ``(name inside evovlm, tensor)``; tensors on the CPU in the dtype of the files."""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _config_json(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory}: no config.json; is this a Hugging Face checkpoint directory?")
    return _json(path)


def detect(directory: str | Path) -> Kind:
    """Tell what a checkpoint directory holds.

    Raises:
        CheckpointError: It has no ``config.json``.
        ConfigError: Its ``model_type`` is not supported.
    """
    return kind_of(_config_json(Path(directory)))


def system_message(directory: str | Path) -> tuple[bool, str | None]:
    """Tell whether a directory holds a published reward model, and which system message it asks to be given.

    A reward model of the VisualPRM family names ``InternVLRewardModel`` as its architecture. It is asked with its
    ``system_message`` where ``config.json`` has one, and otherwise with the chat template's own (spec §5.2).

    Args:
        directory: A checkpoint of either format.

    Returns:
        Whether it is such a model, and the ``system_message`` of ``config.json``; None if it has none or an empty one,
        which leaves the system turn to the chat template.

    Raises:
        CheckpointError: The directory has no ``config.json``.
        ConfigError: ``config.json`` is not valid, its ``system_message`` is not a text, or the reward model was
            trained with another chat template than evovlm's.
    """
    config = _config_json(Path(directory))
    is_reward_model = REWARD_MODEL in (config.get("architectures") or [])
    message = config.get("system_message")
    if message is not None and not isinstance(message, str):
        raise ConfigError(f"{directory}: config.json: system_message is {message!r}, expected a text")
    if is_reward_model and config.get("template", _TEMPLATE) != _TEMPLATE:
        raise ConfigError(
            f"{directory}: config.json: template is {config['template']!r}; evovlm renders only {_TEMPLATE!r}, and "
            "scores under another template would mean nothing"
        )
    return is_reward_model, message or None


def _has_head(directory: Path) -> bool:
    """Whether the files store an output head: decides tying where ``config.json`` is silent."""
    heads = {LM_HEAD, *internlm2_names(LM_HEAD)}
    return any(canonical(name) in heads for name in Shards.open(directory).files)


def _read_internvl(
    shards: Shards,
    shapes: Shapes,
    llm: dict[str, Any],
    config: DecoderConfig,
    spelling: Callable[[str], str] = canonical,
) -> NamedTensors:
    """Stream tensors in OpenGVLab's format, whichever language model's names it has."""
    if llm_type(llm) == "internlm2":
        return split_fused(read_shards(shards, fused_shapes(shapes), internlm2_names, spelling), config)
    return read_shards(shards, shapes, lambda name: published_names(name, "internvl"), spelling)


def load_config(directory: str | Path) -> InternVLConfig:
    """Read the configuration of a whole model, of either format.

    Where the decoder's own part of ``config.json`` does not say whether the head is tied to the embedding, the
    weights decide: no stored head, tied. (The outer flag is a class default in published ports and proves nothing.)

    Args:
        directory: A checkpoint of OpenGVLab (``InternVLChatModel``) or of transformers
            (``InternVLForConditionalGeneration``).

    Raises:
        CheckpointError: No ``config.json``, or the weights that must decide about tying are missing.
        ConfigError: A setting that evovlm's model cannot honour.
    """
    directory = Path(directory)
    config = _config_json(directory)
    kind = kind_of(config)
    text = config.get("llm_config" if kind == "internvl" else "text_config")
    tied = isinstance(text, dict) and "tie_word_embeddings" not in text and not _has_head(directory)
    preprocessor: dict[str, Any] = {}
    if kind == "transformers":
        if (directory / "preprocessor_config.json").exists():
            preprocessor = _json(directory / "preprocessor_config.json")
        elif (directory / "processor_config.json").exists():
            preprocessor = _json(directory / "processor_config.json").get("image_processor", {})
    return read_model(config, preprocessor, tied=tied)


def read_state(directory: str | Path, config: InternVLConfig | None = None) -> NamedTensors:
    """Stream the weights of a whole model, of either format.

    Names, shapes and shards are checked before this returns; tensors are read while the result is iterated, with
    one shard open at a time.

    Args:
        directory: The checkpoint.
        config: What it must hold; by default what its ``config.json`` says.

    Raises:
        CheckpointError: A shard or a tensor is missing, unexpected, damaged or of another shape.
        ConfigError: A setting that evovlm's model cannot honour.
    """
    directory = Path(directory)
    config = config or load_config(directory)
    json_config = _config_json(directory)
    kind = kind_of(json_config)
    if kind not in ("internvl", "transformers"):
        raise CheckpointError(f"{directory}: holds a bare {kind} model; use read_vision_dir or read_llm_dir")
    shards, shapes = Shards.open(directory), model_shapes(config)
    if kind == "internvl":
        tensors = _read_internvl(shards, shapes, json_config["llm_config"], config.decoder)
    else:
        tensors = read_shards(shards, shapes, lambda name: published_names(name, "transformers"), canonical)
    return stream_by_head(tensors, config.vision.num_heads)


def read_vision_dir(directory: str | Path) -> tuple[VisionConfig, NamedTensors]:
    """Read a bare ViT: OpenGVLab's ``InternVisionModel`` or transformers' ``InternVLVisionModel``.

    Returns:
        Its configuration and a stream of its weights, named as in the whole model (``vision_model.…``).

    Raises:
        CheckpointError: As for :func:`read_state`, or the directory holds something else.
        ConfigError: A setting that evovlm's ViT cannot honour.
    """
    directory = Path(directory)
    json_config = _config_json(directory)
    if (kind := kind_of(json_config)) != "vision":
        raise CheckpointError(f"{directory}: holds a {kind} model, not a bare ViT")
    config = read_vision(json_config)
    format: Format = "transformers" if json_config["model_type"] == "internvl_vision" else "internvl"
    prefix = "vision_tower." if format == "transformers" else "vision_model."
    tensors = read_shards(
        Shards.open(directory),
        vision_shapes(config),
        lambda name: published_names(name, format),
        lambda name: prefix + name,
    )
    return config, stream_by_head(tensors, config.num_heads)


def read_llm_dir(directory: str | Path) -> tuple[DecoderConfig, NamedTensors]:
    """Read a bare language model: Qwen2, InternLM2, InternLM3 or a Llama without biases.

    Returns:
        Its configuration, tied or not as the checkpoint is, and a stream of its weights, named as in the whole model
        (``language_model.…``). :func:`evovlm.models.resize.resize_decoder` unties it and fits it to a tokenizer.

    Raises:
        CheckpointError: As for :func:`read_state`, or the directory holds something else.
        ConfigError: A setting that evovlm's decoder cannot honour.
    """
    directory = Path(directory)
    json_config = _config_json(directory)
    if (kind := kind_of(json_config)) != "llm":
        raise CheckpointError(f"{directory}: holds a {kind} model, not a bare language model")
    shards = Shards.open(directory)
    config = read_decoder(json_config, tied=not {"lm_head.weight", "output.weight"} & shards.files.keys())
    return config, _read_internvl(
        shards, decoder_shapes(config), json_config, config, lambda name: f"language_model.{name}"
    )
