"""Equal work for ranks that wait for each other: packs over data-parallel ranks, images over encoders.

    packs   ▇▇▇ ▇▇ ▇▇ ▇ …  ─► assignment [R, M]    as many packs on every rank, Σ cost alike; then Σ tokens alike
    images  ▇▇ ▇ ▇ ▇ …     ─► pieces on encoders   Σ tiles alike; whole unless a cut is needed; at home if that is free

Both start from longest processing time first (Graham, 1969) and swap items between ranks until the proven lower bound
is met (to 1/65,536), no swap of one or two items lowers the largest load, or a counted amount of work is done. The
loops are C++ (``csrc/balance.cpp``) on integers: every machine gives the same answer.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evovlm.csrc import _plan

_MOST, _MOST_OF_ONE = 1 << 62, 1 << 60
"""Sums and numbers up to these can be doubled and subtracted in int64."""


@dataclass(frozen=True, eq=False)
class PackBalance:
    """Where each pack of a step goes.

    Attributes:
        assignment: int32 ``[R, M]``, the pack of each rank and microbatch; a rank's dearest pack is in microbatch 0.
        largest: Cost of the rank that has most to do.
        bound: No assignment with M packs on each rank has a smaller ``largest``.
    """

    assignment: NDArray[np.int32]
    largest: int
    bound: int


@dataclass(frozen=True, eq=False)
class ImageBalance:
    """Which encoder encodes which tiles: P pieces, sorted by (image, first). A whole image is one piece.

    Attributes:
        image: int32 ``[P]``.
        first: int32 ``[P]``, first of the image's tiles that belong to the piece.
        tiles: int32 ``[P]``, their number, at least 1.
        encoder: int32 ``[P]``.
        largest: Tiles of the encoder that has most to do.
        bound: No assignment has a smaller ``largest``: of whole images if none was cut, of single tiles otherwise.
        home_tiles: Tiles encoded at their image's home; 0 if no homes were given.
        node_tiles: Tiles encoded in the node of their image's home, those at home included; 0 if no homes were given.
    """

    image: NDArray[np.int32]
    first: NDArray[np.int32]
    tiles: NDArray[np.int32]
    encoder: NDArray[np.int32]
    largest: int
    bound: int
    home_tiles: int
    node_tiles: int


def balance_packs(costs: ArrayLike, ranks: int, microbatches: int, tokens: ArrayLike | None = None) -> PackBalance:
    """Share packs out so that the largest cost of a rank is least.

    Inside a rank the dearest pack comes first: ranks meet in collectives in every microbatch, where all then have packs
    of about the same cost. Swaps that leave the R dearest packs in microbatch 0, the next R in microbatch 1, … come
    before others. Last, without raising any of these costs, packs are swapped for equally many tokens on every rank.

    The bound is the largest of what the mean, the dearest packs together with the cheapest, and pigeonholes imply (the
    proofs stand in ``packs_bound``), raised to the next sum that costs with their common divisor can make. With one or
    two microbatches the result meets it.

    Args:
        costs: Integers ``[R · M]``, at least 0.
        ranks: Data-parallel ranks R.
        microbatches: Packs of each rank, M.
        tokens: Integers ``[R · M]``, real tokens of each pack, at least 0; None: costs alone count.

    Raises:
        ValueError: Not R · M packs; no integers; a number below 0 or above 2**60, or a sum above 2**62.
    """
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"{ranks} ranks and {microbatches} microbatches: there must be at least 1 of each")
    cost_of = _numbers(costs, "costs", ranks, microbatches)
    tokens_of = np.empty(0, np.int64) if tokens is None else _numbers(tokens, "tokens", ranks, microbatches)
    return PackBalance(*_plan.balance_packs(cost_of, ranks, microbatches, tokens_of))


def balance_images(
    tiles: ArrayLike,
    encoders: int,
    home: ArrayLike | None = None,
    node_size: int = 0,
    tolerance: float = 0.005,
    split: bool = True,
) -> ImageBalance:
    """Share images out so that the largest number of tiles of an encoder is least.

    Images stay whole unless that leaves an encoder with more than ``max(⌊(1 + tolerance) · mean⌋, ⌈mean⌉)`` tiles. Then
    each overloaded encoder in turn hands its excess to those with most room: a whole image of just that size if it has
    one, else a part of its largest, and of that one again if more must go.

    With ``home``, whole images of equal size then change places with each other: as many as possible to their home, as
    many of the others as possible into the home's node. The number of tiles of every encoder stays what it was.

    Args:
        tiles: Integers ``[I]``, tiles of each image, 1 to 2**20; I may be 0.
        encoders: Data-parallel ranks of the ViT.
        home: Integers ``[I]``, the encoder beside the rank that trains on the image's pack.
        node_size: Successive encoders that share a node; 0: all do.
        tolerance: Part of the mean by which the largest may exceed it before images are cut.
        split: Whether images may be cut.

    Raises:
        ValueError: A number is out of its range, or ``home`` is of another length.
    """
    if encoders < 1 or node_size < 0 or not 0 <= tolerance < math.inf:
        raise ValueError(
            f"{encoders} encoders, node_size {node_size}, tolerance {tolerance}: there must be at least 1 encoder, and "
            "nothing below 0 or endless"
        )
    sizes = _int32(tiles, "tiles")
    homes = np.empty(0, np.int32) if home is None else _int32(home, "home")
    if home is not None and len(homes) != len(sizes):
        raise ValueError(f"{len(homes)} homes of {len(sizes)} images: give one home for each image")
    total = int(sizes.sum(dtype=np.int64))
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"{total} tiles in one step; at most 2**31 - 1 can be planned")
    # Exact: a float product could round to the other side of a whole number of tiles.
    limit = max(min(int((1 + Fraction(str(tolerance))) * total / encoders), total), -(-total // encoders))
    return ImageBalance(*_plan.balance_images(sizes, encoders, homes, node_size or encoders, limit, split))


def _numbers(values: ArrayLike, name: str, ranks: int, microbatches: int) -> NDArray[np.int64]:
    """One number of at least 0 for each of R · M packs."""
    array = _integers(values, name)
    if array.shape != (ranks * microbatches,):
        raise ValueError(
            f"{name} of shape {list(array.shape)}: {ranks} ranks x {microbatches} microbatches need "
            f"{ranks * microbatches} packs"
        )
    least = int(array.argmin())
    if array[least] < 0:
        raise ValueError(f"{name}: pack {least} has {array[least]}, which is below 0")
    total = array.sum(dtype=np.float64)  # cannot wrap
    if total > _MOST or array.max() > _MOST_OF_ONE:
        raise ValueError(
            f"{name} of up to {array.max()}, {total:.4g} in all: at most 2**60 and 2**62; use a larger unit"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _int32(values: ArrayLike, name: str) -> NDArray[np.int32]:
    array = _integers(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} of shape {list(array.shape)}: a vector is needed")
    if array.size and array.dtype != np.int32 and (array.max() >= 1 << 31 or array.min() < -1 << 31):
        raise ValueError(f"{name}: {array.min()} to {array.max()} do not fit into int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def _integers(values: ArrayLike, name: str) -> NDArray[np.signedinteger | np.unsignedinteger]:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array
