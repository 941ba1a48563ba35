"""objective.py against hand-worked numbers, and against gradients taken one response at a time."""
import doctest
import itertools
import math
import random
import runpy
import sys
from dataclasses import fields
from functools import partial

import pytest
import torch

import objective
from objective import METHODS, clipped_surrogate, divisor, group_advantages, kl_k3, token_weight
from rewards import smooth
from support.probe import trained_on
from train import Config

NORMALISERS = ("token-mean", "seq-mean", "seq-sum")
GROWTH = {"sample": lambda G: math.sqrt(G / (G - 1)), "population": lambda G: math.sqrt((G + 1) / G),
          "none": lambda G: 1.0}


@pytest.fixture(autouse=True)
def float64():
    """Hand-worked numbers deserve more than seven digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def with_label(r_y, r_o, std="sample", smoothing=True):
    """The advantages of a group as ViSurf takes them: control 3, then Eq. 6 and 7. y comes first."""
    return group_advantages(torch.tensor([smooth(r_y, r_o)[0] if smoothing else r_y, *r_o]), std)


def random_group(rng):
    """A label and 2..9 rollouts; most rewards are halves of whole points, so that ties and equal maxima are common."""
    draw = (lambda: rng.randrange(15) / 2) if rng.random() < 0.7 else (lambda: rng.uniform(0, 7))
    return draw(), [draw() for _ in range(rng.randint(2, 9))]


# ---------------------------------------------------------------------------------------------------------------------
# A toy policy: π(token given the token before it), a table of logits

def toy_logits(seed=0, V=5):
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def response_logp(logits, prompt, response):
    """log π of each token of one response, scored alone."""
    before = [prompt[-1], *response[:-1]]
    return logits[before].log_softmax(-1)[range(len(response)), response]


def toy_row(logits, prompt, responses, T=0, pad_logp=-3.0):
    """logp [T] and segment [T] of one row. Prompt and padding hold numbers that must not matter."""
    logp = [torch.full((len(prompt),), -1.0), *(response_logp(logits, prompt, o) for o in responses)]
    segment = [0] * len(prompt) + [s + 1 for s, o in enumerate(responses) for _ in o]
    padding = max(0, T - len(segment))
    return torch.cat([*logp, torch.full((padding,), pad_logp)]), torch.tensor(segment + [-1] * padding)


def toy_batch(logits, groups, T=0, pad_logp=-3.0):
    """Rows [B, T] of the groups (prompt, responses), padded to the longest or to T."""
    T = max([T, *(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)])
    rows = [toy_row(logits, prompt, responses, T, pad_logp) for prompt, responses in groups]
    return torch.stack([logp for logp, _ in rows]), torch.stack([segment for _, segment in rows])


def call_loss(logp, segment, options=None, loss=None, **given):
    """objective.loss of rows whose response 1 is y, all in one batch at ρ = 1; `given` says what is otherwise."""
    cfg, scored = Config(**options or {}), segment > 0
    length = (segment[:, :, None] == segment[:, None, :]).sum(2) * scored
    weight = token_weight(segment, cfg.normaliser)
    tokens, responses = int(scored.sum()), int(segment.clamp(min=0).amax(1).sum())
    zero = torch.zeros_like(logp)
    return (loss or objective.loss)(cfg, **{
        "logp": logp, "old_logp": logp.detach(), "ref_logp": logp.detach(), "sampled_logp": logp.detach(), "entropy": zero,
        "advantage": zero, "r": zero, "length": length, "truncated": zero > 0, "is_y": segment == 1, "segment": segment,
        "group": torch.arange(len(logp))[:, None].expand_as(segment), "weight": weight, "tokens": tokens, "responses": responses,
        "denominator": divisor(tokens, responses, cfg.normaliser), "step": 0, "steps": cfg.steps, **given})


def per_token(advantage, segment):
    """advantage [B, S] at each token of its response, 0 in the prompt and in padding: what train.micro_batch packs."""
    return torch.cat((torch.zeros(len(advantage), 1), advantage), 1).gather(1, segment.clamp(min=0))


def loss_of(logp, old_logp, advantage, segment, normaliser, N, **options):
    return call_loss(logp, segment, {"normaliser": normaliser, **options}, old_logp=old_logp, advantage=advantage, denominator=N)[0]


def count(groups, normaliser):
    responses = [o for _, group in groups for o in group]
    return divisor(sum(map(len, responses)), len(responses), normaliser)


def toy_loss(logits, groups, advantage, normaliser, N=None, T=0, pad_logp=-3.0, old=None, clip=0.2):
    logp, segment = toy_batch(logits, groups, T, pad_logp)
    old_logp = logp.detach() if old is None else toy_batch(old, groups, T, pad_logp)[0]
    return loss_of(logp, old_logp, per_token(advantage, segment), segment, normaliser, N or count(groups, normaliser),
                   clip=clip)


def loss_and_gradient(logits, *arguments, **options):
    leaf = logits.clone().requires_grad_()
    loss = toy_loss(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def gradient_of_sequence(logits, prompt, response):
    """∇ log π(response), the paper's sequence probability, by its own autograd call."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(response_logp(leaf, prompt, response).sum(), leaf)[0]


