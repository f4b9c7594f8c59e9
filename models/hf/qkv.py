"""The order of rows in the ViT's fused q, k, v projections: by head inside evovlm, by part in published checkpoints.

    published   q0 q1 q2 k0 k1 k2 v0 v1 v2     [q | k | v, head, D]   (transformers stores the three parts apart)
    evovlm      q0 k0 v0 q1 k1 v1 q2 k2 v2     [head, q | k | v, D]

By head, any contiguous run of whole heads is an attention of its own, so that a shard of rows is one for every number
of tensor-parallel ranks. Weights and biases are translated one tensor at a time, while they stream in or out; no value
changes.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import starmap

from torch import Tensor

_FUSED = re.compile(r"vision_model\.encoder\.layers\.\d+\.attn\.qkv\.(weight|bias)")


def by_head(name: str, tensor: Tensor, num_heads: int) -> Tensor:
    """Order a published tensor's rows as the model has them.

    Args:
        name: Name inside evovlm; tensors other than fused projections are returned as they are.
        tensor: ``[3·num_heads·D, …]``, rows by part.
        num_heads: Attention heads of the ViT.

    Returns:
        The rows by head: same shape and dtype.
    """
    return _swap(name, tensor, (3, num_heads))


def by_part(name: str, tensor: Tensor, num_heads: int) -> Tensor:
    """Order the rows of the model's tensor as published ones are: the inverse of :func:`by_head`."""
    return _swap(name, tensor, (num_heads, 3))


def stream_by_head(tensors: Iterable[tuple[str, Tensor]], num_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Apply :func:`by_head` to a stream of named tensors."""
    return starmap(partial(_named_by_head, num_heads=num_heads), tensors)


def _named_by_head(name: str, tensor: Tensor, *, num_heads: int) -> tuple[str, Tensor]:
    return name, by_head(name, tensor, num_heads)


def _swap(name: str, tensor: Tensor, outer: tuple[int, int]) -> Tensor:
    """Swap the two outer factors of the rows of a fused projection."""
    if not _FUSED.fullmatch(name):
        return tensor
    return tensor.reshape(*outer, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
