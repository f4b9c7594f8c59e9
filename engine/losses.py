"""Cross-entropy over the supervised rows of a pack, in chunks, so that the logits never exist whole.

    hidden [t/tp, H] ─ gather ─► [t, H] ─ supervised rows ─► [n, H] ─ chunk by chunk ─► logits [chunk, V/tp] ─► Σ w·CE
                                                                 │                         ▲ (again in backward)
                                                                 └─ tp ranks: max; Σ exp, target logit

L = Σ_i w_i·CE_i / W (spec §3.5). W is the sum of the weights over every rank and microbatch of the step; it is in
the step plan, so nothing has to be reduced before the division.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from evovlm.parallel.collectives import gather_rows, part_bounds
from evovlm.parallel.tensor_styles import local_part

IGNORE = -100
"""Label of a row that has no target."""


@dataclass(frozen=True)
class Targets:
    """The supervised rows of a pack.

    Attributes:
        rows: int64 ``[n]``, rows of the pack that have a target.
        labels: int64 ``[n]``, the target token of each.
        weights: float32 ``[n]``, the loss weight of each.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor, device: torch.device) -> "Targets":
        """Pick the supervised rows on the host, where it costs no synchronisation, and move them.

        Args:
            labels: int64 ``[T]`` on the host, already shifted; ``IGNORE`` where there is no target.
            weights: float32 ``[T]`` on the host.
            device: Where the loss is computed.
        """
        rows = torch.nonzero(labels != IGNORE).squeeze(1)
        return cls(*(x.to(device, non_blocking=True) for x in (rows, labels[rows], weights[rows])))


def weighted_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = 2048,
) -> Tensor:
    """Sum the weighted cross-entropy of the supervised rows.

    With a group, vocabulary and rows are split over its tensor-parallel ranks (Megatron's vocabulary-parallel
    cross-entropy). All of them return the same sum, over all t rows: whoever adds losses over ranks counts it once per
    group. If each of them calls ``backward`` on it, the gradients are those of one such sum, not of tp of them.

    Args:
        hidden: ``[t, H]`` last hidden states; with a group ``[t/tp, H]``, this rank's rows of them.
        head: ``[V, H]``, weight of the output head; with a group a DTensor over it, split by rows.
        targets: Supervised rows of the t rows, their labels and weights; the same on every rank of the group.
        group: The tp ranks.
        chunk_rows: Rows whose logits exist at a time. No logits are kept for backward, which computes them again.

    Returns:
        A scalar, float32 (float64 for float64 inputs). With no supervised row it is 0 and still has a gradient.

    Raises:
        ValueError: With a group, the head is not split over its ranks.
        RuntimeError: A label is not in the vocabulary (on CUDA reported asynchronously).
    """
    vocab_size, first = head.shape[0], 0
    if group is not None:
        if not isinstance(head, DTensor) or head.placements != (Shard(0),):
            placed = head.placements if isinstance(head, DTensor) else "a plain tensor"
            raise ValueError(
                f"the output head [{', '.join(map(str, head.shape))}] must be split by rows over the tensor-parallel "
                f"ranks of the loss, but is {placed}: give it the style 'head'"
            )
        first = part_bounds(vocab_size, dist.get_world_size(group))[dist.get_rank(group)]
        hidden = gather_rows(hidden, group)
    labels = targets.labels
    torch._assert_async(((labels >= 0) & (labels < vocab_size)).all(), f"labels must be from 0 to {vocab_size - 1}")
    picked = hidden.index_select(0, targets.rows)
    loss: Tensor = _CrossEntropy.apply(picked, local_part(head), labels, targets.weights, first, group, chunk_rows)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Σ w·CE of rows ``[n, H]`` under the part of the vocabulary that starts at ``first``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        chunk_rows: int,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        weights = weights.to(wide)
        normalizers = torch.empty(rows.shape[0], dtype=wide, device=rows.device)  # log Σ exp(logits)
        total = torch.zeros((), dtype=wide, device=rows.device)
        for chunk in _chunks(rows.shape[0], chunk_rows):
            logits = F.linear(rows[chunk], head).to(wide)
            owned, columns = _columns(labels[chunk], first, head.shape[0])
            if head.shape[0]:
                largest = logits.amax(1)
                target = logits.gather(1, columns[:, None]).squeeze(1).masked_fill_(~owned, 0)
            else:  # a vocabulary of fewer parts than ranks
                largest = logits.new_full(logits.shape[:1], float("-inf"))
                target = torch.zeros_like(largest)
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            exponentials = logits.sub_(largest[:, None]).exp_().sum(1)
            if group is not None:
                both = torch.stack((exponentials, target))
                dist.all_reduce(both, group=group)
                exponentials, target = both
            normalizers[chunk] = largest + exponentials.log()
            total += ((normalizers[chunk] - target) * weights[chunk]).sum()
        ctx.save_for_backward(rows, head, labels, weights, normalizers)
        ctx.first, ctx.chunk_rows = first, chunk_rows
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, head, labels, weights, normalizers = ctx.saved_tensors
        wants_rows, wants_head = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_head = torch.zeros_like(head, dtype=normalizers.dtype) if wants_head else None
        for chunk in _chunks(rows.shape[0], ctx.chunk_rows):
            # d CE / d logits = probabilities − 1 at the label, of which this rank has some columns.
            errors = F.linear(rows[chunk], head).to(normalizers.dtype)
            errors.sub_(normalizers[chunk, None]).exp_()
            owned, columns = _columns(labels[chunk], ctx.first, head.shape[0])
            if head.shape[0]:
                errors.scatter_add_(1, columns[:, None], -owned.to(errors.dtype)[:, None])
            errors.mul_((weights[chunk] * grad)[:, None])
            narrow = errors.to(head.dtype)
            if grad_rows is not None:
                grad_rows[chunk] = narrow @ head
            if grad_head is None:
                continue
            if narrow is errors:
                grad_head.addmm_(errors.T, rows[chunk])
            else:
                grad_head += narrow.T @ rows[chunk]  # narrow products, added up in float32
        return grad_rows, grad_head, None, None, None, None, None


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows))


def _columns(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether each label is among ``count`` columns that start at ``first``, and a valid column for each."""
    columns = labels - first
    return (columns >= 0) & (columns < count), columns.clamp(0, max(count - 1, 0))
