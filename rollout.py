"""o_1 … o_G ~ π_old(· | v, t) of the paper: sampling with a KV cache, G rollouts of each prompt from
one prefill.

    prefill           the prompts once, with their images; G rollouts share their keys and values
    sample            one token a rollout from softmax(logits / T), or the likeliest
    decode_one_token  one step of all rollouts
    generate          the three in turn, until every rollout has ended

Glossary
    B  prompts, G  rollouts of each, P  prompt tokens, R  response tokens, D  width, V  vocabulary
    B', G'     prompts in the batch, and rollouts of each, once others have left; M = B'·G'
    place      the number of a prompt in the endless sequence of examples
    suffix     the tokens that a rollout has so far

A prompt gets the same rollouts in any batch and on any rank, and new ones each time it recurs, even
within a step: its uniform numbers are seeded by (seed, place), see `uniforms`. Only a temperature
shapes the distribution (no top-k, no top-p), so the log-probs returned are those of the training
forward.

A prompt leaves the batch when all its rollouts have ended. The others shrink together, to the
largest number still running in any of them. On a GPU both wait until half of the batch has ended.
"""
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from data import Prompt, Response, collate_images
from model import Qwen2_5_VL, for_each_query_head, row_mask
from support.draw import draw
from support.graphs import GraphedStep, when_to_leave, wide_product
from support.joined import joined_products
from support.mistakes import Mistake, Stopped
from support.onednn import packed_weights


