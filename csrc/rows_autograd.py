"""Shapes and gradients of the row operators, for autograd, torch.compile and fake tensors.

    operator   gradient of its rows            operator   gradients
    gather     sum_rows(grad, index)           scatter    base: drop_rows(grad, index), rows: gather_rows(grad, index)
    sum        gather_rows(grad, index)        drop       drop_rows(grad, index)

The four are closed under differentiation, so gradients of gradients work, too; :mod:`evovlm.csrc.ops` says what
each is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evovlm.csrc import _ops  # noqa: F401 - registers torch.ops.evovlm

_call = torch.ops.evovlm


def _gather_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _scatter_fake(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG001
    return base.new_empty(base.shape)


def _drop_fake(x: Tensor, index: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _sum_fake(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:  # noqa: ARG001
    return rows.new_empty(num_rows, rows.shape[1])


def _gather_into_fake(x: Tensor, index: Tensor, out: Tensor) -> None:
    pass


def _scatter_in_place_fake(base: Tensor, index: Tensor, rows: Tensor) -> None:
    pass


def _sum_into_fake(rows: Tensor, index: Tensor, out: Tensor) -> None:
    pass


for _name, _fake in (
    ("gather_rows", _gather_fake),
    ("gather_rows_into", _gather_into_fake),
    ("scatter_rows", _scatter_fake),
    ("scatter_rows_", _scatter_in_place_fake),
    ("drop_rows", _drop_fake),
    ("sum_rows", _sum_fake),
    ("sum_rows_into", _sum_into_fake),
):
    torch.library.register_fake(f"evovlm::{_name}", _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1])
    ctx.num_rows = inputs[0].shape[0]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _call.sum_rows(grad, *ctx.saved_tensors, ctx.num_rows), None


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _call.gather_rows(grad, *ctx.saved_tensors), None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (index,) = ctx.saved_tensors
    base = _call.drop_rows(grad, index) if ctx.needs_input_grad[0] else None
    return base, None, _call.gather_rows(grad, index) if ctx.needs_input_grad[2] else None


def _drop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _call.drop_rows(grad, *ctx.saved_tensors), None


for _name, _backward in (
    ("gather_rows", _gather_backward),
    ("sum_rows", _sum_backward),
    ("scatter_rows", _scatter_backward),
    ("drop_rows", _drop_backward),
):
    torch.library.register_autograd(f"evovlm::{_name}", _backward, setup_context=_save)


class ScatterInPlace(torch.autograd.Function):
    """``scatter_rows_`` for tensors that are part of a graph: the base is the result."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Write rows ``[n, H]`` into base ``[T, H]``."""
        ctx.mark_dirty(base)
        ctx.save_for_backward(index)
        _call.scatter_rows_(base, index, rows)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Split the gradient into that of other rows and that of the rows written."""
        return _scatter_backward(ctx, grad)
