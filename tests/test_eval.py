"""eval.py as a person runs it."""
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import free_port

import eval as evaluation
from data import Processor
from eval import Record, summarise, table, unknown_to
from model import load_model
from rewards import Reward
from support import runs
from support.boxes import box_hit
from support.checkpoints import precision_of
from support.mistakes import Mistake
from support.sources import BadRow, Example

ROOT = Path(__file__).resolve().parent.parent


def test_what_was_not_measured_is_a_dash_not_a_zero():
    metrics = summarise([Record("id", "vqa", "", "", 1, False, None, [], [], (0, 0), (0, 0), score=1.0)])
    assert metrics["N-acc"] is None and metrics["gIoU"] is None and metrics["answers"] == 1
    assert "N-acc" not in table({"step 0": metrics})                 # a row that nobody measured is left out
    other = metrics | {"N-acc": 0.5}
    assert [line.split() for line in table({"a": metrics, "b": other}).splitlines() if "N-acc" in line] == [
        ["N-acc", "–", "0.500"]]


def test_an_answer_is_judged_in_the_frame_the_model_saw_and_reported_in_the_pictures_own():
    processor = Processor("assets/tiny")
    example = Example("a", (Image.new("RGB", (100, 50)),), "red ring",
                      json.dumps([{"bbox_2d": [10, 10, 50, 40], "point_2d": [30, 25]}]), "scene_grounding")
    prompt = processor.prompt(example)                          # 100×50 becomes 112×56
    response = f"<answer>{prompt.answer}</answer>"
    judged = evaluation.judge(prompt, response, 5)
    assert prompt.size == (112, 56) and judged.predicted == [{"bbox_2d": [11, 11, 56, 45], "point_2d": [34, 28]}]
    assert box_hit(judged.predicted, judged.truth) and not judged.thinks and judged.error is None
    assert evaluation.original_frame(judged.predicted, prompt)[0]["bbox_2d"] == [10, 10, 50, 40]
    assert evaluation.judge(prompt, "<think>hm</think> <answer>[1]</answer>", 5).error == "not_an_object"


@pytest.mark.parametrize("response, score, error", [
    (r"<think>2+2</think>\boxed{4}", 1.0, None), (r"\boxed{5}", 0.0, None), ("four it is, and no box", 0.0, "no_boxed")])
def test_an_answer_without_a_box_is_unreadable(response, score, error):
    prompt = Processor("assets/tiny").prompt(Example("a", (), "2+2?", "4", "scene_math"))
    judged = evaluation.judge(prompt, response, 5)
    assert (judged.score, judged.error) == (score, error) and evaluation.summarise([judged])["unreadable"] == (error is not None)


@pytest.mark.parametrize("value", [np.bool_(True), np.float32(1), torch.tensor(1.0), True, 1])
def test_a_reward_may_hold_what_numpy_or_torch_computes(monkeypatch, value):
    mine = replace(evaluation.TASKS["vqa"], reward=lambda response, answer: Reward({"accuracy": value}))
    monkeypatch.setitem(evaluation.TASKS, "mine", mine)
    prompt = Processor("assets/tiny").prompt(Example("a", (), "2+2?", "4", "mine"))
    judged = evaluation.judge(prompt, "4", 1)
    assert json.loads(json.dumps(vars(judged)))["score"] == 1.0


def test_an_answer_is_drawn_into_a_file_of_pictures():
    with pytest.raises(Mistake, match="--out answers: with --image the answer is drawn; give a file such as answer.png"):
        evaluation.Options(model="a", image="a.png", out="answers").check()
    for out in ("", "a/b.PNG", "b.jpg"):
        evaluation.Options(model="a", image="a.png", out=out).check()


# ---------------------------------------------------------------------------------------------------------------------
# The command

