"""Shapes and gradients of the position operators, for autograd, torch.compile and fake tensors.

    rotary_qk, rotary     saved: positions and frequencies      gradient: rotation by the negative angle
    v2pe_positions        of integers: no gradient

:mod:`evovlm.csrc.ops` says what each is.
"""

from typing import Any

import torch
from torch import Tensor

from evovlm.csrc import _ops  # noqa: F401 - registers torch.ops.evovlm

_call = torch.ops.evovlm


def _rotary_fake(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _rotary_qk_fake(
    q: Tensor,
    k: Tensor,
    positions: Tensor,  # noqa: ARG001
    inv_freq: Tensor,  # noqa: ARG001
    inverse: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotary_in_place_fake(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> None:
    pass


def _v2pe_fake(cu_seqlens: Tensor, runs: Tensor, deltas: Tensor, num_tokens: int) -> Tensor:  # noqa: ARG001
    return cu_seqlens.new_empty(num_tokens, dtype=torch.float32)


for _name, _fake in (
    ("rotary", _rotary_fake),
    ("rotary_qk", _rotary_qk_fake),
    ("rotary_qk_", _rotary_in_place_fake),
    ("v2pe_positions", _v2pe_fake),
):
    torch.library.register_fake(f"evovlm::{_name}", _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *_, positions, inv_freq, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _call.rotary(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _rotary_qk_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *_call.rotary_qk(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


torch.library.register_autograd("evovlm::rotary", _rotary_backward, setup_context=_save)
torch.library.register_autograd("evovlm::rotary_qk", _rotary_qk_backward, setup_context=_save)


class RotateInPlace(torch.autograd.Function):
    """``rotary_qk_`` for projections ``[T, ·]`` that are part of a graph: they are the results."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate both, which may not be views: autograd allows a change of several views in no one function."""
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(positions, inv_freq)
        shape = (-1, 2 * inv_freq.shape[0])
        _call.rotary_qk_(torch.unflatten(q, -1, shape), torch.unflatten(k, -1, shape), positions, inv_freq, False)
        return q, k

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Rotate back; not in place, for the gradients may have other readers."""
        positions, inv_freq = ctx.saved_tensors
        shape = (-1, 2 * inv_freq.shape[0])
        dq, dk = (torch.unflatten(grad, -1, shape) for grad in (dq, dk))
        dq, dk = _call.rotary_qk(dq, dk, positions, inv_freq, True)
        return dq.flatten(1), dk.flatten(1), None, None