def random_groups(B, S=4, seed=0):
    rng = random.Random(seed)
    draw = lambda longest: [rng.randrange(5) for _ in range(rng.randint(1, longest))]  # noqa: E731
    groups = [(draw(3), [draw(6) for _ in range(S)]) for _ in range(B)]
    return groups, group_advantages(torch.tensor([[rng.randrange(8) + s / 8 for s in range(S)] for _ in range(B)]))


# ---------------------------------------------------------------------------------------------------------------------
# Advantages, Eq. 6 and 7

@pytest.mark.parametrize("std, expected", [
    ("sample", [3 / 2, -1 / 2, -1 / 2, -1 / 2]),                 # mean 3, squares 9 + 1 + 1 + 1 = 12, 12/3 = 2²
    ("population", [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),    # 12/4 = √3²
    ("none", [3, -1, -1, -1])])
def test_advantages_by_hand(std, expected):
    close(group_advantages(torch.tensor([6., 2., 2., 2.]), std), expected)
    both = group_advantages(torch.tensor([[6., 2., 2., 2.], [0., 4., 4., 4.]]), std)  # each group by itself
    close(both, [expected, [-a for a in expected]])


def test_advantages_do_not_depend_on_scale_or_offset():
    r = torch.tensor([5., 1., 4., 7., 0.])
    for std in ("sample", "population"):
        close(group_advantages(3 * r + 2, std), group_advantages(r, std))


@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_groups_are_exactly_zero(std, dtype):
    # 0.1 + 0.2 differs from 0.3 in the last bit, and a sum of nine 0.1 is no multiple of 0.1: neither is a difference
    for r in ([5.5] * 9, [0.1] * 9, [0.1 + 0.2, 0.3, 0.3, 0.3], [16 / 3] * 7, [1 / 3, 1 - 2 / 3, 1 / 3]):
        advantage = group_advantages(torch.tensor(r, dtype=dtype), std)
        assert torch.equal(advantage, torch.zeros(len(r), dtype=dtype)), r
    assert group_advantages(torch.tensor([0.1, 0.1, 0.101], dtype=dtype), std)[2] > 0  # small is not tied


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_advantages_sum_to_zero_over_the_whole_group(std):
    rng = random.Random(1)
    for _ in range(500):
        r_y, r_o = random_group(rng)
        for smoothing in (True, False):
            assert abs(with_label(r_y, r_o, std, smoothing).sum()) < 1e-12


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="samples"):
        group_advantages(torch.tensor([1., 2.]), "samples")
    with pytest.raises(ValueError, match="mean"):
        token_weight(torch.tensor([[0, 1]]), "mean")


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the reward controls (docs/paper.md, section 2)

@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_after_smoothing_y_is_neutral_and_the_rollouts_grow(std):
    by_hand = with_label(6, [7, 1], std)  # R = {4, 7, 1}: squares 18, over 2 = 3², over 3 = 6
    close(by_hand, {"sample": [0, 1, -1], "population": [0, 1.5 ** 0.5, -1.5 ** 0.5], "none": [0, 3, -3]}[std])
    rng, grown = random.Random(2), 0
    for _ in range(1000):
        r_y, r_o = random_group(rng)
        plain = group_advantages(torch.tensor(r_o), std)
        if not smooth(r_y, r_o)[1] or not plain.any():
            continue
        advantage = with_label(r_y, r_o, std)
        assert abs(advantage[0]) < 1e-12
        close(advantage[1:], plain * GROWTH[std](len(r_o)))
        grown += 1
    assert grown > 300


@pytest.mark.parametrize("std, y, rollout, rounded", [
    ("sample", lambda G: G / math.sqrt(G + 1), lambda G: -1 / math.sqrt(G + 1), (2.667, -0.333)),
    ("population", lambda G: math.sqrt(G), lambda G: -1 / math.sqrt(G), (2.828, -0.354))])
def test_all_rollouts_equal_and_below_y(std, y, rollout, rounded):
    for G in (2, 3, 8, 16):
        for r_y, r_o in ((6.0, 1.0), (6.0, 5.5), (1.0, 0.1)):  # neither the level nor the gap matters
            close(with_label(r_y, [r_o] * G, std), [y(G), *[rollout(G)] * G])
    assert (round(y(8), 3), round(rollout(8), 3)) == rounded
    # plain GRPO learns nothing from such a group; with y in the row the gradient moves
    logits, (groups, _) = toy_logits(), random_groups(1, S=9)
    rollouts = [(groups[0][0], groups[0][1][1:])]
    grpo = loss_and_gradient(logits, rollouts, group_advantages(torch.tensor([[1.0] * 8]), std), "token-mean")[1]
    visurf = loss_and_gradient(logits, groups, with_label(6.0, [1.0] * 8, std)[None], "token-mean")[1]
    assert not grpo.any() and visurf.abs().max() > 0.01


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_all_rollouts_equal_and_not_below_y(std):
    for r_y, r_o in ((6.0, 6.0), (6.0, 7.0), (0.3, 0.1 + 0.2)):
        assert not with_label(r_y, [r_o] * 8, std).any()


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_with_the_controls_y_is_never_pushed_down(std):
    rng = random.Random(3)
    groups = [random_group(rng) for _ in range(2000)]
    assert min(with_label(*group, std)[0] for group in groups) > -1e-12
    assert min(with_label(*group, std, smoothing=False)[0] for group in groups) < -1  # and that is smoothing's doing
    if std == "sample":       # all rollouts right and thinking, y without the point for a thought
        assert with_label(6.0, [7.0] * 8, std, smoothing=False).tolist() == pytest.approx([-8 / 3] + [1 / 3] * 8)


