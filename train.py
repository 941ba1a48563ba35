"""ViSurf (arXiv 2510.10606) in plain PyTorch DDP: supervised and reinforcement fine-tuning in one
stage.

    torchrun train.py                                      the built-in world, on a laptop
    torchrun --nproc-per-node 8 train.py --preset paper    Qwen2.5-VL-7B on the authors' data

One step, `train_step`:
    prompts    the next examples, as the model sees them (data.py)
    groups     G rollouts of each (rollout.py), rewarded side by side with the label y, with the
               three controls (rewards.py), and normalised together: Eq. 6 and 7 (objective.py)
    update     every group as one row, scored in one pass (model.py); the loss, Eq. 8, and one
               optimizer step, Eq. 9
support/run.py decides when to save, evaluate, stop and log. docs/logged.md defines every metric.

Glossary
    y, o       the label of a prompt, as text; a rollout: an answer sampled from the policy. Both
               are responses
    group      a prompt with its responses: y, except with rlvr, and then G rollouts, except with sft
    r, Â       reward of a response; its advantage, normalised over the group
    row        a group as one sequence: the prompt once, then the responses (data.py)
    micro-batch  rows that are scored together
    step       one round of sampling and its update. With --inner-epochs E the update is E optimizer
               steps
    [recipe]   in --help, a value of the authors' earlier public trainer (docs/paper.md, section 1)
"""
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import objective
from data import Batch, Processor, Prompt, Response, Row, collate, load, pack_group
from eval import Record, evaluate, for_sheet, summarise, table, unknown_to
from model import Qwen2_5_VL, load_model
from rewards import (LABEL_STYLES, TASKS, borrowed_thought, full_accuracy, label_reward, label_text,
                     reward_group)
from rollout import generate, uniforms
from support.boxes import FORMATS, UNITS
from support.checkpoints import load_optimizer, newest_checkpoint
from support.equip import equip
from support.log import Meter, measure_groups, memory_line
from support.lora import PARTS, merge_after, without_adapters
from support.mistakes import Mistake, run_main
from support.options import option, parse
from support.optimizers import learn, make_optimizers, set_lr
from support.pictures import draw_sheet
from support.probe import trained_on
from support.ranks import add_over_ranks, gather_json, idle_cores, leave_ranks, start_ranks, threads_are_ours
from support.run import Run, begin_or_resume, check_same
from support.runs import run_and_step, saved_options, was_launched_with
from support.screen import CONTROL
from support.sources import Source, noticed, read, take


# --------------------------------------------------------------------------------------------------
# Options

