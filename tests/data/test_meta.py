"""The meta JSON and the lines of its .jsonl files: what is read, and how each fault is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.data.annotation import parse_sample, with_system
from evovlm.data.chat import place_frames
from evovlm.data.errors import MetaError, Reason, SampleError
from evovlm.data.meta import load_meta


def write_meta(folder: Path, **datasets: Any) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps(datasets))
    return path


def line(*turns: tuple[str, str], **keys: Any) -> str:
    return json.dumps({"conversations": [{"from": role, "value": value} for role, value in turns], **keys})


QUESTION = ("human", "What is this?")
ANSWER = ("gpt", "A cat.")


def test_meta_reads_every_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    path = write_meta(
        tmp_path,
        a={
            "root": "images",
            "annotation": "a.jsonl",
            "data_augment": True,
            "repeat_time": 0.5,
            "length": 7,
            "max_dynamic_patch": 6,
            "weight": 2,
        },
        b={"annotation": str(tmp_path / "corpus"), "format": "megatron"},
    )
    meta = load_meta(path)
    a, b = meta.datasets
    assert (a.name, a.format, a.root, a.annotation) == ("a", "internvl", tmp_path / "images", tmp_path / "a.jsonl")
    assert (a.repeat_time, a.augment, a.max_tiles, a.weight) == (0.5, True, 6, 2.0)
    assert (b.format, b.annotation, b.repeat_time, b.augment) == ("megatron", tmp_path / "corpus", 1.0, False)
    assert meta.warnings == ()


def test_meta_paths_may_be_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").touch()
    path = write_meta(tmp_path / "meta", a={"root": "data", "annotation": "data/a.jsonl"})
    monkeypatch.chdir(tmp_path)
    (dataset,) = load_meta(path).datasets
    assert (dataset.root, dataset.annotation) == (tmp_path / "data", tmp_path / "data" / "a.jsonl")
    (tmp_path / "meta" / "data").mkdir()
    (tmp_path / "meta" / "data" / "a.jsonl").touch()  # the folder of the meta JSON comes first
    assert load_meta(path).datasets[0].annotation == tmp_path / "meta" / "data" / "a.jsonl"


def test_unknown_meta_keys_are_reported_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    path = write_meta(tmp_path, a={"annotation": "a.jsonl", "repeat_tme": 2, "source": "somewhere"})
    first, second = load_meta(path).warnings
    assert first == "dataset 'a': unknown key 'repeat_tme' is ignored (did you mean 'repeat_time'?)"
    assert second == "dataset 'a': unknown key 'source' is ignored"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"root": "x"}, r"dataset 'a': 'annotation' = None: Field required"),
        ({"anotation": "a.jsonl"}, r"did you mean 'anotation'"),
        ({"annotation": "a.jsonl", "repeat_time": 0}, r"'repeat_time' = 0: .*greater than 0"),
        ({"annotation": "a.jsonl", "repeat_time": "2"}, r"'repeat_time' = '2'"),
        ({"annotation": "a.jsonl", "max_dynamic_patch": 0}, r"'max_dynamic_patch' = 0"),
        ({"annotation": "a.jsonl", "data_augment": "yes"}, r"'data_augment' = 'yes'"),
        ({"annotation": "a.jsonl", "format": "parquet"}, r"'format' = 'parquet'.*'internvl' or 'megatron'"),
        ({"annotation": "a.json"}, r"a\.json' must be a \.jsonl file.*megatron"),
        ({"annotation": "absent.jsonl"}, r"absent\.jsonl' does not exist"),
        ({"annotation": "a.jsonl", "root": "s3://bucket/x"}, r"s3://bucket/x' is a remote address.*copy it"),
        (["a.jsonl"], r"must be an object with at least 'annotation', not list"),
    ],
)
def test_bad_meta_entries_name_dataset_key_and_remedy(tmp_path: Path, entry: Any, message: str) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(MetaError, match=message):
        load_meta(write_meta(tmp_path, a=entry))


def test_bad_meta_files(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    with pytest.raises(FileNotFoundError, match=r"meta\.json' does not exist"):
        load_meta(path)
    for text, message in (
        ('{"a": ', "not valid JSON"),
        ("{}", "at least one dataset"),
        ('{"a": {"annotation": "x.jsonl"}, "a": {"annotation": "y.jsonl"}}', "the key 'a' stands there 2 times"),
    ):
        path.write_text(text)
        with pytest.raises(MetaError, match=message):
            load_meta(path)


def test_text_sample() -> None:
    sample = parse_sample(line(("system", "Be terse."), QUESTION, ANSWER, id=5), "text", 3)
    assert (sample.name, sample.id, sample.images, sample.video) == ("text/3", "5", (), None)
    assert [turn["from"] for turn in sample.turns] == ["system", "human", "gpt"]
    assert parse_sample(line(QUESTION, ANSWER, image="", video=None), "text", 1).images == ()


@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_placeholder_is_prepended_before_a_lone_image(image: object) -> None:
    sample = parse_sample(line(("system", "Be terse."), QUESTION, ANSWER, image=image, width=3, height=4), "d", 1)
    assert sample.images == ("a.png",)
    assert [turn["value"] for turn in sample.turns] == ["Be terse.", "<image>\nWhat is this?", "A cat."]


def test_placeholder_in_a_later_turn_is_left_there() -> None:
    sample = parse_sample(line(QUESTION, ANSWER, ("human", "And <image>?"), ANSWER, image="a.png"), "d", 1)
    assert [turn["value"].count("<image>") for turn in sample.turns] == [0, 0, 1, 0]


def test_multi_image_pretrain_and_video() -> None:
    sample = parse_sample(line(("human", "<image>\n<image>\nSame?"), ANSWER, image=["a.png", "b.png"]), "d", 1)
    assert sample.images == ("a.png", "b.png")
    sample = parse_sample(line(("pretrain", "One <image> and <image>."), image=["a.png", "b.png"]), "d", 1)

    sample = parse_sample(line(QUESTION, ANSWER, video="v.gif", clip=[0.5, 2]), "d", 1)
    assert (sample.video, sample.clip) == ("v.gif", (0.5, 2.0))
    assert place_frames(sample.turns, 2)[0]["value"] == "Frame-1: <image>\nFrame-2: <image>\nWhat is this?"


def test_image_placeholder_in_an_answer_is_text() -> None:
    sample = parse_sample(line(QUESTION, ("gpt", "Write <image> there."), image="a.png"), "d", 1)
    assert sample.turns[1]["value"] == "Write <image> there."


def test_grounding_boxes_stay_as_they_are() -> None:
    text = "<ref>the cat</ref><box>[[10, 20, 300, 400], [1, 2, 3, 4]]</box>"
    assert parse_sample(line(QUESTION, ("gpt", text), image="a.png"), "d", 1).turns[1]["value"] == text


@pytest.mark.parametrize(
    ("raw", "reason", "message"),
    [
        ('{"conversations": [', Reason.BROKEN_JSON, "sample 'd/9': the line is not valid JSON"),
        (b'{"conversations": "\xff"}', Reason.BROKEN_JSON, "not valid JSON"),
        ("[1]", Reason.BROKEN_JSON, "JSON list, not an object"),
        (line(("human", "\ud83d"), ANSWER), Reason.BROKEN_JSON, "turn 1 holds half a surrogate pair"),
        ('{"question": "Q", "chosen": "A"}', Reason.OTHER_KIND, "a preference pair, .* with `--kind preference`"),
        ("{}", Reason.CONVERSATION, "'conversations' must be a list of at least one turn"),
        ('{"conversations": []}', Reason.CONVERSATION, "at least one turn"),
        ('{"conversations": ["hi"]}', Reason.CONVERSATION, "turn 1 must be an object"),
        ('{"conversations": [{"from": "human", "value": 3}]}', Reason.CONVERSATION, "turn 1 must be an object"),
        (line(("user", "Hi"), ("assistant", "Ho")), Reason.CONVERSATION, "'from' is 'user', not one of"),
        (line(QUESTION, ("system", "Late."), ANSWER), Reason.CONVERSATION, "system turn comes first"),
        (line(("pretrain", "text"), ANSWER), Reason.CONVERSATION, "stands alone, but there are 2 turns"),
        (line(QUESTION, ANSWER, image=[3]), Reason.CONVERSATION, "'image' must be a path or a list of paths"),
        (line(QUESTION, ANSWER, image="a.png", video="v"), Reason.CONVERSATION, "both 'video' and 'image'"),
        (line(QUESTION, ANSWER, video=["1.png"]), Reason.CONVERSATION, "give single frames as a list in 'image'"),
        (line(QUESTION, ANSWER, video="v", clip=[3, 2]), Reason.CONVERSATION, r"'clip' must be \[start, end\]"),
        (line(QUESTION, ANSWER, image="s3://b/a.png"), Reason.MISSING_IMAGE, "remote address"),
        (line(QUESTION, ANSWER, image=["a", "b"]), Reason.IMAGE_COUNT, "0 <image> placeholders but 2 images"),
        (line(("human", "<image>" * 3), ANSWER, image=["a", "b"]), Reason.IMAGE_COUNT, "3 <image> placeholders but 2"),
        (line(("human", "<image><image>"), ANSWER, image="a"), Reason.IMAGE_COUNT, "2 <image> .* 1 image"),
        (line(("human", "<image>"), ANSWER), Reason.IMAGE_COUNT, "1 <image> placeholder but 0 images"),
        (line(("human", "<video>"), ANSWER), Reason.IMAGE_COUNT, "<video> placeholder but no 'video'"),
        (line(("human", "<video><video>"), ANSWER, video="v"), Reason.IMAGE_COUNT, "one <video> placeholder"),
        (line(QUESTION, ("gpt", "")), Reason.EMPTY_ANSWER, r"turn 2 \(from 'gpt'\) is empty"),
        (line(QUESTION, ANSWER, QUESTION, ("gpt", " \n")), Reason.EMPTY_ANSWER, "turn 4"),
        (line(("pretrain", "")), Reason.EMPTY_ANSWER, "turn 1"),
        (line(QUESTION), Reason.NO_TARGETS, "none of its 1 turns"),
    ],
)
def test_bad_lines_name_sample_and_fault(raw: bytes | str, reason: Reason, message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse_sample(raw, "d", 9)
    assert (caught.value.reason, caught.value.name) == (reason, "d/9")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system", "pretrain", "user"]) | JSON,
        "value": st.sampled_from(["", "<image>", "<video>", "text"]) | JSON,
    },
)
LINE = st.fixed_dictionaries(
    {},
    optional={
        "conversations": st.lists(TURN | JSON, max_size=4) | JSON,
        "image": st.sampled_from(["a.png", ["a", "b"]]) | JSON,
        "video": st.just("v") | JSON,
        "clip": JSON,
        "id": JSON,
    },
)


@given(LINE | JSON)
def test_any_json_gives_a_sample_or_a_sample_error(content: Any) -> None:
    try:
        sample = parse_sample(json.dumps(content), "d", 1)
    except SampleError as error:
        assert error.name == "d/1"
    else:
        asked = sum(turn["value"].count("<image>") for turn in sample.turns if turn["from"] in ("human", "pretrain"))
        assert asked == len(sample.images)


def test_system_prompt_is_added_only_where_none_stands() -> None:
    turns = ({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"})
    assert with_system(turns, None) == turns
    assert with_system(turns, "Short.") == ({"from": "system", "value": "Short."}, *turns)
    own = ({"from": "system", "value": "Own."}, *turns)
    assert with_system(own, "Short.") == own
    plain = ({"from": "pretrain", "value": "text"},)
    assert with_system(plain, "Short.") == plain