def test_the_y_term_vanishes_as_the_policy_succeeds():
    """A policy that is right (7 points) with probability p, else earns 4, against r(y) = 6: Â_y is 8/3 in the groups
    without any success, (1 − p)^8 of them, and 0 in all others."""
    def mean_advantage_of_y(p):
        return sum(math.comb(8, k) * p**k * (1 - p)**(8 - k) * with_label(6.0, [7.0] * k + [4.0] * (8 - k))[0].item()
                   for k in range(9))
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert mean_advantage_of_y(p) == pytest.approx(8 / 3 * (1 - p)**8, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient: Eq. 8 at ρ = 1 is Eq. 9, the RLVR term plus the SFT term

@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_gradient_is_the_rlvr_term_plus_the_sft_term(normaliser):
    logits = toy_logits()
    groups = [([4, 2], [[1, 2, 0], [3, 0], [1, 4, 4, 0], [2]]), ([3], [[0, 1], [4, 4, 3, 2, 1], [2, 2], [0, 3, 1]])]
    r = torch.tensor([[6., 4., 1., 4.], [5.5, 7., 2., 4.]])
    r[1, 0] = smooth(5.5, r[1, 1:].tolist())[0]                     # y of the second group: Â = 0
    advantage = group_advantages(r)
    N = {"token-mean": 22, "seq-mean": 8, "seq-sum": 8}[normaliser]  # 10 + 12 tokens, 8 responses
    rlvr, sft = torch.zeros_like(logits), torch.zeros_like(logits)
    for (prompt, (y, *rollouts)), (a_y, *a_o) in zip(groups, advantage.tolist()):
        for o, a in zip(rollouts, a_o):
            share = 1 / len(o) if normaliser == "seq-mean" else 1
            rlvr -= a * share / N * gradient_of_sequence(logits, prompt, o)
        share = 1 / len(y) if normaliser == "seq-mean" else 1
        sft -= a_y * share / N * gradient_of_sequence(logits, prompt, y)
    close(loss_and_gradient(logits, groups, advantage, normaliser)[1], rlvr + sft)
    assert min(rlvr.abs().max(), sft.abs().max()) > 1e-2            # neither term is trivially absent
    # the same two terms out of the same loss: silence y, silence the rollouts
    is_y = torch.tensor([[1., 0., 0., 0.]])
    close(loss_and_gradient(logits, groups, advantage * (1 - is_y), normaliser)[1], rlvr)
    close(loss_and_gradient(logits, groups, advantage * is_y, normaliser)[1], sft)


def test_seq_sum_is_equation_9_to_the_letter():
    logits, prompt, y, rollouts = toy_logits(3), [1], [2, 0], [[3, 3, 0], [1], [4, 0, 0, 2, 1]]
    a_y, *a_o = group_advantages(torch.tensor([6., 1., 5., 4.])).tolist()
    expected = -1 / (len(rollouts) + 1) * (
        sum(a * gradient_of_sequence(logits, prompt, o) for a, o in zip(a_o, rollouts))
        + a_y * gradient_of_sequence(logits, prompt, y))
    close(loss_and_gradient(logits, [(prompt, [y, *rollouts])], torch.tensor([[a_y, *a_o]]), "seq-sum")[1], expected)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_sft_loss_is_cross_entropy(normaliser):
    logits = toy_logits(1).requires_grad_()
    groups = [([4, 2], [[1, 2, 0]]), ([3], [[0]]), ([0], [[4, 4, 3, 2, 1]])]
    logp, segment = toy_batch(logits, groups)
    loss = loss_of(logp, logp.detach(), torch.ones_like(logp), segment, normaliser, count(groups, normaliser),
                   method="sft")
    each = [torch.nn.functional.cross_entropy(logits[[prompt[-1], *y[:-1]]], torch.tensor(y), reduction="none")
            for prompt, (y,) in groups]
    expected = {"token-mean": torch.cat(each).mean(), "seq-mean": sum(nll.mean() for nll in each) / 3,
                "seq-sum": sum(nll.sum() for nll in each) / 3}[normaliser]
    close(loss, expected.detach(), 1e-14)
    if normaliser == "token-mean":  # as one call on all nine tokens, its own mean
        before, tokens = [2, 1, 2, 3, 0, 4, 4, 3, 2], torch.tensor([1, 2, 0, 0, 4, 4, 3, 2, 1])
        close(loss, torch.nn.functional.cross_entropy(logits[before], tokens).detach(), 1e-14)
    # and its gradient is Eq. 8's with Â = 1, ρ = 1
    gradient = loss_and_gradient(logits.detach(), groups, torch.ones(3, 1), normaliser)[1]
    close(gradient, torch.autograd.grad(loss, logits)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Clipping

RATIOS = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5]


@pytest.mark.parametrize("advantage, surrogate, clipped", [
    (2.0, [1.0, 1.58, 1.62, 2.0, 2.38, 2.4, 2.4], [0, 0, 0, 0, 0, 1, 1]),           # gains end at 1.2 · 2
    (-1.0, [-0.8, -0.8, -0.81, -1.0, -1.19, -1.21, -1.5], [1, 1, 0, 0, 0, 0, 0]),   # and losses at 0.8
    (0.0, [0.0] * 7, [0] * 7)])
def test_clipping_by_hand(advantage, surrogate, clipped):
    old_logp = torch.linspace(-2, -0.5, 7)
    logp = (torch.tensor(RATIOS).log() + old_logp).requires_grad_()
    a = torch.full((7,), advantage)
    value, cut = clipped_surrogate(logp, old_logp, a, 0.2, 0.2)
    close(value.detach(), surrogate)
    assert cut.tolist() == [bool(c) for c in clipped]
    # d(ρÂ)/d logp = ρÂ, and exactly 0 where it is cut
    close(torch.autograd.grad(value.sum(), logp)[0], torch.where(cut, torch.zeros(7), torch.tensor(RATIOS) * a))


def test_gradient_is_zero_exactly_where_clipped():
    generator = torch.Generator().manual_seed(0)
    old_logp, noise, advantage = (torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(3))
    logp = (old_logp + noise / 3).requires_grad_()
    for low, high in itertools.product((0.05, 0.2, 0.5), repeat=2):
        value, cut = clipped_surrogate(logp, old_logp, advantage, low, high)
        assert torch.equal(torch.autograd.grad(value.sum(), logp)[0] == 0, cut) and 100 < cut.sum() < 4900
        ratio = (logp - old_logp).exp()
        assert torch.equal(cut, (ratio > 1 + high) & (advantage > 0) | (ratio < 1 - low) & (advantage < 0))


def test_clipping_is_inert_at_ratio_one():
    logits, (groups, advantage) = toy_logits(), random_groups(3)
    plain = loss_and_gradient(logits, groups, advantage, "token-mean", clip=0.2)
    for clip in (0.0, 1e-9, 0.9, 1.0, 5.0, math.inf):
        for value, expected in zip(loss_and_gradient(logits, groups, advantage, "token-mean", clip=clip), plain):
            assert torch.equal(value, expected)
        assert not clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.tensor([1., -1.]), clip, clip)[1].any()
    # off ratio one the same comparison sees clipping, so the loop above could have failed
    old = toy_logits(9)
    tight, loose = (toy_loss(logits, groups, advantage, "token-mean", old=old, clip=clip) for clip in (0.2, 5.0))
    assert tight > loose + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# KL

