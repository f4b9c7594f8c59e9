"""Write a checkpoint that Hugging Face tools load as it is, in either published format.

    (name, tensor) … ─► out.partial/: shards, config.json, tokenizer, … ─ all there ─► renamed to out/

The directory is complete or absent, never half: it appears under its name in one rename, at the end.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from evovlm.models.config import InternVLConfig
from evovlm.models.hf.files import (
    TokenIds,
    copy_tokenizer,
    token_ids,
    write_generation_config,
    write_json,
    write_processor_config,
)
from evovlm.models.hf.names import EMBEDDING, LM_HEAD, Format, model_shapes, published_names
from evovlm.models.hf.qkv import by_part
from evovlm.models.hf.shards import CheckpointError, ShardWriter
from evovlm.models.hf.write_config import write_decoder, write_model, write_vision

DEFAULT_SHARD_BYTES = 5 * 10**9
"""5 GB, as Hugging Face writes them."""


def save_pretrained(
    config: InternVLConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    out_dir: str | Path,
    *,
    format: Format = "transformers",
    tokenizer_dir: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    normalize: str = "imagenet",
    system: str | None = None,
    overwrite: bool = False,
) -> None:
    """Save a whole model so that ``from_pretrained`` loads it; needs extra memory for one shard.

    Args:
        config: The model's shape.
        named_tensors: Every parameter once, by its name inside evovlm, on any device, in any order; consumed as a
            stream. A tied head may be left out.
        out_dir: Directory to make; missing parents are made too.
        format: ``transformers`` (``InternVLForConditionalGeneration``) or ``internvl`` (OpenGVLab's
            ``InternVLChatModel``).
        tokenizer_dir: Directory whose tokenizer files are copied, and ``generation_config.json`` if it is there.
        max_shard_bytes: Largest shard file.
        dtype: Cast weights to this; by default each keeps its own.
        normalize: ``imagenet``, ``clip`` or ``siglip``: how tiles were normalised in training.
        system: System text that the chat template adds to a conversation without one; None: as the tokenizer has it.
        overwrite: Replace ``out_dir`` if it exists, after the new one is complete.

    Raises:
        FileExistsError: ``out_dir`` exists and is not to be replaced.
        ConfigError: The format cannot hold this model.
        CheckpointError: Tensors are missing, surplus, repeated or of another shape than the configuration says.
        ValueError: The tokenizer does not fit the model's vocabulary or lacks InternVL's tokens.
    """
    out = Path(out_dir)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another directory or pass overwrite=True")
    tokens = token_ids(tokenizer_dir)
    if tokens.size > config.decoder.vocab_size:
        raise ValueError(
            f"{tokenizer_dir}: the tokenizer has {tokens.size} ids but the model's vocabulary has "
            f"{config.decoder.vocab_size} rows; resize the model or pass the tokenizer it was trained with"
        )
    write_vision(config.vision, format)  # what the format cannot hold must be known before gigabytes are written
    write_decoder(config.decoder, format, None, None)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by an export that was interrupted
    partial.mkdir(parents=True)
    stored = _write_weights(config, named_tensors, partial, format, max_shard_bytes, dtype)
    _write_files(config, partial, format, tokens, tokenizer_dir, stored, normalize, system)
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f"{out.name}.replaced")
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)


def _write_weights(
    config: InternVLConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    format: Format,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """Write the shards; returns the dtype of the embedding, which stands for the checkpoint."""
    writer = ShardWriter(directory, max_shard_bytes)
    left = model_shapes(config)
    stored = torch.float32
    for name, value in named_tensors:
        if name == LM_HEAD and config.decoder.tie_embeddings:
            continue
        if name not in left:
            state = "comes twice" if name in model_shapes(config) else "does not belong to the model"
            raise CheckpointError(f"cannot save: tensor {name} {state}")
        if tuple(value.shape) != left.pop(name):
            raise CheckpointError(
                f"cannot save: tensor {name} is {list(value.shape)}, "
                f"the configuration says {list(model_shapes(config)[name])}"
            )
        tensor = value if dtype is None else value.to(dtype)
        if name == EMBEDDING:
            stored = tensor.dtype
        tensor = by_part(name, tensor, config.vision.num_heads)
        names = published_names(name, format)
        for part_name, part in zip(names, tensor.chunk(len(names)), strict=True):
            writer.add(part_name, part)
    if left:
        raise CheckpointError(f"cannot save: {len(left)} tensors never came, such as {next(iter(left))}")
    writer.finish()
    return stored


def _write_files(
    config: InternVLConfig,
    directory: Path,
    format: Format,
    tokens: TokenIds,
    tokenizer_dir: str | Path,
    dtype: torch.dtype,
    normalize: str,
    system: str | None,
) -> None:
    json_config = write_model(config, format, dtype=dtype, image_token=tokens.image, eos=tokens.ends[0], bos=tokens.bos)
    write_json(directory / "config.json", json_config)
    write_generation_config(tokenizer_dir, directory, tokens)
    write_processor_config(config, format, directory, normalize)
    copy_tokenizer(tokenizer_dir, format, directory, model_max_length=config.decoder.max_positions, system=system)
