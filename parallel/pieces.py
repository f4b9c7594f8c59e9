"""What each rank holds of a named tensor, said plainly: a box of the whole, at an offset.

    whole [V, H]    ┌──────┬──────┐    Piece(shape=(V, H), offset=(3, 4), local=[2, 4])
                    │ r0   │ r2   │
                    ├──────┼──────┤    tensor parallelism cuts first ("tp"), ZeRO cuts what is left ("shard"),
                    │ r1   │ r3 ◄─┼──  both as torch.chunk does; "replicate" ranks hold copies
                    └──────┴──────┘

Model and optimizer state of any layout is a mapping of names to pieces. Checkpoints write and read boxes, so that
they know nothing of meshes; :func:`gather_pieces` puts tensors together with plain point-to-point messages.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from evovlm.parallel.world import World

_CUTS = ("tp", "shard")
"""Mesh axes that split parameters, in the order in which they do."""


class Box(NamedTuple):
    """Part of a tensor: rows ``offset[d]`` to ``offset[d] + size[d]`` of each dimension d."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Elements in the box; a scalar's box has one."""
        return math.prod(self.size)

    def overlap(self, other: "Box") -> "Box | None":
        """What two boxes of one tensor share, or None."""
        start = tuple(map(max, self.offset, other.offset))
        ends = zip(self.offset, self.size, other.offset, other.size, strict=True)
        size = tuple(min(a + n, b + m) - s for s, (a, n, b, m) in zip(start, ends, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Box") -> "Box":
        """The same box, counted from the start of one around it."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.size)


@dataclass(frozen=True, eq=False)
class Piece:
    """A rank's box of a named tensor.

    Attributes:
        shape: Shape of the whole tensor; ``()`` for a scalar.
        offset: Where the box begins.
        local: The box's elements; a dimension may have size 0 where there are more ranks than rows.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: Tensor

    @property
    def box(self) -> Box:
        """Where the piece lies in the whole."""
        return Box(self.offset, tuple(self.local.shape))


def piece_of(parameter: Tensor) -> Piece:
    """Say which box of a parameter this rank holds; needs no communication.

    Args:
        parameter: A plain tensor (held whole), or a DTensor on a mesh whose axes are named ``replicate``, ``shard``
            and ``tp``, in its sharded state.

    Returns:
        The piece; its ``local`` shares the parameter's memory and is detached.

    Raises:
        ValueError: The DTensor is split in a way that the rule does not know.
    """
    size, offset = list(parameter.shape), [0] * parameter.ndim
    if not isinstance(parameter, DTensor):
        return Piece(tuple(size), tuple(offset), parameter.detach())
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names or ()
    placements = dict(zip(names, parameter.placements, strict=False))
    split = {name: p.dim for name, p in placements.items() if isinstance(p, Shard | _StridedShard)}
    if len(placements) < mesh.ndim or any(
        not placement.is_replicate() and (name not in _CUTS or name not in split)
        for name, placement in placements.items()
    ):
        raise ValueError(
            f"cannot tell which box of a parameter of shape {list(size)} this rank holds: its placements are "
            f"{parameter.placements} on mesh axes {names}; only Shard over {_CUTS} and Replicate are known"
        )
    for axis in _CUTS:
        if axis in split:
            dim = split[axis]
            chunk = -(-size[dim] // mesh.size(names.index(axis)))
            start = min(chunk * mesh.get_local_rank(axis), size[dim])
            offset[dim] += start
            size[dim] = min(chunk, size[dim] - start)
    with torch.no_grad():
        local = parameter.to_local().detach()
    # fully_shard keeps [0, 0] of [6, 0]: where nothing is held, its shape does not matter.
    if list(local.shape) != size and (local.numel() or math.prod(size)):
        raise ValueError(
            f"a parameter of shape {list(parameter.shape)} on mesh axes {names}: this rank should hold {size} at "
            f"{offset}, but holds {list(local.shape)}; shard first over tp, then over shard, both as torch.chunk does"
        )
    return Piece(tuple(parameter.shape), tuple(offset), local)


def write_piece(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's box out of a whole tensor into a parameter, on its device and in its dtype.

    Raises:
        ValueError: The whole tensor has another shape than the parameter.
    """
    piece = piece_of(parameter)
    if tuple(whole.shape) != piece.shape:
        raise ValueError(f"a tensor of shape {list(whole.shape)} cannot fill a parameter of shape {list(piece.shape)}")
    piece.local.copy_(whole[piece.box.slices])


@dataclass(frozen=True)
class Spread:
    """Where a named tensor lies over the ranks.

    Attributes:
        shape: Shape of the whole.
        dtype: Its dtype.
        holders: Each distinct box that is not empty → the ranks that hold it, ascending.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: dict[Box, list[int]]


Description = dict[str, tuple[tuple[int, ...], torch.dtype, Box]]
"""What a rank tells the others of its pieces: name → (shape, dtype, box)."""


def describe(pieces: Mapping[str, Piece]) -> Description:
    """Describe a rank's pieces without their elements."""
    return {name: (piece.shape, piece.local.dtype, piece.box) for name, piece in pieces.items()}


def exchange_spreads(pieces: Mapping[str, Piece], world: World) -> dict[str, Spread]:
    """Tell every rank where each named tensor lies. Collective; see :func:`merge` for order and errors."""
    described: list[Description] = [{}] * world.size
    dist.all_gather_object(described, describe(pieces))
    return merge(described)


def merge(described: Sequence[Description]) -> dict[str, Spread]:
    """Put the ranks' descriptions together.

    Args:
        described: One description per rank, in rank order.

    Returns:
        Name → spread; names in the order in which they appear, rank after rank.

    Raises:
        ValueError: Ranks disagree on a tensor's shape or dtype, or their boxes do not cover it; the message names the
            tensor, the ranks and the numbers.
    """
    spreads: dict[str, Spread] = {}
    first: dict[str, int] = {}
    for rank, own in enumerate(described):
        for name, (shape, dtype, box) in own.items():
            spread = spreads.get(name)
            if spread is None:
                spread = spreads[name] = Spread(shape, dtype, {})
                first[name] = rank
            elif spread.shape != shape or spread.dtype != dtype:
                raise ValueError(
                    f"{name} is {spread.dtype} {list(spread.shape)} on rank {first[name]}, "
                    f"{dtype} {list(shape)} on rank {rank}"
                )
            if box.numel:
                spread.holders.setdefault(box, []).append(rank)
    # A weight and its optimizer state are cut alike: their boxes are counted once.
    counted: dict[tuple[Box, ...], int] = {}
    for name, spread in spreads.items():
        boxes, numel = tuple(spread.holders), math.prod(spread.shape)
        if boxes not in counted:
            counted[boxes] = _covered(spread.shape, boxes)
        if counted[boxes] != numel:
            ranks = sorted({rank for holders in spread.holders.values() for rank in holders})
            listed = f"{ranks[:8]}{' and more' if len(ranks) > 8 else ''}"
            raise ValueError(
                f"the pieces of {name} do not make up the whole: those of ranks {listed} hold {counted[boxes]} of the "
                f"{numel} elements of shape {list(spread.shape)}"
            )
    return spreads


def _covered(shape: tuple[int, ...], boxes: Sequence[Box]) -> int:
    """Count the elements that lie in at least one box, on the grid that the boxes' edges make."""
    if any(box.size == shape for box in boxes):
        return math.prod(shape)
    if not boxes:
        return 0
    edges = [
        sorted({edge for box in boxes for edge in (box.offset[dim], box.offset[dim] + box.size[dim])})
        for dim in range(len(shape))
    ]
    number = [{edge: i for i, edge in enumerate(along)} for along in edges]
    volume = torch.ones((), dtype=torch.int64)
    for along in edges:
        volume = volume[..., None] * torch.tensor([end - start for start, end in pairwise(along)])
    seen = torch.zeros(volume.shape, dtype=torch.bool)
    for box in boxes:
        ends = (start + size for start, size in zip(box.offset, box.size, strict=True))
        seen[tuple(slice(n[a], n[b]) for n, a, b in zip(number, box.offset, ends, strict=True))] = True
    return int(volume[seen].sum())


def gather_pieces(
    pieces: Mapping[str, Piece], world: World, *, everywhere: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield every named tensor whole, one at a time, on the CPU. Collective: every rank must exhaust the stream.

    A name may exist on some ranks only (pipeline stages) or on several as copies: each distinct box travels once, from
    the lowest rank that holds it. A rank needs memory for one tensor (on its device: for one box).

    Args:
        pieces: This rank's pieces.
        world: All ranks of the run; messages go over its device.
        everywhere: Whether every rank gets the tensors. Otherwise rank 0 does, and the stream of the others is
            empty: they must iterate it all the same, since that sends their pieces.

    Returns:
        Pairs of name and whole tensor, in the order of the names on rank 0, then those new on rank 1, and so on.

    Raises:
        ValueError: Ranks disagree on a tensor, or hold only part of it (on every rank, before any is sent).
    """
    for name, spread in exchange_spreads(pieces, world).items():
        receives = everywhere or world.is_main
        whole = torch.empty(spread.shape if receives else 0, dtype=spread.dtype)
        for box, holders in spread.holders.items():
            own = pieces[name].local.to(world.device).contiguous() if world.rank in holders else None
            part = _to_all(own, box, spread, world) if everywhere else _to_main(own, box, spread, world)
            if part is not None:
                whole[box.slices].copy_(part)
        if receives:
            yield name, whole


def _to_all(own: Tensor | None, box: Box, spread: Spread, world: World) -> Tensor | None:
    """Bring a box to every rank."""
    holders = spread.holders[box]
    if len(holders) == world.size:
        return own
    if own is None or world.rank != holders[0]:
        # Holders of copies receive too, but not into their own: gathering changes nothing.
        own = torch.empty(box.size, dtype=spread.dtype, device=world.device)
    dist.broadcast(own, holders[0])
    return own


def _to_main(own: Tensor | None, box: Box, spread: Spread, world: World) -> Tensor | None:
    """Bring a box to rank 0; the others get None."""
    source = spread.holders[box][0]
    if world.rank == 0 and own is None:
        own = torch.empty(box.size, dtype=spread.dtype, device=world.device)
        _message(dist.irecv, own, source)
    elif world.rank == source != 0 and own is not None:
        _message(dist.isend, own, 0)
    return own if world.rank == 0 else None


def _message(operation: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    # As a batch of one: over NCCL a plain send would set up a communicator for each pair of ranks.
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()
