"""Metrics by hand, and eval.py as a person runs it."""
import json

import pytest
from PIL import Image

import eval as evaluation
from data import Example, Processor
from eval import Record, box_hit, box_mask, hull, intersection_union, mask_iou, summarise, table, targets_found

SIZE = (20, 10)


def item(*box):
    return {"bbox_2d": list(box), "point_2d": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}


def record(predicted, truth, error=None, task="scene_grounding", correct=False, thinks=True, length=10):
    return Record("id", task, "question", "response", length, thinks, correct, error, predicted, truth, SIZE)


def test_box_mask_counts_inclusive_pixels_and_stops_at_the_border():
    assert box_mask([item(2, 3, 4, 3)], SIZE).sum() == 3
    assert box_mask([item(2, 3, 4, 3), item(4, 3, 5, 3)], SIZE).sum() == 4        # a union, not a sum
    assert box_mask([item(18, 8, 50, 50)], SIZE).sum() == 4
    assert box_mask([item(-5, -5, 0, 0)], SIZE).sum() == 1
    assert box_mask([item(5, 5, 3, 3)], SIZE).sum() == 0                          # corners the wrong way round


def test_intersection_over_union():
    a, b = [item(0, 0, 9, 9)], [item(5, 0, 14, 9)]                                # 100 pixels each, 50 shared
    assert intersection_union(a, b, SIZE) == (50, 150)
    assert mask_iou(a, b, SIZE) == pytest.approx(1 / 3)
    assert mask_iou([], [], SIZE) == 1.0
    assert mask_iou(a, [], SIZE) == 0.0 and mask_iou([], a, SIZE) == 0.0
    assert mask_iou([item(5, 5, 3, 3)], [item(5, 5, 3, 3)], SIZE) == 0.0          # nothing drawn: U = 0


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
        record([], [], task="vqa", correct=True), record([], [], task="math", correct=False)])
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


def test_what_was_not_measured_is_a_dash_not_a_zero():
    metrics = summarise([record([], [], task="vqa", correct=True)])
    assert metrics["N-acc strict"] is None and metrics["gIoU"] is None and metrics["answers"] == 1
    assert [line.split()[-1] for line in table({"step 0": metrics}).splitlines() if "N-acc" in line] == ["–", "–"]


def test_an_answer_is_judged_in_the_frame_the_model_saw_and_reported_in_the_pictures_own():
    processor = Processor("assets/tiny")
    example = Example("a", Image.new("RGB", (100, 50)), "red ring", json.dumps([item(10, 10, 50, 40)]), "grounding")
    prompt = processor.prompt(example)                          # 100×50 becomes 112×56
    response = f"<answer>{prompt.answer}</answer>"
    judged = evaluation.judge(prompt, response, 5)
    assert prompt.size == (112, 56) and judged.predicted == [{"bbox_2d": [11, 11, 56, 45], "point_2d": [34, 28]}]
    assert box_hit(judged.predicted, judged.truth) and not judged.thinks and judged.error is None
    assert evaluation.original_frame(judged, prompt)[0]["bbox_2d"] == [10, 10, 50, 40]
    assert evaluation.judge(prompt, "<think>hm</think> <answer>[1]</answer>", 5).error == "not_an_object"


def test_the_command_writes_metrics_records_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval.py", "--model", "assets/tiny", "--limit", "6", "--max-new-tokens", "8",
                                     "--out", str(tmp_path)])
    evaluation.main()
    assert "N-acc strict" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["examples"] == 6
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 6
    assert Image.open(tmp_path / "overlay.png").width > 1000
