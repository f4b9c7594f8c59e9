"""Shapes of a model: three small frozen dataclasses, and nothing that could differ between two runs of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of an InternViT (spec §1.2).

    Attributes:
        hidden_size: C, width of the encoder.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        ffn_size: Width of the MLP's hidden layer.
        tile_size: Edge of a square input tile in pixels.
        patch_size: Edge of a patch in pixels; must divide ``tile_size``.
        norm: ``layer_norm`` (300M) or ``rms_norm`` (6B).
        norm_eps: Epsilon of every norm, including the query and key norms.
        qkv_bias: Whether the fused q, k, v projection has a bias.
        qk_norm: Whether q and k pass an RMSNorm over their full width C.
        layer_scale_init: Initial value of the per-channel residual scales.
        drop_path_rate: Rate of the last block; block rates rise linearly from 0.
        initializer_range: Standard deviation of random weights.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    tile_size: int = 448
    patch_size: int = 14
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float = 0.1
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"vision: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.tile_size % self.patch_size:
            raise ValueError(f"vision: tile_size {self.tile_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along one edge of a tile."""
        return self.tile_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches of one tile, without the class token."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a Qwen2.5 or InternLM3 decoder (spec §1.1).

    Attributes:
        vocab_size: V, rows of the embedding and of the output head.
        hidden_size: H, width of the decoder.
        num_layers: Number of transformer blocks.
        num_heads: A, query heads; must be a multiple of ``num_kv_heads``.
        num_kv_heads: K, key and value heads.
        head_dim: D, even.
        ffn_size: F, width of the gated MLP.
        qkv_bias: Whether the q, k, v projections have a bias (Qwen2.5: yes, InternLM3: no).
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the RMSNorms.
        tie_embeddings: Whether the output head is the embedding matrix itself.
        family: Which published architecture the checkpoint names.
        max_positions: Largest position that the checkpoint declares.
        initializer_range: Standard deviation of random weights.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    qkv_bias: bool = True
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    family: Literal["qwen2", "internlm3"] = "qwen2"
    max_positions: int = 32768
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"decoder: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"decoder: head_dim {self.head_dim} is odd; rotary positions need pairs of channels")


@dataclass(frozen=True, kw_only=True)
class InternVLConfig:
    """A ViT, a projector and a decoder, and how tiles become visual tokens (spec §1.3, §1.7).

    Attributes:
        vision: Shape of the ViT.
        decoder: Shape of the decoder.
        downsample: Edge of the square of patches that pixel shuffle merges into one visual token.
        min_tiles: Fewest tiles of a still image.
        max_tiles: Most tiles of a still image, without the thumbnail.
        thumbnail: Whether an image of several tiles gets the whole image as one more tile.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    downsample: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.vision.grid % self.downsample:
            raise ValueError(
                f"vision: a tile has {self.vision.grid} patches along an edge, "
                f"which pixel shuffle by {self.downsample} does not divide"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: 256 for every published size."""
        return (self.vision.grid // self.downsample) ** 2

    @property
    def shuffled_size(self) -> int:
        """Width of a visual token before the projector: C · downsample²."""
        return self.vision.hidden_size * self.downsample**2
