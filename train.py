"""ViSurf (arXiv 2510.10606) in plain PyTorch DDP: supervised and reinforcement fine-tuning in one stage.

    torchrun train.py                                      the built-in world and the tiny model: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --preset paper    Qwen2.5-VL-7B on the authors' data

One step: sample G rollouts of each prompt (rollout.py), reward them and the label y side by side, with the three
controls (rewards.py), normalise the G+1 rewards (objective.py), score every group as one packed row (data.py,
model.py), one optimizer step. Every metric that is logged is defined in docs/logged.md.

Glossary
    y, o       the label of a prompt, as text; a rollout: an answer sampled from the policy. Both are responses
    group      a prompt with its responses: G rollouts and, with --method visurf, y before them
    r, Â       reward of a response; its advantage, normalised over the group
    row        a group as one sequence: the prompt once, then the responses (data.py); micro-batch: rows scored together
    step       a sampling round: --prompts-per-step groups, and one optimizer step on them (or --inner-epochs of them)
    [recipe]   in --help, a value of the authors' earlier public trainer (docs/paper.md, section 1)
"""
import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import objective
from data import Batch, Processor, Prompt, Response, Row, collate, load, pack_group
from eval import Record, evaluate, for_sheet, summarise, table, unknown_to
from model import Qwen2_5_VL
from rewards import LABEL_STYLES, TASKS, borrowed_thought, label_reward, label_text, reward_group
from rollout import generate
from support.checkpoints import (FIRST, checkpoints, keep_newest, load_optimizer, newest_checkpoint, read_state,
                                 room_for, save_checkpoint, sound_checkpoint)
from support.curves import draw_curves, tensorboard_writer, write_line
from support.files import remove
from support.log import Meter, measure_groups, memory_line, peak_memory_gb, progress_line
from support.lora import PARTS, add_lora, freeze, load_adapter, merge_after
from support.mistakes import Mistake, Stopped, run_main, stop_signals
from support.onednn import give_memory_back, use_onednn
from support.options import option, parse
from support.optimizers import learn, make_optimizers, set_lr, share_of_lr, short_run
from support.pictures import draw_sheet
from support.ranks import add_over_ranks, check_same_weights, gather_json, leave_ranks, start_ranks, wait_for_all
from support.runs import check_ours, is_ours, open_run, read_log, run_and_step, saved_options
from support.screen import CONTROL, say
from support.sources import Source, noticed, read, take
from support.verify_math import ended_now
from support.weights import local_folder, model_digest

MAX_BAD_STEPS = 10  # non-finite steps in a row before a run gives up
CHECKED_EVERY = 50  # steps between two looks at whether all ranks hold the same weights; before a checkpoint as well


# ---------------------------------------------------------------------------------------------------------------------
# Options

# Named sets of options; what is given on the command line wins. `paper` is the authors' earlier public recipe, as the
# paper leaves much open, without its KL and entropy bonus: docs/paper.md, section 1, has all of it.
AUTHORS = {"data": "Ricky06662/ViSurf_multi_non_object_7300_size840", "task": "grounding", "steps": 456,
           "eval_data": "", "lr": 1e-6, "adam_eps": 1e-8, "warmup_steps": 0, "cooldown": 0.0,
           "precision": "bfloat16", "checkpoint_activations": True}
SMALL_GPU = {"lora_rank": 16, "lr": 1e-5, "max_new_tokens": 512, "max_row_tokens": 2048, "sampling_batch": 8}
PRESETS = {
    "laptop": {},
    "paper": {**AUTHORS, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "max_new_tokens": 2000},
    "1x80G-3b": {**AUTHORS, "model": "Qwen/Qwen2.5-VL-3B-Instruct", "max_new_tokens": 512, "max_row_tokens": 4096},
    "1x80G-7b": {**AUTHORS, "model": "Qwen/Qwen2.5-VL-7B-Instruct", "max_new_tokens": 512, "max_row_tokens": 4096,
                 "offload_optimizer": True},
    "1x24G-3b": {**AUTHORS, **SMALL_GPU, "model": "Qwen/Qwen2.5-VL-3B-Instruct"},
    "1x24G-7b": {**AUTHORS, **SMALL_GPU, "model": "Qwen/Qwen2.5-VL-7B-Instruct"},
}


