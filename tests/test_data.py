"""data.py against transformers' processor of the same folder, the packing of rows, the files it refuses, and scenes.py,
whose answers are counted again from the pixels."""
import collections
import doctest
import functools
import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from data import Processor, Prompt, Response, Row, collate, load, pack_group
from model import load_model
from rewards import TASKS, label_text, score, user_text
from support import boxes, images, scenes
from support.boxes import convert_boxes
from support.images import open_image, smart_resize
from support.mistakes import Mistake
from support.sources import Example

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
BOX = {"bbox_2d": [10, 15, 50, 30], "point_2d": [30, 22]}


@pytest.fixture(scope="module")
def processor():
    return Processor(TINY)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Every pixel another colour: nothing is as hard to resize alike."""
    return Image.fromarray(np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# The same prompt as transformers

SIZES = [(112, 112), (28, 28), (1, 1), (3, 200), (199, 1), (14, 13), (42, 70), (70, 98), (113, 111)]
SIZES += [(rng.randint(1, 320), rng.randint(1, 320)) for rng in [random.Random(7)] for _ in range(31)]


def copy_tiny(folder: Path) -> None:
    """Everything of the tiny model but its weights."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)


@pytest.mark.parametrize("pixels", [{}, {"min_pixels": 40 * 784, "max_pixels": 60 * 784}], ids=["official", "narrow"])
def test_patches(pixels, tmp_path):
    """`narrow` lets hardly an image keep its size: small ones grow, large ones shrink."""
    copy_tiny(tmp_path)
    settings = json.loads((TINY / "preprocessor_config.json").read_text()) | pixels
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours, reference = Processor(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    counts = set()
    for width, height in SIZES:
        image = noise(width, height)
        expected = reference(images=[image], return_tensors="pt")
        patches, (gh, gw), resized = ours.patches(image)
        assert [[1, gh, gw]] == expected["image_grid_thw"].tolist(), image.size
        assert resized.size == (14 * gw, 14 * gh)
        torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-5)
        counts.add(gh * gw // 4)
    assert len(counts) > 10 and (min(counts) >= 40 if pixels else min(counts) < 10)


def test_the_limits_of_a_picture_as_options(tmp_path):
    """As if they stood in the folder. A saved model has them there, for every reader of it."""
    copy_tiny(tmp_path / "given")
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    limits = {"min_pixels": 40 * 784, "max_pixels": 60 * 784}
    (tmp_path / "given/preprocessor_config.json").write_text(json.dumps(settings | limits))
    ours, given = Processor(TINY, *limits.values()), Processor(tmp_path / "given")
    for width, height in SIZES[:6]:
        for a, b in zip(ours.patches(noise(width, height))[:2], given.patches(noise(width, height))[:2]):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    with pytest.raises(Mistake, match="--min-pixels 9,999,999,999 is more than --max-pixels 12,845,056; where one is not"):
        Processor(TINY, min_pixels=9_999_999_999)
    model = load_model(TINY)
    model.pixels = tuple(limits.values())
    for _ in ("preprocessor_config.json", "processor_config.json"):
        model.save_pretrained(tmp_path / "saved")
        saved = Processor(tmp_path / "saved")
        reference = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "saved")
        assert (saved.min_pixels, saved.max_pixels) == model.pixels
        assert reference(images=[noise(300, 90)], return_tensors="pt")["image_grid_thw"].tolist() == [
            [1, *saved.patches(noise(300, 90))[1]]]
        model.folder = tmp_path / "five"
        copy_tiny(model.folder)
        (model.folder / "preprocessor_config.json").unlink()
        (model.folder / "processor_config.json").write_text(json.dumps({"image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor", "size": {"longest_edge": 99 * 784, "shortest_edge": 784}}}))
        shutil.rmtree(tmp_path / "saved")


def test_a_frame_that_is_shrunk_takes_its_limits_along():
    """A box 6 pixels off is within 10 of an 840×840 frame, and not of one of 420×420."""
    example = Example("1", (Image.new("RGB", (840, 840)),), "cup",
                      '[{"bbox_2d":[100,100,300,300],"point_2d":[200,200]}]', "grounding")
    whole, shrunk = Processor(TINY).prompt(example), Processor(TINY, max_pixels=420 * 420).prompt(example)
    assert (whole.side, shrunk.side, shrunk.size) == (840, 420, (420, 420))
    for prompt, accuracy in ((whole, 3), (shrunk, 2)):
        [item] = json.loads(prompt.answer)
        near = json.dumps([{"bbox_2d": [x + 6 for x in item["bbox_2d"]], "point_2d": item["point_2d"]}])
        reward = score("grounding", f"<answer>{near}</answer>", prompt.answer, prompt.side)
        assert reward.terms["accuracy"] == accuracy


def test_a_picture_of_the_built_in_world_that_is_resized_takes_its_limits_along():
    """A box 1 pixel off is within 1.33 of a frame of 112; in one of 448 that is 4 pixels of 5.33, in one of 56 half a
    pixel of 0.67. 2 pixels off are within none."""
    for pixels, side in (({}, 112), ({"min_pixels": 448 * 448}, 448), ({"max_pixels": 56 * 56}, 56)):
        prompt = Processor(TINY, **pixels).prompt(Example("1", (Image.new("RGB", (112, 112)),), "cup", json.dumps(
            [{"bbox_2d": [20, 20, 80, 80], "point_2d": [50, 50]}]), "scene_grounding"))
        assert prompt.side == side
        [item] = json.loads(prompt.answer)
        for off, accuracy in ((1, 3), (2, 2)):
            near = json.dumps([{"bbox_2d": [x + off * side / 112 for x in item["bbox_2d"]], "point_2d": item["point_2d"]}])
            assert score("scene_grounding", f"<answer>{near}</answer>", prompt.answer, prompt.side).terms["accuracy"] == accuracy


