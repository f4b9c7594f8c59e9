"""The small files of an export: tokenizer, chat template, generation and image settings.

tokenizer directory ─ copied as it is ─► tokenizer.json, tokenizer_config.json, …
configuration       ─ written ─────────► generation_config.json, preprocessor_config.json, processor_config.json
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from evovlm.models.config import InternVLConfig
from evovlm.models.hf.chat_template import PLAIN_TEMPLATE, set_default_system
from evovlm.models.hf.names import Format
from evovlm.models.tokenizer_json import tokenizer_json, write_tokenizer_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
VIDEO_TOKEN = {"video_token": "<video>"}
"""What ``InternVLProcessor`` replaces by frames before it tokenises. As in the published ports, ``AutoTokenizer``
appends it behind the vocabulary, so it has no row in the model; ``tokenizer.json`` does not hold it."""

NORMALIZE = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
"""Mean and standard deviation of pixels in [0, 1], by the name of the normalisation (spec §1.7)."""


@dataclass(frozen=True)
class TokenIds:
    """Ids that a configuration needs from its tokenizer.

    Attributes:
        size: Ids that the tokenizer may give, holes included: its largest id plus 1.
        image: ``<IMG_CONTEXT>``.
        ends: Ids that end generation: ``<|im_end|>``, then ``<|endoftext|>`` or ``</s>``, those there are.
        bos: ``<s>``, if the tokenizer has it.
    """

    size: int
    image: int
    ends: tuple[int, ...]
    bos: int | None


def vocabulary(directory: str | Path) -> dict[str, int]:
    """Read a tokenizer's tokens and their ids, added ones included.

    Raises:
        FileNotFoundError: The directory has neither ``tokenizer.json`` nor ``tokenizer.model``.
        TokenizerFileError: ``tokenizer.model`` cannot be converted.
    """
    vocab: dict[str, int] = Tokenizer.from_buffer(tokenizer_json(directory)).get_vocab(with_added_tokens=True)
    return vocab


def token_ids(directory: str | Path) -> TokenIds:
    """Look up the ids that a configuration needs.

    Raises:
        FileNotFoundError: The directory has neither ``tokenizer.json`` nor ``tokenizer.model``.
        ValueError: The tokenizer lacks ``<IMG_CONTEXT>`` or every token that could end generation.
    """
    vocab = vocabulary(directory)
    if missing := [token for token in IMAGE_TOKENS.values() if token not in vocab]:
        raise ValueError(f"{directory}: the tokenizer has no {', '.join(missing)}: add InternVL's nine tokens to it")
    ends = tuple(vocab[token] for token in ("<|im_end|>", "<|endoftext|>", "</s>") if token in vocab)
    if not ends:
        raise ValueError(f"{directory}: the tokenizer has neither <|im_end|> nor <|endoftext|> nor </s>")
    return TokenIds(max(vocab.values()) + 1, vocab["<IMG_CONTEXT>"], ends, vocab.get("<s>"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(source: str | Path, format: Format, out: Path, *, model_max_length: int, system: str | None) -> None:
    """Copy a tokenizer so that ``AutoTokenizer`` loads exactly it.

    ``tokenizer_config.json`` is completed: the class that takes ``tokenizer.json`` as it is (transformers would
    otherwise rebuild a Qwen2 tokenizer with rules of its own), and the names by which the processor finds the image
    tokens.

    Args:
        source: Directory with ``tokenizer.json``, or with ``tokenizer.model``, which is converted.
        format: Which published format; only transformers' processor looks for image tokens.
        out: Directory of the export.
        model_max_length: Written where the source states none.
        system: System text that the chat template adds to a conversation without one; None: as the tokenizer has it.
    """
    source = Path(source)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    if not (source / "tokenizer.json").exists():
        write_tokenizer_json(source, out)
    path = out / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    vocab = vocabulary(source)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.setdefault("model_max_length", model_max_length)
    config.setdefault("clean_up_tokenization_spaces", False)
    for key, token in (("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>")):
        if token in vocab:
            config.setdefault(key, token)
    extra = config.get("extra_special_tokens") or {}
    if format == "transformers" and isinstance(extra, dict):
        config["extra_special_tokens"] = IMAGE_TOKENS | VIDEO_TOKEN | extra
    write_json(path, config)
    template = out / "chat_template.jinja"
    own = config.get("chat_template")
    if format == "transformers" and isinstance(own, str) and not template.exists():
        # A processor finds its template in this file only, and puts images where <IMG_CONTEXT> stands.
        template.write_text(own.replace("<image>", IMAGE_TOKENS["context_image_token"]))
    if not template.exists() and "chat_template" not in config:
        template.write_text(PLAIN_TEMPLATE)
    if system is not None:
        set_default_system(out, system)


def write_generation_config(source: str | Path, out: Path, tokens: TokenIds) -> None:
    """Copy ``generation_config.json`` from beside the tokenizer, or write one that ends where training ends."""
    path = Path(source) / "generation_config.json"
    if path.exists():
        shutil.copyfile(path, out / "generation_config.json")
        return
    ends: int | list[int] = list(tokens.ends) if len(tokens.ends) > 1 else tokens.ends[0]
    config = {"eos_token_id": ends, "pad_token_id": tokens.ends[-1], "do_sample": False}
    if tokens.bos is not None:
        config["bos_token_id"] = tokens.bos
    write_json(out / "generation_config.json", config)


def write_processor_config(config: InternVLConfig, format: Format, out: Path, normalize: str) -> None:
    """Write how images become tiles: what the processor of the format reads.

    Raises:
        ValueError: Unknown normalisation.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalisation {normalize!r} is none of {', '.join(NORMALIZE)}")
    mean, std = NORMALIZE[normalize]
    edge = config.vision.tile_size
    pixels: dict[str, Any] = {"do_resize": True, "do_normalize": True, "image_mean": mean, "image_std": std}
    if format == "internvl":
        clip = {"image_processor_type": "CLIPFeatureExtractor", "crop_size": edge, "size": edge, "do_center_crop": True}
        write_json(out / "preprocessor_config.json", pixels | clip | {"resample": 3})
        return
    square = {"height": edge, "width": edge}
    pixels |= {"size": square, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "resample": 3}
    image = pixels | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": config.max_tiles > 1,
        "min_patches": config.min_tiles,
        "max_patches": config.max_tiles,
    }
    write_json(out / "preprocessor_config.json", image)
    video = pixels | {"video_processor_type": "InternVLVideoProcessor", "processor_class": "InternVLProcessor"}
    write_json(out / "video_preprocessor_config.json", video)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile}
    write_json(out / "processor_config.json", processor)
