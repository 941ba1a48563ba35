"""Qwen3-VL from a picture to a trained model; tests/test_model.py and tests/test_rollout.py have its layers and its
sampling."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import TINY
from processes import run_script
from test_train import ROOT, SMALL, lines, run_train
from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

import rewards
from data import Processor, Response, collate, load, pack_group
from eval import for_sheet, judge, original_frame
from model import Qwen3_VL, load_model, random_model
from support.sources import Example, Scenes
from train import Config

BOX = {"bbox_2d": [60, 30, 241, 90], "point_2d": [150, 61]}


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), np.uint8))


def example(width: int, height: int, task: str = "grounding") -> Example:
    return Example("1", (picture(width, height),), "the cup", json.dumps([BOX]), task)


@pytest.mark.parametrize("size", [(112, 112), (300, 100), (64, 417), (33, 31)])
def test_patches_are_those_of_transformers(qwen3_folder, size):
    ours, reference = Processor(qwen3_folder), Qwen2VLImageProcessorPil.from_pretrained(qwen3_folder)
    patches, (gh, gw), resized = ours.patches(picture(*size))
    expected = reference(images=[picture(*size)], return_tensors="pt")
    assert [[1, gh, gw]] == expected["image_grid_thw"].tolist() and resized.size == (16 * gw, 16 * gh)
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size, grid", [((400, 200), (52, 52)), ((840, 840), (52, 52))])
def test_boxes_are_in_thousandths_of_the_picture(qwen3_folder, size, grid):
    """The frame of 840×840 becomes 832×832, a multiple of 32. A label comes back to the pixel."""
    prompt = Processor(qwen3_folder).prompt(example(*size))
    assert prompt.grids == [grid] and prompt.size == prompt.images[0].size == (1000, 1000) and prompt.original_size == size
    [label] = json.loads(prompt.answer)
    scale = [1000 / size[0], 1000 / size[1]] * 2
    assert label["bbox_2d"] == [int(c * s + 0.5) for c, s in zip(BOX["bbox_2d"], scale)]
    assert original_frame([label], prompt) == [BOX]
    record = judge(prompt, f"<answer>{prompt.answer}</answer>", 10)
    assert record.score == 1 and record.truth == [label] and list(record.true_box) == BOX["bbox_2d"]
    assert record.official_boxes[0] == pytest.approx(BOX["bbox_2d"], abs=1)


@pytest.mark.parametrize("order", [("tiny", "qwen3"), ("qwen3", "tiny")])
@pytest.mark.parametrize("task, side", [("grounding", 840), ("scene_grounding", 112)])
def test_the_limits_of_the_reward_are_the_same_shares_of_a_side(qwen3_folder, order, task, side):
    """Off by 9 and by 11 of 840 on each side of a box: within the limit of 10 of 840, and beyond it. So for both
    families in one process, whichever tokenizer was opened last."""
    tasks = dict(rewards.TASKS)
    box, cfg = [side // 4, side // 4, side // 4 * 3, side // 4 * 3], Config()
    label = json.dumps([{"bbox_2d": box, "point_2d": [side // 2] * 2}])
    processors = {name: Processor({"tiny": TINY, "qwen3": qwen3_folder}[name]) for name in order}
    for name, processor in processors.items():
        prompt, frame = processor.prompt(Example("1", (picture(side, side),), "the cup", label, task)), side
        if name == "qwen3":
            frame = 1000
        [true] = json.loads(prompt.answer)
        moved = [json.dumps([true | {"bbox_2d": [c + off * frame / 840 for c in true["bbox_2d"]]}]) for off in (9, 11)]
        y, *rollouts = (f"<answer>{text}</answer>" for text in (prompt.answer, *moved))
        found, r, _ = rewards.reward_group(cfg, task, prompt.answer, y, rollouts, prompt.side, length_y=9,
                                           lengths=[9, 9], truncated=[False] * 2, group=0, step=0, steps=1)
        assert [reward.terms["accuracy"] for reward in found] == [3, 3, 2] and r[1:] == [6, 5]
        assert found[0] == rewards.label_reward(task, y, prompt.answer, side=prompt.side)
        pairs = [(judge(prompt, text, 1), prompt) for text in (y, *rollouts)]
        assert [terms["accuracy"] for _, _, terms, _ in for_sheet(pairs)] == [3, 3, 2]
    assert rewards.TASKS == tasks


def test_a_reward_that_does_not_depend_on_the_frame_is_not_told_of_it(monkeypatch):
    """Nor is one for boxes, of a task of one's own."""
    assert rewards.score("vqa", "a cup", "A cup.", 1000).total == 1
    own = replace(rewards.TASKS["grounding"], side=None,
                  reward=lambda response, answer: rewards.Reward({"accuracy": 0.5}))
    monkeypatch.setitem(rewards.TASKS, "own", own)
    assert rewards.score("own", "[]", "[]", 1000) == rewards.label_reward("own", "[]", "[]") == own.reward("", "")


