"""A model so small that bench tests train and ask it within seconds."""

from dataclasses import replace

from evovlm.models.table import TINY

SMALL = replace(
    TINY,
    vision=replace(TINY.vision, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32),
    decoder=replace(
        TINY.decoder,
        hidden_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=12,
        ffn_size=48,
        tie_embeddings=True,
    ),
    max_tiles=12,
)
