"""Cross-entropy of rows of logits against its formula: losses, the gradient in place, extremes, threads, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from evovlm.csrc.ops import cross_entropy_, cross_entropy_reference

from .fused_support import ANY_TIME, assert_near, by_threads, poisoned

Case = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logits ``[n, V]``, labels and weights."""
    rows, width = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 3, 7, 8, 9, 31, 64, 511, 513, 1030]))
    dtype, scale = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from([1e-3, 1.0, 40.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, width, (rows,), generator=generator)
    return logits.to(dtype), labels, torch.rand(rows, generator=generator).to(dtype)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Losses and gradients in float64, through autograd."""
    logits, labels, weights = case[0].double().requires_grad_(), case[1], case[2].double()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@ANY_TIME
@given(cases(), st.booleans())
def test_losses_and_gradients_are_the_formula(case: Case, reference: bool) -> None:
    logits, labels, weights = case
    losses, gradients = exact(case)
    largest = logits.double().abs().amax(1) if logits.numel() else losses
    with poisoned():
        kept = logits.clone()
        forward_only = (
            cross_entropy_reference(kept.clone(), labels, weights, False)
            if reference
            else cross_entropy_(kept, labels, weights, False)
        )
        written = logits.clone()
        found = (cross_entropy_reference if reference else cross_entropy_)(written, labels, weights, True)
    assert torch.equal(kept, logits)
    assert torch.equal(forward_only, found)
    # The logarithm of the sum and the label's logit cancel; a logit's error is one of the probability's exponent.
    assert_near(found, losses, logits.dtype, 4 * weights.double() * (largest + 1))
    assert_near(written, gradients, logits.dtype, (weights.double() * (largest + 2))[:, None].expand_as(gradients))


def test_extremes() -> None:
    weights = torch.ones(1)
    for shift in (-3e38, -1e4, 1e4, 3e38):  # the largest logit is taken off first
        logits = torch.full((1, 12), shift)
        assert float(cross_entropy_(logits, torch.tensor([3]), weights, True)) == pytest.approx(
            2.4849066, abs=abs(shift) * 1e-7
        )
        assert logits[0, [0, 3, 11]].tolist() == pytest.approx([1 / 12, -11 / 12, 1 / 12])
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])  # a column that is masked
    assert float(cross_entropy_(logits, torch.tensor([0]), weights, True)) == pytest.approx(0.6931472)
    assert logits.tolist() == [[-0.5, 0.0, 0.5]]
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 9)
        logits[1, 8] = bad
        losses = cross_entropy_(logits, torch.tensor([0, 0]), torch.ones(2), True)
        assert losses.isnan().tolist() == [False, True]
        assert not logits[0].isnan().any()


def test_errors() -> None:
    logits, labels, weights = torch.zeros(2, 5), torch.tensor([0, 4]), torch.ones(2)
    for label in (-1, 5):
        with pytest.raises(RuntimeError, match=f"label {label} of row 1 is not from 0 to 4"):
            cross_entropy_(logits, torch.tensor([0, label]), weights, True)
    with pytest.raises(RuntimeError, match="labels must be int64, one for each of 2 rows"):
        cross_entropy_(logits, labels[:1], weights, True)
    with pytest.raises(RuntimeError, match="weights must be in the dtype of the logits"):
        cross_entropy_(logits, labels, weights.double(), True)
    with pytest.raises(RuntimeError, match="contiguous"):
        cross_entropy_(torch.zeros(5, 2).T, labels, weights, True)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        cross_entropy_(logits.bfloat16(), labels, weights.bfloat16(), True)
    assert torch.equal(logits, torch.zeros(2, 5))


def test_registered_operator_is_sound() -> None:
    logits, labels, weights = torch.randn(4, 9), torch.tensor([0, 8, 3, 3]), torch.rand(4)
    for gradient in (True, False):
        torch.library.opcheck(torch.ops.evovlm.cross_entropy_.default, (logits.clone(), labels, weights, gradient))
    with FakeTensorMode() as mode:
        losses = cross_entropy_(*(mode.from_tensor(x) for x in (logits, labels, weights)), True)
    assert losses.shape == (4,)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(203, 1501, generator=generator), torch.rand(203, generator=generator)
    labels = torch.randint(0, 1501, (203,), generator=generator)

    def work() -> tuple[Tensor, ...]:
        written = logits.clone()
        return cross_entropy_(written, labels, weights, True), written

    first, *others = by_threads(work)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
