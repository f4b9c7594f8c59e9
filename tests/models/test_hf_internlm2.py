"""The published layout of VisualPRM-8B: a reward model's architecture around InternLM2.5's names and fused q, k, v."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evovlm.models.config import InternVLConfig
from evovlm.models.hf import (
    CheckpointError,
    ConfigError,
    load_config,
    read_llm_dir,
    read_state,
    save_pretrained,
    system_message,
    vocabulary,
)
from evovlm.models.hf.read_config import read_model

from .hf_support import random_sample, write_tokenizer
from .sentencepiece_support import train, write_published
from .visualprm_support import config_json, internlm2, write_reward_model


@pytest.fixture(scope="module")
def config(small_config: InternVLConfig) -> InternVLConfig:
    return internlm2(small_config, vocab_size=44)


def test_config_as_published() -> None:
    """The keys of VisualPRM-8B's file that concern the model, values included (InternVL2.5-8B's)."""
    llm = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 92553,
    }
    vision = {"model_type": "intern_vit_6b", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"intermediate_size": 4096, "image_size": 448, "qkv_bias": True, "qk_normalization": False}
    outer = {"architectures": ["InternVLRewardModel"], "model_type": "internvl_chat", "ps_version": "v2"}
    read = read_model({**outer, "llm_config": llm, "vision_config": vision}, {}, tied=True).decoder
    assert (read.num_heads, read.num_kv_heads, read.head_dim, read.ffn_size) == (32, 8, 128, 14336)
    assert (read.rope_theta, read.norm_eps, read.vocab_size) == (1e6, 1e-5, 92553)
    assert not read.qkv_bias
    assert not read.tie_embeddings
    del llm["model_type"]
    assert read_model({**outer, "llm_config": llm, "vision_config": vision}, {}, tied=True).decoder == read


def test_weights_come_back(tmp_path: Path, config: InternVLConfig) -> None:
    weights = write_reward_model(tmp_path, config)
    assert load_config(tmp_path) == config
    found = dict(read_state(tmp_path))
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_fused_rows_are_those_of_the_published_attention(tmp_path: Path, config: InternVLConfig) -> None:
    """InternLM2 views its projection as [T, K, A/K + 2, D]: queries first, then the key, then the value."""
    write_reward_model(tmp_path, config)
    stored, found = load_file(tmp_path / "model.safetensors"), dict(read_state(tmp_path))
    shape = config.decoder
    base = "language_model.model.layers.1."
    x = torch.randn(5, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    group = shape.num_heads // shape.num_kv_heads
    fused = (x @ stored[f"{base}attention.wqkv.weight"].T).view(5, shape.num_kv_heads, group + 2, shape.head_dim)
    expected = {"q": fused[:, :, :group].flatten(1), "k": fused[:, :, -2].flatten(1), "v": fused[:, :, -1].flatten(1)}
    for part, value in expected.items():
        torch.testing.assert_close(x @ found[f"{base}self_attn.{part}_proj.weight"].T, value, rtol=1e-6, atol=1e-6)


def test_a_published_reward_model_exports_to_transformers(tmp_path: Path, config: InternVLConfig) -> None:
    from transformers import InternVLForConditionalGeneration

    from evovlm.models.internvl import InternVL

    size = write_tokenizer(tmp_path / "tokenizer")
    weights = write_reward_model(tmp_path / "published", config)
    save_pretrained(config, read_state(tmp_path / "published"), tmp_path / "out", tokenizer_dir=tmp_path / "tokenizer")
    twin = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    model = InternVL(config).double().eval()
    model.load_state_dict(weights)
    sample = random_sample(config, [2], [3, 9], seed=3)
    sample.tokens[sample.visual] = size - 7  # <IMG_CONTEXT>
    sample.tokens[~sample.visual] %= size - 7
    with torch.no_grad():
        theirs = twin(input_ids=sample.tokens[None], pixel_values=sample.tiles.double()).logits[0]
        borders = torch.tensor([0, len(sample.tokens)], dtype=torch.int32)
        positions = torch.arange(len(sample.tokens), dtype=torch.float32)
        ours = model(sample.tokens, positions, borders, sample.tiles.double(), sample.visual.nonzero()[:, 0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # their rotary frequencies are float32


def test_an_export_brings_a_tokenizer_that_transformers_loads(tmp_path: Path, config: InternVLConfig) -> None:
    from transformers import AutoTokenizer

    published = write_published(tmp_path / "published", train("The answer: 8 + 1\n" * 20, vocab_size=290))
    size = max(vocabulary(published).values()) + 1
    wide = replace(config, decoder=replace(config.decoder, vocab_size=size))
    write_reward_model(published, wide)
    save_pretrained(wide, read_state(published), tmp_path / "out", tokenizer_dir=published)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert vocabulary(tmp_path / "out") == vocabulary(published)
    assert theirs("<|im_start|>8 +<IMG_CONTEXT>", add_special_tokens=False).input_ids[-1] == size - 7
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_a_bare_language_model(tmp_path: Path, config: InternVLConfig) -> None:
    weights = write_reward_model(tmp_path, config)
    prefix = "language_model."
    stored = load_file(tmp_path / "model.safetensors")
    llm = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    save_file(llm, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)["llm_config"]))
    shape, tensors = read_llm_dir(tmp_path)
    assert shape == config.decoder
    found = dict(tensors)
    assert found.keys() == {name for name in weights if name.startswith(prefix)}
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_tying_is_decided_by_the_stored_head(tmp_path: Path, config: InternVLConfig) -> None:
    write_reward_model(tmp_path, config)
    silent = config_json(config)
    del silent["llm_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(silent))
    assert not load_config(tmp_path).decoder.tie_embeddings


def test_a_missing_or_misshapen_projection_is_named_as_published(tmp_path: Path, config: InternVLConfig) -> None:
    write_reward_model(tmp_path, config)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = "language_model.model.layers.0.attention.wqkv.weight"
    rows = len(stored[name])
    save_file(stored | {name: stored[name][:-4].clone()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is \[{rows - 4}, 16\], the configuration says \[{rows}, 16\]"):
        read_state(tmp_path)
    del stored[name]
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=rf"missing: {name}"):
        read_state(tmp_path)


def test_biases_are_refused(config: InternVLConfig) -> None:
    written = config_json(config)
    written["llm_config"]["bias"] = True
    with pytest.raises(ConfigError, match=r"llm_config\.bias is True"):
        read_model(written, {}, tied=False)


def test_system_message(tmp_path: Path, config: InternVLConfig) -> None:
    def written(**changes: object) -> tuple[bool, str | None]:
        (tmp_path / "config.json").write_text(json.dumps(config_json(config, **changes)))
        return system_message(tmp_path)

    assert written() == (True, None)
    assert written(system_message="") == (True, None)
    assert written(system_message="Judge.") == (True, "Judge.")
    assert written(architectures=["InternVLChatModel"], system_message="Talk.") == (False, "Talk.")
    assert written(architectures=["InternVLChatModel"], template="internlm2-chat") == (False, None)
    with pytest.raises(ConfigError, match="template is 'internlm2-chat'"):
        written(template="internlm2-chat")
    with pytest.raises(ConfigError, match="system_message is 3, expected a text"):
        written(system_message=3)
