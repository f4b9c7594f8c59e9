"""Solutions of several questions as one forward pass: each question's prefix once, the branches behind it.

    rows         │ prefix 0 │ branch │ branch │ prefix 1 │ branch │ …       no padding: a pack is as long as it is
    cu_seqlens   0          6        8        11         15       17
    prefixes       (6, 11, 0, 6)                (15, 17, 11, 15)            branches see their prefix, not each other
    positions    0 … 5      6 7      6 7 8    0 … 3      4 5

A question whose branches do not fit one pack goes into several, each with its prefix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evovlm.engine.score_prompts import Decisions, JudgedQuestion


@dataclass(frozen=True)
class PackLimits:
    """How much is computed at a time.

    Attributes:
        tokens: Most tokens of a pack; a solution that is longer with its question goes alone.
        tiles: Most tiles that are encoded at a time, and that the questions of a pack have (one has more: it goes
            alone).

    Raises:
        ValueError: A number is below 1.
    """

    tokens: int = 16_384
    tiles: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"pack {name} = {value} is below 1")


@dataclass(frozen=True)
class Part:
    """What a pack holds of a question.

    Attributes:
        number: Of the question, as its caller counts.
        question: The question.
        branches: Which of its branches.
    """

    number: int
    question: JudgedQuestion
    branches: range

    @property
    def solutions(self) -> list[tuple[int, Decisions]]:
        """Number and decisions of each solution that the branches hold."""
        listed = enumerate(self.question.solutions)
        return [(i, found) for i, found in listed if isinstance(found, Decisions) and found.branch in self.branches]


@dataclass(frozen=True)
class ScorePack:
    """A pack as tensors on the CPU; T rows.

    Attributes:
        tokens: int64 ``[T]``.
        positions: float32 ``[T]``.
        cu_seqlens: int32 ``[S + 1]``.
        prefixes: int32 ``[n, 4]``.
        visual_rows: int64 ``[Nv]``, of the parts' images in order.
        decisions: int64 ``[d]``, decision rows of the parts' solutions in order.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    prefixes: Tensor
    visual_rows: Tensor
    decisions: Tensor


class Packer:
    """Collects questions to packs.

    Args:
        limits: How large.
    """

    def __init__(self, limits: PackLimits) -> None:
        self.limits = limits
        self._parts: list[Part] = []
        self._tokens = self._tiles = 0

    def add(self, number: int, question: JudgedQuestion) -> Iterator[list[Part]]:
        """Take a question; yields the packs that are full now."""
        prefix, tiles = len(question.prefix.tokens), len(question.prefix.tiles)
        lengths = [len(branch) for branch in question.branches]
        too_many = self._tokens + prefix + sum(lengths) > self.limits.tokens or self._tiles + tiles > self.limits.tiles
        if too_many:
            yield from self.flush()
        begin = 0
        while begin < len(lengths):
            end, size = begin + 1, prefix + lengths[begin]
            while end < len(lengths) and size + lengths[end] <= self.limits.tokens:
                size, end = size + lengths[end], end + 1
            self._parts.append(Part(number, question, range(begin, end)))
            self._tokens, self._tiles, begin = self._tokens + size, self._tiles + tiles, end
            if end < len(lengths):
                yield from self.flush()

    def flush(self) -> Iterator[list[Part]]:
        """Yield the pack that is under way, if there is one."""
        if self._parts:
            yield self._parts
        self._parts, self._tokens, self._tiles = [], 0, 0


def build_pack(parts: Sequence[Part]) -> ScorePack:
    """Lay a pack's parts out in rows."""
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.float32]] = []
    borders, prefixes = [0], []
    visual_rows, decisions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        prefix, begin = part.question.prefix, borders[-1]
        size = len(prefix.tokens)
        tokens.append(prefix.tokens)
        positions.append(prefix.positions)
        visual_rows.append(begin + prefix.visual_rows)
        borders.append(begin + size)
        shift = {}  # from rows counted behind the prefix to rows of the pack
        for number in part.branches:
            branch = part.question.branches[number]
            shift[number] = borders[-1] - size
            if len(branch):
                tokens.append(branch)
                positions.append(prefix.positions[-1] + np.arange(1, len(branch) + 1, dtype=np.float32))
                borders.append(borders[-1] + len(branch))
        if borders[-1] > begin + size:
            prefixes.append((begin + size, borders[-1], begin, begin + size))
        for _, found in part.solutions:
            decisions.append(found.rows + np.where(found.rows < size, begin, shift[found.branch]))
    return ScorePack(
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        prefixes=torch.tensor(prefixes, dtype=torch.int32).view(-1, 4),
        visual_rows=torch.from_numpy(np.concatenate(visual_rows)),
        decisions=torch.from_numpy(np.concatenate(decisions)),
    )