# Named sets of defaults; what is given on the command line wins. `paper` is the authors' earlier
# public recipe, without its KL and entropy bonus, as the paper leaves much of it open (docs/paper.md,
# section 1).
AUTHORS = {"data": "Ricky06662/ViSurf_multi_non_object_7300_size840", "task": "grounding", "steps": 456,
           "eval_data": "", "lr": 1e-6, "adam_eps": 1e-8, "warmup_steps": 0, "cooldown": 0.0,
           "precision": "bfloat16", "checkpoint_activations": "blocks"}
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
    """Holds every option. It is saved with the run."""
    preset: str = option("laptop", "method", "named set of options, the defaults of all others", tuple(PRESETS))
    method: str = option("visurf", "method", "visurf (Eq. 8), rlvr (GRPO), sft (cross-entropy); the others: see "
                         "objective.py", tuple(objective.METHODS))
    model: str = option("assets/tiny", "method", "model folder in the Hugging Face layout, run folder, or hub id")
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

    label_style: str = option("spaced", "controls", "control 1, the text of y: spaced (the paper's), compact (off)",
                              tuple(LABEL_STYLES))
    label_thought: str = option("none", "controls", "what y says in front of its answer: none (the paper's), rollout "
                                "(the thought of a rollout of its group, y then being rewarded for it)",
                                ("none", "rollout"))
    reward_label_thinking: bool = option(False, "controls", "switches control 2 off: y earns the thinking reward too")
    smoothing: bool = option(True, "controls", "control 3: r(y) := mean r(o) once a rollout is as good as y")

    data: str = option("scenes:train", "data", "scenes:SPLIT, photos:SPLIT, .jsonl or .parquet file, folder, or hub id")
    task: str = option("", "data", "task of rows that name none (rewards.py), of --eval-data too", ("", *TASKS))
    columns: str = option("", "data", "FIELD=NAME,… for columns with other names; fields: question, answer, image, "
                          "choices, id, task")
    box_format: str = option("xyxy", "data", "boxes of files: xyxy, two corners; xywh, a corner, width and height",
                             FORMATS)
    box_units: str = option("pixels", "data", "their units: pixels; thousandths of the picture's sides", UNITS)
    min_pixels: int = option(0, "data", "fewest pixels of a picture as the model sees it (0: the model's own)", least=0)
    max_pixels: int = option(0, "data", "most pixels: less memory and time, and less to see (0: the model's own)",
                             least=0)
    skip_bad_rows: bool = option(False, "data", "leave out rows that cannot be used, and list them")
    seed: int = option(42, "data", "seeds the order of the data, the rollouts and new adapters", least=0)

    rollouts: int = option(8, "sampling", "G, rollouts of each prompt [recipe 8]", least=1)
    max_new_tokens: int = option(128, "sampling", "R, longest response; a longer one is truncated [recipe 2000]",
                                 least=1)
    temperature: float = option(1.0, "sampling", "T of sampling and scoring [recipe 1.0]", above=0)
    sampling_batch: int = option(32, "sampling", "prompts sampled or evaluated together; any value gives the same "
                                 "answers", least=1, resumable=True)
    cuda_graphs: bool = option(True, "sampling", "sample by CUDA graphs where there is CUDA", resumable=True)

    steps: int = option(400, "optimisation", "optimizer steps (with --inner-epochs E: rounds of E steps each)", least=1,
                        resumable=True)
    prompts_per_step: int = option(16, "optimisation", "prompts per step over all ranks [recipe 16]", least=1)
    lr: float = option(1e-3, "optimisation", "learning rate [recipe 1e-6, constant, for 7B]", above=0,
                       most=1e30)
    warmup_steps: int = option(10, "optimisation", "steps of linear warm-up", least=0)
    cooldown: float = option(0.625, "optimisation", "share of the steps, the last ones, of linear decay to 0",
                             least=0, most=1)
    optimizer: str = option("adamw", "optimisation", "adamw; muon: Muon for matrices, AdamW for the rest",
                            ("adamw", "muon"))
    adam_eps: float = option(1e-3, "optimisation", "eps of AdamW [recipe 1e-8]; well above the typical gradient, it "
                             "keeps AdamW from turning tiny gradients into full steps", above=0)
    weight_decay: float = option(0.01, "optimisation", "decoupled weight decay [recipe 1e-2]", least=0)
    grad_clip: float = option(1.0, "optimisation", "largest gradient norm [recipe 1.0]", above=0)
    precision: str = option("float32", "optimisation", "of weights and gradients; the optimizer keeps float32 weights "
                            "either way", ("float32", "bfloat16"))
    offload_optimizer: bool = option(False, "optimisation", "with --precision bfloat16: float32 weights and moments in "
                                     "the host's memory, updated by its cores", resumable=True)
    freeze: str = option("", "optimisation", f"PART,… that learn nothing, of {', '.join(PARTS)}")
    lora_rank: int = option(0, "optimisation", "rank r of LoRA's adapters, which alone learn then (0: no LoRA)",
                            least=0)
    lora_alpha: float = option(32.0, "optimisation", "α of LoRA: the adapters count α/r times", above=0)
    lora_targets: str = option(r"model\.layers", "optimisation", "regular expression for the names of the linear "
                               "layers that get an adapter: visual.blocks, visual.merger, model.layers.3.mlp.up_proj …")
    micro_rows: int = option(1, "optimisation", "rows per forward; any value gives the same update", least=1,
                             resumable=True)
    max_row_tokens: int = option(0, "optimisation", "a group whose row is longer becomes several rows (0: no limit)",
                                 least=0, resumable=True)
    checkpoint_activations: str = option("none", "optimisation", "recompute in backward: blocks; or all of them but "
                                         "matrix products (cheap)", ("none", "cheap", "blocks"), resumable=True)

    name: str = option("", "output", "the run's folder is runs/NAME (default: the method and the time)")
    resume: str = option("", "output", "run folder to go on with, from its newest sound checkpoint and by its saved "
                         "options; or one of its checkpoints, RUN/checkpoints/step_N", resumable=True)
    accept_changed_data: bool = option(False, "output", "go on although the data is not what it was",
                                       resumable=True)
    dry_run: bool = option(False, "output", "one step at worst-case length: memory and hours; writes nothing",
                           resumable=True)
    eval_data: str = option("scenes:val", "output", "evaluated before, during and after; empty: never",
                            resumable=True)
    eval_examples: int = option(192, "output", "how many of it", least=0, resumable=True)
    eval_every: int = option(100, "output", "steps between evaluations (0: only before and after)", least=0,
                             resumable=True)
    save_every: int = option(100, "output", "steps between checkpoints (0: only at the end)", least=0,
                             resumable=True)
    keep: int = option(2, "output", "how many checkpoints stay, the newest (0: all)", least=0,
                       resumable=True)
    keep_best: str = option("", "output", "metric of the evaluations, such as T-acc, whose best checkpoint stays, too",
                            ("", *(name for name in summarise([]) if not name.startswith(      # where less is better
                                ("unreadable", "trailing", "length", "examples")))), resumable=True)

    @property
    def G(self) -> int:
        """Rollouts of a prompt. SFT samples none, unless its label borrows a thought of them."""
        needed = objective.METHODS[self.method].rollouts or self.label_thought != "none"
        return self.rollouts if needed else 0

    def check(self, world: int) -> None:
        """Raises Mistake if an option cannot be, by its flag."""
        method, new = objective.METHODS[self.method], not self.resume     # a run of an earlier version may go on
        for flag, wrong, rule in (
                ("name", Path(self.name).name != self.name or self.name == "..", "must be a folder's name, not a path"),
                ("name", len(self.name.encode(errors="replace")) > 200 or CONTROL.search(self.name),
                 "must be a name of at most 200 bytes, without control characters"),
                ("prompts_per_step", self.prompts_per_step % world, f"must be a multiple of the {world} ranks"),
                ("rollouts", method.rollouts and self.rollouts < 2,
                 "must be 2 or more, or the rollouts of a group have no spread"),
                ("optimizer", self.optimizer == "muon" and self.precision == "bfloat16",
                 "keeps no float32 weights; use --precision float32"),
                ("data", not self.data, "must name what is trained on"),
                ("label_thought", self.label_thought != "none" and not method.y,
                 f"{self.method} has no label"),
                ("offload_optimizer", self.offload_optimizer and (self.precision != "bfloat16" or self.lora_rank),
                 "is for the float32 copies of --precision bfloat16; --lora-rank and float32 have none"),
                ("label_style", new and self.label_style != "spaced" and not method.y, f"{self.method} has no label"),
                ("reward_label_thinking", new and self.reward_label_thinking and not (method.y and method.rollouts),
                 f"{self.method} does not use r(y)"),
                ("no_smoothing", new and not self.smoothing and not method.smooths, f"{self.method} has no smoothing"),
                ("lora_alpha", new and not self.lora_rank and self.lora_alpha != Config.lora_alpha,
                 "belongs to --lora-rank"),
                ("lora_targets", new and not self.lora_rank and self.lora_targets != Config.lora_targets,
                 "belongs to --lora-rank; without it all learns, but what --freeze names"),
                ("kl", self.kl and not method.rollouts,
                 f"has no meaning with --method {self.method}"),
                ("keep_best", self.keep_best and not (self.eval_data and self.eval_examples),
                 "needs evaluations: give --eval-data too"),
                ("keep_best", self.keep_best and self.eval_every % (self.save_every or self.steps),
                 f"needs a checkpoint of each evaluation: --save-every {self.save_every} must divide --eval-every "
                 f"{self.eval_every}")):
            if wrong:
                value = getattr(self, flag, True)
                raise Mistake(f"--{flag.replace('_', '-')}{'' if value is True else f' {value}'}: {rule}")


