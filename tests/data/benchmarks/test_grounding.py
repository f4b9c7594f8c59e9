"""RefCOCO and ScreenSpot: coordinates of answers and truths, sizes, groups, and what cannot be scored."""

from pathlib import Path
from typing import Any

import pytest

from evovlm.data.benchmarks.registry import score_files

from .answer_files import score, write


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<ref>the cat</ref><box>[[100, 200, 300, 400]]</box>", True),  # thousandths: exactly the truth
        ("[0.1, 0.2, 0.3, 0.4]", True),  # fractions
        ("[[100, 200, 300, 300]]", True),  # exactly one half
        ("[[100, 200, 300, 299]]", False),
        ("[[300, 400, 100, 200]]", False),  # corners in the wrong order
        ("[[40, 20, 120, 40]]", False),  # pixels are not asked for
        ("I see no cat", False),
        ("", False),
    ],
)
def test_refcoco(answer: str, right: bool, tmp_path: Path) -> None:
    """An image of 400 × 100 pixels: height first in ``hw``."""
    row = {"answer": answer, "gt_bbox": [40, 20, 120, 40], "hw": [100, 400]}
    assert score(tmp_path, "refcoco", [row]).score == right
    row = {"answer": answer, "gt_bbox": [40, 20, 120, 40], "height": 100, "width": 400}
    assert score(tmp_path, "refcoco", [row]).score == right


def test_refcoco_without_a_size_compares_as_it_is(tmp_path: Path) -> None:
    rows = [
        {"answer": "[[40, 20, 120, 40]]", "gt_bbox": [40, 20, 120, 40]},
        {"answer": "[[100, 200, 300, 400]]", "gt_bbox": [40, 20, 120, 40]},
        {"answer": "[[1, 2, 3, 4]]", "gt_bbox": [[1, 2, 3, 4]]},
        {"answer": "[[1, 2, 3, 4]]", "bbox": "[1, 2, 3, 4]"},
    ]
    assert [one.score for one in score(tmp_path, "refcoco", rows).judged] == [1, 0, 1, 1]


def test_refcoco_is_the_mean_of_its_splits(tmp_path: Path) -> None:
    right = {"answer": "[[0, 0, 500, 500]]", "gt_bbox": [0, 0, 5, 5], "hw": [10, 10]}
    wrong = {**right, "answer": "?"}
    files = [write(tmp_path / "refcoco_val.json", [right] * 3), write(tmp_path / "refcoco_testA.json", [wrong])]
    assert score_files(files, "refcoco").table == {
        "refcoco_val": {"IoU ≥ 0.5": 1, "num": 3},
        "refcoco_testA": {"IoU ≥ 0.5": 0, "num": 1},
        "overall": {"IoU ≥ 0.5": 0.5, "num": 4},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_bbox": [1, 2, 3]}, "no true box: none of the keys 'gt_bbox', .* holds four numbers"),
        ({"gt_bbox": "none"}, "no true box"),
        ({"gt_bbox": [1, 2, 3, None]}, "no true box"),
        ({"hw": [10]}, "the image's size must be two positive numbers, 'hw' \\[height, width\\]; it is \\[10\\]"),
        ({"hw": [0, 10]}, "the image's size must be two positive numbers"),
    ],
)
def test_bad_rows_of_refcoco(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"answer": "[[0, 0, 500, 500]]", "gt_bbox": [0, 0, 5, 5], "hw": [10, 10]}
    report = score(tmp_path, "refcoco", [good, good | change])
    with pytest.raises(ValueError, match=message):
        raise report.bad[0]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("[[550, 300]]", True),  # thousandths
        ("(0.55, 0.3)", True),  # fractions
        ("<box>[[500, 250, 600, 350]]</box>", True),  # the centre counts
        ("<box>[[0, 0, 600, 350]]</box>", False),  # although it overlaps
        ("<box>[[0, 0, 1, 1]]</box>", False),  # thousandths in a box, whatever the numbers
        ("[[500, 200]]", True),  # a corner
        ("[[499, 300]]", False),
        ("nowhere", False),
    ],
)
def test_screenspot(response: str, right: bool, tmp_path: Path) -> None:
    """An element at x 500 to 600, y 100 to 200 of a screen of 1000 × 500 pixels, given in all ways."""
    ways: list[dict[str, Any]] = [
        {"bbox": [500, 100, 100, 100], "hw": [500, 1000]},
        {"bbox": [500, 100, 100, 100], "img_size": [1000, 500]},
        {"gt_bbox": [500, 100, 600, 200], "hw": [500, 1000]},
        {"gt_bbox": [0.5, 0.2, 0.6, 0.4]},
    ]
    report = score(tmp_path, "screenspot", [{"response": response, **way} for way in ways])
    assert [one.score for one in report.judged] == [right] * 4


