"""ChartQA's two splits, ANLS, VQA accuracy of ten humans, OCRBench's types and formulas."""

from pathlib import Path

import pytest

from evovlm.data.benchmarks.registry import score_files

from .answer_files import score, write


def test_chartqa_is_the_mean_of_both_splits(tmp_path: Path) -> None:
    """Not the mean of all rows: here three of four rows are right."""
    rows = [
        {"split": "human", "answer": "104", "annotation": "100"},
        {"split": "human", "answer": "95", "annotation": "100"},
        {"split": "human", "answer": "12%", "annotation": "0.12"},
        {"split": "augmented", "answer": "106", "annotation": "100"},
    ]
    assert score(tmp_path, "chartqa", rows).table == {
        "human": {"relaxed accuracy": 1, "num": 3},
        "augmented": {"relaxed accuracy": 0, "num": 1},
        "overall": {"relaxed accuracy": 0.5, "num": 4},
    }


def test_chartqa_splits_by_file(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"chartqa_test_{name}_240501123059.json", [{"answer": answer, "annotation": "Yes"}])
        for name, answer in (("human", "yes"), ("augmented", "no"))
    ]
    table = score_files(files, "chartqa").table
    assert list(table) == ["human", "augmented", "overall"]
    assert table["overall"]["relaxed accuracy"] == 0.5


def test_chartqa_without_splits(tmp_path: Path) -> None:
    rows = [{"answer": a, "annotation": "Yes"} for a in ("Yes", "yes", "no", "maybe")]
    assert score(tmp_path, "chartqa", rows).table == {"overall": {"relaxed accuracy": 0.5, "num": 4}}


def test_anls(tmp_path: Path) -> None:
    rows = [
        {"questionId": 1, "answer": "Hello  World", "annotation": ["x", "hello world"]},
        {"questionId": 2, "answer": "helo", "annotation": ["hello"]},  # one letter of five is missing
        {"questionId": 3, "answer": "ab", "annotation": ["abcdef"]},  # below one half: nothing
    ]
    for name in ("docvqa", "infovqa"):
        assert score(tmp_path, name, rows).table == {"overall": {"ANLS": pytest.approx((1 + 0.8) / 3), "num": 3}}


def test_vqa_accuracy(tmp_path: Path) -> None:
    humans = ["two"] * 2 + ["2 dogs"] * 8
    rows = [
        {"question_id": 1, "answer": "2", "gt_answers": humans},  # 2 of 10: 0.2 · 1/3 + 0.8 · 2/3
        {"question_id": 2, "answer": "2 dogs", "gt_answers": humans},
        {"question_id": 3, "answer": "cat", "gt_answers": humans},
    ]
    for name in ("textvqa", "vqa"):
        report = score(tmp_path, name, rows)
        assert [one.score for one in report.judged] == [pytest.approx(0.6), 1, 0]


def test_ocrbench(tmp_path: Path) -> None:
    regular, formulas = "Regular Text Recognition", "Handwritten Mathematical Expression Recognition"
    rows = [
        {"dataset_name": "IIIT5K", "type": regular, "predict": "It is STOP", "answers": ["stop"]},
        {"dataset_name": "IIIT5K", "type": regular, "predict": "it is x ^ 2", "answers": ["x^2"]},  # spaces count here
        {"dataset_name": "WordArt", "type": "Artistic Text Recognition", "predict": "Go", "answers": "go"},
        {"dataset_name": "HME100k", "type": formulas, "predict": "x ^ 2", "answers": ["x^2"]},
        {"dataset_name": "HME100k", "type": formulas, "predict": "X ^ 2", "answers": ["x^2"]},  # case counts here
    ]
    table = score(tmp_path, "ocrbench", rows).table
    assert table == {
        "Text Recognition": {"num_right": 2, "accuracy": pytest.approx(2 / 3), "num": 3},
        regular: {"num_right": 1, "accuracy": 0.5, "num": 2},
        "Artistic Text Recognition": {"num_right": 1, "accuracy": 1, "num": 1},
        formulas: {"num_right": 1, "accuracy": 0.5, "num": 2},
        "overall": {"num_right": 3, "accuracy": pytest.approx(0.6), "num": 5},
    }
