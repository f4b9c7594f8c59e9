"""A small SentencePiece BPE with byte fallback, and a directory of it as InternLM2.5-based models are published."""

import io
import json
from pathlib import Path

import pytest

sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece, the oracle, is not installed")

RENAMED = ("<|im_end|>", "<|im_start|>")
"""Added tokens that take the places of the vocabulary's last, unused pieces."""
APPENDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
_SYMBOLS = ("[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]")


def train(text: str, vocab_size: int = 420, **settings: object) -> bytes:
    """Train on lines of text; returns the serialised model, whose last pieces are unused symbols."""
    out = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "control_symbols": list(_SYMBOLS),
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text.splitlines()), model_writer=out, vocab_size=vocab_size, **(defaults | settings)
    )
    return out.getvalue()


def write_published(directory: Path, model: bytes, **changes: object) -> Path:
    """Write ``tokenizer.model`` and settings that name code to read it; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    added = {pieces.piece_to_id(symbol): token for symbol, token in zip(_SYMBOLS, RENAMED, strict=True)}
    added |= {pieces.piece_size() + number: token for number, token in enumerate(APPENDED)}
    settings = {
        "added_tokens_decoder": {str(number): {"content": token, "special": True} for number, token in added.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    return directory
