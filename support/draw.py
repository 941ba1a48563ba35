"""Drawing words by their probabilities, from a vocabulary of any size."""
import torch
from torch import Tensor

BLOCK = 1024        # words, at most


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Returns the first word of each row of p [M, V] whose cumulative probability exceeds u [M], in
    [0, 1). Sums are float64, so that a word of probability 0 is never taken. The sums of blocks are
    searched first, and only the block that is hit is summed up word by word."""
    u, V = u[:, None], p.shape[1]
    size = next(n for n in range(min(V, BLOCK), 0, -1) if V % n == 0)
    if size == V:
        return exceeds(p, u)[0][:, 0]
    blocks = p.unflatten(1, (-1, size))
    block, u = exceeds(blocks.sum(-1, dtype=torch.float64), u)
    word, _ = exceeds(blocks.take_along_dim(block[:, :, None], 1)[:, 0], u)
    return (block * size + word)[:, 0]


def exceeds(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the cumulative sum of mass [M, N] first exceeds u [M, 1] times the whole, and
    which share of that place's mass lies below u, [M, 1] each.

    >>> at, share = exceeds(torch.tensor([[1.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.375]]))
    >>> at.tolist(), share.tolist()
    ([[2]], [[0.5]])
    """
    ends = mass.cumsum(-1, dtype=torch.float64)
    target = u * ends[:, -1:]
    at = torch.searchsorted(ends, target, right=True)
    at = at.clamp(max=mass.shape[1] - 1)        # past the end if p is NaN (rollout.collect)
    own = mass.gather(1, at)
    return at, (1 + (target - ends.gather(1, at)) / own).clamp(0, 1 - 2 ** -53)