def parse_config(arguments: list[str] | None = None) -> Config:
    def read_flags(flags: list[str] | None) -> Config:
        return parse(Config, "train.py", __doc__, flags, PRESETS, saved_options)
    cfg = read_flags(arguments)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        if not cfg.resume and not cfg.name:
            raise Mistake("torchrun --max-restarts starts this very command again: give a --name, by which the run is "
                          "found then")
        run = run_and_step(Path(cfg.resume))[0] if cfg.resume else Path("runs") / cfg.name
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and was_launched_with(run):
            cfg = read_flags(["--resume", str(run)])
    return cfg


# --------------------------------------------------------------------------------------------------
# Groups: sampling, rewards, advantages

@dataclass
class Group:
    """Holds a prompt and those of its responses that the method trains on: y first, then the
    rollouts."""
    prompt: Prompt
    responses: list[Response]
    smoothed: bool = False
    number: int = 0         # its place in the endless sequence of examples

    @property
    def rollouts(self) -> list[Response]:
        return [o for o in self.responses if not o.is_y]


def make_groups(cfg: Config, model: Qwen2_5_VL, processor: Processor, prompts: list[Prompt],
                first: int, stop: Sequence = (), step: int = 0) -> list[Group]:
    """Samples the rollouts of each prompt (section 3.2 of the paper), and returns the groups. first:
    the place of the first prompt in the endless sequence of examples. step: how many came before.
    Raises Stopped as soon as `stop` is not empty."""
    sampled: list[list[Response]] = []
    for i in range(0, len(prompts), cfg.sampling_batch):
        part = prompts[i:i + cfg.sampling_batch]
        places = range(first + i, first + i + len(part))
        sampled += [[] for _ in part] if not cfg.G else generate(
            model, part, cfg.max_new_tokens, uniforms(cfg.seed, places, cfg.G, cfg.max_new_tokens),
            cfg.temperature, graphs=cfg.cuda_graphs, stop=stop)
    return [make_group(cfg, processor, prompt, rollouts, place, step)
            for place, (prompt, rollouts) in enumerate(zip(prompts, sampled), first)]


