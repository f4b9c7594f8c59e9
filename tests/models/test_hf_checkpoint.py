"""Whole checkpoints: saved and loaded bitwise in each format, through transformers, streamed, and damaged."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from evovlm.models.config import InternVLConfig
from evovlm.models.hf import (
    CheckpointError,
    ConfigError,
    Format,
    detect,
    load_config,
    model_shapes,
    read_state,
    save_pretrained,
    shards,
)
from evovlm.models.table import TINY

from .hf_support import (
    WORDS,
    as_published,
    model_configs,
    packed_logits,
    random_model,
    random_sample,
    random_weights,
    transformers_twin,
    twin_logits,
    write_tokenizer,
)

FORMATS: tuple[Format, ...] = ("internvl", "transformers")
NUM_IDS = 19  # of write_tokenizer

SMALL = replace(
    TINY,
    vision=replace(
        TINY.vision, hidden_size=12, num_heads=3, num_layers=2, ffn_size=9, tile_size=14, patch_size=7, qk_norm=True
    ),
    decoder=replace(TINY.decoder, hidden_size=16, num_layers=2, ffn_size=9, vocab_size=NUM_IDS, head_dim=4),
)
WEIGHTS = random_weights(model_shapes(SMALL), seed=0)


@pytest.fixture(scope="session")
def word_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("words")
    assert write_tokenizer(directory) == NUM_IDS
    return directory


def save(out: Path, tokenizer: Path, format: Format = "internvl", **options: Any) -> Path:
    save_pretrained(SMALL, WEIGHTS.items(), out, format=format, tokenizer_dir=tokenizer, **options)
    return out


def assert_bitwise(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@settings(max_examples=25, deadline=None)
@given(
    config=model_configs(vocab_size=NUM_IDS + 2),
    format=st.sampled_from(FORMATS),
    max_shard_bytes=st.sampled_from((1, 700, 5000, 10**9)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_save_and_load_are_bitwise(
    word_tokenizer_dir: Path,
    config: InternVLConfig,
    format: Format,
    max_shard_bytes: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(model_shapes(config), seed).items()}
    with TemporaryDirectory() as tmp:
        out = Path(tmp, "out")
        save_pretrained(
            config,
            weights.items(),
            out,
            format=format,
            tokenizer_dir=word_tokenizer_dir,
            max_shard_bytes=max_shard_bytes,
        )
        assert detect(out) == format
        assert load_config(out) == config
        assert_bitwise(dict(read_state(out)), weights)
        stored = json.loads((out / "config.json").read_text())
        assert f"torch.{stored.get('dtype') or stored['torch_dtype']}" == str(dtype)


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@settings(max_examples=15, deadline=None)
@given(config=model_configs(vocab_size=NUM_IDS), format=st.sampled_from(FORMATS), seed=st.integers(0, 2**31))
def test_published_checkpoint_loaded_and_saved_again_is_bitwise_the_same(
    word_tokenizer_dir: Path, config: InternVLConfig, format: Format, seed: int
) -> None:
    """Although the rows of q, k, v projections are ordered otherwise inside."""
    with TemporaryDirectory() as tmp:
        first, second = Path(tmp, "first"), Path(tmp, "second")
        model = random_model(config, seed)
        if format == "transformers":
            transformers_twin(config, model, image_token=0).save_pretrained(first, max_shard_size="5KB")
        else:
            save_pretrained(config, model.named_parameters(), first, format=format, tokenizer_dir=word_tokenizer_dir)
            published = as_published(dict(model.named_parameters()), config.vision.num_heads)
            save_file(published, first / "model.safetensors")
        save_pretrained(config, read_state(first), second, format=format, tokenizer_dir=word_tokenizer_dir)
        assert_bitwise(stored_tensors(second), stored_tensors(first))


@settings(max_examples=10, deadline=None)
@given(config=model_configs(vocab_size=NUM_IDS), seed=st.integers(0, 2**31), dtype=st.sampled_from(("native", "bf16")))
def test_transformers_loads_what_we_save(
    word_tokenizer_dir: Path, config: InternVLConfig, seed: int, dtype: str
) -> None:
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    model = random_model(config, seed)
    sample = random_sample(config, [1, 2], [3, 2, 4], seed)
    image_token = len(WORDS) + 5  # <IMG_CONTEXT>
    sample.tokens[sample.visual] = image_token
    sample.tokens[~sample.visual] %= image_token
    with TemporaryDirectory() as tmp:
        out = Path(tmp, "out")
        save_pretrained(
            config,
            model.named_parameters(),
            out,
            tokenizer_dir=word_tokenizer_dir,
            max_shard_bytes=5000,
            dtype=torch.bfloat16 if dtype == "bf16" else None,
        )
        twin, info = InternVLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert twin.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        assert twin.config.image_token_id == AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<IMG_CONTEXT>")
        tied = twin.lm_head.weight is twin.model.language_model.embed_tokens.weight
        assert tied == config.decoder.tie_embeddings
        continued = twin.generate(sample.tokens[None], pixel_values=sample.tiles.to(twin.dtype), max_new_tokens=2)
        assert continued.shape[1] > len(sample.tokens)
        if dtype == "native":
            (ours,) = packed_logits(model, [sample])
            torch.testing.assert_close(ours, twin_logits(twin.eval(), sample), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(config=model_configs(), shard=st.sampled_from(("1KB", "5KB", "1GB")), seed=st.integers(0, 2**31))
def test_we_load_what_transformers_saves(config: InternVLConfig, shard: str, seed: int) -> None:
    """Its shards are cut anywhere, also between the q, k and v that are one tensor of ours."""
    model = random_model(config, seed)
    twin = transformers_twin(config, model, image_token=0)
    with TemporaryDirectory() as tmp:
        twin.save_pretrained(tmp, max_shard_size=shard)
        # Without a processor's files the tiling settings are the processor's defaults.
        assert replace(load_config(tmp), min_tiles=config.min_tiles, max_tiles=config.max_tiles) == config
        assert_bitwise(dict(read_state(tmp)), dict(model.named_parameters()))


def test_names_of_a_model_in_memory_are_read_too(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    """Some tools save ``model.language_model.…`` and ``lm_head.weight`` as they are in memory."""
    out = save(tmp_path / "out", word_tokenizer_dir, "transformers")
    stored = load_file(out / "model.safetensors")
    modern = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
        for name, tensor in stored.items()
    }
    save_file(modern, out / "model.safetensors")
    assert_bitwise(dict(read_state(out)), WEIGHTS)


@pytest.mark.parametrize("format", FORMATS)
def test_generation_and_tokenizer_files(tmp_path: Path, tiny_tokenizer_dir: Path, format: Format) -> None:
    """AutoTokenizer gives the ids of tokenizer.json itself, and generation ends at <|im_end|>."""
    from tokenizers import Tokenizer
    from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig

    reference = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json"))
    decoder = replace(SMALL.decoder, vocab_size=reference.get_vocab_size())
    config = replace(SMALL, decoder=decoder)
    out = tmp_path / "out"
    weights = random_weights(model_shapes(config), 0)
    save_pretrained(config, weights.items(), out, format=format, tokenizer_dir=tiny_tokenizer_dir, system="Be brief.")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    for text in ("What digits does it show?\n\n  <img><IMG_CONTEXT></img>世界 naïve", "<|im_start|>user\n42<|im_end|>"):
        assert tokenizer.encode(text) == reference.encode(text).ids
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert ends == [reference.token_to_id("<|im_end|>"), reference.token_to_id("<|endoftext|>")]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    if format == "transformers":
        processor = AutoImageProcessor.from_pretrained(out, backend="pil")
        assert processor.size["height"] == config.vision.tile_size
        assert (processor.min_patches, processor.max_patches) == (config.min_tiles, config.max_tiles)
        assert tokenizer.start_image_token == "<img>"
        assert tokenizer.context_image_token_id == reference.token_to_id("<IMG_CONTEXT>")
        assert tokenizer.video_token == "<video>"  # InternVLProcessor asks for it


def test_chat_template_is_written_where_the_tokenizer_has_none(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path / "o", word_tokenizer_dir, "transformers", system='A "b".'))
    content = [{"type": "image"}, {"type": "text", "text": "two cats?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "a dog"}], tokenize=False
    )
    assert text == (
        '<|im_start|>system\nA "b".<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\ntwo cats?<|im_end|>\n'
        "<|im_start|>assistant\na dog<|im_end|>\n"
    )
    plain = AutoTokenizer.from_pretrained(save(tmp_path / "p", word_tokenizer_dir, "transformers"))
    prompt = plain.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_files_beside_the_tokenizer_are_kept(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(word_tokenizer_dir, source)
    (source / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    (source / "tokenizer_config.json").write_text('{"model_max_length": 77, "chat_template": "mine", "eos_token": "?"}')
    (source / "modeling_evil.py").write_text("raise SystemExit")
    out = save(tmp_path / "out", source, "transformers")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3, "temperature": 0.5}
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["chat_template"], config["eos_token"]) == (77, "mine", "?")
    assert not list(out.glob("*.py"))


def test_a_tokenizers_own_chat_template_serves_the_processor_too(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    """A processor reads no template from tokenizer_config.json, and knows no other placeholder than <IMG_CONTEXT>."""
    source = tmp_path / "source"
    shutil.copytree(word_tokenizer_dir, source)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<image>' }}mine"}))
    ported = save(tmp_path / "ported", source, "transformers")
    assert (ported / "chat_template.jinja").read_text() == "{{ '<IMG_CONTEXT>' }}mine"
    assert not (save(tmp_path / "published", source, "internvl") / "chat_template.jinja").exists()


# Streaming ------------------------------------------------------------------------------------------------------------


class LiveBytes:
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def watch(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", [1, 2000, 4000])
def test_saving_holds_one_shard(tmp_path: Path, word_tokenizer_dir: Path, format: Format, max_shard_bytes: int) -> None:
    live = LiveBytes()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WEIGHTS.items():
            yield name, live.watch(tensor.clone())

    out = tmp_path / "out"
    save_pretrained(
        SMALL,
        stream(),
        out,
        format=format,
        tokenizer_dir=word_tokenizer_dir,
        max_shard_bytes=max_shard_bytes,
    )
    largest = max(tensor.numel() * 4 for tensor in WEIGHTS.values())
    total = sum(tensor.numel() * 4 for tensor in WEIGHTS.values())
    gc.collect()
    assert live.peak <= max_shard_bytes + 2 * largest
    assert live.peak < total / 2
    assert live.now <= largest  # the loop variable of a finished generator may keep one
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.numel() * 4 for tensor in tensors.values())
        assert size <= max_shard_bytes or len(tensors) == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"].values()) == {file.name for file in files}


@pytest.mark.parametrize("format", FORMATS)
def test_loading_opens_one_shard_at_a_time(
    tmp_path: Path, word_tokenizer_dir: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where q, k and v of one layer lie in three shards."""
    out = save(tmp_path / "out", word_tokenizer_dir, format, max_shard_bytes=600)
    opened, now, most, live = [], 0, 0, LiveBytes()

    @contextmanager
    def counting(path: Path, framework: str) -> Iterator[Any]:
        nonlocal now, most
        opened.append(Path(path).name)
        now += 1
        most = max(most, now)
        with safe_open(path, framework=framework) as file:
            yield _Watched(file, live)
        now -= 1

    monkeypatch.setattr(shards, "safe_open", counting)
    stream = read_state(out, load_config(out))
    num_files = len(list(out.glob("*.safetensors")))
    headers = len(opened)
    assert num_files > 10
    assert headers == num_files  # load_config found the tying in config.json and opened nothing
    assert live.peak == 0  # names and shapes were checked without reading a tensor
    first, value = next(stream)
    assert torch.equal(value, WEIGHTS[first])
    assert len(opened) <= headers + 3
    del value
    for name, tensor in stream:
        assert torch.equal(tensor, WEIGHTS[name])
        del tensor
    assert most == 1
    assert len(opened) == headers + num_files
    assert live.peak <= 3 * max(tensor.numel() * 4 for tensor in WEIGHTS.values())


