"""Our model equals transformers' InternVLForConditionalGeneration on random weights, over many configurations."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.models.config import InternVLConfig
from evovlm.models.table import TINY

from .hf_support import (
    divergence,
    model_configs,
    packed_logits,
    random_model,
    random_sample,
    samples,
    transformers_twin,
    twin_logits,
)

ATOL = 1e-5
MAX_KL = 3e-7
FAST = settings(max_examples=25, deadline=None)


@FAST
@given(st.data(), model_configs(), st.integers(0, 2**31))
def test_logits_equal_those_of_transformers(data: st.DataObject, config: InternVLConfig, seed: int) -> None:
    model = random_model(config, seed)
    twin = transformers_twin(config, model, image_token=config.decoder.vocab_size - 1)
    pack = data.draw(st.lists(samples(config), min_size=1, max_size=3))
    for sample, ours in zip(pack, packed_logits(model, pack), strict=True):
        theirs = twin_logits(twin, sample)
        assert theirs.std() > 1e-2  # the weights are not so small that anything would agree
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)
        assert divergence(theirs, ours) <= MAX_KL


@FAST
@given(st.data(), model_configs(), st.integers(0, 2**31))
def test_pack_equals_its_segments_one_by_one(data: st.DataObject, config: InternVLConfig, seed: int) -> None:
    model = random_model(config, seed)
    pack = data.draw(st.lists(samples(config), min_size=2, max_size=4))
    together = packed_logits(model, pack)
    for sample, ours in zip(pack, together, strict=True):
        (alone,) = packed_logits(model, [sample])
        torch.testing.assert_close(ours, alone, rtol=0, atol=ATOL)


def test_tiny_size_equals_transformers() -> None:
    """The size that the quickstart trains, with more tokens than hypothesis draws."""
    model = random_model(TINY, seed=1)
    twin = transformers_twin(TINY, model, image_token=TINY.decoder.vocab_size - 1)
    sample = random_sample(TINY, [5, 1], [20, 15, 30], seed=2)
    (ours,) = packed_logits(model, [sample])
    theirs = twin_logits(twin, sample)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)
    assert divergence(theirs, ours) <= MAX_KL


@FAST
@given(model_configs(), st.sampled_from((2, 4, 8)), st.integers(0, 2**31))
def test_tiles_of_another_size_use_interpolated_positions(config: InternVLConfig, grid: int, seed: int) -> None:
    model = random_model(config, seed)
    twin = transformers_twin(config, model, image_token=0)
    edge = grid * config.vision.patch_size
    tiles = torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        theirs = twin.get_image_features(pixel_values=tiles).pooler_output
        torch.testing.assert_close(model.encode(tiles), theirs.flatten(0, 1), rtol=0, atol=ATOL)


def test_parity_would_notice_each_parameter() -> None:
    """Doubling any one tensor of the twin moves its logits by far more than the tolerance."""
    vision = replace(
        TINY.vision, hidden_size=12, num_heads=3, num_layers=1, ffn_size=9, tile_size=14, patch_size=7, qk_norm=True
    )
    decoder = replace(TINY.decoder, hidden_size=16, num_layers=1, ffn_size=9, vocab_size=23, head_dim=4)
    config = replace(TINY, vision=vision, decoder=decoder)
    model = random_model(config)
    twin = transformers_twin(config, model, image_token=22)
    sample = random_sample(config, [2], [4, 5], seed=3)
    before = twin_logits(twin, sample)
    # With qk_norm also the ViT's key bias counts; without, it shifts all scores of a query alike.
    for name, parameter in twin.named_parameters():
        with torch.no_grad():
            parameter.mul_(2)
            moved = float((twin_logits(twin, sample) - before).abs().max())
            parameter.div_(2)
        assert moved > 10 * ATOL, name