def test_k3_by_hand():
    # π/π_ref = 1/2: x = log 2, 2 − log 2 − 1;   π = π_ref: 0;   π/π_ref = 2: 1/2 + log 2 − 1
    logp, ref_logp = torch.tensor([0.2, 0.3, 0.8]).log(), torch.tensor([0.4, 0.3, 0.4]).log()
    expected = torch.tensor([1 - math.log(2), 0, math.log(2) - 0.5])
    close(kl_k3(logp, ref_logp), expected)
    logp, ref_logp, none = logp[None], ref_logp[None], torch.zeros(1, 3)
    value, _ = call_loss(logp, none.long() + 1, {"kl": 0.5}, ref_logp=ref_logp, weight=torch.tensor([[1., 7., 0.5]]),
                         denominator=4)         # without an advantage the loss is the KL alone
    close(value, 0.5 * (expected[0] + expected[2] / 2) / 4)


def test_k3_is_never_negative():
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([1e-9, -1e-9, 0.0])])
    assert (kl_k3(torch.zeros(()), x) >= -1e-15).all() and (kl_k3(torch.zeros(()), x[x.abs() > 1e-3]) > 0).all()


def test_k3_is_the_kl_in_expectation():
    """Over every response of three tokens, weighted by its probability: the sum of k3 is KL(π ‖ π_ref) of sequences."""
    policy, reference, estimate, exact, mass = toy_logits(0), toy_logits(1), 0.0, 0.0, 0.0
    for response in itertools.product(range(5), repeat=3):
        logp, ref_logp = (response_logp(table, [2], list(response)) for table in (policy, reference))
        p = logp.sum().exp()
        mass += p
        estimate += p * kl_k3(logp, ref_logp).sum()
        exact += p * (logp - ref_logp).sum()
    close(torch.stack([mass, estimate]), [1.0, exact])
    assert exact > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Weights, and what the loss must not depend on

SEGMENT = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 2, 2, 2, 2, -1, -1]])


@pytest.mark.parametrize("normaliser, expected", [
    ("token-mean", [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]]),
    ("seq-sum", [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]]),
    ("seq-mean", [[0, 0, 1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2], [0, 1, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0, 0]])])
