"""The image tokens of a frozen vision tower, made once for each picture. Put on a loaded model from outside.

A picture comes several times: for sampling, for training, in every epoch and in every evaluation. Its tokens are kept
in the host's memory; those that were not used for the longest time go first. They are found again by sums over the
patches, which are other ones for other pictures.
"""
from collections import OrderedDict

import torch
from torch import Tensor, nn

from support.mistakes import Mistake


class Remembering(nn.Module):
    """What a vision tower becomes, before the class that it is."""
    kept: OrderedDict[tuple, Tensor]        # sums and grid of a picture → its image tokens, the least used first
    room: int                               # bytes

    def forward(self, patches: Tensor, grids: list[tuple[int, int]], checkpoint: bool = False) -> Tensor:
        sizes = [gh * gw for gh, gw in grids]
        if sum(sizes) != len(patches):
            return super().forward(patches, grids, checkpoint)       # which says what is wrong
        pictures = patches.split(sizes)
        keys = [(*grid, *sums) for grid, sums in zip(grids, sums_of(pictures))]
        new = {key: i for i, key in enumerate(keys) if key not in self.kept}
        tokens = {key: self.kept[key].to(patches.device, non_blocking=True) for key in keys if key not in new}
        if new:
            with torch.no_grad():
                made = super().forward(torch.cat([pictures[i] for i in new.values()]), [grids[i] for i in new.values()])
            whole = made.shape[-2] / sum(sizes[i] for i in new.values())
            tokens |= zip(new, made.split([round(sizes[i] * whole) for i in new.values()], -2))
        for key in keys:
            if key in new:
                self.kept[key] = tokens[key].to("cpu", copy=True)      # a view would hold on to all of this call's
            self.kept.move_to_end(key)
        while sum(x.numel() * x.element_size() for x in self.kept.values()) > self.room and self.kept:
            self.kept.popitem(last=False)
        return torch.cat([tokens[key] for key in keys], -2)


def sums_of(pictures: tuple[Tensor, ...]) -> list[list[float]]:
    """Four numbers of each picture: sums over its patches, each place with a weight of its own."""
    device, width = pictures[0].device, pictures[0].shape[1]
    weights = torch.randn(width, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    sums = []
    for patches in pictures:
        place = torch.arange(1, len(patches) + 1, device=device, dtype=torch.float64)
        sums.append(((patches.double() @ weights) * place[:, None]).sum(0))
    return torch.stack(sums).tolist()


def remember_pictures(model: nn.Module, gigabytes: float) -> None:
    """Mistake: the tower learns, so that its image tokens do not stay."""
    tower = model.visual
    if any(p.requires_grad for p in tower.parameters()):
        raise Mistake(f"--image-cache {gigabytes}: the vision tower learns, so its image tokens change; --freeze "
                      "tower,merger, or --lora-rank with targets in the decoder alone")
    tower.__class__ = type("RememberingTower", (Remembering, type(tower)), {})
    vars(tower).update(kept=OrderedDict(), room=int(gigabytes * 1e9))
