"""MMMU, AI2D and MMBench: options wherever they stand, subjects and disciplines, circular evaluation."""

from pathlib import Path
from typing import Any

import pytest

from evovlm.data.benchmarks.choice import options_of
from evovlm.data.benchmarks.rows import Row

from .answer_files import score


@pytest.mark.parametrize(
    "content",
    [
        {"options": {"A": "a cat", "B": "a dog"}},
        {"options": ["a cat", "a dog"]},
        {"choices": ["A. a cat", "B. a dog"]},
        {"options": "['a cat', 'a dog']"},
        {"A": "a cat", "B": "a dog", "C": None},
        {"question": "What?\nA. a cat\nB. a dog\nAnswer with the letter."},
    ],
)
def test_where_options_stand(content: dict[str, Any]) -> None:
    assert options_of(Row("a, row 1", content)) == {"A": "a cat", "B": "a dog"}


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        {"data_id": "validation_Art_1", "answer": "B", "gt_answers": "B"},
        {"data_id": "validation_Art_Theory_2", "answer": "A", "gt_answers": "B"},
        {"data_id": "validation_Math_3", "answer": "the sum is 12.5", "gt_answers": "['12.50', 'twelve']"},
        {"data_id": "validation_Math_4", "answer": "B", "gt_answers": "12", "question_type": "open"},
        # A truth of one letter, but an open question: the letter is part of a phrase.
        {"data_id": "validation_Math_5", "answer": "it is x here", "gt_answers": "X", "question_type": "open"},
    ]
    report = score(tmp_path, "mmmu", rows)
    assert [one.score for one in report.judged] == [1, 0, 1, 0, 1]
    assert report.table == {
        "discipline: Art and Design": {"accuracy": 0.5, "num": 2},
        "discipline: Science": {"accuracy": pytest.approx(2 / 3), "num": 3},
        "subject: Art": {"accuracy": 1, "num": 1},
        "subject: Art_Theory": {"accuracy": 0, "num": 1},
        "subject: Math": {"accuracy": pytest.approx(2 / 3), "num": 3},
        "overall": {"accuracy": 0.6, "num": 5},  # over questions, not over subjects
    }


def test_mmmu_takes_an_option_by_its_text(tmp_path: Path) -> None:
    row = {"question": "Which?\nA. a tall tower\nB. a low bridge", "gt_answers": "B"}
    report = score(tmp_path, "mmmu", [{**row, "answer": "In the picture there is a low bridge"}])
    assert (report.judged[0].given, report.score) == ("B", 1)


def test_ai2d(tmp_path: Path) -> None:
    rows = [
        {"image": "1.png", "question": "q\nA. egg\nB. larva", "answer": answer, "annotation": "B"}
        for answer in ("B", "(b)", "B. larva", "larva", "A", "egg", "")
    ]
    assert [one.score for one in score(tmp_path, "ai2d", rows).judged] == [1, 1, 1, 1, 0, 0, 0]


def circle(index: int, answers: str, truths: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"index": index + turn * 1_000_000, "prediction": answer, "answer": truth, **more}
        for turn, (answer, truth) in enumerate(zip(answers, truths, strict=True))
    ]


def test_mmbench_counts_a_question_only_if_every_turn_is_right(tmp_path: Path) -> None:
    rows = [
        *circle(1, "ABCD", "ABCD", category="ocr"),
        *circle(2, "ABCA", "ABCD", category="ocr"),
        *circle(3, "C", "C", category="color"),  # asked once
    ]
    report = score(tmp_path, "mmbench", rows)
    assert report.table == {
        "category: ocr": {"accuracy": 0.5, "vanilla": 7 / 8, "num": 2},
        "category: color": {"accuracy": 1, "vanilla": 1, "num": 1},
        "overall": {"accuracy": pytest.approx(2 / 3), "vanilla": pytest.approx(8 / 9), "num": 3},
    }


def test_mmbench_by_g_index(tmp_path: Path) -> None:
    rows = [{"index": i, "g_index": 5, "prediction": p, "answer": "A"} for i, p in ((10, "A"), (11, "B"))]
    assert score(tmp_path, "mmbench", rows).table["overall"] == {"accuracy": 0, "vanilla": 0.5, "num": 1}


def test_mmbench_without_an_index_counts_every_row(tmp_path: Path) -> None:
    rows = [{"prediction": p, "answer": "A"} for p in "AAB"]
    assert score(tmp_path, "mmbench", rows).table["overall"]["num"] == 3


def test_a_bad_row_takes_its_question_with_it(tmp_path: Path) -> None:
    """Three turns of four would be easier than four: such a question does not count, and every row is listed."""
    rows = [*circle(1, "ABC", "ABC"), *circle(2, "AB", "AB")]
    del rows[1]["answer"]
    report = score(tmp_path, "mmbench", rows)
    assert report.table["overall"] == {"accuracy": 1, "vanilla": 1, "num": 1}
    assert [error.where.rpartition(" ")[2] for error in report.bad] == ["2", "1", "3"]
    assert "left out: another answer to the same question cannot be scored" in str(report.bad[1])


def test_mmbench_with_a_broken_index(tmp_path: Path) -> None:
    rows = [{"index": "x", "prediction": "A", "answer": "A"}, {"index": 1, "prediction": "A", "answer": "A"}]
    (error,) = score(tmp_path, "mmbench", rows).bad
    assert error.detail == "index 'x' is no number"


def test_a_true_letter_in_brackets(tmp_path: Path) -> None:
    rows = [{"id": f"validation_Art_{i}", "options": ["a cat", "a dog"], "answer": said} for i, said in enumerate("BA")]
    assert score(tmp_path, "mmmu", [{**row, "annotation": "(B)"} for row in rows]).score == 1 / 2


def test_an_option_that_a_table_has_left_empty_is_none() -> None:
    assert options_of(Row("", {"A": "a cat", "B": "a dog", "C": float("nan")})) == {"A": "a cat", "B": "a dog"}
    assert options_of(Row("", {"options": ["a cat", None, "a dog"]})) == {"A": "a cat", "C": "a dog"}


def test_a_turn_that_failed_and_came_again_keeps_its_question(tmp_path: Path) -> None:
    turn = {"A": "a cat", "B": "a dog", "answer": "A"}
    rows = [{**turn, "index": 1, "prediction": "A"}, {**turn, "index": 1_000_001}]
    other = {**turn, "index": 2, "prediction": "A"}
    assert score(tmp_path, "mmbench", [*rows, other]).table["overall"]["num"] == 1
    again = {**turn, "index": 1_000_001, "prediction": "A"}
    assert score(tmp_path, "mmbench", [*rows, other, again]).table["overall"]["num"] == 2


def test_ai2d_understands_an_options_text_with_a_capital_in_it(tmp_path: Path) -> None:
    options = ["vitamin A", "vitamin D", "vitamin B", "vitamin C"]
    rows = [{"options": options, "answer": answer, "annotation": "B"} for answer in ("vitamin D", "D")]
    judged = score(tmp_path, "ai2d", rows).judged
    assert [(one.given, one.score) for one in judged] == [("vitamin D", 1), ("D", 0)]