@dataclass
class Config:
    """Every option; saved with the run."""
    preset: str = option("laptop", "method", "named set of options, the defaults of all others", tuple(PRESETS))
    method: str = option("visurf", "method", "visurf (Eq. 8), rlvr (GRPO), sft (cross-entropy); the others: see "
                         "objective.py", objective.METHODS)
    label_weight: float = option(0.1, "method", "μ of chord, λ of sum", least=0, most=1)
    model: str = option("assets/tiny", "method", "model folder in the Hugging Face layout, run folder, or hub id")
    random_weights: bool = option(False, "method", "take only config and tokenizer from --model (for pretraining)")
    std: str = option("sample", "method", "std R of Eq. 6 and 7", ("sample", "population", "none"))
    normaliser: str = option("token-mean", "method", "length normalisation; seq-sum is Eq. 9 to the letter",
                             ("token-mean", "seq-mean", "seq-sum"))
    clip: float = option(0.2, "method", "ε of the clipped surrogate, Eq. 8 [recipe 0.2]; inert with one inner epoch",
                         least=0)
    clip_high: float = option(0.0, "method", "ε of the upper bound, 1 + ε, where it is another (0: as --clip)", least=0)
    entropy_bonus: float = option(0.0, "method", "weight of the entropy of each token, which is raised [recipe 1e-3]; "
                                  "ViSurf has none", least=0)
    inner_epochs: int = option(1, "method", "optimizer steps per sampling round [recipe 1]", least=1)
    kl: float = option(0.0, "method", "weight of the k3 KL to the frozen initial model; ViSurf has none", least=0)

    label_style: str = option("spaced", "controls", "control 1, the text of y: spaced (the paper's), compact (off), "
                              "auto (what the policy finds likeliest)", (*LABEL_STYLES, "auto"))
    label_thought: str = option("none", "controls", "what y says in front of its answer: none (the paper's), rollout "
                                "(the thought of a rollout of its group, y then being rewarded for it)",
                                ("none", "rollout"))
    reward_label_thinking: bool = option(False, "controls", "switches control 2 off: y earns the thinking reward too")
    smoothing: bool = option(True, "controls", "control 3: r(y) := mean r(o) once a rollout is as good as y")

    data: str = option("scenes:train", "data", "scenes:SPLIT, .jsonl or .parquet file, folder, or hub id")
    task: str = option("", "data", "task of rows without a column task (rewards.py), of --eval-data too", ("", *TASKS))
    columns: str = option("", "data", "FIELD=NAME,… for columns with other names; fields: question, answer, image, "
                          "choices, id")
    skip_bad_rows: bool = option(False, "data", "leave out rows that cannot be used, and list them")
    seed: int = option(42, "data", "seeds the order of the data, the rollouts and random weights", least=0)

    rollouts: int = option(8, "sampling", "G, rollouts of each prompt [recipe 8]", least=1)
    max_new_tokens: int = option(128, "sampling", "R, longest response; a longer one is truncated [recipe 2000]",
                                 least=1)
    temperature: float = option(1.0, "sampling", "T of sampling and scoring [recipe 1.0]", above=0)
    sampling_batch: int = option(32, "sampling", "prompts sampled or evaluated together; any value gives the same "
                                 "answers", least=1)
    cuda_graphs: bool = option(False, "sampling", "sample by CUDA graphs")

    steps: int = option(400, "optimisation", "optimizer steps (with --inner-epochs E: rounds of E steps each)", least=1)
    prompts_per_step: int = option(16, "optimisation", "prompts per step over all ranks [recipe 16]", least=1)
    lr: float = option(1e-3, "optimisation", "learning rate [recipe 1e-6, constant, for 7B]", above=0,
                       most=1e30)
    warmup_steps: int = option(10, "optimisation", "steps of linear warm-up", least=0)
    cooldown: float = option(0.625, "optimisation", "share of the steps, the last ones, of linear decay to 0",
                             least=0, most=1)
    optimizer: str = option("adamw", "optimisation", "adamw; muon: Muon for matrices, AdamW for the rest",
                            ("adamw", "muon"))
    adam_eps: float = option(1e-3, "optimisation", "eps of AdamW [recipe 1e-8]; far above a weight's usual gradient it "
                             "makes small gradients small steps", above=0)
    weight_decay: float = option(0.01, "optimisation", "decoupled weight decay [recipe 1e-2]", least=0)
    grad_clip: float = option(1.0, "optimisation", "largest gradient norm [recipe 1.0]", above=0)
    precision: str = option("float32", "optimisation", "of weights and gradients; the optimizer keeps float32 weights "
                            "either way", ("float32", "bfloat16"))
    offload_optimizer: bool = option(False, "optimisation", "with --precision bfloat16: float32 weights and moments in "
                                     "the host's memory, updated by its cores")
    freeze: str = option("", "optimisation", f"PART,… that learn nothing, of {', '.join(PARTS)}")
    lora_rank: int = option(0, "optimisation", "rank r of LoRA's adapters, which alone learn then (0: no LoRA)",
                            least=0)
    lora_alpha: float = option(32.0, "optimisation", "α of LoRA: the adapters count α/r times", above=0)
    lora_targets: str = option(r"model\.layers", "optimisation", "regular expression for the names of the linear "
                               "layers that get an adapter: visual.blocks, visual.merger, model.layers.3.mlp.up_proj …")
    micro_rows: int = option(1, "optimisation", "rows per forward; any value gives the same update", least=1)
    max_row_tokens: int = option(0, "optimisation", "a group whose row is longer becomes several rows (0: no limit)",
                                 least=0)
    checkpoint_activations: bool = option(False, "optimisation", "recompute each block in backward: less memory, about "
                                          "30 % more time")
    onednn: bool = option(True, "optimisation", "on a CPU, large float32 products by oneDNN")

    name: str = option("", "output", "the run's folder is runs/NAME (default: the method and the time)")
    resume: str = option("", "output", "run folder to go on with, from its newest sound checkpoint and its saved "
                         "options")
    from_step: int = option(0, "output", "with --resume: go on from that checkpoint (0: the newest sound one)", least=0)
    accept_changed_data: bool = option(False, "output", "go on although the data is not what it was")
    tensorboard: bool = option(False, "output", "writes the numbers as event files to runs/NAME/tensorboard, too")
    dry_run: bool = option(False, "output", "one step at worst-case length: memory and hours; writes nothing")
    eval_data: str = option("scenes:val", "output", "evaluated before, during and after; empty: never")
    eval_examples: int = option(192, "output", "how many of it", least=0)
    eval_every: int = option(100, "output", "steps between evaluations (0: only before and after)", least=0)
    save_every: int = option(100, "output", "steps between checkpoints (0: only at the end)", least=0)
    keep: int = option(2, "output", "how many checkpoints stay, the newest (0: all)", least=0)
    keep_best: str = option("", "output", "metric of the evaluations, such as T-acc, whose best checkpoint stays, too",
                            ("", *summarise([])))
    log_every: int = option(10, "output", "steps between printed lines; metrics.jsonl has every step", least=1)

    @property
    def G(self) -> int:
        """Rollouts of a prompt. SFT samples none, unless its label borrows a thought of them."""
        return 0 if self.method == "sft" and self.label_thought == "none" else self.rollouts

    def check(self, world: int) -> None:
        """Mistake: an option that cannot be, by its flag."""
        for flag, wrong, rule in (
                ("name", Path(self.name).name != self.name or self.name == "..", "must be a folder's name, not a path"),
                ("name", len(self.name.encode(errors="replace")) > 200 or CONTROL.search(self.name),
                 "must be a name of at most 200 bytes, without control characters"),
                ("prompts_per_step", self.prompts_per_step % world, f"must be a multiple of the {world} ranks"),
                ("rollouts", self.method != "sft" and self.rollouts < 2, "must be 2 or more, or no group has a spread"),
                ("optimizer", self.optimizer == "muon" and self.precision == "bfloat16",
                 "keeps no float32 weights; use --precision float32"),
                ("data", not self.data, "must name what is trained on"),
                ("label_thought", self.label_thought != "none" and self.method == "rlvr", "rlvr has no label"),
                ("offload_optimizer", self.offload_optimizer and (self.precision != "bfloat16" or self.lora_rank),
                 "is for the float32 copies of --precision bfloat16; --lora-rank and float32 have none"),
                ("lora_rank", self.lora_rank and self.random_weights,
                 "random weights are saved nowhere, and an adapter is nothing without them"),
                ("kl", self.kl and self.method == "sft", "has no meaning with --method sft")):
            if wrong:
                raise Mistake(f"--{flag.replace('_', '-')} {getattr(self, flag)}: {rule}")


