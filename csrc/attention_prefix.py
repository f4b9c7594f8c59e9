"""Packed attention whose queries also see a shared prefix: rectangles of queries and keys beside the segments.

    keys      prefix   chosen   rejected       own part     attention of every segment by itself
    prefix    ▙                                prefix part  all rectangles in one call: their query rows and key rows
    chosen    █████    ▙                                    side by side, one "segment" for each
    rejected  █████             ▙
              └─ one rectangle                 out, lse = both parts, merged by their log-sum-exps

Backward hands the merged output and log-sum-exp to both parts: each adds what it owes to the gradients. Both are single
operators, so that compilers, selective checkpointing and counters see a whole.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from evovlm.csrc.attention_autograd import count_pairs
from evovlm.csrc.attention_parts import attend_part, attend_part_backward
from evovlm.csrc.ops import merge_attention_
from evovlm.csrc.prefixes import Range, rectangles_of


def _views(x: Tensor, ranges: Sequence[Range], dim: int = 0) -> list[Tensor]:
    return [x.narrow(dim, start, end - start) for start, end in ranges]


def _pick(x: Tensor, ranges: Sequence[Range], dim: int = 0) -> Tensor:
    """Ranges of rows side by side; of a single range a view."""
    parts = _views(x, ranges, dim)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _unpick(whole: Tensor, picked: Tensor, ranges: Sequence[Range], dim: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """For each range the rows of the whole, a view, and what was picked of them."""
    return zip(
        _views(whole, ranges, dim), torch.split(picked, [end - start for start, end in ranges], dim), strict=True
    )


@torch.library.custom_op("evovlm::prefix_attention", mutates_args=())
def _prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefixes: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    rectangles = rectangles_of(prefixes, cu_seqlens)
    queries, keys = rectangles.queries, rectangles.keys
    out, lse = attend_part(q, k, v, cu_seqlens, cu_seqlens, causal)
    part = attend_part(_pick(q, queries), _pick(k, keys), _pick(v, keys), rectangles.cu_q, rectangles.cu_k, False)
    merged, merged_lse = _pick(out, queries).to(lse.dtype), _pick(lse, queries, dim=1)
    merge_attention_(merged, merged_lse, *part)
    for rows, picked in chain(_unpick(out, merged, queries), _unpick(lse, merged_lse, queries, dim=1)):
        rows.copy_(picked)
    return out, lse


@torch.library.custom_op("evovlm::prefix_attention_backward", mutates_args=())
def _prefix_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefixes: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rectangles = rectangles_of(prefixes, cu_seqlens)
    queries, keys = rectangles.queries, rectangles.keys
    wholes = attend_part_backward(grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, causal)
    parts = attend_part_backward(
        _pick(grad, queries),
        _pick(q, queries),
        _pick(k, keys),
        _pick(v, keys),
        _pick(out, queries),
        _pick(lse, queries, dim=1),
        rectangles.cu_q,
        rectangles.cu_k,
        False,
    )
    # One after the other: several rectangles may have the same keys.
    for whole, part, ranges in zip(wholes, parts, (queries, keys, keys), strict=True):
        for rows, picked in _unpick(whole, part, ranges):
            rows += picked
    return wholes


@_prefix_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    cu_seqlens: Tensor,  # noqa: ARG001
    prefixes: Tensor,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32)
    )


@_prefix_attention_backward.register_fake
def _backward_fake(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, prefixes, out, lse = ctx.saved_tensors
    grads = torch.ops.evovlm.prefix_attention_backward(grad, q, k, v, out, lse, cu_seqlens, prefixes, ctx.causal)
    return *grads, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attention can be differentiated once; for second derivatives use packed_attention_reference"
    )


_prefix_attention.register_autograd(_backward, setup_context=_save)
_prefix_attention_backward.register_autograd(_no_second_derivative)


def _num_products(q: Tensor, cu_seqlens: Tensor, prefixes: Tensor, causal: bool) -> int:
    """Pairs × heads × channels; where only shapes are known, as if all were one segment without a prefix."""
    pairs = count_pairs(q.shape[0], q.shape[0], cu_seqlens, cu_seqlens, causal)
    if not isinstance(prefixes, FakeTensor) and not prefixes.is_meta:
        pairs += sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in prefixes.tolist())
    return pairs * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.evovlm.prefix_attention, get_raw=True)
def _flops(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    cu_seqlens: Tensor,
    prefixes: Tensor,
    causal: bool,
    **_: Any,
) -> int:
    return 4 * _num_products(q, cu_seqlens, prefixes, causal)


@register_flop_formula(torch.ops.evovlm.prefix_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    cu_seqlens: Tensor,
    prefixes: Tensor,
    causal: bool,
    **_: Any,
) -> int:
    return 10 * _num_products(q, cu_seqlens, prefixes, causal)
