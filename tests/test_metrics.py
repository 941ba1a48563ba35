"""Metrics by hand, and the authors' against a slow second implementation."""
import json
import random
import re

import pytest
from PIL import Image

from data import Prompt
from eval import Record, intersection_union, judge, mask_iou, official_reading, roc_auc, summarise
from support.boxes import box_hit, box_mask, hull, official_box_hit, point_hit, targets_found
from support.sources import Example

SIZE = (20, 10)


def item(*box):
    return {"bbox_2d": list(box), "point_2d": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}


def record(predicted, truth, error=None, task="scene_grounding", score=0.0, thinks=True, length=10, tail=""):
    """With filled boxes as masks."""
    a, b = box_mask(predicted, SIZE), box_mask(truth, SIZE)
    return Record("id", task, "question", f"<answer></answer>{tail}", length, thinks, error, predicted, truth, SIZE,
                  SIZE, [i["bbox_2d"] for i in predicted], [i["point_2d"] for i in predicted],
                  hull(truth) if truth else None, *intersection_union(a, b), int(a.sum()), score)


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
        record([], [], thinks=False, length=8, tail=" be found.</think>"), record([], [], "bad_json", tail=" \n"),
        record(box, []),
        record([], [], task="vqa", score=1.0), record([], [], task="math")])
    assert metrics["gIoU"] == pytest.approx((1 + 1 / 3 + 0 + 1 + 1 + 0) / 6)
    assert metrics["cIoU"] == pytest.approx((100 + 50) / (100 + 150 + 100 + 0 + 0 + 100))
    assert metrics["N-acc"] == 0        # the one [] goes on after its end; an unreadable answer is no rejection
    assert metrics["N-acc official"] == pytest.approx(2 / 3)     # … but the official script counts it
    assert metrics["T-acc"] == pytest.approx(2 / 3)
    assert metrics["boxes"] == pytest.approx(1 / 3)
    assert metrics["boxes official"] == pytest.approx((1 + 2) / 6)   # and the two empty answers to empty truths
    assert metrics["unreadable"] == pytest.approx(2 / 8)
    assert metrics["targets"] == pytest.approx(1 / 3)
    assert metrics["thinks, present"] == pytest.approx(2 / 3)
    assert metrics["thinks, absent"] == pytest.approx(2 / 3)
    assert metrics["trailing text, absent"] == pytest.approx(1 / 3) and metrics["trailing text, present"] == 0
    assert metrics["answers"] == pytest.approx(1 / 2)
    assert metrics["length"] == pytest.approx((40 + 40 + 2 + 8 + 10 * 4) / 8)
    assert metrics["examples"] == 8
    ended, goes_on = ([record([], [], tail=tail), record(box, box, tail=tail)] for tail in ("", " [1]"))
    for name, of_one in (("N-acc", 1), ("boxes", 1), ("targets", 1), ("N-acc official", 1), ("T-acc", 1)):
        assert summarise(ended)[name] == of_one
        assert summarise(goes_on)[name] == (of_one if name in ("N-acc official", "T-acc") else 0)


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


# ---------------------------------------------------------------------------------------------------------------------
# What the authors' scripts make of an answer (visurf_model.py and the evaluation scripts beside it)

BOX, POINT = '"bbox_2d": [10, 20, 30, 40]', '"point_2d": [20, 30]'


def judged(answer: str, truth: list[dict], seen=(100, 100), original=(200, 50)) -> Record:
    """An answer to a picture of 200×50 pixels that the model saw as 100×100. truth: in the picture's pixels."""
    example = Example("1", (Image.new("RGB", original),), "thing", json.dumps(truth), "grounding")
    in_frame = [{key: [c * s[i % 2] for i, c in enumerate(t[key])] for key in t}
                for t in truth for s in [(seen[0] / original[0], seen[1] / original[1])]]
    return judge(Prompt(example, [], None, None, [], json.dumps(in_frame), [Image.new("RGB", seen)]), answer, 1)


@pytest.mark.parametrize("items, boxes, points", [
    (f"[{{{BOX}, {POINT}}}]", [[20, 10, 60, 20]], [[40, 15]]),
    (f"[{{{BOX}}}]", [[20, 10, 60, 20]], []),                                   # a box without a point is a box
    (f"[{{{BOX}, {POINT}}}, {{{BOX}}}]", [[20, 10, 60, 20]] * 2, []),
    (f"[{{{POINT}}}]", [], []), (f"[{{{BOX}, {POINT}}}, {{{POINT}}}]", [], []),  # an item without a box: nothing at all
    (f"[{{{BOX}, {POINT}}}, 5]", [], []), ("[]", [], []), ("null", [], []), ("7", [], []), ('"x"', [], []),
    ('[{"bbox_2d": [10, 20, 30, 40, 99], "point_2d": [20, 30, 99]}]', [[20, 10, 60, 20]], [[40, 15]]),
    ('[{"bbox_2d": [10, 20, 30], "point_2d": [20, 30]}]', [], []),
    ('[{"bbox_2d": ["1", "2", "3", "4"], "point_2d": [20, 30]}]', [], []),
    ('[{"bbox_2d": [NaN, 2, 3, 4], "point_2d": [20, 30]}]', [], []),
    ('[{"bbox_2d": [1, 2, 3, 1e999], "point_2d": [20, 30]}]', [], []),
    ('[{"bbox_2d": [1.2, 2.3, 3.4, 4.5], "point_2d": [-1, -3]}]', [[2, 1, 7, 2]], [[-1, -1]])])
def test_what_the_authors_scripts_read(items, boxes, points):
    assert official_reading(f"<answer>{items}</answer>", (2.0, 0.5)) == (boxes, points)


