"""Builds a small tokenizer of Qwen2.5's kind from one's own texts: byte-level BPE, same added tokens, same template.

    texts ──BPE──► vocabulary ─┬─ <|endoftext|> <|im_start|> <|im_end|>     three of Qwen
                               ├─ <|object_ref_start|> … <|file_sep|>       19 of Qwen2.5
                               └─ <img> </img> <IMG_CONTEXT> … </box>       nine of InternVL
                     save ──► tokenizer.json, tokenizer_config.json, special_tokens_map.json

The directory loads with ``evovlm.data.tokenizer.Tokenizer`` and with transformers' ``AutoTokenizer``. Any text can be
encoded: every byte is in the vocabulary. Source of the token lists: spec §1.1.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from evovlm.data.chat import DEFAULT_SYSTEM
from evovlm.data.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START, INTERNVL_TOKENS

QWEN_STRUCTURE_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Qwen's first three added tokens, in the order of their ids."""

QWEN_CONTENT_TOKENS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""The 19 tokens that Qwen2.5 adds after them, in the order of their ids."""

ADDED_TOKENS = (*QWEN_STRUCTURE_TOKENS, *QWEN_CONTENT_TOKENS, *INTERNVL_TOKENS)

_NOT_SPECIAL = frozenset(QWEN_CONTENT_TOKENS[QWEN_CONTENT_TOKENS.index("<tool_call>") :])
"""Qwen2.5 marks these as added but not special: decoding with ``skip_special_tokens`` keeps them."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: BPE never merges across these matches."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{% for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<image>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Jinja form of ``evovlm.data.chat.format_text`` for transformers' ``apply_chat_template``."""


def qwen_backend(vocab: Mapping[str, int] | None = None, merges: Sequence[tuple[str, str]] | None = None) -> Tokenizer:
    """Return a byte-level BPE with Qwen2's normaliser, pre-tokenizer and decoder, without added tokens."""
    backend = Tokenizer(models.BPE(vocab=dict(vocab or {}), merges=list(merges or [])))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def add_tokens(backend: Tokenizer, tokens: Sequence[str] = ADDED_TOKENS) -> None:
    """Append tokens at the next free ids, in order, marked special where Qwen2.5 and InternVL mark them so."""
    for token in tokens:
        backend.add_tokens([AddedToken(token, special=token not in _NOT_SPECIAL, normalized=False)])


def save_tokenizer(backend: Tokenizer, directory: str | Path) -> Path:
    """Write the three files of a tokenizer directory; returns the directory, made if absent."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    named = {"eos_token": IM_END, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "unk_token": None,
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "extra_special_tokens": {
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": IMAGE_CONTEXT,
        },
        "chat_template": CHAT_TEMPLATE,
    }
    special = {**named, "additional_special_tokens": [token for token in ADDED_TOKENS if token not in _NOT_SPECIAL]}
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def build_tokenizer(texts: Iterable[str], directory: str | Path, vocab_size: int) -> Path:
    """Train a tokenizer on texts and save it.

    Args:
        texts: what to learn merges from; the same texts in the same order give the same tokenizer.
        directory: where to write, made if absent.
        vocab_size: ids in all, the 256 bytes and the 31 added tokens included; fewer come out if the texts
            do not hold that many merges.

    Returns:
        The directory.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the added tokens.
    """
    least = 256 + len(ADDED_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is less than 256 bytes + {len(ADDED_TOKENS)} added tokens = {least}")
    backend = qwen_backend()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    add_tokens(backend)
    return save_tokenizer(backend, directory)
