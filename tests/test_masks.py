"""masks.py with a random tiny SAM 2 against transformers' own forward."""
import numpy as np
import pytest
import torch
from PIL import Image

from experiments.made_data import write_sam2
from support.masks import Segmenter
from support.mistakes import Mistake


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    write_sam2(folder)
    return Segmenter(str(folder), "cpu")


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


ITEMS = [{"bbox_2d": [5, 8, 40, 50], "point_2d": [20, 30]}, {"bbox_2d": [60, 2, 90, 31], "point_2d": [70, 11]}]


def reference(segmenter, image: Image.Image, items: list[dict]) -> np.ndarray:
    """One image, one object at a time, from pixels, in transformers' words."""
    union = np.zeros((image.height, image.width), bool)
    for item in items:
        sx, sy = 128 / image.width, 128 / image.height
        (x, y), (x1, y1, x2, y2) = item["point_2d"], item["bbox_2d"]
        with torch.no_grad():
            out = segmenter.model(pixel_values=segmenter.pixels(image)[None],
                                  input_points=torch.tensor([[[[x * sx, y * sy]]]]),
                                  input_labels=torch.tensor([[[1]]]),
                                  input_boxes=torch.tensor([[[x1 * sx, y1 * sy, x2 * sx, y2 * sy]]]))
        best = int(out.iou_scores[0, 0].argmax())
        assert out.iou_scores.shape == (1, 1, 3)
        logits = torch.nn.functional.interpolate(out.pred_masks[0, 0, best][None, None], (image.height, image.width),
                                                 mode="bilinear", align_corners=False)
        union |= (logits[0, 0] > 0).numpy()
    return union


def test_equals_one_object_at_a_time(segmenter):
    images = [picture(100, 64, 0), picture(50, 120, 1), picture(100, 64, 2)]
    objects = [ITEMS, [], ITEMS[:1]]
    masks = segmenter(images, objects)
    for mask, image, items in zip(masks, images, objects):
        assert mask.shape == (image.height, image.width) and mask.dtype == bool
        assert (mask == reference(segmenter, image, items)).mean() > 0.999   # a pixel at logit 0 may fall either way
    assert not masks[1].any() and 0 < masks[0].mean() < 1
    assert (segmenter([images[0]], [ITEMS[:1]])[0] != segmenter([images[0]], [ITEMS[1:]])[0]).any()


def test_pixels_are_normalised(segmenter):
    grey = segmenter.pixels(Image.new("L", (10, 20), 51))
    assert grey.shape == (3, 128, 128)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey[:, 0, 0], (0.2 - mean) / std)


def test_no_objects_anywhere(segmenter):
    assert not segmenter([picture(30, 30, 0)], [[]])[0].any()


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_sam2_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=f"--masks {name}: neither a folder with a SAM 2 model nor a hub id") as mistake:
        Segmenter(name, "cpu")
    assert "\n" not in str(mistake.value)
