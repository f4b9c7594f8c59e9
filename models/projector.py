"""From patch features to visual tokens: pixel shuffle, then a two-layer MLP (spec §1.3).

[N, 1 + P, C] ─ drop class token ─► squares of 2×2 patches side by side ─► [N·P/4, 4C] ─ MLP ─► [N·P/4, H]
"""

from torch import Tensor, nn

from evovlm.models.config import InternVLConfig


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """Merge squares of neighbouring patches into one token each (version 2: rows stay rows).

    Args:
        features: ``[N, P, C]``, P a square number, row-major patches without the class token.
        factor: Edge of the merged square, p.

    Returns:
        ``[N, P/p², C·p²]``, row-major; channels are those of the square's patches in row-major order.
    """
    num_tiles, num_patches, channels = features.shape
    edge = round(num_patches**0.5)
    if edge * edge != num_patches or edge % factor:
        raise ValueError(f"pixel shuffle by {factor} needs a square of patches it divides, got {num_patches} patches")
    merged = edge // factor
    x = features.reshape(num_tiles, merged, factor, merged, factor, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(num_tiles, merged * merged, factor * factor * channels)


def build_projector(config: InternVLConfig) -> nn.Sequential:
    """Build ``mlp1``: LayerNorm, Linear, exact GELU, Linear; ``[..., C·p²]`` to ``[..., H]``."""
    hidden = config.decoder.hidden_size
    return nn.Sequential(
        nn.LayerNorm(config.shuffled_size),
        nn.Linear(config.shuffled_size, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
    )
