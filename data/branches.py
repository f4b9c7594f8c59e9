"""Preference pairs in a pack: which rows see what, where positions restart, and whose targets are whose.

pair        │ prefix     │ chosen │ rejected  │     one segment of the plan, begin 0, chosen 5, rejected 8, end 13
borders     0            5        8           13     three causal runs
prefixes    (5, 13, 0, 5)                            rows 5 … 12 see rows 0 … 4, too
positions   0 1 2 3 4     5 6 7    5 6 7 8 9         both answers continue the prefix
targets     . . . . c,r   c c .    r r r r .         of the chosen and of the rejected answer; shared ones of both
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Span(NamedTuple):
    """First rows of a pair's prefix, chosen and rejected branch in a pack, and the row after its last."""

    begin: int
    chosen: int
    rejected: int
    end: int


@dataclass
class Pairs:
    """The preference pairs of a pack, n of them, in order; T rows.

    Attributes:
        samples: int64 [n], rows of the index.
        numbers: int64 [n], number of each pair among all segments of its step.
        chosen: int64 [T], the pair, 0 … n − 1, whose chosen answer each row's target belongs to; -1: none.
        rejected: int64 [T], likewise of rejected answers. A target that both answers begin with belongs to both.
    """

    samples: Tensor
    numbers: Tensor
    chosen: Tensor
    rejected: Tensor


def no_prefixes() -> Tensor:
    """int32 [0, 4], ``MicroBatch.prefixes`` of a pack whose segments are all ordinary ones."""
    return torch.empty(0, 4, dtype=torch.int32)


def borders(ends: Sequence[int], spans: Sequence[Span], num_rows: int) -> Tensor:
    """Borders of all causal runs of a pack: int32 [S + 1] from 0 to T; padding is a last run, a pair three.

    Args:
        ends: rows of the pack before its first segment, and up to the end of each.
        spans: those segments that are pairs.
        num_rows: T.
    """
    inner = [row for span in spans for row in (span.chosen, span.rejected)]
    return torch.tensor(sorted({*ends, *inner, num_rows}), dtype=torch.int32)


def prefixes(spans: Sequence[Span]) -> Tensor:
    """int32 [n, 4], (query start, query end, key start, key end) of each pair: both branches see the prefix."""
    return torch.tensor([(s.chosen, s.end, s.begin, s.chosen) for s in spans], dtype=torch.int32).view(-1, 4)


def restart(positions: Tensor, spans: Sequence[Span]) -> None:
    """Let rejected branches continue their prefix, in place.

    Args:
        positions: float32 [T], those of pairs counted on through all three parts.
        spans: the pairs.
    """
    for span in spans:
        # The branches are text, so what the rejected one gets stands, unrounded, where counting on went through them.
        length = span.end - span.rejected
        positions[span.rejected : span.end] = positions[span.chosen : span.chosen + length].clone()


def pair_targets(
    spans: Sequence[Span], samples: NDArray[np.int64], first_segment: int, targets: NDArray[np.bool_]
) -> Pairs:
    """Say which pair's answers the targets of a pack belong to.

    Args:
        spans: all segments of the pack.
        samples: int64 [n], rows of the index.
        first_segment: segments of the step before the pack.
        targets: bool [T], rows that have one.
    """
    owners = np.full((2, len(targets)), -1, np.int64)
    for i, span in enumerate(spans):
        owners[0, span.begin : span.rejected] = i
        owners[1, span.begin : span.chosen] = i
        owners[1, span.rejected : span.end] = i
    chosen, rejected = torch.from_numpy(np.where(targets, owners, -1))
    numbers = torch.arange(first_segment, first_segment + len(spans))
    return Pairs(torch.from_numpy(samples.astype(np.int64)), numbers, chosen, rejected)


def squared_lengths(
    lengths: NDArray[np.int64], chosen_at: NDArray[np.int64], rejected_at: NDArray[np.int64]
) -> NDArray[np.int64]:
    """What attention in pairs costs: the squared length of an ordinary segment of the same cost.

    A prefix of p rows, branches of c and r: three causal runs and a rectangle give p² + c² + r² + 2·p·(c + r).

    Args:
        lengths: int64 [n], tokens of each pair.
        chosen_at: integers [n], first row of the chosen branch.
        rejected_at: integers [n], first row of the rejected branch.

    Returns:
        int64 [n].
    """
    # (p + c + r)² less what the two branches do not see of each other.
    squares: NDArray[np.int64] = lengths**2 - 2 * (lengths - rejected_at) * (rejected_at - chosen_at)
    return squares
