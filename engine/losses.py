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

from collections.abc import Iterator, Sequence
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
    logits = Logits.of(hidden, head, targets, group)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in logits.inputs]
    loss, gradients = logits.sum(chunk_rows or chunk_rows_of(hidden.device), *wanted)
    return hold(loss, logits.inputs, gradients)


def chunk_rows_of(device: torch.device) -> int:
    """Rows whose logits exist at a time by default."""
    return CHUNK_ROWS.get(device.type, 2048)


def hold(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return a scalar whose gradients by some inputs are known already; None: an input that needs none."""
    for x, gradient in zip(inputs, gradients, strict=True):
        if gradient is not None:
            value = value + _Held.apply(x, gradient)  # type: ignore[no-untyped-call]
    return value


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
class Logits:
    """Logits of the rows that have a target, under this rank's part ``[V/tp, H]`` of the head. Use :meth:`of`.

    Attributes:
        inputs: Rows ``[n, H]`` and head ``[V/tp, H]`` with their graphs: what gradients belong to.
        labels: int64 ``[n]``.
        weights: ``[n]``, float32, or float64 for float64 rows.
        first: Vocabulary entry that this part of the head starts at.
        group: The tp ranks.
    """

    inputs: tuple[Tensor, Tensor]
    labels: Tensor
    weights: Tensor
    first: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, targets: Targets, group: dist.ProcessGroup | None) -> "Logits":
        """Pick the rows that have a target; arguments and errors are those of :func:`weighted_cross_entropy`."""
        vocab_size, first = head.shape[0], 0
        if group is not None:
            if not isinstance(head, DTensor) or head.placements != (Shard(0),):
                placed = head.placements if isinstance(head, DTensor) else "a plain tensor"
                raise ValueError(
                    f"the output head [{', '.join(map(str, head.shape))}] must be split by rows over the "
                    f"tensor-parallel ranks of the loss, but is {placed}: give it the style 'head'"
                )
            first = part_bounds(vocab_size, dist.get_world_size(group))[dist.get_rank(group)]
            hidden = gather_rows(hidden, group)
        labels = targets.labels
        inside = ((labels >= 0) & (labels < vocab_size)).all()
        torch._assert_async(inside, f"labels must be from 0 to {vocab_size - 1}")
        inputs = hidden.index_select(0, targets.rows), local_part(head)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return cls(inputs, labels, targets.weights.to(wide), first, group)

    @property
    def rows(self) -> Tensor:
        """Rows ``[n, H]``, outside of any graph."""
        return self.inputs[0].detach()

    @property
    def head(self) -> Tensor:
        """Head ``[V/tp, H]``, outside of any graph."""
        return self.inputs[1].detach()

    def sum(self, chunk_rows: int, wants_rows: bool, wants_head: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Return Σ w·CE, and its gradients by rows and by the head where they are wanted."""
        gradients = Gradients(self, wants_rows, wants_head)
        total = torch.zeros((), dtype=self.weights.dtype, device=self.labels.device)
        buffer = self.rows.new_empty(min(chunk_rows, len(self.labels)), len(self.head))
        for chunk in chunks_of(len(self.labels), chunk_rows):
            losses, errors = self.compute(chunk, wants_rows or wants_head, out=buffer)
            total += losses.sum()
            if errors is not None:
                gradients.add(chunk, errors)
        return total, gradients.both

    def compute(self, chunk: slice, wants_errors: bool, *, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of some rows. Collective over the tp ranks.

        Args:
            chunk: Which of the n rows.
            wants_errors: Whether to return errors.
            out: ``[m, V/tp]``, a buffer for the logits, m at least the rows of the chunk.

        Returns:
            w·CE of each row; and their errors w·(p − onehot), ``[rows, V/tp]`` in the dtype of the rows, or None.
        """
        rows = self.rows[chunk]
        narrow = torch.mm(rows, self.head.T, out=None if out is None else out[: len(rows)])
        errors = narrow.to(self.weights.dtype)
        losses = self._losses(errors, self.labels[chunk], self.weights[chunk], wants_errors)
        if errors is not narrow and wants_errors:
            narrow.copy_(errors)
        return losses, narrow if wants_errors else None

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


class Gradients:
    """Gradients of a weighted cross-entropy by rows and head, from errors that come chunk by chunk.

    Args:
        logits: Whose errors will come.
        wants_rows: Whether the gradient of the rows is wanted.
        wants_head: Whether that of the head is.
    """

    def __init__(self, logits: Logits, wants_rows: bool, wants_head: bool) -> None:
        self._rows, self._head = logits.rows, logits.head
        self.both: list[Tensor | None] = [
            torch.empty_like(self._rows) if wants_rows else None,
            torch.zeros_like(self._head, dtype=logits.weights.dtype) if wants_head else None,
        ]

    def add(self, chunk: slice, errors: Tensor, factors: Tensor | None = None) -> None:
        """Take in the errors ``[rows, V/tp]`` of a chunk, each times a factor ``[rows]`` if given."""
        rows = self._rows[chunk]
        grad_rows, grad_head = self.both
        if grad_rows is not None:
            torch.mm(errors, self._head, out=grad_rows[chunk])
            if factors is not None:
                grad_rows[chunk] *= factors[:, None]
        if grad_head is None:
            return
        if factors is not None:
            rows = (rows * factors[:, None]).to(rows.dtype)
        if errors.dtype == grad_head.dtype:
            grad_head.addmm_(errors.T, rows)
        else:
            grad_head += errors.T @ rows  # narrow products, added up in float32


def chunks_of(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Cut rows into chunks."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))
