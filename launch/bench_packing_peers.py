"""Other packing algorithms, written anew in Python as their originals are, to be measured beside ours.

    samples in order ─► next_fit        one open pack
                     ─► greedy_buffer   InternVL's PackedDataset: a short list of open packs, first fit
    longest first    ─► best_fit        TRL's `pack_dataset(strategy="bfd")`: any number of open packs, no tile budget

Each takes tokens int [n] and tiles int [n] of the samples and gives the pack int64 [n] of each.
"""

from collections import deque
from itertools import count

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int32]


def next_fit(tokens: Array, tiles: Array, max_tokens: int, max_tiles: int) -> NDArray[np.int64]:
    """Fill one pack in the order given; when a sample does not fit, close it and open the next."""
    number, used_tokens, used_tiles = 0, 0, 0
    pack_of = []
    for length, num_tiles in zip(tokens.tolist(), tiles.tolist(), strict=True):
        used_tokens += length
        used_tiles += num_tiles
        if used_tokens > max_tokens or used_tiles > max_tiles:
            number, used_tokens, used_tiles = number + 1, length, num_tiles
        pack_of.append(number)
    return np.array(pack_of, np.int64)


def greedy_buffer(tokens: Array, tiles: Array, max_tokens: int, max_tiles: int, buffer_size: int) -> NDArray[np.int64]:
    """InternVL's greedy buffer (spec §3.6), not strict, without overflow, one worker.

    Open packs stand in a list, most tiles first. A sample goes into the first in which it fits. A pack leaves when it
    is full in tokens or in tiles, or, as the one with most tiles, when the list is longer than ``buffer_size``. A
    sample without an image counts as one tile: the original gives it a dummy tile.
    """
    numbers = count()
    pack_of = []
    opened: list[tuple[int, int, int]] = []  # tiles, tokens, number
    for length, real_tiles in zip(tokens.tolist(), tiles.tolist(), strict=True):
        num_tiles = real_tiles or 1
        for place, (used_tiles, used_tokens, _) in enumerate(opened):
            if used_tiles + num_tiles <= max_tiles and used_tokens + length <= max_tokens:
                used_tiles, used_tokens, number = opened.pop(place)
                break
        else:
            used_tiles, used_tokens, number = 0, 0, next(numbers)
        pack_of.append(number)
        used_tiles += num_tiles
        used_tokens += length
        if used_tokens == max_tokens or used_tiles == max_tiles:
            continue
        fewer = (place for place, pack in enumerate(opened) if pack[0] < used_tiles)
        opened.insert(next(fewer, len(opened)), (used_tiles, used_tokens, number))
        if len(opened) > buffer_size:
            opened.pop(0)
    return np.array(pack_of, np.int64)


def best_fit(tokens: Array, tiles: Array, max_tokens: int, max_tiles: int) -> NDArray[np.int64]:  # noqa: ARG001
    """TRL's best fit decreasing: a segment tree over free tokens, the first of the packs that have as many.

    It knows no tiles; what it packs may break their budget.
    """
    half = 1 << (max_tokens - 1).bit_length()
    tree = [0] * (2 * half)  # leaf f - 1: f if a pack has f free tokens, else 0; each node: the largest below

    def write(free: int, value: int) -> None:
        node = half + free - 1
        tree[node] = value
        while node > 1:
            node >>= 1
            left, right = tree[2 * node], tree[2 * node + 1]
            tree[node] = left if left > right else right

    write(max_tokens, max_tokens)  # an empty pack can always be opened
    waiting: dict[int, deque[int]] = {}
    numbers = count()
    order = np.argsort(-tokens, kind="stable")
    pack_of = np.empty(len(tokens), np.int64)
    for sample, length in zip(order.tolist(), tokens[order].tolist(), strict=True):
        node = 1
        while node < half:
            node *= 2
            node += tree[node] < length
        free = tree[node]
        if free == max_tokens:
            number = next(numbers)
        else:
            number = waiting[free].popleft()
            if not waiting[free]:
                write(free, 0)
        pack_of[sample] = number
        if length < free:
            waiting.setdefault(free - length, deque()).append(number)
            write(free - length, free - length)
    return pack_of
