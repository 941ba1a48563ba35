"""Geometry of boxes [x1, y1, x2, y2], in items {"bbox_2d": box, "point_2d": [x, y]}. Corners are
inclusive pixels: a box is x2 − x1 + 1 wide, except in `official_box_hit`."""
import json
import math

import numpy as np

# Of boxes in a data set: corners, or a corner and sizes; of the stored picture, or of its sides.
FORMATS, UNITS = ("xyxy", "xywh"), ("pixels", "thousandths")


class Misplaced(ValueError):
    """Tells of a box that is out of order, or not inside its picture."""


def centre(box: list) -> list[float]:
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]


def as_corners(box: list) -> list:
    """Returns a box [x, y, width, height] as [x1, y1, x2, y2]."""
    return [*box[:2], *(round(start + side, 3) for start, side in zip(box, box[2:]))]


def in_pixels(answer: str, units: str, size: tuple[int, int]) -> str:
    """Returns the boxes and points of a label in pixels of its picture of (width, height). Raises
    Misplaced if a box is none or leaves the picture."""
    frame = size if units == "pixels" else (1000, 1000)
    for x1, y1, x2, y2 in (box := item["bbox_2d"] for item in json.loads(answer)):
        if x1 > x2 or y1 > y2:
            raise Misplaced(f"bad label: the box {box} is inverted; it must be [x1, y1, x2, y2] "
                            "with x1 ≤ x2 and y1 ≤ y2")
        if min(x1, y1) < 0 or x2 > frame[0] or y2 > frame[1]:
            raise Misplaced(f"the box {box} leaves the picture of {frame[0]}×{frame[1]} {units}")
    return answer if frame == size else convert_boxes(answer, frame, size, whole=False)


def convert_boxes(answer: str, from_size: tuple[int, int], to_size: tuple[int, int],
                  whole: bool = True) -> str:
    """Returns boxes and points (JSON text) for a picture of to_size instead of from_size, (width,
    height) pixels. Every number becomes ⌊c·to/from + 0.5⌋, at equal sizes too: so the text of y
    does not depend on the picture's size. whole=False: it keeps three decimals.

    >>> box = '[{"bbox_2d": [10, 20.5, 50, 25], "point_2d": [30, 22.4]}]'
    >>> convert_boxes(box, (100, 50), (112, 50))
    '[{"bbox_2d": [11, 21, 56, 25], "point_2d": [34, 22]}]'
    """
    # 0: there is no picture.
    scale = [to / before if before else 1.0 for before, to in zip(from_size, to_size)]

    def scaled(numbers: list) -> list[float]:
        return [math.floor(c * scale[i % 2] + 0.5) if whole else round(c * scale[i % 2], 3)
                for i, c in enumerate(numbers)]
    return json.dumps([{**item, **{key: scaled(item[key]) for key in ("bbox_2d", "point_2d")}}
                       for item in json.loads(answer)])


def corners(items: list[dict]) -> np.ndarray:
    """Returns the boxes of the items, [n, 4]."""
    return np.array([item["bbox_2d"] for item in items], float)


def around(boxes: np.ndarray) -> np.ndarray:
    """Returns the box around all boxes [n, 4]."""
    return np.concatenate((boxes[:, :2].min(0), boxes[:, 2:].max(0)))


def hull(items: list[dict]) -> list[float]:
    """Returns the box around the boxes of all items."""
    return around(corners(items)).tolist()


def box_mask(items: list[dict], size: tuple[int, int]) -> np.ndarray:
    """Returns the union of the filled boxes, bool [height, width], cut at the picture's border."""
    mask = np.zeros((size[1], size[0]), bool)
    for x1, y1, x2, y2 in (item["bbox_2d"] for item in items):
        x1, y1 = max(0, round(x1)), max(0, round(y1))
        mask[y1:max(y1, round(y2) + 1), x1:max(x1, round(x2) + 1)] = True
    return mask


def iou_matrix(a: np.ndarray, b: np.ndarray, pixel: int = 1) -> np.ndarray:
    """Returns the IoU of boxes a [n, 4] and b [m, 4], [n, m]. A box is x2 − x1 + pixel wide."""
    a, b = a[:, None], b[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = np.clip(high - low + pixel, 0, None).prod(-1)
    area_a, area_b = ((each[..., 2:] - each[..., :2] + pixel).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def any_hit(boxes: np.ndarray, truth: np.ndarray, pixel: int) -> bool:
    """Tells whether any box [n, 4], or the box around all, has IoU > 0.5 with the truth [4]."""
    return bool((iou_matrix(np.vstack((boxes, around(boxes))), truth[None], pixel) > 0.5).any())


def box_hit(predicted: list[dict], truth: list[dict]) -> bool:
    """Tells whether any predicted box, or the box around all, has IoU > 0.5 with the box around all
    true boxes. Without a true box: whether nothing was predicted."""
    if not truth or not predicted:
        return not truth and not predicted
    return any_hit(corners(predicted), around(corners(truth)), pixel=1)


def official_box_hit(boxes: list, true_box: list | None) -> bool:
    """Tells what box_hit does as the authors compute it: in the picture's own pixels, and a box is
    x2 − x1 wide."""
    if not boxes or true_box is None:
        return not boxes and true_box is None
    return any_hit(np.array(boxes, float), np.array(true_box, float), pixel=0)


def targets_found(predicted: list[dict], truth: list[dict]) -> int:
    """Returns how many true boxes have a predicted box with IoU > 0.5."""
    if not predicted or not truth:
        return 0
    return int((iou_matrix(corners(predicted), corners(truth)) > 0.5).any(0).sum())


def point_hit(points: list, truth: list[dict]) -> bool:
    """Tells whether any of the points [x, y] lies in any true box, borders included."""
    return any(x1 <= x <= x2 and y1 <= y <= y2
               for x, y in points for x1, y1, x2, y2 in (item["bbox_2d"] for item in truth))
