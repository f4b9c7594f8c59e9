"""tokenizer.model to tokenizer.json, against SentencePiece itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.models.tokenizer_json import TokenizerFileError, tokenizer_json, tokenizer_settings, write_tokenizer_json

from .sentencepiece_support import APPENDED, RENAMED, sentencepiece, train, write_published

TEXT = Path(__file__).read_text() + "\n".join(
    "The sum of 3 and 4 is 7, so the answer: 7 + 1 = 8. 数字と画像です" for _ in range(40)
)
WORDS = ("answer", " sum", "\n", "\n\n", "  ", "+", "-", "é", "画像", "\t", "\x00", "😀", "▁", "the", "7", ".")
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4))).map("".join)


def converted(directory: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json(directory))
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy prefix"])
def both(request: Any, tmp_path_factory: Any) -> tuple[tokenizers.Tokenizer, Any]:
    model = train(TEXT, add_dummy_prefix=request.param)
    directory = write_published(tmp_path_factory.mktemp("published"), model)
    return converted(directory), sentencepiece.SentencePieceProcessor(model_proto=model)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_ids_are_sentencepiece_ones(both: tuple[tokenizers.Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def test_added_tokens_keep_their_ids(both: tuple[tokenizers.Tokenizer, Any]) -> None:
    ours, theirs = both
    size = theirs.piece_size()
    assert [ours.token_to_id(token) for token in APPENDED] == list(range(size, size + len(APPENDED)))
    first = theirs.piece_to_id("[UNUSED_TOKEN_0]")
    assert [ours.token_to_id(token) for token in RENAMED] == [first, first + 1]
    assert ours.token_to_id("[UNUSED_TOKEN_0]") is None
    ours.encode_special_tokens = False
    assert ours.encode("a<IMG_CONTEXT>", add_special_tokens=False).ids[-1] == size + 2
    ours.encode_special_tokens = True
    assert size + 2 not in ours.encode("a<IMG_CONTEXT>", add_special_tokens=False).ids


def test_the_published_classes_put_bos_first(tmp_path: Path) -> None:
    directory = write_published(tmp_path / "published", train(TEXT))
    found = tokenizer_settings(directory)
    assert found["add_bos_token"] is True
    assert found["bos_token"] == "<s>"
    assert "auto_map" not in found
    write_published(directory, train(TEXT), add_bos_token=False)
    assert tokenizer_settings(directory)["add_bos_token"] is False


def test_written_files_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, out = write_published(tmp_path / "published", train(TEXT)), tmp_path / "out"
    out.mkdir()
    write_tokenizer_json(source, out)
    assert (out / "tokenizer.json").read_bytes() == tokenizer_json(source) == tokenizer_json(out)
    theirs = AutoTokenizer.from_pretrained(out)
    expected = sentencepiece.SentencePieceProcessor(model_proto=(source / "tokenizer.model").read_bytes())
    text = "The answer: 8\n\n+"
    assert theirs(text, add_special_tokens=False).input_ids == expected.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "unigram"}, "no BPE model"),
        ({"byte_fallback": False}, "does not fall back to bytes"),
        ({"remove_extra_whitespaces": True}, "removes extra white space"),
        ({"treat_whitespace_as_suffix": True}, "white space behind words"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    directory = write_published(tmp_path, train(TEXT, **change))
    with pytest.raises(TokenizerFileError, match=rf"tokenizer\.model.*{message}.*AutoTokenizer"):
        tokenizer_json(directory)


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    directory = write_published(tmp_path, train(TEXT))
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (directory / "tokenizer.model").write_bytes(content)
        with pytest.raises(TokenizerFileError, match=r"tokenizer\.model' is no SentencePiece model.*fetch it again"):
            tokenizer_json(directory)


def test_settings_that_contradict_the_model(tmp_path: Path) -> None:
    directory = write_published(tmp_path, train(TEXT), added_tokens_decoder={"9000": {"content": "<img>"}})
    with pytest.raises(TokenizerFileError, match=r"'<img>' the id 9000, but behind the 420 pieces .* comes 420"):
        tokenizer_json(directory)
    write_published(directory, train(TEXT), added_tokens_decoder={"5": {"content": "<s>"}})
    with pytest.raises(TokenizerFileError, match=r"renames a piece of tokenizer\.model to '<s>'"):
        tokenizer_json(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(TokenizerFileError, match="holds a list"):
        tokenizer_json(directory)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, and no tokenizer\.model.*save_pretrained"):
        tokenizer_json(tmp_path)
