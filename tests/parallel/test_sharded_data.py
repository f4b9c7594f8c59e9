"""FSDP2 by blocks: which modules become units, what each ZeRO level keeps whole, and when it communicates."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, Zero
from evovlm.parallel.mesh import ModuleMesh, build_mesh
from evovlm.parallel.pieces import piece_of
from evovlm.parallel.sharded_data import (
    accumulate,
    accumulate_unordered,
    find_modules,
    finish,
    free,
    matches,
    shard_module,
    units_of,
)
from evovlm.parallel.world import World


class Tower(nn.Module):
    """A front, two blocks and a head: with the blocks as units, three units."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


NUM_UNITS, NUM_MICROBATCHES = 3, 3
BLOCK_NUMEL = 8 * 8 + 8


class Collectives(TorchDispatchMode):
    """Counts c10d operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def of(self, kind: str) -> int:
        """Count the operators with a word in their name."""
        return sum(count for name, count in self.counts.items() if kind in name)


# --- Paths and patterns ----------------------------------------------------------------------------------------------


def test_a_star_is_one_path_component() -> None:
    assert matches("blocks.0.norm", "blocks.*.norm")
    assert not matches("blocks.0.attn.norm", "blocks.*.norm")
    assert not matches("blocks.0", "blocks.*.norm")
    assert [path for path, _ in find_modules(Tower(), "*.*")] == ["blocks.0", "blocks.1"]  # not front, not blocks.0.0


def test_units_come_in_the_order_of_the_table_then_of_the_model() -> None:
    table = {"blocks.*": "rowwise", "front": "colwise"}
    assert units_of(Tower(), table) == [("blocks.0", "rowwise"), ("blocks.1", "rowwise"), ("front", "colwise")]


def test_a_pattern_without_a_module_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no module matches 'layers\.\*' in Tower"):
        units_of(Tower(), {"layers.*": "colwise"})


def test_finish_needs_a_sharded_module() -> None:
    with pytest.raises(TypeError, match="the module is not sharded: call shard_module first"):
        finish(Tower())


# --- Under each ZeRO level -------------------------------------------------------------------------------------------


def make(mesh: ModuleMesh, blocks: str | None = "blocks.*", **options: Any) -> Tower:
    torch.manual_seed(0)
    model = Tower().double()
    shard_module(model, blocks, mesh, **options)
    return model


def draw(rank: int, microbatch: int) -> torch.Tensor:
    return torch.arange(12, dtype=torch.float64).reshape(2, 6) * (rank + 1) / 10 + microbatch


def expected_gradients(ranks: int) -> dict[str, torch.Tensor]:
    """Of one process: the sum over ranks and microbatches."""
    torch.manual_seed(0)
    model = Tower().double()
    for microbatch in range(NUM_MICROBATCHES):
        for rank in range(ranks):
            model(draw(rank, microbatch)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(model: Tower, ranks: int) -> float:
    expected = expected_gradients(ranks)
    errors = [
        (p.grad.to_local() - expected[name][piece_of(p).box.slices]).abs().flatten()
        if isinstance(p.grad, DTensor)
        else torch.tensor([torch.inf])
        for name, p in model.named_parameters()
    ]
    return float(torch.cat(errors).max())


def is_whole(module: nn.Module) -> bool:
    return not isinstance(next(module.parameters()), DTensor)


def run_step(model: Tower, mesh: ModuleMesh, rank: int, *, ordered: bool) -> dict[str, Any]:
    """One step of three microbatches; what is whole when, and what each part of it sends."""
    sent = []
    seen: dict[str, Any] = {}
    if not ordered:
        accumulate_unordered(model, mesh)
    for microbatch in range(NUM_MICROBATCHES):
        if ordered:
            accumulate(model, mesh, last=microbatch == NUM_MICROBATCHES - 1)
        with Collectives() as forward:
            loss = model(draw(rank, microbatch)).square().sum()
        seen["after forward"] = is_whole(model.blocks[0])
        with Collectives() as backward:
            loss.backward()
        seen["after backward"] = [*seen.get("after backward", []), is_whole(model.blocks[0])]
        sent.append((forward.of("allgather"), backward.of("allgather"), backward.of("reduce_scatter")))
        seen["all-reduces"] = seen.get("all-reduces", 0) + backward.of("allreduce")
    with Collectives() as end:
        if not ordered:
            finish(model)
    return seen | {
        "sent": sent,
        "at the end": end.of("reduce_scatter"),
        "whole at the end": is_whole(model.blocks[0]),
        "all-reduces": seen["all-reduces"] + end.of("allreduce"),
    }


def two_ranks(world: World) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for zero in (1, 2, 3):
        mesh = build_mesh(Layout(dp=2, zero=zero), world.rank, "cpu")
        for ordered in (True, False):
            model = make(mesh)
            seen[f"{zero} {ordered}"] = run_step(model, mesh, world.rank, ordered=ordered) | {
                "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
                "numel": sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)),
                "dtypes": {p.dtype for p in model.parameters()},
                "error": gradient_error(model, 2),
            }
            for p in model.parameters():
                p.grad = None
            run_step(model, mesh, world.rank, ordered=ordered)
            seen[f"{zero} {ordered}"]["error of a second step"] = gradient_error(model, 2)
        with torch.no_grad():
            model(draw(world.rank, 0))
        whole = is_whole(model.head), is_whole(model.blocks[0])
        free(model)
        seen[f"{zero} evaluation"] = whole, (is_whole(model.head), is_whole(model.blocks[0]))
    for limit in (BLOCK_NUMEL, BLOCK_NUMEL + 1):
        model = make(mesh, min_unit=limit)
        seen[f"min_unit {limit}"] = sum(isinstance(module, FSDPModule) for module in model.modules())
    model = make(mesh, None)
    seen["no blocks"] = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    seen["narrow"] = narrow(mesh)
    return seen


def narrow(mesh: ModuleMesh) -> dict[str, set[torch.dtype]]:
    """Dtypes of float32 masters that compute in bfloat16."""
    model = Tower()
    shard_module(model, "blocks.*", mesh, compute_dtype=torch.bfloat16)
    inputs: set[torch.dtype] = set()
    weights: set[torch.dtype] = set()

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs.add(args[0].dtype)
        weights.add(module.weight.dtype)
        return (args[0].to(module.weight.dtype),)

    model.front.register_forward_pre_hook(watch)
    out = model(torch.ones(2, 6))
    out.float().sum().backward()
    return {
        "inputs": inputs,
        "weights": weights,
        "out": {out.dtype},
        "masters": {p.dtype for p in model.parameters()},
        "gradients": {p.grad.dtype for p in model.parameters() if p.grad is not None},
    }


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(2, two_ranks)[0]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_block_and_the_rest_are_sharded(two: dict[str, Any], zero: Zero) -> None:
    record = two[f"{zero} True"]
    assert record["units"] == ["", "blocks.0", "blocks.1"]
    total = sum(p.numel() for p in Tower().parameters())
    assert total / 2 <= record["numel"] <= total / 2 + 8  # half, but for a row that does not divide
    assert record["dtypes"] == {torch.float64}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_are_sums_over_ranks_and_microbatches(two: dict[str, Any], zero: Zero, ordered: bool) -> None:
    record = two[f"{zero} {ordered}"]
    assert record["error"] < 1e-11
    assert record["error of a second step"] < 1e-11


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_levels_differ_in_what_stays_whole_and_when_they_reduce(two: dict[str, Any], zero: Zero, ordered: bool) -> None:
    record = two[f"{zero} {ordered}"]
    assert record["after forward"] == (zero != 3)
    assert record["after backward"] == [zero != 3, zero != 3, zero != 3 and not ordered]
    assert not record["whole at the end"]
    gathers = [(forward, backward) for forward, backward, _ in record["sent"]]
    # Once for a step, or under ZeRO 3 for each use; the root, too.
    assert gathers == ([(NUM_UNITS, NUM_UNITS)] * 3 if zero == 3 else [(NUM_UNITS, 0), (0, 0), (0, 0)])
    reduced = [reduces for _, _, reduces in record["sent"]]
    if zero > 1:
        assert (reduced, record["at the end"]) == ([NUM_UNITS] * 3, 0)
    elif ordered:
        assert (reduced, record["at the end"]) == ([0, 0, NUM_UNITS], 0)
    else:
        assert (reduced, record["at the end"]) == ([0, 0, 0], NUM_UNITS)
    assert record["all-reduces"] == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_weights_left_whole_by_an_evaluation_are_freed(two: dict[str, Any], zero: Zero) -> None:
    assert two[f"{zero} evaluation"] == ((zero != 3,) * 2, (False, False))


def test_blocks_below_the_smallest_unit_join_the_root(two: dict[str, Any]) -> None:
    assert two[f"min_unit {BLOCK_NUMEL}"] == NUM_UNITS
    assert two[f"min_unit {BLOCK_NUMEL + 1}"] == 1
    assert two["no blocks"] == [""]


def test_compute_dtype_leaves_master_weights_reductions_and_inputs_wide(two: dict[str, Any]) -> None:
    assert two["narrow"] == {
        "inputs": {torch.float32},  # positions pass through here: they must never be cast
        "weights": {torch.bfloat16},
        "out": {torch.bfloat16},
        "masters": {torch.float32},
        "gradients": {torch.float32},
    }


def test_copies_of_hybrid_zero_are_added_up_once_a_step() -> None:
    def job(world: World) -> dict[Zero, dict[str, Any]]:
        seen: dict[Zero, dict[str, Any]] = {}
        for zero in (1, 2, 3):
            mesh = build_mesh(Layout(dp=4, shard=2, zero=zero), world.rank, "cpu")
            model = make(mesh)
            seen[zero] = run_step(model, mesh, world.rank, ordered=True) | {"error": gradient_error(model, 4)}
        return seen

    for seen in run_ranks(4, job):
        for record in seen.values():
            assert record["error"] < 1e-11
            assert record["all-reduces"] == NUM_UNITS
