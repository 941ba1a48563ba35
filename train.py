"""ViSurf (arXiv 2510.10606) in plain PyTorch DDP: supervised and reinforcement fine-tuning in one stage.

    torchrun train.py                                      the built-in world and the tiny model: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --model FOLDER --data FILE.jsonl --precision bfloat16

One step: sample G rollouts of each prompt (rollout.py), reward them and the label y side by side, with the three
controls (rewards.py), normalise the G+1 rewards (objective.py), score every group as one packed row (data.py,
model.py), one optimizer step. Every metric that is logged is defined in README.md.

The paper leaves the learning rate, the batch, the std and the length normalisation open: they are options.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import objective
from checkpoint import gather_json, load_optimizer, newest_checkpoint, open_run, save_checkpoint
from data import Batch, Processor, Prompt, Row, collate, load, pack_group, take
from eval import Record, draw_overlay, evaluate, summarise, table
from model import Qwen2_5_VL
from rewards import LABEL_STYLES, TASKS, Reward, label_reward, label_text, smooth
from rollout import Response, generate

MAX_BAD_STEPS = 10  # non-finite steps in a row before a run gives up


def option(default, text: str, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass
class Config:
    """Every option of train.py; saved with the run."""
    method: str = option("visurf", "visurf (Eq. 8), rlvr (GRPO), sft (cross-entropy)", ("visurf", "rlvr", "sft"))
    model: str = option("assets/tiny", "model folder in the Hugging Face layout, or hub id")
    data: str = option("scenes:train", "scenes:SPLIT, or a .jsonl file (columns id, image, problem, solution, task)")
    name: str = option("", "the run's folder is runs/NAME (default: the method and the time); never overwritten")
    resume: str = option("", "run folder to go on with, from its newest checkpoint and its saved options")
    seed: int = option(42, "seeds the order of the data, the rollouts and random weights")
    steps: int = option(300, "optimizer steps (with --inner-epochs E: sampling rounds of E optimizer steps)")
    prompts_per_step: int = option(16, "prompts per step over all ranks [paper.md 1: 16]")
    rollouts: int = option(8, "G, rollouts of each prompt [paper.md 1: 8]")
    max_new_tokens: int = option(128, "R, longest response; a longer rollout is truncated [paper.md 1: 2000]")
    temperature: float = option(1.0, "T of sampling and scoring [paper.md 1: 1.0]")
    micro_rows: int = option(4, "rows per forward; any value gives the same update")
    max_row_tokens: int = option(0, "a group whose row is longer becomes several rows (0: no limit)")
    lr: float = option(2e-4, "learning rate [paper.md 1: 1e-6, constant, for 7B]")
    warmup_steps: int = option(10, "steps of linear warm-up")
    cooldown_steps: int = option(220, "last steps, of linear decay to 0; a shorter run starts lower")
    optimizer: str = option("adamw", "adamw; muon: Muon for matrices, AdamW for the rest (for pretraining)",
                            ("adamw", "muon"))
    weight_decay: float = option(0.01, "decoupled weight decay [paper.md 1: 1e-2]")
    grad_clip: float = option(1.0, "largest gradient norm [paper.md 1: 1.0]")
    clip: float = option(0.2, "ε of the clipped surrogate, Eq. 8 [paper.md 1: 0.2]; inert with one inner epoch")
    kl: float = option(0.0, "weight of the k3 KL to the frozen initial model; ViSurf has none")
    inner_epochs: int = option(1, "optimizer steps per sampling round [paper.md 1: 1]")
    std: str = option("sample", "std R of Eq. 6 and 7", ("sample", "population", "none"))
    normaliser: str = option("token-mean", "length normalisation; seq-sum is Eq. 9 to the letter",
                             ("token-mean", "seq-mean", "seq-sum"))
    label_style: str = option("spaced", "control 1, the text of y: spaced (the paper's), compact (off), auto (what the "
                              "policy finds likeliest)", (*LABEL_STYLES, "auto"))
    no_thinking_reward: bool = option(True, "control 2: y earns no thinking reward")
    smoothing: bool = option(True, "control 3: r(y) := mean r(o) once a rollout is as good as y")
    precision: str = option("float32", "compute precision; weights and optimizer stay float32", ("float32", "bfloat16"))
    checkpoint_activations: bool = option(False, "recompute each block in backward: less memory, about 30 %% more time")
    random_weights: bool = option(False, "take only config and tokenizer from --model (for pretraining)")
    eval_data: str = option("scenes:val", "evaluated before, during and after; empty: never")
    eval_examples: int = option(192, "how many of it")
    eval_every: int = option(100, "steps between evaluations (0: only before and after)")
    save_every: int = option(100, "steps between checkpoints (0: only at the end)")
    log_every: int = option(10, "steps between printed lines; metrics.jsonl has every step")

    def check(self, world: int) -> None:
        for flag, wrong, rule in (
                ("prompts-per-step", self.prompts_per_step < 1 or self.prompts_per_step % world,
                 f"must be a multiple of the {world} ranks"),
                ("rollouts", self.method != "sft" and self.rollouts < 2, "must be 2 or more, or no group has a spread"),
                ("temperature", self.temperature <= 0, "must be above 0"),
                ("inner-epochs", self.inner_epochs < 1, "must be at least 1"),
                ("micro-rows", self.micro_rows < 1, "must be at least 1"),
                ("kl", self.kl and self.method == "sft", "has no meaning with --method sft")):
            if wrong:
                raise SystemExit(f"--{flag} {getattr(self, flag.replace('-', '_'))}: {rule}")


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags → Config. With --resume the run's saved options are the defaults. Unknown flags are errors."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"]}
        shown = "" if f.type is bool else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + shown, **kind)
    given = vars(parser.parse_args(arguments))
    saved = {}
    if given.get("resume"):
        path = Path(given["resume"]) / "config.json"
        if not path.exists():
            raise SystemExit(f"--resume {given['resume']}: there is no {path}")
        saved = json.loads(path.read_text())["config"]
    return Config(**{**saved, **given})


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

def start_ranks() -> tuple[int, int, torch.device]:
    """Joins the process group that torchrun describes (alone without it). Returns rank, world size, device."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        if (ranks_here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))  # share the cores
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks() -> None:
    """Gloo's worker thread frees the tensors of its last collective, for which it needs the GIL; a process group (or a
    DDP wrapper) freed at that moment holds the GIL and waits for the thread, for ever. So the thread goes first."""
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()


