"""Leaf operators: the only code that may differ between devices, each beside its plain PyTorch reference.

    segment attention   packed_attention   q, k, v [T, ·, D] + cu_seqlens  ->  [T, A, D]
    rotary              rotary             q or k [T, ·, D] + positions [T] -> [T, ·, D]
    normalisation       rms_norm           [..., H]                        ->  [..., H]

A function here chooses the implementation by device; ``*_reference`` states what it must equal.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (or wider) and cast back (spec §1.2).

    Args:
        x: ``[..., H]``, any floating dtype.
        weight: ``[H]``.
        eps: Added to the mean square.

    Returns:
        Same shape and dtype as ``x``.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles ``position · theta^(−2i/D)``.

    Args:
        positions: ``[T]`` float32 (may be fractional) or float64.
        head_dim: D.
        theta: Base of the frequencies.

    Returns:
        Two tensors ``[T, D/2]`` in the dtype of ``positions``.

    Raises:
        TypeError: Positions came in a dtype that cannot hold fractions exactly (rule 3 of the design).
    """
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rotary positions must be float32 or float64, got {positions.dtype}")
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=positions.dtype) / head_dim
    angles = positions[:, None] * (theta**-exponent)
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of every head by its token's angles.

    Args:
        x: ``[T, A, D]`` queries or keys.
        cos: ``[T, D/2]`` from :func:`rotary_angles`.
        sin: ``[T, D/2]``.

    Returns:
        ``[T, A, D]`` in the dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    cos = cos[:, None].to(x.dtype)
    sin = sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """Causal attention inside each segment of a pack; no ``[T, T]`` mask is made.

    Args:
        q: ``[T, A, D]``.
        k: ``[T, K, D]``, K divides A.
        v: ``[T, K, D]``.
        cu_seqlens: Segment borders on the host: S + 1 rising integers from 0 to T.

    Returns:
        ``[T, A, D]``.
    """
    num_tokens, num_heads, head_dim = q.shape
    grouped = k.shape[1] != num_heads
    # SDPA wants heads before tokens: [1, A, T, D]. Views only.
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    outputs = [
        F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=grouped)
        for qs, ks, vs in zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).reshape(num_tokens, num_heads, head_dim)


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """State :func:`packed_attention` with one dense mask over the whole pack."""
    borders = torch.as_tensor(cu_seqlens[1:], device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)
    segment = torch.bucketize(rows, borders, right=True)
    allowed = (segment[:, None] == segment[None]) & (rows[:, None] >= rows[None])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.einsum("tad,sad->ats", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("ats,sad->tad", weights, v)