def run(*flags: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                           "--master-port", str(free_port()), "eval.py", "--model", "assets/tiny", "--max-new-tokens", "8",
                           "--sampling-batch", "2", *flags],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    done = run("--limit", "7", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_the_command_writes_metrics_records_and_a_picture(complete):
    out, printed = complete
    assert "N-acc" in printed and "filled boxes stand in for masks" in printed
    assert "repetition penalty 1.0" in printed
    assert json.loads((out / "metrics.json").read_text())["metrics"]["examples"] == 7
    assert [record["index"] for record in lines(out)] == list(range(7))
    assert Image.open(out / "overlay.png").width > 1000
    assert sorted(p.name for p in out.iterdir()) == [".lock", "metrics.json", "overlay.png", "records.jsonl", "report.html", "settings.json"]
    page = (out / "report.html").read_text()
    assert "<td>T-acc</td>" in page and "<td>max_new_tokens</td>" in page and page.count("data:image/png") == 1


def test_two_ranks_and_interruption_give_the_same(complete, tmp_path):
    """Three examples are there, the line of a fourth was being written; two ranks do the rest."""
    whole = lines(complete[0])
    (tmp_path / "settings.json").write_text((complete[0] / "settings.json").read_text())
    kept = "".join(json.dumps(record) + "\n" for record in (whole[0], whole[5], whole[2]))
    (tmp_path / "records.rank1.jsonl").write_text(kept + json.dumps(whole[3])[:40])
    done = run("--limit", "7", "--out", str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "7 examples, 3 of them done before" in done.stdout
    assert lines(tmp_path) == whole
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((complete[0] / "metrics.json").read_text())


def test_other_settings_do_not_mix(complete):
    done = run("--limit", "7", "--out", str(complete[0]), "--repetition-penalty", "1.05")
    assert done.returncode and "repetition_penalty: 1.0 → 1.05): give another --out" in done.stderr


def evaluate_here(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", "--max-new-tokens", "4", *flags])
    try:
        evaluation.main()
    finally:
        if dist.is_initialized():       # a mistake leaves it so
            dist.destroy_process_group()
    return capsys.readouterr().out


@pytest.fixture
def small(tmp_path, monkeypatch, one_rank):
    """A model folder and three rows of short answers, the last of which only decoding shows to be bad."""
    shutil.copytree(ROOT / "assets/tiny", tmp_path / "model")
    whole = io.BytesIO()
    Image.new("RGB", (56, 56)).save(whole, "JPEG")
    (tmp_path / "good.jpg").write_bytes(whole.getvalue())
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-60])
    monkeypatch.chdir(tmp_path)
    write_rows("1", "2")
    return tmp_path


def write_rows(*answers: str, pictures: tuple[str, ...] = ("good.jpg", "good.jpg", "cut.jpg")) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"image": picture, "ask": "how many?", "truth": answer}) + "\n"
                                       for picture, answer in zip(pictures, (*answers, "3"))))


FLAGS = ("--model", "model", "--data", "a.jsonl", "--task", "vqa", "--columns", "question=ask,answer=truth",
         "--skip-bad-rows")


def test_finished_records_are_kept_only_where_all_that_matters_is_the_same(small, monkeypatch, capsys):
    """Labels, tokens of a picture, chat template, weights and options each begin anew, beside what is there."""
    def again(*flags: str) -> str:
        return evaluate_here(monkeypatch, capsys, *FLAGS, *flags)
    assert "2 rows of" not in (first := again()) and "3 examples, 0 of them done before" in first
    assert "left out: a.jsonl, row 3" in first and "left out: 1 rows" in first
    assert "3 examples, 2 of them done before" in again()
    folder, places = Path("evaluations/model-a.jsonl"), 1

    def begins_anew(what: str, *flags: str) -> None:
        nonlocal places
        places += 1
        printed = again(*flags)
        told = re.search(f"{folder} holds results of another (.*); writing to {folder}-{places}\n", printed)
        assert told and what in told[1].split(" and "), printed
        assert "3 examples, 0 of them done before" in printed
    write_rows("1", "4")
    begins_anew("data")
    settings = json.loads(Path("model/preprocessor_config.json").read_text())
    Path("model/preprocessor_config.json").write_text(json.dumps(settings | {"max_pixels": 784}))
    begins_anew("processor")
    template = Path("model/chat_template.jinja")
    template.write_text(template.read_text().replace("helpful", "patient"))
    begins_anew("processor")
    os.utime("model/model.safetensors", ns=(1, 1))
    begins_anew("model")
    begins_anew("repetition_penalty", "--repetition-penalty", "1.1")
    monkeypatch.setattr(evaluation, "JUDGES", (*evaluation.JUDGES, "support/scenes.py"))
    begins_anew("code of the rewards")
    with pytest.raises(Mistake, match="other settings .repetition_penalty: 1.0 → 1.2.: give another --out, or remove"):
        again("--out", f"{folder}-{places}", "--repetition-penalty", "1.2")
    assert "2 of them done before" in again("--out", f"{folder}-{places}")


@pytest.mark.parametrize("damage", [
    lambda line: line[:40], lambda line: b"", lambda line: b"[1]", lambda line: b"{" * 100_000, lambda line: b"\xff\xfe",
    lambda line: b'{"index": 0}', lambda line: line.replace(b'"index": 0', b'"index": "0"'),
    lambda line: line.replace(b'"length": 2', b'"length": "2"'), lambda line: line.replace(b'"task": "vqa"', b'"task": "x"'),
    lambda line: line.replace(b'"score": 0.0', b'"score": null')])
