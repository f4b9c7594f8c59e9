"""Shared prefixes of a pack: which queries see which keys besides their segment, as rectangles that are checked once.

    rows of a pack      0 ──── p ────── r ─────── L ──── T       prefixes int32 [n, 4], here [[p, L, 0, p]]:
    segments            prefix │ chosen │ rejected │ other       query start, query end, key start, key end
                        keys     queries

Chosen and rejected see all of the prefix, besides themselves, but not each other.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Rectangle = tuple[int, int, int, int]
"""Rows of a pack: first query, one past the last query, first key, one past the last key."""

Range = tuple[int, int]


def list_prefixes(prefixes: Sequence[Sequence[int]] | Tensor, borders: Sequence[int]) -> list[Rectangle]:
    """Read the rectangles of a pack and check them.

    Args:
        prefixes: ``[n, 4]``, on the host: query start and end, key start and end, in rows of the pack.
        borders: Segment borders, S + 1 rising integers from 0 to T.

    Returns:
        The rectangles.

    Raises:
        ValueError: They are on a device or not ``[n, 4]``; one is empty or leaves the pack; its keys do not all come
            before the segment in which its queries begin; or its queries overlap or precede those before.
    """
    if isinstance(prefixes, Tensor):
        if prefixes.device.type != "cpu":
            raise ValueError(f"prefixes must stay on the host, got a tensor on {prefixes.device}")
        if prefixes.ndim != 2 or prefixes.shape[1] != 4 or prefixes.is_floating_point():
            raise ValueError(
                f"prefixes must be integers [n, 4] (query start, query end, key start, key end), "
                f"got {prefixes.dtype} {list(prefixes.shape)}"
            )
        prefixes = prefixes.tolist()
    listed: list[Rectangle] = []
    last, segment = 0, 0
    for number, rectangle in enumerate(prefixes):
        if len(rectangle) != 4:
            raise ValueError(f"prefix {number} must be 4 numbers, got {list(rectangle)}")
        query_start, query_end, key_start, key_end = rectangle
        name = f"prefix {number} (queries {query_start} … {query_end}, keys {key_start} … {key_end})"
        if not (0 <= key_start < key_end and query_start < query_end <= borders[-1]):
            raise ValueError(f"{name} is empty or leaves the pack of T = {borders[-1]} rows")
        if query_start < key_end:
            raise ValueError(
                f"{name}: its queries must come after its keys, but begin {key_end - query_start} rows early"
            )
        if query_start < last:
            raise ValueError(f"{name} begins before row {last}, where the queries of prefix {number - 1} end")
        while borders[segment + 1] <= query_start:
            segment += 1
        if borders[segment] < key_end:
            raise ValueError(
                f"{name}: its queries begin in segment {segment} (rows {borders[segment]} … {borders[segment + 1]}), "
                f"which must begin at row {key_end} or later, or these queries would see keys twice"
            )
        last = query_end
        listed.append((query_start, query_end, key_start, key_end))
    return listed


class Rectangles:
    """The rectangles of a pack as arguments of attention: rows that lie side by side, and their borders.

    Args:
        prefixes: int32 ``[n, 4]``; see :func:`list_prefixes`.
        borders: Segment borders of the pack.

    Attributes:
        source: What they were made from, as integers.
        queries: Row ranges of the queries, one for each rectangle.
        keys: Row ranges of the keys.
        cu_q: int32 ``[n + 1]`` on the host, borders of the queries of each rectangle when they lie side by side.
        cu_k: Likewise of keys.
    """

    def __init__(self, prefixes: Tensor, borders: list[int]) -> None:
        listed = list_prefixes(prefixes, borders)
        self.source: tuple[list[list[int]], list[int]] = (prefixes.tolist(), borders)
        self.queries: list[Range] = [rectangle[:2] for rectangle in listed]
        self.keys: list[Range] = [rectangle[2:] for rectangle in listed]
        self.cu_q, self.cu_k = (
            torch.tensor([0, *accumulate(end - start for start, end in ranges)], dtype=torch.int32)
            for ranges in (self.queries, self.keys)
        )


def rectangles_of(prefixes: Tensor, cu_seqlens: Tensor) -> Rectangles:
    """Rectangles of a tensor, checked: those made before for the same tensor, which keeps them as long as it lives.

    So all layers of a microbatch check them once, and have their borders on a device once.
    """
    if prefixes.device.type != "cpu" or cu_seqlens.device.type != "cpu":
        raise ValueError(
            "prefixes and borders must stay on the host: reading them from a device would stall every layer"
        )
    borders = cu_seqlens.tolist()
    made: Rectangles | None = getattr(prefixes, "evovlm_rectangles", None)
    if made is None or made.source != (prefixes.tolist(), borders):
        made = Rectangles(prefixes, borders)
        setattr(prefixes, "evovlm_rectangles", made)  # noqa: B010 - no attribute that a tensor is known to have
    return made
