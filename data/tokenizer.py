"""A Hugging Face tokenizer directory, read without network and without code from the directory.

    tokenizer.json ──► tokenizers.Tokenizer ──► encode("a <box>[[1, 2]]</box>")   text → ids
    tokenizer_config.json, special_tokens_map.json (both optional) ──► pad, bos

Two kinds of added tokens are told apart:

- *structure*: ``<img> </img> <IMG_CONTEXT> <|im_start|> <|im_end|>``, padding, bos and eos. Only the chat template
  and the image runs write them, by id. The same characters in a user's text stay ordinary text, so nobody can
  forge a turn or an image run from inside a question.
- *content*: every other added token (``<ref>``, ``<box>``, ``<tool_call>``, …). These are part of what the model
  reads and writes; in text they become tokens.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from evovlm.models.tokenizer_json import TokenizerFileError, tokenizer_json, tokenizer_settings

IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

INTERNVL_TOKENS = (
    IMAGE_START,
    IMAGE_END,
    IMAGE_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""The nine tokens that InternVL appends to its language model's vocabulary, in order (spec §1.1)."""


class TokenizerError(ValueError):
    """A tokenizer directory cannot be used; the message says what is missing and how to repair it."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, with the ids that the rest of the project writes itself.

    Attributes:
        directory: where it was loaded from.
        fingerprint: first 16 hex digits of the SHA-256 of ``tokenizer.json``.
        vocab_size: highest id + 1, added tokens included: the number of embedding rows that it needs.
        image_start, image_context, image_end: ids of ``<img>``, ``<IMG_CONTEXT>``, ``</img>``.
        im_start, im_end: ids that open and close a turn; ``im_end`` also ends generation.
        end_of_text: id for padding: the directory's pad token, ``<|endoftext|>`` if it names none.
        bos_id: id put before every sample, ``None`` where the tokenizer does not ask for one (Qwen).
    """

    directory: Path
    fingerprint: str
    vocab_size: int
    image_start: int
    image_context: int
    image_end: int
    im_start: int
    im_end: int
    end_of_text: int
    bos_id: int | None
    _backend: tokenizers.Tokenizer = field(repr=False)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read ``tokenizer.json`` and, where present, its two settings files.

        A SentencePiece ``tokenizer.model`` that stands alone is converted
        (:mod:`evovlm.models.tokenizer_json`).

        Raises:
            TokenizerError: no readable tokenizer, or a token that the format needs is missing.
        """
        directory = Path(directory)
        file = directory / "tokenizer.json"
        try:
            raw = tokenizer_json(directory)
            settings = tokenizer_settings(directory)
        except (FileNotFoundError, TokenizerFileError) as error:
            raise TokenizerError(str(error)) from error
        names = {**_named_tokens(settings), **_named_tokens(read_settings(directory / "special_tokens_map.json"))}
        pad = names.get("pad_token", END_OF_TEXT)
        structure = {IMAGE_START, IMAGE_END, IMAGE_CONTEXT, IM_START, IM_END, END_OF_TEXT, pad, *names.values()}
        backend = _parse(file, raw, structure)

        required = (IMAGE_START, IMAGE_CONTEXT, IMAGE_END, IM_START, IM_END, pad)
        missing = [token for token in required if backend.token_to_id(token) is None]
        if missing:
            raise TokenizerError(
                f"tokenizer '{file}' ({backend.get_vocab_size()} tokens) lacks {', '.join(missing)}; add InternVL's "
                "tokens to a base language model's tokenizer with evovlm.data.tokenizer_extend.extend_tokenizer"
            )
        bos = names.get("bos_token")
        if settings.get("add_bos_token") and (bos is None or backend.token_to_id(bos) is None):
            raise TokenizerError(
                f"'{directory}' sets add_bos_token, but its bos_token {bos!r} is not in the vocabulary"
            )
        return cls(
            directory=directory,
            fingerprint=hashlib.sha256(raw).hexdigest()[:16],
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            image_start=_id(backend, IMAGE_START),
            image_context=_id(backend, IMAGE_CONTEXT),
            image_end=_id(backend, IMAGE_END),
            im_start=_id(backend, IM_START),
            im_end=_id(backend, IM_END),
            end_of_text=_id(backend, pad),
            bos_id=_id(backend, bos) if settings.get("add_bos_token") and bos is not None else None,
            _backend=backend,
        )

    def encode(self, text: str) -> list[int]:
        """Turn text into ids: content tokens become tokens, structure tokens stay text; nothing is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], *, skip_structure: bool = False) -> str:
        """Turn ids back into text; ``skip_structure`` leaves out turn marks, image runs and padding."""
        return self._backend.decode(ids, skip_special_tokens=skip_structure)


def _parse(file: Path, raw: bytes, structure: set[str]) -> tokenizers.Tokenizer:
    """Build the backend with ``special`` meaning "structure", so that one switch keeps exactly those as text."""
    try:
        content = json.loads(raw)
        for token in content["added_tokens"]:
            token["special"] = token["content"] in structure
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the backend raises plain Exception for a file that it cannot read
        raise TokenizerError(f"cannot read tokenizer '{file}': {error}") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_settings(file: Path) -> dict[str, Any]:
    """Read one of the directory's JSON objects; a missing file is an empty one.

    Raises:
        TokenizerError: not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"cannot read '{file}': {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"'{file}' holds a {type(content).__name__}, not a JSON object")
    return content


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Pick pad, bos and eos; a token is written as a string or as an object with its ``content``."""
    found = {}
    for name in ("pad_token", "bos_token", "eos_token"):
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _id(backend: tokenizers.Tokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    assert number is not None  # checked by the caller, with a message for users
    return number
