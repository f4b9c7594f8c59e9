"""Questions are read from conversations and from pairs; what is none comes as its error."""

import json
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.errors import MetaError, SampleError
from evovlm.data.meta import DatasetMeta, load_meta
from evovlm.data.questions import Question, num_questions, parse_question, read_questions


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def dataset(folder: Path, lines: list[str], **settings: Any) -> DatasetMeta:
    (folder / "d.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "meta.json").write_text(json.dumps({"d": {"root": ".", "annotation": "d.jsonl", **settings}}))
    return load_meta(folder / "meta.json").datasets[0]


def test_the_first_exchange_of_a_conversation() -> None:
    line = {"id": 7, "image": "a.png", "conversations": turns("What?", "A cat.", "And now?", "A dog.")}
    question = parse_question(json.dumps(line), "d", 3)
    assert question == Question("d", 3, "7", "<image>\nWhat?", ("a.png",), None, "A cat.", "A cat.")
    assert question.name == "d/3"
    assert question.turns("Why?", None) == ({"from": "human", "value": "Why?"},)
    assert question.turns("Why?", "Look.")[0] == {"from": "system", "value": "Look."}


def test_own_system_turn_wins_and_human_turns_are_joined() -> None:
    start = [{"from": "system", "value": "Read."}, {"from": "human", "value": "<image>"}]
    line = {"image": ["a.png", "b.png"], "conversations": [*start, *turns("What?", "A cat.", "<image> And?", "Two.")]}
    question = parse_question(json.dumps(line), "d", 1)
    assert (question.text, question.system, question.images) == ("<image>\nWhat?", "Read.", ("a.png",))
    assert question.turns("x", "Look.")[0] == {"from": "system", "value": "Read."}


def test_a_preference_pair() -> None:
    line = {"image": "a.png", "question": "What?", "chosen": "It is 4.", "rejected": "5"}
    asked = parse_question(json.dumps(line), "d", 1)
    assert (asked.text, asked.truth, asked.reference) == ("<image>\nWhat?", "It is 4.", "It is 4.")
    assert parse_question(json.dumps(line | {"answer_gt": 4}), "d", 1).truth == "4"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "broken JSON"),
        (json.dumps({"conversations": [{"from": "pretrain", "value": "text"}]}), "conversation"),
        (json.dumps({"conversations": [{"from": "gpt", "value": "hi"}]}), "conversation"),
        (json.dumps({"video": "a.gif", "conversations": turns("What?", "A cat.")}), "video"),
        (json.dumps({"image": "a.png", "conversations": turns("<image> <image>", "A cat.")}), "image count"),
        (json.dumps({"question": "What?", "chosen": "a", "rejected": "a"}), "chosen = rejected"),
    ],
)
def test_lines_that_are_no_questions(line: str, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_question(line, "d", 5)
    assert caught.value.reason == reason
    assert caught.value.name == "d/5"


def test_limit_start_and_ranks(tmp_path: Path) -> None:
    lines = [json.dumps({"conversations": turns(f"q{i}", f"a{i}")}) for i in range(10)]
    lines[4:4] = ["", "  "]  # blank lines have numbers but do not count
    data = dataset(tmp_path, lines)

    def read(**options: int | None) -> list[int]:
        return [q.line for q in read_questions(data, **options) if isinstance(q, Question)]  # type: ignore[arg-type]

    assert read() == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert read(start=3, limit=4) == [4, 7, 8, 9]
    assert [read(start=3, limit=4, rank=rank, size=3) for rank in range(3)] == [[4, 9], [7], [8]]
    assert read(start=8, limit=9) == [11, 12]
    assert read(start=99) == []
    assert (num_questions(data), num_questions(data, start=3, limit=4), num_questions(data, start=99)) == (10, 4, 0)
    half = dataset(tmp_path, lines, repeat_time=0.5)
    assert [q.line for q in read_questions(half, start=3) if isinstance(q, Question)] == [4, 7]


def test_errors_come_in_their_place(tmp_path: Path) -> None:
    good = json.dumps({"conversations": turns("q", "a")})
    found = list(read_questions(dataset(tmp_path, [good, "{", good])))
    assert [type(each) for each in found] == [Question, SampleError, Question]


def test_a_text_corpus_has_no_questions(tmp_path: Path) -> None:
    data = dataset(tmp_path, [])
    corpus = DatasetMeta(**{**vars(data), "format": "megatron"})
    with pytest.raises(MetaError, match="dataset 'd' is a text corpus, which holds no questions"):
        next(read_questions(corpus))