def make_group(cfg: Config, processor: Processor, prompt: Prompt, rollouts: list[Response],
               place: int, step: int) -> Group:
    """Sections 3.3 and 3.4 on one prompt: y joins its rollouts, all are rewarded under the controls,
    and Eq. 6 and 7 give the advantages. place, step: as in make_groups."""
    method = objective.METHODS[cfg.method]
    controls = cfg if method.smooths else replace(cfg, smoothing=False)
    y, responses, length_y = None, rollouts, 0
    texts = [processor.decode(o.tokens) for o in rollouts]
    if method.y:
        thought = borrowed_thought(texts, cfg.seed, place) if cfg.label_thought == "rollout" else ""
        y, ids = label_tokens(cfg, processor, prompt, thought)
        responses, length_y = [Response(ids, is_y=True), *rollouts], len(ids)
    if not method.rollouts:         # nothing to compare y with: it is not rewarded
        responses[0].advantage = float(method.advantages(cfg, torch.zeros(1)))
        return Group(prompt, responses[:1], number=place)
    rewards, r, smoothed = reward_group(
        controls, prompt.example.task, prompt.answer, y, texts, prompt.side, length_y=length_y,
        lengths=[len(o.tokens) for o in rollouts], truncated=[o.truncated for o in rollouts],
        group=place, step=step, steps=cfg.steps)
    advantage = method.advantages(cfg, torch.tensor(r, dtype=torch.float64)).tolist()
    if smoothed:
        advantage[0] = 0.0        # it is the mean: what else comes out is rounding
    for response, *values in zip(responses, rewards, r, advantage, strict=True):
        response.reward, response.r, response.advantage = values
    return Group(prompt, responses, smoothed, place)


def label_tokens(cfg: Config, processor: Processor, prompt: Prompt, thought: str = ""
                 ) -> tuple[str, list[int]]:
    """Control 1: returns the text of y and its ids, tok(y) + EOS. thought: a borrowed one
    (rewards.borrowed_thought), which is left out if the row would exceed --max-row-tokens."""
    example = prompt.example
    text = label_text(example.task, prompt.answer, cfg.label_style, example.thought, thought)
    ids = processor.encode(text)
    if thought and 0 < cfg.max_row_tokens < len(prompt.tokens) + len(ids):    # it has more tokens than as sampled
        return label_tokens(cfg, processor, prompt)
    return text, ids


