"""Leaf operators against statements of what they are: formulas in float64, dense masks, plain loops."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import packed_attention, packed_attention_reference, rms_norm

ANY_TIME = settings(deadline=None)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@ANY_TIME
@given(SEEDS, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1e-6, 1e-5, 0.1]))
def test_rms_norm_is_its_formula(seed: int, rows: int, width: int, eps: float) -> None:
    x, weight = normal(seed, rows, width), normal(seed + 1, width)
    expected = [
        [w * v / math.sqrt(sum(u * u for u in row) / width + eps) for v, w in zip(row, weight.tolist(), strict=True)]
        for row in x.tolist()
    ]
    torch.testing.assert_close(rms_norm(x, weight, eps), torch.tensor(expected, dtype=torch.float64))


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    # 257 squares of 1: bfloat16 would add up to 256 at most, and the norm would not be 1.
    x = torch.ones(1, 257, dtype=torch.bfloat16) * 3
    out = rms_norm(x, torch.ones(257, dtype=torch.bfloat16), 0.0)
    assert out.dtype == torch.bfloat16
    assert out.unique().tolist() == [1.0]
    # Squares that overflow the narrow dtype do not.
    assert rms_norm(torch.full((4,), 60000.0, dtype=torch.half), torch.ones(4, dtype=torch.half), 1e-6).isfinite().all()


@st.composite
def borders(draw: st.DrawFn) -> list[int]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@settings(max_examples=40, deadline=None)
@given(SEEDS, borders(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 4, 6]))
def test_packed_attention_forward_and_backward(
    seed: int, cu_seqlens: list[int], kv_heads: int, group: int, head_dim: int
) -> None:
    T, A = cu_seqlens[-1], kv_heads * group
    shapes = ((T, A, head_dim), (T, kv_heads, head_dim), (T, kv_heads, head_dim))
    gradient = normal(seed + 3, T, A, head_dim)
    results = []
    for function in (packed_attention, packed_attention_reference):
        q, k, v = (normal(seed + i, *shape).requires_grad_() for i, shape in enumerate(shapes))
        out = function(q, k, v, cu_seqlens)
        out.backward(gradient)
        results.append([out, q.grad, k.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_dense_reference_is_a_plain_loop() -> None:
    cu_seqlens, A, K, D = [0, 3, 4, 7], 4, 2, 3
    q, k, v = normal(0, 7, A, D), normal(1, 7, K, D), normal(2, 7, K, D)
    expected = torch.zeros(7, A, D, dtype=torch.float64)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        for t in range(start, end):
            for a in range(A):
                scores = [float(q[t, a] @ k[s, a // 2]) / math.sqrt(D) for s in range(start, t + 1)]
                total = sum(math.exp(x) for x in scores)
                for s, x in zip(range(start, t + 1), scores, strict=True):
                    expected[t, a] += math.exp(x) / total * v[s, a // 2]
    torch.testing.assert_close(packed_attention_reference(q, k, v, cu_seqlens), expected, rtol=0, atol=1e-13)


def test_segments_do_not_see_each_other() -> None:
    cu_seqlens = [0, 5, 9]
    q, k, v = normal(0, 9, 2, 4), normal(1, 9, 1, 4), normal(2, 9, 1, 4)
    before = packed_attention(q, k, v, cu_seqlens)
    k[:5] = float("nan")
    v[:5] = float("nan")
    after = packed_attention(q, k, v, cu_seqlens)
    assert torch.equal(before[5:], after[5:])
    assert after[:5].isnan().all()
