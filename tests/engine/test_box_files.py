"""Boxes on disk: what was saved under one cut is read under any other, bit for bit; damage is named."""

import json
import math
import shutil
import tempfile
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from evovlm.engine import checkpoint as checkpoint_module
from evovlm.engine.box_files import (
    INDEX_FILE,
    BoxFiles,
    box_file,
    read_tensors,
    share_out,
    snapshot,
    write_boxes,
    write_index,
)
from evovlm.engine.checkpoint import load_checkpoint, save_checkpoint
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout
from evovlm.parallel.mesh import build_mesh
from evovlm.parallel.pieces import Piece, describe, merge, piece_of
from evovlm.parallel.world import World

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Cut a tensor into a grid of boxes, some of them empty; some come twice."""
    edges = [sorted([0, n, *draw(st.lists(st.integers(0, n), max_size=2))]) for n in shape]
    boxes = [tuple(slice(a, b) for a, b in box) for box in product(*map(pairwise, edges))]
    copies = draw(st.lists(st.sampled_from(boxes), max_size=2))
    return draw(st.permutations(boxes + copies))


@st.composite
def states(draw: st.DrawFn) -> list[tuple[torch.dtype, tuple[int, ...], list[Any], list[Any]]]:
    """A few tensors, each with the cut that saves it and the cut that loads it."""
    chosen = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=3))
    return [(dtype, shape, draw(grids(shape)), draw(grids(shape))) for dtype, shape in chosen]


def pieces_of(wholes: dict[str, Tensor], cuts: dict[str, list[Any]]) -> list[dict[str, Piece]]:
    """Rank r holds the r-th box of each tensor; ranks beyond a tensor's boxes do not know it."""
    ranks: list[dict[str, Piece]] = [{} for _ in range(max(map(len, cuts.values())))]
    for name, boxes in cuts.items():
        for rank, box in enumerate(boxes):
            offset = tuple(s.start for s in box)
            ranks[rank][name] = Piece(tuple(wholes[name].shape), offset, wholes[name][box])  # a view
    return ranks


def write(folder: Path, ranks: list[dict[str, Piece]]) -> None:
    """Save as the ranks of a world would."""
    table = share_out(merge([describe(own) for own in ranks]))
    for rank, own in enumerate(ranks):
        write_boxes(folder, rank, snapshot(own, table, rank))
    write_index(folder, table)
    (folder / "checkpoint.json").write_text('{"step": 3}')


def stored_bytes(folder: Path) -> int:
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(tensor.numel() * tensor.element_size() for file in files for tensor in file.values())


@settings(deadline=None, max_examples=60)
@given(states())
def test_saved_under_one_grid_loaded_under_another(state: list[Any]) -> None:
    wholes, saved, loaded = {}, {}, {}
    for number, (dtype, shape, cut, other) in enumerate(state):
        name = f"model.tensor {number}"
        wholes[name] = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
        saved[name], loaded[name] = cut, other
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, pieces_of(wholes, saved))
        assert stored_bytes(folder) == sum(w.numel() * w.element_size() for w in wholes.values())  # copies once
        for own in pieces_of({name: torch.zeros_like(whole) for name, whole in wholes.items()}, loaded):
            assert load_checkpoint(folder, own, expected={}) == 3
            for name, piece in own.items():
                assert torch.equal(piece.local, wholes[name][piece.box.slices])
        found = dict(read_tensors(folder, "model."))
        assert all(torch.equal(found[name.removeprefix("model.")], whole) for name, whole in wholes.items())
        assert list(read_tensors(folder, "optimizer.")) == []


WEIGHTS = {"columns": ((7, 6), 0), "rows": ((6, 5), 1), "norm": ((3,), None), "vocabulary": ((5, 3), 0)}
"""Name → shape and the dimension that tensor parallelism cuts."""
SAVED = Layout(dp=2)
OTHERS = (Layout(dp=4), Layout(dp=2, tp=2), Layout(dp=4, shard=2), Layout(tp=4), Layout(pp=2, dp=2))


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, (shape, _) in WEIGHTS.items():
        found[f"model.{name}"] = torch.randn(shape, generator=generator)
        found[f"optimizer.{name}.exp_avg"] = torch.randn(shape, generator=generator)
        found[f"optimizer.{name}.step"] = torch.tensor(4.0)
    return found