def test_token_weight_by_hand(normaliser, expected):
    close(token_weight(SEGMENT, normaliser), expected)


def test_per_token_by_hand():
    advantage = torch.tensor([[2., -1., -3.], [5., 7., 99.]])  # the second group has two responses only
    close(per_token(advantage, SEGMENT), [[0, 0, 2, 2, 2, -1, -3, -3], [0, 5, 7, 7, 7, 7, 0, 0]])


def test_divisor_and_loss_by_hand():
    assert [divisor(11, 5, normaliser) for normaliser in NORMALISERS] == [11, 5, 5]
    advantage = per_token(torch.tensor([[2., -1., -3.], [5., 7., 99.]]), SEGMENT)
    zero = torch.zeros(2, 8)  # ρ = 1: the loss is minus the weighted sum of advantages
    for normaliser, total in (("token-mean", 6 - 1 - 6 + 5 + 28), ("seq-sum", 32), ("seq-mean", 2 - 1 - 3 + 5 + 7)):
        close(loss_of(zero, zero, advantage, SEGMENT, normaliser, divisor(11, 5, normaliser)), -total / (11 if normaliser == "token-mean" else 5))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_micro_batches_add_up(normaliser):
    """1 × 8 = 2 × 4 = 8 × 1 under the shared denominator, each micro-batch padded to its own longest row, off ρ = 1."""
    logits, (groups, advantage) = toy_logits(), random_groups(8)
    N = count(groups, normaliser)
    whole = loss_and_gradient(logits, groups, advantage, normaliser, N, old=toy_logits(1))
    for size in (4, 1):
        parts = [loss_and_gradient(logits, groups[i:i + size], advantage[i:i + size], normaliser, N, old=toy_logits(1))
                 for i in range(0, 8, size)]
        for expected, shares in zip(whole, zip(*parts)):
            close(sum(shares), expected)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_padding_is_invisible(normaliser):
    logits, (groups, advantage) = toy_logits(), random_groups(3)
    whole = loss_and_gradient(logits, groups, advantage, normaliser, old=toy_logits(1))
    for pad_logp in (-3.0, 0.0, -1e4):
        padded = loss_and_gradient(logits, groups, advantage, normaliser, T=50, pad_logp=pad_logp, old=toy_logits(1))
        for value, expected in zip(padded, whole):
            close(value, expected)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_order_of_the_responses_is_irrelevant(normaliser):
    logits, (groups, advantage) = toy_logits(), random_groups(3)
    whole = loss_and_gradient(logits, groups, advantage, normaliser, old=toy_logits(1))
    for order in itertools.permutations(range(4)):
        shuffled = [(prompt, [responses[s] for s in order]) for prompt, responses in groups]
        again = loss_and_gradient(logits, shuffled, advantage[:, order], normaliser, old=toy_logits(1))
        for value, expected in zip(again, whole):
            close(value, expected)
    r = torch.tensor([6., 1., 4., 4.5])
    close(group_advantages(r.flip(0)), group_advantages(r).flip(0))


def probe(options, advantage, is_y, reward=None):
    """Which responses, of four tokens each, are trained on with these options."""
    fixed = {"tokens": 4 * len(is_y), "responses": len(is_y), "step": 0, "steps": 9}
    number = torch.zeros(len(is_y), dtype=torch.long)
    return trained_on(partial(objective.loss, Config(**options), **fixed), {
        "advantage": advantage, "r": advantage if reward is None else reward, "is_y": is_y, "length": number + 4,
        "truncated": number > 0, "group": number})


# ---------------------------------------------------------------------------------------------------------------------
# No term may depend on how the batch is split over rows, micro-batches and ranks

LENGTHS = [3, 1, 5, 2, 4, 2, 1, 6, 3, 3, 2, 5]      # three groups of four responses, y first
SPLITS = {      # micro-batches of rows of responses
    "one forward": [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]],
    "a row each": [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]],
    "split groups": [[[0, 1], [8, 9, 10]], [[11], [4, 5, 6, 7], [2, 3]]],
    "a response each": [[[s]] for s in range(12)]}


