"""Packed attention on CUDA: the fastest kernel that is there, all behind one call.

    q [T, A, D], k, v [T, K, D], borders ─┬─ 16-bit: flash-attn 3 (Hopper) ─ flash-attn 2 ─ torch's varlen flash kernel
                                          └─ float32, float64, head sizes that those lack: SDPA, segment by segment

Flash kernels want the borders on the device and the longest segment as a number: :class:`Segments` makes both once,
for all layers of a microbatch. Attention blocks of a ring (``attention_block`` in :mod:`evovlm.csrc.ops`) and attention
with shared prefixes (:mod:`evovlm.csrc.attention_parts`) stay with torch's own flash operators, which take a merged
log-sum-exp in their backward as they are; flash-attn's public functions do not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from evovlm.csrc.backends import Backends, find_backends, load

Choice = Literal["auto", "flash_attn", "torch"]
Kernel = Literal["flash_attn_3", "flash_attn_2", "varlen", "segments"]

MAX_HEAD_DIM = 256
"""Largest D of the flash kernels."""

_choice: ContextVar[Choice] = ContextVar("evovlm_attention", default="auto")


class Segments(Sequence[int]):
    """Borders of a pack's segments, on the host, and on a device once somebody asks.

    It is a sequence of S + 1 integers, so that it can stand wherever borders are expected.

    Args:
        borders: S + 1 rising integers from 0 to T; a tensor must be on the host.

    Attributes:
        borders: The integers.
        max_length: Length of the longest segment.

    Raises:
        ValueError: The borders are on a device: reading them would stall every layer.
    """

    def __init__(self, borders: Sequence[int] | Tensor) -> None:
        if isinstance(borders, Tensor):
            if borders.device.type != "cpu":
                raise ValueError(f"segment borders must stay on the host, got a tensor on {borders.device}")
            borders = borders.tolist()
        self.borders: list[int] = list(borders)
        self.max_length = max((end - start for start, end in pairwise(self.borders)), default=0)
        self._on_device: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.borders)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.borders[index]

    def on(self, device: torch.device) -> Tensor:
        """The borders as int32 ``[S + 1]`` on a device; sent there the first time only, without waiting."""
        if device not in self._on_device:
            host = torch.tensor(self.borders, dtype=torch.int32)
            if device.type == "cuda":
                host = host.pin_memory()
            self._on_device[device] = host.to(device, non_blocking=True)
        return self._on_device[device]


def segments_of(cu_seqlens: Sequence[int] | Tensor) -> Segments:
    """Segments of borders on the host: those made before for the same tensor, which keeps them as long as it lives.

    So whoever holds one tensor of borders for all layers of a microbatch has them on the device once.
    """
    if isinstance(cu_seqlens, Segments):
        return cu_seqlens
    if not isinstance(cu_seqlens, Tensor):
        return Segments(cu_seqlens)
    made: Segments | None = getattr(cu_seqlens, "evovlm_segments", None)
    if made is None:
        made = Segments(cu_seqlens)
        setattr(cu_seqlens, "evovlm_segments", made)  # noqa: B010 - no attribute that a tensor is known to have
    return made


@contextmanager
def attention_choice(choice: Choice) -> Iterator[None]:
    """Within this context, attend on CUDA by one kind of kernel: as ``torch.nn.attention.sdpa_kernel`` does.

    Args:
        choice: ``flash_attn``, ``torch``, or ``auto`` for the fastest that is there.
    """
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


# What picks a kernel, and flash-attn's own wrappers, are Python that a compiler gains nothing from: the call stands
# between two compiled graphs.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int] | Tensor, causal: bool) -> Tensor:
    """Attention inside each segment of a pack, on CUDA.

    Args:
        q: ``[T, A, D]``, channels contiguous, rows strided.
        k: ``[T, K, D]``, K divides A.
        v: ``[T, K, D]``.
        cu_seqlens: Segment borders on the host; see :func:`segments_of`.
        causal: Query i of a segment sees its keys 0 … i; otherwise it sees all of the segment.

    Returns:
        ``[T, A, D]``.

    Raises:
        ValueError: flash-attn was asked for and cannot run here, or cannot take these tensors.
    """
    segments = segments_of(cu_seqlens)
    return KERNELS[pick_kernel(q, find_backends(q.device), _choice.get())](q, k, v, segments, causal)


def pick_kernel(q: Tensor, backends: Backends, choice: Choice) -> Kernel:
    """Say which kernel attends to queries ``[T, A, D]``.

    Raises:
        ValueError: flash-attn was asked for and cannot run here, or cannot take these queries.
    """
    head_dim = q.shape[-1]
    fits = q.dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
    if choice == "flash_attn" and not (fits and backends.flash_attn.usable):
        reason = str(backends.flash_attn) if fits else f"flash-attn takes 16-bit queries of D = 8, 16 … {MAX_HEAD_DIM}"
        raise ValueError(
            f'[kernels] attention = "flash_attn": {reason}; these are {q.dtype} with D = {head_dim}; choose "auto"'
        )
    if not fits:
        return "segments"
    if choice == "torch" or not backends.flash_attn.usable:
        return "varlen"
    return "flash_attn_3" if backends.flash_attn_3.usable else "flash_attn_2"


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    return _flash_attn(load("flash_attn_interface").flash_attn_varlen_func, q, k, v, segments, causal)


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    return _flash_attn(load("flash_attn").flash_attn_varlen_func, q, k, v, segments, causal)


def _flash_attn(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    causal: bool,
) -> Tensor:
    """Versions 2 and 3 name these arguments alike and order others differently, so all go by name."""
    borders, longest = segments.on(q.device), segments.max_length
    made = function(
        q,
        k,
        v,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=causal,
    )
    return made[0] if isinstance(made, tuple) else made  # early builds of version 3 return the log-sum-exp, too


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    borders, longest = segments.on(q.device), segments.max_length
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    made = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=window, enable_gqa=grouped)
    assert isinstance(made, Tensor)  # a pair only where the log-sum-exp is asked for
    return made


def _segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    lengths = [end - start for start, end in pairwise(segments.borders)]
    # SDPA wants heads before tokens: [1, A, n, D]. Views only.
    heads_first = (torch.split(x.transpose(0, 1).unsqueeze(0), lengths, dim=2) for x in (q, k, v))
    outputs = [
        F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=causal, enable_gqa=grouped)
        for q_part, k_part, v_part in zip(*heads_first, strict=True)
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


KERNELS: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Segments, bool], Tensor]] = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn_2": _flash_attn_2,
    "varlen": _varlen,
    "segments": _segments,
}
"""Kernel → function of q, k, v, the segments and whether attention is causal."""
