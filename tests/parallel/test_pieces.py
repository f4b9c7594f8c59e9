"""Pieces: the box that we say a rank holds is the one that fully_shard gave it; gathering puts wholes together."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout
from evovlm.parallel.mesh import build_mesh
from evovlm.parallel.pieces import Box, Piece, describe, gather_pieces, merge, piece_of, write_piece
from evovlm.parallel.world import World

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "columns": ((7, 6), 0),  # uneven under tp 2, and what is left uneven under ZeRO
    "rows": ((6, 7), 1),
    "vocabulary": ((5, 3), 0),  # over tp 4: 2, 2, 1 and no rows
    "norm": ((3,), None),  # fewer rows than ranks
    "bias": ((1,), None),
    "even": ((16, 2), 0),
}
"""Name → shape and the dimension that tensor parallelism cuts."""

LAYOUTS = {
    8: [
        Layout(dp=2, hp=2, tp=2, shard=2),  # 2 × 2 × 2: replicate, shard, tp
        Layout(dp=4, tp=2),
        Layout(dp=2, tp=4),
        Layout(cp=8),
        Layout(dp=8, shard=4),
        Layout(dp=2, tp=4, shard=1),
        Layout(tp=8),
        Layout(pp=2, dp=2, tp=2),
    ],
    4: [Layout(dp=4), Layout(dp=2, tp=2), Layout(dp=4, shard=2)],
    2: [Layout(dp=2), Layout(tp=2)],
    1: [Layout()],
}


def wholes() -> dict[str, Tensor]:
    """No number appears twice, so that values say where they come from."""
    start, found = 1, {}
    for name, (shape, _) in SHAPES.items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return found


def sharded(layout: Layout, world: World) -> nn.ParameterDict:
    mesh = build_mesh(layout, world.rank, "cpu")
    model = nn.ParameterDict()
    for name, whole in wholes().items():
        cut = SHAPES[name][1]
        if mesh.tensor is not None:
            placement = Replicate() if cut is None else Shard(cut)
            whole = distribute_tensor(whole, mesh.tensor, [placement], src_data_rank=None)
        model[name] = nn.Parameter(whole)
    return fully_shard(model, mesh=mesh.data)


def tp_only(layout: Layout, world: World) -> dict[str, Tensor]:
    """Parameters as they are before ``fully_shard``, and a plain one."""
    mesh = build_mesh(layout, world.rank, "cpu").tensor
    assert mesh is not None
    split = {name: SHAPES[name][1] for name in ("columns", "rows", "norm")}
    return {
        "plain": torch.ones(3),
        **{
            name: distribute_tensor(
                wholes()[name], mesh, [Replicate() if cut is None else Shard(cut)], src_data_rank=None
            )
            for name, cut in split.items()
        },
    }


def check_layout(layout: Layout, world: World) -> int:
    model, empty = sharded(layout, world), 0
    for name, whole in wholes().items():
        parameter = model[name]
        assert isinstance(parameter, DTensor)
        piece = piece_of(parameter)
        assert piece.shape == tuple(whole.shape)
        assert not piece.local.requires_grad
        assert torch.equal(piece.local, whole[piece.box.slices])
        empty += piece.local.numel() == 0
        write_piece(parameter, -whole.float())
        assert torch.equal(parameter.to_local(), -whole[piece.box.slices])  # the same memory, cast
        with pytest.raises(ValueError, match="cannot fill a parameter of shape"):
            write_piece(parameter, torch.cat([whole, whole]))
    pieces = {name: piece_of(parameter) for name, parameter in model.named_parameters()}
    found = dict(gather_pieces(pieces, world, everywhere=True))
    assert list(found) == list(SHAPES)
    assert all(torch.equal(found[name], -whole) for name, whole in wholes().items())
    if layout.tp > 1:
        for name, parameter in tp_only(layout, world).items():
            piece = piece_of(parameter)
            whole = wholes().get(name, torch.ones(3))
            assert torch.equal(piece.local, whole[piece.box.slices])
            assert piece.local.numel() == whole.numel() or name in ("columns", "rows")
    return empty


def partial_stream(world: World) -> list[tuple[str, Tensor]]:
    """Stages: "first" on rank 0 alone, "last" on the last, "copies" on all, "halves" over all, in float16."""
    R, rank = world.size, world.rank
    grid = torch.arange(3 * R, dtype=torch.float16).reshape(R, 3)
    pieces = {
        "copies": Piece((2,), (0,), torch.tensor([1, 2])),
        "halves": Piece((R, 3), (rank, 0), grid[rank : rank + 1].t().contiguous().t()),  # not contiguous
        "step": Piece((), (), torch.tensor(5.0)),
        "empty": Piece((0, 4), (0, 0), torch.empty(0, 4)),
    }
    if rank == 0:
        pieces["first"] = Piece((2, 2), (0, 0), torch.eye(2))
    if rank in (0, R - 1):  # copies that differ: the lowest rank's counts, and the other's stays what it is
        pieces["pair"] = Piece((1,), (0,), torch.tensor([float(rank)]))
    if rank == R - 1:
        pieces = {"last": Piece((4,), (0,), torch.full((4,), 7.0)), **pieces}
    kept = {name: piece.local.clone() for name, piece in pieces.items()}
    streams = [list(gather_pieces(pieces, world, everywhere=where)) for where in (False, True)]
    assert all(torch.equal(pieces[name].local, value) for name, value in kept.items())
    everywhere = dict(streams[1])
    assert torch.equal(everywhere["halves"], grid)
    assert everywhere["pair"].item() == (0 if R > 2 else rank)  # what every rank holds does not travel
    assert torch.equal(everywhere["last"], torch.full((4,), 7.0))
    assert len(streams[0]) == (7 if rank == 0 else 0)
    return streams[0]


def gap(world: World) -> str:
    pieces = {"weight": Piece((world.size + 1, 2), (world.rank, 0), torch.zeros(1, 2))}
    with pytest.raises(ValueError, match="do not make up the whole") as error:
        list(gather_pieces(pieces, world))
    return str(error.value)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_real_worlds(size: int) -> None:
    def job(world: World) -> tuple[list[int], list[tuple[str, Tensor]], str]:
        return [check_layout(layout, world) for layout in LAYOUTS[size]], partial_stream(world), gap(world)

    results = run_ranks(size, job)
    assert size < 4 or any(sum(empty) for empty, _, _ in results)  # ranks without rows did occur
    stream = dict(results[0][1])
    assert list(stream) == (
        ["last", "copies", "halves", "step", "empty", "first", "pair"]
        if size == 1
        else ["copies", "halves", "step", "empty", "first", "pair", "last"]
    )
    assert torch.equal(stream["halves"], torch.arange(3 * size, dtype=torch.float16).reshape(size, 3))
    assert torch.equal(stream["first"], torch.eye(2))
    assert stream["step"].item() == 5.0
    assert stream["empty"].shape == (0, 4)
    assert {message for _, _, message in results} == {
        f"the pieces of weight do not make up the whole: those of ranks {list(range(size))} hold {2 * size} of the "
        f"{2 * size + 2} elements of shape [{size + 1}, 2]"
    }


boxes_of_5_by_4 = st.builds(
    lambda a, b, n, m: Box((a, b), (min(n, 5 - a), min(m, 4 - b))), *[st.integers(0, 4)] * 2, *[st.integers(0, 5)] * 2
)


@given(st.lists(boxes_of_5_by_4, max_size=6))
def test_gaps_are_counted(boxes: list[Box]) -> None:
    seen = {cell for box in boxes for cell in product(*[range(s.start, s.stop) for s in box.slices])}
    described = [describe({"w": Piece((5, 4), box.offset, torch.zeros(box.size))}) for box in boxes]
    if len(seen) == 20 or not boxes:
        assert list(merge(described)) == ["w"] * bool(boxes)
    else:
        with pytest.raises(ValueError, match=f" hold {len(seen)} of the 20 elements"):
            merge(described)


@given(boxes_of_5_by_4, boxes_of_5_by_4)
def test_overlaps(a: Box, b: Box) -> None:
    grid = torch.arange(20).reshape(5, 4)
    common = sorted({*grid[a.slices].flatten().tolist()} & {*grid[b.slices].flatten().tolist()})
    shared = a.overlap(b)
    if shared is None:
        assert not common
    else:
        assert grid[shared.slices].flatten().tolist() == common
        assert torch.equal(grid[a.slices][shared.within(a).slices], grid[shared.slices])
        assert shared.numel == len(common)


def test_ranks_that_disagree_are_named() -> None:
    one, two = ({"w": Piece((n,), (0,), torch.zeros(n))} for n in (2, 3))
    with pytest.raises(ValueError, match=r"w is torch.float32 \[2\] on rank 1, torch.float32 \[3\] on rank 2"):
        merge([{}, describe(one), describe(two)])