def summed(loss, cfg, micro_batches, moved=0.3):
    """The loss of all responses, added up over micro-batches, its gradients for each token, and what it logs. moved: how
    far log ρ is from 0."""
    generator = torch.Generator().manual_seed(0)
    of_token = lambda: torch.randn(sum(LENGTHS) + 1, generator=generator, dtype=torch.float64)  # noqa: E731
    logp, entropy = (-3 * of_token().abs()).requires_grad_(), of_token().abs().requires_grad_()
    terms = {"old_logp": logp.detach() + moved * of_token(), "ref_logp": logp.detach() + of_token(), "sampled_logp": logp.detach() + moved * of_token()}
    of_response = {"advantage": of_token()[:12], "r": of_token()[:12], "is_y": torch.arange(12) % 4 == 0,
                   "length": torch.tensor(LENGTHS), "truncated": torch.arange(12) % 5 == 1, "group": torch.arange(12) // 4}
    terms["sampled_logp"][1:][of_response["is_y"].repeat_interleave(of_response["length"])] = math.nan
    places = torch.arange(1, sum(LENGTHS) + 1).split(LENGTHS)       # place 0 is a prompt's or padding
    total, logged = 0.0, {}
    for rows in micro_batches:
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        segment = pad([torch.tensor([0, 0] + [n for n, s in enumerate(row, 1) for _ in range(LENGTHS[s])]) for row in rows], padding_value=-1)
        place = pad([torch.cat([torch.zeros(2, dtype=torch.long), *(places[s] for s in row)]) for row in rows])
        known = {name: pad([torch.cat((x.new_zeros(1), x[row])) for row in rows]).gather(1, segment.clamp(min=0))
                 for name, x in of_response.items()}
        known["group"] = torch.stack([of_response["group"][row[0]].expand(segment.shape[1]) for row in rows])
        value, of_rows = loss(
            cfg, logp=logp[place], entropy=entropy[place], segment=segment, weight=token_weight(segment, cfg.normaliser),
            tokens=sum(LENGTHS), responses=12, denominator=divisor(sum(LENGTHS), 12, cfg.normaliser), step=2, steps=cfg.steps,
            **known, **{name: x[place] for name, x in terms.items()})
        total = total + value
        for name, values in of_rows.items():
            logged.setdefault(name, []).append(values.detach().double())
    logged = {name: torch.stack(parts).sum() if parts[0].dim() == 0 else torch.cat([x.flatten() for x in parts]).sort().values
              for name, parts in logged.items()}
    gradients = torch.autograd.grad(total, (logp, entropy), allow_unused=True, materialize_grads=True)
    return {"loss": total.detach(), "by logp": gradients[0], "by entropy": gradients[1], **logged}


def check_splits(loss, cfg):
    """Raises AssertionError if the sums depend on how the responses are split. A term that mixes rows does."""
    whole = summed(loss, cfg, SPLITS["one forward"])
    for way in SPLITS:
        for name, value in summed(loss, cfg, SPLITS[way]).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9, msg=f"{name} differs: {way}")


def other_values(f):
    """Values of an option besides its default, so that a term which it switches on is tried."""
    if f.metadata["choices"]:
        return [choice for choice in f.metadata["choices"] if choice != f.default]
    return [] if f.type is str else [not f.default] if f.type is bool else [f.default + (0.2 if f.type is float else 1)]


@pytest.mark.parametrize("options", [{}, *({f.name: value} for f in fields(Config) for value in other_values(f))], ids=str)
def test_the_loss_does_not_depend_on_the_split(options):
    """With each option of train.py, one at a time: those that an edit adds, too."""
    check_splits(objective.loss, Config(**options))


def top_tokens(entropy, weight, segment, length, of):
    """The tokens of the largest entropies: the top 20 % of a micro-batch, a row, or a response."""
    among = (weight > 0)[:, None, :] & {"micro-batch": segment[:, None, :] > 0, "row": segment[:, None, :] > 0,
                                        "response": segment[:, :, None] == segment[:, None, :]}[of]
    if of == "micro-batch":
        return entropy >= entropy[weight > 0].quantile(0.8)
    return ((entropy[:, :, None] < entropy[:, None, :]) & among).sum(2) < 0.2 * among.sum(2)


@pytest.mark.parametrize("of", ["micro-batch", "row", "response"])
def test_a_term_that_mixes_rows_is_found(of):
    def edited(cfg, **t):
        keep = top_tokens(t["entropy"], t["weight"], t["segment"], t["length"], of)
        return objective.loss(cfg, **{**t, "weight": t["weight"] * keep})
    if of == "response":
        return check_splits(edited, Config())
    with pytest.raises(AssertionError, match="differs: a row each" if of == "micro-batch" else "differs: split groups"):
        check_splits(edited, Config())


@pytest.mark.parametrize("edit", [
    lambda cfg, t: t["weight"] / t["weight"].sum(),                             # a mean over the micro-batch
    lambda cfg, t: t["weight"] * (t["advantage"] - t["advantage"].mean()),      # a baseline of it
    lambda cfg, t: t["weight"] / t["segment"].amax(1, keepdim=True)])           # over the responses of a row
def test_other_terms_that_mix_rows_are_found(edit):
    with pytest.raises(AssertionError, match="differs"):
        check_splits(lambda cfg, **t: objective.loss(cfg, **{**t, "weight": edit(cfg, t)}), Config())


# ---------------------------------------------------------------------------------------------------------------------
# The rivals

FAILED, SOLVED = (torch.tensor(r, dtype=torch.float64) for r in ([6, 4, 2, 0], [6, 7, 1, 4]))      # r(y) first


@pytest.mark.parametrize("method, failed, solved", [
    ("visurf", [3 / math.sqrt(20 / 3), 1 / math.sqrt(20 / 3), -1 / math.sqrt(20 / 3), -3 / math.sqrt(20 / 3)],
     [1.5 / math.sqrt(7), 2.5 / math.sqrt(7), -3.5 / math.sqrt(7), -0.5 / math.sqrt(7)]),       # squares add up to 21
    ("luffy", [3, 1, -1, -3], [1.5, 2.5, -3.5, -0.5]),
    ("hpt", [1, 0, 0, 0], [0, 3, -3, 0]),
    ("chord", [0.1, 0.9, 0, -0.9], [0.1, 0.9, -0.9, 0]),
    ("sgrpo", [3 / math.sqrt(20 / 3), 1 / math.sqrt(20 / 3), -1 / math.sqrt(20 / 3), -3 / math.sqrt(20 / 3)],
     [0, 1, -1, 0]),
    ("sum", [0.1, 1, 0, -1], [0.1, 1, -1, 0])])
