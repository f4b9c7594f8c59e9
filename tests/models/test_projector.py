"""Pixel shuffle against its formula, and the projector's layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evovlm.models.projector import build_projector, pixel_shuffle
from evovlm.models.table import SIZES, TINY


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_pixel_shuffle_is_its_formula(num_tiles: int, merged: int, factor: int, channels: int) -> None:
    edge = merged * factor
    x = torch.arange(num_tiles * edge * edge * channels, dtype=torch.float64).reshape(num_tiles, edge, edge, channels)
    out = pixel_shuffle(x.flatten(1, 2), factor)
    assert out.shape == (num_tiles, merged**2, channels * factor**2)
    for n in range(num_tiles):
        for i in range(merged):
            for j in range(merged):
                # Spec §1.3 for factor 2: concat(x[2i,2j], x[2i,2j+1], x[2i+1,2j], x[2i+1,2j+1]), tokens row-major.
                parts = [x[n, factor * i + p, factor * j + q] for p in range(factor) for q in range(factor)]
                assert torch.equal(out[n, i * merged + j], torch.cat(parts))


@pytest.mark.parametrize(("patches", "factor"), [(12, 2), (9, 2), (16, 3)])
def test_patches_that_do_not_divide_are_an_error(patches: int, factor: int) -> None:
    with pytest.raises(ValueError, match=f"by {factor} .* got {patches} patches"):
        pixel_shuffle(torch.zeros(1, patches, 4), factor)


def test_projector_is_norm_linear_gelu_linear() -> None:
    projector = build_projector(TINY)
    kinds = [type(layer) for layer in projector]
    assert kinds == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert projector[0].eps == 1e-5  # the projector's norm, not the ViT's 1e-6 (spec §1.3)
    assert projector[2].approximate == "none"
    assert (projector[1].in_features, projector[1].out_features) == (TINY.shuffled_size, TINY.decoder.hidden_size)


def test_a_published_tile_is_256_tokens() -> None:
    for name, config in SIZES.items():
        if name != "tiny":
            assert config.tokens_per_tile == 256