class KVCache:
    """Holds keys and values while sampling. A prompt's are stored once and shared by its rollouts,
    never copied. Each rollout owns only those of its suffix.

    prompt[layer]   (k, v) [B, K, P, d]; k is already rotated
    suffix[layer]   (k, v) [B, K, G, R, d]
    padding         [B, P], True where a prompt has ended
    hidden          [B, 1, 1, 1, P + window], −∞ for keys that a token does not see, otherwise 0

    A step writes to `slot` of the suffix, a tensor [1] that it then counts up. It reads the first
    `window` slots, some of which may not be written yet. A step's shapes therefore depend on window
    alone, and a CUDA graph of it can be replayed (support/graphs.py).

    Scores are float32 as in scaled_dot_product_attention. Real keys share a large offset. The
    softmax cancels it, but not the rounding error that bfloat16 makes at that size.
    """
    def __init__(self, layers: int, G: int, max_new_tokens: int, prompt_mask: Tensor):
        """prompt_mask: bool [B, P], False at padding."""
        self.prompt: list = [None] * layers
        self.suffix: list = [None] * layers
        self.padding, self.hidden = ~prompt_mask, torch.empty(0)
        self.G, self.max_new_tokens, self.window = G, max_new_tokens, 0
        self.slot = torch.zeros(1, dtype=torch.long, device=prompt_mask.device)

    def hide(self) -> None:
        """Hides padding, and the slots after the one that is written next."""
        unwritten = torch.arange(self.window, device=self.slot.device) > self.slot
        hidden = torch.cat((self.padding, unwritten.expand(len(self.padding), -1)), 1)
        self.hidden = torch.zeros(hidden.shape, device=hidden.device).masked_fill(
            hidden, -torch.inf)[:, None, None, None]

    def attend_prompt(self, mask: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends within the prompts, and stores k and v: mask bool [B, 1, P, P], q [B, H, P, d],
        k, v [B, K, P, d] → [B, H, P, d]."""
        B, K, _, d = k.shape
        self.prompt[layer] = k.contiguous(), v.contiguous()     # or every token would copy them
        self.suffix[layer] = tuple(x.new_zeros(B, K, self.G, self.max_new_tokens, d)
                                   for x in (k, v))
        return F.scaled_dot_product_attention(q, *for_each_query_head(q, k, v), mask)

    def attend_token(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends from one new token of each rollout: q [B·G, H, 1, d], k, v [B·G, K, 1, d]
        → [B·G, H, 1, d]. The G·H/K queries that read one key head of one prompt are one matrix, so
        that the prompt's keys are read once.
        """
        (prompt_k, prompt_v), (suffix_k, suffix_v) = self.prompt[layer], self.suffix[layer]
        for suffix, new in ((suffix_k, k), (suffix_v, v)):
            new = rearrange(new, "(b g) k 1 d -> b k g 1 d", g=self.G)
            suffix.index_copy_(3, self.slot, new)
        own_k = suffix_k[:, :, :, :self.window]                                 # [B, K, G, r, d]
        own_v = suffix_v[:, :, :, :self.window]
        q = rearrange(q, "(b g) (k j) 1 d -> b k g j d", g=self.G, k=k.shape[1]).contiguous()
        shared = wide_product(q.flatten(2, 3), prompt_k.mT)                     # [B, K, G·H/K, P]
        own = wide_product(q, own_k.mT)                                         # [B, K, G, H/K, r]
        scores = torch.cat((shared.unflatten(2, q.shape[2:4]), own), -1)
        weight = self.hidden.add(scores, alpha=q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        B, K, P, d = prompt_v.shape
        shared, own = weight.split((P, self.window), -1)
        out = own @ own_v                                                       # [B, K, G, H/K, d]
        # Adds the prompt's part to it.
        out.view(B * K, -1, d).baddbmm_(shared.reshape(B * K, -1, P), prompt_v.flatten(0, 1))
        return rearrange(out, "b k g j d -> (b g) (k j) 1 d")

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """Drops every prompt that is not in `prompts` [B'], and each suffix of those that is not in
        its line of `rollouts` [B', G']."""
        self.padding, self.G = self.padding[prompts], rollouts.shape[1]
        self.prompt = [(k[prompts], v[prompts]) for k, v in self.prompt]
        index = rollouts[:, None, :, None, None]
        self.suffix = [(k[prompts].take_along_dim(index, 2), v[prompts].take_along_dim(index, 2))
                       for k, v in self.suffix]


def uniforms(seed: int, places: Iterable[int], G: int, R: int) -> Tensor:
    """Returns the numbers in [0, 1) that drive the rollouts of the prompts at these places,
    [B, G, R], float64."""
    def of_prompt(place: int) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(G, R, dtype=torch.float64, generator=generator)
    return torch.stack([of_prompt(place) for place in places])


def prefill(model: Qwen2_5_VL, prompts: list[Prompt], G: int, max_new_tokens: int
            ) -> tuple[Tensor, KVCache]:
    """Returns the hidden state after each prompt, [B, D], and the cache. Prompts are padded on the
    right, to a multiple of 8 tokens, which products on a GPU prefer."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p.tokens) for p in prompts], device=device)
    P = -(-max(len(p.tokens) for p in prompts) // 8) * 8
    tokens = torch.tensor([p.tokens + [0] * (P - len(p.tokens)) for p in prompts], device=device)
    position = torch.stack([F.pad(p.position, (0, P - p.position.shape[1])) for p in prompts], 1)
    valid = torch.arange(P, device=device) < lengths[:, None]                   # [B, P]
    cache = KVCache(len(model.model.layers), G, max_new_tokens, valid)
    x = model.embed(tokens, *collate_images(prompts, device))
    attend = functools.partial(cache.attend_prompt, row_mask(valid.long() - 1))
    hidden = model.decode(x, position.to(device), attend)                       # [B, P, D]
    return hidden[torch.arange(len(prompts), device=device), lengths - 1], cache


def sample(logits: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, log-probs and entropies −Σ_v π(v) log π(v), [M]. logits [M, V]: already
    divided by T. u [M]: uniform in [0, 1), or None for the likeliest.

    Inverse transform: the first token whose cumulative probability exceeds u.
    """
    logp = logits.log_softmax(-1)       # as in `score`: log(softmax) seldom has the same bits
    p = logp.exp()
    token = logits.argmax(-1) if u is None else draw(p, u)
    return token, logp.gather(-1, token[:, None])[:, 0], torch.special.entr(p).sum(-1)


def decode_one_token(model: Qwen2_5_VL, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Returns hidden states [M, D] after token [M] at position [M]; the cache grows by one."""
    cache.hide()
    x = model.model.embed_tokens(token[:, None])
    hidden = model.decode(x, repeat(position, "m -> three m 1", three=3), cache.attend_token)
    cache.slot += 1
    return hidden[:, 0]


@torch.no_grad()
def generate(model: Qwen2_5_VL, prompts: list[Prompt], max_new_tokens: int,
             u: Tensor | None = None, temperature: float = 1.0, *,
             step: Callable[..., Tensor] = decode_one_token, graphs: bool = True,
             adjust: Callable[..., Tensor] | None = None, stop: Sequence = ()
             ) -> list[list[Response]]:
    """Returns the responses to each prompt. Runs the raw module, never a DDP wrapper.

    u             [B, G, R] of `uniforms`: G rollouts each. None: one response, the likeliest tokens
    step, graphs  decodes one token; on CUDA by a CUDA graph of it, if graphs (support/graphs.py)
    adjust        changes the logits; for evaluations only (support/penalty.py)
    stop          raises Stopped as soon as it is not empty
    """
    if not prompts:
        raise ValueError("generate: the list of prompts is empty")
    device = model.lm_head.weight.device
    eos = torch.tensor(model.eos_ids, device=device)
    start = torch.tensor([p.next_position for p in prompts], device=device)     # [B]
    G = 1 if u is None else u.shape[1]
    u = None if u is None else u.to(device)
    alive = torch.arange(len(prompts), device=device)                           # [B'], of B
    numbers = torch.arange(G, device=device).repeat(len(prompts), 1)            # [B', G'], of G
    ended = torch.zeros(len(prompts), G, dtype=torch.bool, device=device)
    token, history = None, []
    look_every, share = when_to_leave(device)
    if graphs and device.type == "cuda":
        step = GraphedStep(step)
    with packed_weights(model), joined_products(model):
        # 1. The prompts, once. Every rollout begins with the state after its prompt.
        hidden, cache = prefill(model, prompts, G, max_new_tokens)
        hidden = repeat(hidden, "b d -> (b g) d", g=G)
        for r in range(max_new_tokens):
            if stop:
                raise Stopped
            # 2. One token for each rollout.
            logits = model.logits(hidden, temperature)                   # [M, V]
            if adjust is not None:
                logits = adjust(logits, alive, numbers, token)
            now = alive[:, None], numbers
            drawn = sample(logits, None if u is None else u[(*now, r)].flatten())
            token, logp, entropy = (x.view(numbers.shape) for x in drawn)       # [B', G']
            history.append((alive, numbers, token, logp, entropy))
            # 3. What has ended leaves the batch, if that pays. Only here the host waits for a GPU.
            ended[now] |= torch.isin(token, eos)
            if r + 1 == max_new_tokens:
                break
            if r % look_every == look_every - 1:
                going = ~ended[now]
                count = going.sum(1)
                most, left = torch.stack((count.max(), (count > 0).sum())).tolist()
                if not most:
                    break
                if numbers.numel() - most * left >= max(1, share * numbers.numel()):
                    stay = torch.nonzero(count)[:, 0]
                    first = going[stay].int().argsort(dim=1, descending=True, stable=True)[:, :most]
                    alive, numbers, token = alive[stay], *(
                        x[stay].gather(1, first) for x in (numbers, token))
                    cache.keep(stay, first)
            # 4. The token decoded: the next hidden state, over the slots that are then written.
            cache.window = r + 1
            position = repeat(start[alive] + r, "b -> (b g)", g=token.shape[1])
            hidden = step(model, token.flatten(), position, cache)
    return collect(history, len(prompts), G, set(model.eos_ids))        # 5. Steps → responses.


def collect(history: list[tuple[Tensor, ...]], prompts: int, G: int, eos: set[int]
            ) -> list[list[Response]]:
    """Returns the responses of each prompt. history: for each step which prompts [B'] and rollouts
    took part, and their tokens, log-probs and entropies [B', G']. A rollout that has ended may idle
    along while another prompt has more that go on, so each is cut after its first EOS.
    Raises Mistake if a log-prob is not finite."""
    if not torch.cat([logp.flatten() for *_, logp, _ in history]).isfinite().all():
        raise Mistake("the model's log-probs are not finite: its weights hold NaN or Inf, or have "
                      "become too large; begin from a sound model or checkpoint, with a smaller "
                      "--lr if this was a training")
    drawn: list = [[[] for _ in range(G)] for _ in range(prompts)]
    for step in history:
        for prompt, *rows in zip(*(x.tolist() for x in step)):
            for number, *values in zip(*rows):
                drawn[prompt][number].append(values)

    def response(steps: list) -> Response:
        length = next((n for n, (token, *_) in enumerate(steps, 1) if token in eos), None)
        tokens, logp, entropy = map(list, zip(*steps[:length]))
        return Response(tokens, logp, truncated=length is None, entropy=entropy)
    return [[response(steps) for steps in group] for group in drawn]