class _Watched:
    def __init__(self, file: Any, live: LiveBytes) -> None:
        self.file, self.live = file, live

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> Tensor:
        return self.live.watch(self.file.get_tensor(name))


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_missing_shard_is_named(tmp_path: Path, word_tokenizer_dir: Path, format: Format) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir, format, max_shard_bytes=2000)
    lost = sorted(out.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* shards .* missing: {lost.name}"):
        read_state(out)


def test_truncated_shard_is_named(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir, max_shard_bytes=2000)
    cut = sorted(out.glob("*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{cut.name}: not a complete safetensors file"):
        read_state(out)


def test_shard_without_a_tensor_of_the_index(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir, max_shard_bytes=2000)
    shard = sorted(out.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    gone = next(iter(tensors))
    del tensors[gone]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} lacks tensors .*: {gone}"):
        read_state(out)


def change_weights(out: Path, change: dict[str, Tensor | None]) -> None:
    """Replace, add or (with None) remove tensors of an unsharded checkpoint."""
    tensors: dict[str, Tensor | None] = {**load_file(out / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, out / "model.safetensors")


def test_missing_tensor_is_named_with_its_nearest(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir)
    name = "vision_model.encoder.layers.1.norm2.weight"
    change_weights(out, {name: None, name.replace("norm2", "norm_2"): torch.ones(12)})
    with pytest.raises(CheckpointError, match=r"1 tensors .* missing: \S*norm2.weight \(nearest there: \S*norm_2"):
        read_state(out)


@pytest.mark.parametrize("name", ["k_proj", "q_norm"])
def test_missing_third_is_named(tmp_path: Path, word_tokenizer_dir: Path, name: str) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir, "transformers")
    change_weights(out, {f"vision_tower.encoder.layer.0.attention.{name}.weight": None})
    with pytest.raises(CheckpointError, match=f"missing: vision_tower.encoder.layer.0.attention.{name}.weight"):
        read_state(out)


def test_unexpected_tensor_is_named(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir)
    change_weights(out, {"mlp1.4.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 tensors do not belong .* mlp1.4.weight \(nearest there: mlp1"):
        read_state(out)


def test_other_shape_is_named(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir)
    change_weights(out, {"mlp1.0.bias": torch.ones(49)})
    with pytest.raises(CheckpointError, match=r"mlp1.0.bias is \[49\], the configuration says \[48\]"):
        read_state(out)


def test_derived_buffers_are_not_weights(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    out = save(tmp_path / "out", word_tokenizer_dir)
    change_weights(out, {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_bitwise(dict(read_state(out)), WEIGHTS)


def test_wrong_vocabulary_in_the_checkpoint(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    """A model with another vocabulary than the run's is refused, tensor by tensor, with both sizes."""
    out = save(tmp_path / "out", word_tokenizer_dir)
    config = replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=NUM_IDS + 9))
    with pytest.raises(CheckpointError, match=rf"embed_tokens.weight is \[{NUM_IDS}, 16\].*\[{NUM_IDS + 9}, 16\]"):
        read_state(out, config)


def test_no_weights_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ConfigError, match="model_type is 'resnet'"):
        load_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"convert pytorch_model\.bin first"):
        shards.Shards.open(tmp_path)


# Tied heads -----------------------------------------------------------------------------------------------------------

TIED = replace(SMALL, decoder=replace(SMALL.decoder, tie_embeddings=True))
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize("format", FORMATS)
def test_weights_decide_about_tying_where_config_is_silent(
    tmp_path: Path, word_tokenizer_dir: Path, format: Format
) -> None:
    for config in (SMALL, TIED):
        out = tmp_path / str(config.decoder.tie_embeddings)
        weights = random_weights(model_shapes(config), 0)
        save_pretrained(config, weights.items(), out, format=format, tokenizer_dir=word_tokenizer_dir)
        stored = json.loads((out / "config.json").read_text())
        del stored["llm_config" if format == "internvl" else "text_config"]["tie_word_embeddings"]
        stored["tie_word_embeddings"] = True  # a class default that published ports carry
        (out / "config.json").write_text(json.dumps(stored))
        assert load_config(out) == config
        assert_bitwise(dict(read_state(out)), weights)


def test_stored_copy_of_a_tied_head(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    weights = random_weights(model_shapes(TIED), 0)
    out = tmp_path / "out"
    both = {**weights, HEAD: weights[EMBED]}  # what a module's state_dict() gives
    save_pretrained(TIED, both.items(), out, format="internvl", tokenizer_dir=word_tokenizer_dir)
    assert HEAD not in load_file(out / "model.safetensors")
    change_weights(out, {HEAD: weights[EMBED].clone()})
    assert_bitwise(dict(read_state(out)), weights)
    change_weights(out, {HEAD: weights[EMBED] + 1})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        list(read_state(out))


# Refused exports ------------------------------------------------------------------------------------------------------


def test_tokenizer_that_does_not_fit(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    write_tokenizer(tmp_path / "large", [*WORDS, "more"])
    with pytest.raises(ValueError, match=f"has {NUM_IDS + 1} ids but the model's vocabulary has {NUM_IDS} rows"):
        save(tmp_path / "out", tmp_path / "large")
    write_tokenizer(tmp_path / "text", special=("<|im_end|>",))
    with pytest.raises(ValueError, match="no <img>, </img>, <IMG_CONTEXT>"):
        save(tmp_path / "out", tmp_path / "text")
    write_tokenizer(tmp_path / "endless", special=("<img>", "</img>", "<IMG_CONTEXT>"))
    with pytest.raises(ValueError, match="neither"):
        save(tmp_path / "out", tmp_path / "endless")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        save(tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="normalisation 'cifar'"):
        save(tmp_path / "out", word_tokenizer_dir, normalize="cifar")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({HEAD: None}, "1 tensors never came, such as language_model.lm_head.weight"),
        ({HEAD: torch.ones(3, 16)}, rf"lm_head.weight is \[3, 16\], the configuration says \[{NUM_IDS}, 16\]"),
        ({"mlp1.9.weight": torch.ones(1)}, "mlp1.9.weight does not belong to the model"),
    ],
)
def test_wrong_tensors_are_not_saved(
    tmp_path: Path, word_tokenizer_dir: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: t for name, t in {**WEIGHTS, **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(SMALL, tensors.items(), tmp_path / "out", tokenizer_dir=word_tokenizer_dir)
    assert not (tmp_path / "out").exists()


def test_repeated_tensor_is_not_saved(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    twice = [*WEIGHTS.items(), (HEAD, WEIGHTS[HEAD])]
    with pytest.raises(CheckpointError, match=f"{HEAD} comes twice"):
        save_pretrained(SMALL, twice, tmp_path / "out", tokenizer_dir=word_tokenizer_dir)


def test_directory_is_complete_or_absent(tmp_path: Path, word_tokenizer_dir: Path) -> None:
    def breaks() -> Iterator[tuple[str, Tensor]]:
        for i, pair in enumerate(WEIGHTS.items()):
            if i == 20:
                raise RuntimeError("power cut")
            yield pair

    def attempt(**options: Any) -> None:
        save_pretrained(
            SMALL, breaks(), tmp_path / "out", tokenizer_dir=word_tokenizer_dir, max_shard_bytes=999, **options
        )

    with pytest.raises(RuntimeError, match="power cut"):
        attempt()
    assert not (tmp_path / "out").exists()
    save(tmp_path / "out", word_tokenizer_dir)  # over the remains of the first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="overwrite"):
        save(tmp_path / "out", word_tokenizer_dir)
    with pytest.raises(RuntimeError, match="power cut"):
        attempt(overwrite=True)
    assert_bitwise(dict(read_state(tmp_path / "out")), WEIGHTS)  # the old one is still whole
    save(tmp_path / "out", word_tokenizer_dir, "transformers", overwrite=True)
    assert detect(tmp_path / "out") == "transformers"
