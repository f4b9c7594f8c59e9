"""Random packs of ordinary segments and of groups with a shared prefix, and the same packs with nothing shared.

shared      prefix │ branch │ branch │ other          rows 0 … T
unshared    prefix + branch │ prefix + branch │ other rows `source`: where each of them stands in the shared pack
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class PrefixPack:
    """A pack of groups: ``(n,)`` is a segment of n rows, ``(p, b, c, …)`` a prefix of p rows and its branches."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def borders(self) -> list[int]:
        return [0, *accumulate(length for group in self.groups for length in group)]

    @property
    def starts(self) -> list[int]:
        """First row of each group, and T."""
        return [0, *accumulate(sum(group) for group in self.groups)]

    @property
    def prefixes(self) -> list[tuple[int, int, int, int]]:
        return [
            (start + group[0], end, start, start + group[0])
            for group, (start, end) in zip(self.groups, pairwise(self.starts), strict=True)
            if len(group) > 1
        ]

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs, counted one by one."""
        return int(self.allowed.sum())

    @property
    def allowed(self) -> Tensor:
        """bool ``[T, T]``: which query sees which key, row by row from what the groups mean."""
        allowed = torch.zeros(self.borders[-1], self.borders[-1], dtype=torch.bool)
        for group, start in zip(self.groups, self.starts, strict=False):
            first = start
            for number, length in enumerate(group):
                for row in range(first, first + length):
                    allowed[row, first : row + 1] = True
                    if number:
                        allowed[row, start : start + group[0]] = True
                first += length
        return allowed

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Borders int32 ``[S + 1]`` and prefixes int32 ``[n, 4]``."""
        return (
            torch.tensor(self.borders, dtype=torch.int32),
            torch.tensor(self.prefixes, dtype=torch.int32).view(-1, 4),
        )

    def unshared(self) -> tuple[list[int], Tensor, Tensor]:
        """Borders, ``source`` int64 (row of the shared pack), and which rows come first from theirs."""
        borders, source, first = [0], list[int](), list[bool]()
        for group, start in zip(self.groups, self.starts, strict=False):
            prefix, branches = (group[0], group[1:]) if len(group) > 1 else (0, group)
            at = start + prefix
            for number, length in enumerate(branches):
                source += [*range(start, start + prefix), *range(at, at + length)]
                first += [number == 0] * prefix + [True] * length
                at += length
                borders.append(len(source))
        return borders, torch.tensor(source), torch.tensor(first)


@st.composite
def prefix_packs(draw: st.DrawFn, rows: int | None = None, longest: int = 40) -> PrefixPack:
    """Any pack; with ``rows`` one of exactly so many, the last segment filling it up."""
    length = st.one_of(st.integers(1, 3), st.integers(1, longest))
    group = st.one_of(
        length.map(lambda n: (n,)),
        st.tuples(length, length, length),
        st.lists(length, min_size=2, max_size=5).map(tuple),
    )
    groups = draw(st.lists(group, min_size=1, max_size=4))
    if rows is not None:
        while sum(map(sum, groups)) > rows:
            groups.pop()
        rest = rows - sum(map(sum, groups))
        groups += [(rest,)] if rest else []
        groups = draw(st.permutations(groups))
    return PrefixPack(tuple(groups))
