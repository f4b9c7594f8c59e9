"""Attention with shared prefixes: equal to a dense mask and to the unshared pack, whatever wraps it; clear refusals."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from evovlm.csrc import attention_parts
from evovlm.csrc.attention_cuda import segments_of
from evovlm.csrc.ops import packed_attention, packed_attention_reference
from evovlm.csrc.prefixes import list_prefixes, rectangles_of

from .prefix_support import PrefixPack, prefix_packs

ANY_TIME = settings(deadline=None, max_examples=60, derandomize=True)
HEADS = st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2), (14, 2)])
PAIRS = PrefixPack(((7, 3, 4), (6,), (10, 1, 2), (1, 1, 1)))


def inputs(
    rows: int, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float64, *, seed: int = 0, dim: int = 8
) -> tuple[list[Tensor], Tensor]:
    """q, k, v as views of one fused projection, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    fused = torch.randn(rows, num_heads + 2 * num_kv_heads, dim, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, num_heads, dim, generator=generator, dtype=torch.float64)
    parts = fused.to(dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return [part.requires_grad_() for part in parts], grad.to(dtype)


def run(function: Callable[..., Tensor], qkv: list[Tensor], grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    out = function(*qkv, *args, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def assert_near(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """A softmax over the keys that each query is allowed to see."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nad,mad->anm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("anm,mad->nad", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


@ANY_TIME
@given(prefix_packs(), HEADS, st.integers(0, 2**31))
def test_it_is_a_dense_softmax_and_its_reference(pack: PrefixPack, heads: tuple[int, int], seed: int) -> None:
    cu, prefixes = pack.tensors()
    qkv, grad = inputs(pack.borders[-1], heads, seed=seed)
    ours = run(packed_attention, qkv, grad, cu, prefixes=prefixes)
    assert_near(ours, run(dense, qkv, grad, pack.allowed))
    assert_near(run(packed_attention_reference, qkv, grad, cu, prefixes=prefixes), ours)


@ANY_TIME
@given(prefix_packs(), HEADS, st.integers(0, 2**31))
def test_it_is_the_unshared_computation(pack: PrefixPack, heads: tuple[int, int], seed: int) -> None:
    """Each branch behind a prefix of its own: the same rows, and gradients of the copies of a prefix add up."""
    cu, prefixes = pack.tensors()
    borders, source, first = pack.unshared()
    qkv, grad = inputs(len(source), heads, seed=seed)
    whole = [torch.zeros(pack.borders[-1], *x.shape[1:], dtype=x.dtype).index_copy(0, source, x.detach()) for x in qkv]
    alone = [x[source].requires_grad_() for x in whole]
    out, *grads = run(packed_attention, alone, grad, borders)
    zeros = torch.zeros_like
    summed = [zeros(x).index_add_(0, source, part) for x, part in zip(whole, grads, strict=True)]
    shared_out = zeros(whole[0]).index_copy_(0, source[first], out[first])
    # A prefix row appears once, with the sum of what comes back to its copies.
    whole = [x.requires_grad_() for x in whole]
    shared_grad = zeros(whole[0]).index_add_(0, source, grad)
    assert_near(run(packed_attention, whole, shared_grad, cu, prefixes=prefixes), [shared_out, *summed])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(prefix_packs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_dtypes_and_both_kinds_of_segments(pack: PrefixPack, dtype: torch.dtype, causal: bool) -> None:
    cu, prefixes = pack.tensors()
    qkv, grad = inputs(pack.borders[-1], dtype=dtype)
    ours = run(packed_attention, qkv, grad, cu, prefixes=prefixes, causal=causal)
    assert {x.dtype for x in ours} == {dtype}
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = run(packed_attention_reference, wide, grad.double(), cu, prefixes=prefixes, causal=causal)
    assert_near(ours, expected, {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype])


def test_several_rectangles_may_have_the_same_keys_and_a_rectangle_several_segments_of_them() -> None:
    cu = [0, 5, 9, 12, 20, 21, 24]
    prefixes = torch.tensor([[12, 16, 3, 9], [16, 20, 0, 12], [21, 23, 5, 9]], dtype=torch.int32)
    qkv, grad = inputs(24)
    ours = run(packed_attention, qkv, grad, cu, prefixes=prefixes)
    assert_near(ours, run(packed_attention_reference, qkv, grad, cu, prefixes=prefixes))


@pytest.mark.parametrize("pack", [PAIRS, PrefixPack(((9, 4, 2),))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "selective", "selective, attention kept"])
def test_recomputed(pack: PrefixPack, dtype: torch.dtype, kind: str) -> None:
    cu, prefixes = pack.tensors()
    qkv, grad = inputs(pack.borders[-1], dtype=dtype)
    kept = [torch.ops.evovlm.prefix_attention.default] if "kept" in kind else [torch.ops.aten.mm.default]
    options = {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, kept)}

    def block(*qkv: Tensor) -> Tensor:
        return packed_attention(*(x * 1 for x in qkv), cu, prefixes=prefixes) * 1

    expected = run(block, qkv, grad)
    before = [x.detach().clone() for x in (*qkv, cu, prefixes)]
    assert all(map(torch.equal, run(partial(checkpoint, block, use_reentrant=False, **options), qkv, grad), expected))
    assert all(map(torch.equal, before, (*qkv, cu, prefixes)))  # nothing that was given has changed


def test_compiled_whole() -> None:
    cu, prefixes = PAIRS.tensors()
    qkv, grad = inputs(PAIRS.borders[-1], dtype=torch.float32)

    def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q * 2, k, v, cu, prefixes=prefixes).sin()

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert_near(run(compiled, qkv, grad), run(work, qkv, grad), 1e-6)


def test_registered_operators_are_sound() -> None:
    cu, prefixes = PAIRS.tensors()
    for dtype in (torch.float32, torch.bfloat16):
        qkv, grad = inputs(PAIRS.borders[-1], dtype=dtype)
        torch.library.opcheck(torch.ops.evovlm.prefix_attention.default, (*qkv, cu, prefixes, True))
        qkv = [x.detach() for x in qkv]
        out, lse = torch.ops.evovlm.prefix_attention(*qkv, cu, prefixes, True)
        args = (grad, *qkv, out, lse, cu, prefixes, True)
        torch.library.opcheck(torch.ops.evovlm.prefix_attention_backward.default, args)


def test_flops_are_those_of_the_pairs_that_are_computed() -> None:
    cu, prefixes = PAIRS.tensors()
    qkv, grad = inputs(PAIRS.borders[-1])
    with FlopCounterMode(display=False) as counter:
        run(packed_attention, qkv, grad, cu, prefixes=prefixes)
    assert counter.get_total_flops() == (4 + 10) * PAIRS.num_pairs * 4 * 8
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, none = torch.empty(9, 4, 8), torch.empty(2, 4, dtype=torch.int32)
        assert packed_attention(q, q, q, torch.empty(3, dtype=torch.int32), prefixes=none).shape == q.shape
    assert counter.get_total_flops() == 4 * 45 * 4 * 8


def test_gradcheck_and_no_second_derivative() -> None:
    qkv, _ = inputs(8, dim=4)
    prefixes = torch.tensor([[3, 8, 0, 3]])
    attend = partial(packed_attention, cu_seqlens=[0, 3, 5, 8], prefixes=prefixes)
    assert torch.autograd.gradcheck(attend, qkv)
    (first,) = torch.autograd.grad(attend(*qkv).square().sum(), qkv[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()
    # A gradient that is one number everywhere has no memory of its own.
    (dv,) = torch.autograd.grad(attend(*qkv).sum(), qkv[2])
    assert float(dv.sum()) == pytest.approx(8 * 4 * 4)


def test_no_prefixes_are_the_ordinary_operator() -> None:
    qkv, _ = inputs(9)
    plain = packed_attention(*qkv, [0, 4, 9])
    empty = packed_attention(*qkv, [0, 4, 9], prefixes=torch.empty(0, 4, dtype=torch.int32))
    assert torch.equal(plain, empty)
    assert empty.grad_fn is not None
    assert empty.grad_fn.name() == plain.grad_fn.name()  # type: ignore[union-attr]


def test_layers_share_what_is_made_of_a_tensor_until_it_changes() -> None:
    cu, prefixes = PAIRS.tensors()
    made = rectangles_of(prefixes, cu)
    assert rectangles_of(prefixes, cu) is made
    assert made.queries == [(7, 14), (30, 33), (34, 36)]
    assert made.keys == [(0, 7), (20, 30), (33, 34)]
    assert made.cu_q.tolist() == [0, 7, 10, 12]
    assert made.cu_k.tolist() == [0, 7, 17, 18]
    prefixes[0, 1] = 13
    assert rectangles_of(prefixes, cu).queries[0] == (7, 13)


@given(prefix_packs())
def test_prefixes_of_a_pack_are_accepted_and_listed(pack: PrefixPack) -> None:
    cu, prefixes = pack.tensors()
    assert list_prefixes(prefixes, cu.tolist()) == list_prefixes(pack.prefixes, pack.borders) == pack.prefixes


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([[4, 4, 0, 4]], r"prefix 0 \(queries 4 … 4, keys 0 … 4\) is empty or leaves the pack of T = 12"),
        ([[4, 6, 2, 2]], r"keys 2 … 2\) is empty"),
        ([[4, 13, 0, 4]], r"queries 4 … 13, .* leaves the pack of T = 12"),
        ([[4, 6, -1, 4]], r"keys -1 … 4\) is empty or leaves"),
        ([[4, 6, 8, 10]], r"queries must come after its keys, but begin 6 rows early"),
        ([[4, 8, 0, 4], [6, 8, 0, 4]], r"prefix 1 .* begins before row 8, where the queries of prefix 0 end"),
        ([[8, 12, 0, 4], [4, 6, 0, 4]], r"prefix 1 .* begins before row 12"),
        ([[6, 12, 0, 5]], r"begin in segment 1 \(rows 4 … 8\), which must begin at row 5 or later"),
    ],
)
def test_prefixes_that_cannot_be(prefixes: list[list[int]], message: str) -> None:
    borders = [0, 4, 8, 12]
    qkv, _ = inputs(12)
    for given_prefixes in (prefixes, torch.tensor(prefixes)):
        with pytest.raises(ValueError, match=message):
            list_prefixes(given_prefixes, borders)
    with pytest.raises(ValueError, match=message):
        packed_attention(*qkv, borders, prefixes=torch.tensor(prefixes))


def test_tensors_that_are_no_prefixes() -> None:
    qkv, _ = inputs(12)
    for wrong, message in (
        (torch.zeros(1, 3, dtype=torch.int32), r"\[n, 4\] .* got torch.int32 \[1, 3\]"),
        (torch.zeros(4, dtype=torch.int32), r"got torch.int32 \[4\]"),
        (torch.zeros(1, 4), r"got torch.float32 \[1, 4\]"),
        (torch.zeros(1, 4, dtype=torch.int32, device="meta"), "must stay on the host"),
    ):
        with pytest.raises(ValueError, match=message):
            list_prefixes(wrong, [0, 12])
    with pytest.raises(ValueError, match="prefix 0 must be 4 numbers, got"):
        list_prefixes([[1, 2, 3]], [0, 12])
    with pytest.raises(RuntimeError, match="must have one dtype"):
        packed_attention(qkv[0], qkv[1].float(), qkv[2], [0, 4, 12], prefixes=torch.tensor([[4, 12, 0, 4]]))


def shapes(function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Size]:
    """What torch's own operator makes of these arguments without data: they bind to its schema."""
    made = function(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    return [x.shape for x in made]


def fake_flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    """What torch's varlen flash kernel demands."""
    assert q.dtype == k.dtype == v.dtype
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.device == cu_k.device == q.device
    assert max_q == max(int(cu_q.diff().max()), 2)
    assert max_k == int(cu_k.diff().max())
    assert all(x.stride(-1) == 1 for x in (q, k, v))


def flash_forward(*args: Any) -> tuple[Tensor, ...]:
    """Signature of ``aten::_flash_attention_forward``."""
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug = args
    fake_flash(q, k, v, cu_q, cu_k, max_q, max_k)
    assert (dropout, debug) == (0.0, False)
    out, lse = torch.ops.evovlm.attention(q, k, v, cu_q, cu_k, causal)
    assert shapes(torch.ops.aten._flash_attention_forward, args)[:2] == [out.shape, lse.shape]
    return out, lse, q.new_empty(0), q.new_empty(0), q.new_empty(0)


def flash_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Signature of ``aten::_flash_attention_backward``."""
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, _ = args
    fake_flash(q, k, v, cu_q, cu_k, max_q, max_k)
    assert dropout == 0.0
    assert state.dtype == torch.uint64
    assert grad.is_contiguous()
    assert lse.is_contiguous()
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.evovlm.attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, causal
    )
    assert shapes(torch.ops.aten._flash_attention_backward, args) == [x.shape for x in grads]
    return grads


@pytest.mark.parametrize("pack", [PAIRS, PrefixPack(((9, 1),)), PrefixPack(((20, 7, 9),))])
@pytest.mark.parametrize("kernel", ["flash", "blocks"])
def test_each_kernel_gets_its_arguments(
    monkeypatch: pytest.MonkeyPatch, kernel: attention_parts.Kernel, pack: PrefixPack
) -> None:
    """With stand-ins on a CPU: CUDA's varlen kernel, and blocks one by one."""
    monkeypatch.setattr(attention_parts, "pick_kernel", lambda _: kernel)
    monkeypatch.setattr(attention_parts, "flash_forward", flash_forward)
    monkeypatch.setattr(attention_parts, "flash_backward", flash_backward)
    cu, prefixes = pack.tensors()
    qkv, grad = inputs(pack.borders[-1])
    ours = run(packed_attention, qkv, grad, cu, prefixes=prefixes)
    assert_near(ours, run(packed_attention_reference, qkv, grad, cu, prefixes=prefixes))
    if kernel == "flash":  # kept with the borders, for all layers
        longest = [segments_of(x).max_length for x in (cu, rectangles_of(prefixes, cu).cu_q)]
        assert longest == [max(pack.tensors()[0].diff().tolist()), max(q1 - q0 for q0, q1, _, _ in pack.prefixes)]
        assert hasattr(cu, "evovlm_segments")


def test_kernels_are_picked_by_device_and_dtype() -> None:
    assert attention_parts.pick_kernel(torch.empty(1, 1, 8)) == "cpu"
    assert attention_parts.pick_kernel(torch.empty(1, 1, 8, device="meta")) == "blocks"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("pack", [PAIRS, PrefixPack(((9, 1),)), PrefixPack(((300, 70, 90), (5,), (200, 1, 40)))])
def test_on_a_gpu(dtype: torch.dtype, pack: PrefixPack) -> None:
    cu, prefixes = pack.tensors()
    qkv, grad = inputs(pack.borders[-1], dim=64)
    expected = run(packed_attention_reference, qkv, grad, cu, prefixes=prefixes)
    narrow = [x.detach().to("cuda", dtype).requires_grad_() for x in qkv]
    ours = run(packed_attention, narrow, grad.to("cuda", dtype), cu, prefixes=prefixes)
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-10}[dtype]
    assert_near([x.cpu() for x in ours], expected, tolerance)