def test_a_run(qwen3_folder, tmp_path):
    """20 steps of the main job from random weights. The checkpoint opens in transformers, with the same log-probs."""
    small = [*SMALL[:SMALL.index("--eval-data")], "--eval-data", "scenes:val", "--eval-examples", "4", "--eval-every", "10",
             "--cooldown", "0", "--model", "base"]
    random_model(qwen3_folder).save_pretrained(tmp_path / "base")
    code, output = run_train(tmp_path, "--steps", "20", "--name", "whole", small=small)
    assert code == 0 and "picture of 128×128" in output, output
    assert [line["step"] for line in lines(tmp_path / "runs/whole") if "eval" in line] == [0, 10, 20]
    assert (tmp_path / "runs/whole/samples/step_20.png").exists()
    trained = load_model(tmp_path / "runs/whole")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "runs/whole/checkpoints/step_20").eval()
    processor = Processor(tmp_path / "runs/whole")
    several = Example("1", tuple(map(picture, (112, 33, 300), (112, 97, 64))), "a <image>, <image> <image>?", "1", "vqa")
    for asked in (Scenes("test")[0], several):
        row = collate(pack_group(processor.prompt(asked), [Response(processor.encode("<answer>[]</answer>"))]))
        grids = torch.tensor([[1, *grid] for grid in row.grids])
        with torch.no_grad():
            logits = theirs(input_ids=row.tokens, pixel_values=row.patches, image_grid_thw=grids,
                            mm_token_type_ids=(row.tokens == trained.config.image_token_id).int()).logits[0]
            logits[:, trained.banned] = -torch.inf
            at = row.segment[0] > 0
            expected = logits.log_softmax(-1)[row.predictor[0][at], row.tokens[0][at]]
            torch.testing.assert_close(trained(**vars(row))[0][0][at], expected, rtol=1e-4, atol=1e-4)
    assert type(trained) is Qwen3_VL


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_rows_with_none_one_and_three_pictures(qwen3_folder, tmp_path, family):
    """From the file to the report: a dry run, two ranks of which one may have no picture, an evaluation. A limit of one
    token less is told of the row with three."""
    random_model(TINY if family == "qwen2.5" else qwen3_folder).save_pretrained(tmp_path / "base")
    sizes = [(112, 112), (56, 90), (200, 30)]
    for number, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{number}.png")
    asked = [("Which <image> is <image>\n<image>?", ["0.png", "1.png", "2.png"]), ("1+1?", []), ("in <image> it is", ["1.png"])] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"problem": question, "images": names, "solution": "red"}) + "\n"
                                              for question, names in asked))
    processor, source = Processor(tmp_path / "base"), load(str(tmp_path / "a.jsonl"), "vqa")
    longest = max(len(processor.prompt(example).tokens) for example in source) + 12
    flags = ["--model", "base", "--data", "a.jsonl", "--eval-data", "a.jsonl", "--task", "vqa", "--max-row-tokens"]
    code, output = run_train(tmp_path, *flags, str(longest), "--dry-run")
    assert code == 0 and f"longest prompt of 12 read: {longest - 12} tokens" in output, output
    code, output = run_train(tmp_path, *flags, str(longest - 1), "--name", "short")
    assert code == 1 and f"a.jsonl, row 1: its prompt of {longest - 12} tokens, and a response of 12, exceed" in output, output
    code, output = run_train(tmp_path, *flags, str(longest), "--name", "run", "--steps", "3", ranks=2)
    assert code == 0 and re.search("task vqa, (no picture|pictures? of [0-9×, ]+), [0-9]+ tokens", output), output
    report = (tmp_path / "runs/run/report.html").read_text()
    assert report.count("data:image/png") == 3 and (tmp_path / "runs/run/samples/step_3.png").exists()
    code, output = run_script(ROOT / "eval.py", "--model", "runs/run", "--data", "a.jsonl", "--task", "vqa",
                              "--max-new-tokens", "4", "--out", "out", folder=tmp_path)
    assert code == 0, output
    records = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert [record["original_size"] for record in records[:3]] == [[112, 112], [0, 0], [56, 90]]
    assert records[0]["question"] == asked[0][0] and (tmp_path / "out/overlay.png").exists()
