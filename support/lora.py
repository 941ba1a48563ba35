"""LoRA (arXiv 2106.09685): W + (α/r)·B·A instead of W, where only A and B learn. It is put on a
loaded model from outside (support/equip.py).

A layer holds the sum, in the type of the weights. So sampling, scoring and a merged folder use the
same numbers, and the log-probs of sampling and of training are no further apart than without LoRA.
The base waits in the host's memory, and the sum is made anew after every optimizer step.

With y = x·Wᵀ, s = α/r and g = ∂L/∂y the gradients are ∂L/∂B = s·gᵀ·(x·Aᵀ) and ∂L/∂A = s·(g·B)ᵀ·x:
no matrix of the size of W is needed. A and B are float32.

A checkpoint is an adapter in the layout of PEFT, which `peft` opens, with the tokenizer and the
config of its base. experiments/merge.py makes a whole model of it.
"""
import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.files import as_json, check_regular, read_record
from support.mistakes import Mistake

# What can be frozen → how the names of its parameters begin.
PARTS = {"tower": ("visual.patch_embed.", "visual.pos_embed.", "visual.blocks."),
         "merger": ("visual.merger.", "visual.deepstack_merger_list."),
         "decoder": ("model.layers.", "model.norm."),
         "embeddings": ("model.embed_tokens.", "lm_head.")}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Gradient(torch.autograd.Function):
    """Returns y, which was made with the sum W + s·B·A. In backward its gradient goes to A and B
    as well. y [..., N], x [..., K], A [r, K], B [N, r]."""
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.s = s
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, A, B = ctx.saved_tensors
        gs, xs = g.flatten(0, -2), x.flatten(0, -2)
        for_B = gs.mT @ (xs @ A.to(x.dtype).mT)
        for_A = (gs @ B.to(g.dtype)).mT @ xs
        return g, None, ctx.s * for_A.to(A.dtype), ctx.s * for_B.to(B.dtype), None


class LowRank(nn.Module):
    """Mix-in for a Linear with an adapter; comes before the layer's own class. weight: the sum;
    base: W, in the host's memory."""
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    base: Tensor
    alpha: float
    of: str             # the base by its path or hub id
    digest: str         # and what it is (weights.model_digest)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not torch.is_grad_enabled():
            return y
        s = self.alpha / len(self.lora_A)
        return Gradient.apply(y, x.detach(), self.lora_A, self.lora_B, s)

    @torch.no_grad()
    def merge(self) -> None:
        base = self.base.to(self.weight.device)
        self.weight.copy_(merged(base, self.lora_A, self.lora_B, self.alpha))


@contextlib.contextmanager
def without_adapters(model: nn.Module):
    """Gives every layer the weights of its base, for a while: the reference of --kl needs no second
    model. A model without adapters stays as it is."""
    layers = adapters(model).values()
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(layer.base)
        yield
    finally:
        for layer in layers:
            layer.merge()


