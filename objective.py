"""The equations of ViSurf (arXiv 2510.10606), as pure functions on tensors. No state, no collectives, no `.item()`.

    code                  paper
    r          [B, S]     rewards of a group; with the label, r[:, 0] = r(y) and r[:, 1:] = r(o_1) … r(o_G)
    advantage  [B, S]     Â: Eq. 6 (rollouts) and Eq. 7 (y), normalised together over S = G+1 rewards
    ratio      [...]      ρ = π_θ / π_old, per token
    policy_loss           Eq. 8: −min(ρÂ, clip(ρ)Â), for rollouts and y alike
    logp, old_logp, ref_logp   log π of each response token under the policy, the policy that sampled, the reference

The four methods are four settings of one loss:
    sft      rows hold y            Â = 1        (cross-entropy; `sft_loss`)
    rlvr     rows hold o_1 … o_G    Â over G     (GRPO)
    visurf   rows hold y, o_1 … o_G Â over G+1, after reward control (rewards.py)
    two-stage: sft, then rlvr from its weights

Departures
    1. Probabilities are per token (as in every GRPO trainer); the paper writes them per sequence. With one update per
       batch ρ ≡ 1 and the gradient is the same: Σ_tokens Â ∇log π(token) = Â ∇log π(sequence).
    2. The paper leaves the length normalisation open: `token_weight` names three, "seq-sum" being Eq. 9 to the letter.
    3. A group whose std is below 1e-6 has advantage exactly 0; nothing is added to the std otherwise.
"""
import torch
from torch import Tensor

TIED = 1e-6  # a group with a smaller std says nothing about which response is better


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


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ρÂ, clip(ρ, 1−ε, 1+ε)Â), elementwise, with ρ = exp(logp − old_logp): the summand of Eq. 8.

    >>> clipped_surrogate(torch.tensor([1.5, 1.5]).log(), torch.zeros(2), torch.tensor([1., -1.]), clip=0.2)
    tensor([ 1.2000, -1.5000])
    """
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def is_clipped(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Whether a token's gradient is cut off by clipping: ρ > 1+ε with Â > 0, or ρ < 1−ε with Â < 0."""
    ratio = (logp - old_logp).exp()
    return ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(π_θ ‖ π_ref) from samples of π_θ: e^x − x − 1 with x = ref_logp − logp. Never negative.
    ViSurf drops the KL; it is here for the authors' earlier recipe (Seg-Zero)."""
    x = ref_logp - logp
    return x.exp() - x - 1


def token_weight(segment: Tensor, normaliser: str) -> Tensor:
    """How much each response token counts before the division by `denominator`. segment [B, T] → [B, T].

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
    # Number the stretches of one segment within the row: a row that was split off starts at a higher segment.
    stretch = segment.diff(dim=1, prepend=segment[:, :1]).ne(0).cumsum(1)                 # [B, T], < T
    length = torch.zeros_like(scored).scatter_add(1, stretch, torch.ones_like(scored))
    return scored / length.gather(1, stretch)


def denominator(tokens: int, responses: int, normaliser: str) -> int:
    """What the weighted sum is divided by: counted over all micro-batches and ranks, before the first backward."""
    return tokens if normaliser == "token-mean" else responses


def per_token(advantage: Tensor, segment: Tensor) -> Tensor:
    """Hands each response token its response's advantage, and 0 to the prompt and to padding.
    advantage [B, S], segment [B, T] (s+1 for response s) → [B, T].

    >>> per_token(torch.tensor([[2., -1.]]), torch.tensor([[0, 1, 2, 2, -1]]))
    tensor([[ 0.,  2., -1., -1.,  0.]])
    """
    return advantage.gather(1, (segment - 1).clamp(min=0)) * (segment > 0)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, denominator: int,
                clip: float = 0.2) -> Tensor:
    """Eq. 8 (ViSurf; GRPO when y is not among the rows), summed over the rows given. All arguments [B, T].

    Sums over micro-batches and ranks add up to the loss of the whole batch, as long as all use the same denominator.
    """
    return -(weight * clipped_surrogate(logp, old_logp, advantage, clip)).sum() / denominator


def sft_loss(logp: Tensor, weight: Tensor, denominator: int) -> Tensor:
    """L_SFT = −log π(y): the cross-entropy. Its gradient is policy_loss's with Â = 1 and ρ = 1."""
    return -(weight * logp).sum() / denominator


def kl_loss(logp: Tensor, ref_logp: Tensor, weight: Tensor, denominator: int) -> Tensor:
    """Σ weight · k3 / denominator, to be scaled by β and added to policy_loss."""
    return (weight * kl_k3(logp, ref_logp)).sum() / denominator