# --------------------------------------------------------------------------------------------------
# The update

# What `objective.loss` takes by name and is one number of a response.
OF_RESPONSE = {"advantage": lambda o: o.advantage, "r": lambda o: o.r,
               "is_y": lambda o: o.is_y, "length": lambda o: len(o.tokens),
               "truncated": lambda o: o.truncated}


@dataclass
class MicroBatch:
    """Holds B rows, padded to T tokens."""
    batch: Batch                        # what the model reads
    terms: dict[str, Tensor]            # what `objective.loss` takes besides by name, [B, T] each
    old_logp: Tensor | None = None      # None with one inner epoch: logp itself, detached (ρ ≡ 1)
    ref_logp: Tensor | None = None      # None without --kl


def micro_batch(cfg: Config, numbered: list[tuple[int, Row]], device, idle: bool) -> MicroBatch:
    """Returns rows as tensors. numbered: each with the number of its group. idle: the rows weigh 0,
    and only keep this rank in step with the others."""
    numbers, rows = zip(*numbered)
    batch = collate(rows, device)
    segment = batch.segment

    def at_tokens(value) -> Tensor:
        """Returns a number of each response at each of its tokens, and 0 outside of them."""
        of_row = [torch.tensor([False, *map(value, row.responses)]) for row in rows]
        return pad_sequence(of_row, batch_first=True).to(device).gather(1, segment.clamp(min=0))
    recorded = torch.tensor([x for row in rows for o in row.responses
                             for x in o.logp or [math.nan] * len(o.tokens)], device=device)
    return MicroBatch(batch, {
        **{name: at_tokens(value) for name, value in OF_RESPONSE.items()},
        "group": torch.tensor(numbers, device=device)[:, None].expand_as(segment),
        "sampled_logp": recorded.new_zeros(segment.shape).masked_scatter(segment > 0, recorded),
        "weight": objective.token_weight(segment, cfg.normaliser) * (not idle)})


def pack(cfg: Config, groups: list[Group], device, step: int = 0
         ) -> tuple[list[MicroBatch], dict[str, int], bool]:
    """Packs the responses that are trained on into micro-batches of rows: the same number on every
    rank, and at least one. Returns them; what the loss takes of the whole batch, counted over all
    responses of all ranks; whether it needs the entropy's gradient. Rows are sorted by length, so
    that little is padded."""
    responses = [o for g in groups for o in g.responses]
    own = [sum(len(o.tokens) for o in responses), len(responses)]
    tokens, count = map(int, add_over_ranks(own, device))
    of_batch = {"denominator": objective.divisor(tokens, count, cfg.normaliser), "tokens": tokens,
                "responses": count, "step": step, "steps": cfg.steps}
    known = {name: torch.tensor([*map(value, responses)]) for name, value in OF_RESPONSE.items()}
    known["group"] = torch.tensor([g.number for g in groups for _ in g.responses])
    kept, by_entropy = trained_on(partial(objective.loss, cfg, **of_batch), known)
    rows: list[tuple[int, Row]] = []
    for group, keep in zip(groups, kept.split([len(g.responses) for g in groups])):
        left = [o for o, moves in zip(group.responses, keep.tolist()) if moves]
        rows += [(group.number, row) for row in pack_group(group.prompt, left, cfg.max_row_tokens)]
    rows.sort(key=lambda numbered: len(numbered[1].tokens), reverse=True)
    parts = [rows[i:i + cfg.micro_rows] for i in range(0, len(rows), cfg.micro_rows)]
    # A rank that runs out of rows repeats one with weight 0: so every rank joins every collective.
    idle = parts[0][:1] if parts else [(0, pack_group(groups[0].prompt, responses[:1])[0])]
    most = max(1, *gather_json(len(parts), device))
    made = [micro_batch(cfg, parts[i] if i < len(parts) else idle, device, i >= len(parts))
            for i in range(most)]
    return made, of_batch, by_entropy


