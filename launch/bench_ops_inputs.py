"""What the operators of ``evovlm bench ops`` are measured on: float32 tensors by the shape of a model.

small   a decoder of 0.5 B parameters (H 896, 14 query and 2 key heads of 64), 2,048 tokens
large   one of 7 B (H 3,584, 28 query and 4 key heads of 128), 4,096 tokens
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evovlm.csrc import ops

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Size:
    """T tokens of H channels, A query and K key heads of D channels, F channels inside an MLP, V words.

    Half of the tokens are visual.
    """

    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    words: int

    @property
    def matrix_bytes(self) -> int:
        """Bytes of float32 ``[T, H]``."""
        return 4 * self.tokens * self.hidden


SIZES = {"small": Size(2048, 896, 14, 2, 64, 4864, 151_674), "large": Size(4096, 3584, 28, 4, 128, 18_944, 151_674)}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _visual(size: Size) -> Tensor:
    """Rows of visual tokens: runs of 64 in every 128."""
    return torch.arange(size.tokens).view(-1, 2, 64)[:, 1].flatten()


def matrix_and_rows(size: Size) -> Inputs:
    """``[T, H]``, rows of visual tokens ``[T/2]``."""
    return _normal(size.tokens, size.hidden), _visual(size)


def base_and_rows(size: Size) -> Inputs:
    """``[T, H]``, rows of visual tokens ``[T/2]``, what to put there ``[T/2, H]``."""
    return _normal(size.tokens, size.hidden), _visual(size), _normal(size.tokens // 2, size.hidden, seed=1)


def rows_to_add(size: Size) -> Inputs:
    """``[T/2, H]``, where to add each row ``[T/2]``, T."""
    return _normal(size.tokens // 2, size.hidden), _visual(size), size.tokens


def norm(size: Size) -> Inputs:
    """``[T, H]``, weight ``[H]``, epsilon."""
    return _normal(size.tokens, size.hidden), _normal(size.hidden), 1e-6


def angles(size: Size) -> tuple[Tensor, Tensor]:
    """Positions ``[T]`` and frequencies ``[D/2]``."""
    positions = torch.arange(size.tokens) / 4
    return positions, ops.rotary_frequencies(positions, size.head_dim, 1e6)


def rotary(size: Size) -> Inputs:
    """Queries ``[T, A, D]``, keys ``[T, K, D]``, and their angles."""
    return *(_normal(size.tokens, heads, size.head_dim) for heads in (size.heads, size.kv_heads)), *angles(size)


def rotary_flat(size: Size) -> Inputs:
    """The same as projections make them: ``[T, A · D]``, ``[T, K · D]``."""
    return *(_normal(size.tokens, heads * size.head_dim) for heads in (size.heads, size.kv_heads)), *angles(size)


def v2pe(size: Size) -> Inputs:
    """Tables of a pack of eight times T tokens: segments of 1,024 with two images of 256 tokens each."""
    tokens = 8 * size.tokens
    starts = torch.arange(0, tokens, 512) + 37
    runs = torch.stack((starts, torch.full_like(starts, 256)), dim=1)
    deltas = torch.tensor([0.25, 1 / 64], dtype=torch.float64).repeat(len(runs))[: len(runs)]
    return torch.arange(0, tokens + 1, 1024, dtype=torch.int32), runs, deltas, tokens


def mlp(size: Size) -> Inputs:
    """Gate and up ``[T/4, F]``."""
    return tuple(_normal(size.tokens // 4, size.mlp, seed=seed) for seed in range(2))


def residual(size: Size) -> Inputs:
    """Stream and branch ``[T, H]``, scale ``[H]``."""
    return *(_normal(size.tokens, size.hidden, seed=seed) for seed in range(2)), _normal(size.hidden)


def loss(size: Size) -> Inputs:
    """Logits ``[T/16, V]``, labels and weights ``[T/16]``."""
    rows = size.tokens // 16
    labels = torch.arange(rows) * 397 % size.words
    return _normal(rows, size.words), labels, torch.linspace(0.5, 1.5, rows)


def causal(size: Size) -> Inputs:
    """Queries, keys and values of segments of T/2, T/4, … and twice 64 tokens."""
    borders = [0]
    while borders[-1] < size.tokens:
        borders.append(borders[-1] + max(64, (size.tokens - borders[-1]) // 2))
    heads = size.heads, size.kv_heads, size.kv_heads
    return *(_normal(borders[-1], number, size.head_dim, seed=seed) for seed, number in enumerate(heads)), borders


def tiles(size: Size) -> Inputs:
    """Tiles of 1,025 patches with 16 heads of 64 channels, as InternViT-300M's: one for every 1,024 tokens."""
    borders = list(range(0, size.tokens + 1025, 1025))[: max(2, size.tokens // 1024 + 1)]
    return *(_normal(borders[-1], 16, 64, seed=seed) for seed in range(3)), borders
