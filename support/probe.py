"""Finds the responses that a loss trains on, by trying it."""
from collections.abc import Callable

import torch
from torch import Tensor

# Where the loss is tried: log-probs from near 0 to −30, log-ratios, and entropies from 0 to 10.
POINTS = torch.cartesian_prod(torch.tensor([-1e-3, -0.1, -1.0, -5.0, -30.0]),
                              torch.tensor([0.0, 0.1, -0.1, 2.0, -2.0]),
                              torch.tensor([1e-3, 1.0, 10.0]))


def trained_on(loss: Callable, known: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Returns which of N responses have a gradient, and whether the loss needs that of the entropy.

    Each response stands for one token, after a prompt of one. Where its gradient is exactly 0 at
    all points, the response is left out of the rows. With the surrogate alone that is where Â = 0:
    a smoothed y, and all of a tied group. A response that any other term moves stays.

    loss: objective.loss, given all that concerns no single token. known: name → a number of each
    response, [N]; "advantage" among them.
    """
    N = len(known["advantage"])
    logp, change, entropy = (x.to(known["advantage"])[:, None].repeat(1, N + 1) for x in POINTS.T)
    logp, entropy = logp.requires_grad_(), entropy.requires_grad_()         # [K, 1 + N]
    old_logp = (logp - change).detach()
    weight = torch.ones_like(old_logp)
    weight[:, 0] = 0
    total, _ = loss(
        logp=logp, old_logp=old_logp, ref_logp=old_logp, sampled_logp=old_logp, entropy=entropy,
        segment=torch.arange(N + 1).expand_as(logp), weight=weight, denominator=1,
        **{name: torch.cat((x.new_zeros(1), x)).expand_as(logp) for name, x in known.items()})
    by_logp, by_entropy = torch.autograd.grad(total, (logp, entropy), allow_unused=True,
                                              materialize_grads=True)
    return ((by_logp != 0) | (by_entropy != 0)).any(0)[1:], bool((by_entropy != 0).any())
