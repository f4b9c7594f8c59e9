"""The vision exchange: one uneven all-to-all takes each visual token to the rank that holds its row, and back.

    encoder's rows [n, H] ──gather_rows──► send buffer ──all-to-all──► received [m, H]      forward
    their gradient [n, H] ◄──sum_rows──── receive buffer ◄─all-to-all── its gradient [m, H]  backward

``parallel/routes.py`` decides every size, so all ranks of the group call the same exchanges in the same order, forward
and backward, also those that send or receive nothing: tensors of size 0 take part like any other.

Two forms: ``exchange`` is one differentiable call; ``start_exchange`` and ``start_return`` return at once, so that a
chunk travels while the next one is encoded. The first is made of the other two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from evovlm.csrc.ops import gather_rows, sum_rows
from evovlm.parallel.routes import Chunk, Ints


@dataclass(frozen=True, eq=False)
class Pending:
    """An all-to-all on its way.

    Attributes:
        work: The collective.
        sent: What it reads; must live until it has ended.
        received: What it fills.
        finish: Makes the result of what was received.
    """

    work: dist.Work
    sent: Tensor
    received: Tensor
    finish: Callable[[Tensor], Tensor] | None = None

    def wait(self) -> Tensor:
        """Return the result; on CUDA the current stream waits, not the host."""
        self.work.wait()
        return self.received if self.finish is None else self.finish(self.received)


def start_exchange(
    rows: Tensor, chunk: Chunk, group: dist.ProcessGroup | None = None, out: Tensor | None = None
) -> Pending:
    """Send a chunk's visual tokens to their owners without waiting. Collective; records no graph.

    Args:
        rows: ``[chunk.num_rows, H]``, any dtype, what this rank hands over.
        chunk: This rank's part in the exchange.
        group: As many ranks as the chunk has splits; None means all ranks.
        out: Contiguous ``[chunk.num_received, H]`` to receive into, for example a part of a buffer for all chunks.

    Returns:
        ``wait()`` gives what was received, ``[chunk.num_received, H]``.

    Raises:
        ValueError: The number of rows, of ranks, or the shape of ``out`` differs from the chunk's.
    """
    _check(rows, chunk.num_rows, "rows to hand over", chunk, group)
    if out is not None:
        _check(out, chunk.num_received, "rows to receive into", chunk, group)
    with torch.no_grad():
        sent = gather_rows(rows, _on(rows.device, chunk.send_rows))
        received = rows.new_empty(chunk.num_received, rows.shape[1]) if out is None else out
        return Pending(_all_to_all(received, sent, chunk.recv_splits, chunk.send_splits, group), sent, received)


def start_return(grad_received: Tensor, chunk: Chunk, group: dist.ProcessGroup | None = None) -> Pending:
    """Send the gradient of received tokens back to where they came from, without waiting. Collective.

    Args:
        grad_received: ``[chunk.num_received, H]``, gradient of what ``start_exchange`` gave.
        chunk: The same as there.
        group: The same as there.

    Returns:
        ``wait()`` gives the gradient of the rows handed over, ``[chunk.num_rows, H]``, where a token that went to
        several rows has the sum of theirs.

    Raises:
        ValueError: The number of rows or ranks differs from the chunk's.
    """
    _check(grad_received, chunk.num_received, "gradients of rows received", chunk, group)

    def add(returned: Tensor) -> Tensor:
        return sum_rows(returned, _on(returned.device, chunk.send_rows), chunk.num_rows)

    with torch.no_grad():
        sent = grad_received.contiguous()
        received = sent.new_empty(len(chunk.send_rows), sent.shape[1])
        work = _all_to_all(received, sent, chunk.send_splits, chunk.recv_splits, group)
    return Pending(work, sent, received, add)


def exchange(rows: Tensor, chunk: Chunk, group: dist.ProcessGroup | None = None) -> Tensor:
    """Send a chunk's visual tokens to their owners; differentiable. Collective, forward and backward.

    While gradients are enabled the result is always part of a graph, even on a rank that hands over nothing, or whose
    ``rows`` no parameter has touched. So every rank can, and must, call backward on its result (with an empty gradient
    where it is empty): the others wait for it. Call it under ``torch.no_grad()`` on every rank if nothing before it
    is trained.

    Args:
        rows: ``[chunk.num_rows, H]``, any floating dtype, what this rank hands over.
        chunk: This rank's part in the exchange.
        group: As many ranks as the chunk has splits; None means all ranks.

    Returns:
        ``[chunk.num_received, H]``: by source rank, then number of the use, then token.

    Raises:
        ValueError: The number of rows or ranks differs from the chunk's.
    """
    if not torch.is_grad_enabled():
        return start_exchange(rows, chunk, group).wait()
    anchor = rows.new_empty(0, requires_grad=True)
    received: Tensor = _Exchange.apply(rows, anchor, chunk, group)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    """``anchor`` requires a gradient on every rank, so that backward runs on every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, chunk: Chunk, group: dist.ProcessGroup | None) -> Tensor:  # noqa: ARG004
        ctx.chunk, ctx.group = chunk, group
        return start_exchange(rows, chunk, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_received: Tensor) -> tuple[Tensor | None, None, None, None]:
        grad = start_return(grad_received, ctx.chunk, ctx.group).wait()
        return (grad if ctx.needs_input_grad[0] else None), None, None, None


def _all_to_all(
    received: Tensor, sent: Tensor, recv_splits: Ints, send_splits: Ints, group: dist.ProcessGroup | None
) -> dist.Work:
    work: dist.Work = dist.all_to_all_single(
        received, sent, recv_splits.tolist(), send_splits.tolist(), group, async_op=True
    )
    return work


def _on(device: torch.device, numbers: Ints) -> Tensor:
    """Copy row numbers to a device; through pinned memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _check(tensor: Tensor, num_rows: int, what: str, chunk: Chunk, group: dist.ProcessGroup | None) -> None:
    if tensor.dim() != 2 or len(tensor) != num_rows:
        raise ValueError(f"vision exchange: {what}: got {list(tensor.shape)}, the plan says [{num_rows}, H]")
    size = dist.get_world_size(group)
    if len(chunk.send_splits) != size:
        raise ValueError(f"vision exchange: planned for {len(chunk.send_splits)} ranks, but the group has {size}")
