"""Geometry of boxes [x1, y1, x2, y2]: corners are inclusive pixels, so that a box is x2 − x1 + 1 wide."""
import numpy as np


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the IoU of boxes a [n, 4] and b [m, 4], [n, m]."""
    a, b = a[:, None], b[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = np.clip(high - low + 1, 0, None).prod(-1)
    area_a, area_b = ((each[..., 2:] - each[..., :2] + 1).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
