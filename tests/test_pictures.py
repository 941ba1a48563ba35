"""What a person looks at: sheets of answers, curves, reports, the line of a step."""
import doctest
import json
import math
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_script

import train
from data import Processor
from eval import for_sheet, judge
from support import report, runs
from support.checkpoints import FIRST
from support.curves import figure_of, read_metrics, smooth_line
from support.log import bar_line, progress_line
from support.mistakes import Mistake
from support.pictures import PREDICTED, TRUTH, WRONG, cut, draw_answer, draw_sheet
from support.run import DRAWN_EVERY, Run
from support.runs import read_log, saved_options
from support.sources import Example

ROOT = Path(__file__).resolve().parent.parent


def count(picture: Image.Image, colour) -> int:
    return int((np.array(picture.convert("RGB")) == colour).all(-1).sum())


def cell(answer: str, truth: str, size=(112, 112)):
    example = Example("1", (Image.new("RGB", size, "black"),), "red ring", truth, "scene_grounding")
    prompt = Processor(ROOT / "assets/tiny").prompt(example)
    return judge(prompt, answer, 3), prompt


BOXES = [{"bbox_2d": [10, 10, 60, 60], "point_2d": [30, 30]}, {"bbox_2d": [70, 70, 100, 100], "point_2d": [80, 80]}]


@pytest.mark.parametrize("answer, truth, right", [
    (BOXES, BOXES, True), (BOXES[::-1], BOXES, True), (BOXES[:1], BOXES, False), (BOXES, BOXES[:1], False),
    (BOXES[:1] * 2, BOXES, False), ([], BOXES, False), ([], [], True), (BOXES[:1], [], False), ("no JSON", [], False)])
def test_a_card_is_right_only_if_every_target_is_found(answer, truth, right):
    pair = cell(f"<answer>{answer if isinstance(answer, str) else json.dumps(answer)}</answer>", json.dumps(truth))
    assert for_sheet([pair])[0][3] is right


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


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("sizes", [[(112, 112), (60, 90)], [(90, 60), (600, 90), (90, 200)], [(56, 112)] * 5, [(400, 2)] * 17])
def test_several_pictures_stand_side_by_side(tmp_path, qwen3_folder, family, sizes):
    """Each in its own aspect, in the order of reading, on a card as wide as any other."""
    shades = [(90 + 9 * i, 0, 250 - 9 * i) for i in range(len(sizes))]
    images = tuple(Image.new("RGB", size, shade) for size, shade in zip(sizes, shades))
    prompt = Processor(ROOT / "assets/tiny" if family == "qwen2.5" else qwen3_folder).prompt(
        Example("1", images, "Which is larger?", "it", "vqa"))
    draw_sheet(for_sheet([(judge(prompt, "it", 3), prompt)]), tmp_path / "a.png")
    sheet, places = np.array(Image.open(tmp_path / "a.png")), []
    assert sheet.shape[1] == 336
    for shade, seen in zip(shades, prompt.images):
        ys, xs = np.nonzero((sheet == shade).all(-1))
        width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
        assert len(xs) == width * height and abs(width / height / (seen.width / seen.height) - 1) < 0.25
        assert max(width, height) == 320 // math.ceil(len(sizes) ** 0.5) - 4
        places.append((ys.min(), xs.min()))
    assert places == sorted(places) and len(set(places)) == len(sizes) and min(places)[1] == 8


def test_cut_text_says_so():
    assert cut("a b", 10, 1) == ["a b"] and cut("", 10, 1) == [""]
    assert cut("aaaa bbbb cccc", 5, 2) == ["aaaa", "… ccc"]     # an answer stands behind its thought


