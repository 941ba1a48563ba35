"""The equations of ViSurf (arXiv 2510.10606), as pure functions on tensors. No state, no collectives; the loss waits
for no number from the device.

    python objective.py [--r-y 6 --r-o 5 5 1]      what each method makes of a group's rewards

Glossary
    r          [B, S]     rewards of a group; with the label, r[:, 0] = r(y) and r[:, 1:] = r(o_1) … r(o_G)
    advantage             Â: Eq. 6 (rollouts) and Eq. 7 (y), normalised together over S = G+1 rewards
    logp, old_logp, ref_logp   log π of each response token under the policy, the policy that sampled, the reference
    ratio                 ρ = π_θ / π_old, per token
    loss                  Eq. 8: −min(ρÂ, clip(ρ)Â), for rollouts and y alike, and every other term: edit it there

The methods are settings of one loss. A token of y, of probability p, has this weight on its ∇log π:
    sft      y alone                1             (cross-entropy)
    rlvr     o_1 … o_G              –             Â over G (GRPO)
    visurf   y, o_1 … o_G           Â_y           Â over G+1, after reward control (rewards.py)
    luffy    y, o_1 … o_G           Â_y γp/(p+γ)² γ = 0.1, Â = r − mean R over G+1. arXiv 2504.14945;
                                                  ElliottYan/LUFFY, luffy/verl/verl/mix_src/mix_core_alg.py
    hpt      y or o_1 … o_G         1             y where the group fails, else Â = r − mean R over G:
                                                  TsinghuaC3I/Unify-Post-Training, hpt/verl/verl/mix_src/mix_trainer.py
    chord    y, o_1 … o_G           μ p(1−p)      (1−μ) Â over G: CHORD-φ, arXiv 2508.11408; modelscope/Trinity-RFT,
                                                  trinity/algorithm/policy_loss_fn/chord_policy_loss.py
    sgrpo    y, o_1 … o_G           Â_y           over G+1 where the group fails, else over G: S-GRPO, arXiv 2604.16557
    sum      y, o_1 … o_G           λ             Â over G: SFT and RLVR added up
    two-stage: sft, then rlvr from its weights
A group fails if no rollout is as good as y, max r(o) < r(y): the test of control 3. μ and λ are --label-weight. Control
3 itself is ViSurf's alone. Learning rate, entropy bonus and length normalisation are the same for all methods, and
y and the rollouts share one denominator; CHORD takes a mean over each of the two.

Departures
    1. Probabilities are per token (as in every GRPO trainer); the paper writes them per sequence. With one update per
       batch ρ ≡ 1 and the gradient is the same: Σ_tokens Â ∇log π(token) = Â ∇log π(sequence).
    2. The paper leaves the length normalisation open: `token_weight` names three, "seq-sum" being Eq. 9 to the letter.
    3. A group whose std is below 1e-6 has advantage exactly 0; nothing is added to the std otherwise.
"""
import argparse
import math
import types

import torch
from torch import Tensor

METHODS = ("visurf", "rlvr", "sft", "luffy", "hpt", "chord", "sgrpo", "sum")
LUFFY_GAMMA = 0.1
TIED = 1e-6  # a group with a smaller std says nothing about which response is better


def loss(cfg, *, logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, sampled_logp: Tensor, entropy: Tensor,
         advantage: Tensor, reward: Tensor, segment: Tensor, is_y: Tensor, weight: Tensor, denominator: int
         ) -> tuple[Tensor, dict[str, Tensor]]:
    """What is minimised, summed over the rows given, and what is logged of it. A new term is a line here.

    cfg            the options of train.py
    logp, entropy  log π of each token, and the entropy of the distribution it was taken from, both with a gradient
    old_logp       under the policy that sampled, with y too; with one inner epoch logp itself, detached (ρ ≡ 1)
    ref_logp       under the frozen initial model; None without --kl
    sampled_logp   of the rollouts, as recorded while sampling; NaN for y
    advantage, reward   Â and r (after the controls) of the response that a token belongs to
    segment        0 prompt, 1, 2, … the responses of a row, −1 padding; is_y: whether the response is y
    weight, denominator   the length normalisation: a token counts weight / denominator (`token_weight`, `divisor`)
    All are [B, T], and weigh 0 outside the responses. The losses of all micro-batches and ranks add up to the batch's.

    Logged: a tensor of no dimension is added up over micro-batches and ranks, of any other the mean of all elements is
    taken. A name that is new here reaches metrics.jsonl and curves.png by itself.
    """
    gain, cut = clipped_surrogate(logp, old_logp, advantage, cfg.clip, cfg.clip_high or cfg.clip)
    gain_y, weight_y = label_term(cfg.method, logp, advantage)
    if gain_y is not None:
        gain, cut = torch.where(is_y, gain_y, gain), cut & ~is_y
    if cfg.kl:
        gain = gain - cfg.kl * kl_k3(logp, ref_logp)
    if cfg.entropy_bonus:
        gain = gain + cfg.entropy_bonus * entropy
    with torch.no_grad():
        y, rollouts = (weight > 0) & is_y, (weight > 0) & ~is_y
        logged = {"logp_y": (logp * y).sum(1)[y.any(1)]}
        if cfg.method == "sft":
            logged["entropy"] = entropy[y]
        else:
            size = (weight * torch.where(is_y, weight_y, advantage).abs()).double() / denominator   # of Eq. 9's terms
            logged |= {"logp_gap": (logp - sampled_logp).abs()[rollouts],
                       "rlvr_weight": size[rollouts].sum(), "sft_weight": size[y].sum(),
                       "clipped_rollouts": cut[rollouts], "clipped_y": cut[y]}
    return -(weight * gain).sum() / denominator, logged


