"""Copies and sums of rows against indexing, on the CPU and as CUDA kernels run there; gradients, errors, threads."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import drop_rows, gather_rows, scatter_rows, scatter_rows_, sum_rows

from .kernel_support import DTYPES, compile_for_host

ANY_TIME = settings(deadline=None, max_examples=60, derandomize=True)
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 8, 17, 64, 100, 896])


@st.composite
def matrices(draw: st.DrawFn, rows: int, dtype: torch.dtype, width: int) -> Tensor:
    """``[rows, width]`` within a wider matrix: rows are apart, and begin at any element."""
    left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    whole = torch.randn(rows, left + width + right, generator=generator).to(dtype)
    return whole[:, left : left + width]


@st.composite
def cases(draw: st.DrawFn, *, unique: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[N, H]``, index ``[n]``, rows ``[n, H]``."""
    num_rows, dtype, width = draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES)), draw(WIDTHS)
    index = draw(st.lists(st.integers(0, num_rows - 1), max_size=60, unique=unique))
    x, rows = draw(matrices(num_rows, dtype, width)), draw(matrices(len(index), dtype, width))
    return x, torch.tensor(index, dtype=torch.int64), rows


def summed(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """State :func:`sum_rows` row by row; 16-bit rows are summed in float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(num_rows, rows.shape[1], dtype=wide)
    for i, row in enumerate(index.tolist()):
        out[row] += rows[i].to(wide)
    return out.to(rows.dtype)


def poison(rows: int, like: Tensor) -> Tensor:
    return torch.full((rows, like.shape[1]), float("nan"), dtype=like.dtype)


@ANY_TIME
@given(cases(unique=False))
def test_gather_is_indexing_and_sum_is_adding(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, rows = case
    assert torch.equal(gather_rows(x, index), x[index])
    out = poison(len(index), x)
    assert gather_rows(x, index, out=out) is out
    assert torch.equal(out, x[index])
    assert torch.equal(sum_rows(rows, index, len(x)), summed(rows, index, len(x)))
    assert torch.equal(sum_rows(rows, index, len(x), out=poison(len(x), x)), summed(rows, index, len(x)))


@ANY_TIME
@given(cases(unique=True))
def test_scatter_is_index_copy(case: tuple[Tensor, Tensor, Tensor]) -> None:
    base, index, rows = case
    expected, before = base.index_copy(0, index, rows), base.clone()
    assert torch.equal(scatter_rows(base, index, rows), expected)
    assert torch.equal(base, before)
    assert torch.equal(drop_rows(base, index), base.index_fill(0, index, 0))
    whole = torch.full((len(base), base.shape[1] + 2), 7.0, dtype=base.dtype)
    part = whole[:, 1:-1].copy_(base)
    assert scatter_rows_(part, index, rows) is part
    assert torch.equal(part, expected)
    assert (whole[:, [0, -1]] == 7).all()


def test_large_copies_take_the_same_rows() -> None:
    # Beyond the size from which results are written past the caches, at odd addresses.
    x = torch.randn(3000, 1001)[:, 1:]
    index = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    rows = gather_rows(x, index)
    assert torch.equal(rows, x[index])
    assert torch.equal(sum_rows(rows, index, 3000), x)
    assert torch.equal(scatter_rows(x, index[:2000], rows[:2000]), x)


def test_any_dtype_is_copied() -> None:
    x = torch.arange(12).reshape(4, 3)
    index = torch.tensor([2, 0])
    assert torch.equal(gather_rows(x, index), x[index])
    assert torch.equal(sum_rows(x[index], index, 4), x * torch.tensor([1, 0, 1, 0])[:, None])
    with pytest.raises(RuntimeError, match="only float32, float64, bfloat16 and float16 rows can be added"):
        sum_rows(x, torch.tensor([0, 0, 1, 1]), 4)


def test_errors_name_the_numbers() -> None:
    x, two = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match=r"gather_rows: index\[1\] is 3, but there are 3 rows"):
        gather_rows(x, torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match=r"sum_rows: index\[0\] is -1, but there are 3 rows"):
        sum_rows(two, torch.tensor([-1, 0]), 3)
    for scatter in (scatter_rows, scatter_rows_):
        with pytest.raises(RuntimeError, match=r"index\[0\] and index\[1\] are both 2; each row can be written once"):
            scatter(x, torch.tensor([2, 2]), two)
        with pytest.raises(RuntimeError, match="1 row numbers for 2 rows"):
            scatter(x, torch.tensor([2]), two)
        with pytest.raises(RuntimeError, match="different dtypes"):
            scatter(x, torch.tensor([1, 2]), two.double())
        with pytest.raises(RuntimeError, match="rows of 3 channels for a matrix of 4"):
            scatter(x, torch.tensor([1, 2]), two[:, 1:])
    with pytest.raises(RuntimeError, match="must be a vector of int64"):
        gather_rows(x, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="must be a matrix, got 1 dimensions"):
        gather_rows(x[0], torch.tensor([0]))


@pytest.mark.parametrize("rows", [0, 3])
def test_gradients_and_theirs(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, part = (torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (5, rows))
    unique, repeated = torch.tensor([3, 0, 4])[:rows], torch.tensor([1, 4, 1])[:rows]
    checks: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda a: gather_rows(a, repeated), (x,)),
        (lambda b: sum_rows(b, repeated, 5), (part,)),
        (lambda a, b: scatter_rows(a, unique, b), (x, part)),
        (lambda a: drop_rows(a, unique), (x,)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda a, b: scatter_rows_(a * 2, unique, b), (x, part))


def test_a_leaf_is_not_written_in_place() -> None:
    leaf = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        scatter_rows_(leaf, torch.tensor([0]), torch.ones(1, 2))


def test_writing_in_place_into_a_frozen_base() -> None:
    # Embeddings that are not trained, visual tokens that are.
    rows = torch.ones(2, 3, requires_grad=True)
    out = scatter_rows_(torch.zeros(4, 3), torch.tensor([3, 1]), rows)
    (out * torch.arange(4.0)[:, None]).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [3.0, 1.0]


def test_registered_operators_are_sound() -> None:
    x, rows = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    index = torch.tensor([4, 0, 2])
    ops = torch.ops.evovlm
    for op, arguments in (
        (ops.gather_rows, (x, index)),
        (ops.sum_rows, (rows, index, 5)),
        (ops.scatter_rows, (x, index, rows)),
        (ops.drop_rows, (x, index)),
        (ops.gather_rows_into, (x.detach(), index, torch.empty(3, 4))),
        (ops.sum_rows_into, (rows.detach(), index, torch.empty(5, 4))),
        (ops.scatter_rows_, (torch.zeros(5, 4), index, rows.detach())),
    ):
        torch.library.opcheck(op.default, arguments)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rows = torch.randn(4000, 65, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sum_rows(rows, index, 300))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], summed(rows, index, 300))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("host_rows.cpp", tmp_path_factory.mktemp("rows"))


def at(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def apart(x: Tensor | None) -> ctypes.c_int64:
    """Bytes between rows."""
    return ctypes.c_int64(0 if x is None else x.stride(0) * x.element_size())


def long(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


def row_bytes(x: Tensor) -> ctypes.c_int64:
    return long(x.shape[1] * x.element_size())


def aligned(*tensors: Tensor) -> bool:
    size = tensors[0].element_size()
    return all(t.data_ptr() % 16 == t.stride(0) * size % 16 == t.shape[1] * size % 16 == 0 for t in tensors)


@ANY_TIME
@given(case=cases(unique=False))
def test_cuda_gather_and_sum(kernels: ctypes.CDLL, case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, rows = case
    n, out = len(index), poison(len(index), x)
    assert not kernels.gather(at(x), apart(x), long(len(x)), at(index), long(n), at(out), apart(out), row_bytes(x))
    assert torch.equal(out, x[index])
    ordered, order = torch.sort(index, stable=True)
    out = poison(len(x), x)
    assert not kernels.sum(
        DTYPES.index(x.dtype),
        aligned(rows, out),
        at(rows),
        long(rows.stride(0)),
        at(ordered),
        at(order),
        long(n),
        at(out),
        long(len(x)),
        long(x.shape[1]),
    )
    assert torch.equal(out, summed(rows, index, len(x)))


@ANY_TIME
@given(case=cases(unique=True))
def test_cuda_scatter_and_drop(kernels: ctypes.CDLL, case: tuple[Tensor, Tensor, Tensor]) -> None:
    base, index, rows = case
    for fresh, expected in ((rows, base.index_copy(0, index, rows)), (None, base.index_fill(0, index, 0))):
        if len(index) == 0 and fresh is not None:
            continue  # the launcher has nothing to point at
        out = poison(len(base), base)
        arguments = (at(base), apart(base), long(len(base)), at(index), long(len(index)), at(fresh), apart(fresh))
        assert not kernels.place(*arguments, at(out), row_bytes(base))
        assert torch.equal(out, expected)
    expected = base.index_copy(0, index, rows)
    arguments = (at(base), apart(base), at(index), long(len(index)), at(rows), apart(rows), row_bytes(base))
    assert not kernels.write_rows(*arguments)
    assert torch.equal(base, expected)


def test_cuda_kernels_stop_at_wrong_numbers(kernels: ctypes.CDLL) -> None:
    x, rows, out = (torch.zeros(n, 4) for n in (4, 2, 4))

    def gather(index: Tensor) -> int:
        arguments = (at(x), apart(x), long(4), at(index), long(2), at(out), apart(out), row_bytes(x))
        return int(kernels.gather(*arguments))

    def place(index: Tensor) -> int:
        arguments = (at(x), apart(x), long(4), at(index), long(2), at(rows), apart(rows), at(out), row_bytes(x))
        return int(kernels.place(*arguments))

    assert gather(torch.tensor([3, 0])) == place(torch.tensor([3, 0])) == 0
    assert gather(torch.tensor([4, 0])) == gather(torch.tensor([0, -1])) == 1
    assert place(torch.tensor([1, 1])) == place(torch.tensor([1, 4])) == 1


def test_units_are_as_wide_as_the_alignment(kernels: ctypes.CDLL) -> None:
    found = [kernels.unit_of(ctypes.c_size_t(n)) for n in (0, 16, 48, 8, 24, 4, 12, 2, 6, 1, 7, 16 | 2)]
    assert found == [16, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1, 2]
