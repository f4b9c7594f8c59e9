"""Length mixes: spread as stated, keyed, the columns agree with each other."""

import numpy as np
import pytest

from evovlm.data.synthetic.lengths import MAX_TOKENS, MIXES, TOKENS_PER_TILE, length_mix


@pytest.mark.parametrize("name", MIXES)
def test_columns_agree(name: str) -> None:
    mix = length_mix(20_000, 1, name)
    assert {mix.tokens.dtype, mix.tiles.dtype, mix.images.dtype, mix.image_tiles.dtype} == {np.dtype(np.int32)}
    owner = np.repeat(np.arange(20_000), mix.images)
    assert np.bincount(owner, weights=mix.image_tiles, minlength=20_000).tolist() == mix.tiles.tolist()
    assert (mix.tokens > TOKENS_PER_TILE * mix.tiles).all()
    assert mix.tokens.max() <= MAX_TOKENS


def test_internvl_mix_has_a_heavy_tail_and_images_as_dynamic_tiling_gives() -> None:
    mix = length_mix(100_000, 0)
    assert set(mix.image_tiles.tolist()) == {1, *range(3, 14)}  # a grid of 2 has a thumbnail, too
    assert 0.25 < (mix.images == 0).mean() < 0.3
    assert (mix.tokens[mix.images == 0] < 100).any()
    assert 20 < (mix.tokens == MAX_TOKENS).sum() < 1000
    assert mix.images.max() == 32  # frames of a video
    assert mix.tiles.max() <= 48


def test_draws_are_keyed_by_sample() -> None:
    short, long, other = length_mix(100, 7), length_mix(200, 7), length_mix(100, 8)
    assert short.images.tolist() == long.images[:100].tolist()
    assert short.tokens.tolist() == long.tokens[:100].tolist()
    assert short.tokens.tolist() != other.tokens.tolist()
    assert length_mix(0, 0).image_tiles.shape == (0,)


def test_unknown_mix_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        length_mix(1, 0, "nothing")
