"""InternVL: ViT, projector and decoder composed over one pack (spec §1.4).

    tiles [N, 3, S, S] ─ vision_model ─ pixel shuffle ─ mlp1 ─► visual tokens [N·256, H]
                                                                     │ written to rows ``visual_rows``
    tokens [T] ─ embed_tokens ──────────────────────────► embeddings [T, H] ─ decoder ─► hidden [T, H] ─ head ─► logits

Which rows are visual is told by ``visual_rows`` (made with the plan), never read off the token ids.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from evovlm.models.config import InternVLConfig
from evovlm.models.decoder import Attend, Decoder, Head, PackedAttend
from evovlm.models.projector import build_projector, pixel_shuffle
from evovlm.models.vit import InternViT


class InternVL(nn.Module):
    """A vision-language model over packed sequences. Parameter names are those of OpenGVLab's checkpoints.

    Args:
        config: Shapes of its parts.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision)
        self.mlp1 = build_projector(config)
        self.language_model = Decoder(config.decoder)

    def see(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Turn tiles ``[N, 3, S, S]`` into features ``[N, tokens_per_tile, C·p²]``; N may be 0."""
        return pixel_shuffle(self.vision_model(tiles, tile_keys)[:, 1:], self.config.downsample)

    def project(self, features: Tensor) -> Tensor:
        """Turn features ``[..., C·p²]`` into visual tokens ``[..., H]``."""
        projected: Tensor = self.mlp1(features)
        return projected

    def encode(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Turn tiles ``[N, 3, S, S]`` into visual tokens ``[N·tokens_per_tile, H]``, tile by tile; N may be 0."""
        return self.project(self.see(tiles, tile_keys).flatten(0, 1))

    def decode(
        self, tokens: Tensor, positions: Tensor, attend: Attend, visual: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Embed and run tokens ``[T]``, visual tokens at their rows; returns the last hidden states ``[T, H]``."""
        hidden: Tensor = self.language_model(tokens, positions, attend, visual=visual)
        return hidden

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        tiles: Tensor,
        visual_rows: Tensor,
        tile_keys: Tensor | None = None,
        *,
        prefixes: Tensor | None = None,
        head: Head | None = None,
    ) -> Tensor:
        """Run one pack.

        Args:
            tokens: int64 ``[T]``; ids at visual rows are ignored.
            positions: float32 ``[T]``, from :mod:`evovlm.models.v2pe`.
            cu_seqlens: int32 ``[S + 1]`` on the host, segment borders.
            tiles: ``[N, 3, S, S]``, N ≥ 0.
            visual_rows: int64 ``[N·tokens_per_tile]``, the rows that the tiles' visual tokens fill, in tile order.
            tile_keys: int64 ``[N]``, keys of drop path (training only).
            prefixes: int32 ``[n, 4]`` on the host, shared prefixes: see :class:`evovlm.models.decoder.PackedAttend`.
            head: What to make of hidden states and head weight, such as a loss that never holds all logits.

        Returns:
            What ``head`` returns; without one the logits ``[T, V]``.

        Raises:
            ValueError: Tiles and visual rows do not match, or prefixes do not fit the segments.
        """
        visual = self.encode(tiles, tile_keys)
        if visual_rows.shape[0] != visual.shape[0]:
            raise ValueError(
                f"{visual.shape[0]} visual tokens for {visual_rows.shape[0]} rows of the pack: "
                "tiles and their places come from different plans"
            )
        made: Tensor = self.language_model(
            tokens, positions, PackedAttend(cu_seqlens, prefixes), visual=(visual_rows, visual), head=head or F.linear
        )
        return made