def test_folders_saved_by_transformers_5(tmp_path):
    """They have processor_config.json, the settings of the pictures under image_processor, and no
    preprocessor_config.json. Where both are, the nested one counts, as it does there."""
    copy_tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="neither preprocessor_config.json nor an image_processor"):
        Processor(tmp_path)
    nested = {"do_resize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3,
              "image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "patch_size": 14,
              "size": {"longest_edge": 50 * 784, "shortest_edge": 40 * 784}, "temporal_patch_size": 2}
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": nested, "processor_class": "Qwen2_5_VLProcessor"}))
    for _ in range(2):
        ours, reference = Processor(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
        patches, (gh, gw), _ = ours.patches(noise(300, 90))
        expected = reference(images=[noise(300, 90)], return_tensors="pt")
        assert [[1, gh, gw]] == expected["image_grid_thw"].tolist() and 40 * 4 <= gh * gw <= 50 * 4
        torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-5)
        shutil.copy(TINY / "preprocessor_config.json", tmp_path)
    path.write_text(json.dumps({"image_processor": nested | {"do_normalize": False}}))
    with pytest.raises(ValueError, match="processor_config.json: do_normalize is False"):
        Processor(tmp_path)


@pytest.mark.parametrize("change, reason", [
    ({"min_pixels": "x"}, "min_pixels is 'x'; it must be a whole number above 0"), ({"max_pixels": -1}, "max_pixels is '-1'"),
    ({"max_pixels": 1.5}, "max_pixels is '1.5'"), ({"image_mean": [0.1, 0.2]}, "image_mean is .*; it must be three numbers$"),
    ({"image_std": [0.1, 0, 0.2]}, "image_std is .*; it must be three numbers above 0"), ({"image_std": 0.5}, "image_std is '0.5'"),
    ({"image_mean": [0.1, "x", 0.2]}, "image_mean"), ({"size": 5}, "size is '5', not an object"),
    ({"patch_size": 16}, "patch_size is 16; it must be 14, as in config.json"), ({"patch_size": None}, "patch_size is None"),
    ({"merge_size": 1}, "merge_size is 1; it must be 2, as in config.json"), ({"resample": 2}, "resample is 2; it must be 3$"),
    ({"temporal_patch_size": 1}, "temporal_patch_size is 1; it must be 2, as in config.json"),
    ({"do_convert_rgb": False}, "do_convert_rgb is False; it must be True"), ({"rescale_factor": 1}, "rescale_factor is 1;"),
    ({"min_pixels": 0}, "min_pixels is '0'"), ({"min_pixels": None, "size": {"height": 56}}, "size.shortest_edge is 'None'"),
    ({"max_pixels": None, "size": {"shortest_edge": 56, "longest_edge": "9"}}, "size.longest_edge is '9'")])
def test_picture_settings_that_cannot_be(tmp_path, change, reason):
    copy_tiny(tmp_path)
    settings = json.loads((TINY / "preprocessor_config.json").read_text()) | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {reason}"):
        Processor(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": [1]}')
    with pytest.raises(ValueError, match="processor_config.json: image_processor is '.1.', not an object"):
        Processor(tmp_path)


@pytest.mark.parametrize("field, name", [("patch_size", "patch_size"), ("temporal_patch_size", "temporal_patch_size"),
                                         ("spatial_merge_size", "merge_size")])
def test_missing_picture_settings_must_fit_the_tower(tmp_path, field, name):
    copy_tiny(tmp_path)
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"][field] = 4
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is {14 if name == 'patch_size' else 2}; it must be 4, as in config.json"):
        Processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: 4}))
    patches, (gh, gw), _ = Processor(tmp_path).patches(noise(60, 90))
    reference = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[noise(60, 90)], return_tensors="pt")
    assert [[1, gh, gw]] == reference["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, reference["pixel_values"], rtol=0, atol=1e-5)


def test_missing_picture_settings_are_as_in_transformers(tmp_path):
    copy_tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    ours, reference = Processor(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert (ours.min_pixels, ours.max_pixels) == (reference.size["shortest_edge"], reference.size["longest_edge"])
    expected = reference(images=[noise(60, 90)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.patches(noise(60, 90))[0], expected, rtol=0, atol=1e-5)


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage, reason", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda folder: rename(folder, "<|image_pad|>", "<|picture|>"), "another model: <|image_pad|> is 44. in it, 446"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 7}'), r"ends by 436.*by \(7,\)"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template")])
def test_a_missing_or_foreign_tokenizer(tmp_path, damage, reason):
    copy_tiny(tmp_path)
    Processor(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")) as error:
        Processor(tmp_path)
    assert str(tmp_path) in str(error.value)


TEXT_ONLY = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
QWEN_LIKE = (TINY / "chat_template.jinja").read_text()


@pytest.mark.parametrize("template, reason", [
    (TEXT_ONLY, "makes .* of a question about a picture, without one"),
    ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", "cannot write a question about a picture"),
    (QWEN_LIKE.replace("<|image_pad|>", ""), "without one <|vision_start|><|image_pad|><|vision_end|> and the question"),
    (QWEN_LIKE.replace("<|vision_start|>", ""), "without one"),
    (QWEN_LIKE.replace("{{ part['text'] }}", ""), "without one"),
    (QWEN_LIKE.replace("{% endif %}<|im_end|>", "{% endif %}"), "ends an answer by '', which is not among"),
    (QWEN_LIKE.replace("{% endif %}<|im_end|>", "{% endif %}<|im_start|>"), "ends an answer by '<|im_start|>'"),
    *((QWEN_LIKE.replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}"),
       "opens the thought itself, by .*<think>.* the thinking reward would be 0 .*; take the Instruct model")
      for opening in ("<think>\n", "<think>", "<think>\n\n</think>\n\n", "{{ '<think>' }}", "Well, <think> I")),
    (QWEN_LIKE.replace("{{ part['text'] }}", "{{ part['text'] }} Begin with <think>."), "opens the thought itself"),
    ("{% if %}", "cannot write")])