# What may change when a run goes on. All else belongs to its checkpoints as well; model and data are known by digests.
RESUMABLE = ("resume", "from_step", "accept_changed_data", "dry_run", "steps", "eval_data", "eval_examples",
             "eval_every", "save_every", "keep", "keep_best", "log_every", "micro_rows", "max_row_tokens",
             "checkpoint_activations", "cuda_graphs", "sampling_batch", "onednn", "offload_optimizer",
             "tensorboard")


def parse_config(arguments: list[str] | None = None) -> Config:
    def read_flags(flags: list[str] | None) -> Config:
        return parse(Config, "train.py", __doc__, flags, PRESETS, RESUMABLE, saved_options)
    cfg = read_flags(arguments)
    if not cfg.resume and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        if not cfg.name:
            raise Mistake("torchrun --max-restarts starts this very command again: give a --name, by which the run is "
                          "found then")
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and (Path("runs") / cfg.name / "config.json").exists():
            cfg = read_flags(["--resume", f"runs/{cfg.name}"])
    return replace(cfg, resume=str(run_and_step(Path(cfg.resume))[0]) if cfg.resume else "")


# ---------------------------------------------------------------------------------------------------------------------
# Groups: sampling, rewards, advantages

@dataclass
class Group:
    """A prompt and its S responses: y first unless the method is rlvr, then the rollouts unless it is sft."""
    prompt: Prompt
    responses: list[Response]
    smoothed: bool = False

    @property
    def rollouts(self) -> list[Response]:
        return [o for o in self.responses if not o.is_y]


def label_tokens(cfg: Config, model: Qwen2_5_VL, processor: Processor, prompt: Prompt, before: str = ""
                 ) -> tuple[str, list[int]]:
    """Control 1: the text of y and its ids, tok(y) + EOS. before: a borrowed thought (rewards.borrowed_thought)."""
    styles = LABEL_STYLES if cfg.label_style == "auto" else (cfg.label_style,)
    texts = [label_text(prompt.example.task, prompt.answer, style, prompt.example.thought, before) for style in styles]
    ids = [processor.encode(text) for text in texts]
    best = 0
    if len(set(texts)) > 1:
        batch = collate(pack_group(prompt, [Response(each) for each in ids]), model.lm_head.weight.device)
        with torch.no_grad():
            logp, _ = model(**vars(batch), temperature=cfg.temperature)
        best = max(range(len(ids)), key=lambda s: float(logp[batch.segment == s + 1].sum()))
    return texts[best], ids[best]


