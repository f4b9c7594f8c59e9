"""Preference pairs from lines to an index: what is shared, what is stored, and every kind of bad input."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.build_index import build_index, is_current
from evovlm.data.chat import ChatTokens
from evovlm.data.corpus import write_corpus
from evovlm.data.errors import MetaError, Reason, SampleError
from evovlm.data.index import Index, IndexMismatchError
from evovlm.data.index_current import settings_hash
from evovlm.data.index_settings import IndexSettings
from evovlm.data.preference import parse_pair, share_prefix
from evovlm.data.sample import expand_sample
from evovlm.data.tokenizer import Tokenizer

from .preference_support import build, pair_line, render_sides, skips

GOOD = pair_line("Which word?", "the dog", "the cat")
CHAT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def as_line(**changes: Any) -> str:
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value is not ...})


# --- lines -----------------------------------------------------------------------------------------------------------


def test_other_keys_are_passed_over() -> None:
    pair = parse_pair(as_line(answer_gt="dog", metadata={"conversations": 1}, id=7, image="a.png"), "d", 3)
    assert (pair.chosen, pair.rejected) == ("the dog", "the cat")
    assert (pair.sample.name, pair.sample.id, pair.sample.images) == ("d/3", "7", ("a.png",))
    assert pair.sample.turns == ({"from": "human", "value": "<image>\nWhich word?"},)
    assert parse_pair(as_line(image=None), "d", 1).sample.images == ()
    two = parse_pair(as_line(image=["a.png", "b.png"], question="<image> or <image>?"), "d", 1).sample
    assert (two.images, two.turns[0]["value"]) == (("a.png", "b.png"), "<image> or <image>?")


@pytest.mark.parametrize(
    ("raw", "reason", "message"),
    [
        ('{"question": ', Reason.BROKEN_JSON, "sample 'd/9': the line is not valid JSON"),
        ("[]", Reason.BROKEN_JSON, "JSON list, not an object"),
        (as_line(chosen="\ud83d"), Reason.BROKEN_JSON, "'chosen' holds half a surrogate pair"),
        (json.dumps(CHAT), Reason.OTHER_KIND, "is a conversation, .* without `--kind preference`"),
        ("{}", Reason.MISSING_KEYS, "needs 'question', 'chosen' and 'rejected', but the line has none of them"),
        (as_line(question=...), Reason.MISSING_KEYS, "but the line has 'chosen', 'rejected'"),
        (as_line(chosen=None), Reason.MISSING_KEYS, "but the line has 'question', 'rejected'"),
        (as_line(rejected=...), Reason.MISSING_KEYS, "but the line has 'question', 'chosen'"),
        (as_line(rejected=["a"]), Reason.CONVERSATION, "'rejected' is a list, not a text"),
        (as_line(question=3), Reason.CONVERSATION, "'question' is a int, not a text"),
        (as_line(chosen=""), Reason.EMPTY_SIDE, "'chosen' is empty"),
        (as_line(rejected=" \n"), Reason.EMPTY_SIDE, "'rejected' is empty"),
        (as_line(rejected="the dog"), Reason.SAME_ANSWERS, "the same texts"),
        (as_line(image=["a", "b"]), Reason.IMAGE_COUNT, "0 <image> placeholders but 2 images"),
        (as_line(question="<image>?"), Reason.IMAGE_COUNT, "1 <image> placeholder but 0 images"),
        (as_line(image="s3://b/a.png"), Reason.MISSING_IMAGE, "remote address"),
    ],
)
def test_bad_lines_name_sample_and_fault(raw: str, reason: Reason, message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse_pair(raw, "d", 9)
    assert (caught.value.reason, caught.value.name) == (reason, "d/9")


# --- what is shared --------------------------------------------------------------------------------------------------


def chat_tokens(prompt: int, answer: list[int], masked: int) -> ChatTokens:
    """``prompt`` tokens, an answer of which the first ``masked`` are no targets, ``<|im_end|>`` and a newline."""
    ids = np.array([*range(100, 100 + prompt), *answer, 4, 3], np.int32)
    supervised = np.zeros(len(ids), np.bool_)
    supervised[prompt + masked : -1] = True
    return ChatTokens(ids, supervised, [])


ANSWER = st.lists(st.integers(0, 2), min_size=1, max_size=6)
MASKED = st.tuples(st.integers(0, 1), st.integers(0, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=st.integers(2, 5), chosen=ANSWER, rejected=ANSWER, masked=MASKED)
def test_both_renderings_are_in_the_shared_one(
    prompt: int, chosen: list[int], rejected: list[int], masked: tuple[int, int]
) -> None:
    sides = chat_tokens(prompt, chosen, masked[0]), chat_tokens(prompt, rejected, masked[1])
    if chosen == rejected and masked[0] == masked[1]:
        with pytest.raises(SampleError, match="the same tokens"):
            share_prefix(*sides, name="d/1")
        return
    shared = share_prefix(*sides, name="d/1")
    at, middle, ids = shared.chosen_at, shared.rejected_at, shared.tokens.ids
    assert 0 < at < middle < len(ids)
    assert ids[:middle].tolist() == sides[0].ids.tolist()
    assert [*ids[:at], *ids[middle:]] == sides[1].ids.tolist()
    assert ids[at] == ids[middle]
    first = [(ids[row], shared.tokens.supervised[row]) for row in (at + 1, middle + 1)]
    assert first[0] != first[1]  # nothing more could be shared
    assert shared.tokens.supervised[:middle].tolist() == sides[0].supervised.tolist()
    assert not shared.tokens.supervised[middle]
    assert shared.tokens.supervised[middle + 1 :].tolist() == sides[1].supervised[at + 1 :].tolist()
    assert shared.num_chosen == sides[0].supervised.sum()


def test_answers_to_different_questions_are_an_error() -> None:
    texts = [1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2]
    one, other = (ChatTokens(np.array(ids, np.int32), np.ones(6, np.bool_), [4]) for ids in texts)
    with pytest.raises(ValueError, match=r"with the same 2 tokens, but have images before tokens \[4\] and \[4\]"):
        share_prefix(one, other)


# --- indexes ---------------------------------------------------------------------------------------------------------


def test_an_index_of_pairs(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    lines = [
        GOOD,
        pair_line("What?", "red and blue", "red and green, but not blue", image="wide.png"),
        pair_line("<image> or <image>?", "both", "none", image=["square.png", "tall.png"]),
    ]
    report = build(tmp_path, tiny_tokenizer_dir, lines)
    index = Index.open(report.path)
    assert (len(index), index.meta.kind, report.num_skipped) == (3, "preference", 0)
    assert (tmp_path / "index" / "samples" / "branches.bin").stat().st_size == 3 * 12
    assert index.samples["num_tiles"].tolist() == [0, 3, 4]
    for sample, line in enumerate(lines):
        chosen, rejected = render_sides(line, index, sample, tokenizer)
        at, middle = (int(index.samples[name][sample]) for name in ("chosen_at", "rejected_at"))
        expanded = expand_sample(index, sample, image_context=tokenizer.image_context)
        assert expanded.branches == (at, middle)
        assert expanded.tokens[:middle].tolist() == chosen.tokens.tolist()
        assert [*expanded.tokens[:at], *expanded.tokens[middle:]] == rejected.tokens.tolist()
        assert expanded.labels[:middle].tolist() == chosen.labels.tolist()
        assert [*expanded.labels[:at], *expanded.labels[middle:]] == rejected.labels.tolist()
        assert expanded.runs == chosen.runs == rejected.runs
        assert index.samples["num_chosen"][sample] == (chosen.labels != -100).sum()
        assert index.samples["num_supervised"][sample] == (expanded.labels != -100).sum()
        assert index.samples["num_tokens"][sample] == len(expanded.tokens)
        assert all(start + length < at for start, length in expanded.runs)


def test_bad_lines_are_counted_and_listed(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    long = pair_line("Count.", "one " * 40, "two " * 40)
    composed = pair_line("Name?", "Ren\u00e9", "Rene\u0301")  # other texts, but one and the same to the tokenizer
    lines = [GOOD, as_line(rejected="the dog"), as_line(chosen=" "), as_line(chosen=...), CHAT, long, composed]
    report = build(tmp_path, tiny_tokenizer_dir, lines, max_tokens=100)
    assert report.meta.num_samples == 1
    expected = ["SAME_ANSWERS", "EMPTY_SIDE", "MISSING_KEYS", "OTHER_KIND", "TOO_LONG", "SAME_ANSWERS"]
    assert [(line, reason) for line, reason, _ in skips(tmp_path)] == [
        (number, Reason[name]) for number, name in enumerate(expected, start=2)
    ]
    assert report.meta.skipped == Counter(str(Reason[name]) for name in expected)
    assert skips(tmp_path)[-1][2] == "chosen and rejected are the same tokens: nothing is preferred"


def test_the_other_kind_of_lines_is_an_error_with_the_remedy(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    with pytest.raises(MetaError, match=r"p/1: the line is a preference pair, .* with `--kind preference`"):
        build(tmp_path, tiny_tokenizer_dir, [GOOD] * 3, kind="conversations")
    with pytest.raises(MetaError, match=r"21 of 21 lines are unusable, .* a conversation, .* without `--kind"):
        build(tmp_path, tiny_tokenizer_dir, [CHAT] * 21, max_skipped=0.5)
    write_corpus(tmp_path / "books", [[1, 2, 3]], np.uint16)
    (tmp_path / "meta.json").write_text('{"books": {"annotation": "books", "format": "megatron"}}')
    s = IndexSettings(
        meta=tmp_path / "meta.json", tokenizer=tiny_tokenizer_dir, out=tmp_path / "index", kind="preference"
    )
    with pytest.raises(MetaError, match="'books' is a corpus of documents, which are no preference pairs"):
        build_index(s)


def test_the_kind_decides_whether_an_index_is_current(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    report = build(tmp_path, tiny_tokenizer_dir, [CHAT], kind="conversations")
    s = IndexSettings.model_validate(report.meta.settings)
    assert is_current(s)
    assert not is_current(s.model_copy(update={"kind": "preference"}))
    # An index from before there were kinds: neither it nor the settings in it name one.
    file = tmp_path / "index" / "index.json"
    content = json.loads(file.read_text())
    del content["kind"], content["settings"]["kind"]
    file.write_text(json.dumps(content))
    assert Index.open(report.path).meta.kind == "conversations"
    assert is_current(s)
    left_out = ("out", "num_workers", "strict", "max_skipped")
    of_then = {key: value for key, value in content["settings"].items() if key not in left_out}
    text = json.dumps({"format": 2, **of_then}, sort_keys=True)
    assert settings_hash(s) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_damaged_branches_are_errors(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    index = Index.open(build(tmp_path, tiny_tokenizer_dir, [GOOD, pair_line("?", "a b", "c", image="wide.png")]).path)
    length = int(index.samples["num_tokens"][1])
    expanded = expand_sample(index, 1, image_context=tokenizer.image_context)
    tokens = expanded.tokens.tolist()
    before_images = tokens.index(tokens[int(index.samples["rejected_at"][1])])  # the token that branches begin with
    assert before_images < expanded.runs[0][0]
    for name, value, message in (
        ("chosen_at", 3, "branches at 3 and"),
        (
            "chosen_at",
            tokens.index(tokens[int(index.samples["rejected_at"][1])]),
            "do not begin alike",
        ),  # before images
        ("chosen_at", int(index.samples["chosen_at"][1]) + 1, "do not begin alike"),
        ("rejected_at", length, f"of {length} tokens"),
        ("rejected_at", int(index.samples["chosen_at"][1]), "do not begin alike"),
        ("num_chosen", 99, r"has \d+ targets in its chosen answer, but the index says 99"),
    ):
        broken: Any = Index.open(index.path)
        broken.samples = {column: index.samples[column].copy() for column in index.samples.names}
        broken.samples[name][1] = value
        with pytest.raises(ValueError, match=rf"pair 'p/2'.*{message}.*rebuild the index"):
            expand_sample(broken, 1, image_context=tokenizer.image_context)
    file = tmp_path / "index" / "samples" / "branches.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(IndexMismatchError, match=r"branches.bin' should hold 24 bytes, found 20 bytes: rebuild"):
        Index.open(index.path)
    file.unlink()
    with pytest.raises(IndexMismatchError, match=r"branches.bin' should hold 24 bytes, found nothing: rebuild"):
        Index.open(index.path)
