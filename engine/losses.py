"""Cross-entropy over the supervised rows of a pack, in chunks, so that the logits never exist whole.

    hidden [T, H] ─ supervised rows ─► [n, H] ─ chunk by chunk ─► logits [chunk, V] ─► Σ w·CE
                                                  (recomputed in backward)

L = Σ_i w_i·CE_i / W (spec §3.5). W is the sum of the weights over every rank and microbatch of the step; it is in
the step plan, so nothing has to be reduced before the division.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def _chunk_loss(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    if logits.dtype != torch.float64:
        logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def weighted_cross_entropy(hidden: Tensor, head: Tensor, targets: Targets, *, chunk_rows: int = 2048) -> Tensor:
    """Sum the weighted cross-entropy of the supervised rows.

    Args:
        hidden: ``[T, H]``, last hidden states.
        head: ``[V, H]``, weight of the output head.
        targets: Supervised rows, their labels and weights.
        chunk_rows: Rows whose logits exist at a time; more than one chunk recomputes logits in backward.

    Returns:
        A scalar, float32 (float64 for float64 inputs). With no supervised row it is 0 and still has a gradient.
    """
    picked = hidden.index_select(0, targets.rows)
    if picked.shape[0] <= chunk_rows:
        return _chunk_loss(picked, head, targets.labels, targets.weights)
    total = picked.new_zeros((), dtype=torch.promote_types(picked.dtype, torch.float32))
    chunks = zip(
        *(torch.split(x, chunk_rows) for x in (picked, targets.labels, targets.weights)),
        strict=True,
    )
    for rows, labels, weights in chunks:
        total = total + checkpoint(_chunk_loss, rows, head, labels, weights, use_reentrant=False)
    return total