def make_groups(cfg: Config, model: Qwen2_5_VL, processor: Processor, prompts: list[Prompt], first: int,
                stop: Sequence = ()) -> list[Group]:
    """Sections 3.2 to 3.4 of the paper: rollouts, rewards with their controls, advantages (Eq. 6 and 7). first: the
    place of the first prompt in the endless sequence of examples. Stopped: as soon as `stop` is not empty."""
    controls = cfg if cfg.method == "visurf" else replace(cfg, smoothing=False)     # the rivals have no control 3
    thinks = cfg.label_thought == "rollout"
    sampled: list[list[Response]] = []
    for i in range(0, len(prompts), cfg.sampling_batch):
        part = prompts[i:i + cfg.sampling_batch]
        places = range(first + i, first + i + len(part))
        sampled += [[] for _ in part] if not cfg.G else generate(
            model, part, cfg.G, cfg.max_new_tokens, cfg.temperature, cfg.seed, places, graphs=cfg.cuda_graphs,
            stop=stop)
    groups = []
    for place, (prompt, responses) in enumerate(zip(prompts, sampled), first):
        y, rollouts = None, [processor.decode(o.tokens) for o in responses]
        if cfg.method != "rlvr":
            before = borrowed_thought(rollouts, cfg.seed, place) if thinks else ""
            y, ids = label_tokens(cfg, model, processor, prompt, before)
            if before and 0 < cfg.max_row_tokens < len(prompt.tokens) + len(ids):
                y, ids = label_tokens(cfg, model, processor, prompt)    # its thought has more tokens than as sampled
            responses = [Response(ids, is_y=True, advantage=1.0), *responses]      # of sft; else Eq. 7 comes
        if cfg.method == "sft":
            groups.append(Group(prompt, responses[:1]))
            continue
        rewards, r, smoothed = reward_group(controls, prompt.example.task, prompt.answer, y, rollouts)
        advantage = objective.advantages(cfg, torch.tensor(r, dtype=torch.float64)).tolist()
        if smoothed:
            advantage[0] = 0.0        # it is the mean: what else comes out is rounding
        for response, *values in zip(responses, rewards, r, advantage, strict=True):
            response.reward, response.r, response.advantage = values
        groups.append(Group(prompt, responses, smoothed))
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# The update

@dataclass
class MicroBatch:
    batch: Batch                # what the model reads
    terms: dict[str, Tensor | None]    # what else `objective.loss` takes by name, [B, T] each


def micro_batch(cfg: Config, rows: list[Row], device, idle: bool) -> MicroBatch:
    """idle: the rows only take part, and weigh nothing."""
    batch = collate(rows, device)

    def each_token(values) -> Tensor:
        """values(o): a number for each token of a response; 0 in the prompt and in padding."""
        flat = torch.tensor([x for row in rows for o in row.responses for x in values(o)], device=device)
        return flat.new_zeros(batch.segment.shape).masked_scatter(batch.segment > 0, flat)
    return MicroBatch(batch, {
        "advantage": each_token(lambda o: [o.advantage] * len(o.tokens)),
        "reward": each_token(lambda o: [o.r] * len(o.tokens)),
        "is_y": each_token(lambda o: [o.is_y] * len(o.tokens)),
        "sampled_logp": each_token(lambda o: o.logp or [math.nan] * len(o.tokens)),
        "weight": objective.token_weight(batch.segment, cfg.normaliser) * (not idle), "ref_logp": None})


def pack(cfg: Config, groups: list[Group], device) -> tuple[list[MicroBatch], int, bool]:
    """The responses that are trained on, as micro-batches of rows, as many on every rank and at least one; the
    denominator of the loss, counted over all responses of all ranks; whether the loss needs the entropy's gradient.
    Rows are sorted by length, so that little is padded."""
    responses = [o for g in groups for o in g.responses]
    tokens, count = add_over_ranks([sum(len(o.tokens) for o in responses), len(responses)], device)
    kept, by_entropy = objective.trained_on(cfg, *(torch.tensor([getattr(o, name) for o in responses])
                                                   for name in ("advantage", "r", "is_y")))
    trained, rows = iter(kept.tolist()), []
    for group in groups:
        left = [o for o in group.responses if next(trained)]
        rows += pack_group(group.prompt, left, cfg.max_row_tokens)
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    parts = [rows[i:i + cfg.micro_rows] for i in range(0, len(rows), cfg.micro_rows)]
    # A rank with fewer rows than another takes part with one that weighs nothing: also in a step without any gradient.
    idle = parts[0][:1] if parts else pack_group(groups[0].prompt, responses[:1])
    most = max(1, *gather_json(len(parts), device))
    made = [micro_batch(cfg, parts[i] if i < len(parts) else idle, device, i >= len(parts)) for i in range(most)]
    return made, objective.divisor(int(tokens), int(count), cfg.normaliser), by_entropy