def test_an_answer_is_drawn_in_the_photo(tmp_path):
    photo = Image.new("RGB", (200, 100), "white")
    sizes = []
    for items, answer in (([{"bbox_2d": [50, 20, 150, 80], "point_2d": [100, 50]}], "<answer>[{…}]</answer>"),
                          ([], "<answer>[]</answer>"), ([], "")):
        draw_answer(photo, items, "red ring", answer, tmp_path / "a.png")
        drawn = Image.open(tmp_path / "a.png")
        picture, text = drawn.crop((8, 8, 408, 208)), drawn.crop((0, 208, *drawn.size))      # twice as large
        assert drawn.width == 416 and count(text, TRUTH) == 0
        assert (count(picture, PREDICTED) > 0) == bool(items) and count(text, (0, 0, 0)) > 20     # the question
        if items:
            assert picture.getpixel((100, 80)) == PREDICTED == picture.getpixel((200, 100))
        sizes.append(count(text, PREDICTED))
    assert sizes[0] > sizes[1] > sizes[2] > 0                 # the answer, for [] too
    assert photo.size == (200, 100) and photo.getpixel((50, 40)) == (255, 255, 255)


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
    for name, count in (("a", 192), ("b", 64), ("there/a", 8)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval": {"T-acc": 0.5, "gIoU": None}}) + "\n")
        config = {"config": {"eval_data": "scenes:val", "eval_examples": count}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    _, output = run_script(ROOT / "experiments/compare.py", "a", "b", folder=tmp_path)
    assert "steps" not in output and "seconds" not in output          # neither has any
    assert "not the same examples were evaluated: a: the first 192 of scenes:val; b: the first 64" in output
    assert "gIoU" not in output
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "eval": {"T-acc": None, "boxes": 0.25}}) + "\n")
    code, output = run_script(ROOT / "experiments/compare.py", "a", "--out", "compare", folder=tmp_path)
    assert code == 1 and "--out compare: give a picture's file" in output and "Traceback" not in output
    _, output = run_script(ROOT / "experiments/compare.py", "a", "there/a", folder=tmp_path)      # of the same name
    assert "T-acc" not in output.split("there/a")[0] and re.search("T-acc +– +0.500", output)     # no earlier one in its place
    assert output.split()[:2] == ["a", "there/a"] and "a: the first 192 of scenes:val; there/a: the first 8" in output


def test_a_cell_is_as_high_as_its_text(tmp_path):
    heights = []
    for thought in ("", "a long thought about it " * 12):
        draw_sheet(for_sheet([cell(f"<think>{thought}</think><answer>[]</answer>", "[]")]), tmp_path / "a.png")
        picture = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
        heights.append(len(picture))
        assert (picture[-8:-5, 8:-8] == 255).all()      # nothing between the last line and the frame
    assert heights[0] < heights[1]


# --------------------------------------------------------------------------------------------------
# Curves, reports, the bar

