"""Boxes and points: what is read from a text, intersection over union by hand, edges."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.data.answers.boxes import Box, inside, iou, iou_match, parse_box, parse_point, point_match


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<ref>cat</ref><box>[[120, 40, 480, 310]]</box>", (120, 40, 480, 310)),
        ("[0.1, 0.25, .5, 1.0]", (0.1, 0.25, 0.5, 1.0)),
        ("(1,2,3,4)", (1, 2, 3, 4)),
        ("<box>(10,20),(30,40)</box>", (10, 20, 30, 40)),
        ("two: [[1, 2, 3, 4], [5, 6, 7, 8]]", (1, 2, 3, 4)),  # the first counts
        ("[-5 0 10 10]", (-5, 0, 10, 10)),
        ("1, 2, 3, 4", None),  # no brackets
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[a, b, c, d]", None),
        ("", None),
    ],
)
def test_parse_box(text: str, box: Box | None) -> None:
    assert parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("[[512, 88]]", (512, 88)),
        ("click (0.51, 0.09)", (0.51, 0.09)),
        ("<box>[[100, 200, 300, 400]]</box>", (200, 300)),
        ("<box>(100,200),(300,400)</box>", (200, 300)),
        ("pyautogui.click(x=0.5, y=0.25)", (0.5, 0.25)),
        ("0.1 0.2 0.3 0.4", (0.2, pytest.approx(0.3))),
        ("x is 3", None),
        ("1 2 3", None),
        ("", None),
    ],
)
def test_parse_point(text: str, point: tuple[float, float] | None) -> None:
    assert parse_point(text) == point


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # they touch
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),  # corners in the wrong order
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),  # nothing over nothing
    ],
)
def test_iou(a: Box, b: Box, value: float) -> None:
    assert iou(a, b) == pytest.approx(value)


@given(st.lists(st.integers(0, 20), min_size=8, max_size=8))
@settings(deadline=None, derandomize=True)
def test_iou_counts_cells(corners: list[int]) -> None:
    """On integer corners it is the number of shared unit cells over that of all."""
    cells = []
    boxes: list[Box] = []
    for x1, y1, x2, y2 in (corners[:4], corners[4:]):
        cells.append({(x, y) for x in range(x1, x2) for y in range(y1, y2)})
        boxes.append((x1, y1, x2, y2))
    union = cells[0] | cells[1]
    assert iou(*boxes) == pytest.approx(len(cells[0] & cells[1]) / len(union) if union else 0)


def test_edges_belong_to_a_box() -> None:
    assert inside((10, 0), (0, 0, 10, 10))
    assert not inside((10.1, 0), (0, 0, 10, 10))


def test_as_rules() -> None:
    assert iou_match("[[0, 0, 10, 5]]", ["[[0, 0, 10, 10]]"]) == 1  # exactly one half
    assert iou_match("[[0, 0, 10, 4]]", ["[[0, 0, 10, 10]]"]) == 0
    assert iou_match("[[0, 0, 10, 4]]", ["[[9, 9, 10, 10]]", "[0, 0, 10, 4]"]) == 1
    assert iou_match("nothing", ["[[0, 0, 10, 10]]"]) == 0
    assert iou_match("[[0, 0, 10, 10]]", ["no box"]) == 0
    assert point_match("[[5, 5]]", ["[[0, 0, 10, 10]]"]) == 1
    assert point_match("[[11, 5]]", ["[[0, 0, 10, 10]]"]) == 0
    assert point_match("nowhere", ["[[0, 0, 10, 10]]"]) == 0
