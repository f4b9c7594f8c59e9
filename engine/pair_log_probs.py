"""Log-probabilities of a pack's preference pairs, and the gradient of any function of them.

    hidden [t, H] ─ rows with a target ─► logits, chunk by chunk ─► log p of each row ─ summed by pair ─► [pairs, 2]
                                            │ held, p − onehot        sums over sequence ranks            │
                                            ▼                                                             ▼
                            gradients of rows and head  ◄──────── ∂L/∂log π of each row's pair  ◄── any function

What a row's gradient weighs is known only when all rows of its pair are, on whatever rank. The errors p − onehot of as
many rows as fit into ``HELD_BYTES`` wait for it; logits of the others are computed again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.data.batch import Pairs
from evovlm.engine.losses import IGNORE, Gradients, Logits, Targets, chunk_rows_of, chunks_of, hold

HELD_BYTES = 2**30
"""Errors that wait for their weights, of one microbatch on one rank."""


@dataclass(frozen=True)
class PairTargets:
    """The rows of a rank that have a target, and the pairs that they belong to.

    Attributes:
        targets: Rows and labels; every weight is 1.
        chosen: int64 ``[n]``, the pair of the pack whose chosen answer the row's target belongs to; the number of
            pairs where it belongs to none.
        rejected: int64 ``[n]``, alike. A token that both answers begin with belongs to both.
        num_pairs: Pairs of the pack.
    """

    targets: Targets
    chosen: Tensor
    rejected: Tensor
    num_pairs: int

    @classmethod
    def of(cls, labels: Tensor, pairs: Pairs, mine: Tensor | None, device: torch.device) -> "PairTargets":
        """Pick the rows on the host and move them.

        Args:
            labels: int64 ``[t]``, those of this rank's rows.
            pairs: Of the whole pack.
            mine: int64 ``[t]``, this rank's rows of the pack; None: all.
            device: Where the loss is computed.
        """
        count, supervised = len(pairs.samples), labels != IGNORE
        belongs = []
        for of_row in (pairs.chosen, pairs.rejected):
            own = (of_row if mine is None else of_row[mine])[supervised]
            belongs.append(torch.where(own < 0, count, own).to(device, non_blocking=True))
        targets = Targets.of(labels, torch.ones(len(labels)), device)
        return cls(targets, belongs[0], belongs[1], count)

    def sums(self, of_row: Tensor) -> Tensor:
        """Add up numbers of rows, ``[n]``, over the answers of each pair: float64 ``[pairs, 2]``."""
        totals = torch.zeros(2, self.num_pairs + 1, dtype=torch.float64, device=of_row.device)
        for total, belongs in zip(totals, (self.chosen, self.rejected), strict=True):
            total.index_add_(0, belongs, of_row.double())
        return totals[:, : self.num_pairs].T.contiguous()

    def of_rows(self, of_pair: Tensor) -> Tensor:
        """Give each row what its pair's answers have, ``[pairs, 2]``: float64 ``[n]``, the sum where it is in both."""
        padded = torch.cat((of_pair, of_pair.new_zeros(1, 2)))
        return padded[self.chosen, 0] + padded[self.rejected, 1]


def pair_log_probs(
    hidden: Tensor,
    head: Tensor,
    targets: PairTargets,
    gradients: Callable[[Tensor], Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    sequence_groups: Sequence[dist.ProcessGroup] = (),
    chunk_rows: int | None = None,
    held_bytes: int = HELD_BYTES,
) -> tuple[Tensor, Tensor]:
    """Sum the log-probabilities of each pair's answers, and give a loss of them its gradient.

    Args:
        hidden: ``[t, H]`` last hidden states; with a group ``[t/tp, H]``, this rank's rows of them.
        head: ``[V, H]``; with a group a DTensor over it, split by rows.
        targets: This rank's rows.
        gradients: ``∂L/∂log π``, float64 ``[pairs, 2]``, as a function of the log-probabilities, float64
            ``[pairs, 2]``. Called once, on every rank, where autograd records.
        group: The tp ranks.
        sequence_groups: Groups over whose product the rows of the pack are split.
        chunk_rows: Rows whose logits are made at a time; by default ``CHUNK_ROWS`` of the device.
        held_bytes: Bytes of errors that are kept rather than computed again.

    Returns:
        A scalar of value 0 that has L's gradient, and the log-probabilities, the same on all ranks of all groups.
    """
    logits = Logits.of(hidden, head, targets.targets, group)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in logits.inputs]
    row_bytes = len(logits.head) * logits.head.element_size()
    room = held_bytes // max(1, row_bytes) if any(wanted) else 0
    chunks = list(chunks_of(len(logits.labels), chunk_rows or chunk_rows_of(hidden.device)))
    losses = [torch.empty(0, dtype=logits.weights.dtype, device=hidden.device)]
    held: list[Tensor | None] = []
    for chunk in chunks:
        of_chunk, errors = logits.compute(chunk, chunk.stop <= room)
        losses.append(of_chunk)
        held.append(errors)
    log_probs = targets.sums(torch.cat(losses).neg_())
    for ranks in sequence_groups:
        dist.all_reduce(log_probs, group=ranks)
    value = log_probs.new_zeros((), dtype=logits.weights.dtype)
    if not torch.is_grad_enabled():
        return value, log_probs
    # Whatever is wanted here: the function may be a collective. A row's error is the gradient of −log p.
    factors = targets.of_rows(gradients(log_probs)).neg_().to(logits.weights.dtype)
    made = Gradients(logits, *wanted)
    for number, chunk in enumerate(chunks):
        errors = held[number]
        if errors is None:
            _, errors = logits.compute(chunk, True)
        assert errors is not None
        made.add(chunk, errors, factors[chunk])
        held[number] = None  # its memory is of use to the next
    return hold(value, logits.inputs, made.both), log_probs