def log_of(folder: Path, *lines: dict, **config) -> Path:
    """A run's folder with these lines in metrics.jsonl."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        record = {"config": config, "versions": {"commit": "abc1234"}}
        (folder / "config.json").write_text(json.dumps(record))
    return folder


def steps_shown(axes) -> list[float]:
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks() if low <= tick <= high]


STOPPED = [{"step": 0, "eval": {"N-acc": 0.0, "T-acc": 1.0, "answers": 0.45}},
           *({"step": step, "entropy": 0.0, "tied": 0.0, "smoothed": 0.9} for step in range(1, 29))]


@pytest.mark.parametrize("lines", [STOPPED[:1], STOPPED[1:2], STOPPED[:2], STOPPED])
def test_axes_of_curves_show_whole_steps_and_nothing_negative(tmp_path, lines):
    runs = [log_of(tmp_path / "a", *lines, method="visurf"), log_of(tmp_path / "b", *lines)]
    for shown in (runs[:1], runs):
        figure = figure_of(shown)
        figure.draw_without_rendering()
        for axes in figure.axes:
            last = max(1, lines[-1]["step"])
            assert set(steps_shown(axes)) <= set(range(last + 1)) and len(steps_shown(axes)) > 1
            low, high = axes.get_ylim()
            assert not [tick for tick in axes.get_yticks() if low <= tick <= high and tick < 0]


def test_curves_say_of_which_run_they_are_and_what_is_drawn(tmp_path):
    a = log_of(tmp_path / "a $x_{$", *STOPPED, method="visurf")
    b = log_of(tmp_path / "b", *STOPPED)
    figure = figure_of([a])
    figure.draw_without_rendering()                       # a name is no formula
    assert figure.get_suptitle().replace("\\", "") == "a $x_{$: visurf, commit abc1234"
    assert [axes.get_title() for axes in figure.axes][0] == "evaluations"
    words = " ".join(text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts())
    for said in ("tied: groups in which\nall answers earn the same", "smoothed: groups in which", "N-acc: absent things"):
        assert said in words
    named = [text.get_text() for text in figure_of([a, b]).legends[0].get_texts()]
    assert named[0].endswith(": visurf, commit abc1234") and named[1] == "b"


OLD = [{"step": 0, "eval": {"N-acc strict": 0.25, "bbox accuracy": 0.5, "bbox accuracy official": 0.375,
                            "targets IoU>0.5": 0.625, "length": 30.0}},
       {"step": 1, "lr": 0.1, "r_rollouts": 5.0, "r_y": 6.0, "response_length": 40.0, "rollouts/thinking": 0.75,
        "rollouts/accuracy": 1.5, "y/thinking": 0.0}]


def test_logs_of_earlier_versions_are_read_by_todays_names(tmp_path):
    run = log_of(tmp_path / "old", *OLD, method="visurf")
    lines, damaged = read_log(run)
    assert not damaged and lines[0]["eval"] == {"N-acc": 0.25, "boxes": 0.5, "boxes official": 0.375, "targets": 0.625,
                                                "length": 30.0}
    assert lines[1] == {"step": 1, "lr": 0.1, "r(o)": 5.0, "r(y)": 6.0, "length": 40.0, "o/thinks": 0.75,
                        "o/accuracy": 1.5, "y/thinks": 0.0}
    assert [axes.get_title() for axes in figure_of([run]).axes] == ["evaluations", "rewards", "tokens of a rollout"]
    code, output = run_script(ROOT / "experiments/compare.py", "old", "old", folder=tmp_path)
    assert code == 0 and "N-acc strict" not in output, output
    assert [line.split() for line in output.splitlines() if line.startswith("N-acc ")] == [["N-acc", "0.250"]]
    (run / "config.json").write_text(json.dumps({"config": {"keep_best": "N-acc strict"}}))
    assert saved_options(run) == {"keep_best": "N-acc"} and doctest.testmod(runs).failed == 0


def test_a_report_is_one_page_with_nothing_of_others_in_it_but_text(tmp_path):
    bad = "<script>alert('1')</script>"
    run = log_of(tmp_path / "<b>&a", {"step": 0, "eval": {"T-acc": 0.5, bad: 0.125, "gIoU": None}},
                 {"step": 2, "eval": {"T-acc": 0.75, bad: 0.25}}, method=bad)
    Image.new("RGB", (9, 9)).save(run / "curves.png")
    for step in (0, 2):
        draw_sheet([], run / f"samples/step_{step}.png")
    report.write_run(run, train.Config(data="a\"b\ud800\x1b[2J’" + bad, steps=2))
    page = (run / "report.html").read_text(encoding="ascii")
    assert "<script" not in page and "<b>" not in page and "\x1b" not in page and "http:" not in page
    assert page.count(f"<td>{escape(bad)}</td>") == 1 and escape(f"{run.name}: {bad}, commit abc1234, step 2 of 2") in page
    assert "<td>a&quot;b\\ud800\\x1b[2J&#8217;" + escape(bad) in page
    assert set(re.findall('(?:src|href)="(.{22})', page)) == {"data:image/png;base64,"} and page.count("<img ") == 3
    places = [page.index(part) for part in ("<td>steps</td><td>2</td><td>400</td>", "as by default", "<td>lr</td>",
                                            "Curves</h2>", "answers at step 0", "answers at step 2", "Evaluations</h2>",
                                            "<td>T-acc</td><td>0.500</td><td>0.750</td>", "other metrics")]
    assert places == sorted(places) and "gIoU" not in page


def test_a_report_of_next_to_nothing(tmp_path):
    for name, text in (("empty", ""), ("damaged", "{\n")):
        run = log_of(tmp_path / name)
        (run / "metrics.jsonl").write_text(text)
        report.write_run(run, train.Config())
        assert f"<h1>{name}, step 0 of 400</h1>" in (run / "report.html").read_text()
        assert "Evaluations" not in (run / "report.html").read_text()


def test_what_stands_behind_the_bar():
    line = {"r(o)": 4.346, "sampling_tokens_per_s": 15574.2, "training_tokens_per_s": 10946.0}
    assert bar_line(line, {"N-acc": 0.5238}) == "r(o) 4.35, N-acc 0.524, samples 15,574 tokens/s"
    assert bar_line({"training_tokens_per_s": 10946.0}, {"N-acc": None}) == "trains 10,946 tokens/s"
    assert bar_line({}, {}) == ""


def test_the_bar_begins_after_the_first_evaluation(tmp_path, capsys):
    run = book(tmp_path)
    run.end_evaluation({"N-acc": 0.0})
    assert run.bar.disable and run.bar.total is None
    run.begin_step(0)
    assert (run.bar.total, run.bar.n, run.bar.smoothing) == (400, 0, 0)
    bar = run.bar
    run.begin_step(0)
    assert run.bar is bar
    bar.close()