def test_advantages_of_each_method_by_hand(method, failed, solved):
    for r, expected in ((FAILED, failed), (SOLVED, solved)):
        close(METHODS[method].advantages(Config(), r), expected)
    assert METHODS["rlvr"].advantages(Config(), SOLVED[1:]).tolist() == group_advantages(SOLVED[1:]).tolist()
    assert METHODS["sft"].advantages(Config(), SOLVED[:1]).tolist() == [1]


@pytest.mark.parametrize("method", ["sft", "hpt", "sum", "luffy", "chord"])
def test_the_term_of_y_has_the_weight_of_the_table(method):
    """The gradient of the gain by autograd is the weight that is claimed, at any p, and follows p to its limits."""
    logp = torch.linspace(-12, -1e-6, 50).requires_grad_()
    gain, weight = METHODS[method].token_of_y(logp, torch.full((50,), 2.0))
    close(torch.autograd.grad(gain.sum(), logp)[0], weight)
    p = logp.detach().exp()
    expected = {"luffy": 2 * 0.1 * p / (p + 0.1) ** 2, "chord": 2 * p * (1 - p)}.get(method, torch.full((50,), 2.0))
    close(weight, expected)
    if method in ("luffy", "chord"):        # an unlikely label gets nearly no pull, where SFT and ViSurf keep theirs
        assert weight[0] < 2e-4 * 2 and (method == "luffy" or weight[-1] < 1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("sft", "rlvr")])
@pytest.mark.parametrize("r", [FAILED, SOLVED])
def test_the_gradient_of_each_method_is_its_weights_on_separate_gradients(method, r):
    """Σ over tokens of (weight of the table) ∇log π, each token by its own autograd call; ρ = 1."""
    logits, prompt, responses = toy_logits(), [1, 2], [[3, 1], [0, 2, 4], [4], [2, 2]]
    a = METHODS[method].advantages(Config(), r)
    leaf = logits.clone().requires_grad_()
    logp, segment = toy_batch(leaf, [(prompt, responses)])
    loss = loss_of(logp, logp.detach(), per_token(a[None], segment), segment, "seq-sum", 4, method=method)
    found, = torch.autograd.grad(loss, leaf)
    expected = torch.zeros_like(logits)
    for s, response in enumerate(responses):
        for t in range(len(response)):
            leaf = logits.clone().requires_grad_()
            one = response_logp(leaf, prompt, response)[t]
            p, A = float(one.detach().exp()), float(a[s])
            weight = {"luffy": A * 0.1 * p / (p + 0.1) ** 2, "chord": A * p * (1 - p)}.get(method, A) if s == 0 else A
            expected -= weight * torch.autograd.grad(one, leaf)[0] / 4
    close(found, expected, 1e-10)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("method, failed, solved", [
    ("hpt", [1, 0, 0, 0], [0, 1, 1, 0]), ("chord", [1, 1, 0, 1], [1, 1, 1, 0]), ("sgrpo", [1, 1, 1, 1], [0, 1, 1, 0]),
    ("luffy", [1, 1, 1, 1], [1, 1, 1, 1])])
def test_each_method_leaves_out_what_it_does_not_move(method, failed, solved):
    for r, expected in ((FAILED, failed), (SOLVED, solved)):
        kept, _ = probe({"method": method}, METHODS[method].advantages(Config(), r), torch.arange(4) == 0)
        assert kept.int().tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is left out of the rows, and what is logged

ADVANTAGES = torch.tensor([0.0, 1.5, -0.5, 0.0, 1e-30, float("nan")])


@pytest.mark.parametrize("options, kept, by_entropy", [
    ({}, [0, 1, 1, 0, 1, 1], False), ({"clip": 0.0}, [0, 1, 1, 0, 1, 1], False), ({"kl": 1e-6}, [1] * 6, False),
    ({"entropy_bonus": 1e-6}, [1] * 6, True), ({"method": "sft"}, [0, 1, 1, 0, 1, 1], False), ({"method": "rlvr"}, [0, 1, 1, 0, 1, 1], False)])
def test_what_is_left_out_follows_from_the_loss(options, kept, by_entropy):
    found, needed = probe(options, ADVANTAGES, torch.arange(6) == 0, torch.zeros(6))
    assert found.tolist() == [bool(k) for k in kept] and needed is by_entropy


