"""Chunked weighted cross-entropy against its formula, unchunked, in value and gradient; whole and split over ranks."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from evovlm.data.step_plan import LossWeighting, loss_weights
from evovlm.engine.losses import IGNORE, Targets, weighted_cross_entropy
from evovlm.parallel.collectives import part_bounds
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.tensor import shard_tensors
from evovlm.parallel.world import World

CPU = torch.device("cpu")
V, H = 11, 5


def case(seed: int, rows: int, supervised: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64)
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= supervised] = IGNORE
    return hidden, head, labels, torch.rand(rows, generator=generator)


def stated(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Σ w·(log Σ exp(z) − z_label), row by row."""
    total = hidden.sum() * 0
    for x, label, weight in zip(hidden, labels.tolist(), weights.tolist(), strict=True):
        if label != IGNORE:
            logits = head @ x
            total = total + weight * (logits.exp().sum().log() - logits[label])
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 25), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1, 2, 7, 2048]))
def test_chunks_equal_the_formula(seed: int, rows: int, supervised: float, chunk_rows: int) -> None:
    results = []
    for chunked in (True, False):
        hidden, head, labels, weights = case(seed, rows, supervised)
        hidden.requires_grad_()
        head.requires_grad_()
        if chunked:
            targets = Targets.of(labels, weights, CPU)
            loss = weighted_cross_entropy(hidden, head, targets, chunk_rows=chunk_rows)
        else:
            loss = stated(hidden, head, labels, weights)
        results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, head], allow_unused=not chunked)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 2048])
def test_no_supervised_row_is_zero_with_a_gradient(chunk_rows: int) -> None:
    hidden, head, labels, weights = case(0, 6, 0.0)
    hidden.requires_grad_()
    head.requires_grad_()
    loss = weighted_cross_entropy(hidden, head, Targets.of(labels, weights, CPU), chunk_rows=chunk_rows)
    assert loss.item() == 0
    loss.backward()  # a rank without a target must still run its backward collectives
    assert torch.equal(hidden.grad, torch.zeros(6, H, dtype=torch.float64))
    assert torch.equal(head.grad, torch.zeros(V, H, dtype=torch.float64))


def test_targets_are_the_rows_with_a_label() -> None:
    labels = torch.tensor([IGNORE, 0, 7, IGNORE, 3])  # 0 is a label like any other
    targets = Targets.of(labels, torch.tensor([9.0, 1.0, 2.0, 9.0, 3.0]), CPU)
    assert targets.rows.tolist() == [1, 2, 4]
    assert targets.labels.tolist() == [0, 7, 3]
    assert targets.weights.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("weighting", "per_token", "totals"),
    [("token", (1, 1), (4, 16)), ("sample", (1 / 4, 1 / 16), (1, 1)), ("square", (1 / 2, 1 / 4), (2, 4))],
)
def test_example_of_the_spec(
    weighting: LossWeighting, per_token: tuple[float, float], totals: tuple[float, float]
) -> None:
    # Spec §3.5: two samples with 4 and 16 supervised tokens; uniform logits make every CE equal log V.
    counts = [4, 16]
    weights = loss_weights(counts, weighting)
    assert weights.tolist() == list(per_token)
    rows = torch.repeat_interleave(torch.from_numpy(weights), torch.tensor(counts)).float()
    labels = torch.arange(20) % V
    for chunk_rows in (3, 2048):
        loss = weighted_cross_entropy(
            torch.zeros(20, H, dtype=torch.float64),
            torch.ones(V, H, dtype=torch.float64),
            Targets.of(labels, rows, CPU),
            chunk_rows=chunk_rows,
        )
        assert loss.item() == pytest.approx(sum(totals) * math.log(V))
        assert loss.item() / sum(totals) == pytest.approx(math.log(V))


@pytest.mark.parametrize("chunk_rows", [4, 2048])
def test_narrow_inputs_give_a_float32_loss(chunk_rows: int) -> None:
    hidden, head, labels, weights = case(1, 30, 1.0)
    targets = Targets.of(labels, weights, CPU)
    narrow = weighted_cross_entropy(hidden.bfloat16(), head.bfloat16(), targets, chunk_rows=chunk_rows)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(weighted_cross_entropy(hidden, head, targets).item(), rel=0.02)


def test_the_heads_gradient_is_added_up_in_float32() -> None:
    # Every row adds 0.5 to one row of the head's gradient: a bfloat16 sum would stop growing at 128.
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = Targets.of(torch.zeros(1024, dtype=torch.int64), torch.ones(1024), CPU)
    weighted_cross_entropy(torch.ones(1024, 1, dtype=torch.bfloat16), head, targets, chunk_rows=1).backward()
    assert head.grad is not None
    assert head.grad.tolist() == [[-512.0], [512.0]]


@pytest.mark.parametrize("label", [-1, V])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    hidden, head, labels, weights = case(3, 6, 1.0)
    labels[4] = label
    with pytest.raises(RuntimeError, match=f"labels must be from 0 to {V - 1}"):
        weighted_cross_entropy(hidden, head, Targets.of(labels, weights, CPU))


