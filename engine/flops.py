"""Model FLOPs of a step, vision and text counted apart, and the peak they are compared with (MFU).

Counted are matrix products and attention scores that the model needs, 2 FLOPs per multiply-add; a backward pass costs
twice its forward, less for frozen modules. Recomputation, norms and the embedding lookup are not counted.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from evovlm.models.config import InternVLConfig

PEAK_TFLOPS: dict[str, float] = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bfloat16 peak of a device, by a part of its name (vendor data sheets)."""


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of the three modules, forward and backward."""

    vit: float
    projector: float
    llm: float

    @property
    def total(self) -> float:
        """All modules."""
        return self.vit + self.projector + self.llm


def forward_flops(
    config: InternVLConfig,
    num_tiles: int,
    lengths: Iterable[int],
    num_supervised: int,
    squares: Iterable[int] | None = None,
) -> Flops:
    """Count the forward FLOPs of packed samples.

    Args:
        config: Shapes.
        num_tiles: Tiles encoded.
        lengths: Tokens of each segment; attention is causal inside a segment.
        num_supervised: Rows that pass the output head.
        squares: Squared length of each segment as attention costs it (``Packs.squares``): smaller where answers share
            a prompt. By default that of its length.
    """
    vision, decoder = config.vision, config.decoder
    width, rows = vision.hidden_size, vision.num_patches + 1
    vit_layer = 2 * rows * (4 * width**2 + 2 * width * vision.ffn_size) + 4 * rows**2 * width
    patch_embedding = 2 * vision.num_patches * 3 * vision.patch_size**2 * width
    vit = num_tiles * (vision.num_layers * vit_layer + patch_embedding)
    hidden = decoder.hidden_size
    projector = num_tiles * config.tokens_per_tile * 2 * (config.shuffled_size * hidden + hidden**2)
    segments = np.fromiter(lengths, np.int64)
    tokens = int(segments.sum())
    pairs = (int(np.fromiter(squares, np.int64).sum() if squares is not None else (segments**2).sum()) + tokens) // 2
    heads, kv_heads = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    matrices = 2 * hidden * heads + 2 * hidden * kv_heads + 3 * hidden * decoder.ffn_size
    llm = decoder.num_layers * (2 * tokens * matrices + 4 * pairs * heads)
    llm += 2 * num_supervised * hidden * decoder.vocab_size
    return Flops(vit=float(vit), projector=float(projector), llm=float(llm))


def training_flops(forward: Flops, freeze: Iterable[str]) -> Flops:
    """Scale forward FLOPs to forward and backward: ×3; ×2 where a frozen module only passes gradients on.

    A frozen module with nothing trained before it needs no backward at all: ×1.
    """
    frozen = set(freeze)
    factors: dict[str, float] = {}
    trained_before = False
    for module in ("vit", "projector", "llm"):
        if module not in frozen:
            factors[module] = 3.0
            trained_before = True
        else:
            factors[module] = 2.0 if trained_before else 1.0
    return Flops(
        vit=forward.vit * factors["vit"],
        projector=forward.projector * factors["projector"],
        llm=forward.llm * factors["llm"],
    )


def peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> tuple[float, str]:
    """Find the peak FLOP/s of one rank and say where the number is from.

    Known GPUs: the data sheet's dense bfloat16 peak. Elsewhere: the best rate of a 768³ matrix product,
    measured here with the threads that this rank computes with.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if part in name:
                return tflops * 1e12, f"{name} data sheet, bfloat16"
    size = 768
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(a, b)  # the first product also sets the library up
    best, repetitions, end = 0.0, 0, time.perf_counter() + seconds
    while repetitions < 10 or time.perf_counter() < end:
        repetitions += 1
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"matrix product measured here, {str(dtype).removeprefix('torch.')}"
