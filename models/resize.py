"""Fit a base model to InternVL's tokenizer and tiles while its weights stream by (spec §1.1, §1.2).

Qwen2.5 base [152064 rows] ─ shrink ─► [151674 rows] = 151665 known tokens + 9 new ones
    output head     new rows := mean of all known rows          so a new token starts as an average guess
    input embedding rows the base does not have := normal(0, initializer_range), keyed by name
    tied base       output head := copy of the embedding        InternVL unties every size
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.csrc.random import key
from evovlm.models.config import DecoderConfig
from evovlm.models.hf.files import vocabulary
from evovlm.models.hf.names import EMBEDDING, LM_HEAD

_CHUNK_ROWS = 8192  # of a head that are gathered at once to average them


def new_tokens(base_dir: str | Path, tokenizer_dir: str | Path) -> list[int]:
    """List the ids that a tokenizer has and the base model's tokenizer has not.

    Args:
        base_dir: Directory of the base model, with its ``tokenizer.json``.
        tokenizer_dir: Directory of the tokenizer to train with.

    Returns:
        Rising ids.

    Raises:
        FileNotFoundError: One of the directories has no ``tokenizer.json``.
        ValueError: The tokenizer is not an extension of the base's: a token has two ids, or an id two tokens.
    """
    base, ours = vocabulary(base_dir), vocabulary(tokenizer_dir)
    moved = [token for token in ours if token in base and base[token] != ours[token]]
    if moved:
        token = min(moved, key=lambda name: ours[name])
        raise ValueError(
            f"{tokenizer_dir}: {len(moved)} tokens have other ids than in {base_dir}, such as {token!r}: "
            f"{ours[token]} here, {base[token]} there; the tokenizer must extend the base model's"
        )
    by_id = {number: token for token, number in base.items()}
    added = {number: token for token, number in ours.items() if token not in base}
    for number, token in sorted(added.items()):
        if number in by_id:
            raise ValueError(
                f"{tokenizer_dir}: id {number} is {token!r} here but {by_id[number]!r} in {base_dir}; "
                "the tokenizer must extend the base model's"
            )
    return sorted(added)


def resize_decoder(
    config: DecoderConfig,
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    vocab_size: int,
    new_tokens: Sequence[int] | None = None,
    untie: bool = True,
    seed: int = 0,
) -> tuple[DecoderConfig, Iterator[tuple[str, Tensor]]]:
    """Shrink or extend the vocabulary of a base model, and untie its head, while its weights stream by.

    Args:
        config: Of the base model.
        named_tensors: Its weights, by their names inside evovlm.
        vocab_size: Rows to have.
        new_tokens: Ids that the base does not know. They may lie inside its padded rows, as InternVL's do in
            Qwen2.5's; input rows are then kept, output rows replaced. By default the rows that the base lacks.
        untie: Whether a tied head becomes a matrix of its own.
        seed: Of the new input rows.

    Returns:
        The configuration that results, and the stream of weights for it.

    Raises:
        ValueError: ``new_tokens`` leaves the vocabulary, or leaves no known row to average over.
    """
    new = sorted(set(range(config.vocab_size, vocab_size) if new_tokens is None else new_tokens))
    if new and not 0 <= new[0] <= new[-1] < vocab_size:
        raise ValueError(f"new token ids {new[0]} … {new[-1]} do not fit a vocabulary of {vocab_size}")
    old_rows = min(config.vocab_size, vocab_size)
    known = torch.ones(old_rows, dtype=torch.bool)
    known[[row for row in new if row < old_rows]] = False
    if not known.any():
        raise ValueError(f"all {vocab_size} rows would be new: the base model knows none of the tokenizer's tokens")
    resized = replace(config, vocab_size=vocab_size, tie_embeddings=config.tie_embeddings and not untie)

    def inputs(old: Tensor) -> Tensor:
        rows = torch.empty(vocab_size, old.shape[1], dtype=old.dtype)
        rows[:old_rows] = old[:old_rows]
        if vocab_size > old_rows:
            # The rows that :func:`evovlm.models.init.initial_value` would give a fresh embedding of this size.
            generator = torch.Generator().manual_seed(key("init", seed, EMBEDDING) >> 1)
            noise = torch.randn((vocab_size, old.shape[1]), generator=generator)
            rows[old_rows:] = noise[old_rows:] * config.initializer_range
        return rows

    def outputs(old: Tensor) -> Tensor:
        rows = torch.empty(vocab_size, old.shape[1], dtype=old.dtype)
        rows[:old_rows] = old[:old_rows]
        total = torch.zeros(old.shape[1], dtype=torch.float64)
        for start in range(0, old_rows, _CHUNK_ROWS):
            chunk = slice(start, min(start + _CHUNK_ROWS, old_rows))
            total += old[chunk][known[chunk]].sum(0, dtype=torch.float64)
        fresh = [*(row for row in new if row < old_rows), *range(old_rows, vocab_size)]
        rows[fresh] = (total / int(known.sum())).to(old.dtype)
        return rows

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors:
            if name == EMBEDDING:
                yield name, inputs(tensor)
                if config.tie_embeddings and untie:
                    yield LM_HEAD, outputs(tensor)
            elif name == LM_HEAD:
                yield name, outputs(tensor)
            else:
                yield name, tensor

    return resized, stream()


def resize_positions(position_embedding: Tensor, grid: int) -> Tensor:
    """Interpolate a ViT's learned positions to another square grid, for tiles of another size (spec §1.2).

    Args:
        position_embedding: ``[1, 1 + g², C]``; row 0 belongs to the class token and stays as it is.
        grid: New number of patches along an edge.

    Returns:
        ``[1, 1 + grid², C]`` in the same dtype; bicubic, computed in float32 (float64 stays float64).

    Raises:
        ValueError: The old grid is not a square.
    """
    old = round((position_embedding.shape[1] - 1) ** 0.5)
    if position_embedding.shape[1] != 1 + old * old:
        raise ValueError(f"position embedding {list(position_embedding.shape)} is not that of a square grid")
    wide = torch.promote_types(position_embedding.dtype, torch.float32)
    square = position_embedding[:, 1:].to(wide).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    rows = resized.flatten(2).transpose(1, 2).to(position_embedding.dtype)
    return torch.cat((position_embedding[:, :1], rows), dim=1)
