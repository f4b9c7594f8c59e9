"""Sharding by a table: which modules become units, what each ZeRO level keeps whole, and when it communicates."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout
from evovlm.parallel.sharded_data import accumulate, shard_model, units_of
from evovlm.parallel.world import World


class Tower(nn.Module):
    """A front, two blocks and a head: four units."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TABLE = {"front": "vit", "blocks.*": "llm", "": "llm"}
NUM_UNITS = 4


class Collectives(TorchDispatchMode):
    """Counts c10d operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def test_units_come_innermost_first() -> None:
    assert units_of(Tower(), TABLE) == [("blocks.0", "llm"), ("blocks.1", "llm"), ("front", "vit"), ("", "llm")]


def test_a_star_is_one_path_component() -> None:
    paths = [path for path, _ in units_of(Tower(), {"*.*": "llm"})]
    assert paths == ["blocks.0", "blocks.1"]  # neither front nor blocks.0.0


def test_a_pattern_without_a_module_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no module matches 'layers\.\*' in Tower"):
        units_of(Tower(), {"layers.*": "llm"})


def test_accumulate_needs_a_sharded_model() -> None:
    with pytest.raises(TypeError, match="the model is not sharded: call shard_model first"):
        accumulate(Tower(), TABLE, {"vit": Layout(dp=1), "llm": Layout(dp=1)}, last=True)


def make(zero: Literal[1, 2, 3], world: World, **options: Any) -> tuple[Tower, dict[str, Layout]]:
    torch.manual_seed(0)
    model = Tower().double()
    layouts = {"vit": Layout(dp=world.size, zero=3), "llm": Layout(dp=world.size, zero=zero)}
    shard_model(model, TABLE, layouts, device_type="cpu", **options)
    return model, layouts


def in_two_ranks(job: Callable[[World], Any]) -> Any:
    return run_ranks(2, job)[0]


@pytest.fixture(scope="module")
def observed() -> dict[int, dict[str, Any]]:
    """What each ZeRO level does, seen from inside a world of two ranks."""

    def job(world: World) -> dict[int, dict[str, Any]]:
        seen: dict[int, dict[str, Any]] = {}
        for zero in (1, 2, 3):
            model, layouts = make(zero, world)  # type: ignore[arg-type]
            record: dict[str, Any] = {
                "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
                "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
                "numel": sum(p.to_local().numel() for p in model.parameters()),
                "dtypes": {p.dtype for p in model.parameters()},
            }
            x = torch.arange(12, dtype=torch.float64).reshape(2, 6) * (world.rank + 1) / 10
            for microbatch in range(3):
                accumulate(model, TABLE, layouts, last=microbatch == 2)
                with Collectives() as collectives:
                    loss = model(x + microbatch).square().sum()
                    record["whole after forward"] = {
                        name: not isinstance(next(module.parameters()), DTensor)
                        for name, module in (("front", model.front), ("block", model.blocks[0]))
                    }
                    loss.backward()
                record[f"collectives {microbatch}"] = dict(collectives.counts)
            record["gradients"] = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
            seen[zero] = record
        return seen

    result: dict[int, dict[str, Any]] = in_two_ranks(job)
    return result


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_unit_is_sharded(observed: dict[int, dict[str, Any]], zero: int) -> None:
    record = observed[zero]
    assert sorted(record["units"]) == ["", "blocks.0", "blocks.1", "front"]
    assert record["sharded"]
    total = sum(p.numel() for p in Tower().parameters())
    assert total / 2 <= record["numel"] <= total / 2 + 8  # half, but for a row that does not divide
    assert record["dtypes"] == {torch.float64}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_levels_differ_in_what_stays_whole(observed: dict[int, dict[str, Any]], zero: int) -> None:
    # The front is under ZeRO 3 always; blocks keep their weights after forward under ZeRO 1 and 2.
    assert observed[zero]["whole after forward"] == {"front": False, "block": zero != 3}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_are_reduced_when_the_level_says(observed: dict[int, dict[str, Any]], zero: int) -> None:
    reduced = [
        sum(n for name, n in observed[zero][f"collectives {m}"].items() if "reduce_scatter" in name) for m in range(3)
    ]
    assert reduced == ([1, 1, NUM_UNITS] if zero == 1 else [NUM_UNITS] * 3)


def test_gradients_are_the_mean_over_ranks_whatever_the_level(observed: dict[int, dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = Tower().double()
    for microbatch in range(3):
        for rank in range(2):
            x = torch.arange(12, dtype=torch.float64).reshape(2, 6) * (rank + 1) / 10
            (model(x + microbatch).square().sum() / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for zero in (1, 2, 3):
        torch.testing.assert_close(observed[zero]["gradients"], expected, rtol=1e-12, atol=1e-12)


def test_compute_dtype_leaves_master_weights_reductions_and_inputs_wide() -> None:
    def job(world: World) -> dict[str, set[torch.dtype]]:
        torch.manual_seed(0)
        model = Tower()
        layouts = {name: Layout(dp=world.size) for name in ("vit", "llm")}
        shard_model(model, TABLE, layouts, device_type="cpu", compute_dtype=torch.bfloat16)
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

    seen = in_two_ranks(job)
    assert seen == {
        "inputs": {torch.float32},  # positions pass through here: they must never be cast
        "weights": {torch.bfloat16},
        "out": {torch.bfloat16},
        "masters": {torch.float32},
        "gradients": {torch.float32},
    }
