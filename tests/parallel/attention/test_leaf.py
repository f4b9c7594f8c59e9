"""One block of attention: the kernels against their plain statement, and that against autograd of a dense softmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc.ops import (
    attention_block,
    attention_block_backward,
    attention_block_backward_reference,
    attention_block_reference,
)

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 3)]))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention by a softmax over scores, one head after the other."""
    outs, lses = [], []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, kv_head].T / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full_like(scores, float("-inf")).triu(1)
        outs.append(scores.softmax(-1) @ v[:, kv_head])
        lses.append(scores.exp().sum(-1).log())
    return torch.stack(outs, dim=1), torch.stack(lses)


@given(st.integers(0, 2**31), SHAPES, st.booleans())
def test_block_and_its_reference_are_dense_attention(
    seed: int, shape: tuple[int, int, tuple[int, int]], causal: bool
) -> None:
    n, m, (num_heads, num_kv_heads) = shape
    m = n if causal else m
    # Twice as many rows and channels, of which each second is used: views as the ring makes them, and wider.
    q, grad = (normal(seed + i, 2 * n, num_heads, 8)[::2] for i in (0, 1))
    k, v = normal(seed + 2, m, 2 * num_kv_heads, 8).chunk(2, dim=1)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, causal)
    out.backward(grad)
    for block, backward in (
        (attention_block, attention_block_backward),
        (attention_block_reference, attention_block_backward_reference),
    ):
        for got, expected in zip(block(q, k, v, causal), (out, lse), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for got, leaf in zip(backward(grad, q, k, v, out.detach(), lse.detach(), causal), leaves, strict=True):
            torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20))
def test_backward_of_two_blocks_with_the_merged_output_is_that_of_both(seed: int, first: int, second: int) -> None:
    """What the ring relies on: only ``out`` and ``lse`` tell a block what the other blocks hold."""
    q, grad = normal(seed, 7, 4, 8), normal(seed + 1, 7, 4, 8)
    k, v = normal(seed + 2, first + second, 2, 8), normal(seed + 3, first + second, 2, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, causal=False)
    out.backward(grad)
    # A column range of a wider lse, as a ring's queries have it.
    wide_lse = torch.cat((lse.detach(), lse.detach()), dim=1)[:, 7:]
    for backward in (attention_block_backward, attention_block_backward_reference):
        parts = [
            backward(grad, q, k[keys], v[keys], out.detach(), wide_lse, False)
            for keys in (slice(first), slice(first, None))
        ]
        dq = parts[0][0] + parts[1][0]
        dk, dv = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        for got, leaf in zip((dq, dk, dv), leaves, strict=True):
            torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-12)


def test_dtypes() -> None:
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        q, k, v = (normal(i, 5, 2, 8, dtype=dtype) for i in range(3))
        for block, backward in (
            (attention_block, attention_block_backward),
            (attention_block_reference, attention_block_backward_reference),
        ):
            out, lse = block(q, k, v, True)
            assert (out.dtype, lse.dtype) == (dtype, wide)
            assert {x.dtype for x in backward(q, q, k, v, out, lse, True)} == {dtype}


def test_a_causal_block_is_square() -> None:
    q, k = normal(0, 5, 2, 8), normal(1, 6, 2, 8)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 6"):
        attention_block(q, k, k, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "causal"), [(64, 64, True), (33, 33, True), (17, 90, False), (1, 5, False)])
def test_cuda_is_the_reference(dtype: torch.dtype, n: int, m: int, causal: bool) -> None:
    q, grad, k, v = (normal(i, rows, heads, 64) for i, (rows, heads) in enumerate([(n, 4), (n, 4), (m, 2), (m, 2)]))
    out, lse = attention_block_reference(q, k, v, causal)
    expected = (out, lse, *attention_block_backward_reference(grad, q, k, v, out, lse, causal))
    q, grad, k, v = (x.to("cuda", dtype) for x in (q, grad, k, v))
    out, lse = attention_block(q, k, v, causal)
    got = (out, lse, *attention_block_backward(grad, q, k, v, out, lse, causal))
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-3, torch.float64: 1e-10}[dtype]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=tolerance, atol=tolerance)
