"""Vocabulary and position resizing, against transformers' procedure and plain formulas."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evovlm.models.config import DecoderConfig
from evovlm.models.hf import decoder_shapes, vision_shapes
from evovlm.models.init import initial_value
from evovlm.models.resize import new_tokens, resize_decoder, resize_positions
from evovlm.models.table import TINY
from evovlm.models.vit import VisionEmbeddings

from .hf_support import SPECIAL, WORDS, random_weights, write_tokenizer

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def small(vocab_size: int, *, tied: bool = False) -> DecoderConfig:
    return replace(TINY.decoder, vocab_size=vocab_size, hidden_size=8, num_layers=1, ffn_size=5, tie_embeddings=tied)


def resize(
    config: DecoderConfig, weights: dict[str, Tensor], vocab_size: int, new: Sequence[int] | None = None, seed: int = 0
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    resized, stream = resize_decoder(config, weights.items(), vocab_size=vocab_size, new_tokens=new, seed=seed)
    return resized, dict(stream)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 20), st.integers(2, 20), st.booleans())
def test_rows(data: st.DataObject, old: int, vocab_size: int, tied: bool) -> None:
    """Known rows are bitwise kept, new output rows are the mean of the known ones, everything else passes through."""
    config = small(old, tied=tied)
    shared = min(old, vocab_size)
    inside = data.draw(st.sets(st.integers(0, shared - 1), max_size=shared - 1))
    weights = random_weights(decoder_shapes(config), seed=old)
    resized, out = resize(config, weights, vocab_size, [*inside, *range(old, vocab_size)])
    assert resized == replace(config, vocab_size=vocab_size, tie_embeddings=False)
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == decoder_shapes(resized)
    for name in weights.keys() - {EMBED, HEAD}:
        assert out[name] is weights[name]
    assert torch.equal(out[EMBED][:shared], weights[EMBED][:shared])
    old_head = weights[EMBED] if tied else weights[HEAD]
    known = [row for row in range(shared) if row not in inside]
    assert torch.equal(out[HEAD][known], old_head[known])
    fresh = [row for row in range(vocab_size) if row not in known]
    mean = old_head[known].double().mean(0).float()
    torch.testing.assert_close(out[HEAD][fresh], mean.expand(len(fresh), -1), rtol=1e-6, atol=1e-7)


def test_same_as_resizing_in_transformers() -> None:
    """Qwen2.5's way to InternVL: a padded base is shrunk to old ids plus new ones, whose output rows become means."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    theirs = Qwen2Config(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    twin = Qwen2ForCausalLM(theirs)
    base = {EMBED: twin.get_input_embeddings().weight.detach().clone()}
    base[HEAD] = twin.get_output_embeddings().weight.detach().clone()
    num_new = 9
    twin.resize_token_embeddings(50 + num_new)
    head = twin.get_output_embeddings().weight.data
    head[-num_new:] = head[:-num_new].mean(0, keepdim=True)
    _, out = resize(small(64), base, 50 + num_new, range(50, 50 + num_new))
    assert torch.equal(out[EMBED], twin.get_input_embeddings().weight.data)
    torch.testing.assert_close(out[HEAD], head, rtol=1e-6, atol=1e-8)


def test_new_input_rows_are_those_of_a_fresh_model() -> None:
    """They are keyed by the parameter's name: the same whatever else was loaded, other for another seed."""
    config = small(5)
    weights = random_weights(decoder_shapes(config), 0)
    _, out = resize(config, weights, 2000, seed=3)
    whole = replace(TINY, decoder=replace(config, vocab_size=2000))
    fresh = initial_value(EMBED, torch.Size((2000, 8)), whole, seed=3)
    assert torch.equal(out[EMBED][5:], fresh[5:])
    assert float(out[EMBED][5:].std()) == pytest.approx(config.initializer_range, rel=0.05)
    assert not torch.equal(resize(config, weights, 2000, seed=4)[1][EMBED][5:], fresh[5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_means_are_wide(dtype: torch.dtype) -> None:
    config = small(300)
    weights = {EMBED: torch.ones(300, 8, dtype=dtype), HEAD: torch.full((300, 8), 1 + 2**-7, dtype=dtype)}
    _, out = resize(config, weights, 310)
    assert (out[EMBED].dtype, out[HEAD].dtype) == (dtype, dtype)
    assert torch.equal(out[HEAD][300:], weights[HEAD][:10])  # summed in bfloat16 it would be far off


def test_tied_base() -> None:
    config = small(6, tied=True)
    weights = random_weights(decoder_shapes(config), 0)
    untied, out = resize(config, weights, 6)
    assert not untied.tie_embeddings
    assert torch.equal(out[HEAD], weights[EMBED])
    assert out[HEAD].data_ptr() != out[EMBED].data_ptr()
    still, stream = resize_decoder(config, weights.items(), vocab_size=8, untie=False)
    assert still.tie_embeddings
    assert dict(stream).keys() == weights.keys()


def test_impossible_resizes() -> None:
    config = small(6)
    with pytest.raises(ValueError, match="new token ids 3 … 9 do not fit a vocabulary of 8"):
        resize(config, {}, 8, [3, 9])
    with pytest.raises(ValueError, match="all 4 rows would be new"):
        resize(config, {}, 4, range(4))


def test_new_tokens_of_an_extended_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "base", special=SPECIAL[:3])
    write_tokenizer(tmp_path / "ours", special=SPECIAL)
    assert new_tokens(tmp_path / "base", tmp_path / "ours") == list(range(len(WORDS) + 3, len(WORDS) + 12))
    assert new_tokens(tmp_path / "ours", tmp_path / "ours") == []
    assert new_tokens(tmp_path / "ours", tmp_path / "base") == []  # fewer tokens only shrink the model


def test_tokenizer_of_another_vocabulary(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "base")
    write_tokenizer(tmp_path / "moved", WORDS[::-1])
    with pytest.raises(ValueError, match=r"6 tokens have other ids .* such as '\?': 0 here, 6 there"):
        new_tokens(tmp_path / "base", tmp_path / "moved")
    write_tokenizer(tmp_path / "other", ("b", *WORDS[1:]))
    with pytest.raises(ValueError, match="id 0 is 'b' here but 'a'"):
        new_tokens(tmp_path / "base", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        new_tokens(tmp_path, tmp_path / "base")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_positions(old: int, new: int, seed: int) -> None:
    vision = replace(TINY.vision, hidden_size=4, num_heads=2, tile_size=7 * old, patch_size=7)
    name = "vision_model.embeddings.position_embedding"
    learned = random_weights({name: vision_shapes(vision)[name]}, seed)[name]
    out = resize_positions(learned, new)
    assert out.shape == (1, 1 + new * new, 4)
    assert torch.equal(out[:, 0], learned[:, 0])
    square = learned[0, 1:].view(old, old, 4).permute(2, 0, 1)[None]
    expected = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    torch.testing.assert_close(out[0, 1:].view(new, new, 4), expected[0].permute(1, 2, 0))
    embeddings = VisionEmbeddings(vision)
    with torch.no_grad():
        embeddings.position_embedding.copy_(learned)
        torch.testing.assert_close(embeddings.positions(new, new), out)


def test_positions_that_are_no_square() -> None:
    with pytest.raises(ValueError, match=r"\[1, 8, 4\] is not that of a square grid"):
        resize_positions(torch.zeros(1, 8, 4), 2)
