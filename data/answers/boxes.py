"""Boxes and points in answers: intersection over union (RefCOCO), a point inside a box (ScreenSpot).

"<ref>the cat</ref><box>[[120, 40, 480, 310]]</box>"  ──parse_box───► (120, 40, 480, 310)      x1, y1, x2, y2
"<box>(120,40),(480,310)</box>"                       ──parse_box───► (120, 40, 480, 310)
"click [[512, 88]]"                                   ──parse_point─► (512, 88)
a box where a point is asked for                      ──parse_point─► its centre
"""

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Corners x1, y1, x2, y2."""

Point = tuple[float, float]

IOU_THRESHOLD = 0.5
_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_GAP = r"[,\s]\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER}{_GAP}{_NUMBER}(?:{_GAP}|[\])]\s*,?\s*[\[(]){_NUMBER}{_GAP}{_NUMBER}[\])]")
_POINT = re.compile(rf"[\[(]{_NUMBER}{_GAP}{_NUMBER}[\])]")
_ANY_NUMBER = re.compile(r"-?\d+\.?\d*")


def parse_box(text: str) -> Box | None:
    """Find the first box of a text: four numbers in brackets, or two corners in brackets; None without any."""
    found = _BOX.search(text)
    return None if found is None else (float(found[1]), float(found[2]), float(found[3]), float(found[4]))


def parse_point(text: str) -> Point | None:
    """Find the point that a text names.

    In this order: the centre of the first box; the first pair of numbers in brackets; the text's only two numbers, or
    the centre of its only four. None without any.
    """
    box = parse_box(text)
    if box is None and (found := _POINT.search(text)):
        return float(found[1]), float(found[2])
    numbers = [float(number) for number in _ANY_NUMBER.findall(text)]
    if box is None and len(numbers) == 4:
        box = (numbers[0], numbers[1], numbers[2], numbers[3])
    if box is not None:
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def iou(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes, 0 to 1; a box whose corners are in the wrong order is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def inside(point: Point, box: Box) -> bool:
    """Whether a point lies in a box or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def iou_match(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the prediction's box overlaps one of the truths' boxes by half, else 0.

    Official definition (RefCOCO, accuracy or precision at 1): intersection over union of at least 0.5. Both sides are
    in the same coordinates here; ``evovlm.data.benchmarks`` converts where a file holds fractions of 1000 and pixels.
    """
    given = parse_box(prediction)
    boxes = (parse_box(truth) for truth in truths)
    return float(given is not None and any(box is not None and iou(given, box) >= IOU_THRESHOLD for box in boxes))


def point_match(prediction: str, truths: Sequence[str]) -> float:
    """Score 1 if the prediction's point, or the centre of its box, lies in one of the truths' boxes, else 0.

    Official definition (ScreenSpot, click accuracy); edges belong to a box. Both sides are in the same coordinates.
    """
    given = parse_point(prediction)
    boxes = (parse_box(truth) for truth in truths)
    return float(given is not None and any(box is not None and inside(given, box) for box in boxes))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