def update(cfg: Config, ddp: DistributedDataParallel, reference: Qwen2_5_VL | None, optimizers: list,
           groups: list[Group], meter: Meter, step: int = 0, leaves: Callable[[bool], bool] = lambda last: False
           ) -> tuple[float, float, int]:
    """Makes cfg.inner_epochs optimizer steps on the groups: Eq. 8, Eq. 9. Returns the loss and the
    gradient norm of the last, and how many row tokens all of them read.
    leaves: asked before the micro-batches of the first epoch, and raises Stopped after a signal,
    before any weight has changed (`Run.leaves`)."""
    batches, of_batch, by_entropy = pack(cfg, groups, ddp.module.lm_head.weight.device, step)
    settings = {"temperature": cfg.temperature, "checkpoint": cfg.checkpoint_activations}
    score_before(cfg, ddp.module, reference, batches, settings)
    for epoch in range(cfg.inner_epochs):
        loss_sum = 0.0
        for i, mb in enumerate(batches):
            last = i + 1 == len(batches)
            if not epoch and (i or last) and leaves(last):      # in the first, DDP may rebuild its buckets on all ranks
                continue
            # Gradients are averaged over ranks once, after the last micro-batch; × world makes the
            # average a sum.
            with contextlib.nullcontext() if last else ddp.no_sync():
                logp, entropy = ddp(**vars(mb.batch), **settings, entropy_gradient=by_entropy)
                loss, logged = objective.loss(
                    cfg, logp=logp, old_logp=logp.detach() if mb.old_logp is None else mb.old_logp,
                    ref_logp=mb.ref_logp, entropy=entropy, segment=mb.batch.segment, **mb.terms,
                    **of_batch)
                (loss * dist.get_world_size()).backward()
            loss_sum += float(loss.detach())
            if epoch == cfg.inner_epochs - 1:
                meter.take(logged)
        loss_sum, = add_over_ranks([loss_sum], ddp.module.lm_head.weight.device)
        norm = optimizer_step(ddp, optimizers, cfg.grad_clip, math.isfinite(loss_sum))
    return loss_sum, norm, cfg.inner_epochs * sum(int((mb.batch.segment >= 0).sum()) for mb in batches)


@torch.no_grad()
def score_before(cfg: Config, policy: Qwen2_5_VL, reference: Qwen2_5_VL | None, batches: list[MicroBatch],
                 settings: dict) -> None:
    """Notes in each micro-batch log π_old, if there are several inner epochs, and log π_ref, if
    there is --kl."""
    for mb in batches if cfg.inner_epochs > 1 else ():
        mb.old_logp, _ = policy(**vars(mb.batch), **settings)
    if reference is not None:
        with without_adapters(reference):
            for mb in batches:
                mb.ref_logp, _ = reference(**vars(mb.batch), **settings)


def optimizer_step(ddp: DistributedDataParallel, optimizers: list, grad_clip: float, finite: bool) -> float:
    """Makes one optimizer step and empties the gradients. Returns the norm before clipping. If it or
    the loss is not finite (on all ranks alike), no weight changes. Raises Mistake if one becomes
    not finite."""
    norm = float(nn.utils.clip_grad_norm_(ddp.parameters(), grad_clip))
    if finite and math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
        if not torch.stack([p.isfinite().all() for p in ddp.parameters()]).all():
            raise Mistake("the optimizer step made weights that are not finite: try a smaller --lr")
    ddp.zero_grad(set_to_none=False)        # without them, the next gradients would lie beside DDP's buckets
    return norm


# --------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Job:
    """Holds all that the loop works with."""
    cfg: Config
    run: Run                              # keeps the book
    ddp: DistributedDataParallel          # the loss goes through this, sampling through ddp.module
    reference: Qwen2_5_VL | None          # for --kl: a frozen model, or the policy without adapters
    processor: Processor
    optimizers: list
    source: Source                        # of examples, to train on
    held_out: list = field(default_factory=list)          # examples to evaluate on


def main() -> None:
    job = set_up()
    run = job.run
    if job.cfg.dry_run:
        from experiments.dry_run import dry_run
        dry_run(job, Group, label_tokens, update)
    elif not run.is_finished(bool(job.held_out)):
        run.open({name: task.prompt for name, task in TASKS.items()}, job.ddp.module)
        try:
            loop(job)
        except BaseException:
            run.discard()
            raise
    leave_ranks()


