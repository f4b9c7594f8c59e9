"""The ranks of a run, as a value that is passed around: no global parallel state, no environment variables.

``launch/`` fills a :class:`World` from what started the process; everything below receives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the processes of a run.

    Attributes:
        rank: This process's number, from 0.
        size: R, how many processes there are.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and lines that exist once per run."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks, in float64; every rank gets the sums."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def max(self, values: Sequence[float]) -> list[float]:
        """Take the largest of numbers over all ranks, in float64; every rank gets them."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        largest: list[float] = tensor.tolist()
        return largest

    def agree(self, what: str, value: str) -> None:
        """Check that every rank holds the same text.

        Raises:
            RuntimeError: Ranks differ; the message names ``what`` and the ranks.
        """
        values: list[str | None] = [None] * self.size
        dist.all_gather_object(values, value)
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise RuntimeError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {differing[0]} has {values[differing[0]]}"
                f" ({len(differing)} of {self.size} ranks differ from rank 0)"
            )
