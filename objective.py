"""The equations of ViSurf (arXiv 2510.10606), as pure functions on tensors, without state and
without collectives.

    python objective.py [--r-y 6 --r-o 5 5 1]      what each method makes of a group's rewards

Glossary
    r [S]      rewards of a group; with the label r[0] = r(y), r[1:] = r(o_1) … r(o_G)
    advantage  Â: Eq. 6 (rollouts) and Eq. 7 (y), normalised together over S = G+1 rewards
    logp, old_logp, ref_logp   log π of each response token under the policy, the policy that
               sampled, the reference
    ratio      ρ = π_θ / π_old, per token
    loss       Eq. 8: −min(ρÂ, clip(ρ)Â), for rollouts and y alike, and every other term: edit it
               there
    METHODS    ViSurf and its rivals, as records: settings of the one loss

All methods have the same learning rate, entropy bonus and length normalisation. y and the rollouts
share one denominator; the published CHORD divides the sum of each by its own number of tokens.

Departures
    1. Probabilities are per token (as in every GRPO trainer); the paper writes them per sequence.
       With one update per batch ρ ≡ 1 and the gradient is the same: Σ_tokens Â ∇log π(token) =
       Â ∇log π(sequence).
    2. The paper leaves the length normalisation open: `token_weight` names three, "seq-sum" being
       Eq. 9 to the letter.
    3. A group whose std is below 1e-6 has advantage exactly 0; else nothing is added to the std.
"""
import argparse
import math
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TIED = 1e-6  # a group with a smaller std says nothing about which response is better