def add_over_ranks(values: list[float], device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class Meter(defaultdict):
    """Named quantities, joined over micro-batches and ranks: name → [sum, number of values]; a total has number 0."""
    def __init__(self):
        super().__init__(lambda: [0.0, 0])

    def add(self, name: str, values) -> None:
        """A mean: every element of `values` (tensor or list) counts once. No element, no entry."""
        values = values.double().flatten().tolist() if isinstance(values, Tensor) else [float(v) for v in values]
        if values:
            self[name][0] += sum(values)
            self[name][1] += len(values)

    def total(self, name: str, value: float) -> None:
        self[name][0] += value

    def read(self, device) -> dict[str, float]:
        joined = Meter()
        for part in gather_json(self, device):
            for name, (total, count) in part.items():
                joined[name][0] += total
                joined[name][1] += count
        return {name: total / count if count else total for name, (total, count) in joined.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Groups: sampling, rewards, advantages

@dataclass
class Group:
    """A prompt and its S responses: y first unless the method is rlvr, then the rollouts unless it is sft."""
    prompt: Prompt
    responses: list[list[int]]
    rollouts: list[Response]
    advantage: list[float]                  # S
    rewards: list[Reward] = field(default_factory=list)   # of the rollouts
    y_reward: Reward | None = None          # of y after control 2
    r_y: float | None = None                # after control 3
    smoothed: bool = False


def label_tokens(cfg: Config, model: Qwen2_5_VL, processor: Processor, prompt: Prompt) -> tuple[str, list[int]]:
    """Control 1: the text of y and its ids, tok(y) + EOS."""
    styles = LABEL_STYLES if cfg.label_style == "auto" else (cfg.label_style,)
    texts = [label_text(prompt.example.task, prompt.answer, style, prompt.example.thought) for style in styles]
    ids = [processor.encode(text) for text in texts]
    best = 0
    if len(set(texts)) > 1:
        batch = collate(pack_group(prompt, ids), model.lm_head.weight.device)
        with torch.no_grad():
            logp, _ = model(**vars(batch), temperature=cfg.temperature)
        best = max(range(len(ids)), key=lambda s: float(logp[batch.segment == s + 1].sum()))
    return texts[best], ids[best]


def make_groups(cfg: Config, model: Qwen2_5_VL, processor: Processor, prompts: list[Prompt], step: int) -> list[Group]:
    """Sections 3.2 to 3.4 of the paper: rollouts, rewards with their controls, advantages (Eq. 6 and 7)."""
    if cfg.method == "sft":
        return [Group(p, [label_tokens(cfg, model, processor, p)[1]], [], [1.0]) for p in prompts]
    groups = []
    sampled = generate(model, prompts, cfg.rollouts, cfg.max_new_tokens, cfg.temperature, cfg.seed, step)
    for prompt, rollouts in zip(prompts, sampled):
        task = prompt.example.task
        rewards = [TASKS[task].reward(processor.decode(o.tokens), prompt.answer) for o in rollouts]
        group = Group(prompt, [o.tokens for o in rollouts], rollouts, [], rewards)
        r = [reward.total for reward in rewards]
        if cfg.method == "visurf":
            y, ids = label_tokens(cfg, model, processor, prompt)
            group.y_reward = label_reward(task, y, prompt.answer, cfg.no_thinking_reward)
            group.r_y = group.y_reward.total
            if cfg.smoothing:
                group.r_y, group.smoothed = smooth(group.r_y, r)
            group.responses, r = [ids, *group.responses], [group.r_y, *r]
        group.advantage = objective.group_advantages(torch.tensor(r, dtype=torch.float64), cfg.std).tolist()
        groups.append(group)
    return groups


def measure_groups(cfg: Config, groups: list[Group], meter: Meter) -> None:
    """What the groups say before any gradient; each name is defined in README.md."""
    for group in groups:
        if cfg.method == "sft":
            continue
        meter.add("r_rollouts", [reward.total for reward in group.rewards])
        for reward in group.rewards:
            for term, points in reward.terms.items():
                meter.add(f"rollouts/{term}", [points])
            meter.add("unreadable", [reward.error is not None])
            if reward.error:
                meter.total(f"errors/{reward.error}", 1)
        meter.add("response_length", [len(o.tokens) for o in group.rollouts])
        meter.add("truncated", [o.truncated for o in group.rollouts])
        meter.add("tied", [not any(group.advantage)])
        if cfg.method == "visurf":
            for term, points in group.y_reward.terms.items():
                meter.add(f"y/{term}", [points])
            meter.add("r_y", [group.r_y])
            meter.add("advantage_y", group.advantage[:1])
            meter.add("smoothed", [group.smoothed])


# ---------------------------------------------------------------------------------------------------------------------
# The update

@dataclass
class MicroBatch:
    batch: Batch
    advantage: Tensor            # [B, T] per token
    weight: Tensor               # [B, T]; all 0 on a rank that only keeps the others company
    is_y: Tensor                 # [B, T] bool
    sampled_logp: Tensor         # [B, T], NaN where the token was not sampled (y)
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None


def micro_batches(cfg: Config, groups: list[Group], device) -> tuple[list[MicroBatch], int]:
    """Packs the groups of this rank; returns as many micro-batches on every rank, and the denominator of the loss,
    counted over all ranks. Rows are sorted by length, so that little is padded."""
    rows: list[tuple[Row, Group]] = [
        (row, g) for g in groups for row in pack_group(g.prompt, g.responses, cfg.max_row_tokens)]
    rows.sort(key=lambda pair: len(pair[0].tokens), reverse=True)
    parts = [rows[i:i + cfg.micro_rows] for i in range(0, len(rows), cfg.micro_rows)]
    count = max(gather_json(len(parts), device))
    responses = [o for g in groups for o in g.responses]
    total = add_over_ranks([sum(map(len, responses)), len(responses)], device)
    made = []
    for i in range(count):
        part = parts[i] if i < len(parts) else parts[0][:1]
        batch = collate([row for row, _ in part], device)
        S = max(len(g.responses) for _, g in part)
        advantage = torch.tensor([g.advantage + [0.0] * (S - len(g.advantage)) for _, g in part], device=device)
        weight = objective.token_weight(batch.segment, cfg.normaliser) * (i < len(parts))
        sampled = torch.full(batch.tokens.shape, torch.nan, device=device)
        for line, (_, g) in zip(range(len(part)), part):
            first = len(g.responses) - len(g.rollouts)   # 1 if y comes first
            for j, o in enumerate(g.rollouts):
                here = batch.segment[line] == first + j + 1
                if here.any():
                    sampled[line, here] = torch.tensor(o.logp, device=device)
        is_y = (batch.segment == 1) if cfg.method != "rlvr" else torch.zeros_like(batch.segment, dtype=torch.bool)
        made.append(MicroBatch(batch, objective.per_token(advantage.float(), batch.segment), weight, is_y, sampled))
    return made, objective.denominator(int(total[0]), int(total[1]), cfg.normaliser)


def micro_loss(cfg: Config, logp: Tensor, mb: MicroBatch, denominator: int) -> Tensor:
    """This micro-batch's share of the loss; the shares of all ranks add up to it."""
    if cfg.method == "sft":
        return objective.sft_loss(logp, mb.weight, denominator)
    old_logp = logp.detach() if mb.old_logp is None else mb.old_logp  # one inner epoch: ρ ≡ 1 by construction
    loss = objective.policy_loss(logp, old_logp, mb.advantage, mb.weight, denominator, cfg.clip)
    if cfg.kl:
        loss = loss + cfg.kl * objective.kl_loss(logp, mb.ref_logp, mb.weight, denominator)
    return loss


def measure_update(cfg: Config, logp: Tensor, entropy: Tensor, mb: MicroBatch, denominator: int, meter: Meter) -> None:
    counted = mb.weight > 0
    rollouts, y = counted & ~mb.is_y, counted & mb.is_y
    meter.add("entropy", entropy[rollouts] if cfg.method != "sft" else entropy[y])
    if cfg.method != "rlvr":
        meter.add("logp_y", (logp * y).sum(1)[y.any(1)])
    if cfg.method == "sft":
        return
    meter.add("logp_gap", (logp - mb.sampled_logp).abs()[rollouts])
    size = (mb.weight * mb.advantage.abs()).double() / denominator
    for name, where in (("rlvr", rollouts), ("sft", y)):
        meter.total(f"{name}_weight", float(size[where].sum()))
        old_logp = logp if mb.old_logp is None else mb.old_logp
        clipped = objective.is_clipped(logp, old_logp, mb.advantage, cfg.clip)
        meter.add("clipped_rollouts" if name == "rlvr" else "clipped_y", clipped[where])


def update(cfg: Config, ddp: DistributedDataParallel, reference: Qwen2_5_VL | None, optimizers: list,
           groups: list[Group], meter: Meter) -> tuple[float, float, int]:
    """cfg.inner_epochs optimizer steps on the groups. Returns loss, gradient norm, and row tokens trained on.
    A step whose loss or gradient is not finite changes nothing, on any rank."""
    device = ddp.module.lm_head.weight.device
    batches, denominator = micro_batches(cfg, groups, device)
    settings = {"temperature": cfg.temperature, "checkpoint": cfg.checkpoint_activations}
    for mb in batches:
        with torch.no_grad(), compute(cfg, device):
            if cfg.inner_epochs > 1:
                mb.old_logp, _ = ddp.module(**vars(mb.batch), **settings)
            if reference is not None:
                mb.ref_logp, _ = reference(**vars(mb.batch), **settings)
    for epoch in range(cfg.inner_epochs):
        loss_sum = 0.0
        for i, mb in enumerate(batches):
            # Gradients are averaged over ranks once, after the last micro-batch; × world makes the average a sum.
            with ddp.no_sync() if i + 1 < len(batches) else contextlib.nullcontext():
                with compute(cfg, device):
                    logp, entropy = ddp(**vars(mb.batch), **settings)
                loss = micro_loss(cfg, logp, mb, denominator)
                (loss * dist.get_world_size()).backward()
            loss_sum += float(loss.detach())
            if epoch == cfg.inner_epochs - 1:
                measure_update(cfg, logp.detach(), entropy, mb, denominator, meter)
        loss_sum, = add_over_ranks([loss_sum], device)
        norm = float(nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip))
        if math.isfinite(loss_sum) and math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        ddp.zero_grad(set_to_none=True)
    return loss_sum, norm, sum(int((mb.batch.segment >= 0).sum()) for mb in batches)


def make_optimizers(cfg: Config, model: Qwen2_5_VL) -> list:
    """AdamW, its state sharded over the ranks; or Muon for the matrices and AdamW for the rest, the same on all."""
    adamw = {"lr": cfg.lr, "betas": (0.9, 0.999), "weight_decay": cfg.weight_decay}
    parameters = list(model.parameters())
    if cfg.optimizer == "muon":
        embedding = model.model.embed_tokens.weight, model.lm_head.weight
        matrices = [p for p in parameters if p.dim() == 2 and not any(p is e for e in embedding)]
        rest = [p for p in parameters if not any(p is m for m in matrices)]
        return [torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, **adamw)]
    if dist.get_world_size() == 1:
        return [torch.optim.AdamW(parameters, **adamw)]
    return [ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **adamw)]


