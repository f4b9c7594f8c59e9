"""Each CUDA kernel of packed attention behind one call: with stand-ins for its arguments, the real ones on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evovlm.csrc import attention_cuda
from evovlm.csrc.attention_cuda import (
    KERNELS,
    Kernel,
    Segments,
    attention_choice,
    packed_attention_cuda,
    pick_kernel,
    segments_of,
)
from evovlm.csrc.backends import Backends, Package, look
from evovlm.csrc.ops import packed_attention_reference

from . import fake_packages
from .fake_packages import LOG, dense_varlen

BORDERS = [0, 3, 4, 20, 21]


def qkv(dtype: torch.dtype = torch.bfloat16, heads: int = 4, kv_heads: int = 2, device: str = "cpu") -> list[Tensor]:
    """Views of one fused projection, as models hand them over."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(BORDERS[-1], heads + 2 * kv_heads, 16, generator=generator).to(device, dtype)
    return list(fused.split([heads, kv_heads, kv_heads], dim=1))


def machine(*usable: str) -> Backends:
    """A GPU machine with some of flash_attn_2 and flash_attn_3."""
    found = look("cuda", (9, 0))
    return replace(found, **{name: Package(name) for name in usable})


def test_the_fastest_that_fits_is_picked() -> None:
    q = qkv()[0]
    assert pick_kernel(q, machine(), "auto") == "varlen"
    assert pick_kernel(q, machine("flash_attn_2"), "auto") == "flash_attn_2"
    assert pick_kernel(q, machine("flash_attn_2", "flash_attn_3"), "auto") == "flash_attn_3"
    assert pick_kernel(q, machine("flash_attn_3"), "flash_attn") == "flash_attn_3"
    assert pick_kernel(q, machine("flash_attn_2"), "torch") == "varlen"
    for odd in (q.float(), q[..., :12], q.repeat(1, 1, 32)):
        assert pick_kernel(odd, machine("flash_attn_2"), "auto") == "segments"
        with pytest.raises(ValueError, match="16-bit queries of D = 8, 16"):
            pick_kernel(odd, machine("flash_attn_2"), "flash_attn")
    with pytest.raises(ValueError, match="not installed: pip install"):
        pick_kernel(q, machine(), "flash_attn")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["flash_attn_2", "flash_attn_3", "varlen", "segments"])
def test_each_kernel_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, causal: bool) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "flash_attn_interface")

    def varlen(*args: Any, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        fake_packages.check_varlen(*args)
        assert window_size == ((-1, 0) if causal else (-1, -1))
        assert enable_gqa
        return dense_varlen(*args[:4], causal=window_size == (-1, 0))

    monkeypatch.setattr(attention_cuda, "varlen_attn", varlen)
    parts = qkv()
    out = KERNELS[kernel](*parts, Segments(BORDERS), causal)
    expected = packed_attention_reference(*(x.double() for x in parts), BORDERS, causal=causal)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_the_call_on_a_cpu_without_any_package(causal: bool) -> None:
    parts = [x.requires_grad_() for x in qkv(torch.float64)]
    out = packed_attention_cuda(*parts, torch.tensor(BORDERS, dtype=torch.int32), causal)
    expected = packed_attention_reference(*parts, BORDERS, causal=causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), parts),
        torch.autograd.grad((expected * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_choice_holds_inside_its_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "flash_attn", "flash_attn_interface")
    monkeypatch.setattr(attention_cuda, "find_backends", lambda _: machine("flash_attn_2", "flash_attn_3"))
    monkeypatch.setattr(attention_cuda, "varlen_attn", lambda *args, **_: LOG.append(("varlen", None)) or args[0])
    used = []
    for choice in ("auto", "torch", "flash_attn"):
        with attention_choice(choice):  # type: ignore[arg-type]
            packed_attention_cuda(*qkv(), BORDERS, True)
        packed_attention_cuda(*qkv(), BORDERS, True)
        used += [name for name, _ in LOG]
        LOG.clear()
    assert used == ["flash_attn_3", "flash_attn_3", "varlen", "flash_attn_3", "flash_attn_3", "flash_attn_3"]


def test_layers_share_the_borders_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages.install(monkeypatch, "flash_attn")
    monkeypatch.setattr(attention_cuda, "find_backends", lambda _: machine("flash_attn_2"))
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32)
    for _ in range(3):
        packed_attention_cuda(*qkv(), cu_seqlens, True)
    packed_attention_cuda(*qkv(), cu_seqlens.clone(), True)
    sent = [borders for _, borders in LOG]
    assert sent[0] is sent[1] is sent[2]
    assert sent[3] is not sent[0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_segments_are_their_borders(lengths: list[int]) -> None:
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    segments = segments_of(torch.tensor(borders))
    assert list(segments) == borders
    assert len(segments) == len(borders)
    assert segments[-1] == sum(lengths)
    assert segments.max_length == max(lengths)
    assert segments.on(torch.device("cpu")).tolist() == borders
    assert segments.on(torch.device("cpu")).dtype == torch.int32
    assert segments_of(segments) is segments


def test_borders_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match="must stay on the host"):
        Segments(torch.tensor(BORDERS, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("choice", ["auto", "torch", "flash_attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype, choice: attention_cuda.Choice, causal: bool) -> None:
    parts = [x.requires_grad_() for x in qkv(dtype, device="cuda")]
    try:
        pick_kernel(parts[0], attention_cuda.find_backends(parts[0].device), choice)
    except ValueError as error:
        pytest.skip(str(error))
    with attention_choice(choice):
        out = packed_attention_cuda(*parts, BORDERS, causal)
    wide = [x.detach().double().requires_grad_() for x in parts]
    expected = packed_attention_reference(*wide, BORDERS, causal=causal)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    grads = torch.autograd.grad(out.float().sum(), parts)
    expected_grads = torch.autograd.grad(expected.sum(), wide)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5 * tolerance)
