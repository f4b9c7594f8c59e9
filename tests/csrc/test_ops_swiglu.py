"""The gate of an MLP against its formula: values and gradients, dtypes, strides, extremes, threads, compiled whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from evovlm.csrc.ops import swiglu, swiglu_reference

from .fused_support import ANY_TIME, DTYPES, assert_near, by_threads, poisoned

Case = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """gate, up and a gradient, ``[rows, F]`` each."""
    shape = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 7, 8, 9, 31, 64, 100]))
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1e-3, 1.0, 8.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gate, up, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    return (gate * scale).to(dtype), up.to(dtype), grad.to(dtype)


@ANY_TIME
@given(cases())
def test_forward_and_backward_are_the_formula(case: Case) -> None:
    gate, up, grad = case
    wide = [x.double().requires_grad_() for x in (gate, up)]
    expected = swiglu_reference(*wide)
    dgate, dup = torch.autograd.grad(expected, wide, grad.double())
    gate, up = gate.requires_grad_(), up.requires_grad_()
    with poisoned():
        y = swiglu(gate, up)
        found = torch.autograd.grad(y, (gate, up), grad)
    assert_near(y, expected.detach(), gate.dtype)
    # 1 + g · (1 − s) passes through 0 near −1.28: its terms say how far rounding carries.
    g, s = gate.detach().double(), gate.detach().double().sigmoid()
    assert_near(
        found[0], dgate, gate.dtype, (grad.double() * up.detach().double() * s).abs() * (1 + (g * (1 - s)).abs())
    )
    assert_near(found[1], dup, gate.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    both = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert torch.equal(swiglu(both.T[:20], both.T[20:]), swiglu(gate, up).T)
    # A gradient that is one number everywhere has no memory of its own.
    gate = gate.clone().requires_grad_()
    found = torch.autograd.grad(swiglu(gate, up).sum(), gate)
    assert torch.equal(found[0], torch.autograd.grad(swiglu(gate, up), gate, torch.ones_like(gate))[0])


def test_extremes() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 88.0, 100.0, 1e4, 0.0, float("nan")])
    ones = torch.ones(8)
    assert_near(swiglu(gate, ones)[:-1], torch.tensor([0.0, 0.0, 0.0, 88.0, 100.0, 1e4, 0.0]).double(), torch.float32,
                torch.ones(7).double())  # fmt: skip
    assert swiglu(gate, ones)[-1].isnan()
    dgate, _ = torch.ops.evovlm.swiglu_backward(ones, gate, ones)
    assert_near(dgate[:-1], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5]).double(), torch.float32,
                torch.ones(7).double())  # fmt: skip
    assert dgate[-1].isnan()


def test_gradcheck_and_no_second_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 7, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    (first,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()


def test_other_inputs_take_the_composition() -> None:
    gate, up = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        gate, up = (DTensor.from_local(x, mesh, [Replicate()]) for x in (up, up + 1))
        out = swiglu(gate, up)
        assert isinstance(out, DTensor)
        assert torch.equal(out.to_local(), swiglu_reference(gate.to_local(), up.to_local()))
    finally:
        torch.distributed.destroy_process_group()


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="up must have the shape"):
        swiglu(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        swiglu(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))


def test_registered_operators_are_sound() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, grad = (torch.randn(5, 12).to(dtype) for _ in range(3))
        given_both = (gate.clone().requires_grad_(), up.clone().requires_grad_())
        torch.library.opcheck(torch.ops.evovlm.swiglu.default, given_both, rtol=1e-5, atol=1e-5)
        torch.library.opcheck(torch.ops.evovlm.swiglu_backward.default, (grad, gate, up))


def test_compiled_whole() -> None:
    gate, up = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16, requires_grad=True)

    def work(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate * 2, up).sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(gate, up), (gate, up))
    for ours, expected in zip(found, torch.autograd.grad(work(gate, up), (gate, up)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    gate, up, grad = (torch.randn(1003, 131, generator=torch.Generator().manual_seed(i)) for i in range(3))
    first, *others = by_threads(lambda: (swiglu(gate, up), *torch.ops.evovlm.swiglu_backward(grad, gate, up)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
