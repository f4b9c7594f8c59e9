"""Packed attention on CPU against a dense softmax: forward, backward, borders, strides, dtypes, threads, counters.

The header's code for instruction sets that this machine would not choose is run by ``attention_shim.cpp``.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import include_paths
from torch.utils.flop_counter import FlopCounterMode

import evovlm.csrc.ops
from evovlm.csrc.ops import packed_attention, packed_attention_reference

ANY_TIME = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the largest number in a result.
TOLERANCES = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
HEADS = st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2), (7, 1), (14, 2)])
LENGTHS = st.one_of(st.integers(0, 9), st.integers(0, 150))

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool]


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """grad, q ``[n, A, D]``, k, v ``[m, K, D]``, borders of queries and of keys, causal."""
    causal, dtype = draw(st.booleans()), draw(st.sampled_from(dtypes))
    num_heads, num_kv_heads = draw(HEADS)
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 20, 24, 64, 72, 128]))
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=4))
    key_lengths = lengths
    if not causal and draw(st.booleans()):
        key_lengths = draw(st.lists(LENGTHS, min_size=len(lengths), max_size=len(lengths)))
    n, m = sum(lengths), sum(key_lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, generator=generator)

    # Scores of this size make some weights vanish and some dominate.
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    if draw(st.booleans()):  # strided, as a fused projection or a ring has them
        k, v = (normal(m, 2 * num_kv_heads) * scale).to(dtype).unflatten(1, (-1, 2)).unbind(2)
        q = normal(2 * n, num_heads).to(dtype)[::2]
    else:
        q, k, v = normal(n, num_heads), normal(m, num_kv_heads) * scale, normal(m, num_kv_heads)
    grad = normal(n, num_heads)
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    return grad, q, k, v, borders(lengths), borders(key_lengths), causal


def dense(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by autograd of a softmax in float64, one segment after the other."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    outs, lses = [q[:0]], [q[:0, :, 0].T]
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys, values = (x[k0:k1].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("nad,mad->anm", q[q0:q1], keys) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        outs.append(torch.einsum("anm,mad->nad", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.double())


def assert_near(ours: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """All results of one case: the largest number of any of them is the measure, since terms of one may cancel."""
    finite = torch.cat([x[x.isfinite()].flatten() for x in expected])
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCES[dtype] * size)


@ANY_TIME
@given(cases())
def test_forward_and_backward_are_a_dense_softmax(case: Case) -> None:
    grad, q, k, v, cu_q, cu_k, causal = case
    expected = dense(*case)
    out, lse = torch.ops.evovlm.attention(q, k, v, cu_q, cu_k, causal)
    # The gradient of the exact output: a rounded one would differ by more than the kernel's own error.
    merged = expected[0].to(q.dtype), expected[1].to(lse.dtype)
    grads = torch.ops.evovlm.attention_backward(grad, q, k, v, *merged, cu_q, cu_k, causal)
    assert {x.dtype for x in (out, *grads)} == {q.dtype}
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert_near((out, lse, *grads), expected, q.dtype)


@ANY_TIME
@given(cases(dtypes=(torch.float64,)))
def test_it_is_its_reference(case: Case) -> None:
    grad, q, k, v, cu, _, causal = case
    # Self attention: as many keys as queries, zeros where the case has fewer.
    k, v = (torch.cat((x, x.new_zeros(len(q), *x.shape[1:])))[: len(q)] for x in (k, v))
    results = []
    for function in (packed_attention, packed_attention_reference):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        for given_borders in (cu, cu.tolist()):
            out = function(*leaves, given_borders, causal=causal)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert_near(*results, torch.float64)


@pytest.mark.parametrize(("lengths", "num_heads", "num_kv_heads"), [([1200, 3, 700], 2, 1), ([1100], 1, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_long_segments_are_split_and_do_not_depend_on_the_number_of_threads(
    lengths: list[int], num_heads: int, num_kv_heads: int, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    T, cu = sum(lengths), borders(lengths)
    q, grad = (torch.randn(T, num_heads, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(T, num_kv_heads, 16, generator=generator) for _ in range(2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = torch.ops.evovlm.attention(q, k, v, cu, cu, causal)
            results.append((out, lse, *torch.ops.evovlm.attention_backward(grad, q, k, v, out, lse, cu, cu, causal)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_near(results[0], dense(grad, q, k, v, cu, cu, causal), torch.float32)


def test_results_fill_poisoned_memory() -> None:
    """Scratch and outputs hold NaN from an earlier call; segments without keys or without queries get zeros."""
    generator = torch.Generator().manual_seed(0)
    poison = torch.full((90, 2, 8), float("nan"))
    q, grad, k, v = (torch.randn(90, 2, 8, generator=generator) for _ in range(4))
    cu_q, cu_k = borders([50, 0, 40]), borders([0, 70, 20])
    for _ in range(3):
        cu = borders([90])
        out, lse = torch.ops.evovlm.attention(poison, poison, poison, cu, cu, True)
        bad = torch.ops.evovlm.attention_backward(poison, poison, poison, poison, out, lse, cu, cu, True)
        assert all(x.isnan().all() for x in (out, lse, *bad))
        del out, lse, bad
        out, lse = torch.ops.evovlm.attention(q, k, v, cu_q, cu_k, False)
        dq, dk, dv = torch.ops.evovlm.attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, False)
        assert all(x.isfinite().all() for x in (out, lse[:, 50:], dq, dk, dv))
        assert not any(x.any() for x in (out[:50], dq[:50], dk[:70], dv[:70]))
        assert (lse[:, :50] == float("-inf")).all()


def test_no_segments_at_all() -> None:
    x = torch.empty(0, 2, 8, requires_grad=True)
    out = packed_attention(x, x, x, [0], causal=False)
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_not_a_number_stays_in_its_segment_and_is_not_hidden() -> None:
    q, k, v = (torch.ones(60, 2, 8) for _ in range(3))
    k[45, 0] = float("nan")
    out = packed_attention(q, k, v, [0, 20, 60])
    assert out[45:, 0].isnan().all()
    torch.testing.assert_close(out[:45], torch.ones(45, 2, 8))
    torch.testing.assert_close(out[:, 1], torch.ones(60, 8))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    for dtype in (torch.float32, torch.float64):
        q, k = torch.full((40, 1, 4), 100.0, dtype=dtype), torch.full((40, 1, 4), -100.0, dtype=dtype)
        k[7] = 100.0
        v = torch.arange(40, dtype=dtype)[:, None, None].expand(40, 1, 4)
        out = packed_attention(q, k, v, [0, 40], causal=False)
        assert torch.equal(out, torch.full_like(out, 7.0))


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(7, heads, 4, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    for causal in (True, False):
        assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, [0, 2, 7], causal=causal), (q, k, v))  # noqa: B023
    (first,) = torch.autograd.grad(packed_attention(q, k, v, [0, 7]).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()
    # A gradient that is one number everywhere has no memory of its own.
    packed_attention(q, k, v, [0, 7]).sum().backward()
    assert v.grad is not None
    assert float(v.grad.detach().sum()) == pytest.approx(7 * 4 * 4)


def test_errors() -> None:
    q = torch.ones(4, 3, 8)
    with pytest.raises(RuntimeError, match="2 KV heads must divide 3 heads"):
        packed_attention(q, q[:, :2], q[:, :2], [0, 4])
    with pytest.raises(RuntimeError, match=r"borders must lead from 0 to 4 queries .* go from 0 to 3"):
        packed_attention(q, q, q, [0, 3])
    with pytest.raises(RuntimeError, match="borders must rise, but segment 1 has -1 queries"):
        packed_attention(q, q, q, [0, 3, 2, 4])
    with pytest.raises(RuntimeError, match=r"must be int32 \[S \+ 1\] on the host"):
        packed_attention(q, q, q, torch.tensor([0, 4]))
    with pytest.raises(RuntimeError, match="must have one dtype"):
        packed_attention(q, q.double(), q, [0, 4])
    with pytest.raises(RuntimeError, match="float32, float64, bfloat16 or float16"):
        packed_attention(q.int(), q.int(), q.int(), [0, 4])
    with pytest.raises(RuntimeError, match="segment 0 has 4 and 3"):
        torch.ops.evovlm.attention(q, q[:3], q[:3], borders([4]), borders([3]), True)


def test_registered_operators_are_sound() -> None:
    cu = borders([3, 5])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(8, heads, 8).to(dtype).requires_grad_() for heads in (4, 2, 2))
        torch.library.opcheck(torch.ops.evovlm.attention.default, (q, k, v, cu, cu, True))
        q, k, v = (x.detach() for x in (q, k, v))
        out, lse = torch.ops.evovlm.attention(q, k, v, cu, cu, True)
        torch.library.opcheck(torch.ops.evovlm.attention_backward.default, (q, q, k, v, out, lse, cu, cu, True))


def test_compiled_whole() -> None:
    q, k, v = (torch.randn(9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    cu = borders([4, 5])

    def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q * 2, k, v, cu).square().sum()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for ours, expected in zip(found, torch.autograd.grad(work(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_flops_are_those_of_the_pairs_that_are_computed() -> None:
    q, k, v = (torch.randn(9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    for causal, pairs in ((True, 4 * 5 // 2 + 5 * 6 // 2), (False, 16 + 25)):
        with FlopCounterMode(display=False) as counter:
            packed_attention(q, k, v, [0, 4, 9], causal=causal).sum().backward()
        assert counter.get_total_flops() == (4 + 10) * pairs * 4 * 8
    # Borders without numbers: as if the pack were one segment.
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(9, 4, 8)
        assert packed_attention(q, q, q, torch.empty(3, dtype=torch.int32)).shape == q.shape
    assert counter.get_total_flops() == 4 * 45 * 4 * 8


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("attention") / "attention.so"
    source, headers = Path(__file__).parent / "attention_shim.cpp", Path(evovlm.csrc.ops.__file__).parent
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{headers}", *(f"-I{path}" for path in include_paths())]
    result = subprocess.run(["g++", *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(case=cases(dtypes=(torch.float32, torch.float64)), kind=st.sampled_from(["plain", "v3", "v4"]))
def test_tiles_of_every_instruction_set(shim: ctypes.CDLL, case: Case, kind: str) -> None:
    grad, q, k, v, _, _, causal = case
    m = min(len(q), len(k)) if causal else len(k)
    grad, q, k, v = (x.contiguous() for x in (grad[:m] if causal else grad, q[:m] if causal else q, k[:m], v[:m]))
    n, num_heads, width = q.shape
    expected = dense(grad, q, k, v, borders([n]), borders([m]), causal)
    poison = float("nan")
    found = [torch.full_like(x, poison) for x in (q, q, k, v)]
    lse = torch.full((num_heads, n), poison, dtype=q.dtype)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, found[0], grad, *found[1:])]
    run = getattr(shim, f"float_{kind}" if q.dtype == torch.float32 else "double_plain")
    sizes = [ctypes.c_int64(size) for size in (n, m, num_heads, k.shape[1], width)]
    for backward in (0, 1):
        run((ctypes.c_void_p * 8)(*pointers), ctypes.c_void_p(lse.data_ptr()), *sizes, causal, backward)
    if m == 0:
        found[1].zero_()  # no keys, no task: the operator does it
    assert_near((found[0], lse, *found[1:]), expected, q.dtype)