def loop(job: Job) -> None:
    """Evaluates and trains until --steps, or until a signal comes."""
    run = job.run
    while run.goes_on(job.ddp.module, job.optimizers):      # saves where that is due; False after a signal
        with run.unless_stopped():                          # what a signal leaves counts as not begun
            if job.held_out and run.evaluation_is_due():
                run_evaluation(job)
            if run.is_done():
                break
            train_step(job)
    run.close(list(job.source.bad))


def train_step(job: Job) -> dict:
    """Samples, rewards, updates. Returns the step's line of metrics.jsonl."""
    cfg, run = job.cfg, job.run
    places = run.begin_step(len(job.source.bad))            # in the endless sequence of examples
    lr = set_lr(cfg, job.optimizers, run.step)
    prompts = [job.processor.prompt(example) for example in take(job.source, places, cfg.seed)]
    with run.together("sampling"):      # sections 3.2 to 3.4: rollouts, y, rewards, Eq. 6 and 7
        groups = make_groups(cfg, job.ddp.module, job.processor, prompts, places.start, run.signals, run.step)
        measure_groups(groups, run.meter, full_accuracy)
    loss, norm, tokens = update(cfg, job.ddp, job.reference, job.optimizers, groups, run.meter,
                                run.step, run.leaves)       # Eq. 8 and 9
    return run.end_step(groups, loss=loss, norm=norm, lr=lr, trained=tokens, left_out=len(job.source.bad))


def run_evaluation(job: Job) -> None:
    """Answers, on every rank, its share; rank 0 draws its first answers and prints all evaluations
    so far."""
    cfg, run = job.cfg, job.run
    own = job.held_out[run.rank::run.world]
    answered = evaluate(job.ddp.module, job.processor, own, cfg.max_new_tokens, cfg.sampling_batch,
                        graphs=cfg.cuda_graphs, stop=run.signals)
    records: list[Record] = []
    drawn: list = []     # a prompt holds its picture's patches, up to 17 MB: only those that are drawn stay
    with run.together("the evaluation"):
        for record, prompt in tqdm(answered, "evaluating", len(own), unit="ex", leave=False, disable=run.rank > 0):
            records.append(record)
            if len(drawn) < 12:
                drawn.append((record, prompt))
    if run.rank == 0:
        draw_sheet(for_sheet(drawn), run.folder / "samples" / f"step_{run.step}.png")
    everyone = gather_json([vars(record) for record in records], run.device)
    run.end_evaluation(summarise([Record(**record) for part in everyone for record in part]))
    run.say(f"{cfg.eval_data}, first {len(job.held_out)}:\n" + table(run.history))


# --------------------------------------------------------------------------------------------------
# Before the loop

def open_data(cfg: Config, processor: Processor, data: str):
    """Opens --data or --eval-data, by the same options."""
    flag = "--data" if data == cfg.data else "--eval-data"

    def fits(example, sizes) -> list[tuple[str, str]]:
        return processor.check_label(example, sizes, cfg.label_style, cfg.max_new_tokens, cfg.max_row_tokens,
                                     cfg.G > 0, cfg.label_thought == "rollout")
    return load(data, cfg.task, cfg.skip_bad_rows, cfg.columns, fits, flag, cfg.box_format, cfg.box_units)


