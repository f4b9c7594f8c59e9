"""InternVL: ViT, projector and decoder composed over one pack (spec §1.4).

    tiles [N, 3, S, S] ─ vision_model ─ pixel shuffle ─ mlp1 ─► visual tokens [N·256, H]
                                                                     │ written to rows ``visual_rows``
    tokens [T] ─ embed_tokens ──────────────────────────► embeddings [T, H] ─ decoder ─► hidden [T, H] ─ head ─► logits

Which rows are visual is told by ``visual_rows`` (made with the plan), never read off the token ids.
"""

from collections.abc import Callable

from torch import Tensor, nn

from evovlm.models.config import InternVLConfig
from evovlm.models.decoder import Attend, Decoder, PackedAttend
from evovlm.models.projector import build_projector, pixel_shuffle
from evovlm.models.vit import InternViT

Head = Callable[[Tensor, Tensor], Tensor]
"""What is made of the last hidden states: ``(hidden [T, H], head weight [V, H]) -> Tensor``."""


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

    def encode(self, tiles: Tensor, tile_keys: Tensor | None = None) -> Tensor:
        """Turn tiles ``[N, 3, S, S]`` into visual tokens ``[N·tokens_per_tile, H]``, tile by tile; N may be 0."""
        features = self.vision_model(tiles, tile_keys)[:, 1:]
        projected: Tensor = self.mlp1(pixel_shuffle(features, self.config.downsample).flatten(0, 1))
        return projected

    def embed(self, tokens: Tensor, visual_tokens: Tensor, visual_rows: Tensor) -> Tensor:
        """Embed tokens ``[T]`` and write the visual tokens to their rows: ``[T, H]``.

        Raises:
            ValueError: The numbers of rows and of visual tokens differ.
        """
        if visual_rows.shape[0] != visual_tokens.shape[0]:
            raise ValueError(
                f"{visual_tokens.shape[0]} visual tokens for {visual_rows.shape[0]} rows of the pack: "
                "tiles and their places come from different plans"
            )
        embeddings: Tensor = self.language_model.model.embed_tokens(tokens)
        # Also with no rows at all: the graph then still reaches the ViT, so every rank runs the same collectives.
        return embeddings.index_copy(0, visual_rows, visual_tokens.to(embeddings.dtype))

    def decode(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the decoder over ``[T, H]`` embeddings; returns the last hidden states ``[T, H]``."""
        hidden: Tensor = self.language_model.model(embeddings, positions, attend)
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
            head: What to make of hidden states and head weight, such as a loss that never holds all logits.

        Returns:
            What ``head`` returns; without one the logits ``[T, V]``.

        Raises:
            ValueError: Tiles and visual rows do not match.
        """
        embeddings = self.embed(tokens, self.encode(tiles, tile_keys), visual_rows)
        hidden = self.decode(embeddings, positions, PackedAttend(cu_seqlens))
        lm_head = self.language_model.lm_head
        if head is not None:
            return head(hidden, lm_head.weight)
        logits: Tensor = lm_head(hidden)
        return logits
