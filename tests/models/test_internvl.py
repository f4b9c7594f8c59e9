"""The composition: visual tokens go where the plan says, and no images leave the ViT in the graph."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evovlm.models.config import InternVLConfig
from evovlm.models.decoder import PackedAttend
from evovlm.models.internvl import InternVL
from evovlm.models.projector import pixel_shuffle

MakeModel = Callable[[InternVLConfig], InternVL]
T = 24


@pytest.fixture(scope="module")
def model(small_config: InternVLConfig, make_model: MakeModel) -> InternVL:
    return make_model(small_config)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Two segments; two tiles of the first, one of the second, which fill rows in no simple order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, 40, (T,), generator=generator),
        "positions": torch.cat((torch.arange(14.0), torch.arange(10.0))),
        "cu_seqlens": torch.tensor([0, 14, T], dtype=torch.int32),
        "tiles": torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64),
        "visual_rows": torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 18, 19]),
    }


def test_visual_tokens_replace_embeddings_at_their_rows(model: InternVL, inputs: dict[str, Tensor]) -> None:
    visual = model.encode(inputs["tiles"])
    assert visual.shape == (12, 16)
    text = model.language_model.model.embed_tokens(inputs["tokens"])
    places = [(inputs["visual_rows"] == row).nonzero().flatten().tolist() for row in range(T)]
    embeddings = torch.stack([visual[place[0]] if place else text[row] for row, place in enumerate(places)])
    attend = PackedAttend(inputs["cu_seqlens"])
    hidden = model.language_model(embeddings, inputs["positions"], attend)
    rows = (inputs["visual_rows"], visual)
    assert torch.equal(model.decode(inputs["tokens"], inputs["positions"], attend, rows), hidden)
    assert torch.equal(model(**inputs), F.linear(hidden, model.language_model.lm_head.weight))


def test_visual_tokens_are_projected_patches_without_the_class_token(
    model: InternVL, inputs: dict[str, Tensor]
) -> None:
    tiles = inputs["tiles"]
    expected = torch.cat(
        [model.mlp1(pixel_shuffle(model.vision_model(tile[None])[:, 1:], 2)[0]) for tile in tiles]  # tile by tile
    )
    torch.testing.assert_close(model.encode(tiles), expected, rtol=0, atol=1e-12)


def test_encoding_is_seeing_and_projecting(model: InternVL, inputs: dict[str, Tensor]) -> None:
    keys = torch.arange(3)
    model.train()
    features = model.see(inputs["tiles"], keys)
    assert features.shape == (3, 4, 4 * 16)
    assert torch.equal(model.project(features.flatten(0, 1)), model.encode(inputs["tiles"], keys))
    assert not torch.equal(features, model.see(inputs["tiles"]))  # without keys nothing is dropped
    model.eval()
    # A token is projected by itself: features may be exchanged first, and in any order.
    turned = features.flatten(0, 1).flip(0)
    torch.testing.assert_close(model.project(turned), model.project(features).flatten(0, 1).flip(0))
    nothing = model.see(torch.empty(0, 3, 8, 8, dtype=torch.float64))
    assert (nothing.shape, model.project(nothing).shape) == ((0, 4, 64), (0, 4, 16))


def test_decoding_text_needs_no_visual_tokens(model: InternVL, inputs: dict[str, Tensor]) -> None:
    attend = PackedAttend(inputs["cu_seqlens"])
    none = (torch.empty(0, dtype=torch.int64), torch.empty(0, 16, dtype=torch.float64))
    text = model.decode(inputs["tokens"], inputs["positions"], attend)
    assert text.shape == (T, 16)
    assert torch.equal(model.decode(inputs["tokens"], inputs["positions"], attend, none), text)


def test_ids_at_visual_rows_do_not_matter(model: InternVL, inputs: dict[str, Tensor]) -> None:
    logits = model(**inputs)
    assert logits.shape == (T, 40)
    changed = dict(inputs, tokens=inputs["tokens"].clone())
    changed["tokens"][inputs["visual_rows"]] = 0  # id 0 is a real token elsewhere, and no mask here
    assert torch.equal(model(**changed), logits)


def test_the_head_gets_hidden_states_and_its_weight(model: InternVL, inputs: dict[str, Tensor]) -> None:
    assert torch.equal(model(**inputs, head=F.linear), model(**inputs))
    shapes = model(**inputs, head=lambda hidden, weight: torch.tensor([*hidden.shape, *weight.shape]))
    assert shapes.tolist() == [T, 16, 40, 16]


def test_rows_and_tiles_must_match(model: InternVL, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="8 visual tokens for 12 rows"):
        model(**dict(inputs, tiles=inputs["tiles"][:2]))


def test_gradients_reach_every_module(model: InternVL, inputs: dict[str, Tensor]) -> None:
    gradients = torch.autograd.grad(model(**inputs).square().sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0, name


def test_a_pack_of_text_gives_the_vit_zero_gradients_not_none(model: InternVL, inputs: dict[str, Tensor]) -> None:
    nothing = {"tiles": torch.empty(0, 3, 8, 8, dtype=torch.float64), "visual_rows": torch.empty(0, dtype=torch.int64)}
    logits = model(**(inputs | nothing))
    attend = PackedAttend(inputs["cu_seqlens"])
    text = model.language_model(inputs["tokens"], inputs["positions"], attend, head=F.linear)
    assert torch.equal(logits, text)
    vision = [p for name, p in model.named_parameters() if not name.startswith("language_model.")]
    gradients = torch.autograd.grad(logits.square().sum(), vision)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_images_of_one_segment_do_not_reach_another(model: InternVL, inputs: dict[str, Tensor]) -> None:
    before = model(**inputs)
    changed = dict(inputs, tiles=inputs["tiles"].clone())
    changed["tiles"][2] += 1
    after = model(**changed)
    assert torch.equal(before[:14], after[:14])
    assert torch.equal(before[14:16], after[14:16])  # nor what stands before the image
    assert not torch.allclose(before[16:], after[16:])


def test_grids_that_pixel_shuffle_does_not_divide_are_errors(small_config: InternVLConfig) -> None:
    with pytest.raises(ValueError, match="4 patches along an edge, which pixel shuffle by 3 does not divide"):
        replace(small_config, downsample=3)
