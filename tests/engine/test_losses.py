"""Chunked weighted cross-entropy against its formula, unchunked, in value and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.data.plan import LossWeighting, loss_weights
from evovlm.engine.losses import IGNORE, Targets, weighted_cross_entropy

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


def test_logits_of_all_rows_never_exist_together() -> None:
    hidden, head, labels, weights = case(2, 40, 1.0)
    hidden.requires_grad_()
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        if tensor.ndim == 2 and tensor.shape[1] == V:
            largest = max(largest, tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = weighted_cross_entropy(hidden, head, Targets.of(labels, weights, CPU), chunk_rows=8)
    assert largest == 0  # logits are not kept for backward at all
    loss.backward()
