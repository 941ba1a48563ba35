"""Metrics by hand."""
import random

import pytest

from metrics import (Record, box_hit, box_mask, hull, intersection_union, mask_iou, point_hit, roc_auc, summarise,
                     targets_found)

SIZE = (20, 10)


def item(*box):
    return {"bbox_2d": list(box), "point_2d": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}


def record(predicted, truth, error=None, task="scene_grounding", score=0.0, thinks=True, length=10):
    """With filled boxes as masks."""
    a, b = box_mask(predicted, SIZE), box_mask(truth, SIZE)
    return Record("id", task, "question", "response", length, thinks, error, predicted, truth, SIZE, SIZE,
                  *intersection_union(a, b), int(a.sum()), score)


def test_box_mask_counts_inclusive_pixels_and_stops_at_the_border():
    assert box_mask([item(2, 3, 4, 3)], SIZE).sum() == 3
    assert box_mask([item(2, 3, 4, 3), item(4, 3, 5, 3)], SIZE).sum() == 4        # a union, not a sum
    assert box_mask([item(18, 8, 50, 50)], SIZE).sum() == 4
    assert box_mask([item(-5, -5, 0, 0)], SIZE).sum() == 1
    assert box_mask([item(5, 5, 3, 3)], SIZE).sum() == 0                          # corners the wrong way round


def test_intersection_over_union():
    a, b = [item(0, 0, 9, 9)], [item(5, 0, 14, 9)]                                # 100 pixels each, 50 shared
    assert intersection_union(box_mask(a, SIZE), box_mask(b, SIZE)) == (50, 150)
    assert mask_iou(record(a, b)) == pytest.approx(1 / 3)
    assert mask_iou(record([], [])) == 1.0
    assert mask_iou(record(a, [])) == 0.0 and mask_iou(record([], a)) == 0.0
    assert mask_iou(record([item(5, 5, 3, 3)], [item(5, 5, 3, 3)])) == 0.0         # nothing drawn: U = 0


def test_box_hit_takes_any_box_or_the_union_of_all():
    truth = [item(0, 0, 9, 9)]
    halves = [item(0, 0, 9, 4), item(0, 5, 9, 9)]                                 # IoU 0.5 each: not > 0.5
    assert not box_hit(halves[:1], truth) and box_hit(halves, truth)
    assert box_hit([item(15, 0, 19, 9), item(0, 0, 9, 8)], truth)
    assert box_hit([], []) and not box_hit(truth, []) and not box_hit([], truth)
    assert hull(halves) == [0, 0, 9, 9]


def test_targets_found_counts_true_boxes():
    truth = [item(0, 0, 4, 4), item(10, 0, 14, 4)]
    assert targets_found([item(0, 0, 4, 4)], truth) == 1
    assert targets_found([item(0, 0, 4, 4)] * 3, truth) == 1
    assert targets_found(truth[::-1], truth) == 2
    assert targets_found([], truth) == 0 and targets_found(truth, []) == 0


def test_summary_by_hand():
    box, other = [item(0, 0, 9, 9)], [item(5, 0, 14, 9)]
    metrics = summarise([
        record(box, box, length=40), record(other, box, thinks=False, length=40),
        record([], box, "no_answer", length=2),
        record([], [], thinks=False, length=8), record([], [], "bad_json"), record(box, []),
        record([], [], task="vqa", score=1.0), record([], [], task="math")])
    assert metrics["gIoU"] == pytest.approx((1 + 1 / 3 + 0 + 1 + 1 + 0) / 6)
    assert metrics["cIoU"] == pytest.approx((100 + 50) / (100 + 150 + 100 + 0 + 0 + 100))
    assert metrics["N-acc strict"] == pytest.approx(1 / 3)       # one valid []; the unreadable answer is no rejection
    assert metrics["N-acc official"] == pytest.approx(2 / 3)     # … but the official script counts it
    assert metrics["T-acc"] == pytest.approx(2 / 3)
    assert metrics["bbox accuracy"] == pytest.approx(1 / 3)
    assert metrics["targets IoU>0.5"] == pytest.approx(1 / 3)
    assert metrics["thinks, present"] == pytest.approx(2 / 3)
    assert metrics["thinks, absent"] == pytest.approx(2 / 3)
    assert metrics["answers"] == pytest.approx(1 / 2)
    assert metrics["length"] == pytest.approx((40 + 40 + 2 + 8 + 10 * 4) / 8)
    assert metrics["examples"] == 8


def test_point_hit_counts_the_border():
    truth = [item(2, 3, 6, 7), item(10, 0, 12, 2)]
    for point, hit in (((2, 3), True), ((6, 7), True), ((4, 5), True), ((6.1, 7), False), ((2, 2.9), False),
                       ((11, 1), True)):
        assert point_hit([[19, 9], list(point)], truth) is hit, point
    assert not point_hit([], truth) and not point_hit([[2, 3]], [])


def test_roc_auc():
    assert roc_auc([0.9, 0.8, 0.3, 0.1], [True, True, False, False]) == 1
    assert roc_auc([0.1, 0.9], [True, False]) == 0
    assert roc_auc([1, 1, 1], [True, False, False]) == 0.5
    assert roc_auc([0.8, 0.4, 0.6, 0.2], [True, True, False, False]) == 0.75   # of 4 pairs one is the wrong way round
    assert roc_auc([1, 2], [True, True]) is None and roc_auc([], []) is None
    rng = random.Random(0)
    for _ in range(200):                                                          # every pair, one by one
        labels = [rng.random() < 0.5 for _ in range(rng.randint(2, 12))]
        scores = [rng.randint(0, 3) for _ in labels]
        pairs = [(s > t) + (s == t) / 2 for s, a in zip(scores, labels) if a for t, b in zip(scores, labels) if not b]
        assert roc_auc(scores, labels) == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_anomalies_by_hand():
    small, large, defect = [item(0, 0, 0, 0)], [item(0, 0, 9, 9)], [item(1, 1, 2, 2)]
    metrics = summarise([record(large, defect), record([], defect), record(small, []), record([], []), record([], [])])
    assert metrics["anomaly accuracy"] == pytest.approx(3 / 5)
    assert metrics["ROC-AUC official"] == pytest.approx((1 / 2 + 2 / 3) / 2)       # the balanced accuracy
    assert metrics["ROC-AUC by area"] == pytest.approx((3 + (0 + 0.5 + 0.5)) / 6)  # large > small > nothing
    outside = summarise([record([item(50, 50, 60, 60)], defect), record([], [])])  # a box without a pixel is no anomaly
    assert outside["anomaly accuracy"] == 0.5


def test_gui_accuracy_is_over_questions_with_a_target():
    box = [item(0, 0, 4, 4)]
    assert summarise([record(box, box, score=1.0), record(box, box), record([], [], score=1.0)])["GUI accuracy"] == 0.5