def update(cfg: Config, ddp: DistributedDataParallel, reference: Qwen2_5_VL | None, optimizers: list,
           groups: list[Group], meter: Meter, stop: Sequence = ()) -> tuple[float, float, int]:
    """cfg.inner_epochs optimizer steps on the groups. Returns loss, gradient norm, and row tokens trained on.
    A step whose loss or gradient is not finite changes nothing, on any rank. Stopped: as soon as `stop` is not empty
    on any rank and before the first optimizer step; nothing is changed then."""
    device = ddp.module.lm_head.weight.device
    batches, denominator, by_entropy = pack(cfg, groups, device)
    settings = {"temperature": cfg.temperature, "checkpoint": cfg.checkpoint_activations}
    for mb in batches:
        with torch.no_grad():
            if cfg.inner_epochs > 1:
                mb.terms["old_logp"], _ = ddp.module(**vars(mb.batch), **settings)
            if reference is not None:
                mb.terms["ref_logp"], _ = reference(**vars(mb.batch), **settings)
    for epoch in range(cfg.inner_epochs):
        loss_sum = 0.0
        for i, mb in enumerate(batches):
            if not epoch and any(gather_json(bool(stop), device)):
                ddp.zero_grad(set_to_none=True)
                raise Stopped
            # Gradients are averaged over ranks once, after the last micro-batch; × world makes the average a sum.
            with ddp.no_sync() if i + 1 < len(batches) else contextlib.nullcontext():
                logp, entropy = ddp(**vars(mb.batch), **settings, entropy_gradient=by_entropy)
                terms = {"old_logp": logp.detach()} | mb.terms      # with one inner epoch ρ ≡ 1 by construction
                loss, logged = objective.loss(cfg, logp=logp, entropy=entropy, segment=mb.batch.segment,
                                              denominator=denominator, **terms)
                (loss * dist.get_world_size()).backward()
            loss_sum += float(loss.detach())
            if epoch == cfg.inner_epochs - 1:
                meter.take(logged)
        loss_sum, = add_over_ranks([loss_sum], device)
        norm = float(nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip))
        if math.isfinite(loss_sum) and math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
            if not torch.stack([p.isfinite().all() for p in ddp.parameters()]).all():
                raise Mistake("the optimizer step made weights that are not finite: try a smaller --lr")
        ddp.zero_grad(set_to_none=True)
    return loss_sum, norm, sum(int((mb.batch.segment >= 0).sum()) for mb in batches)


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
    source: Source                        # of examples, to train on
    held_out: list = field(default_factory=list)          # examples to evaluate on
    run: Path = Path()
    stopped: list = field(default_factory=list)           # not empty as soon as a signal has come

    def say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def log(self, line: dict) -> None:
        if self.rank == 0:
            write_line(self.run, line, self.cfg.tensorboard)


def open_data(cfg: Config, processor: Processor, data: str):
    """The source of --data or --eval-data, by the same options."""
    flag = "--data" if data == cfg.data else "--eval-data"
    styles = tuple(LABEL_STYLES) if cfg.label_style == "auto" else (cfg.label_style,)

    def fits(example, size) -> list[tuple[str, str]]:
        return processor.check_label(example, size, styles, cfg.max_new_tokens, cfg.max_row_tokens, cfg.G > 0,
                                     cfg.label_thought == "rollout")
    return load(data, cfg.task, cfg.skip_bad_rows, cfg.columns, fits, flag)


def set_up() -> Job:
    cfg = parse_config()
    cfg.check(int(os.environ.get("WORLD_SIZE", "1")))
    rank, world, device = start_ranks()
    checkpoint, passed_over = checkpoint_to_resume(cfg, rank, device) if cfg.resume else (None, [])
    before = read_state(checkpoint) if checkpoint else FIRST
    if (Path(cfg.model) / "checkpoints").is_dir():      # of a run that may go on: what is meant now
        cfg = replace(cfg, model=str(newest_checkpoint(Path(cfg.model))))
    options = {name: value for name, value in asdict(cfg).items() if name not in (*RESUMABLE, "name", "model", "data")}
    if checkpoint:
        check_options(cfg, options, before, checkpoint)
    processor = Processor(checkpoint or cfg.model)
    # Before the model: a bad row is sooner found.
    sources = [open_data(cfg, processor, data) for data in (cfg.data, cfg.eval_data) if data]
    # Of rank 0: another node may hold a copy. The model behind an adapter or --kl is in no checkpoint.
    fingerprint, base = gather_json([sources[0].fingerprint, model_digest(
        local_folder(cfg.model)) if rank == 0 and (cfg.lora_rank or cfg.kl) else ""], device)[0]
    state = {**before, "data": fingerprint, "base": base, "options": options}
    if before["base"] not in ("", base):
        raise Mistake(f"--model {cfg.model} is not the model that {cfg.resume} began from: its weights or its "
                      "config.json have been replaced. Bring it back")
    if before["data"] not in ("", fingerprint) and not cfg.accept_changed_data:
        raise Mistake(f"--data {cfg.data} has changed since {checkpoint}: rows were added, removed or changed. Bring "
                      "it back, or go on with what it is now by --accept-changed-data")
    if cfg.cuda_graphs and device.type != "cuda":
        raise Mistake("--cuda-graphs: there is no CUDA device here; leave it out")
    if cfg.tensorboard:
        tensorboard_writer()
    torch.manual_seed(cfg.seed)
    dtype = getattr(torch, cfg.precision)
    begins = cfg.model if cfg.lora_rank or not checkpoint else checkpoint
    model = Qwen2_5_VL.from_pretrained(begins, dtype, device, random_weights=cfg.random_weights and not checkpoint)
    if cfg.onednn:
        use_onednn(model)
    freeze(model, cfg.freeze)
    if cfg.lora_rank:
        of = str(Path(cfg.model).resolve()) if Path(cfg.model).is_dir() else cfg.model
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, of, state["base"])
        if checkpoint:
            load_adapter(model, checkpoint)
    if device.type == "cpu" and model.config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)   # so narrow a model gains nothing from threads, and loses where they wait
    reference = None
    if cfg.kl:
        torch.manual_seed(cfg.seed)
        reference = Qwen2_5_VL.from_pretrained(cfg.model, dtype, device, cfg.random_weights)
        reference.requires_grad_(False)
    optimizers = make_optimizers(cfg, model)
    merge_after(optimizers[-1], model)
    if checkpoint:
        for k, optimizer in enumerate(optimizers):
            load_optimizer(optimizer, checkpoint / f"optimizer_{k}.safetensors")
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    job = Job(cfg, rank, world, device, ddp, reference, processor, optimizers, state, sources[0])
    changed = "".join(f" {k}={getattr(cfg, k)}" for k in PRESETS[cfg.preset])
    size, learning = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), learn(model)))
    for line in passed_over:
        job.say(line)
    some = f", {learning / 1e6:.2f} M learn" if learning < size else ""
    job.say(f"{cfg.method}: {size / 1e6:.1f} M parameters of {checkpoint or cfg.model}{some}, {world} rank(s) on "
            f"{device.type}, {cfg.precision}, preset {cfg.preset}{changed}\n"
            f"{memory_line(model, world, cfg.offload_optimizer)}")
    for source in sources:
        for line in noticed(source):
            job.say(line)
    for source in sources[1:]:
        job.held_out = [e for _, e in read(source, range(min(cfg.eval_examples, len(source))), report=rank == 0)]
    show_example(job)
    return job


