"""Sampling with a KV cache: G rollouts of each prompt from one prefill.

    prefill           the prompts once, images included; their keys and values are shared by the G rollouts
    sample            one token for each rollout from softmax(logits / T), or the likeliest at T = 0
    decode_one_token  one step of all rollouts

Glossary: B prompts, G rollouts of each, P prompt tokens, R response tokens, D width, V vocabulary, M = B·G rollouts;
place: the number of a prompt in the endless sequence of examples; suffix: the tokens that a rollout has so far.

Each prompt has its own stream of uniform numbers, seeded by (seed, its place in the endless sequence of examples): its
rollouts are the same in any batch, on any rank, and other ones when it comes again, in the same step too. Only a
temperature shapes the distribution (no top-k, no top-p), so the log-probs returned are those of the training forward.
Prompts whose rollouts have all ended leave the batch, and of the others so many rollouts as have ended of each.
"""
import functools
import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from data import Prompt, Response, collate_images
from model import Qwen2_5_VL, for_each_query_head, row_mask
from support.mistakes import Mistake, Stopped
from support.onednn import packed_weights

WINDOW = 128   # a CUDA graph reads as many slots of the suffix as are written, rounded up to a multiple of this


class KVCache:
    """Holds keys and values while sampling. A prompt's are stored once and shared by its G rollouts,
    never copied. Each rollout owns only those of its suffix.

    prompt[layer]   (k, v) [B, K, P, d]; k is already rotated
    suffix[layer]   (k, v) [B, K, G, R, d]
    padding         [B, 1, 1, 1, P], True where a prompt has ended

    A step writes to `slot` of the suffix, a tensor [1] that it then counts up. It reads the first
    `window` slots, of which `unwritten` [window] are hidden. A step's shapes therefore depend on
    window alone, and a CUDA graph of it can be replayed (GraphedStep).

    Keys are kept in float32, so that scores are float32 as in scaled_dot_product_attention. Real
    keys share a large offset. The softmax cancels it, but not the rounding error that bfloat16
    makes at that size.
    """
    def __init__(self, layers: int, G: int, max_new_tokens: int, prompt_mask: Tensor):
        """prompt_mask: bool [B, P], False at padding."""
        self.prompt: list = [None] * layers
        self.suffix: list = [None] * layers
        self.padding = ~prompt_mask[:, None, None, None]
        self.G, self.max_new_tokens, self.window = G, max_new_tokens, 0
        self.slot = torch.zeros(1, dtype=torch.long, device=prompt_mask.device)
        self.unwritten: Tensor | None = None

    def attend_prompt(self, mask: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends within the prompts, and stores k and v: mask bool [B, 1, P, P], q [B, H, P, d],
        k, v [B, K, P, d] → [B, H, P, d]."""
        B, K, _, d = k.shape
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        self.prompt[layer] = (wide, v)
        self.suffix[layer] = tuple(x.new_zeros(B, K, self.G, self.max_new_tokens, d)
                                   for x in (wide, v))
        return F.scaled_dot_product_attention(q, *for_each_query_head(q, k, v), mask)

    def attend_token(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends from one new token of each rollout: q [B·G, H, 1, d], k, v [B·G, K, 1, d]
        → [B·G, H, 1, d]. The G·H/K queries that read one key head of one prompt are one matrix, so
        that the prompt's keys are read once.
        """
        (prompt_k, prompt_v), (suffix_k, suffix_v) = self.prompt[layer], self.suffix[layer]
        for suffix, new in ((suffix_k, k), (suffix_v, v)):
            new = rearrange(new.to(suffix.dtype), "(b g) k 1 d -> b k g 1 d", g=self.G)
            suffix.index_copy_(3, self.slot, new)
        own_k = suffix_k[:, :, :, :self.window]                                 # [B, K, G, r, d]
        own_v = suffix_v[:, :, :, :self.window]
        q = q.to(prompt_k.dtype) * q.shape[-1] ** -0.5
        q = rearrange(q, "(b g) (k j) 1 d -> b k g j d", g=self.G, k=k.shape[1])
        shared = (q.flatten(2, 3) @ prompt_k.mT).unflatten(2, q.shape[2:4])     # [B, K, G, H/K, P]
        shared = shared.masked_fill(self.padding, -torch.inf)
        own = (q @ own_k.mT).masked_fill(self.unwritten, -torch.inf)            # [B, K, G, H/K, r]
        scores = torch.cat((shared, own), -1)
        weight = scores.softmax(-1).to(prompt_v.dtype)
        shared, own = weight.split((prompt_k.shape[2], self.window), -1)
        out = (shared.flatten(2, 3) @ prompt_v).unflatten(2, q.shape[2:4]) + own @ own_v
        return rearrange(out, "b k g j d -> (b g) (k j) 1 d")

    def keep(self, prompts: Tensor, rollouts: Tensor) -> None:
        """Drops every prompt that is not in `prompts` [B'], and each suffix of those that is not in
        its line of `rollouts` [B', G']."""
        self.padding, self.G = self.padding[prompts], rollouts.shape[1]
        self.prompt = [(k[prompts], v[prompts]) for k, v in self.prompt]
        index = rollouts[:, None, :, None, None]
        self.suffix = [(k[prompts].take_along_dim(index, 2), v[prompts].take_along_dim(index, 2))
                       for k, v in self.suffix]


def uniforms(seed: int, place: int, G: int, R: int) -> Tensor:
    """The numbers in [0, 1) that drive a prompt's rollouts, [G, R], float64. One per token."""
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(G, R, dtype=torch.float64, generator=generator)


def prefill(model: Qwen2_5_VL, prompts: list[Prompt], G: int, max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """Returns the hidden state after each prompt, [B, D], and the cache. Prompts are padded on the right."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p.tokens) for p in prompts], device=device)
    P = int(lengths.max())
    tokens = torch.tensor([p.tokens + [0] * (P - len(p.tokens)) for p in prompts], device=device)
    position = torch.stack([F.pad(p.position, (0, P - p.position.shape[1])) for p in prompts], 1)
    valid = torch.arange(P, device=device) < lengths[:, None]                                   # [B, P]
    cache = KVCache(len(model.model.layers), G, max_new_tokens, valid)
    x = model.embed(tokens, *collate_images(prompts, device))
    attend = functools.partial(cache.attend_prompt, row_mask(valid.long() - 1))
    hidden = model.decode(x, position.to(device), attend)                                       # [B, P, D]
    return hidden[torch.arange(len(prompts), device=device), lengths - 1], cache


def sample(logits: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """logits [M, V] (already divided by T), u [M] uniform in [0, 1), or None for the likeliest → tokens, log-probs and
    entropies −Σ_v π(v) log π(v), [M].
    Inverse transform: the first token whose cumulative probability exceeds u; in float64, so that a token of
    probability 0 is never taken."""
    logp = logits.log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    if u is None:
        token = logits.argmax(-1)
    else:
        cumulative = logp.double().exp().cumsum(-1)
        token = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)       # past the end where the logits are NaN (`generate`)
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


def decode_one_token(model: Qwen2_5_VL, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """token, position [B·G] → hidden states [B·G, D]; the cache grows by one."""
    cache.unwritten = torch.arange(cache.window, device=token.device) > cache.slot
    x = model.model.embed_tokens(token[:, None])
    hidden = model.decode(x, repeat(position, "m -> three m 1", three=3), cache.attend_token)
    cache.slot += 1
    return hidden[:, 0]


class GraphedStep:
    """decode_one_token by CUDA graph: one launch instead of a large model's thousand, which take longer to launch than
    to run. Captured anew when prompts have left or the window has grown. On a CPU the same buffers, uncaptured."""
    def __init__(self):
        self.shape = self.graph = None

    def __call__(self, model: Qwen2_5_VL, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        if self.shape != (len(token), cache.window):
            self.shape, self.graph = (len(token), cache.window), None     # frees the old graph's memory first
            self.token, self.position = token.clone(), position.clone()
            if token.is_cuda:
                self.capture(model, cache)
        self.token.copy_(token)
        self.position.copy_(position)
        if self.graph is None:
            return decode_one_token(model, self.token, self.position, cache)
        self.graph.replay()
        return self.hidden

    def capture(self, model: Qwen2_5_VL, cache: KVCache) -> None:
        """Libraries must have run once before a capture, on another stream than the default; capturing runs nothing."""
        slot, stream = cache.slot.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode_one_token(model, self.token, self.position, cache)
            cache.slot.copy_(slot)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.hidden = decode_one_token(model, self.token, self.position, cache)


@torch.no_grad()
def generate(model: Qwen2_5_VL, prompts: list[Prompt], G: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
             seed: int = 0, places: Sequence[int] | None = None, repetition_penalty: float = 1.0, graphs: bool = False,
             stop: Sequence = ()) -> list[list[Response]]:
    """G responses to each prompt. temperature 0 is greedy decoding (then use G = 1). Runs the raw module, never a
    DDP wrapper. places: of the prompts in the endless sequence of examples (None: 0, 1, 2 …). repetition_penalty, of
    evaluations only: training does not score with it. graphs: GraphedStep. Stopped: as soon as `stop` is not empty."""
    if not prompts:
        raise ValueError("generate: the list of prompts is empty")
    take_step = GraphedStep() if graphs else decode_one_token
    greedy = temperature == 0
    device = model.lm_head.weight.device
    eos = torch.tensor(model.eos_ids, device=device)
    places = range(len(prompts)) if places is None else places
    u = None if greedy else torch.stack(
        [uniforms(seed, place, G, max_new_tokens) for place in places]).to(device)              # [B, G, R]
    start = torch.tensor([p.next_position for p in prompts], device=device)                     # [B]
    alive = torch.arange(len(prompts), device=device)      # prompts still in the batch, [B']
    numbers = repeat(torch.arange(G, device=device), "g -> b g", b=len(prompts))       # and their rollouts, [B', G']
    ended = torch.zeros(len(prompts), G, dtype=torch.bool, device=device)
    seen = None if repetition_penalty == 1 else seen_tokens(prompts, G, len(model.model.embed_tokens.weight), device)
    # Per step: which prompts [B'] and rollouts took part, and their tokens, log-probs and entropies [B', G'].
    history: list[tuple[Tensor, ...]] = []
    with packed_weights(model):
        hidden, cache = prefill(model, prompts, G, max_new_tokens)
        hidden = repeat(hidden, "b d -> (b g) d", g=G)
        for r in range(max_new_tokens):
            if stop:
                raise Stopped
            logits = model.logits(hidden, 1.0 if greedy else temperature)
            if seen is not None:
                logits = penalise(logits, seen, repetition_penalty)
            drawn = sample(logits, None if greedy else u[alive[:, None], numbers, r].flatten())
            token, logp, entropy = (x.view(numbers.shape) for x in drawn)
            history.append((alive, numbers, token, logp, entropy))
            if seen is not None:
                seen.scatter_(1, drawn[0][:, None], True)
            ended[alive[:, None], numbers] |= torch.isin(token, eos)
            going = ~ended[alive[:, None], numbers]                                             # [B', G']
            count = going.sum(1)
            most, least = torch.stack((count.max(), count.min())).tolist()      # a GPU is waited for here alone
            if not most or r + 1 == max_new_tokens:
                break
            if most < numbers.shape[1] or not least:
                stay = torch.nonzero(count)[:, 0]
                first = going[stay].int().argsort(dim=1, descending=True, stable=True)[:, :most]    # going on
                alive, numbers, token = alive[stay], numbers[stay].gather(1, first), token[stay].gather(1, first)
                cache.keep(stay, first)
                if seen is not None:
                    of_rollout = rearrange(seen, "(b g) v -> b g v", b=len(going))[stay]
                    seen = of_rollout.take_along_dim(first[:, :, None], 1).flatten(0, 1)
            # The slots written by the end of this step; a graph reads more, so that it serves the next steps as well.
            cache.window = min(-(-(r + 1) // WINDOW) * WINDOW, max_new_tokens) if graphs else r + 1
            hidden = take_step(model, token.flatten(), repeat(start[alive] + r, "b -> (b g)", g=token.shape[1]), cache)
    if not torch.cat([logp.flatten() for *_, logp, _ in history]).isfinite().all():
        raise Mistake("the model's log-probs are not finite: its weights hold NaN or Inf, or have become too large; "
                      "begin from a sound model or checkpoint, with a smaller --lr if this was a training")
    return collect(history, len(prompts), G, set(model.eos_ids))


def seen_tokens(prompts: list[Prompt], G: int, vocabulary: int, device) -> Tensor:
    """Which tokens each prompt holds, [B·G, V] bool."""
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
    for line, prompt in zip(seen, prompts):
        line[torch.tensor(prompt.tokens, device=device)] = True
    return repeat(seen, "b v -> (b g) v", g=G).clone()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of CTRL (arXiv 1909.05858), as transformers applies it: the logit of a token that prompt
    or response already hold is divided by the penalty if positive, else multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def collect(history: list[tuple[Tensor, ...]], prompts: int, G: int, eos: set[int]) -> list[list[Response]]:
    """Steps → responses, each cut after its first EOS (a finished rollout idles along while another prompt has more
    that go on)."""
    responses = [[Response([], [], True) for _ in range(G)] for _ in range(prompts)]
    for step in history:
        for prompt, *rows in zip(*(x.tolist() for x in step)):
            for number, token, logp, entropy in zip(*rows):
                response = responses[prompt][number]
                if response.truncated:
                    response.tokens.append(token)
                    response.logp.append(logp)
                    response.entropy.append(entropy)
                    response.truncated = token not in eos
    return responses
