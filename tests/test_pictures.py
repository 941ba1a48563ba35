"""What a person looks at: sheets of answers, curves, the line of a step."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_script

import train
from data import Processor
from eval import for_sheet, judge
from support.checkpoints import FIRST
from support.curves import read_metrics, smooth_line
from support.log import progress_line
from support.mistakes import Mistake
from support.pictures import PREDICTED, TRUTH, WRONG, cut, draw_answer, draw_sheet
from support.run import DRAWN_EVERY, Run
from support.sources import Example

ROOT = Path(__file__).resolve().parent.parent


def count(picture: Image.Image, colour) -> int:
    return int((np.array(picture.convert("RGB")) == colour).all(-1).sum())


def cell(answer: str, truth: str, size=(112, 112)):
    example = Example("1", Image.new("RGB", size, "black"), "red ring", truth, "scene_grounding")
    prompt = Processor(ROOT / "assets/tiny").prompt(example)
    return judge(prompt, answer, 3), prompt


def test_a_sheet_says_right_or_wrong_and_keeps_the_aspect(tmp_path):
    box = [{"bbox_2d": [10, 10, 60, 60], "point_2d": [30, 30]}]
    right, wrong = cell(f"<answer>{json.dumps(box)}</answer>", json.dumps(box)), cell("<answer>[]</answer>", json.dumps(box))
    shown = for_sheet([right, wrong])
    assert [(entry[3], sum(entry[2].values())) for entry in shown] == [(True, 6), (False, 1)]
    sheets = []
    for entry in shown:
        draw_sheet([entry], tmp_path / "a.png")
        sheets.append(Image.open(tmp_path / "a.png").copy())
    assert count(sheets[0], WRONG) == 0 < count(sheets[1], WRONG)         # the frame and the word
    assert count(sheets[0], PREDICTED) > count(sheets[1], PREDICTED) > 0   # a box; the legend and the answer alone
    wide = cell("<answer>[]</answer>", "[]", (224, 56))
    draw_sheet(for_sheet([wide]), tmp_path / "wide.png")
    black = np.array(Image.open(tmp_path / "wide.png").convert("RGB")).sum(-1) == 0
    lines = np.nonzero(black.sum(1) > 300)[0]
    assert black[lines[0]].sum() == 320 and len(lines) == 80               # 4 : 1
    draw_sheet(for_sheet([right] * 5), tmp_path / "five.png")
    assert Image.open(tmp_path / "five.png").width == 4 * sheets[0].width
    draw_sheet([], tmp_path / "none.png")


def test_cut_text_says_so():
    assert cut("a b", 10, 1) == ["a b"] and cut("", 10, 1) == [""]
    assert cut("aaaa bbbb cccc", 5, 2) == ["aaaa", "bbb …"]


def test_an_answer_is_drawn_in_the_photo(tmp_path):
    photo = Image.new("RGB", (200, 100), "white")
    draw_answer(photo, [{"bbox_2d": [50, 20, 150, 80], "point_2d": [100, 50]}], tmp_path / "a.png")
    drawn = Image.open(tmp_path / "a.png")
    assert drawn.size == photo.size and drawn.getpixel((50, 40)) == PREDICTED == drawn.getpixel((100, 50))
    assert drawn.getpixel((30, 30)) == (255, 255, 255) == photo.getpixel((50, 40)) and count(drawn, TRUTH) == 0


def book(folder: Path) -> Run:
    run = Run(train.Config(), 0, 1, torch.device("cpu"), dict(FIRST))
    run.folder = folder
    return run


@pytest.mark.parametrize("lines", [
    [{"step": 1, "loss": 2.0, "logp_y": -9.0}], [{"step": 0, "eval": {"N-acc": 0.5, "gIoU": None}}],
    [{"step": s, "loss": 0.1, "r(o)": s, "advantage_y": 1.0, "seconds": 2.0} for s in (1, 2)]
    + [{"step": 2, "eval": {"T-acc": 0.25}}]])
def test_curves_of_any_run(tmp_path, lines):
    run = tmp_path / "a"
    run.mkdir()
    for line in [*lines, {"step": 3, "eval": {"T-acc": 0.75}}]:
        book(run).log(line)
    assert Image.open(run / "curves.png").width > 300
    assert read_metrics(run)["EVAL T-acc"][1][-1] == 0.75
    code, output = run_script(ROOT / "experiments/compare.py", "a", str(run), folder=tmp_path)
    assert code == 0 and "T-acc" in output and "0.750" in output and (tmp_path / "compare.png").exists(), output


def test_no_run_and_smoothing(tmp_path):
    with pytest.raises(Mistake, match="is no run of train.py"):
        read_metrics(tmp_path)
    assert smooth_line([1, 4, 10, 3], 1) == [1, 5, 17 / 3, 3]        # centred, and the ends as they are


def test_a_step_is_one_line_of_a_terminal():
    extreme = {"step": 12345, "lr": 1e-6, "r(o)": 6.99, "accuracy": 0.99, "o/thinks": 0.99,
               "advantage_y": -2.67, "smoothed": 0.99, "tied": 0.99, "logp_y": -1234.0, "entropy": 11.92,
               "length": 2000.0}
    line = progress_line(extreme)
    assert len(line) <= 120 and "accuracy 0.99  thinks 0.99" in line and "12345" in line, len(line)


def test_a_run_without_evaluations_has_curves_too(tmp_path):
    for step in range(1, DRAWN_EVERY + 1):
        assert not (tmp_path / "curves.png").exists()
        book(tmp_path).log({"step": step, "loss": 0.1, "entropy": 1.0 / step})
    assert Image.open(tmp_path / "curves.png").width > 300


def test_runs_evaluated_on_different_examples_are_not_compared_without_a_word(tmp_path):
    for name, count in (("a", 192), ("b", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval": {"T-acc": 0.5, "gIoU": None}}) + "\n")
        config = {"config": {"eval_data": "scenes:val", "eval_examples": count}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    _, output = run_script(ROOT / "experiments/compare.py", "a", "b", folder=tmp_path)
    assert "not the same examples were evaluated: a: the first 192 of scenes:val; b: the first 64" in output
    assert "gIoU" not in output


def test_a_cell_is_as_high_as_its_text(tmp_path):
    heights = []
    for thought in ("", "a long thought about it " * 12):
        draw_sheet(for_sheet([cell(f"<think>{thought}</think><answer>[]</answer>", "[]")]), tmp_path / "a.png")
        picture = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
        heights.append(len(picture))
        assert (picture[-8:-5, 8:-8] == 255).all()      # nothing between the last line and the frame
    assert heights[0] < heights[1]