def test_a_new_term_keeps_what_it_moves(monkeypatch):
    """Whatever a term looks at: the reward, whether a response is y, a hinge on the entropy, all of a response."""
    def of_sequence(t):
        """GSPO's ratio: a sum for every segment, with a column for the prompt."""
        summed = torch.zeros_like(t["logp"]).scatter_add(1, t["segment"].clamp(min=0), t["logp"] - t["old_logp"])
        return (summed.gather(1, t["segment"].clamp(min=0)) / t["length"].clamp(min=1)).exp() * t["r"]
    plain = objective.loss
    terms = {"r": lambda t: t["r"] * t["logp"], "y": lambda t: t["is_y"] * t["logp"],
             "sequence": of_sequence, "truncated": lambda t: t["truncated"] * t["logp"],
             "hinge": lambda t: (0.5 - t["entropy"]).clamp(min=0), "unlikely": lambda t: (t["logp"] + 20).clamp(max=0)}
    found = {}
    for name, term in terms.items():
        monkeypatch.setattr(objective, "loss", lambda cfg, term=term, **t: (plain(cfg, **t)[0] + term(t).sum(), {}))
        kept, by_entropy = probe({}, torch.zeros(3), torch.tensor([True, False, False]), torch.tensor([0., 2., 0.]))
        found[name] = [*kept.tolist(), by_entropy]
    assert found == {"r": [False, True, False, False], "sequence": [False, True, False, False], "truncated": [False] * 4,
                     "y": [True, False, False, False],
                     "hinge": [True, True, True, True], "unlikely": [True, True, True, False]}


def test_what_is_logged_by_hand():
    """Two rows: y of two tokens and a rollout; a rollout that was clipped and, without y, one that was not."""
    segment = torch.tensor([[0, 1, 1, 2], [0, 2, 3, -1]])
    logp = torch.tensor([[9., -1., -2., -3.], [9., -1., -1., 9.]])
    sampled, old = logp + 0.25, logp.clone()
    old[1, 1] -= 1
    value, logged = call_loss(
        logp, segment, {"entropy_bonus": 0.5}, old_logp=old, ref_logp=None, sampled_logp=sampled, entropy=torch.full((2, 4), 2.),
        advantage=torch.tensor([[0., 3., 3., -1.], [0., 2., -2., 0.]]))
    close(value, -(3 + 3 - 1 + 1.2 * 2 - 2 + 5 * 0.5 * 2) / 5)
    assert logged["logp_y"].tolist() == [-3] and logged["clipped_y"].tolist() == [False, False]
    assert logged["clipped_rollouts"].tolist() == [False, True, False] and logged["rlvr_weight"] == 1 and logged["sft_weight"] == 6 / 5
    close(logged["logp_gap"], [0.25, 1.25, 0.25])       # to the policy that sampled, not to the one of this inner epoch
    assert torch.equal(logged["logp_gap_max"], logged["logp_gap"])
    close(logged["kl_sampler"], [math.exp(-gap) - 1 + gap for gap in (0.25, 1.25, 0.25)])
    entropy = torch.arange(8.0).reshape(2, 4)
    _, logged = call_loss(
        logp, segment, {"method": "sft"}, ref_logp=None, sampled_logp=sampled, entropy=entropy, advantage=(segment == 1).to(logp),
        weight=token_weight(segment, "token-mean") * (segment == 1), denominator=2)
    assert logged["entropy_y"].tolist() == [1, 2] and logged["logp_y"].tolist() == [-3] and len(logged) == 2


def test_the_worked_example():
    table = objective.worked_example({"a": (6.0, [4.0, 2.0, 2.0, 0.0]), "b": (6.0, [7.0, 7.0, 2.0, 0.0])})
    rows = [line.split() for line in table.splitlines()]
    assert ["luffy", "6.00", "3.20", "1.20", "-0.80", "-0.80", "-2.80", "0.264", "0.444", "0.267"] in rows
    assert ["visurf", "4.00", "0.00", "0.97", "0.97", "-0.65", "-1.30", "0.000", "0.000", "0.000"] in rows     # smoothed
    assert ["rlvr", "6.00", "0.00", "1.22", "0.00", "0.00", "-1.22", "0.000", "0.000", "0.000"] in rows
    assert [row[0] for row in rows].count("hpt") == 2


@pytest.mark.parametrize("flags, groups", [
    ([], {"failed": (6.0, [4.0, 2.0, 2.0, 0.0]), "half solved": (6.0, [7.0, 7.0, 2.0, 0.0]),
          "solved": (6.0, [7.0, 7.0, 7.0, 7.0])}),
    (["--r-y", "5", "--r-o", "1", "3.5"], {"your group": (5.0, [1.0, 3.5])})])
def test_the_worked_example_as_a_command(flags, groups, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objective.py", *flags])
    runpy.run_path(objective.__file__, run_name="__main__")
    assert capsys.readouterr().out == objective.worked_example(groups) + "\n"


def test_doctests():
    torch.set_default_dtype(torch.float32)  # as printed in the docstrings
    result = doctest.testmod(objective)
    assert result.failed == 0 and result.attempted >= 3


@pytest.mark.parametrize("flags", [["--r-o", "5"], ["--r-o", "5", "nan"], ["--r-y", "inf"]])
def test_rewards_that_make_no_group(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objective.py", *flags])
    with pytest.raises(SystemExit) as left:
        objective.main()
    assert left.value.code == 2 and "finite numbers, --r-o two or more" in capsys.readouterr().err
