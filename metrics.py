"""The paper's metrics (paper.md, section 6), as pure functions of predictions and truths.

Boxes are lists of {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, corners inclusive pixels; masks are bool [height,
width]. Where no segmentation model made masks, the filled boxes stand in for them, and the tables say so.
"""
import statistics
from dataclasses import dataclass

import numpy as np

from rewards import TASKS, iou_matrix


@dataclass
class Record:
    """One evaluated example. Boxes are in the frame the model saw, masks in the picture as it was given."""
    id: str
    task: str
    question: str
    response: str
    length: int                        # tokens
    thinks: bool
    error: str | None                  # why no box could be read
    predicted: list[dict]
    truth: list[dict]
    size: tuple[int, int]              # (width, height) of the frame the model saw
    original_size: tuple[int, int]     # and of the picture
    intersection: int = 0              # pixels of the masks
    union: int = 0
    area: int = 0                      # of the predicted mask
    score: float = 0.0                 # 0 … 1: of boxes whether a point hits, else the task's own metric


def box_mask(items: list[dict], size: tuple[int, int]) -> np.ndarray:
    """The union of the filled boxes, bool [height, width], cut at the picture's border."""
    mask = np.zeros((size[1], size[0]), bool)
    for x1, y1, x2, y2 in (item["bbox_2d"] for item in items):
        x1, y1 = max(0, round(x1)), max(0, round(y1))
        mask[y1:max(y1, round(y2) + 1), x1:max(x1, round(x2) + 1)] = True
    return mask


def intersection_union(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Pixels in both masks, pixels in either."""
    return int((a & b).sum()), int((a | b).sum())


def mask_iou(record: Record) -> float:
    """I/U; 1 if the truth is empty and no box was predicted; 0 if U = 0 otherwise."""
    if not record.truth and not record.predicted:
        return 1.0
    return record.intersection / record.union if record.union else 0.0


def hull(items: list[dict]) -> list[float]:
    """The box around all boxes."""
    boxes = np.array([item["bbox_2d"] for item in items], float)
    return [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]


def box_hit(predicted: list[dict], truth: list[dict]) -> bool:
    """Whether any predicted box, or the union of all, has IoU > 0.5 with the truth box (the box around all true boxes).
    Empty truth: whether nothing was predicted."""
    if not truth or not predicted:
        return not truth and not predicted
    candidates = np.array([item["bbox_2d"] for item in predicted] + [hull(predicted)], float)
    return bool((iou_matrix(candidates, np.array([hull(truth)])) > 0.5).any())


def targets_found(predicted: list[dict], truth: list[dict]) -> int:
    """How many true boxes have a predicted box with IoU > 0.5."""
    if not predicted or not truth:
        return 0
    boxes, true_boxes = (np.array([item["bbox_2d"] for item in items], float) for items in (predicted, truth))
    return int((iou_matrix(boxes, true_boxes) > 0.5).any(0).sum())


def point_hit(points: list, truth: list[dict]) -> bool:
    """Whether any of the points [x, y] lies in any true box, borders included."""
    return any(x1 <= x <= x2 and y1 <= y <= y2 for x, y in points for x1, y1, x2, y2 in (t["bbox_2d"] for t in truth))


def roc_auc(scores: list[float], labels: list[bool]) -> float | None:
    """The chance that a positive scores above a negative, ties counting half; None unless there are both. For scores of
    0 and 1 it is the balanced accuracy.

    >>> roc_auc([1, 0, 1, 0], [True, True, False, False]), roc_auc([3, 1, 2], [True, False, False])
    (0.5, 1.0)
    """
    scores, labels = np.array(scores, float), np.array(labels, bool)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return None
    below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + upto).sum() / (2 * len(positive) * len(negative)))


def mean(values) -> float | None:
    """None where there is nothing to average: the table shows a dash, never a 0 that was not measured."""
    values = list(values)
    return float(statistics.fmean(values)) if values else None


def summarise(records: list[Record]) -> dict[str, float | None]:
    """Every metric of the table. Present and absent: grounding questions with and without a true box."""
    grounding = [r for r in records if TASKS[r.task].boxes]
    present, absent = [r for r in grounding if r.truth], [r for r in grounding if not r.truth]
    others = [r for r in records if not TASKS[r.task].boxes]
    union, targets = sum(r.union for r in grounding), sum(len(r.truth) for r in present)
    anomalous = [bool(r.truth) for r in grounding]
    return {
        "gIoU": mean(map(mask_iou, grounding)),
        "cIoU": sum(r.intersection for r in grounding) / union if union else None,
        "N-acc strict": mean(not r.predicted and r.error is None for r in absent),
        "N-acc official": mean(not r.predicted for r in absent),     # an unreadable answer counts as a rejection
        "T-acc": mean(bool(r.predicted) for r in present),
        "bbox accuracy": mean(box_hit(r.predicted, r.truth) for r in present),
        "targets IoU>0.5": sum(targets_found(r.predicted, r.truth) for r in present) / targets if targets else None,
        "anomaly accuracy": mean((r.area > 0) == bool(r.truth) for r in grounding),
        "ROC-AUC official": roc_auc([float(r.area > 0) for r in grounding], anomalous),
        "ROC-AUC by area": roc_auc([r.area / (r.original_size[0] * r.original_size[1]) for r in grounding], anomalous),
        "GUI accuracy": mean(r.score for r in present),
        "thinks, present": mean(r.thinks for r in present),
        "thinks, absent": mean(r.thinks for r in absent),
        "answers": mean(r.score for r in others),                    # counting and other short answers
        "length": mean(r.length for r in records),
        "examples": len(records),
    }