def test_half_a_record_is_left_out_and_counted(small, monkeypatch, capsys, damage):
    """What it was of is answered once more; what is whole stays."""
    def again(*flags: str) -> str:
        return evaluate_here(monkeypatch, capsys, *FLAGS, *flags)
    again()
    records = Path("evaluations/model-a.jsonl/records.jsonl")
    first, second = records.read_bytes().splitlines()
    assert b'"index": 0' in first and damage(first) != first
    records.rename(records.with_name("records.rank0.jsonl"))
    records.with_name("records.rank0.jsonl").write_bytes(damage(first) + b"\n" + second)
    said = again()
    assert ("1 unreadable line(s) of the evaluation before are left out" in said) == bool(damage(first)), said
    assert "2 examples, 1 of them done before" in said.replace("3 examples", "2 examples"), said
    assert records.read_bytes().splitlines() == [first, second]


@pytest.mark.parametrize("question, sizes, said", [
    ("the leftmost of the two squares", [(112, 112)], None), ("How many red rings are there?", [(112, 112)], None),
    ("a zebra", [(112, 112)], "not the word 'zebra'"), ("red ring", [(640, 480)], "not a picture of 640×480 pixels: what"),
    ("2 Katzen", [(640, 480)], "the word 'Katzen' and a picture of 640×480 pixels"), ("red or blue", [], "not the word 'or'"),
    ("red <image> in <image>", [(112, 112)] * 2, "not several pictures: what"),
    ("red ring", [(112, 112), (9, 7), (5, 7)], "not a picture of 9×7 pixels and several pictures: what")])
def test_what_the_tiny_model_cannot_know(question, sizes, said):
    model = load_model(ROOT / "assets/tiny")
    example = Example("1", tuple(Image.new("RGB", size) for size in sizes), question, "1", "vqa")
    lines = unknown_to(model, example)
    assert [said in line for line in lines] == [True] * bool(said)
    assert unknown_to(model, replace(example, id="photos:test/1")) == []
    model.config = replace(model.config, vocab_size=151_936)
    assert unknown_to(model, example) == []


def test_every_question_of_the_built_in_world_is_known():
    from support import scenes
    for split in scenes.SPLITS:
        for index in range(0, 60, 3):
            question = scenes.make(split, index)["question"]
            if '"' not in question:         # a whole prompt, of pretraining
                assert {word.lower() for word in re.findall("[A-Za-z]+", question)} <= evaluation.WORDS, question


def test_one_evaluation_a_folder_and_damaged_settings(small, monkeypatch, capsys):
    def again(*flags: str) -> str:
        return evaluate_here(monkeypatch, capsys, *FLAGS, *flags)
    again()
    folder = Path("evaluations/model-a.jsonl")
    (folder / "settings.json").write_text("")
    assert "holds results of another evaluation (damaged); writing to evaluations/model-a.jsonl-2" in again()
    with pytest.raises(Mistake, match="settings.json is damaged: give another --out, or remove evaluations/model-a.jsonl"):
        again("--out", str(folder))
    with open("evaluations/model-a.jsonl-2/.lock") as held:        # as another process would
        runs.locks.pop(os.path.abspath(folder.with_name("model-a.jsonl-2")))[0].close()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match="is writing to evaluations/model-a.jsonl-2; wait for it, or end it"):
            again("--out", "evaluations/model-a.jsonl-2")


def test_an_evaluation_that_meets_a_bad_picture_can_be_finished(small, monkeypatch, capsys):
    """It stops with the row's name; with --skip-bad-rows the same command goes on from there."""
    with pytest.raises(BadRow, match="a.jsonl, row 3 .id 3.: the image cannot be read"):
        evaluate_here(monkeypatch, capsys, *FLAGS[:-1], "--sampling-batch", "1")
    assert "3 examples, 2 of them done before" in evaluate_here(monkeypatch, capsys, *FLAGS, "--sampling-batch", "1")


def test_a_photo_lying_on_its_side_is_turned(small, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save("photo.jpg", exif=exif)
    evaluate_here(monkeypatch, capsys, "--model", "model", "--image", "photo.jpg", "--question", "red ring")
    drawn = Image.open("photo.answer.png")           # five times as large, and not as wide as its text
    assert drawn.width == 320 + 16 and drawn.height > 5 * 80 + 20
    assert drawn.getpixel((8 + 5 * 40 - 1, 8 + 5 * 80 - 1)) == (0, 0, 0) and drawn.getpixel((8 + 5 * 40 + 1, 50)) == (255,) * 3


def test_the_precision_is_that_of_the_checkpoint(tmp_path):
    """In another one it is another policy. A folder of no run is scored in float32."""
    assert precision_of(tmp_path) == "float32"
    (tmp_path / "state.json").write_text(json.dumps({"options": {"precision": "bfloat16"}}))
    assert precision_of(tmp_path) == "bfloat16"