def state_of(layout: Layout, world: World, values: dict[str, Tensor]) -> dict[str, Piece]:
    """The state of a model under a layout; with two stages, each has its own half of the parameters."""
    mesh = build_mesh(layout, world.rank, "cpu")
    names = list(WEIGHTS)[mesh.place.pp :: layout.pp]
    model = nn.ParameterDict()
    for name in names:
        value = values[f"model.{name}"].clone()
        if mesh.tensor is not None:
            cut = WEIGHTS[name][1]
            placement = Replicate() if cut is None else Shard(cut)
            value = distribute_tensor(value, mesh.tensor, [placement], src_data_rank=None)
        model[name] = nn.Parameter(value)
    fully_shard(model, mesh=mesh.data)
    state: dict[str, Piece] = {}
    for name in names:
        piece = state[f"model.{name}"] = piece_of(model[name])
        moment = values[f"optimizer.{name}.exp_avg"][piece.box.slices].clone()
        state[f"optimizer.{name}.exp_avg"] = Piece(piece.shape, piece.offset, moment)
        state[f"optimizer.{name}.step"] = Piece((), (), values[f"optimizer.{name}.step"].clone())
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks under ``fully_shard``."""
    run = tmp_path_factory.mktemp("run")
    return run_ranks(2, lambda world: save_checkpoint(run, 9, state_of(SAVED, world, wholes()), world, {}, 1))[0]


def test_saved_by_two_ranks_loaded_by_four_and_back(saved: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        "checkpoint.json",
        *(box_file(rank) for rank in range(2)),
        INDEX_FILE,
    ]

    def job(world: World) -> list[str]:
        wrong = []
        zeros = {name: torch.zeros_like(whole) for name, whole in wholes().items()}
        for number, layout in enumerate(OTHERS):
            state = state_of(layout, world, zeros)
            assert load_checkpoint(saved, state, expected={}) == 9
            right = {name: wholes()[name][piece.box.slices] for name, piece in state.items()}
            wrong += [f"{layout}: {name}" for name in state if not torch.equal(state[name].local, right[name])]
            save_checkpoint(tmp_path / str(number), 9, state, world, {}, 1)
        return wrong

    assert run_ranks(4, job) == [[]] * 4
    for number in range(len(OTHERS)):
        found = dict(read_tensors(tmp_path / str(number) / "checkpoints" / "step-00000009"))
        assert found.keys() == wholes().keys()
        assert all(torch.equal(found[name], whole) for name, whole in wholes().items())


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_cannot_write_stops_them_all(tmp_path: Path, culprit: int) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    def job(world: World) -> str:
        if world.rank == culprit:
            checkpoint_module.write_boxes = full
        with pytest.raises(OSError, match="was not written") as error:
            save_checkpoint(tmp_path, 1, state_of(SAVED, world, wholes()), world, {}, 1)
        return str(error.value)

    folder = tmp_path / "checkpoints" / "step-00000001"
    reason = f"checkpoint {folder} was not written: rank {culprit} failed with OSError: No space left on device"
    assert run_ranks(2, job) == [reason] * 2
    assert not folder.exists()


def whole_pieces(**others: Tensor) -> dict[str, Piece]:
    """State of one process that holds everything; ``others`` replace or add tensors."""
    tensors = {name: torch.zeros_like(whole) for name, whole in wholes().items()} | others
    return {name: Piece(tuple(t.shape), (0,) * t.ndim, t) for name, t in tensors.items()}


def error_of_loading(path: Path, kind: type[Exception], **others: Tensor) -> str:
    state = whole_pieces(**others)
    with pytest.raises(kind) as error:
        load_checkpoint(path, state, expected={})
    if "does not fit" in str(error.value):
        assert all(not piece.local.any() for piece in state.values())  # nothing was filled
    return str(error.value).removeprefix(f"checkpoint {path} ")


def test_another_model_is_named(saved: Path) -> None:
    zeros = torch.zeros
    for others, message in (
        ({"model.vocabulary": zeros(8, 3)}, "model.vocabulary has 5 rows there, 8 here"),
        ({"model.columns": zeros(7, 5)}, "model.columns has shape [7, 6] there, [7, 5] here"),
        ({"model.norm": zeros(())}, "model.norm has shape [3] there, [] here"),
        ({"model.extra": zeros(2)}, "it has no model.extra, which has shape [2] here"),
        ({"optimizer.extra.exp_avg": zeros(2)}, "it has no optimizer.extra.exp_avg, which has shape [2] here"),
        (
            {"optimizer.norm.exp_avg_sq": zeros(3)},
            "it has no optimizer.norm.exp_avg_sq: norm was frozen when it was saved and is trained here; freeze the "
            "same modules, or export it and start a new run from its weights",
        ),
        (
            {"model.norm": zeros(3, dtype=torch.bfloat16)},
            "model.norm is torch.float32 there, torch.bfloat16 here, which would lose digits",
        ),
    ):
        assert error_of_loading(saved, ValueError, **others) == f"does not fit this run: {message}"
    many = {f"model.{letter}": zeros(1) for letter in "abcde"}
    assert error_of_loading(saved, ValueError, **many).endswith("model.c, which has shape [1] here; and 2 more")


def test_wider_state_takes_narrower_tensors(saved: Path) -> None:
    state = whole_pieces(**{"model.norm": torch.zeros(3, dtype=torch.float64)})
    load_checkpoint(saved, state, expected={})
    assert torch.equal(state["model.norm"].local, wholes()["model.norm"].double())


def test_damage_is_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(saved, folder))

    (fresh() / box_file(1)).unlink()
    missing = "is damaged: its shard rank-00001.safetensors is missing"
    assert error_of_loading(folder, FileNotFoundError) == missing
    with pytest.raises(FileNotFoundError, match=r"rank-00001\.safetensors is missing"):
        list(read_tensors(folder))
    (fresh() / INDEX_FILE).unlink()
    assert error_of_loading(folder, FileNotFoundError) == "is damaged: its index tensors.json is missing"
    whole_file = (fresh() / box_file(1)).read_bytes()
    (folder / box_file(1)).write_bytes(whole_file[: len(whole_file) // 2])
    assert error_of_loading(folder, ValueError).startswith("is damaged: rank-00001.safetensors, ")
    for text in ("{", "[]", '{"model.norm": {"shape": [3]}}', '{"a": {"shape": [], "dtype": "eval", "boxes": []}}'):
        (fresh() / INDEX_FILE).write_text(text)
        assert error_of_loading(folder, ValueError).startswith("is damaged: tensors.json is not an index (")
    index = json.loads((fresh() / INDEX_FILE).read_text())
    index["model.norm"]["boxes"].pop()
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert error_of_loading(folder, ValueError) == "is damaged: its boxes of model.norm hold 2 of the 3 elements at [0]"
    boxes = load_file(fresh() / box_file(0))
    save_file(boxes | {"model.norm": torch.zeros(1)}, folder / box_file(0))
    assert error_of_loading(folder, ValueError) == (
        "is damaged: model.norm in rank-00000.safetensors has shape [1], tensors.json says [2]"
    )
    del boxes["model.norm"]
    save_file(boxes, folder / box_file(0))
    assert error_of_loading(folder, ValueError).startswith("is damaged: rank-00000.safetensors, model.norm: ")


def test_dtypes_that_are_not_stored_are_refused() -> None:
    described = describe({"mask": Piece((2,), (0,), torch.zeros(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match=r"mask is torch\.complex64; a checkpoint stores float64, float32"):
        share_out(merge([described]))


def test_ranks_with_copies_share_the_work() -> None:
    described = [describe({f"w{n}": Piece((4,), (0,), torch.zeros(4)) for n in range(6)})] * 3
    writers = [stored.boxes[0][0] for stored in share_out(merge(described)).values()]
    assert writers == [0, 1, 2, 0, 1, 2]


def test_a_snapshot_is_a_copy() -> None:
    weight = torch.zeros(4)
    pieces = {"w": Piece((4,), (0,), weight)}
    taken = snapshot(pieces, share_out(merge([describe(pieces)])), 0)
    weight += 1
    assert not taken["w"].any()


def test_reading_takes_whole_tensors_one_at_a_time(saved: Path) -> None:
    files = BoxFiles(saved)
    assert torch.equal(files.read("model.columns"), wholes()["model.columns"])
    assert [rank for rank, _ in files.tensors["model.columns"].boxes] == [0, 1]
