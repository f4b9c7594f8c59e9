"""The language model of an export, alone: same logits as inside the whole model, loadable by transformers, renewed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate_language import current_language_model, export_language_model
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.names import Format
from evovlm.models.hf.save import save_pretrained
from evovlm.models.hf.shards import CheckpointError

from .support import weights_of


def export(config: InternVLConfig, tokenizer_dir: Path, out: Path, format: Format, seed: int = 5) -> Path:
    weights = ((name, value.float()) for name, value in weights_of(config, seed=seed))
    save_pretrained(config, weights, out, format=format, tokenizer_dir=tokenizer_dir)
    return out


@pytest.mark.parametrize("format", ["transformers", "internvl"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_whole_model(
    small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path: Path, format: Format, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, InternVLForConditionalGeneration

    config = replace(small_config, decoder=replace(small_config.decoder, tie_embeddings=tied))
    whole = export(config, tiny_tokenizer_dir, tmp_path / "whole", "transformers")
    source = whole if format == "transformers" else export(config, tiny_tokenizer_dir, tmp_path / "source", format)
    export_language_model(source, tmp_path / "language", max_shard_bytes=20_000)
    assert len(list((tmp_path / "language").glob("*.safetensors"))) > 1  # sharded by its own size

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language")
    ids = torch.tensor([tokenizer("A dog and a cat sit beside the red car.")["input_ids"]])
    assert len(tokenizer) <= config.decoder.vocab_size  # no token beyond the embedding's last row
    assert ids[0].tolist() == Tokenizer.load(tiny_tokenizer_dir).encode("A dog and a cat sit beside the red car.")
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    reference = InternVLForConditionalGeneration.from_pretrained(whole).eval()
    with torch.no_grad():
        torch.testing.assert_close(language(ids).logits, reference(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_it_is_written_once_and_again_when_the_export_changes(
    small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out" / "language"
    export(small_config, tiny_tokenizer_dir, source, "transformers")
    current_language_model(source, out)
    first = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(b"untouched")
    current_language_model(source, out)
    assert (out / "model.safetensors").read_bytes() == b"untouched"
    shutil.rmtree(source)
    export(small_config, tiny_tokenizer_dir, source, "transformers", seed=6)
    current_language_model(source, out)
    assert (out / "model.safetensors").read_bytes() not in (first, b"untouched")
    assert json.loads((out / "made_from.json").read_text())["source"] == str(source)


def test_what_is_in_the_way_or_missing(small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    source = export(small_config, tiny_tokenizer_dir, tmp_path / "source", "transformers")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists; choose another directory"):
        current_language_model(source, tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        export_language_model(tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
