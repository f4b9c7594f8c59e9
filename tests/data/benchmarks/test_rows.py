"""Reading answer files: their forms, the keys of answers and truths, and every way in which a row can be bad."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.benchmarks.rows import Row, RowError, read_rows, split_name

from .answer_files import write


def row(content: dict[str, Any], **fields: Any) -> Row:
    return Row("a.json, row 1", content, **fields)


@pytest.mark.parametrize(
    ("content", "answer", "truths"),
    [
        ({"answer": "4", "annotation": ["4", "four"]}, "4", ["4", "four"]),  # InternVL: VQA, ChartQA, DocVQA
        ({"answer": "B", "gt_answers": "B", "data_id": "validation_Art_1"}, "B", ["B"]),  # InternVL: MMMU
        ({"prediction": "B", "answer": "C"}, "B", ["C"]),  # MMBench
        ({"response": "so B", "answer": "C"}, "so B", ["C"]),  # MathVista
        ({"predict": "x", "answers": ["x", "y"]}, "x", ["x", "y"]),  # OCRBench
        ({"prediction": "9", "ground_truth": 10}, "9", ["10"]),  # VSI-Bench
        ({"text": "No", "label": "no"}, "No", ["no"]),  # POPE
        ({"pred_answer": "a", "gt_answers": ["a"]}, "a", ["a"]),
        ({"given": "a", "expected": "b"}, "a", ["b"]),  # what evaluating a run leaves
        ({"answer": 7, "annotation": 7.5}, "7", ["7.5"]),
        ({"answer": ["x"], "annotation": "x"}, "x", ["x"]),
        ({"answer": "", "annotation": "x"}, "", ["x"]),  # an empty answer is an answer
        ({"answer": "a", "answers": [{"answer": "a"}, {"answer": "b"}]}, "a", ["a", "b"]),  # VQA's annotations
    ],
)
def test_keys(content: dict[str, Any], answer: str, truths: list[str]) -> None:
    assert (row(content).answer(), row(content).truths()) == (answer, truths)


def test_keys_by_name() -> None:
    content = {"answer": "a", "annotation": "b", "raw": "c", "right": "d"}
    chosen = row(content, answer_key="raw", truth_key="right")
    assert (chosen.answer(), chosen.truths()) == ("c", ["d"])
    turned = row({"answer": "b", "raw": "a"}, answer_key="raw", truth_key="answer")
    assert (turned.answer(), turned.truths()) == ("a", ["b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotation": "x"}, "no answer of the model: none of the keys 'prediction', 'pred_answer', 'answer'"),
        ({"answer": None, "annotation": "x"}, "no answer of the model"),
        ({"answer": {"a": 1}, "annotation": "x"}, "key 'answer' holds an object instead of the model's answer"),
        ({"answer": True, "annotation": "x"}, "key 'answer' holds true or false"),
        ({"answer": "x"}, "no truth: none of the keys 'annotation', .*; give a file of truths with --annotations"),
        ({"answer": "x", "annotation": []}, "the truth is empty"),
        ({"answer": "x", "annotation": " "}, "the truth is empty"),
        ({"answer": "x", "annotation": ["a", None]}, "the truth holds null"),
        ({"answer": "x", "annotation": [["a"]]}, "the truth holds a list"),
        ({"answer": "x", "annotation": {"a": "b"}}, "the truth holds null"),
    ],
)
def test_bad_rows(content: dict[str, Any], message: str) -> None:
    def read() -> None:
        row(content).answer()
        row(content).truths()

    with pytest.raises(RowError, match=f"a.json, row 1: {message}"):
        read()


def test_an_answer_alone_is_no_truth() -> None:
    """A row that only has "answer" has no truth, even where the answer's key is named."""
    for chosen in (row({"answer": "x"}), row({"answer": "x"}, answer_key="answer")):
        with pytest.raises(RowError, match="no truth"):
            chosen.truths()


def test_annotations_hold_the_truth() -> None:
    joined = row({"answer": "x", "question": "q"}, annotation={"answer": "y", "category": "c"})
    assert (joined.answer(), joined.truths(), joined.text("category")) == ("x", ["y"], "c")


def test_nan_is_no_value() -> None:
    """JSON's NaN, which pandas writes for an empty cell."""
    found = row({"a": math.nan, "b": "x", "c": math.nan}, annotation={"c": "y", "d": math.nan})
    assert (found.get("a", "b"), found.text("c"), found.get("d"), found.text("a")) == ("x", "y", None, None)


ROWS = [{"question_id": 1, "answer": "a"}, {"question_id": 2, "answer": "b"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ROWS),
        ("a.jsonl", ROWS),
        ("a.json", {"data": ROWS}),
        ("a.json", {"annotations": ROWS, "license": "x"}),
        ("a.json", {"1": {"answer": "a"}, "2": {"answer": "b"}}),
        ("a.json", {"1": "a", "2": "b"}),
    ],
)
def test_forms_of_files(tmp_path: Path, name: str, content: Any) -> None:
    rows = list(read_rows(write(tmp_path / name, content)))
    assert all(isinstance(one, Row) for one in rows)
    assert [(one.id, one.content["answer"]) for one in rows if isinstance(one, Row)] == [("1", "a"), ("2", "b")]


def test_json_lines_under_another_name(tmp_path: Path) -> None:
    """POPE's files of labels are JSON lines, but end in .json."""
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(json.dumps(one) for one in ROWS) + "\n")
    assert [one.id for one in read_rows(file) if isinstance(one, Row)] == ["1", "2"]


def test_bad_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"answer": "a"}\n\n{"answer": \n[1]\n{"answer": "b"}\n')
    found = [str(one) if isinstance(one, RowError) else one.content["answer"] for one in read_rows(file)]
    assert found[0] == "a"
    assert found[1].startswith(f"{file}, line 3: broken JSON (Expecting value")
    assert found[2:] == [f"{file}, line 4: a list instead of an object", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "is not JSON"),
        ('{"a": 1}\n{"b": \n', r"if it is JSON lines, its name must end in \.jsonl"),
        ("7", "holds a number, not a list or object of rows"),
        ("[]", "holds no rows"),
        ("{}", "holds no rows"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(file))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no answer file at"):
        list(read_rows(tmp_path / "a.json"))


def test_split_names() -> None:
    assert split_name(Path("out/refcoco+_testA_240501123059.json")) == "refcoco+_testA"
    assert split_name(Path("answers.jsonl")) == "answers"
