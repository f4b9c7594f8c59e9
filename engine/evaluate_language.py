"""The language model of an exported model, as a directory of its own: language suites load nothing else.

EXPORT/ config.json (internvl), language_model.model.…, vision_tower.…, tokenizer
    │ without its prefix; vision and projector stay behind
    ▼
OUT/    config.json (qwen2 or llama), model.…, lm_head, tokenizer            AutoModelForCausalLM loads it
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from evovlm.engine.model_fingerprint import model_fingerprint
from evovlm.models.hf.files import copy_tokenizer, token_ids, write_generation_config, write_json
from evovlm.models.hf.load import load_config, read_state
from evovlm.models.hf.names import EMBEDDING, LM_HEAD
from evovlm.models.hf.save import DEFAULT_SHARD_BYTES
from evovlm.models.hf.shards import ShardWriter
from evovlm.models.hf.write_config import write_decoder

_PREFIX = LM_HEAD.removesuffix("lm_head.weight")


def export_language_model(source: Path, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Write the language model of a whole model, so that transformers' ``AutoModelForCausalLM`` loads it.

    Weights keep their dtype and are streamed; the directory appears when it is complete. Needs extra memory for one
    shard.

    Args:
        source: A checkpoint of either published format (``InternVLChatModel``, ``InternVLForConditionalGeneration``).
        out: Directory to make; missing parents are made, too.
        max_shard_bytes: Largest shard file.

    Raises:
        FileExistsError: ``out`` exists.
        CheckpointError: The source is not complete.
        ConfigError: The source is no such model.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another directory")
    config, tokens = load_config(source), token_ids(source)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by one that was interrupted
    partial.mkdir(parents=True)
    writer = ShardWriter(partial, max_shard_bytes)
    dtype = torch.float32
    for name, tensor in read_state(source, config):
        if name.startswith(_PREFIX):
            writer.add(name.removeprefix(_PREFIX), tensor)
        if name == EMBEDDING:
            dtype = tensor.dtype
    writer.finish()
    decoder = write_decoder(config.decoder, "transformers", tokens.ends[0], tokens.bos)
    write_json(partial / "config.json", decoder | {"dtype": str(dtype).removeprefix("torch.")})
    write_generation_config(source, partial, tokens)
    copy_tokenizer(source, "internvl", partial, model_max_length=config.decoder.max_positions, system=None)
    _forget_processor_tokens(partial / "tokenizer_config.json")
    partial.rename(out)


def current_language_model(source: Path, out: Path) -> None:
    """Write the language model of ``source``, unless ``out`` holds it already; another one there is replaced.

    Args:
        source: See ``export_language_model``.
        out: Directory; ``made_from.json`` in it says from which weights it was made.

    Raises:
        FileExistsError: ``out`` is there, but was not made by this function.
        CheckpointError: See ``export_language_model``.
        ConfigError: See ``export_language_model``.
    """
    made_from = {"source": str(source.resolve()), "fingerprint": model_fingerprint(source)}
    note = out / "made_from.json"
    if note.is_file() and json.loads(note.read_text()) == made_from:
        return
    if out.exists() and not note.is_file():
        raise FileExistsError(f"{out} exists; choose another directory: what it holds was not made here")
    fresh = out.with_name(f"{out.name}.new")  # whole, with its note, before it takes its place
    shutil.rmtree(fresh, ignore_errors=True)
    export_language_model(source, fresh)
    write_json(fresh / note.name, made_from)
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)


def _forget_processor_tokens(file: Path) -> None:
    """Take out the tokens that only a processor knows: one of them has an id beyond the model's last row."""
    content: dict[str, Any] = json.loads(file.read_text())
    content.pop("extra_special_tokens", None)
    content.pop("processor_class", None)
    write_json(file, content)