def trained_on(cfg, advantage: Tensor, reward: Tensor, is_y: Tensor) -> tuple[Tensor, bool]:
    """Which responses `loss` trains on, and whether it needs the gradient of the entropy: found out by trying it. Each
    response stands for one token, at log-probs from near 0 to −30, ratios from e⁻² to e² and entropies from 0 to 10;
    where the gradient is exactly 0 at all of them the response is left out of the rows. With the surrogate alone that
    is where Â = 0: y once it is smoothed, and all of a tied group. Any term that moves them keeps them.

    advantage, reward, is_y [N] of N responses → bool [N], bool.
    """
    K, N = 5 * 5 * 3, len(advantage)
    logp, change, entropy = torch.cartesian_prod(
        torch.tensor([-1e-3, -0.1, -1.0, -5.0, -30.0]), torch.tensor([0.0, 0.1, -0.1, 2.0, -2.0]),
        torch.tensor([1e-3, 1.0, 10.0])).to(advantage)[:, :, None].expand(K, 3, N).unbind(1)      # [K, N] each
    logp, entropy = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    old_logp = (logp - change).detach()
    row = {"segment": torch.arange(1, N + 1), "advantage": advantage, "reward": reward, "is_y": is_y}
    total, _ = loss(cfg, logp=logp, old_logp=old_logp, ref_logp=old_logp, sampled_logp=old_logp, entropy=entropy,
                    weight=torch.ones_like(logp), denominator=1, **{name: x.expand(K, N) for name, x in row.items()})
    by_logp, by_entropy = torch.autograd.grad(total, (logp, entropy), allow_unused=True, materialize_grads=True)
    return ((by_logp != 0) | (by_entropy != 0)).any(0), bool((by_entropy != 0).any())


def advantages(cfg, r: Tensor) -> Tensor:
    """The advantages of a group by --method; for y of chord, hpt and sum the constant weight of its term. r [S], r(y)
    first unless the method is rlvr."""
    y, o = r[:1], r[1:]
    fails = bool(o.max() < y) if cfg.method in ("hpt", "sgrpo") else None
    if cfg.method == "luffy":
        return group_advantages(r, "none")
    if cfg.method == "hpt":
        return torch.cat((torch.full_like(y, fails), torch.zeros_like(o) if fails else group_advantages(o, "none")))
    if cfg.method == "chord":
        return torch.cat((torch.full_like(y, cfg.label_weight), (1 - cfg.label_weight) * group_advantages(o, cfg.std)))
    if cfg.method == "sum":
        return torch.cat((torch.full_like(y, cfg.label_weight), group_advantages(o, cfg.std)))
    if cfg.method == "sgrpo" and not fails:
        return torch.cat((torch.zeros_like(y), group_advantages(o, cfg.std)))
    return group_advantages(r, cfg.std)         # visurf, rlvr


def group_advantages(r: Tensor, std: str = "sample") -> Tensor:
    """Eq. 6 and 7 (and GRPO's, over rollouts only): Â = (r − mean R) / std R over the last dimension.

    r [..., S] → [..., S]. std: "sample" (divides by S−1), "population" (by S), "none" (Â = r − mean R).

    >>> group_advantages(torch.tensor([6., 2., 2., 2.]), "population")
    tensor([ 1.7321, -0.5774, -0.5774, -0.5774])
    """
    centred = r - r.mean(-1, keepdim=True)
    if std not in ("sample", "population", "none"):
        raise ValueError(f"std is {std!r}; it must be sample, population or none")
    deviation = r.std(-1, correction=1 if std == "sample" else 0, keepdim=True)
    scaled = centred if std == "none" else centred / deviation.clamp(min=TIED)
    return torch.where(deviation < TIED, torch.zeros_like(r), scaled)


