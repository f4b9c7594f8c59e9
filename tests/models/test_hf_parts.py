"""Bare ViT and bare language model directories, as native pre-training starts from them."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from evovlm.models.config import DecoderConfig, VisionConfig
from evovlm.models.decoder import Decoder, PackedAttend
from evovlm.models.hf import (
    CheckpointError,
    ConfigError,
    decoder_shapes,
    detect,
    read_llm_dir,
    read_state,
    read_vision_dir,
    vision_shapes,
)
from evovlm.models.hf.names import canonical, published_names
from evovlm.models.hf.write_config import write_decoder, write_vision
from evovlm.models.table import TINY
from evovlm.models.vit import InternViT

from .hf_support import as_published, decoder_configs, random_weights, vision_configs


def as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


def bare(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@settings(max_examples=15, deadline=None)
@given(vision_configs(), st.integers(0, 2**31))
def test_vit_of_opengvlab(config: VisionConfig, seed: int) -> None:
    weights = random_weights(vision_shapes(config), seed)
    with TemporaryDirectory() as tmp:
        published = as_published(weights, config.num_heads)
        save_file(bare(published, "vision_model."), Path(tmp, "model.safetensors"))
        Path(tmp, "config.json").write_text(json.dumps(write_vision(config, "internvl")))
        assert detect(tmp) == "vision"
        read, stream = read_vision_dir(tmp)
        assert read == config
        assert_same(dict(stream), weights)


@settings(max_examples=15, deadline=None)
@given(vision_configs(), st.sampled_from(("1KB", "1GB")), st.integers(0, 2**31))
def test_vit_of_transformers(config: VisionConfig, shard: str, seed: int) -> None:
    """What its InternVLVisionModel saves, and the two models give the same features."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    weights = random_weights(vision_shapes(config), seed)
    twin = InternVLVisionModel(InternVLVisionConfig.from_dict(as_json(write_vision(config, "transformers")))).eval()
    theirs: dict[str, Tensor] = {}
    for name, tensor in as_published(weights, config.num_heads).items():
        names = published_names(name, "transformers")
        theirs |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    twin.load_state_dict(bare(theirs, "vision_tower."))
    model = InternViT(config).eval()
    model.load_state_dict(bare(weights, "vision_model."))
    tiles = torch.randn(2, 3, config.tile_size, config.tile_size)
    with torch.no_grad():
        torch.testing.assert_close(model(tiles), twin(tiles).last_hidden_state, rtol=0, atol=1e-5)
    with TemporaryDirectory() as tmp:
        twin.save_pretrained(tmp, max_shard_size=shard)
        read, stream = read_vision_dir(tmp)
        assert read == config
        assert_same(dict(stream), weights)


@settings(max_examples=15, deadline=None)
@given(decoder_configs(), st.sampled_from(("1KB", "1GB")), st.integers(0, 2**31))
def test_language_model_of_transformers(config: DecoderConfig, shard: str, seed: int) -> None:
    """What Qwen2ForCausalLM and LlamaForCausalLM save, tied or not, and the models give the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    weights = random_weights(decoder_shapes(config), seed)
    written = as_json(write_decoder(config, "transformers", 1, None))
    if config.qkv_bias:
        twin: Any = Qwen2ForCausalLM(Qwen2Config.from_dict(written))
    else:
        twin = LlamaForCausalLM(LlamaConfig.from_dict(written))
    twin.load_state_dict(bare(weights, "language_model."), strict=not config.tie_embeddings)
    tokens = torch.randint(0, config.vocab_size, (12,))
    model = Decoder(config).eval()
    model.load_state_dict(bare(weights, "language_model."), strict=not config.tie_embeddings)
    with torch.no_grad():
        attend = PackedAttend(torch.tensor([0, 12], dtype=torch.int32))
        ours = model(tokens, torch.arange(12.0), attend, head=functional.linear)
        torch.testing.assert_close(ours, twin.eval()(tokens[None]).logits[0], rtol=0, atol=1e-5)
    with TemporaryDirectory() as tmp:
        twin.save_pretrained(tmp, max_shard_size=shard)
        assert detect(tmp) == "llm"
        read, stream = read_llm_dir(tmp)
        assert read == config
        assert_same(dict(stream), weights)


def test_base_that_does_not_mention_tying(tmp_path: Path) -> None:
    config = replace(TINY.decoder, num_layers=1, vocab_size=30)
    written = as_json(write_decoder(config, "internvl", 1, None))
    del written["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    weights = bare(random_weights(decoder_shapes(config), 0), "language_model.")
    save_file(weights, tmp_path / "model.safetensors")
    assert not read_llm_dir(tmp_path)[0].tie_embeddings
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert read_llm_dir(tmp_path)[0].tie_embeddings


def test_wrong_kind_of_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(write_decoder(TINY.decoder, "internvl", 1, None)))
    with pytest.raises(CheckpointError, match="holds a llm model, not a bare ViT"):
        read_vision_dir(tmp_path)
    with pytest.raises(ConfigError, match="bare qwen2 model"):
        read_state(tmp_path)
    with pytest.raises(CheckpointError, match="holds a bare llm model; use read_vision_dir or read_llm_dir"):
        read_state(tmp_path, TINY)
    (tmp_path / "config.json").write_text(json.dumps(write_vision(TINY.vision, "internvl")))
    with pytest.raises(CheckpointError, match="holds a vision model, not a bare language model"):
        read_llm_dir(tmp_path)


def test_spellings_of_names_agree() -> None:
    names = [name for ours in decoder_shapes(TINY.decoder) for name in published_names(ours, "transformers")]
    assert [canonical(name) for name in names] == names
