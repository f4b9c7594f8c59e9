"""What the tests of the Hugging Face adapter share: random configurations, random weights, transformers' twin."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.names import canonical, model_shapes, published_names
from evovlm.models.hf.write_config import write_model
from evovlm.models.internvl import InternVL

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>")
SPECIAL += ("<ref>", "</ref>", "<box>", "</box>")
NARROWEST = 12
"""Width of the narrowest model: below, a norm over few channels now and then blows rounding up beyond 1e-5."""
WORDS = ("a", "red", "dog", "and", "two", "cats", "?")


def write_tokenizer(directory: Path, words: Sequence[str] = WORDS, special: Sequence[str] = SPECIAL) -> int:
    """Write a word-level tokenizer; returns its number of ids."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


@st.composite
def vision_configs(draw: st.DrawFn, grids: Sequence[int] = (2, 4, 6)) -> VisionConfig:
    patch, heads = draw(st.sampled_from((2, 3))), draw(st.integers(1, 3))
    return VisionConfig(
        hidden_size=heads * (-(-NARROWEST // heads) + draw(st.integers(0, 4))),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        ffn_size=draw(st.integers(5, 24)),
        tile_size=draw(st.sampled_from(tuple(grids))) * patch,
        patch_size=patch,
        norm=draw(st.sampled_from(("layer_norm", "rms_norm"))),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@st.composite
def decoder_configs(draw: st.DrawFn, vocab_size: int | None = None) -> DecoderConfig:
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))  # 6 heads make a width that no power of two divides
    family = draw(st.sampled_from(("qwen2", "internlm3")))
    return DecoderConfig(
        vocab_size=vocab_size or draw(st.integers(11, 60)),
        hidden_size=heads * (-(-NARROWEST // heads) + draw(st.integers(0, 2))),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((4, 6, 8))),
        ffn_size=draw(st.integers(5, 24)),
        qkv_bias=family == "qwen2",
        rope_theta=draw(st.sampled_from((1e4, 1e6, 5e7))),
        norm_eps=draw(st.sampled_from((1e-6, 1e-5))),
        tie_embeddings=draw(st.booleans()),
        family=family,
        max_positions=draw(st.sampled_from((256, 32768))),
    )


@st.composite
def model_configs(draw: st.DrawFn, vocab_size: int | None = None) -> InternVLConfig:
    max_tiles = draw(st.integers(2, 12))
    return InternVLConfig(
        vision=draw(vision_configs()),
        decoder=draw(decoder_configs(vocab_size)),
        downsample=draw(st.sampled_from((1, 2))),
        max_tiles=max_tiles,
        min_tiles=draw(st.integers(1, max_tiles)),
    )


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights under which every parameter matters (no zeros, no ones) and logits are of order 1, as 1e-5 presumes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            value *= 0.2
        elif len(shape) == 1:
            value = 1 + 0.2 * value
        elif len(shape) == 2:
            value *= 0.6 * shape[1] ** -0.5
        elif len(shape) == 4:
            value *= (shape[1] * shape[2] * shape[3]) ** -0.5
        weights[name] = value
    return weights


def as_published(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Our weights with the rows of q, k, v projections in the published order, found one by one."""
    published = dict(weights)
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            dim = len(tensor) // (3 * num_heads)
            published[name] = torch.stack(
                [
                    tensor[head * 3 * dim + part * dim + row]
                    for part in range(3)
                    for head in range(num_heads)
                    for row in range(dim)
                ]
            )
    return published


def random_model(config: InternVLConfig, seed: int = 0) -> InternVL:
    """Our model with random weights, in evaluation mode."""
    model = InternVL(config)
    result = model.load_state_dict(random_weights(model_shapes(config), seed), strict=not config.decoder.tie_embeddings)
    assert not result.unexpected_keys
    return model.eval()


def transformers_twin(config: InternVLConfig, model: InternVL, image_token: int) -> Any:
    """Build transformers' model from the ``config.json`` that we write, and give it our weights by name."""
    from transformers import InternVLConfig as TheirConfig
    from transformers import InternVLForConditionalGeneration

    written = write_model(config, "transformers", dtype=torch.float32, image_token=image_token, eos=1, bos=None)
    twin = InternVLForConditionalGeneration(TheirConfig.from_dict(json.loads(json.dumps(written)))).eval()
    ours: dict[str, Tensor] = {}
    for name, tensor in as_published(model.state_dict(), config.vision.num_heads).items():
        names = published_names(name, "transformers")
        ours |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    theirs = twin.state_dict()
    assert {canonical(name) for name in theirs} == set(ours)
    twin.load_state_dict({name: ours[canonical(name)] for name in theirs})
    return twin


@dataclass(repr=False)
class Sample:
    """One segment: its tokens, which of them are visual, and its tiles."""

    tokens: Tensor
    visual: Tensor
    tiles: Tensor

    def __repr__(self) -> str:
        return f"Sample({len(self.tokens)} tokens, {len(self.tiles)} tiles)"


def random_sample(config: InternVLConfig, tiles_per_image: Sequence[int], texts: Sequence[int], seed: int) -> Sample:
    """Text, image, text, image, …, text; the largest id is the image token and never occurs in text."""
    generator = torch.Generator().manual_seed(seed)
    image_token = config.decoder.vocab_size - 1
    pieces, visual = [], []
    for i, length in enumerate(texts):
        pieces.append(torch.randint(0, image_token, (length,), generator=generator))
        visual.append(torch.zeros(length, dtype=torch.bool))
        if i < len(tiles_per_image):
            run = tiles_per_image[i] * config.tokens_per_tile
            pieces.append(torch.full((run,), image_token))
            visual.append(torch.ones(run, dtype=torch.bool))
    edge = config.vision.tile_size
    tiles = torch.randn(sum(tiles_per_image), 3, edge, edge, generator=generator)
    return Sample(torch.cat(pieces), torch.cat(visual), tiles)


@st.composite
def samples(draw: st.DrawFn, config: InternVLConfig) -> Sample:
    images = draw(st.lists(st.integers(1, 3), max_size=2))
    texts = draw(st.lists(st.integers(1, 7), min_size=len(images) + 1, max_size=len(images) + 1))
    return random_sample(config, images, texts, draw(st.integers(0, 2**31)))


def packed_logits(model: InternVL, pack: Sequence[Sample]) -> list[Tensor]:
    """Run several segments in one forward pass; logits ``[T, V]`` of each."""
    lengths = [len(sample.tokens) for sample in pack]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths])
    rows = torch.cat([sample.visual for sample in pack]).nonzero()[:, 0]
    tokens = torch.cat([sample.tokens for sample in pack])
    with torch.no_grad():
        logits = model(tokens, positions, borders, torch.cat([sample.tiles for sample in pack]), rows)
    return list(logits.split(lengths))


def twin_logits(twin: Any, sample: Sample) -> Tensor:
    """Run one sample through transformers' model: logits ``[T, V]``."""
    with torch.no_grad():
        tiles = sample.tiles if len(sample.tiles) else None
        logits: Tensor = twin(input_ids=sample.tokens[None], pixel_values=tiles).logits[0]
    return logits


def divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """Largest KL(p ‖ q) over tokens, in float64."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())
