"""The fused RMS norm against its reference: forward, backward, dtypes, threads, and the CUDA kernels run on the CPU."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import rms_norm, rms_norm_reference

from .kernel_support import DTYPES, compile_for_host

ANY_TIME = settings(deadline=None, max_examples=60, derandomize=True)
# Of the largest number: what a unit in the last place, or a few of them where sums differ, come to.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 128, 896])

Case = tuple[Tensor, Tensor, Tensor, float]


@st.composite
def cases(draw: st.DrawFn, max_rows: int = 40) -> Case:
    """x ``[rows, H]``, weight ``[H]``, a gradient like x, and epsilon."""
    rows, width, dtype = draw(st.integers(0, max_rows)), draw(WIDTHS), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-2, 1.0, 30.0]))
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((rows, width), (width,), (rows, width)))
    return (x * scale).to(dtype), weight.to(dtype), grad.to(dtype), draw(st.sampled_from([1e-6, 1e-5, 0.1]))


def exact(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> list[tuple[Tensor, float]]:
    """y, dx and dweight in float64, each with the largest sum of the sizes of its terms, some of which may cancel."""
    x, weight, grad = x.double().requires_grad_(), weight.double().requires_grad_(), grad.double()
    y = rms_norm_reference(x, weight, eps)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    with torch.no_grad():
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        sizes = (y.abs(), (grad * weight).abs() * rstd, (grad * x * rstd).abs().sum(0))
    largest = [float(size.max()) if size.numel() else 0.0 for size in sizes]
    return list(zip((y.detach(), dx, dweight), largest, strict=True))


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype, size: float | None = None) -> None:
    if size is None:
        size = float(expected.abs().max())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCES[dtype] * size)


def units_apart(a: Tensor, b: Tensor) -> int:
    """Most representable numbers between two equal-signed results."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.view(kind).long() - b.view(kind).long()).abs().max()) if a.numel() else 0


@ANY_TIME
@given(cases())
def test_forward_and_backward_are_the_formula(case: Case) -> None:
    x, weight, grad, eps = case
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = rms_norm(x, weight, eps)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    found = (y, *torch.autograd.grad(y, (x, weight), grad))
    for ours, (expected, size) in zip(found, exact(x.detach(), weight.detach(), grad, eps), strict=True):
        assert ours.dtype == x.dtype
        assert_near(ours.detach(), expected, x.dtype, size)


@ANY_TIME
@given(cases())
def test_forward_is_the_reference_but_for_the_last_bit(case: Case) -> None:
    x, weight, _, eps = case
    # The reference rounds its mean, the sum with epsilon and the root; here only the root is rounded. Its error
    # goes through two products, each of which may round it up once more.
    assert units_apart(rms_norm(x, weight, eps), rms_norm_reference(x, weight, eps)) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_dimensions_and_strides(dtype: torch.dtype) -> None:
    whole = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.linspace(0.5, 2.0, 12).to(dtype)
    for x, w in ((whole, weight), (whole[0, 0], weight), (whole[:, 1:4], weight), (whole.transpose(0, 1), weight)):
        out = rms_norm(x, w, 1e-6)
        assert out.shape == x.shape
        assert_near(out, rms_norm_reference(x.double(), w.double(), 1e-6), dtype)
    strided = whole[..., ::2]
    assert_near(
        rms_norm(strided, weight[:6], 1e-6), rms_norm_reference(strided.double(), weight[:6].double(), 1e-6), dtype
    )
    # A gradient that is one number everywhere has no memory of its own.
    x = whole[0].clone().requires_grad_()
    rms_norm(x, weight, 1e-6).sum().backward()
    expected, size = exact(whole[0], weight, torch.ones(5, 12), 1e-6)[1]
    assert x.grad is not None
    assert_near(x.grad, expected, dtype, size)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((3, 7), (7,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))
    (first,) = torch.autograd.grad(rms_norm(x, weight, 1e-3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()


def test_a_wider_weight_widens_as_in_the_reference() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.float32
    assert torch.equal(out, rms_norm_reference(x, weight, 1e-6))


def test_not_a_number_stays_in_its_row() -> None:
    for dtype in DTYPES:
        x = torch.ones(3, 9, dtype=dtype)
        x[1, 8] = float("nan")
        out = rms_norm(x, torch.ones(9, dtype=dtype), 0.0)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], torch.ones(2, 9, dtype=dtype))


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="as many numbers as the last dimension"):
        rms_norm(torch.ones(2, 3), torch.ones(4), 0.0)
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        torch.ops.evovlm.rms_norm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), 0.0)


def test_registered_operators_are_sound() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(5, 12).to(dtype).requires_grad_(), torch.randn(12).to(dtype).requires_grad_()
        torch.library.opcheck(torch.ops.evovlm.rms_norm.default, (x, weight, 1e-6), rtol=1e-5, atol=1e-5)
        rstd = torch.ops.evovlm.rms_norm(x.detach(), weight.detach(), 1e-6)[1]
        torch.library.opcheck(
            torch.ops.evovlm.rms_norm_backward.default, (x.detach(), x.detach(), weight.detach(), rstd)
        )


def test_compiled_whole() -> None:
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def work(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x * 2, weight, 1e-6).sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, weight), (x, weight))
    for ours, expected in zip(found, torch.autograd.grad(work(x, weight), (x, weight)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3001, 130, generator=generator) for _ in range(2))
    weight = torch.randn(130, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, rstd = torch.ops.evovlm.rms_norm(x, weight, 1e-6)
            results.append((y, rstd, *torch.ops.evovlm.rms_norm_backward(grad, x, weight, rstd)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for ours, (expected, size) in zip(results[0][2:], exact(x, weight, grad, 1e-6)[1:], strict=True):
        assert_near(ours, expected, torch.float32, size)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("host_norm.cpp", tmp_path_factory.mktemp("norm"))


@ANY_TIME
@given(case=cases(max_rows=12), block=st.integers(1, 5), shared=st.booleans())
def test_cuda_kernels(kernels: ctypes.CDLL, case: Case, block: int, shared: bool) -> None:
    x, weight, grad, eps = case
    rows, width = x.shape
    dtype, wide = x.dtype, width * x.element_size() % 16 == 0
    accumulator = torch.promote_types(dtype, torch.float32)
    nan = float("nan")
    y, dx = torch.full_like(x, nan), torch.full_like(x, nan)
    rstd, parts = (torch.full(shape, nan, dtype=accumulator) for shape in ((rows,), (max(1, -(-rows // block)), width)))
    dweight = torch.full_like(weight, nan)

    def at(*tensors: Tensor) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]

    def long(*numbers: int) -> list[ctypes.c_int64]:
        return [ctypes.c_int64(number) for number in numbers]

    kind = DTYPES.index(dtype)
    kernels.norm(kind, wide, *at(x, weight, y, rstd), *long(rows, width), ctypes.c_double(eps))
    kernels.norm_backward(kind, wide, shared, *at(grad, x, weight, rstd, dx, parts, dweight), *long(rows, block, width))
    for ours, (expected, size) in zip((y, dx, dweight), exact(x, weight, grad, eps), strict=True):
        assert_near(ours, expected, dtype, size)
