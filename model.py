"""Qwen2.5-VL in plain PyTorch and einops (arXiv 2502.13923): the policy π_θ of ViSurf. The last
part of the file holds what is different in Qwen3-VL.

Parameter names, shapes and numbers are those of the published checkpoints. So loading is reading
safetensors, and a saved folder opens in `transformers` and vLLM. tests/test_model.py holds this
file to the published implementation: transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py. Each
class names its own there.

A group is one row (data.py packs it), and goes through the model once:

    patches   ─ VisionTower ─▶ image tokens
                                  ▼                                             embed  [B, T, D]
    tokens    [ prompt …       <image> … | y … eos | o_1 … eos | … | o_G … eos ]
    segment   [ 0 …                      | 1 …     | 2 …       | … | G+1 …     ]
                sees itself              | each sees the prompt and itself      decode [B, T, D]
                                         | log π of each token                  score  [M]

Glossary (the letters of every shape comment)
    B  rows, T  tokens of a row, P  prompt tokens, S  responses of a row, R  response tokens
    N  image patches (14×14 pixels), N/4 image tokens, D  width, d  head size, V  vocabulary
    H  query heads, K  key-value heads, M  scored tokens
    rotary     cos and sin of the angles by which a token's place in text or image turns q and k
    attend     attend(layer, q, k, v) → output: which tokens see each other. `RowLayout.attend` in
               training, rollout.KVCache's `attend_prompt` and `attend_token` in sampling

Departures from that implementation. In float32 only the fourth changes a number by more than rounding.
    1. Window attention gathers each window's patches by index. The patches are never re-ordered.
    2. The patch embedding, a Conv3d whose stride is its kernel, is one matrix product.
    3. lm_head runs only where a log-prob is asked for, in chunks that are recomputed in backward.
    4. The tokens of pictures and videos have probability 0, in sampling and in scoring (`banned`), and
       the others share theirs: of assets/tiny that moves a log-prob by less than 1e-4.
    5. Where weights are bfloat16, the decoder's rotary embedding stays float32, and RMSNorm rounds
       once; there cos and sin, and the norm before its weight, are rounded too. So bfloat16
       log-probs differ, but are as near to float32's.

Put on a loaded model from outside (support/equip.py): faster products on a CPU, frozen parts, LoRA.
Does not include: video, sliding-window attention, dropout, quantisation.
"""
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

from support.weights import (VISION_TOKENS, load_weights, local_folder, read_config, read_eos_ids,
                             save_folder)

# cuDNN's attention, the first choice on a Hopper GPU, may give NaN gradients with a mask, at lengths
# 64 above a multiple of 128 (pytorch/pytorch#196678), and makes a plan for every new length.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Config:
    """Holds the fields of a config.json that change the computation. `vision_*`: of the tower."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    vision_depth: int
    vision_hidden_size: int
    vision_num_heads: int
    vision_intermediate_size: int
    vision_patch_size: int
    vision_temporal_patch_size: int
    vision_spatial_merge_size: int
    vision_window_size: int
    vision_fullatt_block_indexes: tuple[int, ...]

    # Coordinates of boxes: pixels of the picture (None), or parts of a side of this many.
    boxes_in: ClassVar[int | None] = None

    @staticmethod
    def from_json(path: Path) -> "Config":
        family, fields = read_config(path)
        return {"qwen2_5_vl": Config, "qwen3_vl": Qwen3Config}[family](**fields)


class RMSNorm(nn.Module):
    """`Qwen2_5_VLRMSNorm`: weight · x / √(mean x² + eps), at least in float32."""
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GatedMLP(nn.Module):
    """`Qwen2MLP` in the decoder, `Qwen2_5_VLMLP` in the vision tower."""
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.products(x)
        return self.down_proj(F.silu(gate) * up)


Rotary = tuple[Tensor, Tensor]      # of `turn`, [..., d] each


def turn(angle: Tensor) -> Rotary:
    """Returns cos of the angles [..., d/2] twice, and ∓ sin: what x_i and x_{i+d/2} are multiplied
    by for the first half of `rotate`, and for the second."""
    return torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """`apply_rotary_pos_emb`: turns the pairs (x_i, x_{i+d/2}) of x [..., d]."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Vision tower