def test_a_box_without_a_point_is_no_correct_rejection():
    drawn = judged(f"<answer>[{{{BOX}}}]</answer>", [])
    metrics = summarise([drawn])
    assert drawn.predicted == [] and drawn.error == "no_point_2d"
    assert metrics["N-acc official"] == metrics["gIoU"] == metrics["boxes official"] == 0
    assert metrics["N-acc"] == 0 and metrics["unreadable"] == 1
    gibberish = summarise([judged("red", [])])
    assert gibberish["N-acc official"] == gibberish["gIoU"] == gibberish["unreadable"] == 1


def test_official_box_accuracy_by_hand():
    """Without the +1 on both sides: 10 of 20 pixels are 0.5 (11 of 21 would be more)."""
    assert not official_box_hit([[0, 0, 10, 10]], [0, 0, 20, 10]) and official_box_hit([[0, 0, 11, 10]], [0, 0, 20, 10])
    assert box_hit([item(0, 0, 10, 10)], [item(0, 0, 20, 10)])
    assert official_box_hit([[0, 0, 5, 10], [15, 0, 20, 10]], [0, 0, 20, 10])       # the hull of both
    assert official_box_hit([], None) and not official_box_hit([], [0, 0, 1, 1])
    assert not official_box_hit([[0, 0, 1, 1]], None) and not official_box_hit([[3, 3, 3, 3]], [3, 3, 3, 3])    # 0 / 0


def test_gui_drops_an_answer_in_which_an_item_lacks_its_box_or_point():
    target = [item(30, 10, 50, 20)]                                                # in the picture; the point hits it
    for items, ours, theirs in ((f"[{{{BOX}, {POINT}}}]", 1, 1), (f"[{{{BOX}, {POINT}}}, {{{POINT}}}]", 1, 0),
                                (f"[{{{BOX}}}]", 1, 0), ("[]", 0, 0)):
        metrics = summarise([judged(f"<answer>{items}</answer>", target)])
        assert (metrics["GUI accuracy"], metrics["GUI accuracy official"]) == (ours, theirs), items


def slow_reading(answer: str):
    """Boxes and points in the picture's pixels, x doubled and y halved."""
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", answer, re.DOTALL)
    boxes, points = [], []
    try:
        for entry in json.loads(found.group(1)):
            x1, y1, x2, y2 = (entry["bbox_2d"][i] for i in range(4))
            boxes.append([int(2.0 * x1 + 0.5), int(0.5 * y1 + 0.5), int(2.0 * x2 + 0.5), int(0.5 * y2 + 0.5)])
    except Exception:
        return [], []
    try:
        for entry in json.loads(found.group(1)):
            points.append([int(2.0 * entry["point_2d"][0] + 0.5), int(0.5 * entry["point_2d"][1] + 0.5)])
    except Exception:
        points = []
    return boxes, points


def slow_iou(a, b) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0


def test_official_rows_equal_the_slow_ones():
    rng = random.Random(0)
    odd = (None, "7", [], {}, True, 1e9, -4, 3.5, float("nan"))
    records, hits, rejected, gui = [], [], [], []
    for _ in range(4000):
        truth = [item(*sorted(rng.sample(range(0, 40), 2)), 0, 0) for _ in range(rng.choice((0, 1, 1)))]
        for t in truth:
            x, y = rng.randrange(0, 100, 4), rng.randrange(0, 30, 2)
            t.update(item(x, y, x + rng.randrange(4, 100, 4), y + rng.randrange(2, 20, 2)))
        items = [{"bbox_2d": [c * s + rng.choice((0, 0, 1, -3, 5)) for c, s in zip(t["bbox_2d"], (.5, 2, .5, 2))],
                  "point_2d": [c * s + rng.choice((0, 0, 40)) for c, s in zip(t["point_2d"], (.5, 2))]}
                 for t in truth + truth if rng.random() < 0.7]
        if rng.random() < 0.2:
            items.append({"bbox_2d": [1, 2, 30, 40], "point_2d": [3, 4]})
        if items and rng.random() < 0.4:
            broken = rng.choice(items)
            match rng.randrange(4):
                case 0: del broken[rng.choice(list(broken))]
                case 1: broken[rng.choice(list(broken))][0] = rng.choice(odd)
                case 2: items.append(rng.choice(odd))
                case 3: broken["bbox_2d"] = broken["bbox_2d"][:3]
        answer = rng.choice(("<answer>{}</answer>",) * 5 + ("<answer>{}", "{}", "<answer>{}]</answer>")).format(
            json.dumps(items))
        boxes, points = slow_reading(answer)
        records.append(judged(answer, truth))
        assert (records[-1].official_boxes, records[-1].official_points) == (boxes, points), answer
        if truth:
            target = truth[0]["bbox_2d"]
            around = [[min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes),
                       max(b[3] for b in boxes)]] if boxes else []
            hits.append(any(slow_iou(b, target) > 0.5 for b in boxes + around))
            gui.append(any(target[0] <= x <= target[2] and target[1] <= y <= target[3] for x, y in points))
        else:
            hits.append(not boxes)
            gui.append(False)
            rejected.append(not boxes)
    metrics = summarise(records)
    assert metrics["boxes official"] == pytest.approx(sum(hits) / len(hits))
    assert metrics["GUI accuracy official"] == pytest.approx(sum(gui) / len(gui))
    assert metrics["N-acc official"] == pytest.approx(sum(rejected) / len(rejected))
    assert 0.2 < metrics["boxes official"] < 0.8 and 0.05 < metrics["GUI accuracy official"] < 0.8
    assert metrics["N-acc official"] > metrics["N-acc"] > 0.1