def checkpoint_to_resume(cfg: Config, rank: int, device) -> tuple[Path | None, list[str]]:
    """Rank 0 reads every file of it, for its digest; the others hear which it is."""
    found, said = sound_checkpoint(Path(cfg.resume), cfg.from_step) if rank == 0 else (None, [])
    found, said = gather_json([str(found or ""), said], device)[0]
    return Path(found) if found else None, said


def check_options(cfg: Config, options: dict, before: dict, checkpoint: Path) -> None:
    """Raises Mistake if a run cannot go on with these options. before: the state of its checkpoint."""
    if before["step"] > cfg.steps:
        raise Mistake(f"--steps {cfg.steps}: {checkpoint} has {before['step']} steps already; give more, or go on from "
                      "an earlier checkpoint by --from-step")
    for name, value in before["options"].items():
        if name in options and options[name] != value:
            raise Mistake(f"{cfg.resume}/config.json says {name} {options[name]!r}, but {checkpoint} was trained "
                          f"with {value!r}: is it another run's, or was it edited? Bring back the options of this run")


def show_example(job: Job) -> None:
    """One example as it is trained on: whether the data is what it was taken for shows here first."""
    cfg, (example,) = job.cfg, take(job.source, range(job.state["cursor"], job.state["cursor"] + 1), job.cfg.seed)
    prompt = job.processor.prompt(example)
    style = "compact" if cfg.label_style == "compact" else "spaced"      # auto: either, as the policy finds likelier
    y = label_text(example.task, prompt.answer, style, example.thought)
    reward = label_reward(example.task, y, prompt.answer, not cfg.reward_label_thinking)
    terms = ", ".join(f"{name} {points:g}" for name, points in reward.terms.items())
    side = job.processor.config.vision_patch_size
    seen = f"picture of {prompt.grids[0][1] * side}×{prompt.grids[0][0] * side}" if prompt.grids else "no picture"
    job.say(f"first example: {example.id}, task {example.task}, {seen}, {len(prompt.tokens)} tokens\n"
            f"  question: {example.question}\n  y: {y[:400]}\n  r(y) = {reward.total:g}: {terms}")
    for line in unknown_to(job.ddp.module, example.question, prompt.original_size):
        job.say(line)


def train_step(job: Job) -> dict:
    """Samples, updates, measures: a line of metrics.jsonl. Advances job.state. Stopped: a signal has come, and nothing
    has changed."""
    cfg, state, meter, began = job.cfg, job.state, Meter(), time.perf_counter()
    set_lr(cfg, job.optimizers, state["step"])
    share = cfg.prompts_per_step // job.world
    first, bad = state["cursor"] + job.rank * share, len(job.source.bad)
    prompts = [job.processor.prompt(e) for e in take(job.source, range(first, first + share), cfg.seed)]
    loaded = time.perf_counter()
    if len(job.source.bad) > bad:
        meter.total("left_out", len(job.source.bad) - bad)
    try:
        groups = make_groups(cfg, job.ddp.module, job.processor, prompts, first, job.stopped)
    except Stopped:
        groups = []
    ready = time.perf_counter()
    wait_for_all("sampling")        # before any other collective, which would wait without a name
    waited = time.perf_counter() - ready
    if not all(gather_json(bool(groups), job.device)):      # on all ranks, wherever the signal came first
        raise Stopped
    measure_groups(groups, meter)
    if unverified := ended_now():
        meter.total("errors/math_ended", unverified)
    sampled = time.perf_counter()
    loss, norm, tokens = update(cfg, job.ddp, job.reference, job.optimizers, groups, meter, job.stopped)
    ended = time.perf_counter()
    finite = math.isfinite(loss) and math.isfinite(norm)
    state.update(step=state["step"] + 1, cursor=state["cursor"] + cfg.prompts_per_step,
                 bad_steps=0 if finite else state["bad_steps"] + 1)
    line: dict = {"step": state["step"], "loss": loss, "grad_norm": norm, "skipped": not finite,
                  "lr": job.optimizers[0].param_groups[0]["lr"], **meter.read(job.device)}
    if not finite:
        line["examples"] = sum(gather_json([prompt.example.id for prompt in prompts], job.device), [])
    drawn, trained, waited = add_over_ranks(
        [sum(len(o.tokens) for g in groups for o in g.rollouts), tokens, waited / job.world], job.device)
    for name, count, seconds in (("sampling", drawn, sampled - loaded), ("training", trained, ended - sampled)):
        if count and seconds > 0:
            line[f"{name}_tokens_per_s"] = count / seconds
    return {**line, "peak_memory_gb": peak_memory_gb(job.device),
            "seconds": ended - began, "seconds_data": loaded - began, "seconds_sampling": sampled - loaded,
            "seconds_waiting": waited}


