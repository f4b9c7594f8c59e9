"""Shapes and gradients of ``evovlm::rms_norm``, for autograd, torch.compile and fake tensors.

x, weight ─ rms_norm ─► y, rstd          saved: x, weight, rstd (one float32 a row)
dx, dweight ◄─ rms_norm_backward ─ dy
"""

from typing import Any

import torch
from torch import Tensor

from evovlm.csrc import _ops  # noqa: F401 - registers torch.ops.evovlm


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


torch.library.register_fake("evovlm::rms_norm", _fake)
torch.library.register_fake("evovlm::rms_norm_backward", _backward_fake)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = torch.ops.evovlm.rms_norm_backward(grad, *ctx.saved_tensors)
    return dx, dweight, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("rms_norm can be differentiated once; for second derivatives use rms_norm_reference")


torch.library.register_autograd("evovlm::rms_norm", _backward, setup_context=_save)
torch.library.register_autograd("evovlm::rms_norm_backward", _no_second_derivative)
