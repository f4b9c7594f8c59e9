"""Collectives over a process group that differentiate: each is the adjoint of another.

    forward                                   backward
    gather_rows        [n, …] → [n·R, …]      reduce-scatter     every rank uses all rows in its own way
    scatter_rows       [n·R, …] → [n, …]      all-gather         every rank holds one term of a sum
    copy_to_ranks      identity               all-reduce         ranks use a common tensor in their own ways
    reduce_from_ranks  all-reduce             identity           ranks use the sum in the same way
    slice_rows         keep own rows          all-gather         ranks hold the same tensor and share out its rows

Rows are the first dimension. Sums of narrow dtypes (bfloat16, float16) are taken in float32. Ranks must agree on
shapes; tensors without elements send nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the rows of all ranks, in rank order.

    Args:
        x: ``[n, …]``, n the same on every rank.
        group: The ranks.

    Returns:
        ``[n·R, …]``. Its gradient may differ between ranks: the gradients are added.
    """
    out: Tensor = _GatherRows.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add a tensor over the ranks, each of which keeps its equal part of the rows.

    Args:
        x: ``[m, …]``, one term of the sum.
        group: The R ranks.

    Returns:
        ``[m / R, …]``, rows ``rank·m/R`` and on.

    Raises:
        ValueError: R does not divide m.
    """
    size = dist.get_world_size(group)
    if x.shape[0] % size:
        raise ValueError(
            f"{x.shape[0]} rows cannot be scattered over {size} ranks in equal parts: pad them to a multiple"
        )
    out: Tensor = _ScatterRows.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a tensor that is the same on every rank; its gradient is added over the ranks."""
    out: Tensor = _CopyToRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def reduce_from_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add a tensor over the ranks; the sum's gradient, the same on every rank, is passed on."""
    out: Tensor = _ReduceFromRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def slice_rows(x: Tensor, group: dist.ProcessGroup, bounds: Sequence[int]) -> Tensor:
    """Keep this rank's rows of a tensor that is the same on every rank.

    Args:
        x: ``[n, …]``.
        group: The R ranks.
        bounds: R + 1 rising numbers from 0 to n: rank r keeps rows ``bounds[r]`` to ``bounds[r + 1]``, which may be
            none.

    Returns:
        ``[bounds[r + 1] − bounds[r], …]``. Backward gives every rank the gradient of all rows.

    Raises:
        ValueError: The bounds do not divide the rows among the ranks.
    """
    size = dist.get_world_size(group)
    rising = all(low <= high for low, high in pairwise(bounds))
    if len(bounds) != size + 1 or bounds[0] != 0 or bounds[-1] != x.shape[0] or not rising:
        raise ValueError(
            f"bounds {list(bounds)} do not divide {x.shape[0]} rows among {size} ranks: "
            f"they must be {size + 1} numbers that rise from 0 to {x.shape[0]}"
        )
    out: Tensor = _SliceRows.apply(x, group, tuple(bounds))  # type: ignore[no-untyped-call]
    return out


def part_bounds(num: int, parts: int) -> list[int]:
    """Borders of ``num`` things cut as ``torch.chunk`` and DTensor do: ``ceil(num / parts)`` each while they last.

    Returns:
        ``parts + 1`` rising numbers from 0 to ``num``; last parts may be short or empty.
    """
    each = -(-num // parts)
    return [min(part * each, num) for part in range(parts + 1)]


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy in any case: selective recomputation may have kept x itself.
    total = x.detach().to(_wide(x), copy=True, memory_format=torch.contiguous_format)
    if total.numel():
        dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    if out.numel():
        dist.all_gather_single(out, x.detach().contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    terms = x.detach().to(_wide(x)).contiguous()
    out = terms.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    if terms.numel():
        dist.reduce_scatter_single(out, terms, group=group)
    return out.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _SliceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, bounds: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.bounds = group, bounds
        rank = dist.get_rank(group)
        return x[bounds[rank] : bounds[rank + 1]].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counts = [high - low for low, high in pairwise(ctx.bounds)]
        if not any(counts):
            return grad, None, None
        # Collectives want equal parts: parts are padded to the longest.
        padded = grad.new_zeros(max(counts), *grad.shape[1:])
        padded[: grad.shape[0]] = grad
        parts = torch.split(_all_gather(padded, ctx.group), max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), None, None
