"""A scaled residual branch against its formula: values and gradients, factors, dtypes, strides, threads, compiled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import add_scaled, add_scaled_reference

from .fused_support import ANY_TIME, DTYPES, assert_near, by_threads, poisoned

Case = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """x and branch ``[N, P, C]``, scale ``[C]``, factors ``[N]`` or none, and a gradient like x."""
    tiles, patches = draw(st.integers(0, 5)), draw(st.sampled_from([1, 3, 17, 40]))
    width, dtype = draw(st.sampled_from([1, 2, 7, 8, 9, 31, 64, 100])), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (tiles, patches, width)
    x, branch, grad, scale = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape, shape, (width,)))
    factors = (torch.rand(tiles, generator=generator) * 2).round().to(dtype) / 2 if draw(st.booleans()) else None
    return x, branch, scale, factors, grad


@ANY_TIME
@given(cases())
def test_forward_and_backward_are_the_formula(case: Case) -> None:
    x, branch, scale, factors, grad = case
    wide = [part.double().requires_grad_() for part in (x, branch, scale)]
    wide_factors = None if factors is None else factors.double()
    expected = add_scaled_reference(*wide, wide_factors)
    gradients = torch.autograd.grad(expected, wide, grad.double())
    leaves = [part.clone().requires_grad_() for part in (x, branch, scale)]
    with poisoned():
        y = add_scaled(*leaves, factors)
        found = torch.autograd.grad(y, leaves, grad)
    terms = [part.detach().abs() for part in wide]
    assert_near(y, expected.detach(), x.dtype, add_scaled_reference(*terms, wide_factors))
    assert torch.equal(found[0], grad)
    assert_near(found[1], gradients[1], x.dtype)
    shares = (grad.double() * terms[1]).abs()
    if wide_factors is not None:
        shares = shares * wide_factors[:, None, None]
    # What rounding each term and the partial sums of at most 16 of them comes to.
    assert_near(found[2], gradients[2], x.dtype, 2 * shares.sum((0, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_dimensions_and_strides(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.linspace(0.5, 2.0, 10).to(dtype)
    for x, branch in (whole, whole[:, 0], whole[:, 0, 0], whole.transpose(1, 2), whole.transpose(2, 3)[..., ::2, :]):
        own = scale[: x.shape[-1]]
        assert torch.equal(add_scaled(x, branch, own), add_scaled(x.contiguous(), branch.contiguous(), own))
    assert torch.equal(add_scaled(*whole, scale.repeat_interleave(2)[::2]), add_scaled(*whole, scale))
    branch = whole[1].clone().requires_grad_()
    (found,) = torch.autograd.grad(add_scaled(whole[0], branch, scale).sum(), branch)
    assert torch.equal(found, scale.expand_as(branch))


def test_gradcheck_and_no_second_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    x, branch, scale = (
        torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((3, 2, 5), (3, 2, 5), (5,))
    )
    factors = torch.tensor([0.0, 1.25, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(add_scaled, (x, branch, scale, None))
    assert torch.autograd.gradcheck(lambda *parts: add_scaled(*parts, factors), (x, branch, scale))
    (first,) = torch.autograd.grad(add_scaled(x, branch, scale).sum(), branch, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()


def test_only_wanted_gradients_are_made() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    branch, scale = torch.randn(2, 3, 4), torch.randn(4)
    (found,) = torch.autograd.grad(add_scaled(x, branch, scale).sum(), x)
    assert torch.equal(found, torch.ones(2, 3, 4))
    scale.requires_grad_()
    (found,) = torch.autograd.grad(add_scaled(x.detach(), branch, scale).sum(), scale)
    torch.testing.assert_close(found, branch.sum((0, 1)))


def test_a_wider_scale_widens_as_in_the_reference() -> None:
    x, branch, scale = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16(), torch.randn(8)
    out = add_scaled(x, branch, scale)
    assert out.dtype == torch.float32
    assert torch.equal(out, add_scaled_reference(x, branch, scale))


def test_errors() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="as many numbers as the last dimension"):
        add_scaled(x, x, torch.ones(4))
    with pytest.raises(RuntimeError, match="x must have the shape"):
        add_scaled(torch.ones(3, 3), x, torch.ones(3))
    with pytest.raises(RuntimeError, match="one for each entry of the first dimension"):
        add_scaled(x, x, torch.ones(3), torch.ones(3))


def test_registered_operators_are_sound() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for factors in (None, torch.tensor([0.0, 2.0]).to(dtype)):
            x, branch, grad = (torch.randn(2, 5, 12).to(dtype) for _ in range(3))
            scale = torch.randn(12).to(dtype)
            leaves = tuple(part.clone().requires_grad_() for part in (x, branch, scale))
            torch.library.opcheck(torch.ops.evovlm.add_scaled.default, (*leaves, factors), rtol=1e-5, atol=1e-5)
            torch.library.opcheck(torch.ops.evovlm.add_scaled_backward.default, (grad, branch, scale, factors))


def test_compiled_whole() -> None:
    x, branch, scale = (torch.randn(*s, requires_grad=True) for s in ((2, 3, 8), (2, 3, 8), (8,)))
    factors = torch.tensor([0.0, 1.25])

    def work(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        return add_scaled(x * 2, branch, scale, factors).square().sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, branch, scale), (x, branch, scale))
    for ours, expected in zip(found, torch.autograd.grad(work(x, branch, scale), (x, branch, scale)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (torch.randn(3, 1001, 130, generator=generator) for _ in range(3))
    scale, factors = torch.randn(130, generator=generator), torch.tensor([0.0, 1.25, 1.25])
    first, *others = by_threads(
        lambda: (
            add_scaled(x, branch, scale, factors),
            *torch.ops.evovlm.add_scaled_backward(grad, branch, scale, factors),
        )
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert_near(
        first[2],
        (grad.double() * branch.double() * factors[:, None, None]).sum((0, 1)),
        torch.float32,
        (grad.double() * branch.double() * factors[:, None, None]).abs().sum((0, 1)),
    )
