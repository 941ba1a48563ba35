"""train.py --dry-run: a step as expensive as any can be; how much memory it takes, and how many hours the run."""
import time

from data import Response, pack_group
from objective import METHODS
from rollout import generate, uniforms
from support.log import Meter, peak_memory_gb
from support.mistakes import Mistake
from support.ranks import gather_json
from support.sources import read


def dry_run(job, Group, label_tokens, update) -> None:
    """One step and one batch of an evaluation as expensive as any can be: the longest prompt and label among 256
    examples, every rollout max_new_tokens long. Nothing is written; the learning rate is 0."""
    cfg, source, model = job.cfg, job.source, job.ddp.module
    few = sorted({i * len(source) // 256 for i in range(256)})
    prompts = [job.processor.prompt(example) for _, example in read(source, few, report=job.run.rank == 0)]
    if not prompts:
        raise Mistake(f"--data {cfg.data}: all of the {len(few)} rows read are bad; the last: {source.bad[-1]}")
    prompt = max(prompts, key=lambda p: len(p.tokens))
    method = METHODS[cfg.method]
    S = method.y + method.rollouts * cfg.rollouts
    share = cfg.prompts_per_step // job.run.world
    groups, together = min(share, cfg.micro_rows), min(share, cfg.sampling_batch)
    fake = Group(prompt, [Response([prompt.tokens[0]] * cfg.max_new_tokens, advantage=1.0) for _ in range(S)])
    if method.y:                            # as long as the longest label, behind the longest thought if it borrows one
        length = max(len(label_tokens(cfg, job.processor, p)[1]) for p in prompts)
        length = cfg.max_new_tokens + length if cfg.label_thought == "rollout" else max(cfg.max_new_tokens, length)
        if cfg.max_row_tokens:              # prompt and label may be of different rows, each of which fits
            length = min(length, cfg.max_row_tokens - len(prompt.tokens))
        fake.responses[0].tokens = [prompt.tokens[0]] * length
    rows = pack_group(prompt, fake.responses, cfg.max_row_tokens)
    job.run.say(f"longest prompt of {len(prompts)} read: {len(prompt.tokens)} tokens (id {prompt.example.id}); at most "
            f"{len(rows)} row(s) of {max(len(r.tokens) for r in rows)} tokens a group")
    for group in (g for optimizer in job.optimizers for g in optimizer.param_groups):
        group["lr"] = 0.0
    model.eos_ids = ()                 # no response ends before max_new_tokens
    parts: dict[str, tuple] = {"update": (
        lambda: update(cfg, job.ddp, job.reference, job.optimizers, [fake] * groups, Meter()), share / groups)}
    if cfg.G:
        u = uniforms(cfg.seed, range(together), cfg.G, cfg.max_new_tokens)
        parts["sampling"] = (lambda: generate(model, [prompt] * together, cfg.max_new_tokens, u,
                                              cfg.temperature, graphs=cfg.cuda_graphs), share / together)
    evaluated = -(-len(job.held_out) // job.run.world)
    if evaluated:
        batch = min(evaluated, cfg.sampling_batch)
        parts["evaluation"] = (lambda: generate(model, [prompt] * batch, cfg.max_new_tokens, graphs=cfg.cuda_graphs),
                               evaluated / batch)
    seconds = {}
    for name, (call, times) in parts.items():
        if name == "update":
            call()                     # to warm up
        began = time.perf_counter()
        call()
        seconds[name] = max(gather_json((time.perf_counter() - began) * times, job.run.device))
    gigabytes = max(gather_json(peak_memory_gb(job.run.device), job.run.device))
    step = seconds["update"] + seconds.get("sampling", 0.0)
    evaluations = bool(evaluated) * (1 + (-(-cfg.steps // cfg.eval_every) if cfg.eval_every else 1))
    hours = (cfg.steps * step + evaluations * seconds.get("evaluation", 0.0)) / 3600
    shown = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    job.run.say(f"peak memory {gigabytes:.1f} GB; at most {shown}; {cfg.steps} steps and {evaluations} evaluations at "
                f"most {hours:.1f} hours. Shorter responses take less.")