def set_lr(cfg: Config, optimizers: list, step: int) -> None:
    """Constant, after cfg.warmup_steps of linear warm-up and before cfg.cooldown_steps of linear decay. step from 0."""
    up = (step + 1) / cfg.warmup_steps if cfg.warmup_steps else 1.0
    down = (cfg.steps - step) / cfg.cooldown_steps if cfg.cooldown_steps else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, up, down)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Job:
    """What the loop works with."""
    cfg: Config
    rank: int
    world: int
    device: torch.device
    ddp: DistributedDataParallel          # the loss goes through this, sampling through ddp.module
    reference: Qwen2_5_VL | None          # frozen, for --kl
    processor: Processor
    optimizers: list
    state: dict                           # step, cursor, bad_steps: with the weights and optimizers, a checkpoint
    run: Path = Path()

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def log(self, line: dict) -> None:
        if self.rank == 0:
            with open(self.run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def set_up() -> Job:
    cfg = parse_config()
    rank, world, device = start_ranks()
    cfg.check(world)
    checkpoint = newest_checkpoint(Path(cfg.resume)) if cfg.resume else None
    state = {"step": 0, "cursor": 0, "bad_steps": 0}
    if checkpoint:
        state = json.loads((checkpoint / "state.json").read_text())
    torch.manual_seed(cfg.seed)
    model = Qwen2_5_VL.from_pretrained(checkpoint or cfg.model, torch.float32, device,
                                       random_weights=cfg.random_weights and not checkpoint)
    if device.type == "cpu" and model.config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)   # so narrow a model gains nothing from threads, and loses where they wait for each other
    reference = None
    if cfg.kl:
        torch.manual_seed(cfg.seed)
        reference = Qwen2_5_VL.from_pretrained(cfg.model, torch.float32, device, cfg.random_weights)
        reference.requires_grad_(False)
    optimizers = make_optimizers(cfg, model)
    if checkpoint:
        for k, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, checkpoint / f"optimizer_{k}.safetensors")
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    job = Job(cfg, rank, world, device, ddp, reference, Processor(model.folder), optimizers, state)
    job.run = open_run(cfg, rank, device, state["step"])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    job.say(f"{cfg.method}: {size:.1f} M parameters of {checkpoint or cfg.model}, {world} rank(s) on {device.type}, "
            f"{cfg.precision}; writing to {job.run}")
    return job


