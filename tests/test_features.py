"""A tower that remembers pictures: the same numbers, each picture once."""
import pytest
import torch

from model import Qwen2_5_VL
from support.features import remember_pictures
from support.lora import freeze
from support.mistakes import Mistake

TINY = "assets/tiny"
GRIDS = [(4, 6), (8, 4), (4, 6), (2, 2)]


@pytest.fixture(params=["Qwen2.5-VL", "Qwen3-VL"])
def model(request, qwen3_folder):
    torch.manual_seed(0)
    model = Qwen2_5_VL.from_pretrained(TINY if request.param == "Qwen2.5-VL" else qwen3_folder, torch.float64,
                                       random_weights=True)
    freeze(model, "tower,merger")
    return model


def pictures(model, seed: int = 1) -> list[torch.Tensor]:
    width = model.visual.patch_embed.proj.weight[0].numel()
    return list(torch.randn(sum(h * w for h, w in GRIDS), width, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(seed)).split([h * w for h, w in GRIDS]))


def counted(model, monkeypatch) -> list[int]:
    """Patches of each call of the tower itself."""
    kind, calls = type(model.visual).__mro__[2], []
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, patches, grids, checkpoint=False: (
        calls.append(len(patches)) or plain(self, patches, grids, checkpoint)))
    return calls


def test_each_picture_is_seen_once(model, monkeypatch):
    """In any order and company; a picture that differs by its last pixel, or by the order of its patches, is another."""
    images = pictures(model)
    whole = model.visual(torch.cat(images), GRIDS)
    each = [model.visual(x, [g]) for x, g in zip(images, GRIDS)]
    remember_pictures(model, 1.0)
    calls = counted(model, monkeypatch)
    torch.testing.assert_close(model.visual(torch.cat(images), GRIDS), whole, rtol=1e-12, atol=1e-12)
    order = [2, 0, 3, 0, 1]
    again = model.visual(torch.cat([images[i] for i in order]), [GRIDS[i] for i in order])
    torch.testing.assert_close(again, torch.cat([each[i] for i in order], -2), rtol=1e-9, atol=1e-9)
    assert calls == [sum(h * w for h, w in GRIDS)]
    images[0][-1, -1] += 1e-6
    model.visual(images[0], GRIDS[:1])
    model.visual(images[1].flip(0), GRIDS[1:2])
    model.visual(torch.cat([images[3]] * 2), [GRIDS[3]] * 2)
    assert calls[1:] == [24, 32]
    with pytest.raises(ValueError, match="do not fill the grids"):
        model.visual(images[0], [(2, 2)])


def test_what_was_not_used_for_long_goes_first(model, monkeypatch):
    images = pictures(model)
    size = model.visual(images[0], GRIDS[:1]).numel() * 8
    remember_pictures(model, 2 * size / 1e9)
    calls = counted(model, monkeypatch)
    for i in (0, 2, 0, 3, 0, 2):      # 0 and 2 fill the room; 3 sends away 2, which then comes anew
        model.visual(images[i], [GRIDS[i]])
    assert calls == [24, 24, 4, 24] and sum(x.numel() * 8 for x in model.visual.kept.values()) <= 2 * size


def test_a_tower_that_learns_is_not_remembered():
    with pytest.raises(Mistake, match="--image-cache 1: the vision tower learns"):
        remember_pictures(Qwen2_5_VL.from_pretrained(TINY), 1)
