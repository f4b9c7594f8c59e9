"""InternViT: a plain vision transformer over square tiles (spec §1.2).

    tiles [N, 3, S, S] ─ patch conv ─► [N, P, C] ─ + class token, + positions ─► blocks ─► [N, 1 + P, C]

Both published variants are covered: 300M (LayerNorm) and 6B (RMSNorm, q and k normed over the full width).
The last block's raw output is the result; there is no final norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evovlm.csrc.ops import add_scaled, packed_attention, rms_norm
from evovlm.csrc.random_torch import uniform_tensor
from evovlm.models.config import VisionConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight ``[H]``, float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def _norm(config: VisionConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class VisionEmbeddings(nn.Module):
    """Patches, class token and learned absolute positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.hidden_size))

    def positions(self, rows: int, cols: int) -> Tensor:
        """Positions ``[1, 1 + rows·cols, C]``: bicubic, in float32 or wider, from the learned square grid."""
        learned, grid = self.position_embedding, self.config.grid
        if (rows, cols) == (grid, grid):
            return learned
        wide = torch.promote_types(learned.dtype, torch.float32)
        square = learned[:, 1:].to(wide).reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(rows, cols), mode="bicubic", align_corners=False)
        return torch.cat((learned[:, :1], resized.flatten(2).transpose(1, 2).to(learned.dtype)), dim=1)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed tiles ``[N, 3, h, w]`` to ``[N, 1 + P, C]``; N may be 0."""
        patches = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype))
        positions = self.positions(patches.shape[2], patches.shape[3])
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat((class_token, patches.flatten(2).transpose(1, 2)), dim=1) + positions


class VisionAttention(nn.Module):
    """Bidirectional attention inside each tile, with one fused q, k, v projection.

    Its rows are ordered ``[head, q | k | v, D]``, so that any run of whole heads is an attention of its own; published
    checkpoints order them ``[q | k | v, head, D]``, and ``models/hf`` translates.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.hidden_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.hidden_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each tile: ``[N, P, C]`` to ``[N, P, C]``."""
        num_tiles, num_rows = x.shape[:2]
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        q, k = self.q_norm(q.flatten(-2)), self.k_norm(k.flatten(-2))
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
        tiles = torch.arange(0, (num_tiles + 1) * num_rows, num_rows, dtype=torch.int32, device="cpu")
        out = packed_attention(q, k, v, tiles, causal=False)
        projected: Tensor = self.proj(out.view(num_tiles, num_rows, out.shape[1] * out.shape[2]))
        return projected


class VisionMLP(nn.Module):
    """Two linears with an exact GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension: ``[..., C]`` to ``[..., C]``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class VisionLayer(nn.Module):
    """Pre-norm block with a learned scale per channel and drop path on both residual branches."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.drop_path_rate = config.drop_path_rate * layer / max(config.num_layers - 1, 1)
        self.norm1 = _norm(config)
        self.attn = VisionAttention(config)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.norm2 = _norm(config)
        self.mlp = VisionMLP(config)
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def _drop_path(self, tile_keys: Tensor | None, which: int, dtype: torch.dtype) -> Tensor | None:
        """Factors ``[N]`` that zero the branch of some tiles and scale up the rest: a hash of (tile, layer, branch)."""
        if not self.training or self.drop_path_rate == 0.0 or tile_keys is None:
            return None
        keep = uniform_tensor(tile_keys, 2 * self.layer + which) >= self.drop_path_rate
        return keep.to(dtype) / (1.0 - self.drop_path_rate)

    def forward(self, x: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Transform ``[N, 1 + P, C]``; ``tile_keys`` (int64 ``[N]``) seed drop path while training."""
        x = add_scaled(x, self.attn(self.norm1(x)), self.ls1, self._drop_path(tile_keys, 0, x.dtype))
        return add_scaled(x, self.mlp(self.norm2(x)), self.ls2, self._drop_path(tile_keys, 1, x.dtype))


class VisionEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, layer) for layer in range(config.num_layers))

    def forward(self, x: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Run every block over ``[N, 1 + P, C]``."""
        for layer in self.layers:
            x = layer(x, tile_keys)
        return x


class InternViT(nn.Module):
    """The vision encoder: tiles to patch features.

    Args:
        config: Its shape.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            tiles: ``[N, 3, S, S]``, normalised pixels; N may be 0. Edges other than the configured ones are
                encoded with interpolated positions.
            tile_keys: int64 ``[N]``, keys of drop path; without them drop path is off.

        Returns:
            ``[N, 1 + P, C]``; row 0 of each tile is the class token.
        """
        out: Tensor = self.encoder(self.embeddings(tiles), tile_keys)
        return out
