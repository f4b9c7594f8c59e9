"""MathVista: rows as published, extraction by a judge or by rules, breakdown, bad rows."""

from pathlib import Path
from typing import Any

import pytest

from .answer_files import score

CHOICE = {
    "question_type": "multi_choice",
    "answer_type": "text",
    "precision": None,
    "choices": ["5 cm", "10 cm"],
    "answer": "10 cm",
}
FLOAT = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None, "answer": "1.2"}


def test_as_internvl_writes_it(tmp_path: Path) -> None:
    """An object of problems by pid; metadata gives the groups."""
    metadata = {"task": "geometry problem solving", "skills": ["algebraic reasoning", "geometry reasoning"]}
    problems = {
        "1": {"pid": "1", **CHOICE, "response": "So it is (B).", "metadata": metadata},
        "2": {"pid": "2", **FLOAT, "response": "About 1.249 in all", "metadata": {**metadata, "skills": []}},
        "3": {"pid": "3", **FLOAT, "response": "About 1.26", "metadata": {"task": "figure question answering"}},
    }
    report = score(tmp_path, "mathvista", problems)
    assert [(one.given, one.score) for one in report.judged] == [("10 cm", 1), ("1.2", 1), ("1.3", 0)]
    assert report.table["task: geometry problem solving"] == {"accuracy": 1, "num": 2}
    assert report.table["skills: algebraic reasoning"] == {"accuracy": 1, "num": 1}
    assert report.table["answer_type: float"] == {"accuracy": 0.5, "num": 2}
    assert report.table["overall"] == {"accuracy": pytest.approx(2 / 3), "num": 3}


def test_an_extraction_that_is_there_counts(tmp_path: Path) -> None:
    rows = [
        {**FLOAT, "response": "no number at all", "extraction": "1.2"},
        {**CHOICE, "response": "A", "extraction": "B"},
    ]
    assert score(tmp_path, "mathvista", rows).score == 1


def test_without_a_form_the_truth_gives_it(tmp_path: Path) -> None:
    rows = [{"response": "7 apples", "answer": "7"}, {"response": "b", "answer": "egg", "choices": ["egg", "larva"]}]
    assert [one.score for one in score(tmp_path, "mathvista", rows).judged] == [1, 0]


def test_an_empty_reply_is_wrong(tmp_path: Path) -> None:
    assert score(tmp_path, "mathvista", [{**CHOICE, "response": ""}]).score == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, "question_type is 'multi_choice', but 'choices' holds no list of options"),
        ({"answer_type": "number"}, "answer_type 'number' is none of text, integer, float, list"),
        ({"precision": "two"}, "precision 'two' is no number of digits"),
    ],
)
def test_bad_rows(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (error,) = score(tmp_path, "mathvista", [{**CHOICE, "response": "B"}, {**CHOICE, "response": "A", **change}]).bad
    assert error.detail == message


def test_spaces_around_choices_do_not_count(tmp_path: Path) -> None:
    row = {"question_type": "multi_choice", "choices": ["Yes ", " No"], "precision": float("nan")}
    rows = [{**row, "answer_type": "text", "response": "A", "answer": "Yes "}]
    assert score(tmp_path, "mathvista", rows, answer_key="response", truth_key="answer").score == 1
