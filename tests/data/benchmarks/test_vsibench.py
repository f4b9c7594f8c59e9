"""VSI-Bench: letters and numbers by type, three directions as one task, the mean over tasks."""

from pathlib import Path

import pytest

from .answer_files import score


def test_tasks_count_the_same(tmp_path: Path) -> None:
    rows = [
        {"question_type": "object_counting", "prediction": "4", "ground_truth": "4"},
        {"question_type": "object_counting", "prediction": "4", "ground_truth": "4"},
        {"question_type": "object_counting", "prediction": "4 chairs", "ground_truth": "4"},
        {"question_type": "room_size_estimation", "prediction": "13", "ground_truth": "10"},
        {"question_type": "object_rel_direction_easy", "prediction": "B. left", "ground_truth": "B"},
        {"question_type": "object_rel_direction_hard", "prediction": "(B)", "ground_truth": "B"},  # officially wrong
        {"question_type": "route_planning", "prediction": "a", "ground_truth": "A"},
    ]
    table = score(tmp_path, "vsibench", rows).table
    assert table["object_counting"] == {"score": 1, "num": 3}
    assert table["room_size_estimation"]["score"] == pytest.approx(0.5)
    assert table["object_rel_direction"] == {"score": 0.5, "num": 2}
    assert table["overall"] == {"score": pytest.approx((1 + 0.5 + 0.5 + 1) / 4), "num": 7}


def test_without_types(tmp_path: Path) -> None:
    """The truth says what was asked for."""
    rows = [{"prediction": "9.3", "ground_truth": "10.0"}, {"prediction": "B", "ground_truth": "B"}]
    assert score(tmp_path, "vsibench", rows).table == {"overall": {"score": pytest.approx(0.95), "num": 2}}


def test_unknown_type(tmp_path: Path) -> None:
    good = {"question_type": "object_counting", "prediction": "4", "ground_truth": "4"}
    (error,) = score(tmp_path, "vsibench", [good, {**good, "question_type": "counting"}]).bad
    assert error.detail.startswith("question_type 'counting' is none of VSI-Bench's: obj_appearance_order, ")
