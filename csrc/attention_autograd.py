"""Shapes, gradients and FLOPs of ``evovlm::attention``, for autograd, torch.compile, fake tensors and counters.

q, k, v, borders ─ attention ─► out, lse          saved: q, k, v, out, lse (one float32 a query and head)
dq, dk, dv ◄─ attention_backward ─ dout
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from evovlm.csrc import _ops  # noqa: F401 - registers torch.ops.evovlm


def _fake(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _backward_fake(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    cu_q: Tensor,  # noqa: ARG001
    cu_k: Tensor,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_fake("evovlm::attention", _fake)
torch.library.register_fake("evovlm::attention_backward", _backward_fake)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    dq, dk, dv = torch.ops.evovlm.attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, ctx.causal)
    return dq, dk, dv, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attention can be differentiated once; for second derivatives use packed_attention_reference"
    )


torch.library.register_autograd("evovlm::attention", _backward, setup_context=_save)
torch.library.register_autograd("evovlm::attention_backward", _no_second_derivative)


def count_pairs(num_queries: int, num_keys: int, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool) -> int:
    """Pairs of a query and a key that it sees; where only shapes are known, as if all were one segment."""
    if isinstance(cu_q, Tensor) and isinstance(cu_k, Tensor) and not isinstance(cu_q, FakeTensor) and not cu_q.is_meta:
        lengths = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        segments = [(q_end - q_start, k_end - k_start) for (q_start, q_end), (k_start, k_end) in lengths]
    else:
        segments = [(num_queries, num_keys)]
    return sum(n * (n + 1) // 2 if causal else n * m for n, m in segments)


@register_flop_formula(torch.ops.evovlm.attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, **_: Any) -> int:  # noqa: ARG001
    return 4 * count_pairs(q.shape[0], k.shape[0], cu_q, cu_k, causal) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.evovlm.attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,  # noqa: ARG001
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    **_: Any,
) -> int:
    return 10 * count_pairs(q.shape[0], k.shape[0], cu_q, cu_k, causal) * q.shape[1] * q.shape[2]
