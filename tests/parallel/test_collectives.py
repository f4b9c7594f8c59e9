"""Differentiable collectives: values against whole tensors, gradients against the adjoint, uneven and empty parts."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from evovlm.parallel.collectives import (
    copy_to_ranks,
    gather_rows,
    part_bounds,
    reduce_from_ranks,
    scatter_rows,
    slice_rows,
)
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

Shape = tuple[int, ...]


def of_rank(rank: int, shape: Shape, what: int) -> Tensor:
    """A tensor that every rank can draw for each rank."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * what + rank))


def run(op: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = op(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


def check_world(world: World) -> list[str]:
    """Run every check; return the names of those that passed."""
    group = dist.group.WORLD
    assert group is not None
    rank, size = world.rank, world.size
    passed = []

    def equal(name: str, ours: Tensor, stated: Tensor) -> None:
        torch.testing.assert_close(ours, stated, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")
        passed.append(name)

    for shape in ((3, 5), (2, 3, 4), (4,), (0, 5)):
        n, rest = shape[0], shape[1:]
        parts = [of_rank(r, shape, 1) for r in range(size)]
        wholes = [of_rank(r, (size * n, *rest), 2) for r in range(size)]
        own = slice(rank * n, (rank + 1) * n)

        out, grad = run(lambda x: gather_rows(x, group), parts[rank], wholes[rank])
        equal(f"gather {shape}", out, torch.cat(parts))
        equal(f"gather gradient {shape}", grad, sum(wholes, torch.zeros(()))[own])

        out, grad = run(lambda x: scatter_rows(x, group), wholes[rank], parts[rank])
        equal(f"scatter {shape}", out, sum(wholes, torch.zeros(()))[own])
        equal(f"scatter gradient {shape}", grad, torch.cat(parts))

        out, grad = run(lambda x: copy_to_ranks(x, group), parts[0], parts[rank])
        equal(f"copy {shape}", out, parts[0])
        equal(f"copy gradient {shape}", grad, sum(parts, torch.zeros(())))

        out, grad = run(lambda x: reduce_from_ranks(x, group), parts[rank], parts[0])
        equal(f"reduce {shape}", out, sum(parts, torch.zeros(())))
        equal(f"reduce gradient {shape}", grad, parts[0])

    for n in (0, 1, 5, 8):
        for bounds in (part_bounds(n, size), [n * r // size for r in range(size + 1)], [0] * size + [n]):
            whole, coefficients = of_rank(0, (n, 2, 3), 3), of_rank(0, (n, 2, 3), 4)
            own = slice(bounds[rank], bounds[rank + 1])
            out, grad = run(lambda x, b=bounds: slice_rows(x, group, b), whole, coefficients[own])
            equal(f"slice {bounds}", out, whole[own])
            equal(f"slice gradient {bounds}", grad, coefficients)
    return passed


def check_inputs(world: World) -> dict[str, Any]:
    """Strided inputs, narrow dtypes and refusals."""
    group = dist.group.WORLD
    assert group is not None
    seen: dict[str, Any] = {}
    strided = of_rank(world.rank, (3, 4), 5).T
    seen["strided"] = all(
        torch.equal(op(strided, group), op(strided.contiguous(), group))
        for op in (gather_rows, scatter_rows, reduce_from_ranks)
    )
    # In bfloat16, 256 + 1 is 256 again: only a wider sum of 256 and 1's is right.
    narrow = torch.full((world.size, 1), 256.0 if world.rank == 0 else 1.0, dtype=torch.bfloat16)
    seen["narrow sums"] = [
        (out.dtype, out.float().unique().tolist())
        for out in (scatter_rows(narrow, group), reduce_from_ranks(narrow, group))
    ]
    kept = narrow.clone()
    reduce_from_ranks(narrow, group)
    seen["input unchanged"] = torch.equal(kept, narrow)
    for name, call in (
        ("scatter", lambda: scatter_rows(torch.ones(2 * world.size + 1, 3), group)),
        ("short", lambda: slice_rows(torch.ones(6, 3), group, [0, 6])),
        ("falling", lambda: slice_rows(torch.ones(6, 3), group, [0, 4, 2, 3, 6])),
        ("end", lambda: slice_rows(torch.ones(6, 3), group, [0, 2, 3, 4, 5])),
    ):
        with pytest.raises(ValueError) as error:
            call()
        seen[name] = str(error.value)
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_gradients(size: int) -> None:
    inputs: dict[str, Any] = {}

    def job(world: World) -> tuple[list[str], dict[str, Any]]:
        return check_world(world), check_inputs(world) if size == 4 else inputs

    for passed, seen in run_ranks(size, job):
        assert len(passed) == 4 * 8 + 4 * 3 * 2
        if size == 4:
            assert seen["strided"]
            assert seen["input unchanged"]
            assert seen["narrow sums"] == [(torch.bfloat16, [260.0])] * 2  # 259 is not a bfloat16, 260 is the nearest
            assert "9 rows cannot be scattered over 4 ranks" in seen["scatter"]
            assert "they must be 5 numbers that rise from 0 to 6" in seen["short"]
            assert "bounds [0, 4, 2, 3, 6] do not divide 6 rows among 4 ranks" in seen["falling"]
            assert "bounds [0, 2, 3, 4, 5] do not divide 6 rows" in seen["end"]


@pytest.mark.parametrize(("num", "parts"), [(0, 3), (1, 4), (5, 4), (7, 3), (8, 4), (9, 4), (11, 2)])
def test_parts_are_those_of_torch_chunk(num: int, parts: int) -> None:
    bounds = part_bounds(num, parts)
    assert len(bounds) == parts + 1
    chunks = [len(chunk) for chunk in torch.arange(num).chunk(parts)]
    assert [high - low for low, high in pairwise(bounds)] == (chunks + [0] * parts)[:parts]
