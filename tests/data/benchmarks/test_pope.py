"""POPE: precision, recall and F1 by hand; categories count the same however many rows they have."""

from pathlib import Path
from typing import Any

import pytest

from evovlm.data.answers.prompts import PromptStyle

from .answer_files import score


def rows(category: str | None, outcomes: str) -> list[dict[str, Any]]:
    """Rows by outcome: T and t are right (yes, no), F is a wrong yes, f a wrong no."""
    kinds = {"T": ("Yes", "yes"), "t": ("No", "no"), "F": ("Yes, there is.", "no"), "f": ("There is not.", "yes")}
    more = {"category": category} if category else {}
    return [{"text": kinds[kind][0], "label": kinds[kind][1], **more} for kind in outcomes]


def test_one_category(tmp_path: Path) -> None:
    report = score(tmp_path, "pope", rows(None, "TTTtFFf"))
    precision, recall = 3 / 5, 3 / 4
    assert report.table == {
        "overall": {
            "F1": pytest.approx(2 * precision * recall / (precision + recall)),
            "accuracy": pytest.approx(4 / 7),
            "precision": precision,
            "recall": recall,
            "yes ratio": pytest.approx(5 / 7),
            "num": 7,
        }
    }
    assert report.score == report.table["overall"]["F1"]


def test_overall_is_the_mean_of_categories(tmp_path: Path) -> None:
    table = score(tmp_path, "pope", [*rows("random", "TTTT"), *rows("adversarial", "Tf")]).table
    assert table["random"]["F1"] == 1
    assert table["adversarial"]["F1"] == pytest.approx(2 / 3)
    assert table["overall"]["F1"] == pytest.approx((1 + 2 / 3) / 2)
    assert table["overall"]["num"] == 6


def test_no_yes_at_all(tmp_path: Path) -> None:
    """Nothing over nothing is 0, not an error."""
    table = score(tmp_path, "pope", rows(None, "tf")).table
    assert (table["overall"]["precision"], table["overall"]["recall"], table["overall"]["F1"]) == (0, 0, 0)


def test_a_label_that_is_neither(tmp_path: Path) -> None:
    report = score(tmp_path, "pope", [*rows(None, "T"), {"text": "Yes", "label": "maybe"}])
    assert [error.detail for error in report.bad] == ["the truth is 'maybe', neither yes nor no"]


def test_a_reply_without_the_answer_that_was_asked_for_is_no_yes(tmp_path: Path) -> None:
    rows = [
        {"answer": "I think it is hard to tell.", "label": "yes"},
        {"answer": "I think it is hard to tell.", "label": "no"},
        {"answer": "I see one.\nFinal answer: yes", "label": "yes"},
    ]
    marked = score(tmp_path, "pope", rows, style=PromptStyle.EN)
    assert [(one.given, one.score) for one in marked.judged] == [("", 0), ("", 0), ("yes", 1)]
    assert marked.table["overall"]["yes ratio"] == pytest.approx(1 / 3)
    direct = score(tmp_path, "pope", rows)
    assert [one.given for one in direct.judged] == ["yes", "yes", "yes"]  # as published: not "no"