def label_term(method: str, logp: Tensor, advantage: Tensor) -> tuple[Tensor | None, Tensor]:
    """What a token of y of probability p = exp(logp) adds to the gain where that is not the surrogate (then None), and
    the weight that ∇log π has in it; elementwise. See the table at the top.

    >>> label_term("luffy", torch.tensor([0.1]).log(), torch.tensor([2.]))[1]
    tensor([0.5000])
    """
    p = logp.exp()
    if method == "luffy":
        return advantage * p / (p + LUFFY_GAMMA), advantage * LUFFY_GAMMA * p / (p + LUFFY_GAMMA) ** 2
    if method == "chord":
        weight = (advantage * p * (1 - p)).detach()
        return weight * logp, weight
    if method in ("sft", "hpt", "sum"):
        return advantage * logp, advantage
    return None, advantage


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float
                      ) -> tuple[Tensor, Tensor]:
    """min(ρÂ, clip(ρ, 1−ε_low, 1+ε_high)Â), elementwise, with ρ = exp(logp − old_logp): the summand of Eq. 8; and
    whether the clip cuts the gradient off (ρ > 1+ε_high with Â > 0, or ρ < 1−ε_low with Â < 0).

    >>> clipped_surrogate(torch.tensor([1.5, 1.5]).log(), torch.zeros(2), torch.tensor([1., -1.]), 0.2, 0.2)
    (tensor([ 1.2000, -1.5000]), tensor([ True, False]))
    """
    ratio = (logp - old_logp).exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(free, bounded), bounded < free


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(π_θ ‖ π_ref) from samples of π_θ: e^x − x − 1 with x = ref_logp − logp. Never negative.
    ViSurf drops the KL; it is here for the authors' earlier recipe (Seg-Zero)."""
    x = ref_logp - logp
    return x.exp() - x - 1


def token_weight(segment: Tensor, normaliser: str) -> Tensor:
    """How much each response token counts before the division by `divisor`. segment [B, T] → [B, T].

        token-mean  every token 1                        / number of tokens
        seq-mean    a token of a response o: 1/|o|       / number of responses
        seq-sum     every token 1  (Eq. 8 and 9)         / number of responses

    >>> token_weight(torch.tensor([[0, 1, 1, 2, -1]]), "seq-mean")
    tensor([[0.0000, 0.5000, 0.5000, 1.0000, 0.0000]])
    """
    if normaliser not in ("token-mean", "seq-mean", "seq-sum"):
        raise ValueError(f"the normaliser is {normaliser!r}; it must be token-mean, seq-mean or seq-sum")
    scored = (segment > 0).to(torch.get_default_dtype())
    if normaliser != "seq-mean":
        return scored
    number = segment.clamp(min=0)
    length = torch.zeros_like(scored).scatter_add(1, number, scored)      # [B, T]: of response number 0, 1, 2, … < T
    return scored / length.gather(1, number).clamp(min=1)


def divisor(tokens: int, responses: int, normaliser: str) -> int:
    """The loss's denominator: counted over all micro-batches and ranks, before the first backward."""
    return tokens if normaliser == "token-mean" else responses


def worked_example(groups: dict[str, tuple[float, list[float]]]) -> str:
    """Of each group (r(y), r(o_1) … r(o_G)) and method: r(y) after control 3, the advantages, and the weight that
    ∇log π has for a token of y, at three probabilities of it."""
    from rewards import smooth
    lines = []
    for title, (r_y, r_o) in groups.items():
        lines += [f"{title}: r(y) = {r_y:g}, r(o) = {', '.join(f'{r:g}' for r in r_o)}",
                  f"  {'':8}{'r(y)':>6}{'Â_y':>8}   {'Â_o':<{7 * len(r_o)}}   weight of y at p = 0.01, 0.5, 0.99"]
        for method in METHODS:
            cfg = types.SimpleNamespace(method=method, std="sample", label_weight=0.1)
            r = torch.tensor([smooth(r_y, r_o)[0] if method == "visurf" else r_y, *r_o], dtype=torch.float64)
            if method == "sft":
                a = torch.ones(1)
            elif method == "rlvr":
                a = torch.cat((torch.zeros(1), advantages(cfg, r[1:])))
            else:
                a = advantages(cfg, r)
            _, weight = label_term(method, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64).log(), a[0])
            shown_o = "".join(f"{x:>7.2f}" for x in a[1:].tolist())
            lines.append(f"  {method:8}{float(r[0]):>6.2f}{float(a[0]):>8.2f}   {shown_o:<{7 * len(r_o)}}   "
                         + "".join(f"{x:>7.3f}" for x in weight.expand(3).tolist()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each method makes of a group's rewards.")
    parser.add_argument("--r-y", type=float, default=6.0, help="reward of the label")
    parser.add_argument("--r-o", type=float, nargs="+", help="rewards of the rollouts, two or more")
    given = parser.parse_args()
    if given.r_o and len(given.r_o) < 2 or not all(map(math.isfinite, [given.r_y, *(given.r_o or [])])):
        parser.error("--r-y and --r-o take finite numbers, --r-o two or more: of a single one there is no spread")
    print(worked_example({"your group": (given.r_y, given.r_o)} if given.r_o else {
        "failed": (given.r_y, [4.0, 2.0, 2.0, 0.0]), "half solved": (given.r_y, [7.0, 7.0, 2.0, 0.0]),
        "solved": (given.r_y, [7.0, 7.0, 7.0, 7.0])}))


if __name__ == "__main__":
    from support.mistakes import run_main
    run_main(main)
