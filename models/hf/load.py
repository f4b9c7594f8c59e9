"""Read published checkpoints: a whole model of either format, a bare ViT, a bare language model.

directory ─ config.json ─► configuration        (model_type tells which of the four kinds it is)
          └ *.safetensors ─► (name, tensor) …    streamed, under the names of evovlm's own model
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.names import (
    LM_HEAD,
    Format,
    canonical,
    decoder_shapes,
    model_shapes,
    published_names,
    vision_shapes,
)
from evovlm.models.hf.qkv import stream_by_head
from evovlm.models.hf.read_config import ConfigError, Kind, kind_of, read_decoder, read_model, read_vision
from evovlm.models.hf.shards import CheckpointError, Shards, read_shards

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


def _has_head(directory: Path) -> bool:
    """Whether the files store an output head: decides tying where ``config.json`` is silent."""
    names = Shards.open(directory).files
    return any(canonical(name) == LM_HEAD for name in names)


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
    kind = detect(directory)
    if kind not in ("internvl", "transformers"):
        raise CheckpointError(f"{directory}: holds a bare {kind} model; use read_vision_dir or read_llm_dir")
    format: Format = "internvl" if kind == "internvl" else "transformers"
    tensors = read_shards(
        Shards.open(directory), model_shapes(config), lambda name: published_names(name, format), canonical
    )
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
    """Read a bare language model: Qwen2, InternLM3 or a Llama without biases.

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
    config = read_decoder(json_config, tied="lm_head.weight" not in shards.files)
    return config, read_shards(
        shards,
        decoder_shapes(config),
        lambda name: published_names(name, "internvl"),
        lambda name: "language_model." + name,
    )
