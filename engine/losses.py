"""Cross-entropy over the supervised rows of a pack, in chunks, so that the logits never exist whole.

    hidden [t/tp, H] ─ gather ─► [t, H] ─ supervised rows ─► [n, H] ─ chunk by chunk ─► logits [chunk, V/tp] ─► Σ w·CE
                                                                                          │ in place
                                      gradients of rows [n, H] and head [V/tp, H] ◄── w·(p − onehot)
                                            └─ held until backward, which only scales them

Forward makes the gradients as well, if any are wanted: the logits are there, and are not computed a second time.
Between forward and backward the gradients are held, and nothing else. With tp ranks two sums cross them per chunk:
the largest logit; Σ exp and the target's logit.

L = Σ_i w_i·CE_i / W (spec §3.5). W is the sum of the weights over every rank and microbatch of the step; it is in
the step plan, so nothing has to be reduced before the division.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from evovlm.csrc.ops import cross_entropy_
from evovlm.parallel.collectives import gather_rows, part_bounds
from evovlm.parallel.tensor_styles import local_part

IGNORE = -100
"""Label of a row that has no target."""

CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
"""Rows whose logits exist at a time, by device. More rows read the head and its gradient fewer times, which counts
where arithmetic is fast. On a CPU, products of 256 to 2048 rows run at one rate, and fewer rows take less memory."""


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
    chunk_rows: int | None = None,
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
        chunk_rows: Rows whose logits exist at a time; by default ``CHUNK_ROWS`` of the device.

    Returns:
        A scalar, float32 (float64 for float64 inputs). With no supervised row it is 0 and still has a gradient. It can
        be differentiated once: backward hands its gradients over.

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
    picked, part = hidden.index_select(0, targets.rows), local_part(head)
    logits = _Logits(picked.detach(), part.detach(), labels, targets.weights, first, group)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (picked, part)]
    loss, gradients = logits.sum(chunk_rows or CHUNK_ROWS.get(hidden.device.type, 2048), *wanted)
    for x, gradient in zip((picked, part), gradients, strict=True):
        if gradient is not None:
            loss = loss + _Held.apply(x, gradient)  # type: ignore[no-untyped-call]
    return loss


class _Held(torch.autograd.Function):
    """Zero, with a known gradient.

    One for each input, so that a backward that is run in two halves (inputs, then weights) meets each once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        return gradient.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # In place: a second backward finds a changed tensor, and autograd refuses it.
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None


@dataclass(frozen=True, eq=False)
class _Logits:
    """Logits of rows ``[n, H]`` under the part ``[V/tp, H]`` of the head that starts at entry ``first``."""

    rows: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor
    first: int
    group: dist.ProcessGroup | None

    def sum(self, chunk_rows: int, wants_rows: bool, wants_head: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Return Σ w·CE, and its gradients by rows and by the head where they are wanted."""
        rows, head = self.rows, self.head
        wide = torch.promote_types(rows.dtype, torch.float32)
        weights = self.weights.to(wide)
        total = torch.zeros((), dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_head = torch.zeros_like(head, dtype=wide) if wants_head else None
        buffer = rows.new_empty(min(chunk_rows, len(rows)), len(head))
        for start in range(0, len(rows), chunk_rows):
            chunk = slice(start, min(start + chunk_rows, len(rows)))
            narrow = torch.mm(rows[chunk], head.T, out=buffer[: chunk.stop - start])
            errors = narrow.to(wide)
            total += self._losses(errors, self.labels[chunk], weights[chunk], wants_rows or wants_head).sum()
            if errors is not narrow and (wants_rows or wants_head):
                narrow.copy_(errors)
            if grad_rows is not None:
                torch.mm(narrow, head, out=grad_rows[chunk])
            if grad_head is not None and narrow is errors:
                grad_head.addmm_(errors.T, rows[chunk])
            elif grad_head is not None:
                grad_head += narrow.T @ rows[chunk]  # narrow products, added up in float32
        return total, [grad_rows, grad_head]

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool) -> Tensor:
        """Return w·CE of each row; with ``gradient``, the logits become w·(p − onehot)."""
        if self.group is None:
            return cross_entropy_(logits, labels, weights, gradient)
        columns = labels - self.first
        owned = (columns >= 0) & (columns < logits.shape[1])
        if logits.shape[1]:
            columns = columns.clamp(0, logits.shape[1] - 1)[:, None]
            largest = logits.amax(1)
            target = logits.gather(1, columns).squeeze(1).masked_fill_(~owned, 0)
        else:  # a vocabulary of fewer parts than ranks
            largest = torch.full_like(weights, float("-inf"))
            target = torch.zeros_like(weights)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        both = torch.stack((logits.sub_(largest[:, None]).exp_().sum(1), target))
        dist.all_reduce(both, group=self.group)
        exponentials, target = both
        if gradient and logits.shape[1]:
            logits.mul_((weights / exponentials)[:, None])
            logits.scatter_add_(1, columns, (weights * owned).neg_()[:, None])
        losses: Tensor = (exponentials.log() + largest - target) * weights
        return losses
