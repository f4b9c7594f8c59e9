"""One part of the attention of some queries: all segments at once, on any device, to be merged with other parts.

    q [n, A, D]   cu_q ─┐             ┌─ cpu     evovlm::attention                       out [n, A, D]
                        ├─ segments ──┼─ flash   torch's varlen flash kernel (16-bit) ─► lse [A, n]
    k, v [m, K, D] cu_k ┘             └─ blocks  attention_block, segment by segment

Backward takes the *merged* output and log-sum-exp of all parts of the queries, and yields what this part adds to the
gradients. flash-attn's public functions do not return what that needs; torch's own operators do.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from evovlm.csrc.attention_cuda import segments_of
from evovlm.csrc.ops import attention_block, attention_block_backward, has_cuda_flash

Kernel = Literal["cpu", "flash", "blocks"]

flash_forward = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward


def pick_kernel(q: Tensor) -> Kernel:
    """Say what attends to queries ``[n, A, D]``."""
    if q.device.type == "cpu":
        return "cpu"
    return "flash" if has_cuda_flash(q) else "blocks"


def attend_part(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend from segments of queries to segments of keys.

    Args:
        q: ``[n, A, D]``, channels contiguous, rows strided.
        k: ``[m, K, D]``, K divides A.
        v: ``[m, K, D]``.
        cu_q: int32 ``[S + 1]`` on the host, borders of the queries.
        cu_k: int32 ``[S + 1]`` on the host, borders of the keys.
        causal: Query i of a segment sees its keys 0 … i; otherwise all of them.

    Returns:
        ``out`` ``[n, A, D]`` in the dtype of ``q``, and ``lse`` ``[A, n]``, float32 (float64 for float64 inputs).
    """
    kernel = pick_kernel(q)
    if kernel == "cpu":
        out, lse = torch.ops.evovlm.attention(q, k, v, cu_q, cu_k, causal)
    elif kernel == "flash":
        out, lse = flash_forward(q, k, v, *_on_device(q, cu_q, cu_k), 0.0, causal, False)[:2]
    else:
        parts = [
            attention_block(q[queries], k[keys], v[keys], causal)
            for queries, keys in zip(*_slices(cu_q, cu_k), strict=True)
        ]
        out, lse = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts], dim=1)
    return out, lse


def attend_part_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a part adds to the gradients.

    Args:
        grad: ``[n, A, D]``, gradient of the merged output.
        q: ``[n, A, D]``.
        k: ``[m, K, D]``.
        v: ``[m, K, D]``.
        out: ``[n, A, D]``, the merged output.
        lse: ``[A, n]``, the merged log-sum-exp.
        cu_q: As in :func:`attend_part`, like the rest.
        cu_k: Borders of the keys.
        causal: Whether query i sees keys 0 … i only.

    Returns:
        Gradients of ``q``, ``k`` and ``v``, in their shapes and dtypes.
    """
    kernel = pick_kernel(q)
    if kernel == "cpu":
        dq, dk, dv = torch.ops.evovlm.attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal)
    elif kernel == "flash":
        # Without dropout the kernel does not read the state of the random numbers.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        borders = _on_device(q, cu_q, cu_k)
        dq, dk, dv = flash_backward(
            grad.contiguous(), q, k, v, out, lse.contiguous(), *borders, 0.0, causal, state, state[:0]
        )
    else:
        parts = [
            attention_block_backward(grad[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries], causal)
            for queries, keys in zip(*_slices(cu_q, cu_k), strict=True)
        ]
        dq, dk, dv = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
    return dq, dk, dv


def _on_device(q: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Borders beside the queries, and the longest segments."""
    queries, keys = segments_of(cu_q), segments_of(cu_k)
    # An upper bound will do; for single queries of grouped heads the kernel would lay the log-sum-exp out otherwise.
    return queries.on(q.device), keys.on(q.device), max(queries.max_length, 2), keys.max_length


def _slices(*borders: Tensor) -> list[list[slice]]:
    return [[slice(start, end) for start, end in pairwise(cu.tolist())] for cu in borders]
