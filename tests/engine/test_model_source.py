"""Where a model comes from: a directory, a ViT and an LLM, or the table; and vocabularies that do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from evovlm.data.tokenizer import INTERNVL_TOKENS, Tokenizer
from evovlm.data.tokenizer_extend import extend_tokenizer
from evovlm.data.tokenizer_training import QWEN_STRUCTURE_TOKENS, add_tokens, qwen_backend, save_tokenizer
from evovlm.engine.model_source import open_source, random_weights
from evovlm.engine.settings import ModelSettings
from evovlm.models.config import DecoderConfig, InternVLConfig
from evovlm.models.hf.files import write_json
from evovlm.models.hf.names import EMBEDDING, LM_HEAD, model_shapes
from evovlm.models.hf.qkv import by_part
from evovlm.models.hf.save import save_pretrained
from evovlm.models.hf.write_config import write_decoder, write_vision
from evovlm.models.init import initial_value
from evovlm.models.table import TINY

from .support import SMALL, weights_of

PADDED_ROWS = 300


@pytest.fixture(scope="module")
def base_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base language model's tokenizer: 256 bytes and Qwen's three turn tokens, none of InternVL's."""
    backend = qwen_backend()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["x"], BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    add_tokens(backend, QWEN_STRUCTURE_TOKENS)
    return save_tokenizer(backend, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def parts(base_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """A ViT directory, a tied LLM directory with padded rows, and their weights by internal name."""
    decoder: DecoderConfig = replace(SMALL.decoder, vocab_size=PADDED_ROWS, tie_embeddings=True)
    config = replace(SMALL, decoder=decoder)
    weights = {name: value.float() for name, value in weights_of(config, seed=2)}
    vit, llm = tmp_path_factory.mktemp("vit"), tmp_path_factory.mktemp("llm")
    for folder, prefix, content in (
        (vit, "vision_model.", write_vision(config.vision, "internvl")),
        (llm, "language_model.", write_decoder(decoder, "internvl", None, None)),
    ):
        write_json(folder / "config.json", content)
        own = {
            name.removeprefix(prefix): by_part(name, value, config.vision.num_heads)
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    (llm / "tokenizer.json").write_bytes((base_tokenizer_dir / "tokenizer.json").read_bytes())
    return vit, llm, weights


@pytest.fixture(scope="module")
def extended_dir(base_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extended")
    assert extend_tokenizer(base_tokenizer_dir, out) == INTERNVL_TOKENS
    return out


def test_a_vit_and_an_llm_are_joined(parts: tuple[Path, Path, dict[str, Tensor]], extended_dir: Path) -> None:
    vit, llm, weights = parts
    settings = ModelSettings(vit_from=vit, llm_from=llm, tokenizer=extended_dir, drop_path=0.25)
    source = open_source(settings, seed=7)
    known, vocab = 259, 268
    assert source.config.decoder == replace(SMALL.decoder, vocab_size=vocab, tie_embeddings=False)
    assert source.config.vision == replace(SMALL.vision, drop_path_rate=0.25)
    assert source.tokenizer.vocab_size == vocab
    made = dict(source.weights)
    assert {name: tuple(value.shape) for name, value in made.items()} == model_shapes(source.config)
    for name, value in weights.items():
        if name not in (EMBEDDING, LM_HEAD) and not name.startswith("mlp1."):
            assert torch.equal(made[name], value), name
    # Rows of known tokens stay; InternVL's nine lie in padded rows: their outputs start as the mean of the known ones.
    assert torch.equal(made[EMBEDDING], weights[EMBEDDING][:vocab])
    assert torch.equal(made[LM_HEAD][:known], weights[EMBEDDING][:known])
    mean = weights[EMBEDDING][:known].double().mean(0).float()
    torch.testing.assert_close(made[LM_HEAD][known:], mean.expand(9, -1), rtol=1e-5, atol=1e-6)
    for name in model_shapes(source.config):
        if name.startswith("mlp1."):
            assert torch.equal(made[name], initial_value(name, made[name].shape, source.config, 7))


def test_the_tokenizer_of_the_llm_is_the_default(
    parts: tuple[Path, Path, dict[str, Tensor]], extended_dir: Path, tmp_path: Path
) -> None:
    vit, llm, _ = parts
    for file in llm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((extended_dir / "tokenizer.json").read_bytes())
    source = open_source(ModelSettings(vit_from=vit, llm_from=tmp_path), seed=0)
    assert source.tokenizer_dir == tmp_path
    assert source.config.decoder.vocab_size == 268


def test_an_llm_without_a_tokenizer_is_an_error(
    parts: tuple[Path, Path, dict[str, Tensor]], extended_dir: Path, tmp_path: Path
) -> None:
    vit, llm, _ = parts
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llm / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no tokenizer.json"):
        open_source(ModelSettings(vit_from=vit, llm_from=tmp_path, tokenizer=extended_dir), seed=0)


def test_a_tokenizer_that_is_not_the_llms_is_an_error(
    parts: tuple[Path, Path, dict[str, Tensor]], tiny_tokenizer_dir: Path
) -> None:
    vit, llm, _ = parts
    with pytest.raises(
        ValueError, match=r"tokens have other ids than in .* the tokenizer must extend the base model's"
    ):
        open_source(ModelSettings(vit_from=vit, llm_from=llm, tokenizer=tiny_tokenizer_dir), seed=0)


@pytest.mark.parametrize("format", ["internvl", "transformers"])
def test_a_whole_model_comes_from_its_directory(
    format: str, small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    weights = {name: value.float() for name, value in weights_of(small_config, seed=3)}
    out = tmp_path / "model"
    save_pretrained(small_config, weights.items(), out, format=format, tokenizer_dir=tiny_tokenizer_dir)  # type: ignore[arg-type]
    source = open_source(ModelSettings(from_dir=out, drop_path=0.125), seed=0)
    # Drop path is the run's, whatever the directory says.
    assert source.config.vision.drop_path_rate == 0.125
    assert source.config.decoder == small_config.decoder
    assert source.config.max_tiles == small_config.max_tiles
    made = dict(source.weights)
    assert set(made) == set(weights)
    assert all(torch.equal(made[name], value) for name, value in weights.items())
    assert source.tokenizer.fingerprint == Tokenizer.load(tiny_tokenizer_dir).fingerprint


def test_a_tokenizer_of_another_size_is_an_error(model_dir: Path, extended_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 384, tokenizer .* one of 268; use the one"):
        open_source(ModelSettings(from_dir=model_dir, tokenizer=extended_dir), seed=0)


def test_a_size_takes_the_tokenizers_vocabulary(tiny_tokenizer_dir: Path) -> None:
    source = open_source(ModelSettings(size="tiny", tokenizer=tiny_tokenizer_dir), seed=4)
    assert source.config == replace(TINY, decoder=replace(TINY.decoder, vocab_size=384))
    made = dict(source.weights)
    assert {name: tuple(value.shape) for name, value in made.items()} == model_shapes(source.config)
    again = dict(open_source(ModelSettings(size="tiny", tokenizer=tiny_tokenizer_dir), seed=4).weights)
    assert all(torch.equal(again[name], value) for name, value in made.items())


def test_a_size_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"\[model\] tokenizer is missing"):
        open_source(ModelSettings(size="tiny"), seed=0)


def test_random_weights_of_one_module() -> None:
    names = [name for name, _ in random_weights(SMALL, 0, prefix="mlp1.")]
    assert names == ["mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight", "mlp1.1.bias", "mlp1.3.weight", "mlp1.3.bias"]
