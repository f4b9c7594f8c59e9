"""CUDA kernels against what they must equal (`make test-gpu`): shapes, dtypes, alignments, gradients, emptiness."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc import ops

from .kernel_support import DTYPES

pytestmark = pytest.mark.gpu

SOME = settings(deadline=None, max_examples=60, derandomize=True)
SEEDS = st.integers(0, 2**31)
# Of the largest number: a unit in the last place or a few.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KERNELS = [
    *("gather_rows", "gather_rows_into", "scatter_rows", "scatter_rows_", "drop_rows", "sum_rows", "sum_rows_into"),
    *("rms_norm", "rms_norm_backward", "rotary", "rotary_qk", "rotary_qk_", "v2pe_positions"),
]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_gpu(x: Tensor) -> Tensor:
    """A copy on the GPU in the same memory layout: strides, and where in 16 bytes the first element lies."""
    base = torch.empty(x.untyped_storage().nbytes(), dtype=torch.uint8)
    base.untyped_storage().copy_(x.untyped_storage())
    there = base.cuda().view(x.dtype) if x.numel() else base.cuda()[:0].view(x.dtype)
    return there.as_strided(x.shape, x.stride(), x.storage_offset())


def results(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [part.detach().cpu() for part in (out, *torch.autograd.grad(out, leaves, grad))]


def assert_near(ours: Tensor, expected: Tensor, scale: float | None = None) -> None:
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    if scale is None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=TOLERANCES[ours.dtype] * scale)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_were_built(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"evovlm::{name}", "CUDA"), (
        "evovlm was built without its CUDA kernels: set CUDA_HOME and install it again with pip install -v"
    )


@SOME
@given(
    SEEDS,
    st.integers(0, 40),
    st.integers(1, 6),
    st.integers(0, 5),
    st.sampled_from([1, 3, 4, 8, 12, 32, 64, 70]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0, 1, 8]),
)
def test_rotary(
    seed: int, tokens: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype, exact: bool, offset: int
) -> None:
    positions = (normal(seed, tokens).abs() * 1e4).to(torch.float64 if exact else torch.float32)
    inv_freq = ops.rotary_frequencies(positions, 2 * half, 1e4)
    fused = normal(seed + 1, tokens, (heads + kv_heads) * 2 * half + offset, dtype=dtype)
    rows = fused[:, offset:].unflatten(1, (-1, 2 * half))
    angles = positions.cuda(), inv_freq.cuda()
    pair = [rows[:, :heads], rows[:, heads:]]
    scale = float(fused.abs().max()) if fused.numel() else 1.0
    for ours, x in zip(ops.rotary_qk(*(on_gpu(x) for x in pair), *angles), pair, strict=True):
        assert_near(ours.cpu(), ops.rotary_reference(x, positions, inv_freq), scale)
    flat = [x.flatten(1).cuda() for x in pair]
    for ours, x, buffer in zip(ops.rotary_qk_(*flat, *angles), pair, flat, strict=True):
        assert_near(ours.cpu(), ops.rotary_reference(x, positions, inv_freq), scale)
        assert ours.data_ptr() == buffer.data_ptr()
    grad = normal(seed + 2, *pair[0].shape, dtype=dtype)
    found = results(lambda x: ops.rotary(x, *angles), [on_gpu(pair[0])], grad.cuda())
    expected = results(lambda x: ops.rotary_reference(x, positions, inv_freq), [pair[0]], grad)
    for ours, stated in zip(found, expected, strict=True):
        assert_near(ours, stated, max(scale, float(grad.abs().max()) if grad.numel() else 0.0))


@SOME
@given(
    SEEDS,
    st.integers(1, 40),
    st.integers(0, 60),
    st.sampled_from([1, 2, 3, 4, 5, 8, 17, 64, 100, 896]),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
def test_rows(seed: int, num_rows: int, count: int, width: int, dtype: torch.dtype, offset: int) -> None:
    """Copies are exact, and sums are made in the same order as on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = normal(seed, num_rows, width + offset, dtype=dtype)[:, offset:]
    repeated = torch.randint(0, num_rows, (count,), generator=generator)
    unique = torch.randperm(num_rows, generator=generator)[:count]
    rows, fresh = (normal(seed + len(i), len(i), width + offset, dtype=dtype)[:, offset:] for i in (repeated, unique))
    cases: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda index, a: ops.gather_rows(a, index), [repeated, x]),
        (lambda index, a: ops.sum_rows(a, index, num_rows), [repeated, rows]),
        (lambda index, a, b: ops.scatter_rows(a, index, b), [unique, x, fresh]),
        (lambda index, a, b: ops.scatter_rows_(a * 1, index, b), [unique, x, fresh]),
        (lambda index, a: ops.drop_rows(a, index), [unique, x]),
    ]
    for function, (index, *inputs) in cases:
        grad = normal(seed + 9, *function(index, *inputs).shape, dtype=dtype)
        found = results(partial(function, index.cuda()), [on_gpu(part) for part in inputs], grad.cuda())
        for ours, stated in zip(found, results(partial(function, index), inputs, grad), strict=True):
            assert torch.equal(ours, stated)