def loss(cfg, *, logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, sampled_logp: Tensor,
         entropy: Tensor, advantage: Tensor, r: Tensor, length: Tensor, truncated: Tensor,
         is_y: Tensor, group: Tensor, segment: Tensor, weight: Tensor, denominator: int,
         tokens: int, responses: int, step: int, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns what is minimised, summed over the rows given, and what is logged of it. A new term
    is a line here. Those that are here do not use r, length, truncated, group, segment,
    tokens, responses, step and steps.

    cfg            the options of train.py
    logp, entropy  log π of each token, and the entropy of the distribution it was taken from; both
                   with a gradient, the entropy only if the loss depends on it
    old_logp       under the policy that sampled, y's too; with one inner epoch it is logp, detached
                   (ρ ≡ 1)
    ref_logp       under the frozen initial model; None without --kl
    sampled_logp   of the rollouts, as recorded while sampling; NaN for y
    weight, denominator    the length normalisation: a token counts weight / denominator
                   (`token_weight`, `divisor`); the weight is 0 outside the responses

    Of the response that a token belongs to, 0 outside the responses:
    advantage, r           Â, and r after the controls
    length, truncated      its number of tokens; whether --max-new-tokens cut it off
    is_y           whether it is y

    segment        0 prompt, 1, 2, … the responses of a row, −1 padding
    group          the number of the group, another in every step: the place of its prompt in the
                   endless sequence of examples. A group may be split over several rows
    tokens, responses      how many there are in this step's batch, over all ranks
    step, steps    how many steps came before this one; how many the run has

    All tensors are [B, T]. The losses of all micro-batches and ranks add up to the batch's. So no
    term may mix rows, by a mean over them or by a comparison of their tokens, unless it says so:
    pytest tests/test_objective.py -k split finds one that does. Responses without any gradient are
    left out of the rows; support/probe.py finds them by trying this function.

    Logged: a tensor of no dimension is added up over micro-batches and ranks, of any other the mean
    of all elements is taken, or the largest if its name ends in _max. A name that is new here
    reaches metrics.jsonl and curves.png.
    """
    method, weight_y = METHODS[cfg.method], advantage
    gain, cut = clipped_surrogate(logp, old_logp, advantage, cfg.clip, cfg.clip_high or cfg.clip)
    if method.token_of_y:
        gain_y, weight_y = method.token_of_y(logp, advantage)
        gain, cut = torch.where(is_y, gain_y, gain), cut & ~is_y
    if cfg.kl:
        gain = gain - cfg.kl * kl_k3(logp, ref_logp)
    if cfg.entropy_bonus:
        gain = gain + cfg.entropy_bonus * entropy
    logged = logged_of_loss(method, logp=logp, old_logp=old_logp, sampled_logp=sampled_logp, entropy=entropy,
                            pull=torch.where(is_y, weight_y, advantage), cut=cut, is_y=is_y,
                            weight=weight, denominator=denominator)
    return -(weight * gain).sum() / denominator, logged


@torch.no_grad()
def logged_of_loss(method: "Method", *, logp: Tensor, old_logp: Tensor, sampled_logp: Tensor,
                   entropy: Tensor, pull: Tensor, cut: Tensor, is_y: Tensor, weight: Tensor, denominator: int
                   ) -> dict[str, Tensor]:
    """Returns what docs/logged.md says of a step's loss. pull: what weighs a token's ∇log π, its Â
    unless a rival weighs y in another way. cut: whether the clip cuts its gradient off."""
    y, rollouts = (weight > 0) & is_y, (weight > 0) & ~is_y
    logp_y = (logp * y).sum(1)[y.any(1)]
    if not method.rollouts:
        return {"logp_y": logp_y, "entropy_y": entropy[y]}
    size = (weight * pull.abs()).double() / denominator    # of the two terms of Eq. 9
    gap = (old_logp - sampled_logp)[rollouts]
    return {"logp_y": logp_y, "logp_gap": gap.abs(), "logp_gap_max": gap.abs(),
            "kl_sampler": kl_k3(torch.zeros_like(gap), gap),
            "rlvr_weight": size[rollouts].sum(), "sft_weight": size[y].sum(),
            "clipped_rollouts": cut[rollouts], "clipped_y": cut[y]}


def group_advantages(r: Tensor, std: str = "sample") -> Tensor:
    """Returns Eq. 6 and 7, or GRPO's of rollouts only: Â = (r − mean R) / std R.

    r [..., S] → [..., S]. std: "sample" divides by S−1, "population" by S, "none" by nothing.

    >>> group_advantages(torch.tensor([6., 2., 2., 2.]), "population")
    tensor([ 1.7321, -0.5774, -0.5774, -0.5774])
    """
    centred = r - r.mean(-1, keepdim=True)
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std is {std!r}; it must be sample, population or none")
    deviation = r.std(-1, correction=1 if std == "sample" else 0, keepdim=True)
    scaled = centred if std == "none" else centred / deviation.clamp(min=TIED)
    return torch.where(deviation < TIED, torch.zeros_like(r), scaled)


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float
                      ) -> tuple[Tensor, Tensor]:
    """Returns the summand of Eq. 8, min(ρÂ, clip(ρ, 1−low, 1+high)Â), ρ = exp(logp − old_logp), and
    whether the clip cuts the gradient off: ρ > 1+high with Â > 0, or ρ < 1−low with Â < 0.

    >>> logp, advantage = torch.tensor([1.5, 1.5]).log(), torch.tensor([1., -1.])
    >>> clipped_surrogate(logp, torch.zeros(2), advantage, 0.2, 0.2)
    (tensor([ 1.2000, -1.5000]), tensor([ True, False]))
    """
    ratio = (logp - old_logp).exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(free, bounded), bounded < free


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Returns the k3 estimate of KL(π_θ ‖ π_ref) from samples of π_θ: e^x − x − 1 with
    x = ref_logp − logp. It is never negative. ViSurf drops the KL; it is here for the authors'
    earlier recipe (Seg-Zero)."""
    x = ref_logp - logp
    return x.exp() - x - 1


def token_weight(segment: Tensor, normaliser: str) -> Tensor:
    """Returns how much each token counts before the division by `divisor`. segment [B, T] → [B, T].

        token-mean  every token 1                        / number of tokens
        seq-mean    a token of a response o: 1/|o|       / number of responses
        seq-sum     every token 1  (Eq. 8 and 9)         / number of responses

    >>> token_weight(torch.tensor([[0, 1, 1, 2, -1]]), "seq-mean")
    tensor([[0.0000, 0.5000, 0.5000, 1.0000, 0.0000]])
    """
    if normaliser not in ("token-mean", "seq-mean", "seq-sum"):
        raise ValueError(f"the normaliser is {normaliser!r}; it must be token-mean, seq-mean or "
                         "seq-sum")
    scored = (segment > 0).to(torch.get_default_dtype())
    if normaliser != "seq-mean":
        return scored
    number = segment.clamp(min=0)
    # [B, T]: the length of response number 0, 1, 2, … < T
    length = torch.zeros_like(scored).scatter_add(1, number, scored)
    return scored / length.gather(1, number).clamp(min=1)


def divisor(tokens: int, responses: int, normaliser: str) -> int:
    """Returns the loss's denominator, from counts over all micro-batches and ranks."""
    return tokens if normaliser == "token-mean" else responses


# --------------------------------------------------------------------------------------------------
# The methods

LUFFY_GAMMA = 0.1
CHORD_MU = 0.1
SUM_LAMBDA = 0.1


@dataclass(frozen=True)
class Method:
    """Holds all in which one method differs from another."""
    text: str                   # what it is, and where it is from
    advantages: Callable[..., Tensor]       # (options, r [S]) → Â [S], y's first
    y: bool = True              # whether y is trained on
    rollouts: bool = True       # whether o_1 … o_G are trained on
    smooths: bool = False       # whether control 3 applies (rewards.py)
    # (log p, Â) of a token of y → its gain, the weight of its ∇log π. None: as a rollout's token
    token_of_y: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def failed(r: Tensor) -> bool:
    """Returns whether no rollout is as good as y: the test of control 3."""
    return bool(r[1:].max() < r[0])


def beside(a_y: float, a_o: Tensor) -> Tensor:
    """Returns the advantages of rollouts with that of y before them."""
    return torch.cat((a_o.new_full((1,), a_y), a_o))


def cross_entropy(logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p, Â times, and its weight, which is Â."""
    return advantage * logp, advantage


def luffy_token(logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Â p/(p+γ) and its derivative by log p, Â γp/(p+γ)².

    >>> luffy_token(torch.tensor([0.1]).log(), torch.tensor([2.]))[1]
    tensor([0.5000])
    """
    p = logp.exp()
    return advantage * p / (p + LUFFY_GAMMA), advantage * LUFFY_GAMMA * p / (p + LUFFY_GAMMA) ** 2


def chord_token(logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gain of weight Â p(1−p), and that weight, held fixed while differentiating."""
    p = logp.exp()
    weight = (advantage * p * (1 - p)).detach()
    return weight * logp, weight


# Where the weight of y is a constant, it stands as y's advantage.
METHODS = {
    "visurf": Method(
        text="Eq. 6 to 8: Â over G+1 rewards, after control 3",
        advantages=lambda cfg, r: group_advantages(r, cfg.std), smooths=True),
    "rlvr": Method(
        text="GRPO: Â over the G rollouts, without y",
        advantages=lambda cfg, r: group_advantages(r, cfg.std), y=False),
    "sft": Method(
        text="cross-entropy of y; the two-stage recipe is sft, then rlvr from its weights",
        advantages=lambda cfg, r: torch.ones_like(r), token_of_y=cross_entropy, rollouts=False),
    "luffy": Method(
        text="Â = r − mean R over G+1; a token of y weighs Â γp/(p+γ)², γ = 0.1: arXiv 2504.14945; "
             "ElliottYan/LUFFY, luffy/verl/verl/mix_src/mix_core_alg.py",
        advantages=lambda cfg, r: group_advantages(r, "none"), token_of_y=luffy_token),
    "hpt": Method(
        text="cross-entropy of y where the group fails, else Â = r − mean R over G: "
             "TsinghuaC3I/Unify-Post-Training, hpt/verl/verl/mix_src/mix_trainer.py",
        advantages=lambda cfg, r: beside(1, torch.zeros_like(r[1:])) if failed(r)
        else beside(0, group_advantages(r[1:], "none")), token_of_y=cross_entropy),
    "chord": Method(
        text="a token of y weighs μ p(1−p), and (1−μ) Â over G, μ = 0.1: CHORD-φ, arXiv 2508.11408; "
             "modelscope/Trinity-RFT, trinity/algorithm/policy_loss_fn/chord_policy_loss.py",
        advantages=lambda cfg, r: beside(
            CHORD_MU, (1 - CHORD_MU) * group_advantages(r[1:], cfg.std)),
        token_of_y=chord_token),
    "sgrpo": Method(
        text="Â over G+1 where the group fails, else over G: S-GRPO, arXiv 2604.16557",
        advantages=lambda cfg, r: group_advantages(r, cfg.std) if failed(r)
        else beside(0, group_advantages(r[1:], cfg.std))),
    "sum": Method(
        text="λ = 0.1 times the cross-entropy of y, and Â over G: SFT and RLVR added up",
        advantages=lambda cfg, r: beside(SUM_LAMBDA, group_advantages(r[1:], cfg.std)),
        token_of_y=cross_entropy),
}


def worked_example(groups: dict[str, tuple[float, list[float]]]) -> str:
    """Returns a table for each group, (r(y), r(o_1) … r(o_G)), with a line a method: r(y) after
    control 3, the advantages, and the weight of ∇log π of a token of y, at three probabilities."""
    from rewards import smooth
    cfg = types.SimpleNamespace(std="sample")
    log_p = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64).log()
    lines = []
    for title, (r_y, r_o) in groups.items():
        lines += [f"{title}: r(y) = {r_y:g}, r(o) = {', '.join(f'{r:g}' for r in r_o)}",
                  f"  {'':8}{'r(y)':>6}{'Â_y':>8}   {'Â_o':<{7 * len(r_o)}}"
                  "   weight of y at p = 0.01, 0.5, 0.99"]
        for name, method in METHODS.items():
            own_y = smooth(r_y, r_o)[0] if method.smooths else r_y
            r = torch.tensor([own_y, *r_o], dtype=torch.float64)
            a = method.advantages(cfg, r[0 if method.y else 1:None if method.rollouts else 1])
            a = a if method.y else beside(0, a)
            weight = method.token_of_y(log_p, a[0])[1] if method.token_of_y else a[0]
            shown_o = "".join(f"{x:>7.2f}" for x in a[1:].tolist())
            shown_weights = "".join(f"{x:>7.3f}" for x in weight.expand(3).tolist())
            lines.append(f"  {name:8}{own_y:>6.2f}{float(a[0]):>8.2f}   "
                         f"{shown_o:<{7 * len(r_o)}}   {shown_weights}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What each method makes of a group's rewards.",
        epilog="\n".join(f"{name:8}{method.text}" for name, method in METHODS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r-y", type=float, default=6.0, help="reward of the label")
    parser.add_argument("--r-o", type=float, nargs="+", help="rewards of the rollouts, two or more")
    given = parser.parse_args()
    numbers = [given.r_y, *(given.r_o or [])]
    if len(numbers) == 2 or not all(map(math.isfinite, numbers)):
        parser.error("--r-y and --r-o take finite numbers, --r-o two or more: of a single one "
                     "there is no spread")
    print(worked_example({"your group": (given.r_y, given.r_o)} if given.r_o else {
        "failed": (given.r_y, [4.0, 2.0, 2.0, 0.0]), "half solved": (given.r_y, [7.0, 7.0, 2.0, 0.0]),
        "solved": (given.r_y, [7.0, 7.0, 7.0, 7.0])}))


if __name__ == "__main__":
    from support.mistakes import run_main
    run_main(main)