@functools.lru_cache(maxsize=4096)
def patch_layout(gh: int, gw: int, merge: int, window: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the (row, column) of the patches of one image, [N, 2], and for each window the
    indices of its patches. Border windows are smaller.

    gh, gw: patches per column and row. merge: patches per side of an image token. window: image
    tokens per side of an attention window. Patches are stored as (gh/merge, gw/merge, merge,
    merge), so that the patches of an image token are neighbours.

    >>> coordinates, windows = patch_layout(2, 4, 2, 1)
    >>> coordinates.tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    >>> [w.tolist() for w in windows]
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    row, column = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    coordinates = rearrange(torch.stack((row, column), -1), "(h a) (w b) two -> (h w a b) two",
                            a=merge, b=merge)
    side = merge * window
    window_of = coordinates[:, 0] // side * -(-gw // side) + coordinates[:, 1] // side  # [N]
    windows = window_of.unique().tolist()
    return coordinates, [torch.nonzero(window_of == w).flatten() for w in windows]


@dataclass
class PatchSets:
    """Says which patches attend to each other: those of a window, or of an image. Windows (images)
    of one size share a table. So nothing is padded, and a small picture does not pay for a large
    one of the same call."""
    tables: list[Tensor]    # for each size: [windows, size] patch numbers
    inverse: Tensor         # [N] the slot of each patch when the tables are laid end to end

    @staticmethod
    def of(members: list[Tensor], device) -> "PatchSets":
        """Returns the sets in one table for each size.

        >>> sets = PatchSets.of(list(map(torch.tensor, ([0, 1], [2], [3, 4]))), "cpu")
        >>> [table.tolist() for table in sets.tables], sets.inverse.tolist()
        ([[[2]], [[0, 1], [3, 4]]], [1, 2, 0, 3, 4])
        """
        by_size: dict[int, list[Tensor]] = {}
        for patches in members:
            by_size.setdefault(len(patches), []).append(patches)
        tables = [torch.stack(by_size[size]) for size in sorted(by_size)]
        inverse = torch.cat([table.flatten() for table in tables]).argsort()    # of a permutation
        return PatchSets([table.to(device) for table in tables], inverse.to(device))


class VisionAttention(nn.Module):
    """`Qwen2_5_VLVisionAttention`."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary, sets: PatchSets) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n (three h d) -> three n h d", three=3, h=self.heads)
        q, k = rotate(q, rotary), rotate(k, rotary)
        parts = []
        for table in sets.tables:
            of_sets = (rearrange(x[table], "w s h d -> w h s d") for x in (q, k, v))
            out = F.scaled_dot_product_attention(*of_sets)
            parts.append(rearrange(out, "w h s d -> (w s) (h d)"))
        return self.proj(torch.cat(parts)[sets.inverse])


class VisionBlock(nn.Module):
    """`Qwen2_5_VLVisionBlock`."""
    def __init__(self, config: Config):
        super().__init__()
        width = config.vision_hidden_size
        self.norm1: nn.Module = RMSNorm(width, 1e-6)
        self.norm2: nn.Module = RMSNorm(width, 1e-6)
        self.attn = VisionAttention(width, config.vision_num_heads)
        self.mlp: nn.Module = GatedMLP(width, config.vision_intermediate_size, bias=True)

    def forward(self, x: Tensor, rotary: Rotary, sets: PatchSets) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, sets)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """`Qwen2_5_VLPatchMerger`: joins the merge² patches of an image token, and projects them to the
    decoder's width."""
    def __init__(self, config: Config):
        super().__init__()
        self.joined = config.vision_hidden_size * config.vision_spatial_merge_size ** 2
        self.ln_q = RMSNorm(config.vision_hidden_size, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(),
                                 nn.Linear(self.joined, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.joined))


class VisionTower(nn.Module):
    """`Qwen2_5_VisionTransformerPretrainedModel`, with its patch and rotary embeddings."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        p, width = config.vision_patch_size, config.vision_hidden_size
        pixels = config.vision_temporal_patch_size, p, p
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, width, pixels, pixels, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_depth))
        self.merger: nn.Module = PatchMerger(config)

    def forward(self, patches: Tensor, grids: list[tuple[int, int]], checkpoint: str = "none"
                ) -> Tensor:
        """Returns image tokens [N/4, D]. patches [N, 3·2·14·14]: of one image after the other.
        grids: (gh, gw) patches of each."""
        c = self.config
        side = c.vision_window_size // c.vision_patch_size // c.vision_spatial_merge_size
        rotary, windows, images = self.lay_out(patches, grids, side)
        weight = self.patch_embed.proj.weight
        x = F.linear(patches.to(weight.dtype), weight.flatten(1))
        for i, block in enumerate(self.blocks):
            sets = images if i in c.vision_fullatt_block_indexes else windows
            x = apply_block(block, checkpoint, x, rotary, sets)
        return self.merger(x)

    def lay_out(self, patches: Tensor, grids: list[tuple[int, int]], side: int
                ) -> tuple[Rotary, PatchSets, PatchSets]:
        """Returns the patches' cos and sin, and which of them attend to each other in windows of
        side × side image tokens, and in whole images."""
        starts = [0, *itertools.accumulate(gh * gw for gh, gw in grids)]
        if starts[-1] != len(patches):
            raise ValueError(f"{len(patches)} patches do not fill the grids {grids}")
        merge = self.config.vision_spatial_merge_size
        layouts = [patch_layout(gh, gw, merge, side) for gh, gw in grids]
        windows = [w + start for (_, ws), start in zip(layouts, starts) for w in ws]
        images = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
        coordinates = torch.cat([coordinates for coordinates, _ in layouts])
        return (self.rotary(coordinates.to(patches.device)),
                PatchSets.of(windows, patches.device), PatchSets.of(images, patches.device))

    def rotary(self, coordinates: Tensor) -> Rotary:
        """Returns cos and sin of 2-D rope, [N, 1, d]: the first half of the frequencies turns with
        the row, the second with the column. coordinates [N, 2]."""
        quarter = self.config.vision_hidden_size // self.config.vision_num_heads // 4
        frequency = 1 / 1e4 ** (torch.arange(quarter, device=coordinates.device) / quarter)
        angle = rearrange(coordinates[..., None] * frequency, "n two f -> n 1 (two f)")
        return turn(angle)


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]      # those of nn.Linear


def apply_block(block: nn.Module, checkpoint: str, *inputs):
    """Returns block(*inputs). checkpoint: of its activations all are kept ("none"), those that
    matrix products return ("cheap"), or none ("blocks"). Backward recomputes the others."""
    if checkpoint == "none":
        return block(*inputs)
    keep = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
    return recompute_in_backward(block, *inputs, use_reentrant=False,
                                 context_fn=keep if checkpoint == "cheap" else noop_context_fn)


# --------------------------------------------------------------------------------------------------
# Text decoder

# layer, q [B, H, T, d], k, v [B, K, T, d] → [B, H, T, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def for_each_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns k, v [B, K, T, d] with each head repeated for H/K heads of q, [B, H, T, d]."""
    j = q.shape[1] // k.shape[1]
    return repeat(k, "b h t d -> b (h j) t d", j=j), repeat(v, "b h t d -> b (h j) t d", j=j)


class Attention(nn.Module):
    """`Qwen2_5_VLAttention`."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, self.heads * d)
        self.k_proj = nn.Linear(width, self.kv_heads * d)
        self.v_proj = nn.Linear(width, self.kv_heads * d)
        self.o_proj = nn.Linear(self.heads * d, width, bias=False)

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.cat((self.q_proj(x), self.k_proj(x)), -1), self.v_proj(x)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns q and k as one tensor [B, H + K, T, d], and v [B, K, T, d]."""
        qk, v = self.products(x)
        return (rearrange(qk, "b t (h d) -> b h t d", h=self.heads + self.kv_heads),
                rearrange(v, "b t (h d) -> b h t d", h=self.kv_heads))

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        qk, v = self.project(x)
        q, k = rotate(qk, rotary).split((self.heads, self.kv_heads), 1)
        out = attend(self.layer, q, k, v)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class DecoderLayer(nn.Module):
    """`Qwen2_5_VLDecoderLayer`."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def mrope_positions(tokens: list[int], grids: list[tuple[int, int]], image_token_id: int,
                    merge: int = 2) -> Tensor:
    """`Qwen2_5_VLModel.get_rope_index`: returns the M-RoPE ids (t, h, w) of a prompt, [3, P]. Text
    counts alike on the three axes. The tokens of an image that starts at s have t = s, h = s + row,
    w = s + column. The text after it goes on at the largest id so far + 1.

    >>> mrope_positions([7, 9, 9, 7, 7], [(2, 4)], image_token_id=9).tolist()   # 1×2 image tokens
    [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
    """
    parts, start, at, images = [], 0, 0, iter(grids)
    while at < len(tokens):
        if tokens[at] == image_token_id:
            gh, gw = next(images, (None, None))
            if gh is None:
                raise ValueError(
                    f"the prompt has more image blocks than the {len(grids)} grids given")
            h, w = gh // merge, gw // merge
            if tokens[at:at + h * w] != [image_token_id] * (h * w):
                raise ValueError(
                    f"an image of {h}×{w} image tokens has fewer placeholders at token {at}")
            row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            t = torch.zeros(h * w, dtype=torch.long)
            parts.append(torch.stack((t, row.flatten(), column.flatten())) + start)
            at, start = at + h * w, start + max(h, w)
        else:
            end = tokens.index(image_token_id, at) if image_token_id in tokens[at:] else len(tokens)
            parts.append(repeat(torch.arange(start, start + end - at), "t -> three t", three=3))
            at, start = end, start + end - at
    if next(images, None) is not None:
        raise ValueError(f"the prompt has fewer image blocks than the {len(grids)} grids given")
    return torch.cat(parts, 1)


def row_mask(segment: Tensor) -> Tensor:
    """Returns attend(q, k) = k ≤ q and (segment[k] == 0 or segment[k] == segment[q]), bool
    [B, 1, T, T]. segment [B, T]: 0 is the prompt; 1, 2, … are its responses, which do not see each
    other; −1 is padding, at the end of a row.

    >>> row_mask(torch.tensor([[0, 1, 2, 2]]))[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    q, k = segment[:, :, None], segment[:, None, :]
    T = segment.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segment.device).tril()
    return (causal & ((k == 0) | (k == q)))[:, None]


class RowLayout:
    """Computes the attention of packed rows as row_mask(segment) would, without the pairs that the
    mask hides, whose number grows with G². The prompt attends to itself. Each response, as a row of
    its own, attends to the prompt and itself.

    >>> layout = RowLayout(torch.tensor([[0, 0, 1, 1, 2]]))     # P = 2, S = 2, R = 2
    >>> layout.token_of_slot.tolist()     # the token of each of the S·R slots; 0 if there is none
    [[2, 3, 4, 0]]
    >>> layout.output_at.tolist()         # each token's output: the prompt's first, then the slots'
    [[0, 1, 2, 3, 4]]
    """
    def __init__(self, segment: Tensor):
        """segment [B, T], as for row_mask."""
        B, T = segment.shape
        device = segment.device
        at = torch.arange(T, device=device)
        in_prompt, in_response = segment == 0, segment > 0
        number = (segment - 1).clamp(min=0)                                     # [B, T], from 0
        self.P, self.S = int(in_prompt.sum(1).max()), int(number.max()) + 1
        count = torch.zeros(B, self.S, dtype=torch.long, device=device)
        count.scatter_add_(1, number, in_response.long())
        start = in_prompt.sum(1, keepdim=True) + count.cumsum(1) - count        # [B, S]
        self.R = int(count.max())
        slot = number * self.R + at - start.gather(1, number)
        self.output_at = (self.P + slot).where(in_response, at.where(in_prompt, 0))     # [B, T]
        # What is no response token goes to one slot more, which is cut off again.
        self.token_of_slot = slot.new_zeros(B, self.S * self.R + 1).scatter_(
            1, slot.where(in_response, self.S * self.R), at.expand(B, T))[:, :-1]       # [B, S·R]
        self.prompt_mask = row_mask(segment[:, :self.P])                        # [B, 1, P, P]
        prompt = repeat(in_prompt[:, :self.P], "b p -> (b s) 1 r p", s=self.S, r=self.R)
        own = torch.ones(self.R, self.R, dtype=torch.bool, device=device).tril()
        own = repeat(own, "r k -> m 1 r k", m=B * self.S)
        self.response_mask = torch.cat((prompt, own), -1)                       # [B·S, 1, R, P+R]

    def attend(self, _, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns [B, H, T, d], in every layer alike. q [B, H, T, d], k, v [B, K, T, d]."""
        P, S, (k, v) = self.P, self.S, for_each_query_head(q, k, v)
        prompt = F.scaled_dot_product_attention(
            q[:, :, :P], k[:, :, :P], v[:, :, :P], self.prompt_mask)
        index = repeat(self.token_of_slot, "b n -> b h n d", h=q.shape[1], d=q.shape[3])
        q_own, k_own, v_own = (
            rearrange(x.gather(2, index), "b h (s r) d -> (b s) h r d", s=S) for x in (q, k, v))
        k, v = (torch.cat((repeat(each[:, :, :P], "b h p d -> (b s) h p d", s=S), own), 2)
                for each, own in ((k, k_own), (v, v_own)))
        response = F.scaled_dot_product_attention(q_own, k, v, self.response_mask)
        out = torch.cat((prompt, rearrange(response, "(b s) h r d -> b h (s r) d", s=S)), 2)
        return out.gather(2, repeat(self.output_at, "b t -> b h t d", h=q.shape[1], d=q.shape[3]))


class Qwen2_5_VL(nn.Module):
    """`Qwen2_5_VLForConditionalGeneration`. `embed` is its `Qwen2_5_VLModel`, `decode` its
    `Qwen2_5_VLTextModel`."""
    Tower: type = VisionTower
    Layer: type = DecoderLayer
    stored_as: ClassVar[dict[str, str]] = {}    # how names begin here → in the files, if otherwise

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = self.Tower(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            self.Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # device="cpu": these two are computed, not loaded, even if the weights are still on meta.
        axis = torch.tensor(self.axes(config.mrope_section), device="cpu")
        self.register_buffer("rope_axis", axis, persistent=False)               # [d/2] in {t, h, w}
        banned = torch.zeros(config.vocab_size, dtype=torch.bool, device="cpu")
        banned[[getattr(config, name) for name in VISION_TOKENS]] = True
        self.register_buffer("banned", banned, persistent=False)                # [V]
        self.folder: Path | None = None     # its config and tokenizer travel with every save
        self.pixels: tuple[int, int] | None = None      # and these limits of a picture, if given
        self.eos_ids: tuple[int, ...] = ()  # every id that ends a response (generation_config.json)

    @staticmethod
    def axes(section: tuple[int, ...]) -> list[int]:
        """Returns the axis of each frequency of M-RoPE: section[0] times t, section[1] times h,
        section[2] times w."""
        return [axis for axis, count in enumerate(section) for _ in range(count)]

    def embed(self, tokens: Tensor, patches: Tensor, grids: list[tuple[int, int]],
              checkpoint: str = "none") -> Tensor:
        """Returns the embeddings of tokens [B, T], [B, T, D]. The image placeholders, in reading
        order, take the image tokens of `patches`."""
        x = self.model.embed_tokens(tokens)
        if not len(patches):
            if torch.is_grad_enabled():
                # An image of nothing, times 0: every rank must touch every parameter, or DDP hangs.
                side = self.config.vision_spatial_merge_size
                pixels = self.visual.patch_embed.proj.weight[0].numel()
                nothing = self.visual(patches.new_zeros(side * side, pixels), [(side, side)])
                x = x + 0 * nothing.sum()
            return x
        image = self.visual(patches, grids, checkpoint)
        at_image = tokens == self.config.image_token_id
        if (count := int(at_image.sum())) != image.shape[-2]:
            raise ValueError(f"{count} image placeholders for {image.shape[-2]} image tokens")
        return self.insert_image(x, at_image[..., None], image)

    def insert_image(self, x: Tensor, at_image: Tensor, image: Tensor) -> Tensor:
        """Returns x [B, T, D] with image [N/4, D] where at_image [B, T, 1] is True."""
        return x.masked_scatter(at_image, image.to(x.dtype))

    def decode(self, x: Tensor, position: Tensor, attend: Attend, checkpoint: str = "none"
               ) -> Tensor:
        """Returns the final hidden states, [B, T, D]. x [B, T, D], position [3, B, T]."""
        rotary = self.rotary(position)
        for layer in self.model.layers:
            x = apply_block(layer, checkpoint, x, rotary, attend)
        return self.model.norm(x)

    def rotary(self, position: Tensor) -> Rotary:
        """Returns cos and sin of M-RoPE, [B, 1, T, d]."""
        d = self.config.head_dim
        exponent = torch.arange(0, d, 2, device=position.device) / d
        frequency = 1 / self.config.rope_theta ** exponent
        angle = rearrange(position[self.rope_axis], "f b t -> b 1 t f") * frequency
        return turn(angle)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Returns [..., V] for hidden [..., D], at least in float32, divided by the temperature,
        −inf for `banned`. Sampling and training both read probabilities from here."""
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        return logits.masked_fill_(self.banned, -torch.inf)     # in place: [M, V] is the largest

    def score(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 2048,
              entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Returns log π(target) and the entropy −Σ_v π(v) log π(v), [M] each, the entropy with a
        gradient if that is asked for. hidden [M, D], targets [M]. In chunks recomputed in backward,
        so that no [M, V] matrix exists."""
        def one(h: Tensor, t: Tensor):
            logp = self.logits(h, temperature).log_softmax(-1)
            if entropy_gradient:    # `banned` is left out of the sum: 0 · −∞ has no gradient
                entropy = -(logp.exp() * logp.masked_fill(self.banned, 0)).sum(-1)
            else:
                with torch.no_grad():
                    p = logp.exp()
                    entropy = torch.special.entr(p, out=p).sum(-1)
            return logp.gather(-1, t[:, None])[:, 0], entropy
        parts = [recompute_in_backward(one, h, t, use_reentrant=False)
                 for h, t in zip(hidden.split(chunk), targets.split(chunk))]
        return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])

    def forward(self, tokens: Tensor, segment: Tensor, position: Tensor, predictor: Tensor,
                patches: Tensor, grids: list[tuple[int, int]], temperature: float = 1.0,
                checkpoint: str = "none", entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Returns logp and entropy [B, T] of every response token of packed rows, 0 elsewhere.
        tokens, segment, predictor [B, T], position [3, B, T], patches [N, 1176].

        logp[b, i] = log π(tokens[b, i] | what token predictor[b, i] has seen): the token before it,
        or the prompt's last for the first of a response.
        """
        x = self.embed(tokens, patches, grids, checkpoint)
        hidden = self.decode(x, position, RowLayout(segment).attend, checkpoint)
        scored = segment > 0
        source = hidden.gather(1, repeat(predictor, "b t -> b t d", d=hidden.shape[-1]))
        logp, entropy = self.score(source[scored], tokens[scored], temperature,     # [M, D], [M]
                                   entropy_gradient=entropy_gradient)
        empty = logp.new_zeros(tokens.shape)
        return empty.masked_scatter(scored, logp), empty.masked_scatter(scored, entropy)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws random weights (std 0.02, biases 0) from torch's global generator."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def save_pretrained(self, folder, max_shard_size: str = "5GB") -> None:
        """Writes a complete folder: config, weights, tokenizer, processor (weights.save_folder)."""
        save_folder(self, folder, max_shard_size)


def load_model(folder, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2_5_VL:
    """Returns the model of a folder in the Hugging Face layout, of a run, or of a hub id. It is a
    Qwen3-VL if its config.json says so."""
    model = empty_model(folder, "meta")
    load_weights(model, model.folder, dtype)
    return model.to(device)


def random_model(folder, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2_5_VL:
    """Returns the model of a folder's config.json with random weights; its own are not read."""
    model = empty_model(folder, "cpu")
    model.reset_parameters()
    return model.to(device, dtype)


def empty_model(folder, device: str) -> Qwen2_5_VL:
    """Returns the model of a folder's config.json, whose weights are still to be made."""
    folder = local_folder(folder)
    config = Config.from_json(folder / "config.json")
    eos_ids = read_eos_ids(folder, config)
    with torch.device(device):
        model = Qwen3_VL(config) if isinstance(config, Qwen3Config) else Qwen2_5_VL(config)
    model.folder, model.eos_ids = folder, eos_ids
    return model


# --------------------------------------------------------------------------------------------------
# Qwen3-VL (arXiv 2511.21631): what is different. Published: transformers,
# models/qwen3_vl/modeling_qwen3_vl.py
#
#   tower      LayerNorm and a plain MLP; no windows; a learned table of positions, stretched over
#              the image, beside the 2-D rope
#   DeepStack  (arXiv 2406.04334) what some of the tower's blocks give is added to the image tokens
#              after the decoder's first layers
#   decoder    a head size of its own, no biases, q and k normalised for each head; M-RoPE's axes
#              alternate
#   boxes      in 0 … 1000 of either side, whatever the size of the picture (data.Processor)

@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Config):
    vision_num_position_embeddings: int
    vision_deepstack_visual_indexes: tuple[int, ...]
    vision_window_size: int = 0                             # there are no windows
    vision_fullatt_block_indexes: tuple[int, ...] = ()
    boxes_in: ClassVar[int | None] = 1000


class PlainMLP(nn.Module):
    """`Qwen3VLVisionMLP`, and with the exact GELU the products of `Qwen3VLVisionPatchMerger`."""
    def __init__(self, width: int, inner: int, out: int, approximate: str):
        super().__init__()
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, out)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class Qwen3VisionBlock(VisionBlock):
    """`Qwen3VLVisionBlock`."""
    def __init__(self, config: Config):
        super().__init__(config)
        width = config.vision_hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.mlp = PlainMLP(width, config.vision_intermediate_size, width, "tanh")


class Qwen3PatchMerger(PlainMLP):
    """`Qwen3VLVisionPatchMerger`: normalises patches before it joins them; for DeepStack, after."""
    def __init__(self, config: Config, after: bool):
        self.joined = config.vision_hidden_size * config.vision_spatial_merge_size ** 2
        super().__init__(self.joined, self.joined, config.hidden_size, "none")
        self.norm = nn.LayerNorm(self.joined if after else config.vision_hidden_size, 1e-6)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.joined) if self.after else x)
        return super().forward(x.view(-1, self.joined))


class Qwen3VisionTower(VisionTower):
    """`Qwen3VLVisionModel`."""
    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        conv = self.patch_embed.proj
        self.patch_embed.proj = nn.Conv3d(3, conv.out_channels, conv.kernel_size, conv.stride)
        self.pos_embed = nn.Embedding(config.vision_num_position_embeddings, conv.out_channels)
        self.blocks = nn.ModuleList(Qwen3VisionBlock(config) for _ in range(config.vision_depth))
        self.merger = Qwen3PatchMerger(config, after=False)
        self.deepstack = config.vision_deepstack_visual_indexes
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3PatchMerger(config, after=True) for _ in self.deepstack)

    def forward(self, patches: Tensor, grids: list[tuple[int, int]], checkpoint: str = "none"
                ) -> Tensor:
        """Returns [1 + L, N/4, D]: the image tokens, and what is added to them after each of the
        first L layers of the decoder, in the order of the blocks, whatever that of the indexes.
        patches [N, 3·2·16·16]."""
        rotary, _, images = self.lay_out(patches, grids, 2 ** 20)       # one window an image
        proj = self.patch_embed.proj
        x = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        x = x + torch.cat([self.positions(gh, gw) for gh, gw in grids]).to(x.dtype)
        added = {}
        for i, block in enumerate(self.blocks):
            x = apply_block(block, checkpoint, x, rotary, images)
            if i in self.deepstack:
                added[i] = self.deepstack_merger_list[self.deepstack.index(i)](x)
        return torch.stack([self.merger(x), *added.values()])

    def positions(self, gh: int, gw: int) -> Tensor:
        """Returns the square table, stretched over an image of gh × gw patches so that corner lies
        on corner, [gh·gw, width]."""
        table = self.pos_embed.weight
        side, merge = round(len(table) ** 0.5), self.config.vision_spatial_merge_size
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        wide = rearrange(wide, "(h w) d -> 1 d h w", h=side)
        stretched = F.interpolate(wide, (gh, gw), mode="bilinear", align_corners=True)[0]
        return rearrange(stretched, "d (h a) (w b) -> (h w a b) d", a=merge, b=merge)


class Qwen3Attention(Attention):
    """`Qwen3VLTextAttention`."""
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        for product in (self.q_proj, self.k_proj, self.v_proj):
            product.register_parameter("bias", None)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        qk, v = super().project(x)
        q, k = qk.split((self.heads, self.kv_heads), 1)
        return torch.cat((self.q_norm(q), self.k_norm(k)), 1), v


class Qwen3DecoderLayer(DecoderLayer):
    """`Qwen3VLTextDecoderLayer`."""
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.self_attn = Qwen3Attention(config, layer)


class Qwen3_VL(Qwen2_5_VL):
    """`Qwen3VLForConditionalGeneration`."""
    Tower: type = Qwen3VisionTower
    Layer: type = Qwen3DecoderLayer
    stored_as: ClassVar[dict[str, str]] = {"visual.": "model.visual.",
                                           "model.": "model.language_model."}

    @staticmethod
    def axes(section: tuple[int, ...]) -> list[int]:
        """Returns t h w t h w …, until an axis has had its share; then t.

        >>> Qwen3_VL.axes((4, 2, 1))
        [0, 1, 2, 0, 1, 0, 0]
        """
        return [i % 3 if i // 3 < section[i % 3] else 0 for i in range(sum(section))]

    def insert_image(self, x: Tensor, at_image: Tensor, image: Tensor) -> Tensor:
        """Returns [1 + L, B, T, D]: the embeddings, and what is added after each of the first L
        layers, 0 but at images. image [1 + L, N/4, D]."""
        insert, nothing = super().insert_image, torch.zeros_like(x)
        return torch.stack([insert(x if i == 0 else nothing, at_image, each)
                            for i, each in enumerate(image)])

    def decode(self, x: Tensor, position: Tensor, attend: Attend, checkpoint: str = "none"
               ) -> Tensor:
        """Returns the final hidden states. x: [1 + L, B, T, D], or [B, T, D] without an image."""
        x, *added = x if x.dim() == 4 else (x,)
        rotary = self.rotary(position)
        for i, layer in enumerate(self.model.layers):
            x = apply_block(layer, checkpoint, x, rotary, attend)
            x = x + added[i] if i < len(added) else x
        return self.model.norm(x)

