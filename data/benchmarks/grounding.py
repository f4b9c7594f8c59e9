"""RefCOCO and ScreenSpot: a box, or a point in one.

RefCOCO     "<box>[[120, 40, 480, 310]]</box>" ── / 1000 · (w, h) ──► pixels ─┬─► IoU ≥ 0.5
            gt_bbox [x1, y1, x2, y2], hw [h, w] ──────────────────────────────┘
ScreenSpot  "[[512, 88]]", "(0.51, 0.09)" ── / 1000 if above 1 ──► fractions ─┬─► point inside
            bbox [x, y, width, height] ── / (w, h) ───────────────────────────┘
"""

import re
from collections.abc import Sequence

from evovlm.data.answers.boxes import IOU_THRESHOLD, Box, Point, inside, iou, parse_box, parse_point
from evovlm.data.benchmarks.report import Judged, Table, means
from evovlm.data.benchmarks.rows import Row, RowError

_UNITS = 1000.0
_PLATFORMS = {
    "mobile": ("mobile", "ios", "android"),
    "desktop": ("desktop", "pc", "windows", "macos"),
    "web": ("web", "gitlab", "shop", "forum", "tool"),
}


def judge_refcoco(row: Row) -> Judged:
    """Judge a row of RefCOCO, RefCOCO+ or RefCOCOg.

    Official definition (as InternVL evaluates): the first box of the answer, in thousandths of the image (in fractions
    if its numbers add up to less than 4), times width and height; right iff its intersection over union with
    ``gt_bbox`` (x1, y1, x2, y2, pixels) is at least 0.5; an answer without a box is wrong. Without ``hw`` (or
    ``height`` and ``width``) both boxes are taken to be in the same coordinates. Group: the file's name, where several
    are scored.

    Raises:
        RowError: No true box, or a size that is none.
    """
    truth = _numbers(row, "gt_bbox", "bbox", "gt_box", "annotation", "truth")
    answer = row.answer()
    box, size = parse_box(answer), _size(row)
    if box is not None and size is not None:
        box = _scaled(box, size, _UNITS if sum(box) >= 4 else 1.0)
    score = float(box is not None and iou(box, truth) >= IOU_THRESHOLD)
    split = row.text("split") or row.split
    return Judged(row.where, _written(box), _written(truth), score, (split,) if split else ())


def judge_screenspot(row: Row) -> Judged:
    """Judge a row of ScreenSpot.

    Official definition: the point of the answer, or the centre of its box, lies in the element's box. An answer is in
    thousandths of the image if it is a ``<box>`` or one of its numbers is above 1, else in fractions. The element is
    ``bbox`` (x, y, width, height, as in ScreenSpot's files) or ``gt_bbox`` (x1, y1, x2, y2), in pixels with ``hw``
    (or ``img_size`` [w, h], or ``height`` and ``width``), or in fractions; a key named by the row's ``truth_key`` is
    read as ``bbox`` is, unless it is ``gt_bbox``. Groups: platform and kind of element, from
    ``data_source`` (or the file's name) and ``data_type``.

    Raises:
        RowError: No true box, or pixels without the image's size.
    """
    if row.truth_key == "gt_bbox" or (row.truth_key is None and row.get("gt_bbox") is not None):
        truth = _numbers(row, "gt_bbox")
    else:
        x, y, width, height = _numbers(row, "bbox", "annotation", "truth")
        truth = (x, y, x + width, y + height)
    size = _size(row)
    if size is not None:
        truth = (truth[0] / size[0], truth[1] / size[1], truth[2] / size[0], truth[3] / size[1])
    elif max(truth) > 1:
        detail = f"the true box ({_written(truth)}) is in pixels, but the image's size is missing: 'hw' [height, width]"
        raise RowError(row.where, detail)
    answer = row.answer()
    point = parse_point(answer)
    if point is not None and ("<box>" in answer or max(point) > 1):
        point = (point[0] / _UNITS, point[1] / _UNITS)
    score = float(point is not None and inside(point, truth))
    return Judged(row.where, _written(point), _written(truth), score, _screen_groups(row))


def table_refcoco(judged: Sequence[Judged]) -> Table:
    """Return the share of boxes that are right; overall it is the mean of the splits, where several are scored."""
    return means(judged, "IoU ≥ 0.5", over_groups=True)


def table_screenspot(judged: Sequence[Judged]) -> Table:
    """Return click accuracy of text and icons on each platform; overall it is the mean of those groups, as quoted."""
    return means(judged, "accuracy", over_groups=True)


def _screen_groups(row: Row) -> tuple[str, ...]:
    group = " ".join(word for word in (_platform(row), row.text("data_type", "ui_type")) if word)
    return (group,) if group else ()


def _platform(row: Row) -> str | None:
    """Find where a screenshot is from: the row says it, the file's name, or the beginning of the image's name."""
    image = (row.text("img_filename", "image") or "").rpartition("/")[2].partition("_")[0]
    for text in (row.text("platform"), row.text("data_source"), row.text("split"), row.split, image):
        words = re.split(r"[\W_]+", (text or "").lower())
        for platform, names in _PLATFORMS.items():
            if any(word in names for word in words):
                return platform
    return None


def _numbers(row: Row, *keys: str) -> Box:
    """Return the true box under the row's ``truth_key``, else under the first of some keys."""
    if row.truth_key is not None:
        keys, value = (row.truth_key,), row.truth()
    else:
        value = row.get(*keys)
    if isinstance(value, str):
        value = parse_box(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if (
        not isinstance(value, list | tuple)
        or len(value) != 4
        or any(isinstance(item, bool) or not isinstance(item, int | float) for item in value)
    ):
        wanted = ", ".join(f"'{key}'" for key in keys)
        raise RowError(row.where, f"no true box: none of the keys {wanted} holds four numbers")
    x1, y1, x2, y2 = (float(item) for item in value)
    return x1, y1, x2, y2


def _size(row: Row) -> Point | None:
    """Return width and height of the image in pixels."""
    if (hw := row.get("hw")) is not None:
        size = hw[::-1] if isinstance(hw, list) else None
    elif (wh := row.get("img_size", "image_size")) is not None:
        size = wh
    elif row.get("height") is not None and row.get("width") is not None:
        size = [row.get("width"), row.get("height")]
    else:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(x, int | float) and x > 0 for x in size):
        raise RowError(row.where, f"the image's size must be two positive numbers, 'hw' [height, width]; it is {size}")
    return float(size[0]), float(size[1])


def _scaled(box: Box, size: Point, units: float) -> Box:
    width, height = size[0] / units, size[1] / units
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _written(numbers: Sequence[float] | None) -> str:
    return "" if numbers is None else ", ".join(f"{number:.4g}" for number in numbers)
