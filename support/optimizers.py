"""Optimizers and the learning rate.

With --precision bfloat16 weights and gradients are bfloat16, 4 bytes a parameter on every rank; the
float32 weights and AdamW's two moments, 12 bytes a parameter, are sharded over the ranks.
--offload-optimizer keeps these in the host's memory, where the host's cores update them.
"""
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MasterAdamW(torch.optim.Optimizer):
    """AdamW of bfloat16 weights: updates float32 copies ("master", part of the state), then rounds
    them to the weights. Without the copies every update below 1/256 of a weight is lost, at a
    learning rate of 1e-6 nearly all of them. host: the state lies in the host's memory, and the
    host updates it."""
    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8,
                 host: bool = False):
        self.host = host
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None) -> None:      # type: ignore[override]
        todo = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = self.fetch([p.grad for _, p in todo])
        for (group, p), gradient in zip(todo, gradients, strict=True):
            (beta1, beta2), lr, state, g = group["betas"], group["lr"], self.state[p], gradient.float()
            if not state:
                state.update(step=torch.tensor(0.0), master=p.to(g.device, torch.float32, copy=True),
                             exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
            state["step"] += 1
            t = float(state["step"])
            state["exp_avg"].lerp_(g, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (state["exp_avg_sq"] / (1 - beta2 ** t)).sqrt_().add_(group["eps"])
            state["master"].mul_(1 - lr * group["weight_decay"])
            state["master"].addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1 ** t))
            p.copy_(state["master"].to(p.dtype))

    def fetch(self, gradients: list[Tensor]) -> Iterator[Tensor]:
        """Yields the gradients where the state lies, in turn. From a GPU to the host the next one
        is on its way, into pinned memory, while one is worked on."""
        if not self.host or not gradients or not gradients[0].is_cuda:
            yield from gradients
            return

        def begin(gradient: Tensor) -> tuple[Tensor, torch.cuda.Event]:
            copy, there = gradient.to("cpu", non_blocking=True), torch.cuda.Event()
            there.record()
            return copy, there
        coming = begin(gradients[0])
        for following in [*gradients[1:], None]:
            (copy, there), coming = coming, begin(following) if following is not None else coming
            there.synchronize()
            yield copy


def learn(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def state_bytes(model: nn.Module) -> int:
    """Returns the size of the optimizer's state over all ranks: two float32 moments of each weight,
    and a float32 copy of each bfloat16 one."""
    return sum(p.numel() * (12 if p.dtype == torch.bfloat16 else 8) for p in learn(model))


def make_optimizers(cfg, model: nn.Module) -> list:
    """Returns AdamW, its state sharded over the ranks; or Muon for the matrices and AdamW for the
    rest, the same on all. Of the parameters that are not frozen."""
    parameters = learn(model)
    kind = MasterAdamW if any(p.dtype == torch.bfloat16 for p in parameters) else torch.optim.AdamW
    adamw: dict = {"lr": cfg.lr, "betas": (0.9, 0.999), "eps": cfg.adam_eps, "weight_decay": cfg.weight_decay}
    if cfg.offload_optimizer:
        adamw["host"] = True
    if cfg.optimizer == "muon":
        embedding = model.model.embed_tokens.weight, model.lm_head.weight
        matrices = [p for p in parameters if p.dim() == 2 and not any(p is e for e in embedding)]
        rest = [p for p in parameters if not any(p is m for m in matrices)]
        muon = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        return ([torch.optim.Muon(matrices, **muon)] if matrices else []) + (     # an adapter has matrices alone
            [torch.optim.AdamW(rest, **adamw)] if rest else [])
    if dist.get_world_size() == 1:
        return [kind(parameters, **adamw)]
    from torch.distributed.optim import ZeroRedundancyOptimizer     # takes more than a second: only where it is used
    return [ZeroRedundancyOptimizer(parameters, kind, **adamw)]


def share_of_lr(cfg, step: int) -> float:
    """Returns 1, after cfg.warmup_steps of linear warm-up and before a linear decay over the last
    cfg.cooldown of all steps; never below 0. step from 0."""
    up = (step + 1) / cfg.warmup_steps if cfg.warmup_steps else 1.0
    down = (cfg.steps - step) / (cfg.cooldown * cfg.steps) if cfg.cooldown else 1.0
    return max(0.0, min(1.0, up, down))


def short_run(cfg) -> str:
    """Returns a warning if warm-up and cool-down meet, so that the full rate is never reached."""
    most = max(share_of_lr(cfg, step) for step in range(min(cfg.steps, cfg.warmup_steps + 1)))
    return "" if most == 1 else (
        f"; {cfg.steps} steps are so few that the learning rate reaches {most * cfg.lr:.1e} only, of {cfg.lr:.1e} "
        f"(--warmup-steps {cfg.warmup_steps}, --cooldown {cfg.cooldown})")


def set_lr(cfg, optimizers: list, step: int) -> float:
    """Sets the learning rate of a step, and returns it."""
    lr = cfg.lr * share_of_lr(cfg, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return lr