@SOME
@given(
    SEEDS, st.integers(0, 40), st.sampled_from([1, 2, 7, 8, 65, 128, 896, 3584]), st.sampled_from(DTYPES), st.booleans()
)
def test_rms_norm(seed: int, rows: int, width: int, dtype: torch.dtype, apart: bool) -> None:
    x = normal(seed, rows, width + 3, dtype=dtype)[:, :-3] if apart else normal(seed, rows, width, dtype=dtype)
    weight, grad = normal(seed + 1, width, dtype=dtype), normal(seed + 2, rows, width, dtype=dtype)
    found = results(lambda *given: ops.rms_norm(*given, 1e-6), [on_gpu(x), weight.cuda()], grad.cuda())
    exact = results(lambda *given: ops.rms_norm_reference(*given, 1e-6), [x.double(), weight.double()], grad.double())
    # A weight's gradient is a sum over rows, whose terms may cancel.
    terms = (grad * x).double().abs().sum(0) * float(
        torch.rsqrt(x.double().square().mean(-1) + 1e-6).max() if rows else 0
    )
    scales = (None, None, float(terms.max()))
    for ours, stated, scale in zip(found, exact, scales, strict=True):
        assert ours.dtype == dtype
        assert_near(ours.double().to(dtype), stated.to(dtype), scale)


@SOME
@given(SEEDS, st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(0, 9)), max_size=5))
def test_v2pe_positions(seed: int, images: list[tuple[int, int, int]]) -> None:
    """One image a segment, and a segment without any."""
    ends = torch.tensor([sum(image) for image in images] + [4]).cumsum(0)
    borders = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
    starts = [int(begin) + image[0] for begin, image in zip(borders, images, strict=False)]
    runs = torch.tensor(list(zip(starts, (image[1] for image in images), strict=True)), dtype=torch.int64).view(-1, 2)
    deltas = torch.rand(len(runs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-9
    tables = borders, runs, deltas.clamp(max=1.0)
    ours = ops.v2pe_positions(*(table.cuda() for table in tables), int(ends[-1]))
    assert torch.equal(ours.cpu(), ops.v2pe_positions(*tables, int(ends[-1])))


@SOME
@given(
    SEEDS,
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([8, 16, 64, 128]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_packed_attention(
    seed: int, lengths: list[int], kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    # Views of one fused projection.
    fused = normal(seed, borders[-1], kv_heads * (group + 2), head_dim, dtype=dtype)
    grad = normal(seed + 1, borders[-1], kv_heads * group, head_dim, dtype=dtype)

    def attend(function: Callable[..., Tensor], fused: Tensor) -> Tensor:
        q, k, v = fused.split([kv_heads * group, kv_heads, kv_heads], dim=1)
        return function(q, k, v, borders, causal=causal)

    found = results(partial(attend, ops.packed_attention), [fused.cuda()], grad.cuda())
    exact = results(partial(attend, ops.packed_attention_reference), [fused.double()], grad.double())
    for ours, stated in zip(found, exact, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 8 * TOLERANCES[dtype])
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), stated, rtol=0, atol=tolerance * max(1.0, float(stated.abs().max())))


@pytest.mark.parametrize("index", [[4, 0], [0, -1]])
def test_a_wrong_row_stops_the_kernel_in_a_process_of_its_own(index: list[int]) -> None:
    """A trap ends all work of the process on the GPU."""
    program = (
        "import torch; from evovlm.csrc import ops\n"
        f"ops.gather_rows(torch.zeros(4, 8).cuda(), torch.tensor({index}).cuda()); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "but there are 4 rows" in done.stdout + done.stderr