class LargestLogits(TorchDispatchMode):
    """Records the most rows of any tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == V:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_logits_of_all_rows_never_exist_together() -> None:
    hidden, head, labels, weights = case(2, 40, 1.0)
    hidden.requires_grad_()
    head.requires_grad_()
    targets = Targets.of(labels, weights, CPU)
    with LargestLogits() as whole:
        weighted_cross_entropy(hidden, head, targets).backward()
    with LargestLogits() as chunked:
        weighted_cross_entropy(hidden, head, targets, chunk_rows=8).backward()
    assert whole.rows == 40
    assert chunked.rows == 8


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wants_hidden", "wants_head"), [(True, True), (True, False), (False, True), (False, False)])
def test_logits_are_computed_once_and_only_wanted_gradients_with_them(wants_hidden: bool, wants_head: bool) -> None:
    hidden, head, labels, weights = case(4, 9, 1.0)
    targets = Targets.of(labels, weights, CPU)
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    whole = torch.autograd.grad(weighted_cross_entropy(*leaves, targets), leaves)
    hidden.requires_grad_(wants_hidden)
    head.requires_grad_(wants_head)
    with Products() as products:
        loss = weighted_cross_entropy(hidden, head, targets, chunk_rows=3)
        if wants_hidden or wants_head:
            loss.backward()
    assert products.count == 3 * (1 + wants_hidden + wants_head)
    for leaf, wanted, expected in zip((hidden, head), (wants_hidden, wants_head), whole, strict=True):
        assert (leaf.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
    with Products() as products, torch.no_grad():  # evaluation
        torch.testing.assert_close(weighted_cross_entropy(hidden, head, targets, chunk_rows=3), loss.detach())
    assert products.count == 3


def test_only_the_gradients_are_held_until_backward() -> None:
    hidden, head, labels, weights = case(5, 40, 1.0)
    hidden.requires_grad_()
    head.requires_grad_()
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        weighted_cross_entropy(hidden, head, Targets.of(labels, weights, CPU), chunk_rows=8)
    floats = [tuple(x.shape) for x in held if x.is_floating_point()]
    assert sorted(floats) == [(V, H), (40, H)]


def test_backward_in_two_halves_and_never_twice() -> None:
    results = []
    for halves in (True, False):
        hidden, head, labels, weights = case(6, 9, 1.0)
        hidden.requires_grad_()
        head.requires_grad_()
        loss = weighted_cross_entropy(hidden * 2, head, Targets.of(labels, weights, CPU)) * 3
        if halves:  # as zero-bubble schedules do
            (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            results.append((first, *torch.autograd.grad(loss, head, retain_graph=True)))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, head)
        else:
            results.append(torch.autograd.grad(loss, (hidden, head)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_narrow_inputs(dtype: torch.dtype) -> None:
    hidden, head, labels, weights = case(7, 30, 0.8)
    narrow = [x.to(dtype).requires_grad_() for x in (hidden, head)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    targets = Targets.of(labels, weights, CPU)
    for leaves in (narrow, wide):
        (weighted_cross_entropy(*leaves, targets, chunk_rows=7) / 1e3).backward()
    for ours, exact in zip(narrow, wide, strict=True):
        assert ours.grad is not None
        assert exact.grad is not None
        assert ours.grad.dtype == dtype
        assert float((ours.grad.double() - exact.grad).abs().max()) < 0.02 * float(exact.grad.abs().max())


def split_and_whole(world: World, seed: int) -> None:
    """Compare one drawn case, split over all ranks, with the formula: loss, gradients of hidden states and head."""
    generator = torch.Generator().manual_seed(seed)
    vocab, per_rank, chunk_rows = (int(torch.randint(1, high, (), generator=generator)) for high in (20, 6, 9))
    while part_bounds(vocab, world.size)[-2] == vocab:
        vocab += 1  # every rank must hold some of it
    rows = per_rank * world.size
    hidden, head = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (rows, vocab))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < (0.0, 0.4, 1.0)[seed % 3]] = IGNORE
    weights = torch.rand(rows, generator=generator)
    whole_hidden, whole_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    expected = stated(whole_hidden, whole_head, labels, weights) + whole_head.sum() * 0
    (expected * 3).backward()
    assert whole_hidden.grad is not None
    assert whole_head.grad is not None

    mesh = DeviceMesh("cpu", torch.arange(world.size))
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(H, vocab, bias=False, dtype=torch.float64)})
    model["head"].weight.data = head
    shard_tensors(model, {"head": "head"}, mesh)
    own = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    part = hidden[own].clone().requires_grad_()
    targets = Targets.of(labels, weights, CPU)
    loss = weighted_cross_entropy(part, model["head"].weight, targets, group=mesh.get_group(), chunk_rows=chunk_rows)
    (loss * 3).backward()
    bounds = part_bounds(vocab, world.size)
    ours = (loss, part.grad, model["head"].weight.grad.to_local())
    whole = (expected, whole_hidden.grad[own], whole_head.grad[bounds[world.rank] : bounds[world.rank + 1]])
    for got, wanted in zip(ours, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=lambda text: f"seed {seed}: {text}")


@pytest.mark.parametrize("size", [2, 4])
def test_split_vocabulary_and_rows_equal_the_formula(size: int) -> None:
    def job(world: World) -> list[float]:
        for seed in range(40):
            split_and_whole(world, seed)
        mesh = DeviceMesh("cpu", torch.arange(size))
        hidden, head, labels, weights = case(0, 6, 1.0)
        with pytest.raises(ValueError, match=r"output head \[11, 5\] must be split .* but is a plain tensor"):
            weighted_cross_entropy(hidden, head, Targets.of(labels, weights, CPU), group=mesh.get_group())
        return [
            weighted_cross_entropy(
                torch.full((3, H), 30.0 * sign),  # logits of ±150: the exponentials need the maximum of all ranks
                DTensor.from_local(torch.full((2, H), float(world.rank)), mesh, (Shard(0),), run_check=False),
                Targets(torch.tensor([0]), torch.tensor([0]), torch.ones(1)),
                group=mesh.get_group(),
            ).item()
            for sign in (1, -1)
        ]

    for large, small in run_ranks(size, job):
        assert large == pytest.approx(150.0 * (size - 1) + math.log(2))
        assert small == pytest.approx(math.log(2))
