"""Shapes and gradients of the fused operators of a block and of the loss, for autograd, torch.compile, fake tensors.

    operator        saved                     gradients
    swiglu          gate, up                  both, in one pass
    add_scaled      branch, scale, factors    x: that of the result; branch and scale in one pass; factors: none
    cross_entropy_  nothing                   it makes its gradient itself, over the logits

:mod:`evovlm.csrc.ops` says what each is.
"""

from typing import Any

import torch
from torch import Tensor

from evovlm.csrc import _ops  # noqa: F401 - registers torch.ops.evovlm

_call = torch.ops.evovlm


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:  # noqa: ARG001
    return gate.new_empty(gate.shape)


def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _add_scaled_fake(x: Tensor, branch: Tensor, scale: Tensor, factors: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _add_scaled_backward_fake(
    grad: Tensor,  # noqa: ARG001
    branch: Tensor,
    scale: Tensor,
    factors: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), scale.new_empty(scale.shape)


def _cross_entropy_fake(logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool) -> Tensor:  # noqa: ARG001
    return logits.new_empty(logits.shape[0])


for _name, _fake in (
    ("swiglu", _swiglu_fake),
    ("swiglu_backward", _swiglu_backward_fake),
    ("add_scaled", _add_scaled_fake),
    ("add_scaled_backward", _add_scaled_backward_fake),
    ("cross_entropy_", _cross_entropy_fake),
):
    torch.library.register_fake(f"evovlm::{_name}", _fake)


def _swiglu_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _call.swiglu_backward(grad, *ctx.saved_tensors)
    return dgate, dup


def _add_scaled_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])


def _add_scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    dbranch = dscale = None
    if any(ctx.needs_input_grad[1:3]):
        dbranch, dscale = _call.add_scaled_backward(grad, *ctx.saved_tensors)
    return grad, dbranch, dscale, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("this operator can be differentiated once; for second derivatives use its reference")


torch.library.register_autograd("evovlm::swiglu", _swiglu_backward, setup_context=_swiglu_save)
torch.library.register_autograd("evovlm::add_scaled", _add_scaled_backward, setup_context=_add_scaled_save)
for _name in ("swiglu_backward", "add_scaled_backward"):
    torch.library.register_autograd(f"evovlm::{_name}", _no_second_derivative)