def merged(base: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    return torch.addmm(base.to(A.dtype), B, A, alpha=alpha / len(A))


def freeze(model: nn.Module, parts: str) -> None:
    """Lets the parameters of `parts` learn nothing; the optimizer does not see them. parts: names
    of PARTS, with commas between. Raises Mistake if there is no such part, or nothing learns."""
    wanted = [part for part in parts.split(",") if part]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise Mistake(f"--freeze {parts}: there is no part {unknown[0]!r}; the parts are "
                      f"{', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        if any(name.startswith(PARTS[part]) for part in wanted):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise Mistake(f"--freeze {parts} leaves nothing that learns")


def add_lora(model: nn.Module, rank: int, alpha: float, targets: str, of: str, digest: str = ""
             ) -> None:
    """Freezes the model, and gives an adapter to each Linear that was not frozen before and whose
    name begins with a match of `targets`, a regular expression. A is drawn from torch's global
    generator as PEFT draws it; B is 0.

    of: the model by its path or hub id. digest: weights.model_digest of it. Raises Mistake if no
    name matches."""
    try:
        chosen = [layer for name, layer in model.named_modules()
                  if isinstance(layer, nn.Linear) and name != "lm_head"
                  and re.match(targets, name) and layer.weight.requires_grad]
    except re.error as error:
        raise Mistake(
            f"--lora-targets {targets}: this is no regular expression ({error})") from None
    if not chosen:
        raise Mistake(f"--lora-targets {targets} matches no linear layer that is not frozen; their "
                      "names are such as model.layers.0.self_attn.q_proj, "
                      "model.layers.0.mlp.up_proj, visual.blocks.0.attn.qkv, visual.merger.mlp.0")
    model.requires_grad_(False)
    for layer in chosen:
        N, K = layer.weight.shape
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        layer.lora_A = nn.Parameter(torch.empty(rank, K, dtype=wide))
        nn.init.kaiming_uniform_(layer.lora_A, a=5 ** 0.5)
        layer.lora_B = nn.Parameter(torch.zeros(N, rank, dtype=wide))
        base = layer.weight.detach().to("cpu", copy=True)
        layer.__class__ = type("LowRankLinear", (LowRank, type(layer)), {})
        base = base.pin_memory() if layer.weight.is_cuda else base
        vars(layer).update(base=base, alpha=alpha, of=of, digest=digest)
        layer.to(layer.weight.device)


def adapters(model: nn.Module) -> dict[str, LowRank]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}


def merge_after(optimizer, model: nn.Module) -> None:
    """Makes the layers hold the new sums as soon as the optimizer has made a step."""
    if layers := adapters(model).values():
        optimizer.register_step_post_hook(lambda *_: [layer.merge() for layer in layers])


# --------------------------------------------------------------------------------------------------
# Folders in the layout of PEFT

@dataclass
class Adapter:
    folder: Path
    of: str                                     # the base by its path or hub id
    base: str                                   # its digest; "" where nobody wrote it down
    alpha: float
    matrices: dict[str, tuple[Tensor, Tensor]]  # name of a layer → A, B


def name_in_peft(layer: str, which: str) -> str:
    inner = (f"model.{layer}" if layer.startswith("visual.")
             else layer.replace("model.", "model.language_model.", 1))
    return f"base_model.model.{inner}.lora_{which}.weight"


def save_adapter(model: nn.Module, folder: Path) -> None:
    layers = adapters(model)
    tensors = {name_in_peft(name, which): getattr(layer, f"lora_{which}").detach().cpu()
               for name, layer in layers.items() for which in "AB"}
    some = next(iter(layers.values()))
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "base": some.digest})
    targets = sorted({name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors})
    (folder / CONFIG).write_text(as_json({
        "peft_type": "LORA", "base_model_name_or_path": some.of, "r": len(some.lora_A),
        "lora_alpha": some.alpha, "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True}, 1))


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter. Raises Mistake if it is damaged, or not the plain LoRA of this file."""
    config = read_record(folder / CONFIG, base_model_name_or_path=str, r=int)
    of, alpha = config["base_model_name_or_path"], config.get("lora_alpha")
    check_regular(folder / WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            stored = {name: weights.get_tensor(name) for name in weights.keys()}
            base = (weights.metadata() or {}).get("base", "")
    except (OSError, SafetensorError) as error:
        raise Mistake(
            f"{folder}: the adapter cannot be read ({type(error).__name__}: {error})") from None
    if config["r"] < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise Mistake(f"{folder / CONFIG}: r is {config['r']} and lora_alpha {str(alpha)[:100]!r}; "
                      "r must be 1 or more, and lora_alpha a number")
    for field, plain in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(field, plain) != plain:
            raise Mistake(f"{folder / CONFIG}: {field} is {config[field]!r}; only {plain!r} is "
                          "supported")
    for field in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
                  "modules_to_save"):
        if config.get(field):
            raise Mistake(f"{folder / CONFIG}: {field} is {config[field]!r}, which is not "
                          "supported")
    matrices: dict[str, dict[str, Tensor]] = {}
    for stored_name, tensor in stored.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", stored_name)
        if not found:
            raise Mistake(f"{folder / WEIGHTS}: unknown tensor {stored_name!r}")
        name = found[1].replace("model.visual.", "visual.")
        name = name.replace("model.language_model.", "model.")
        matrices.setdefault(name, {})[found[2]] = tensor
    if torn := [name for name, pair in matrices.items() if len(pair) < 2]:
        raise Mistake(f"{folder / WEIGHTS}: {torn[0]} has only one of A and B")
    pairs = {name: (pair["A"], pair["B"]) for name, pair in matrices.items()}
    for name, (A, B) in pairs.items():
        if not A.dim() == B.dim() == 2 or not len(A) == B.shape[1] == config["r"]:
            raise Mistake(f"{folder / WEIGHTS}: A and B of {name} are of shapes {tuple(A.shape)} "
                          f"and {tuple(B.shape)}; {CONFIG} says that their rank r is {config['r']}")
    if not pairs:
        raise Mistake(f"{folder / WEIGHTS} holds no matrices")
    return Adapter(folder, of, base, alpha, pairs)


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Adds the adapter to the weights of a plain model. Raises Mistake if it is another's."""
    layers = dict(model.named_modules())
    for name, (A, B) in adapter.matrices.items():
        weight = layers[name].weight if isinstance(layers.get(name), nn.Linear) else None
        if weight is None or (len(B), A.shape[1]) != tuple(weight.shape):
            there = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
            raise Mistake(f"{adapter.folder / WEIGHTS} does not fit to {adapter.of}: {name} is "
                          f"{there} there")
        weight.copy_(merged(weight, A, B, adapter.alpha))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Loads A and B into a model that has adapters, to go on learning. Raises Mistake if it has
    other ones."""
    layers, adapter = adapters(model), read_adapter(folder)
    for name in layers.keys() | adapter.matrices.keys():
        layer = layers.get(name)
        shapes = layer and [p.shape for p in (layer.lora_A, layer.lora_B)]
        if shapes != [p.shape for p in adapter.matrices.get(name, ())]:
            raise Mistake(f"{adapter.folder / WEIGHTS} is not of this run: {name} has another "
                          "adapter, or none")
    for name, layer in layers.items():
        for own, stored in zip((layer.lora_A, layer.lora_B), adapter.matrices[name]):
            own.copy_(stored)
        layer.merge()
