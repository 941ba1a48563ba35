"""Geometry of boxes [x1, y1, x2, y2], in items {"bbox_2d": box, "point_2d": [x, y]}. Corners are
inclusive pixels: a box is x2 − x1 + 1 wide, except in `official_box_hit`."""
import json
import math

import numpy as np


def convert_boxes(answer: str, from_size: tuple[int, int], to_size: tuple[int, int]) -> str:
    """Returns boxes and points (JSON text) for a picture of to_size instead of from_size, (width,
    height) pixels. Every number becomes ⌊c·to/from + 0.5⌋, at equal sizes too: so the text of y
    does not depend on the picture's size.

    >>> box = '[{"bbox_2d": [10, 20.5, 50, 25], "point_2d": [30, 22.4]}]'
    >>> convert_boxes(box, (100, 50), (112, 50))
    '[{"bbox_2d": [11, 21, 56, 25], "point_2d": [34, 22]}]'
    """
    # 0: there is no picture.
    scale = [to / before if before else 1.0 for before, to in zip(from_size, to_size)]

    def scaled(numbers: list) -> list[int]:
        return [math.floor(c * scale[i % 2] + 0.5) for i, c in enumerate(numbers)]
    return json.dumps([{**item, **{key: scaled(item[key]) for key in ("bbox_2d", "point_2d")}}
                       for item in json.loads(answer)])


def check_boxes(answer: str, size: tuple[int, int]) -> None:
    """Raises ValueError if a box of a label leaves its picture of (width, height) pixels."""
    for box in (item["bbox_2d"] for item in json.loads(answer)):
        if min(box) < 0 or max(box[::2]) > size[0] or max(box[1::2]) > size[1]:
            raise ValueError(f"the box {box} leaves the picture of {size[0]}×{size[1]} pixels")


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