def run_evaluation(job: Job, history: dict[str, dict]) -> None:
    """Every rank answers its share; rank 0 draws its first answers, and prints the table of all evaluations so far.
    Stopped: a signal has come; there is no evaluation then."""
    cfg, step = job.cfg, job.state["step"]
    own = job.held_out[job.rank::job.world]
    answered = evaluate(job.ddp.module, job.processor, own, cfg.max_new_tokens, cfg.sampling_batch, stop=job.stopped)
    records: list[Record] = []
    drawn: list = []     # a prompt holds the patches of its picture, 17 MB of a large one: only these stay
    stopped = False
    try:
        for record, prompt in tqdm(answered, "evaluating", len(own), unit="ex", leave=False, disable=job.rank > 0):
            records.append(record)
            if len(drawn) < 12:
                drawn.append((record, prompt))
    except Stopped:
        stopped = True
    if any(gather_json(stopped, job.device)):
        raise Stopped
    if job.rank == 0:
        draw_sheet(for_sheet(drawn), job.run / "samples" / f"step_{step}.png")
    everyone = gather_json([vars(record) for record in records], job.device)
    history[f"step {step}"] = summarise([Record(**r) for part in everyone for r in part])
    job.log({"step": step, "eval": history[f"step {step}"]})
    job.say(f"{cfg.eval_data}, first {len(job.held_out)}:\n" + table(history))


