"""Building and reading an index: content, layout independence of the result, every kind of bad input."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from evovlm.data.build_index import IndexReport, IndexSettings, build_index, is_current
from evovlm.data.chat import render
from evovlm.data.corpus import write_corpus
from evovlm.data.errors import MetaError, Reason, SampleError
from evovlm.data.index import Index, IndexMismatchError
from evovlm.data.index_progress import show_progress
from evovlm.data.sample import expand_sample
from evovlm.data.tokenizer import Tokenizer

TILE, TOKENS_PER_TILE = 28, 4


def conversation(*texts: str, **keys: Any) -> dict[str, Any]:
    """A line whose turns are human, gpt, human, …"""
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)], **keys}


def pretrain(text: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "pretrain", "value": text}], **keys}


class Workshop:
    """A folder with images, a video, a tokenizer; makes meta JSONs and indices in it."""

    def __init__(self, folder: Path, tokenizer_dir: Path) -> None:
        self.folder = folder
        self.tokenizer_dir = tokenizer_dir
        self.tokenizer = Tokenizer.load(tokenizer_dir)
        (folder / "images" / "clip").mkdir(parents=True)
        for name, size in (("square", (30, 30)), ("wide", (120, 60)), ("tall", (28, 84))):
            Image.new("RGB", size, "red").save(folder / "images" / f"{name}.png")
        for frame in range(5):
            Image.new("RGB", (40, 30), (frame, 0, 0)).save(folder / "images" / "clip" / f"{frame}.jpg")
        frames = [Image.new("L", (20, 20), 60 * frame) for frame in range(4)]
        frames[0].save(folder / "images" / "moving.gif", save_all=True, append_images=frames[1:], duration=100)

    def write(self, datasets: dict[str, list[Any]], **keys: Any) -> None:
        """Write one .jsonl per dataset (strings go in as they are) and the meta JSON."""
        meta = {}
        for name, lines in datasets.items():
            text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
            (self.folder / f"{name}.jsonl").write_text(text)
            meta[name] = {"root": "images", "annotation": f"{name}.jsonl", **keys}
        self.write_meta(meta)

    def write_meta(self, meta: dict[str, Any]) -> None:
        (self.folder / "meta.json").write_text(json.dumps(meta))

    def settings(self, **changes: Any) -> IndexSettings:
        given: dict[str, Any] = {
            "meta": self.folder / "meta.json",
            "tokenizer": self.tokenizer_dir,
            "out": self.folder / "index",
            "tile_size": TILE,
            "tokens_per_tile": TOKENS_PER_TILE,
            "num_workers": 1,
            "system_prompt": "Read.",
        }
        return IndexSettings(**(given | changes))

    def build(self, **changes: Any) -> tuple[Index, IndexReport]:
        report = build_index(self.settings(**changes))
        return Index.open(report.path), report

    def skips(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "index" / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def shop(tmp_path: Path, tiny_tokenizer_dir: Path) -> Workshop:
    return Workshop(tmp_path, tiny_tokenizer_dir)


GOOD = conversation("Which word?", "dog", id="good")


def test_every_kind_of_sample(shop: Workshop) -> None:
    shop.write(
        {
            "text": [conversation("Hi", "Ho", "And?", "Nothing."), pretrain("The dog and the cat.")],
            "pictures": [
                conversation("What is this?", "red", image="wide.png"),
                conversation("<image>\nand <image>?", "both red", image=["wide.png", "tall.png"]),
                pretrain("See <image> here.", image="square.png"),
                conversation("What moves?", "nothing", video="clip"),
                conversation("<video>\nWhat moves?", "a shade", video="moving.gif"),
                conversation("Where?", "<ref>it</ref><box>[[0, 0, 999, 999]]</box>", image="square.png"),
            ],
        }
    )
    index, report = shop.build(max_tiles=4)
    assert (len(index), report.num_skipped) == (8, 0)
    text, pictures = index.datasets
    assert (text.kind, text.first, text.count) == ("language", 0, 2)
    assert (pictures.kind, pictures.first, pictures.count) == ("multimodal", 2, 6)
    assert [index.name(i) for i in (0, 1, 2, 7)] == ["text/1", "text/2", "pictures/1", "pictures/6"]

    assert index.samples["num_images"].tolist() == [0, 0, 1, 2, 1, 5, 4, 1]
    # wide 2×1 + thumbnail; two images: at most 2 tiles each, so 2×1 + thumbnail and 1×2 + thumbnail; frames: 1 each
    assert index.samples["num_tiles"].tolist() == [0, 0, 3, 6, 1, 5, 4, 1]
    wide = index.image_refs(2)[0]
    assert (wide.cols, wide.rows, wide.thumbnail, wide.num_tiles, wide.frame) == (2, 1, True, 3, -1)
    assert wide.path == shop.folder / "images" / "wide.png"
    frames = index.image_refs(5)
    assert [(ref.path.name, ref.frame, ref.num_tiles) for ref in frames] == [(f"{i}.jpg", -1, 1) for i in range(5)]
    assert [(ref.path.name, ref.frame) for ref in index.image_refs(6)] == [("moving.gif", i) for i in range(4)]
    for ref in (ref for sample in range(len(index)) for ref in index.image_refs(sample)):
        assert ref.path.is_file()

    totals = index.meta
    assert totals.num_tokens == int(index.samples["num_tokens"].sum())
    assert totals.num_tiles == 20
    assert totals.num_images == len(index.images) == 14
    assert text.num_tokens + pictures.num_tokens == totals.num_tokens


def test_stored_tokens_are_the_rendered_ones_and_expand_to_labels(shop: Workshop) -> None:
    lines = [
        conversation("Hi <IMG_CONTEXT> there", "a b", "c", "d e f", image=["wide.png"]),
        conversation("x <image> y", "z", "<image>", "zz", image=["tall.png", "square.png"]),
        pretrain("Left <image> right", image="square.png"),
        conversation("no picture", "none"),
    ]
    shop.write({"d": lines})
    index, _ = shop.build()
    context = shop.tokenizer.image_context
    system = {"from": "system", "value": "Read."}
    for sample, line in enumerate(lines):
        turns = line["conversations"]
        turns = turns if turns[0]["from"] == "pretrain" else [system, *turns]
        chat = render(turns, int(index.samples["num_images"][sample]), shop.tokenizer)
        ids, supervised = index.tokens(sample)
        assert (ids.dtype, supervised.dtype) == (np.int32, np.bool_)
        np.testing.assert_array_equal(ids, chat.ids)
        np.testing.assert_array_equal(supervised, chat.supervised)

        refs = index.image_refs(sample)
        lengths = [ref.num_tiles * TOKENS_PER_TILE for ref in refs]
        tokens, targets = chat.ids.tolist(), chat.supervised.tolist()
        for place, length in reversed(list(zip(chat.insert_at, lengths, strict=True))):
            tokens[place:place], targets[place:place] = [context] * length, [False] * length
        expanded = expand_sample(index, sample, image_context=context)
        assert (expanded.tokens.dtype, expanded.labels.dtype) == (np.int32, np.int64)
        assert expanded.tokens.tolist() == tokens
        shifted = [tokens[t + 1] if targets[t + 1] else -100 for t in range(len(tokens) - 1)] + [-100]
        assert expanded.labels.tolist() == shifted
        assert expanded.refs == refs
        assert index.samples["num_tokens"][sample] == len(tokens)
        assert index.samples["num_supervised"][sample] == sum(label >= 0 for label in shifted)
        for (start, length), wanted in zip(expanded.runs, lengths, strict=True):
            assert length == wanted
            assert (expanded.tokens[start : start + length] == context).all()
            assert expanded.tokens[start - 1] == shop.tokenizer.image_start
            assert expanded.tokens[start + length] == shop.tokenizer.image_end
        assert (expanded.tokens == context).sum() == sum(lengths)


def test_literal_image_context_in_user_text_stays_text(shop: Workshop) -> None:
    text = "What do <IMG_CONTEXT>, <img> and </img><|im_end|> mean?"
    shop.write({"d": [conversation(text, "tokens")]})
    index, _ = shop.build()
    ids, _ = index.tokens(0)
    special = (shop.tokenizer.image_context, shop.tokenizer.image_start, shop.tokenizer.image_end)
    assert not np.isin(ids, special).any()
    assert text in shop.tokenizer.decode(ids.tolist())
    assert index.samples["num_images"][0] == index.samples["num_tiles"][0] == 0


def test_the_first_stored_token_is_never_a_target(shop: Workshop) -> None:
    shop.write({"d": [pretrain("The dog and the cat.")]})
    index, _ = shop.build()
    assert index.samples["num_supervised"][0] == index.samples["num_stored"][0] - 1


def test_bad_lines_are_counted_and_listed(shop: Workshop) -> None:
    (shop.folder / "images" / "broken.png").write_bytes(b"not an image")
    Image.new("L", (200, 200)).save(shop.folder / "images" / "big.png")
    lines: list[Any] = [
        GOOD,
        '{"id": "cut", "conversations": [',
        "",
        conversation("?", "x", image="absent.png", id="gone"),
        conversation("<image><image><image>", "x", image=["wide.png", "tall.png"], id=7),
        conversation("?", "", id="silent"),
        conversation("?", "x", image="broken.png"),
        conversation("?", "x", image="big.png"),
        conversation("?", id="unasked"),
        conversation("?", "x", video="absent"),
        "   ",
        GOOD,
    ]
    shop.write({"d": lines})
    index, report = shop.build(max_pixels=30_000)
    assert [index.name(i) for i in range(len(index))] == ["d/1", "d/12"]
    assert report.meta.skipped == {
        "missing image": 2,
        "unreadable image": 2,
        "broken JSON": 1,
        "image count": 1,
        "empty answer": 1,
        "no supervised tokens": 1,
    }
    skips = shop.skips()
    assert [(skip["dataset"], skip["line"], skip["id"], skip["reason"]) for skip in skips] == [
        ("d", 2, None, "broken JSON"),
        ("d", 4, "gone", "missing image"),
        ("d", 5, "7", "image count"),
        ("d", 6, "silent", "empty answer"),
        ("d", 7, None, "unreadable image"),
        ("d", 8, None, "unreadable image"),
        ("d", 9, "unasked", "no supervised tokens"),
        ("d", 10, None, "missing image"),
    ]
    assert "absent.png' does not exist" in skips[1]["detail"]
    assert "3 <image> placeholders but 2 images" in skips[2]["detail"]
    assert "40000 pixels, more than the limit of 30000" in skips[5]["detail"]
    (dataset,) = index.datasets
    assert (dataset.num_lines, dataset.num_skipped, dataset.count) == (10, 8, 2)


def test_strict_makes_the_first_bad_line_an_error(shop: Workshop) -> None:
    shop.write({"d": [GOOD, conversation("?", "x", image="absent.png"), "{"]})
    with pytest.raises(SampleError, match=r"sample 'd/2': image '.*absent\.png' does not exist") as caught:
        shop.build(strict=True)
    assert caught.value.reason == Reason.MISSING_IMAGE
    assert not (shop.folder / "index").exists()


def test_truncated_images_are_found_by_decoding(shop: Workshop) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    path = shop.folder / "images" / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    shop.write({"d": [GOOD, conversation("?", "x", image="cut.jpg")]})
    assert len(shop.build()[0]) == 2
    index, _ = shop.build(check_images="decode")
    assert len(index) == 1
    (skip,) = shop.skips()
    assert skip["reason"] == "unreadable image"
    assert "truncated" in skip["detail"]


def test_a_dataset_that_loses_half_its_lines_is_an_error(shop: Workshop) -> None:
    bad = [conversation("?", "x", image=f"no{i}.png") for i in range(8)] + ["{"] * 3
    shop.write({"fine": [GOOD], "rotten": [GOOD] * 9 + bad})
    message = (
        r"'rotten'.* 11 of 20 lines are unusable, more than 50%\. Most common: 8 × missing image \(line 10: .*3 × bro"
    )
    with pytest.raises(MetaError, match=message):
        shop.build()
    assert not list(shop.folder.glob("*index*")), "nothing half written may stay"
    assert len(shop.build(max_skipped=0.6)[0]) == 10


def test_an_index_without_samples_is_an_error(shop: Workshop) -> None:
    shop.write({"d": ["{"]})
    with pytest.raises(MetaError, match=r"no usable sample; skipped by reason: \{'broken JSON': 1}"):
        shop.build()


def test_small_dataset_without_samples_is_a_warning(shop: Workshop) -> None:
    shop.write({"d": ["{"], "e": [GOOD]})
    index, report = shop.build()
    assert report.meta.warnings == ("dataset 'd': none of 1 lines is a usable sample",)
    assert [dataset.count for dataset in index.datasets] == [0, 1]


def test_unknown_meta_keys_are_in_the_report(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    shop.write({"d": [GOOD]}, max_dynamic_path=3)
    _, report = shop.build()
    warning = "dataset 'd': unknown key 'max_dynamic_path' is ignored (did you mean 'max_dynamic_patch'?)"
    assert report.meta.warnings == (warning,)
    assert caplog.text.count(warning) == 1


LONG = pretrain(" ".join(f"word {number}," for number in range(60)))


def test_overlong_skip(shop: Workshop) -> None:
    shop.write({"d": [GOOD, LONG, conversation("What is in it?", "something", image="wide.png")]})
    num_tokens = int(shop.build(max_tiles=1)[0].samples["num_tokens"][2])
    index, report = shop.build(max_tokens=num_tokens, max_tiles=4)
    assert (len(index), report.meta.skipped) == (1, {"too long": 2})
    detail = shop.skips()[1]["detail"]
    assert f"{num_tokens + 8} tokens (12 of them visual), the limit is {num_tokens}" in detail
    assert len(shop.build(max_tokens=num_tokens + 8, max_tiles=4)[0]) == 2


def test_overlong_error(shop: Workshop) -> None:
    shop.write({"d": ["{", GOOD, LONG]})
    with pytest.raises(SampleError, match=r"sample 'd/3': \d+ tokens, the limit is 80: raise max_tokens"):
        shop.build(max_tokens=80, overlong="error")


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
)
def test_corpus_documents(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path, lengths: list[int]
) -> None:
    shop = Workshop(tmp_path_factory.mktemp("corpus"), tiny_tokenizer_dir)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, shop.tokenizer.vocab_size, length).tolist() for length in lengths]
    write_corpus(shop.folder / "books", documents, np.uint16)
    (shop.folder / "d.jsonl").write_text(json.dumps(GOOD) + "\n")
    shop.write_meta(
        {"d": {"annotation": "d.jsonl"}, "books": {"annotation": "books", "format": "megatron", "repeat_time": 3}}
    )
    index, report = shop.build(max_skipped=1)
    good = [d for d, document in enumerate(documents) if len(document) > 1]
    assert [int(row) - 1 for row in index.samples["line"][1:]] == good
    for sample, document in enumerate(good, start=1):
        ids, supervised = index.tokens(sample)
        assert ids.dtype == np.int32
        assert ids.tolist() == documents[document]
        assert supervised.all()
        expanded = expand_sample(index, sample, image_context=shop.tokenizer.image_context)
        assert expanded.labels.tolist() == [*documents[document][1:], -100]
        assert (expanded.runs, expanded.refs) == ([], [])
    assert sum(report.meta.skipped.values()) == len(documents) - len(good)
    assert (index.datasets[1].kind, index.datasets[1].repeat_time) == ("language", 3.0)


def test_overlong_documents(shop: Workshop) -> None:
    documents = [list(range(n)) for n in (5, 10, 11, 19, 20, 28, 29, 1, 0, 2)]
    write_corpus(shop.folder / "books", documents)
    shop.write_meta({"books": {"annotation": "books", "format": "megatron"}})
    with pytest.raises(SampleError, match=r"sample 'books/3': 11 tokens, the limit is 10"):
        shop.build(max_tokens=10, overlong="error")
    index, report = shop.build(max_tokens=10)
    assert report.meta.skipped == {"too long": 5, "no supervised tokens": 1, "empty document": 1}
    assert [index.tokens(sample)[0].tolist() for sample in range(len(index))] == [documents[d] for d in (0, 1, 9)]
    assert index.samples["num_supervised"].tolist() == [4, 9, 1]
    assert [index.name(sample) for sample in range(3)] == ["books/1", "books/2", "books/10"]


def test_corpus_of_another_tokenizer_is_an_error(shop: Workshop) -> None:
    vocab_size = shop.tokenizer.vocab_size
    write_corpus(shop.folder / "books", [[1, 2], [3, vocab_size]])
    shop.write_meta({"books": {"annotation": "books", "format": "megatron"}})
    with pytest.raises(MetaError, match=rf"token 3 is id {vocab_size}, but the tokenizer has {vocab_size} ids"):
        shop.build()


def test_corpus_that_is_moved_or_changed_is_noticed(shop: Workshop) -> None:
    write_corpus(shop.folder / "books", [[1, 2, 3]])
    shop.write_meta({"books": {"annotation": "books", "format": "megatron"}})
    shop.build()
    write_corpus(shop.folder / "books", [[1, 2, 3, 4]])
    with pytest.raises(IndexMismatchError, match=r"books\.bin' had 12 bytes when the index was built, now 16"):
        Index.open(shop.folder / "index")
    (shop.folder / "books.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"points into '.*books\.bin', which is not there"):
        Index.open(shop.folder / "index")


def test_few_corpora_are_open_at_once(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evovlm.data.index._OPEN_SOURCES", 2)
    names = [f"books{number}" for number in range(5)]
    for number, name in enumerate(names):
        write_corpus(shop.folder / name, [[number, 1, 2], [number, 3]])
    shop.write_meta({name: {"annotation": name, "format": "megatron"} for name in names})
    index, _ = shop.build()

    def num_open() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.readlink().parent == shop.folder for link in links if link.is_symlink())

    for _ in range(2):
        found = [index.tokens(sample)[0].tolist() for sample in range(10)]
        assert found == [ids for number in range(5) for ids in ([number, 1, 2], [number, 3])]
        assert num_open() == 2


def test_samples_that_do_not_exist(shop: Workshop) -> None:
    shop.write({"d": [GOOD, GOOD]})
    index, _ = shop.build()
    for read in (index.tokens, index.image_refs, index.name, index.dataset_of):
        for sample in (-1, 2):
            with pytest.raises(IndexError, match=rf"index '.*' has 2 samples, there is no sample {sample}"):
                read(sample)


def test_the_dataset_of_a_sample(shop: Workshop) -> None:
    shop.write({"a": ["{"], "b": [GOOD, GOOD], "c": ["{"], "d": [GOOD], "e": ["{"]})
    index, _ = shop.build()
    assert [index.dataset_of(sample).name for sample in range(len(index))] == ["b", "b", "d"]
    assert [index.datasets[number].name for number in index.samples["dataset"]] == ["b", "b", "d"]


def test_repeat_time_below_one_keeps_the_first_lines(shop: Workshop) -> None:
    lines: list[Any] = [GOOD, "", "{", GOOD, GOOD, GOOD, GOOD, GOOD]
    shop.write({"d": lines}, repeat_time=0.5)
    index, _ = shop.build()
    (dataset,) = index.datasets
    assert index.samples["line"].tolist() == [1, 4]
    assert (dataset.cut_to, dataset.num_lines, dataset.num_skipped, dataset.repeat_time) == (3, 3, 1, 1.0)
    shop.write({"d": lines}, repeat_time=2)
    index, _ = shop.build()
    assert (len(index), index.datasets[0].repeat_time, index.datasets[0].cut_to) == (6, 2.0, None)


def test_max_dynamic_patch_overrides_max_tiles(shop: Workshop) -> None:
    shop.write({"d": [conversation("?", "x", image="wide.png")]}, max_dynamic_patch=1, data_augment=True, weight=0.25)
    index, _ = shop.build(max_tiles=12)
    assert index.image_refs(0)[0].num_tiles == 1
    (dataset,) = index.datasets
    assert (dataset.max_tiles, dataset.augment, dataset.weight) == (1, True, 0.25)
    with pytest.raises(MetaError, match=r"'d': max_dynamic_patch = 1 is below min_tiles = 2"):
        shop.build(min_tiles=2)
    shop.write({"d": [GOOD]}, max_dynamic_patch=255)
    with pytest.raises(MetaError, match=r"'d': max_dynamic_patch = 255 is above 254, the most tiles of an image"):
        shop.build()


def test_thumbnail_may_be_off(shop: Workshop) -> None:
    shop.write({"d": [conversation("?", "x", image="wide.png")]})
    (ref,) = shop.build(max_tiles=2, thumbnail=False)[0].image_refs(0)
    assert (ref.cols, ref.rows, ref.thumbnail, ref.num_tiles) == (2, 1, False, 2)


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "index.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_result_does_not_depend_on_the_number_of_workers(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    for number in range(60):
        lines += [conversation(f"What is {number}?", "red" * (number % 7), image="wide.png"), "{" if number % 9 else ""]
        lines += [pretrain(f"{number} dogs", id=number), conversation("?", "x", video="clip", id=number)]
    monkeypatch.setattr("evovlm.data.index_tasks._LINES", 17)
    write_corpus(shop.folder / "books", [[1, 2, 3]] * 50)
    shop.write({"a": lines, "b": lines[:50]})
    meta = json.loads((shop.folder / "meta.json").read_text())
    shop.write_meta({**meta, "c": {"annotation": "books", "format": "megatron"}})
    one, _ = shop.build(out=shop.folder / "one")
    seen: list[tuple[str, int, int]] = []
    two = build_index(shop.settings(out=shop.folder / "two", num_workers=2), lambda *state: seen.append(state))
    assert files_of(shop.folder / "one") == files_of(shop.folder / "two")
    assert one.meta.datasets == two.meta.datasets
    assert one.meta.settings_hash == two.meta.settings_hash
    assert len(seen) > 10
    total = sum(dataset.num_lines for dataset in one.datasets)
    assert seen[-1] == ("c", total, total)


def test_is_current(shop: Workshop) -> None:
    shop.write({"d": [GOOD, "{"]})
    settings = shop.settings()
    assert not is_current(settings)
    build_index(settings)
    assert is_current(settings)
    assert is_current(shop.settings(num_workers=2))
    assert not is_current(shop.settings(max_tiles=3))
    assert not is_current(shop.settings(strict=True)), "a strict build would have failed"
    shop.write({"d": [GOOD]})
    assert not is_current(settings)
    build_index(settings)
    assert is_current(settings)
    (shop.folder / "d.jsonl").unlink()
    assert not is_current(settings)


def test_rebuilding_replaces_only_an_index(shop: Workshop) -> None:
    shop.write({"d": [GOOD]})
    shop.build()
    shop.write({"d": [GOOD, GOOD]})
    assert len(shop.build()[0]) == 2
    assert not list(shop.folder.glob(".index*"))
    (shop.folder / "other").mkdir()
    (shop.folder / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"'.*other' exists and is not an index"):
        shop.build(out=shop.folder / "other")
    assert (shop.folder / "other" / "thesis.tex").exists()


def test_a_failed_build_leaves_the_old_index(shop: Workshop) -> None:
    shop.write({"d": [GOOD]})
    shop.build()
    shop.write({"d": [GOOD, "{"]})
    with pytest.raises(SampleError):
        shop.build(strict=True)
    assert len(Index.open(shop.folder / "index")) == 1


def test_wrong_tokenizer_or_model_is_an_error(shop: Workshop) -> None:
    shop.write({"d": [GOOD]})
    index, _ = shop.build()
    vocab_size = shop.tokenizer.vocab_size
    index.check_tokenizer(shop.tokenizer)
    larger = dataclasses.replace(shop.tokenizer, vocab_size=vocab_size + 5)
    with pytest.raises(IndexMismatchError, match=rf"tokenizer of {vocab_size} ids, this one has {vocab_size + 5}"):
        index.check_tokenizer(larger)
    with pytest.raises(IndexMismatchError, match=rf"tokenizer {shop.tokenizer.fingerprint}, this one is 0123"):
        index.check_tokenizer(dataclasses.replace(shop.tokenizer, fingerprint="0123"))

    index.check_model(vocab_size, TILE, TOKENS_PER_TILE)
    index.check_model(vocab_size + 64, TILE, TOKENS_PER_TILE)
    for model, message in (
        ((vocab_size - 1, TILE, TOKENS_PER_TILE), rf"model embeds {vocab_size - 1} ids, index '.*' uses {vocab_size}"),
        ((vocab_size, 448, TOKENS_PER_TILE), r"tile_size = 448, index '.*' was built for 28"),
        ((vocab_size, TILE, 256), r"tokens_per_tile = 256, index '.*' was built for 4"),
    ):
        with pytest.raises(IndexMismatchError, match=message):
            index.check_model(*model)


def test_damaged_index(shop: Workshop) -> None:
    with pytest.raises(FileNotFoundError, match="holds no index"):
        Index.open(shop.folder)
    shop.write({"d": [GOOD, GOOD]})
    folder = shop.build()[0].path
    for file in ("samples/num_tokens.bin", "samples/details.bin", "images/num_tiles.bin", "paths.bin"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole + b"123")
        message = rf"{re.escape(file)}' should hold {len(whole)} bytes, found {len(whole) + 3} bytes: rebuild it"
        with pytest.raises(IndexMismatchError, match=message):
            Index.open(folder)
        (folder / file).unlink()
        with pytest.raises(IndexMismatchError, match=rf"{re.escape(file)}' should .*, found nothing: rebuild it"):
            Index.open(folder)
        (folder / file).write_bytes(whole)
    content = json.loads((folder / "index.json").read_text())
    for change, message in (
        ({"format_version": 1}, "has format 1, this version reads 2: rebuild it with `evovlm index`"),
        ({"num_tiles": "many"}, r"damaged \(num_tiles: "),
    ):
        (folder / "index.json").write_text(json.dumps(content | change))
        with pytest.raises(IndexMismatchError, match=message):
            Index.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(IndexMismatchError, match="damaged"):
        Index.open(folder)


def test_tokens_cut_off_after_opening(shop: Workshop) -> None:
    shop.write({"d": [GOOD, GOOD]})
    index, _ = shop.build()
    size = index.path.joinpath("tokens.bin").stat().st_size
    os.truncate(index.path / "tokens.bin", size - 2)
    assert len(index.tokens(0)[0])
    with pytest.raises(IndexMismatchError, match=rf"tokens\.bin' was cut off: {size // 2} bytes wanted from byte"):
        index.tokens(1)
    with pytest.raises(IndexMismatchError, match=rf"had {size} bytes when the index was built, now {size - 2}"):
        Index.open(index.path)


def test_settings_are_checked(shop: Workshop) -> None:
    for changes, message in (
        ({"max_tile": 3}, "max_tile"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tiles": 255}, "less than or equal to 254"),
        ({"min_tiles": 5, "max_tiles": 4}, "min_tiles = 5 is above max_tiles = 4"),
        ({"overlong": "split"}, "overlong"),
        ({"video_sampling": "often"}, "often"),
    ):
        with pytest.raises(ValidationError, match=message):
            shop.settings(**changes)


def test_progress_without_a_terminal_prints_plain_lines(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.write({"d": [GOOD] * 3})
    with show_progress() as progress:
        build_index(shop.settings(), progress)
    assert "index 'd': 3 of 3 lines" in capsys.readouterr().err
