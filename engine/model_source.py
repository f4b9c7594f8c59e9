"""Where a run's model comes from: a published directory, a ViT and an LLM to be joined, or random weights.

    from_dir              ─► shape and every weight
    vit_from + llm_from   ─► ViT weights, LLM weights fitted to the tokenizer, a random projector
    size                  ─► a shape from the table, its vocabulary that of the tokenizer, random weights

Weights are a stream of (name, whole tensor): each rank reads it and keeps its shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.settings import ModelSettings
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.load import load_config, read_llm_dir, read_state, read_vision_dir
from evovlm.models.hf.names import model_shapes
from evovlm.models.init import initial_value
from evovlm.models.resize import new_tokens, resize_decoder
from evovlm.models.table import size

NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class ModelSource:
    """A model before it is built.

    Attributes:
        config: Its shape.
        weights: Every parameter, by name; can be iterated once.
        tokenizer: Its tokenizer.
        tokenizer_dir: Where that lies, to be copied into exports.
    """

    config: InternVLConfig
    weights: NamedTensors
    tokenizer: Tokenizer
    tokenizer_dir: Path


def tokenizer_dir(settings: ModelSettings) -> Path:
    """Find the tokenizer directory of a run.

    Raises:
        ValueError: None is named and the model's source has none.
    """
    for directory in (settings.tokenizer, settings.from_dir, settings.llm_from):
        if directory is not None:
            return directory
    raise ValueError("[model] tokenizer is missing: a model from the table needs a tokenizer directory")


def open_source(settings: ModelSettings, seed: int) -> ModelSource:
    """Resolve settings to a shape, a stream of weights and a tokenizer.

    Raises:
        ValueError: The tokenizer's vocabulary is not the model's; both numbers are named.
        FileNotFoundError: A directory or a shard is missing.
    """
    directory = tokenizer_dir(settings)
    tokenizer = Tokenizer.load(directory)
    if settings.from_dir is not None:
        config = load_config(settings.from_dir)
        if config.decoder.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"model {settings.from_dir} has a vocabulary of {config.decoder.vocab_size}, "
                f"tokenizer {directory} one of {tokenizer.vocab_size}; use the one that the model was trained with"
            )
        weights = read_state(settings.from_dir, config)
    elif settings.vit_from is not None and settings.llm_from is not None:
        config, weights = join(settings.vit_from, settings.llm_from, tokenizer, seed)
    else:
        config = size(settings.size or "", vocab_size=tokenizer.vocab_size)
        weights = random_weights(config, seed)
    vision = replace(config.vision, drop_path_rate=settings.drop_path)
    return ModelSource(replace(config, vision=vision), weights, tokenizer, directory)


def random_weights(config: InternVLConfig, seed: int, prefix: str = "") -> NamedTensors:
    """Stream random weights of the parameters whose name starts with ``prefix``."""
    for name, shape in model_shapes(config).items():
        if name.startswith(prefix):
            yield name, initial_value(name, torch.Size(shape), config, seed)


def join(vit: Path, llm: Path, tokenizer: Tokenizer, seed: int) -> tuple[InternVLConfig, NamedTensors]:
    """Join a ViT and a base language model with a random projector.

    The decoder's rows are fitted to the vocabulary; ids that the base's own tokenizer lacks count as new even where
    they fall into padded rows, as InternVL's nine tokens do in Qwen2.5 (spec §1.1).

    Raises:
        ValueError: The tokenizer does not extend the language model's own.
    """
    vision, vision_weights = read_vision_dir(vit)
    base, base_weights = read_llm_dir(llm)
    new = new_tokens(llm, tokenizer.directory)
    decoder, decoder_weights = resize_decoder(
        base, base_weights, vocab_size=tokenizer.vocab_size, new_tokens=new, seed=seed
    )
    config = InternVLConfig(vision=vision, decoder=decoder)

    def stream() -> NamedTensors:
        yield from vision_weights
        yield from random_weights(config, seed, prefix="mlp1.")
        yield from decoder_weights

    return config, stream()