def dry_run(job: Job) -> None:
    """One step and one batch of an evaluation as expensive as any can be: the longest prompt among 256 examples, every
    response max_new_tokens long. Nothing is written; the learning rate is 0."""
    cfg, source, model = job.cfg, job.source, job.ddp.module
    few = sorted({i * len(source) // 256 for i in range(256)})
    prompts = [job.processor.prompt(example) for _, example in read(source, few, report=job.rank == 0)]
    if not prompts:
        raise Mistake(f"--data {cfg.data}: all of the {len(few)} rows read are bad; the last: {source.bad[-1]}")
    prompt = max(prompts, key=lambda p: len(p.tokens))
    S = {"sft": 1, "rlvr": cfg.rollouts}.get(cfg.method, cfg.rollouts + 1)
    share = cfg.prompts_per_step // job.world
    groups, together = min(share, cfg.micro_rows), min(share, cfg.sampling_batch)
    fake = Group(prompt, [Response([prompt.tokens[0]] * cfg.max_new_tokens, advantage=1.0) for _ in range(S)])
    if cfg.label_thought == "rollout":      # y is as long as the longest thought and its answer
        fake.responses[0].tokens = fake.responses[0].tokens + label_tokens(cfg, model, job.processor, prompt)[1]
    rows = pack_group(prompt, fake.responses, cfg.max_row_tokens)
    job.say(f"longest prompt of {len(prompts)} read: {len(prompt.tokens)} tokens (id {prompt.example.id}); at most "
            f"{len(rows)} row(s) of {max(len(r.tokens) for r in rows)} tokens a group")
    for group in (g for optimizer in job.optimizers for g in optimizer.param_groups):
        group["lr"] = 0.0
    model.eos_ids = ()                 # no response ends before max_new_tokens
    parts: dict[str, tuple] = {"update": (
        lambda: update(cfg, job.ddp, job.reference, job.optimizers, [fake] * groups, Meter()), share / groups)}
    if cfg.G:
        parts["sampling"] = (lambda: generate(model, [prompt] * together, cfg.G, cfg.max_new_tokens,
                                              cfg.temperature, graphs=cfg.cuda_graphs), share / together)
    evaluated = -(-len(job.held_out) // job.world)
    if evaluated:
        batch = min(evaluated, cfg.sampling_batch)
        parts["evaluation"] = (lambda: generate(model, [prompt] * batch, 1, cfg.max_new_tokens, 0), evaluated / batch)
    seconds = {}
    for name, (call, times) in parts.items():
        if name == "update":
            call()                     # to warm up
        began = time.perf_counter()
        call()
        seconds[name] = max(gather_json((time.perf_counter() - began) * times, job.device))
    gigabytes = max(gather_json(peak_memory_gb(job.device), job.device))
    step = seconds["update"] + seconds.get("sampling", 0.0)
    evaluations = bool(evaluated) * (1 + (-(-cfg.steps // cfg.eval_every) if cfg.eval_every else 1))
    hours = (cfg.steps * step + evaluations * seconds.get("evaluation", 0.0)) / 3600
    shown = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    job.say(f"peak memory {gigabytes:.1f} GB; at most {shown}; {cfg.steps} steps and {evaluations} evaluations at most "
            f"{hours:.1f} hours. Shorter responses take less.")


def main() -> None:
    job = set_up()
    cfg, state = job.cfg, job.state
    if cfg.dry_run:
        dry_run(job)
        return leave_ranks()
    evaluated = {line["step"] for line in read_log(Path(cfg.resume))[0] if "eval" in line} if cfg.resume else set()
    if state["step"] >= cfg.steps and not (job.held_out and state["step"] not in evaluated):
        job.say(f"{cfg.resume} is finished: it has its {cfg.steps} steps. --steps N makes it longer")
        return leave_ranks()
    job.run, said = open_run(cfg, {name: t.prompt for name, t in TASKS.items()}, job.rank, job.device, state["step"])
    try:
        if job.rank == 0:
            said += room_for(job.run, job.ddp.module, cfg.keep)
        for line in [*said, f"writing to {job.run}{short_run(cfg)}"]:
            job.say(line)
        job.stopped = stop_signals("" if job.rank else "stopping: the step at work is left, and what is complete is "
                                   "saved")
        loop(job)
    except BaseException:
        if job.rank == 0 and not state["step"] and not cfg.resume and is_ours(job.run):
            remove(job.run)             # it holds nothing yet
        raise
    leave_ranks()


def last_saved(job: Job) -> str:
    """A sentence, for a person whose run does not go on. The weights are those of the last step that was not skipped: a
    checkpoint of that step holds them too, and would end in the same way."""
    before = job.state["step"] - job.state["bad_steps"]
    earlier = [folder for step, folder in checkpoints(job.run).items() if step < before]
    return f"Last checkpoint from before that: {earlier[-1] if earlier else 'none'}"


def best_step(metric: str, history: dict[str, dict]) -> int | None:
    """Of the evaluations so far the first that was best by the metric; None without --keep-best."""
    measured = {title: m[metric] for title, m in history.items() if metric and m.get(metric) is not None}
    return int(max(measured, key=lambda title: measured[title]).removeprefix("step ")) if measured else None


def loop(job: Job) -> None:
    """Steps, evaluations, checkpoints, until cfg.steps or until a signal has come."""
    cfg, state = job.cfg, job.state
    lines, _ = read_log(job.run)
    history = {f"step {line['step']}": line["eval"] for line in lines if "eval" in line}
    if before := [line["lr"] for line in lines if "lr" in line][-1:]:
        now, then = (cfg.lr * share_of_lr(cfg, step) for step in (state["step"], state["step"] - 1))
        if not 0.5 < then / max(before[0], 1e-30) < 2:
            job.say(f"the learning rate goes on at {now:.1e}, after {before[0]:.1e}: its schedule is now that of "
                    f"{cfg.steps} steps")
    saved = state["step"]
    with tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=job.rank > 0) as bar:
        while True:
            step, done = state["step"], state["step"] >= cfg.steps
            stopping = any(gather_json(bool(job.stopped), job.device))
            regular = cfg.save_every and step % cfg.save_every == 0
            if not step % CHECKED_EVERY or done or regular:
                check_same_weights(job.ddp.module, job.device)
            if step > saved and (done or not state["bad_steps"] and (stopping or regular)):
                if job.rank == 0:
                    check_ours(job.run)
                save_checkpoint(job.run, job.ddp.module, job.optimizers, state, job.rank)
                saved = step
            try:
                if job.held_out and not stopping and f"step {step}" not in history and (
                        not step or done or cfg.eval_every and step % cfg.eval_every == 0):
                    run_evaluation(job, history)
                    give_memory_back()
                if job.rank == 0 and saved == step:
                    keep_newest(job.run, cfg.keep, best_step(cfg.keep_best, history))
                if done or stopping:
                    break
                line = train_step(job)
            except Stopped:
                continue
            except Mistake as mistake:
                raise Mistake(f"{mistake}. {last_saved(job)}" if step else str(mistake)) from None
            give_memory_back()
            job.log(line)
            bar.update()
            if line["step"] % cfg.log_every == 0:
                job.say(progress_line(line))
            if line["skipped"]:
                job.say(f"step {line['step']} skipped: loss {line['loss']}, gradient norm {line['grad_norm']}, "
                        f"examples {', '.join(line['examples'])}")
            if state["bad_steps"] >= MAX_BAD_STEPS:
                raise Mistake(f"{MAX_BAD_STEPS} steps in a row had no finite loss or gradient (see metrics.jsonl): "
                              f"try a smaller --lr. {last_saved(job)}")
    if stopping and not done:
        lost = f"; the last {state['bad_steps']} step(s) were skipped and are not saved" if state["bad_steps"] else ""
        return job.say(f"stopped at step {saved}{lost}; go on with torchrun train.py --resume {job.run}")
    if job.rank == 0:
        draw_curves([job.run], job.run / "curves.png")
    pictures = f"   pictures: {job.run}/samples/" if history else ""
    bad = {reason for rank in gather_json(list(job.source.bad), job.device) for reason in rank}
    left_out = f"   left out: {len(bad)} rows of {cfg.data}" if bad else ""
    job.say(f"metrics: {job.run}/metrics.jsonl   curves: {job.run}/curves.png{pictures}   model: "
            f"{checkpoints(job.run)[cfg.steps]}{left_out}")


if __name__ == "__main__":
    run_main(main)