def test_a_chat_template_that_does_not_fit(tmp_path, template, reason):
    copy_tiny(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")) as error:
        Processor(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_chat_template_may_speak_of_thoughts_before_the_question(tmp_path):
    """In its system prompt, and around the answers of earlier turns."""
    copy_tiny(tmp_path)
    told = QWEN_LIKE.replace("assistant.<", "assistant. Use <think> and </think>.<").replace(
        "{{ part['text'] }}", "{% if message['role'] == 'assistant' %}<think>\n\n</think>{% endif %}{{ part['text'] }}")
    (tmp_path / "chat_template.jinja").write_text(told)
    assert "<think> and </think>" in Processor(tmp_path).chat(Example("x", (), "A question", "1", "vqa"), 1)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("order", [(436, 434), (434, 436)])
def test_y_ends_as_the_chat_template_ends_a_turn(tmp_path, end, order):
    """Whatever the order of the tokens that end a response."""
    copy_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": order}))
    (tmp_path / "chat_template.jinja").write_text(QWEN_LIKE.replace("{% endif %}<|im_end|>", "{% endif %}" + end))
    processor = Processor(tmp_path)
    assert processor.encode("5")[-1] == processor.tokenizer.convert_tokens_to_ids(end)
    assert processor.decode(processor.encode("5")) == "5"


@pytest.mark.parametrize("limits", [(3136, 12845056), (784, 784 * 16), (256 * 784, 1280 * 784), (100000, 100001)])
def test_smart_resize(limits):
    reference = sys.modules[Qwen2VLImageProcessorPil.__module__].smart_resize
    rng = random.Random(0)
    refused = 0
    sizes = [tuple(int(np.exp(rng.uniform(0, 8.7))) for _ in "hw") for _ in range(3000)]
    for height, width in [*sizes, (10, 2000), (2000, 10), (10, 2001), (2001, 10), (14, 42), (42, 70), (70, 98), (1, 1)]:
        try:
            expected = reference(height, width, 28, *limits)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=f"{width}×{height} pixels"):
                smart_resize(height, width, 28, *limits)
        else:
            assert smart_resize(height, width, 28, *limits) == expected, (height, width)
    assert 10 < refused < 1500


# Parts: a text, or the size of a picture. Without <image> in the question all pictures come first.
CONVERSATIONS = [
    ("vqa", "How many red rings are there?", [(150, 90), "How many red rings are there?"]),
    ("vqa", "Describe  the image.\n", [(40, 300), "Describe  the image.\n"]),
    ("scene_grounding", "Red Ring.", [(112, 112), user_text("scene_grounding", "Red Ring.")]),
    ("math", "1+1? Answer in \\boxed{}.", [user_text("math", "1+1? Answer in \\boxed{}.")]),
    ("grounding", "the café {left}", [(57, 200), user_text("grounding", "the café {left}")]),
    ("vqa", "<think> 漢字 é e\u0301 </answer>", [(28, 28), "<think> 漢字 é e\u0301 </answer>"]),
    ("vqa", "In <image> it is red", ["In ", (150, 90), " it is red"]),
    ("vqa", "Which is larger?", [(150, 90), (28, 28), (40, 300), "Which is larger?"]),
    ("vqa", "<image>\nIs it in<image><image> or <image>", [
        (300, 20), "\nIs it in", (28, 28), (28, 28), " or ", (90, 150)]),
    ("math", "<image>Is <image> X?", [(60, 60), "is ", (28, 90), " x?" + user_text("math", "")])]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("task, question, parts", CONVERSATIONS)
def test_prompt_tokens(processor, qwen3_folder, family, task, question, parts):
    """transformers' AutoProcessor wants torchvision; so tokenizer and image processor, joined by hand."""
    folder = TINY if family == "qwen2.5" else qwen3_folder
    processor = processor if family == "qwen2.5" else Processor(qwen3_folder)
    answer = json.dumps([BOX]) if "grounding" in task else "1"
    images = [noise(*part, seed) for seed, part in enumerate(parts) if isinstance(part, tuple)]
    prompt = processor.prompt(Example("x", tuple(images), question, answer, task))
    if frame := TASKS[task].frame:
        images = [image.resize(frame, Image.Resampling.BILINEAR) for image in images]
    tokenizer, counts = AutoTokenizer.from_pretrained(folder), []
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    if images:
        reference = Qwen2VLImageProcessorPil.from_pretrained(folder)
        expected = reference(images=images, return_tensors="pt")
        grids = expected["image_grid_thw"]
        assert [[1, *grid] for grid in prompt.grids] == grids.tolist()
        torch.testing.assert_close(prompt.patches, expected["pixel_values"], rtol=0, atol=1e-5)
        counts = (grids.prod(1) // reference.merge_size ** 2).tolist()
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    for count in counts:
        text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
    expected = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]
    assert prompt.tokens == expected
    assert prompt.tokens.count(processor.config.image_token_id) == sum(counts) == len(prompt.patches) // 4
    assert prompt.position.shape == (3, len(prompt.tokens))
    longer_sides = sum(max(grid) // 2 for grid in prompt.grids)  # in image tokens: so many ids does an image take
    assert prompt.next_position == len(prompt.tokens) - sum(counts) + longer_sides


@pytest.mark.parametrize("question, written", [("Hello?", "{}{}Hello?"), ("A <image> or <image>?", "A {} or {}?")])
def test_prompt_has_the_chat_of_the_paper(processor, question, written):
    """Section 7 of paper.md, to the letter."""
    prompt = processor.prompt(Example("x", (noise(56, 56), noise(56, 84)), question, "1", "vqa"))
    seen = ("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in (4, 6))
    assert processor.tokenizer.decode(prompt.tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + written.format(*seen)
        + "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("task, size", [("vqa", (56, 84)), ("scene_grounding", (112, 112)), ("math", None)])
def test_a_system_turn_is_in_the_prompt(family, task, size, qwen3_folder):
    """As apply_chat_template writes it, in the place of the template's own; and it counts for --max-row-tokens."""
    folder = qwen3_folder if family == "qwen3" else TINY
    processor, tokenizer = Processor(folder), AutoTokenizer.from_pretrained(folder)
    answer, system = json.dumps([BOX]) if task == "scene_grounding" else "1", "Be short. Say {question}, é."
    sizes = [size] * bool(size)
    example = Example("x", tuple(noise(*size) for size in sizes), "the cup", answer, task)
    told = replace(example, system=system)
    plain, prompt = processor.prompt(example), processor.prompt(told)
    count = prompt.tokens.count(processor.config.image_token_id)
    content = [{"type": "image"}] * bool(size) + [{"type": "text", "text": user_text(task, "the cup")}]
    text = tokenizer.apply_chat_template([{"role": "system", "content": system}, {"role": "user", "content": content}],
                                         tokenize=False, add_generation_prompt=True)
    assert prompt.tokens == tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count))["input_ids"]
    assert "You are a helpful assistant." in processor.decode(plain.tokens)
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n") and "helpful" not in text
    y = processor.encode(label_text(task, prompt.answer, "spaced"))
    most = len(prompt.tokens) + len(y)
    assert len(prompt.tokens) > len(plain.tokens)
    processor.check_label(told, sizes, "spaced", 1, most)
    with pytest.raises(ValueError, match=f"its prompt of {len(prompt.tokens)} tokens, .* exceed --max-row-tokens {most - 1}"):
        processor.check_label(told, sizes, "spaced", 1, most - 1)


def test_a_chat_template_without_a_system_turn(tmp_path):
    copy_tiny(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(QWEN_LIKE.replace("{% for message in messages %}", "{% for message in messages[-1:] %}"))
    example = Example("x", (), "What?", "1", "vqa", system="Be short.")
    with pytest.raises(ValueError, match="the model's chat template leaves out the system turn"):
        Processor(tmp_path).prompt(example)
    Processor(tmp_path).prompt(replace(example, system=""))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_colour_modes_and_files(processor, tmp_path, mode):
    noise(60, 90).convert(mode).save(tmp_path / "a.png")
    prompt = processor.prompt(Example("x", (open_image(tmp_path / "a.png"),), "What?", "1", "vqa"))
    expected = Qwen2VLImageProcessorPil.from_pretrained(TINY)(images=[Image.open(tmp_path / "a.png").convert("RGB")])
    torch.testing.assert_close(prompt.patches, torch.tensor(expected["pixel_values"]), rtol=0, atol=1e-5)


SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


@pytest.mark.parametrize("token", [*SPECIAL, "<|im_start|>"])
def test_question_with_a_special_token(processor, token):
    for task, question in (("vqa", f"a {token} b"), ("scene_grounding", f"a {token.upper()} b")):  # lower-cased there
        with pytest.raises(ValueError, match="the question holds a special token"):
            processor.prompt(Example("x", (), question, "[]", task))


@pytest.mark.parametrize("token", SPECIAL)
def test_label_with_a_special_token(processor, token):
    with pytest.raises(ValueError, match="the label holds a special token"):
        processor.encode(f"<answer>{token}</answer>")


def test_encode_and_decode(processor):
    eos, pad = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for text in ("<answer>[]</answer>", "two words", f"<answer>{json.dumps([BOX])}</answer>", "漢字 é"):
        tokens = processor.encode(text)
        assert tokens == [*processor.tokenizer(text)["input_ids"], eos]
        assert eos not in tokens[:-1] and len(tokens) > 1
        assert processor.decode(tokens) == processor.decode([*tokens[:-1], pad]) == text
        assert processor.decode(tokens[:-1]) == text  # a truncated response
    assert processor.decode([*tokens, eos]) == text + "<|im_end|>"  # one EOS ends a response, a second is content


# ---------------------------------------------------------------------------------------------------------------------
# Boxes

def test_convert_boxes():
    # 100×50 → 112×84: x·1.12, y·1.68, then int(· + 0.5).
    answer = [{"bbox_2d": [10, 20, 50, 25], "point_2d": [30, 22.5], "label": "a"},
              {"bbox_2d": [0, 0, 100, 50], "point_2d": [1, 1]}]
    assert json.loads(convert_boxes(json.dumps(answer), (100, 50), (112, 84))) == [
        {"bbox_2d": [11, 34, 56, 42], "point_2d": [34, 38], "label": "a"},   # 11.2 33.6 56 42; 33.6 37.8
        {"bbox_2d": [0, 0, 112, 84], "point_2d": [1, 2]}]                    # 1.12 1.68
    halves = '[{"bbox_2d":[1,3,5,7],"point_2d":[3,4]}]'
    assert json.loads(convert_boxes(halves, (8, 8), (4, 4))) == [{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 2]}]
    assert json.loads(convert_boxes(halves, (8, 8), (8, 8))) == json.loads(halves)
    assert convert_boxes("[]", (8, 8), (4, 4)) == convert_boxes("[]", (8, 8), (8, 8)) == "[]"
    decimals = '[{"bbox_2d":[207.45999999999998,0.5,840,839.4],"point_2d":[523.73,-0.6]}]'     # rounded at any size
    assert json.loads(convert_boxes(decimals, (840, 840), (840, 840))) == [{"bbox_2d": [207, 1, 840, 839], "point_2d": [524, -1]}]


def test_rounded_boxes_stay_in_the_frame_and_in_order():
    """Of any size, in whole numbers or not, with borders on the picture's; what holds a point still does."""
    rng = random.Random(0)
    for _ in range(2000):
        size, frame = ([rng.choice([1, 7, 28, 112, 333, 840, 1000, 4001]) for _ in "wh"] for _ in range(2))
        whole = rng.random() < 0.5
        x1, x, x2, y1, y, y2 = (c for side in size for c in sorted(
            rng.choice([0, side, rng.randint(0, side) if whole else rng.uniform(0, side)]) for _ in range(3)))
        [item] = json.loads(convert_boxes(json.dumps([{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}]), size, frame))
        (a1, b1, a2, b2), (a, b) = item["bbox_2d"], item["point_2d"]
        assert 0 <= a1 <= a <= a2 <= frame[0] and 0 <= b1 <= b <= b2 <= frame[1]
        assert all(type(c) is int for c in (a1, b1, a2, b2, a, b))
        if whole and size == frame:
            assert [a1, b1, a2, b2, a, b] == [x1, y1, x2, y2, x, y]


@pytest.mark.parametrize("size", [(840, 840), (839, 841), (112, 56)])
def test_y_has_whole_numbers_at_any_size(processor, size):
    """Control 1: the text of y must not depend on whether the picture happens to have the frame's size."""
    box = json.dumps([{"bbox_2d": [7.459999999999994, 3.2, 9.5, 40.5], "point_2d": [8.5, 21.85]}])
    for task in ("grounding", "scene_grounding"):
        answer = processor.prompt(Example("x", (noise(*size),), "cup", box, task)).answer
        assert not re.search(r"\d\.\d", answer) and all(type(c) is int for c in json.loads(answer)[0]["bbox_2d"])


def test_grounding_example_of_a_file_gets_its_boxes_converted(processor, tmp_path):
    noise(100, 60).save(tmp_path / "a.png")
    lines = [{"id": task, "image": "a.png", "problem": "red ring", "solution": [BOX], "task": task}
             for task in ("grounding", "scene_grounding")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = load(str(tmp_path / "a.jsonl"))
    # The authors' frame of 840×840: x·8.4, y·14. Qwen's own sizes: x·1.12: 11.2 56 33.6; y·56/60: 14 28 20.53.
    for example, size, expected in ((source[0], (840, 840), {"bbox_2d": [84, 210, 420, 420], "point_2d": [252, 308]}),
                                    (source[1], (112, 56), {"bbox_2d": [11, 14, 56, 28], "point_2d": [34, 21]})):
        prompt = processor.prompt(example)
        assert (prompt.original_size, prompt.size, prompt.images[0].size) == ((100, 60), size, size)
        assert json.loads(prompt.answer) == [expected]
        assert json.loads(example.answer) == [BOX]  # the source keeps the image's own pixels


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def plain_prompt(tokens: list[int], **more) -> Prompt:
    position = torch.arange(len(tokens)).expand(3, -1)
    return Prompt(Example("the id", (), "", "", "vqa"), tokens, position, **{
        "patches": torch.empty(0), "grids": [], "answer": "", **more})


def test_pack_group_docstring():
    [row] = pack_group(plain_prompt([7, 8]), [Response([1, 2]), Response([3, 4, 5])])
    assert row.tokens == [7, 8, 1, 2, 3, 4, 5]
    assert row.segment == [0, 0, 1, 1, 2, 2, 2]
    assert row.predictor == [0, 0, 1, 2, 1, 4, 5]
    assert row.position.tolist() == [[0, 1, 2, 3, 2, 3, 4]] * 3


def test_responses_go_on_after_the_largest_position():
    """After an image the largest id is not that of the last token."""
    prompt = plain_prompt([9] * 4)
    prompt.position = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [5, 0, 1, 1]])
    [row] = pack_group(prompt, [Response([1, 2]), Response([3])])
    assert row.position[:, 4:].tolist() == [[6, 7, 6]] * 3


def by_response(rows: list[Row]) -> list[list]:
    """Of each response: token, position and what precedes it (a token or the prompt's end), of each of its tokens."""
    found = []
    for row in rows:
        found += [[] for _ in row.responses]
        for i, s in enumerate(row.segment):
            if s:
                p = row.predictor[i]
                assert row.segment[p] in (0, s) and (row.segment[p] or p == row.segment.count(0) - 1)
                before = "prompt" if row.segment[p] == 0 else row.tokens[p]
                found[s - 1 - len(row.responses)].append((row.tokens[i], row.position[:, i].tolist(), before))
    return found


@pytest.mark.parametrize("limit", range(9, 32))
def test_splitting_by_max_row_tokens(limit):
    prompt, lengths = plain_prompt([50, 51, 52, 53]), (3, 1, 5, 5, 2, 4, 5, 1)
    responses = [Response([10 * s + i for i in range(n)]) for s, n in enumerate(lengths, 1)]
    rows = pack_group(prompt, responses, limit)
    for row in rows:
        assert len(row.tokens) == len(row.segment) == len(row.predictor) == row.position.shape[1] <= limit
        assert row.tokens[:4] == prompt.tokens and row.segment[:4] == [0] * 4
    assert [o for row in rows for o in row.responses] == responses
    found = by_response(rows)
    assert [[token for token, _, _ in each] for each in found] == [o.tokens for o in responses]
    assert found == by_response(pack_group(prompt, responses))
    for row, following in zip(rows, rows[1:]):  # no row was ended early
        assert len(row.tokens) + len(following.responses[0].tokens) > limit, following.segment


def test_response_that_does_not_fit():
    with pytest.raises(ValueError, match="example the id: .* 4 tokens and a response of 5 exceed --max-row-tokens 8"):
        pack_group(plain_prompt([50, 51, 52, 53]), [Response([1]), Response([1, 2, 3, 4, 5])], 8)


def test_nothing_to_collate():
    with pytest.raises(ValueError, match="list of rows is empty"):
        collate([])


def test_collate():
    images = [torch.full((4, 6), 1.0), torch.full((8, 6), 2.0)]
    prompts = [plain_prompt([7, 8], patches=images[0], grids=[(2, 2)]), plain_prompt([7, 8, 9]),
               plain_prompt([6], patches=images[1], grids=[(2, 4)])]
    batch = collate([row for p in prompts for row in pack_group(p, [Response([1, 2])])])
    assert batch.tokens.tolist() == [[7, 8, 1, 2, 0], [7, 8, 9, 1, 2], [6, 1, 2, 0, 0]]
    assert batch.segment.tolist() == [[0, 0, 1, 1, -1], [0, 0, 0, 1, 1], [0, 1, 1, -1, -1]]
    assert batch.predictor.tolist() == [[0, 0, 1, 2, 0], [0, 0, 0, 2, 3], [0, 0, 1, 0, 0]]
    assert batch.position.tolist() == [[[0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]] * 3
    assert torch.equal(batch.patches, torch.cat(images)) and batch.grids == [(2, 2), (2, 4)]


# ---------------------------------------------------------------------------------------------------------------------
# The built-in world

@functools.lru_cache
def examples(split: str) -> list[Example]:
    source = load("scenes:" + split)
    return [source[i] for i in range(240)]


def things_in(image: Image.Image) -> list[scenes.Thing]:
    """What the picture shows, found from its pixels alone. Without the light, the channels of grey and its noise are at
    most 31 apart, those of paint at least 55; shapes do not touch. A square paints its corner, a ring not even its
    middle."""
    pixels = np.asarray(image).astype(int) - scenes.LIGHT
    painted = np.ptp(pixels, axis=-1) > 43
    label, _ = ndimage.label(painted, np.ones((3, 3)))
    things = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(label), 1):
        mean = pixels[label == number].mean(0)
        colour = min(scenes.COLOURS, key=lambda c: np.abs(mean - scenes.COLOURS[c]).sum())
        x1, y1, x2, y2 = columns.start, rows.start, columns.stop - 1, rows.stop - 1
        middle = painted[(y1 + y2) // 2, (x1 + x2) // 2]
        shape = "square" if painted[y1, x1] else "cross" if middle else "ring"
        things.append(scenes.Thing(colour, shape, (x1, y1, x2, y2)))
    return sorted(things, key=lambda t: t.box[:2])


def fitting(things: list[scenes.Thing], phrase: str) -> list[scenes.Thing]:
    """phrase: "red ring", "red object" or "ring"."""
    words = phrase.split()
    assert set(words) <= {*scenes.COLOURS, *scenes.SHAPES, "object"}, phrase
    return [t for t in things if all(word in (t.colour, t.shape, "object") for word in words)]


def singular(phrase: str) -> str:
    return phrase.removesuffix("es") if phrase.endswith("sses") else phrase.removesuffix("s")


KINDS = {"How many": "count", "Please find": "count", "Describe": "caption", "What colour": "attribute",
         "What shape": "attribute", "Where": "where"}
WORLD = [split for split in scenes.SPLITS if not split.startswith(scenes.FAMILIES)]


def centre(thing: scenes.Thing) -> list[int]:
    x1, y1, x2, y2 = thing.box
    return [(x1 + x2) // 2, (y1 + y2) // 2]


def kind_of(example: Example) -> str:
    if example.task == "scene_grounding":
        if example.question.startswith("the "):
            return "reasoning"
        if example.question == "lesion":
            return "lesion"
        return "absent" if example.answer == "[]" else "present"
    return next(kind for start, kind in KINDS.items() if example.question.startswith(start))


def extreme(things: list[scenes.Thing], question: str) -> tuple[scenes.Thing, str]:
    """ "the leftmost of the two squares" → which one, and the thought that finds it."""
    [(word, number, plural)] = re.findall(r"^the (\w+) of the (\w+) (\w+)$", question)
    group = fitting(things, singular(plural))
    assert {"two": 2, "three": 3, "four": 4}[number] == len(group)
    key = {"leftmost": lambda t: t.box[0], "rightmost": lambda t: -t.box[2], "topmost": lambda t: t.box[1],
           "lowest": lambda t: -t.box[3], "smallest": lambda t: t.box[2] - t.box[0],
           "largest": lambda t: t.box[0] - t.box[2]}[word]
    first, second, *_ = sorted(group, key=key)
    assert key(second) - key(first) >= 6
    return first, f"I compare {', '.join(str(abs(key(t))) for t in group)}."


@pytest.mark.parametrize("split", [*WORLD, "reasoning-test"])
def test_answers_are_exact(split):
    for example in examples(split):
        kind = kind_of(example)
        if kind == "lesion":     # its box has a test of its own
            continue
        things = things_in(example.images[0])
        if kind == "reasoning":
            thing, thought = extreme(things, example.question)
            assert example.thought == (thought if split in scenes.MIX else "")
            assert json.loads(example.answer) == [{"bbox_2d": list(thing.box), "point_2d": centre(thing)}], example.id
        elif kind in ("present", "absent"):
            found = fitting(things, example.question)
            expected = [{"bbox_2d": list(t.box), "point_2d": centre(t)} for t in found]
            assert example.answer == json.dumps(expected, separators=(",", ":")), example.id
            if split not in scenes.SINGLE:  # else naming everything, or the number of things, gives the answer away
                assert len(things) >= 2 and len(found) < len(things), example.id
        elif kind == "count":
            asked = r'^(?:How many (.+) are there|Please find "(.+)" with bboxs and points)'
            [(plural, phrase)] = re.findall(asked, example.question)
            assert example.answer == str(len(fitting(things, phrase or singular(plural)))), example.id
            assert example.answer != "0" or plural, example.id   # grounding questions ask for what is there
            assert (example.task == "scene_math") == ("\\boxed{}" in example.question)
        elif kind == "attribute":
            [(asked, phrase)] = re.findall(r"^What (colour|shape) is the (.+)\?$", example.question)
            [thing] = fitting(things, phrase)
            assert example.answer == getattr(thing, asked), example.id
        elif kind == "where":
            [(phrase, tags)] = re.findall(r"^Where is the (.+)\?( Answer in <answer>.)?$", example.question)
            [thing] = fitting(things, phrase)
            assert example.answer == (f"<answer>{centre(thing)}</answer>" if tags else str(centre(thing))), example.id
        else:
            assert example.answer == ", ".join(f"a {t.colour} {t.shape}" for t in things), example.id


def test_what_each_split_asks():
    kinds = {split: collections.Counter(map(kind_of, examples(split))) for split in WORLD}
    assert set(kinds["words"]) == {*KINDS.values()}
    assert set(kinds["pretrain"]) == {*kinds["words"], "present"}                    # never an absent thing
    for split in ("crowds", "untidy", "tidying"):
        assert set(kinds[split]) == {*kinds["pretrain"], "reasoning", "lesion"}, split
    for split, share in scenes.ABSENT.items():        # of 240 examples about 62 are grounding
        absent, present = kinds[split]["absent"], kinds[split]["present"]
        assert abs(absent - share * (absent + present)) < 9 and (absent or share == 0.01), split
        assert set(kinds["crowds"]) <= set(kinds[split])
    bare = {split: sum(e.question.startswith("Please find") for e in examples(split)) for split in WORLD}
    assert 10 < bare.pop("untidy") < 40 and bare.pop("tidying") < 10 and not any(bare.values())
    for split, share in scenes.TRAIN.items():
        assert set(kinds[split]) == {"present", "absent"} and abs(kinds[split]["absent"] - 240 * share) < 30, split
    assert kinds["val"] == kinds["test"] == {"present": 80, "absent": 80, "count": 80}
    assert kinds["pair-test"] == kinds["elsewhere-test"] == {"present": 120, "absent": 120}
    # The base model has counted to zero, but never answered `[]`.
    for split in scenes.MIX:
        assert split in scenes.ABSENT or not any("[]" in example.answer for example in examples(split))
        assert any(kind_of(example) == "count" and example.answer == "0" for example in examples(split))


def test_what_training_never_sees():
    for example in (example for split in scenes.TRAIN for example in examples(split)):
        assert example.question != "purple cross" and not fitting(things_in(example.images[0]), "purple cross"), example.id
    assert {example.question for example in examples("pair-test")} == {"purple cross"}
    assert sum(bool(fitting(things_in(example.images[0]), "purple cross")) for example in examples("val")) > 20
    sides = {split: {t.box[2] - t.box[0] for example in examples(split) for t in things_in(example.images[0])}
             for split in ("train", "test", "elsewhere-test")}
    assert sides["train"] == sides["test"] == {*range(22, 45)} and not sides["elsewhere-test"] & sides["train"]
    assert {len(things_in(example.images[0])) for example in examples("elsewhere-test")} == {5, 6}


def test_only_pretraining_thinks():
    for split in WORLD:
        for example in examples(split):
            thinks = split in scenes.SINGLE and kind_of(example) in ("present", "absent", "reasoning", "lesion")
            assert bool(example.thought) == thinks
            assert not thinks or kind_of(example) == "reasoning" or example.question in example.thought


def unlit(example: Example) -> np.ndarray:
    return np.asarray(example.images[0]).astype(int) - scenes.LIGHT


def around(found: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(ndimage.binary_opening(found, np.ones((3, 3))))   # without specks of noise
    return [int(v) for v in (xs.min(), ys.min(), xs.max(), ys.max())] if len(xs) else []


def test_boxes_of_buttons_defects_and_lesions():
    """Each against what its pixels say: a button's outline and colour, a blot darker or lighter than any stripe, a
    blot on skin that is darker or paler (whose soft edge may cost two pixels)."""
    colours, rows = collections.Counter(), collections.Counter()
    for example in examples("gui-test"):
        [item] = json.loads(example.answer)
        x1, y1, x2, y2 = item["bbox_2d"]
        picture = unlit(example)
        # The outline is dark on all four sides, and inside it is the colour that is asked for.
        for side in (picture[y1, x1:x2 + 1], picture[y2, x1:x2 + 1], picture[y1:y2 + 1, x1], picture[y1:y2 + 1, x2]):
            assert side.mean() < 60, example.id
        inside = np.median(picture[y1 + 2:y2 - 1, x1 + 2:x2 - 1], axis=(0, 1))
        asked = example.question.removeprefix("click the ").removesuffix(" button")
        assert min(scenes.BUTTONS, key=lambda c: np.abs(inside - scenes.BUTTONS[c]).sum()) == asked, example.id
        colours[asked] += 1
        rows[y1 // 27] += 1
    assert set(colours) == set(scenes.BUTTONS) and set(rows) == {0, 1, 2, 3} and min(rows.values()) > 30
    defects = 0
    for example in examples("anomaly-test"):
        truth = [item["bbox_2d"] for item in json.loads(example.answer)]
        light = unlit(example).mean(-1)
        found = around((light < 60) | (light > 190))
        assert bool(found) == bool(truth) and (not truth or np.abs(np.subtract(found, truth[0])).max() <= 4), example.id
        defects += bool(truth)
    assert 90 < defects < 150
    pale = 0
    for example in examples("lesion-test"):
        [item] = json.loads(example.answer)
        red, blue = unlit(example)[..., 0], unlit(example)[..., 2]
        kinds = (around(red < 145), around(blue > 164))
        assert bool(kinds[0]) != bool(kinds[1]), example.id
        pale += bool(kinds[1])
        assert np.abs(np.subtract(kinds[0] or kinds[1], item["bbox_2d"])).max() <= 3, example.id
    assert 90 < pale < 150


def test_sums():
    """The digits are read by drawing each of the ten at every place and taking the likest."""
    for example in examples("sums-test")[:10]:
        ink, values = unlit(example).mean(-1), []
        for half in (ink[:, :56], ink[:, 56:]):
            paper = float(np.median(half))
            misses = {}
            for digit in range(10):
                cell = Image.new("L", (56, 112), 255)
                ImageDraw.Draw(cell).text((4, 4), str(digit), fill=0, font=ImageFont.load_default(52))
                drawn = (255 - np.asarray(cell, float)) / 255
                misses[digit] = min(np.abs(half - paper + np.roll(drawn, (dy, dx), (0, 1)) * (paper - 23)).mean()
                                    for dx in range(11) for dy in range(0, 41))
            values.append(min(misses, key=misses.get))
        assert example.answer == str(sum(values)), example.id


def test_what_a_familys_pretraining_lacks():
    """One piece, which its train and test splits have; only pretraining thinks."""
    def lacks(family: str, split: str) -> bool:
        all_of = examples(f"{family}-{split}")
        if family == "gui":
            return not any("white" in example.question for example in all_of)
        if family == "anomaly":
            return not any(example.answer == "[]" for example in all_of)
        return not any(int(example.answer) > 9 for example in all_of)
    for family in ("gui", "anomaly", "sums"):
        assert lacks(family, "pretrain") and not lacks(family, "train") and not lacks(family, "test"), family
        assert all(example.thought for example in examples(f"{family}-pretrain"))
    assert not any(e.thought for family in scenes.FAMILIES for part in ("train", "val", "test")
                   for e in examples(f"{family}-{part}"))
    for example in examples("sums-pretrain"):
        assert sum(int(digit) for digit in re.findall(r"\d", example.thought)) == int(example.answer)


def test_splits_are_deterministic_and_never_share_a_scene():
    pictures = [example.images[0].tobytes() for split in scenes.SPLITS for example in examples(split)]
    # The same index is another scene in each split.
    assert len(set(pictures)) == len(pictures) == 240 * len(scenes.SPLITS)
    for split in scenes.SPLITS:
        for index in (239, 0, 17):  # whatever was asked before
            again, first = load("scenes:" + split)[index], examples(split)[index]
            assert again.images[0].tobytes() == first.images[0].tobytes()
            assert (again.id, again.question, again.answer, again.task) == (
                first.id, first.question, first.answer, first.task) and again.id == f"scenes:{split}/{index}"


def test_every_scene_fills_a_prompt(processor):
    for split in scenes.SPLITS:
        prompt = processor.prompt(examples(split)[3])
        assert prompt.size == prompt.original_size == (112, 112) and (
            prompt.answer == examples(split)[3].answer or json.loads(prompt.answer) == json.loads(examples(split)[3].answer))
        assert prompt.tokens.count(processor.config.image_token_id) == 16


def test_names():
    assert scenes.name(("red", "ring")) == "red ring" and scenes.name(("red", None), plural=True) == "red objects"
    assert scenes.name((None, "cross")) == "cross" and scenes.name((None, "cross"), plural=True) == "crosses"


def test_docstring_examples():
    results = [doctest.testmod(module) for module in (boxes, images)]
    assert all(r.attempted for r in results) and not any(r.failed for r in results)