def set_up() -> Job:
    """Returns everything that the loop works with."""
    cfg = parse_config()
    cfg.check(int(os.environ.get("WORLD_SIZE", "1")))
    rank, world, device = start_ranks()
    if (Path(cfg.model) / "checkpoints").is_dir():      # a run, which may still go on: settle which checkpoint
        cfg = replace(cfg, model=str(newest_checkpoint(Path(cfg.model))))
    checkpoint, state, said = begin_or_resume(cfg, rank, device)
    processor = Processor(checkpoint or cfg.model, cfg.min_pixels, cfg.max_pixels)
    # The data first: a bad row is found before the model is loaded.
    sources = [open_data(cfg, processor, data) for data in (cfg.data, cfg.eval_data) if data]
    check_same(cfg, state, sources[0], rank, device)
    model, reference = make_models(cfg, checkpoint, state["base"], device)
    optimizers = make_optimizers(cfg, model)
    merge_after(optimizers[-1], model)
    for k, optimizer in enumerate(optimizers if checkpoint else ()):
        load_optimizer(optimizer, checkpoint / f"optimizer_{k}.safetensors")
    if cfg.min_pixels or cfg.max_pixels:        # they are saved with the model
        model.pixels = processor.min_pixels, processor.max_pixels
    for p in learn(model):              # DDP makes views of its buckets of gradients that are there, and of no others
        p.grad = torch.zeros_like(p)
    # Buffers never change here. DDP would broadcast them in each step, and wait for a rank that a signal made leave.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [n for n, _ in model.named_buffers()])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    evaluated = sources[1].fingerprint if cfg.eval_data else ""
    job = Job(cfg, Run(cfg, rank, world, device, state, evaluated), ddp, reference, processor, optimizers, sources[0])
    for line in said:
        job.run.say(line)
    introduce(job, sources, checkpoint)
    for source in sources[1:]:
        wanted = range(min(cfg.eval_examples, len(source)))
        job.held_out = [example for _, example in read(source, wanted, report=rank == 0)]
    return job


def make_models(cfg: Config, checkpoint: Path | None, base: str, device
                ) -> tuple[Qwen2_5_VL, Qwen2_5_VL | None]:
    """Returns the policy, and the frozen reference of --kl, which with LoRA is the policy without
    its adapters. base: the digest of --model."""
    torch.manual_seed(cfg.seed)
    dtype = getattr(torch, cfg.precision)
    begins = cfg.model if cfg.lora_rank or not checkpoint else checkpoint
    model = load_model(begins, dtype, device)
    equip(model, cfg, base, checkpoint)
    if device.type == "cpu" and model.config.hidden_size < 512 and threads_are_ours():
        torch.set_num_threads(1)   # so narrow a model gains nothing from threads, and loses time waiting for them
    if not cfg.kl:
        return model, None
    return model, model if cfg.lora_rank else load_model(cfg.model, dtype, device).requires_grad_(False)


def introduce(job: Job, sources: list[Source], checkpoint: Path | None) -> None:
    """Says what is trained, what was noticed in the data, and shows one example as it is trained
    on: whether the data is what it was taken for shows here first."""
    cfg, run, model = job.cfg, job.run, job.ddp.module
    changed = "".join(f" {name}={getattr(cfg, name)}" for name in PRESETS[cfg.preset])
    size, learning = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), learn(model)))
    some = f", {learning / 1e6:.2f} M learn" if learning < size else ""
    run.say(f"{cfg.method}: {size / 1e6:.1f} M parameters of {checkpoint or cfg.model}{some}, {run.world} rank(s) on "
            f"{run.device.type}, {cfg.precision}, preset {cfg.preset}{changed}\n"
            f"{memory_line(model, run.world, cfg.offload_optimizer)}")
    alone = run.world == 1 and run.device.type == "cpu" and torch.get_num_threads() == 1
    if alone and (idle := idle_cores()):
        run.say(f"this process uses one core, and {idle} more are idle: torchrun --nproc-per-node 2 "
                "train.py … took 0.84 of the time, measured on the default job")
    for line in (line for source in sources for line in noticed(source)):
        run.say(line)
    first = run.state["cursor"]
    [example] = take(job.source, range(first, first + 1), cfg.seed)
    prompt = job.processor.prompt(example)
    y, _ = label_tokens(cfg, job.processor, prompt)
    reward = label_reward(example.task, y, prompt.answer, cfg.reward_label_thinking, prompt.side)
    terms = ", ".join(f"{name} {points:g}" for name, points in reward.terms.items())
    side = job.processor.config.vision_patch_size
    sizes = ", ".join(f"{gw * side}×{gh * side}" for gh, gw in prompt.grids)
    seen = f"picture{'s' * (len(prompt.grids) > 1)} of {sizes}" if sizes else "no picture"
    system = f"  system: {example.system}\n" * bool(example.system)
    run.say(f"first example: {example.id}, task {example.task}, {seen}, {len(prompt.tokens)} tokens\n"
            f"{system}  question: {example.question}\n  y: {y[:400]}\n  r(y) = {reward.total:g}: {terms}")
    for line in unknown_to(model, example):
        run.say(line)


if __name__ == "__main__":
    run_main(main)
