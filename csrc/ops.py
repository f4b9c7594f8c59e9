"""Leaf operators: the only code that may differ between devices, each beside its plain PyTorch reference.

    segment attention   packed_attention   q, k, v [T, ·, D] + cu_seqlens  ->  [T, A, D]
    attention block     attention_block    q [n, A, D], k, v [m, K, D]     ->  [n, A, D], log-sum-exp [A, n]
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


def attention_block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of some queries over some keys, with what is needed to merge it with other keys of the same queries.

    Flash kernels on CPU and, for half precision, on CUDA; elsewhere :func:`attention_block_reference`.

    Args:
        q: ``[n, A, D]``, channels contiguous.
        k: ``[m, K, D]``, K divides A.
        v: ``[m, K, D]``.
        causal: Query i sees keys 0 … i (n = m); otherwise it sees all.

    Returns:
        ``out`` ``[n, A, D]`` in the dtype of ``q``, and ``lse`` ``[A, n]``, the logarithms of the denominators,
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: Causal, and n differs from m.
    """
    if causal and q.shape[0] != k.shape[0]:
        raise ValueError(f"a causal block needs as many queries as keys, got {q.shape[0]} and {k.shape[0]}")
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    elif _has_cuda_flash(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        return attention_block_reference(q, k, v, causal)
    out, lse = flash(_heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal)[:2]
    return _rows_first(out), lse.squeeze(0)


def attention_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients, given the merged output of all blocks of its queries.

    Args:
        grad: ``[n, A, D]``, gradient of the merged output; channels contiguous.
        q: ``[n, A, D]``.
        k: ``[m, K, D]``.
        v: ``[m, K, D]``.
        out: ``[n, A, D]``, the merged output.
        lse: ``[A, n]``, the merged log-sum-exp.
        causal: As in :func:`attention_block`.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, in their shapes and dtypes.
    """
    if q.device.type != "cpu" and not _has_cuda_flash(q):
        return attention_block_backward_reference(grad, q, k, v, out, lse, causal)
    inputs = (*(_heads_first(x) for x in (grad, q, k, v, out)), lse.contiguous().unsqueeze(0))
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, causal)
    else:
        # Without dropout the kernel reads neither the state of the random numbers nor borders of sequences.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *inputs, None, None, q.shape[0], k.shape[0], 0.0, causal, state, state[:0]
        )
    dq, dk, dv = (_rows_first(x) for x in grads)
    return dq, dk, dv


def attention_block_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """State :func:`attention_block` with a dense matrix of scores."""
    scores, _, v_all = _dense_block(q, k, v, causal)
    lse = scores.logsumexp(-1)
    return torch.einsum("anm,mad->nad", (scores - lse[..., None]).exp(), v_all).to(q.dtype), lse


def attention_block_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """State :func:`attention_block_backward` with a dense matrix of scores."""
    scores, k_all, v_all = _dense_block(q, k, v, causal)
    weights = (scores - lse[..., None]).exp()
    grad, out = grad.to(scores.dtype), out.to(scores.dtype)
    grad_weights = torch.einsum("nad,mad->anm", grad, v_all)
    # The softmax's gradient: what all keys of a query, those of other blocks too, share is out · grad.
    shared = (grad * out).sum(-1).T[..., None]
    grad_scores = weights * (grad_weights - shared) * q.shape[-1] ** -0.5
    dq = torch.einsum("anm,mad->nad", grad_scores, k_all)
    dk = torch.einsum("anm,nad->mad", grad_scores, q.to(scores.dtype))
    dv = torch.einsum("anm,nad->mad", weights, grad)
    dk, dv = (torch.unflatten(x, 1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _dense_block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores ``[A, n, m]``, and keys and values with one head for each query head; float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nad,mad->anm", q.to(wide), k) * q.shape[-1] ** -0.5
    if causal:
        above = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return scores, k, v


def _has_cuda_flash(q: Tensor) -> bool:
    """Whether CUDA's flash kernels take these queries."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _heads_first(x: Tensor) -> Tensor:
    """``[n, A, D]`` as the kernels want it, ``[1, A, n, D]``; a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _rows_first(x: Tensor) -> Tensor:
    """Inverse of :func:`_heads_first`; a view."""
    return x.squeeze(0).transpose(0, 1)