def test_screenspot_groups(tmp_path: Path) -> None:
    element = {"bbox": [0, 0, 10, 10], "hw": [100, 100]}
    rows = [
        {"response": "[[50, 50]]", "data_source": "ios", "data_type": "text", **element},
        {"response": "[[50, 50]]", "img_filename": "pc_1.png", "data_type": "icon", **element},
        {"response": "?", "img_filename": "x/web_1.png", "data_source": "shop", "data_type": "icon", **element},
        {"response": "?", "img_filename": "pc_2.png", "data_source": "macos", "data_type": "icon", **element},
    ]
    assert score(tmp_path, "screenspot", rows).table == {
        "mobile text": {"accuracy": 1, "num": 1},
        "desktop icon": {"accuracy": 0.5, "num": 2},
        "web icon": {"accuracy": 0, "num": 1},
        "overall": {"accuracy": 0.5, "num": 4},
    }


def test_pixels_without_a_size(tmp_path: Path) -> None:
    good = {"response": "[[50, 50]]", "bbox": [0, 0, 10, 10], "hw": [100, 100]}
    (error,) = score(tmp_path, "screenspot", [good, {"response": "[[50, 50]]", "bbox": [0, 0, 10, 10]}]).bad
    assert "the true box (0, 0, 10, 10) is in pixels, but the image's size is missing" in error.detail


def test_the_key_that_is_named_holds_the_truth(tmp_path: Path) -> None:
    box = {"answer": "[0.1, 0.1, 0.2, 0.2]", "gt_bbox": [0.1, 0.1, 0.2, 0.2], "mine": [0.5, 0.5, 0.2, 0.2]}
    for benchmark in ("refcoco", "screenspot"):
        assert [score(tmp_path, benchmark, [box], truth_key=key).score for key in (None, "gt_bbox", "mine")] == [
            1,
            1,
            0,
        ]
        without = {key: value for key, value in box.items() if key != "gt_bbox"} | {"mine": [0.1, 0.1, 0.2, 0.2]}
        assert score(tmp_path, benchmark, [without], truth_key="mine").score == 1


@pytest.mark.parametrize(("truth_key", "right"), [(None, False), ("gt_bbox", False), ("bbox", True), ("mine", True)])
def test_a_named_key_of_screenspot_is_read_as_bbox(truth_key: str | None, right: bool, tmp_path: Path) -> None:
    """x, y, width, height; only ``gt_bbox`` holds two corners."""
    boxes = {"gt_bbox": [0, 0, 10, 10], "bbox": [80, 80, 10, 10], "mine": [85, 85, 1, 1]}
    row = {"response": "[[855, 855]]", "hw": [100, 100], **boxes}
    assert score(tmp_path, "screenspot", [row], truth_key=truth_key).score == right


def test_a_row_without_the_named_key_is_bad(tmp_path: Path) -> None:
    row = {"answer": "[[0, 0, 500, 500]]", "gt_bbox": [0, 0, 5, 5], "mine": [0, 0, 5, 5], "hw": [10, 10]}
    rows = [row, {**row, "mine": None}, {**row, "mine": [1, 2]}]
    missing, short = score(tmp_path, "refcoco", rows, truth_key="mine").bad
    assert "no truth: none of the keys 'mine'" in missing.detail
    assert short.detail == "no true box: none of the keys 'mine' holds four numbers"
