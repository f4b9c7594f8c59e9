"""The published sizes of InternVL3, and two small ones for laptops and tests (spec §1.1, §1.2).

``size("8B")`` is the exact shape of the published checkpoint; ``num_parameters`` counts without allocating.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.internvl import InternVL

VIT_300M = VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096)
VIT_6B = VisionConfig(
    hidden_size=3200, num_layers=45, num_heads=25, ffn_size=12800, norm="rms_norm", qkv_bias=False, qk_norm=True
)

QWEN_VOCAB = 151_674
"""Qwen2.5's 151,665 ids and InternVL's nine tokens."""


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 128) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=QWEN_VOCAB,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
    )


_INTERNLM3_8B = DecoderConfig(
    vocab_size=128_521,
    hidden_size=4096,
    num_layers=48,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    ffn_size=10_240,
    qkv_bias=False,
    rope_theta=5e7,
    norm_eps=1e-5,
    family="internlm3",
)

TINY = InternVLConfig(
    vision=VisionConfig(
        hidden_size=128, num_layers=4, num_heads=4, ffn_size=512, tile_size=56, patch_size=14, layer_scale_init=1.0
    ),
    decoder=DecoderConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=384,
        rope_theta=1e4,
        max_positions=4096,
    ),
    max_tiles=4,
)
"""A model that a laptop trains in minutes; its vocabulary is set to that of the tokenizer."""

SIZES: dict[str, InternVLConfig] = {
    "tiny": TINY,
    "1B": InternVLConfig(vision=VIT_300M, decoder=_qwen(896, 24, 14, 2, 4864, head_dim=64)),
    "2B": InternVLConfig(vision=VIT_300M, decoder=_qwen(1536, 28, 12, 2, 8960)),
    "8B": InternVLConfig(vision=VIT_300M, decoder=_qwen(3584, 28, 28, 4, 18944)),
    "9B": InternVLConfig(vision=VIT_300M, decoder=_INTERNLM3_8B),
    "14B": InternVLConfig(vision=VIT_300M, decoder=_qwen(5120, 48, 40, 8, 13824)),
    "38B": InternVLConfig(vision=VIT_6B, decoder=_qwen(5120, 64, 40, 8, 27648)),
    "78B": InternVLConfig(vision=VIT_6B, decoder=_qwen(8192, 80, 64, 8, 29568)),
}
"""Name → shape. InternLM3's vocabulary is the base's 128,512 rows and InternVL's nine tokens."""


def size(name: str, *, vocab_size: int | None = None) -> InternVLConfig:
    """Look up a size by name, optionally with another vocabulary.

    Raises:
        ValueError: No such size; the message lists those there are.
    """
    if name not in SIZES:
        raise ValueError(f"no model size {name!r}; there are {', '.join(SIZES)}")
    config = SIZES[name]
    if vocab_size is None:
        return config
    return replace(config, decoder=replace(config.decoder, vocab_size=vocab_size))


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Count the elements of parameters, shared ones once."""
    return sum({id(p): p.numel() for p in parameters}.values())


def num_parameters(config: InternVLConfig) -> dict[str, int]:
    """Count parameters of each part on the meta device: ``{"vit", "projector", "llm", "total"}``."""
    with torch.device("meta"):
        model = InternVL(config)
    parts = {
        "vit": count(model.vision_model.parameters()),
        "projector": count(model.mlp1.parameters()),
        "llm": count(model.language_model.parameters()),
    }
    return {**parts, "total": sum(parts.values())}