def compute(cfg: Config, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def train_step(job: Job, source) -> dict:
    """Samples, updates, measures: a line of metrics.jsonl. Advances job.state."""
    cfg, state, meter, began = job.cfg, job.state, Meter(), time.time()
    set_lr(cfg, job.optimizers, state["step"])
    examples = take(source, state["cursor"], cfg.prompts_per_step, cfg.seed)
    share = cfg.prompts_per_step // job.world
    prompts = [job.processor.prompt(e) for e in examples[job.rank * share:(job.rank + 1) * share]]
    loaded = time.time()
    with compute(cfg, job.device):
        groups = make_groups(cfg, job.ddp.module, job.processor, prompts, state["step"])
    measure_groups(cfg, groups, meter)
    sampled = time.time()
    loss, norm, tokens = update(cfg, job.ddp, job.reference, job.optimizers, groups, meter)
    ended = time.time()
    finite = math.isfinite(loss) and math.isfinite(norm)
    state.update(step=state["step"] + 1, cursor=state["cursor"] + cfg.prompts_per_step,
                 bad_steps=0 if finite else state["bad_steps"] + 1)
    line = {"step": state["step"], "loss": loss, "grad_norm": norm, "skipped": not finite,
            "lr": job.optimizers[0].param_groups[0]["lr"], **meter.read(job.device)}
    sampled_tokens = sum(len(o.tokens) for g in groups for o in g.rollouts)
    sampled_tokens, tokens = add_over_ranks([sampled_tokens, tokens], job.device)
    if sampled_tokens:
        line["sampling_tokens_per_s"] = sampled_tokens / (sampled - loaded)
    return {**line, "training_tokens_per_s": tokens / (ended - sampled), "peak_memory_gb": peak_memory_gb(job.device),
            "seconds": ended - began, "seconds_data": loaded - began, "seconds_sampling": sampled - loaded}


def run_evaluation(job: Job, examples: list, history: dict[str, dict]) -> None:
    """Every rank answers its share; rank 0 draws its first answers, and prints the table of all evaluations so far."""
    cfg, step = job.cfg, job.state["step"]
    with compute(cfg, job.device):
        records, prompts = evaluate(job.ddp.module, job.processor, examples[job.rank::job.world], cfg.max_new_tokens,
                                    progress=job.rank == 0)
    if job.rank == 0:
        draw_overlay(records[:12], prompts[:12], job.run / "samples" / f"step_{step}.png")
    everyone = gather_json([vars(r) for r in records], job.device)
    history[f"step {step}"] = summarise([Record(**r) for part in everyone for r in part])
    job.log({"step": step, "eval": history[f"step {step}"]})
    job.say(f"{cfg.eval_data}, first {len(examples)}:\n" + table(history))


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB


def progress_line(m: dict) -> str:
    shown = (("loss", ".3f"), ("r_rollouts", ".2f"), ("rollouts/accuracy", ".2f"), ("rollouts/thinking", ".2f"),
             ("advantage_y", "+.2f"), ("smoothed", ".2f"), ("tied", ".2f"), ("logp_y", ".1f"), ("entropy", ".3f"),
             ("response_length", ".0f"), ("grad_norm", ".2f"), ("sampling_tokens_per_s", ".0f"),
             ("training_tokens_per_s", ".0f"))
    parts = (f"{name.split('/')[-1]} {m[name]:{form}}" for name, form in shown if name in m)
    return f"step {m['step']:>4}  " + "  ".join(parts)


def main() -> None:
    job = set_up()
    cfg, state = job.cfg, job.state
    source = load(cfg.data)
    held_out = load(cfg.eval_data) if cfg.eval_data else []
    held_out = [held_out[i] for i in range(min(cfg.eval_examples, len(held_out)))]
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    history: dict[str, dict] = {}
    if held_out and state["step"] == 0:
        run_evaluation(job, held_out, history)

    with tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=job.rank > 0) as bar:
        while state["step"] < cfg.steps:
            line = train_step(job, source)
            job.log(line)
            bar.update()
            if state["step"] % cfg.log_every == 0:
                job.say(progress_line(line))
            if line["skipped"]:
                job.say(f"step {line['step']} skipped: loss {line['loss']}, gradient norm {line['grad_norm']}")
            if state["bad_steps"] >= MAX_BAD_STEPS:
                raise SystemExit(f"{MAX_BAD_STEPS} steps in a row were not finite; the last good checkpoint is "
                                 f"{newest_checkpoint(job.run)}")
            done, stopping = state["step"] == cfg.steps, any(gather_json(bool(terminated), job.device))
            if held_out and (done or not stopping and cfg.eval_every and state["step"] % cfg.eval_every == 0):
                run_evaluation(job, held_out, history)
            if done or stopping or cfg.save_every and state["step"] % cfg.save_every == 0:
                save_checkpoint(job.run, job.ddp.module, job.optimizers, state, job.rank)
            if stopping and not done:
                job.say(f"stopped by SIGTERM at step {state['step']}; go on with --resume {job.run}")
                break
    job.say(f"metrics: {job.run}/metrics.jsonl   pictures: {job.run}/samples/   model: {newest_checkpoint(job.run)}")
    leave_ranks()


if __name__ == "__main__":
    main()
