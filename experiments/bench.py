"""How fast, and against whom: every line compares two things in one run, in turns, and reports medians.

    python experiments/bench.py --json FILE       CPU: tiny and 116M; GPU: 3B
    python experiments/bench.py --quick           a few minutes: one repeat, less of everything

    oneDNN     our sampling and training with onednn.Linear's products by oneDNN against PyTorch's own choice (CPU)
    sampling   rollout.generate against transformers' generate with num_return_sequences = G
    leaving    rollouts that leave the batch as they end, against groups that leave whole, lengths log-normal
    by length  micro-batches of rows sorted by length, against rows as they come
    training   forward and backward of packed rows, one a group, against G+1 separate rows through the same model, and
               against transformers' model with the same rows in a padded batch. All three must give the same loss
    step       one whole update against one of TRL's GRPOTrainer, where trl is installed
    parts      where the seconds of a step of train.py go
    vision     pictures of different sizes in one call of the vision tower, against one call each
    growth     seconds against G, prompt length, response length, images
    counted    operators of a decoder layer in a token step of 3B and 7B on a GPU, and the bytes that they move, against
               reading all weights and caches once. Nothing is run for it

What a GPU does in seconds, and how near to its limits: experiments/gpu.sh.
Weights are random, but for the tiny model; prompts hold one picture; responses never end early. Memory is the peak
during a call above what was resident before it (CPU: resident set; GPU: allocated). `times_faster` above 1 and
`memory_share` below 1 are in our favour.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import joined, onednn  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from train import Config as Options  # noqa: E402
from data import Processor, Prompt, Response, collate, load, pack_group  # noqa: E402
from model import Config, Qwen2_5_VL, empty_model, load_model, row_mask  # noqa: E402
from support.equip import equip  # noqa: E402
from support.optimizers import make_optimizers  # noqa: E402
from support.ranks import leave_ranks, start_ranks  # noqa: E402
from support.run import Run  # noqa: E402
from rewards import TASKS, Reward  # noqa: E402
from support.sources import Example  # noqa: E402

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
# What differs from assets/tiny/config.json: text, vision. 3B and 7B are Qwen2.5-VL's.
WIDE = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
        "fullatt_block_indexes": [7, 15, 23, 31]}
SECTIONS = {"type": "mrope", "mrope_section": [16, 24, 24]}


def qwen3(text: dict, vision: dict) -> tuple[dict, dict]:
    return ({"model_type": "qwen3_vl", "rope_scaling": {"rope_type": "default"},
             "text_config": {"head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
                             "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}, **text}},
            {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "patch_size": 16,
             "num_position_embeddings": 2304, **vision})


SIZES = {
    "tiny": ({}, {}),
    "116M": ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
              "intermediate_size": 2048, "vocab_size": 32_000, "tie_word_embeddings": True,
              "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
             {"depth": 6, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1024, "out_hidden_size": 768,
              "fullatt_block_indexes": [2, 5]}),
    "3B": ({"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "intermediate_size": 11008, "vocab_size": 151_936, "tie_word_embeddings": True, "rope_scaling": SECTIONS,
            "rope_theta": 1e6}, {**WIDE, "out_hidden_size": 2048}),
    "7B": ({"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152_064, "tie_word_embeddings": False, "rope_scaling": SECTIONS,
            "rope_theta": 1e6}, {**WIDE, "out_hidden_size": 3584}),
    "Qwen3-4B": qwen3(
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 9728, "vocab_size": 151_936, "rope_theta": 5e6},
        {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "out_hidden_size": 2560,
         "deepstack_visual_indexes": [5, 11, 17]}),
    "Qwen3-tiny": qwen3(
        {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 256, "vocab_size": 512, "rope_theta": 100.0},
        {"depth": 3, "hidden_size": 96, "num_heads": 4, "intermediate_size": 160, "out_hidden_size": 128,
         "deepstack_visual_indexes": [0, 1]}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident_bytes(name: str) -> int:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def start_measuring():
    """Returns the call that ends it: seconds, and peak memory in GB above what was resident at the start."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")    # VmHWM starts again from what is resident now
        before = resident_bytes("VmRSS")
    synchronise()
    began = time.perf_counter()

    def stop() -> tuple[float, float]:
        synchronise()
        seconds = time.perf_counter() - began
        if on_gpu:
            return seconds, (torch.cuda.max_memory_allocated() - before) / 1e9
        return seconds, (resident_bytes("VmHWM") - before) / 1e9 if sys.platform == "linux" else float("nan")
    return stop


def measure(call) -> tuple[float, float]:
    stop = start_measuring()
    call()
    return stop()


def compare(calls: dict, repeats: int) -> dict[str, tuple[float, float]]:
    """Each call once to warm up, then all in turns. Medians of seconds and of GB."""
    for call in calls.values():
        call()
    seen: dict[str, list] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seen[name].append(measure(call))
    return {name: tuple(statistics.median(column) for column in zip(*values)) for name, values in seen.items()}


class Table(list):
    """Lines of what was measured; printed as soon as they are known."""
    def line(self, what: str, setting: str, **numbers: float) -> None:
        self.append({"what": what, "setting": setting, **numbers})
        shown = "   ".join(f"{name} {value:.3g}" if value < 1000 else f"{name} {value:.0f}"
                           for name, value in numbers.items())
        print(f"{what:<34} {setting:<44} {shown}", flush=True)

    def against(self, what: str, setting: str, ours: tuple[float, float], theirs: tuple[float, float],
                tokens: int = 0) -> None:
        extra = {"tokens_per_s": tokens / ours[0], "tokens_per_s_theirs": tokens / theirs[0]} if tokens else {}
        self.line(what, setting, times_faster=theirs[0] / ours[0], seconds=ours[0], seconds_theirs=theirs[0],
                  memory_share=ours[1] / max(theirs[1], 1e-9), gb=ours[1], gb_theirs=theirs[1], **extra)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured

def make_folder(size: str, folder: Path) -> Path:
    """A model folder without weights: the tiny model's tokenizer, the config of `size`."""
    folder.mkdir(exist_ok=True)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((TINY / "config.json").read_text())
    text, vision = SIZES[size]
    config.update(text)
    config["vision_config"].update(vision)
    pictures = json.loads((TINY / "preprocessor_config.json").read_text())
    pictures["patch_size"] = config["vision_config"]["patch_size"]
    for name, fields in (("config", config), ("preprocessor_config", pictures)):
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def make_model(size: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Qwen2_5_VL:
    """Random weights, made on the device. It never ends a response: no id is its EOS."""
    torch.manual_seed(0)
    if size == "tiny":
        model = load_model(TINY, dtype, device)
    else:
        torch.set_default_dtype(dtype)
        model = empty_model(make_folder(size, folder), device)
        model.reset_parameters()
        torch.set_default_dtype(torch.float32)
        model.to(device)        # with the two tensors that are computed, not loaded
    model.eos_ids = (-1,)
    return equip(model)


def make_prompts(folder: Path, count: int, pixels: int, words: int) -> list[Prompt]:
    """Different noise in each picture of pixels × pixels; (pixels / 28)² image tokens, then text."""
    processor = Processor(folder)
    picture = torch.randint(256, (count, pixels, pixels, 3), dtype=torch.uint8).numpy()
    return [processor.prompt(Example(str(i), (Image.fromarray(picture[i]),), " ".join(["word"] * words), "1", "vqa"))
            for i in range(count)]


def make_responses(prompts: list[Prompt], G: int, R: int) -> list[list[list[int]]]:
    return [torch.randint(400, (G, R)).tolist() for _ in prompts]


def transformers_model(model: Qwen2_5_VL, folder: Path, device: torch.device):
    """transformers' own, with our weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    model.save_pretrained(folder)
    if (folder / "LICENSE").exists():
        (folder / "LICENSE").unlink()
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=model.lm_head.weight.dtype).to(device)
    theirs.generation_config.eos_token_id = None
    return theirs


def transformers_inputs(prompts: list[Prompt], responses: list[list[int]], image_token: int, device) -> dict:
    """One row for each response, all of one length."""
    tokens = torch.tensor([p.tokens + r for p, r in zip(prompts, responses, strict=True)], device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens),
            "mm_token_type_ids": (tokens == image_token).int(),
            "pixel_values": torch.cat([p.patches for p in prompts]).to(device),
            "image_grid_thw": torch.tensor([(1, *grid) for p in prompts for grid in p.grids], device=device)}


def rollouts(model, prompts: list[Prompt], G: int, R: int, **features) -> list:
    """G rollouts of each prompt, of up to R tokens."""
    u = rollout.uniforms(0, range(len(prompts)), G, R)
    return rollout.generate(model, prompts, R, u, **features)


def sampling(table: Table, size: str, model, theirs, prompts: list[Prompt], G: int, R: int, repeats: int,
             graphs: bool = False) -> None:
    device, image = model.lm_head.weight.device, model.config.image_token_id
    inputs = transformers_inputs(prompts, [[]] * len(prompts), image, device)

    def run_theirs():
        made = theirs.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=G,
                               min_new_tokens=R, max_new_tokens=R, pad_token_id=0)
        assert made.shape == (len(prompts) * G, inputs["input_ids"].shape[1] + R), made.shape

    def run_ours():
        made = rollouts(model, prompts, G, R, graphs=graphs)
        assert all(len(o.tokens) == R for group in made for o in group)
    times = compare({"ours": run_ours, "theirs": run_theirs}, repeats)
    table.against("sampling / transformers generate", f"{size}, {len(prompts)}×{len(prompts[0].tokens)} tokens, G {G}, "
                  f"{R} new{', CUDA graphs' if graphs else ''}", times["ours"], times["theirs"], len(prompts) * G * R)


def leaving(table: Table, size: str, model, prompt: Prompt, B: int, G: int, R: int, repeats: int) -> None:
    """Rollouts that leave the batch when they end, against the same where each stays as long as the longest of its
    group. Lengths are log-normal around R/4, at most R: an end is where the uniform numbers hold a 2."""
    plain, none = rollout.sample, model.eos_ids
    numbers = rollout.uniforms(0, range(B), G, R)

    def run(lengths: torch.Tensor):
        def call():
            def until_the_mark(logits, u):
                logits[:, 0] = -torch.inf
                token, logp, entropy = plain(logits, u.clamp(max=1 - 1e-6))
                return token.where(u < 2, 0), logp.clamp(min=-99), entropy
            rollout.sample, model.eos_ids = until_the_mark, (0,)
            u = numbers.scatter(2, lengths[..., None] - 1, 2.0)
            made = rollout.generate(model, [prompt] * B, R, u)
            rollout.sample, model.eos_ids = plain, none
            assert [[len(o.tokens) for o in group] for group in made] == lengths.tolist()
        return call
    for sigma in (0.5, 1.0):
        spread = torch.randn(B, G, generator=torch.Generator().manual_seed(1)) * sigma
        lengths = (spread.exp() * R / 4).long().clamp(2, R)
        together = lengths.max(1, keepdim=True).values.expand(B, G)
        times = compare({"one by one": run(lengths), "together": run(together)}, repeats)
        table.against("rollouts that leave / groups", f"{size}, B {B}, G {G}, σ {sigma}, at most {R} new",
                      times["one by one"], times["together"])


def by_length(table: Table, size: str, model, prompt: Prompt, S: int, R: int, repeats: int) -> None:
    """Training on 16 rows in micro-batches of 4, sorted by their length as train.pack sorts them, against as they come.
    Rows of S responses, whose lengths are log-normal around R with σ = 1."""
    lengths = (torch.randn(16, S, generator=torch.Generator().manual_seed(1)).exp() * R).long().clamp(2, 8 * R).tolist()
    rows = [pack_group(prompt, [Response([5] * n) for n in row])[0] for row in lengths]

    def step(rows: list):
        for i in range(0, len(rows), 4):
            (-model(**vars(collate(rows[i:i + 4], model.lm_head.weight.device)))[0].sum()).backward()
        model.zero_grad(set_to_none=True)
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    times = compare({"sorted": lambda: step(ordered), "as they come": lambda: step(rows)}, repeats)
    table.against("rows by length / as they come", f"{size}, 16 rows of {S} × about {R} tokens", times["sorted"],
                  times["as they come"])


def training(table: Table, size: str, model, theirs, prompt: Prompt, S: int, R: int, repeats: int) -> None:
    """The loss is the mean −log π of all response tokens."""
    device, image = model.lm_head.weight.device, model.config.image_token_id
    responses = torch.randint(400, (S, R)).tolist()
    packed = collate(pack_group(prompt, list(map(Response, responses))), device)
    separate = collate([pack_group(prompt, [Response(r)])[0] for r in responses], device)
    inputs = transformers_inputs([prompt] * S, responses, image, device)
    losses = {}

    def through(module, name: str, loss) -> None:
        losses[name] = float(loss.detach())
        loss.backward()
        module.zero_grad(set_to_none=True)

    def ours(name: str, batch):
        return lambda: through(model, name, -model(**vars(batch))[0].sum() / (S * R))

    def run_theirs():
        logits = theirs(**inputs, logits_to_keep=R + 1).logits[:, :-1].float()
        logits[..., model.banned] = -torch.inf
        logp = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -R:, None])
        through(theirs, "transformers", -logp.mean())
    calls = {"packed": ours("packed", packed), "separate": ours("separate", separate)}
    times = compare({**calls, "transformers": run_theirs} if theirs else calls, repeats)
    wrong = max(losses.values()) - min(losses.values())
    if wrong > (1e-4 if model.lm_head.weight.dtype == torch.float32 else 0.05) * losses["packed"]:
        raise SystemExit(f"the losses differ, so these do not do the same work: {losses}")
    setting = f"{size}, {len(prompt.tokens)} + {S}×{R} tokens"
    table.against("training / separate rows", setting, times["packed"], times["separate"])
    if theirs:
        table.against("training / transformers, padded", setting, times["packed"], times["transformers"])


def entropy_gradient(table: Table, size: str, model, repeats: int) -> None:
    """Log-probs of M tokens, forward and backward, in chunks of 2,048: with the gradient of the entropy, as
    --entropy-bonus needs it, against without. `gb_matrix` is what [M, V] alone would take."""
    D, V = model.config.hidden_size, model.config.vocab_size
    for M in (2048, 8192):
        hidden, targets = torch.randn(M, D, device=model.lm_head.weight.device), torch.randint(V, (M,))

        def call(gradient: bool) -> None:
            h = hidden.clone().requires_grad_()
            logp, entropy = model.score(h, targets.to(h.device), entropy_gradient=gradient)
            (logp.sum() + entropy.sum() * gradient).backward()
            model.zero_grad(set_to_none=True)
        found = compare({name: lambda gradient=gradient: call(gradient)
                         for name, gradient in (("with", True), ("without", False))}, repeats)
        table.line(f"entropy's gradient, {M} tokens", f"{size}, {V} words", times_slower=found["with"][0] /
                   found["without"][0], gb=found["with"][1], gb_without=found["without"][1], gb_matrix=M * V * 4 / 1e9)


def mixed_pictures(table: Table, size: str, model, repeats: int) -> None:
    """A small picture must not pay for a large one of the same call."""
    for name, grids in (("1 of 5,000 and 7 of 256 patches", [(50, 100)] + [(16, 16)] * 7),
                        ("4 of 3,600 and 4 of 1,024 patches", [(60, 60)] * 4 + [(32, 32)] * 4)):
        pixels = model.visual.patch_embed.proj.weight[0].numel()
        patches = [torch.randn(gh * gw, pixels, device=model.lm_head.weight.device) for gh, gw in grids]
        with torch.no_grad():
            times = compare({"one call": lambda: model.visual(torch.cat(patches), grids),
                             "each": lambda: [model.visual(p, [grid]) for p, grid in zip(patches, grids)]}, repeats)
        table.against("vision / one by one", f"{size}, {name}", times["one call"], times["each"])


def against_mkl(table: Table, size: str, model, prompts: list[Prompt], G: int, R: int, repeats: int) -> None:
    responses = [Response(tokens) for tokens in torch.randint(400, (G + 1, R)).tolist()]
    batch = collate(pack_group(prompts[0], responses), model.lm_head.weight.device)
    chosen = onednn.ONEDNN_FROM, onednn.PACKED_FROM

    def one_row():
        (-model(**vars(batch))[0].sum()).backward()
        model.zero_grad(set_to_none=True)

    def by_mkl(call):
        def run():
            onednn.ONEDNN_FROM = onednn.PACKED_FROM = float("inf")
            call()
            onednn.ONEDNN_FROM, onednn.PACKED_FROM = chosen
        return run
    for what, call in (("sampling", lambda: rollouts(model, prompts, G, R)), ("training", one_row)):
        times = compare({"ours": call, "mkl": by_mkl(call)}, repeats)
        table.against(f"oneDNN / MKL, {what}", f"{size}, {len(prompts[0].tokens)}-token prompts, G {G}, {R} new",
                      times["ours"], times["mkl"])


def random_reward(response: str, truth: str) -> Reward:
    """Rewards that are never all equal, so that every method has something to learn."""
    return Reward({"accuracy": len(response) % 7 / 7})


def our_step(model: Qwen2_5_VL, options: Options, prompts: list[Prompt]):
    """One update as train.py makes it: sampling, rewards, packing, forward, backward, AdamW."""
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    processor, optimizers = Processor(model.folder), make_optimizers(options, model)
    TASKS["vqa"] = TASKS["vqa"].__class__(**{**vars(TASKS["vqa"]), "reward": random_reward})

    def step():
        groups = train.make_groups(options, model, processor, prompts, 0)
        train.update(options, ddp, None, optimizers, groups, train.Meter())
    return step


def against_trl(table: Table, size: str, model, theirs, prompts: list[Prompt], G: int, R: int, repeats: int,
                folder: Path) -> None:
    """Our step, then one of TRL's, in turns; the first of each warms up."""
    from bench_trl import run_trl
    step = our_step(model, Options(method="rlvr", rollouts=G, max_new_tokens=R, micro_rows=1, lr=1e-6), prompts)
    seen: dict[str, list] = {"ours": [], "theirs": []}
    running = []

    def began() -> None:
        seen["ours"].append(measure(step))
        running.append(start_measuring())

    def ended() -> None:
        seen["theirs"].append(running.pop()())
    run_trl(theirs, folder, prompts, G, R, repeats + 1, random_reward, began, ended)
    ours, others = (tuple(statistics.median(column) for column in zip(*seen[name][1:])) for name in ("ours", "theirs"))
    table.against("step / TRL GRPOTrainer", f"{size}, {len(prompts)}×{len(prompts[0].tokens)} tokens, G {G}, {R} new",
                  ours, others)


@contextlib.contextmanager
def clocked(seconds: dict, places: list[tuple[object, str, str]]):
    """Inside, every call of (owner, attribute) adds its seconds to its name. A call within another counts for the inner
    one only; within forward and backward nothing is told apart."""
    running: list[list] = []       # name, seconds of the calls within
    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]

    def clock(original, name: str):
        def call(*inputs, **settings):
            if running and running[-1][0] in ("forward", "backward"):
                return original(*inputs, **settings)
            running.append([name, 0.0])
            synchronise()
            began = time.perf_counter()
            result = original(*inputs, **settings)
            synchronise()
            whole = time.perf_counter() - began
            seconds[name] = seconds.get(name, 0.0) + whole - running.pop()[1]
            if running:
                running[-1][1] += whole
            return result
        return call
    for (owner, attribute, original), (_, _, name) in zip(originals, places):
        setattr(owner, attribute, clock(original, name))
    try:
        yield
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def parts(table: Table, steps: int) -> None:
    """The default job's step. Model code: what runs inside Qwen2_5_VL, its backward, and the optimizer."""
    options = Options()
    model = equip(load_model(TINY))
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizers = make_optimizers(options, model)
    state = {"step": 0, "cursor": 0, "bad_steps": 0}
    job = train.Job(options, Run(options, 0, 1, torch.device("cpu"), state), ddp, None, Processor(TINY), optimizers,
                    load(options.data))
    train.train_step(job)
    seconds: dict[str, float] = {}
    places = [(train, "take", "data"), (job.processor, "prompt", "data"), (train, "generate", "sampling, rest"),
              (model, "embed", "model, sampling"), (model, "decode", "model, sampling"),
              (model, "logits", "model, sampling"), (train, "make_groups", "rewards"),
              (train, "pack", "packing"),
              (ddp, "forward", "forward"), (torch.Tensor, "backward", "backward"),
              *[(optimizer, "step", "optimizer") for optimizer in optimizers], (train, "train_step", "rest")]
    with clocked(seconds, places):
        for _ in range(steps):
            train.train_step(job)
    whole = sum(seconds.values())
    table.line("parts of a step of the default job", f"tiny, 16 × 8, mean of {steps} steps", seconds=whole / steps,
               **{name: value / steps for name, value in seconds.items()})
    inside = sum(seconds.get(name, 0.0) for name in ("model, sampling", "forward", "backward", "optimizer"))
    table.line("outside model code", "share of the same steps", share=1 - inside / whole)


def growth(table: Table, size: str, model, folder: Path, repeats: int, quick: bool) -> None:
    """One thing at a time; the first value of each list is the unit. `alone`: the same responses to a prompt of a few
    tokens without a picture, which is what the slope in G should be."""
    base = {"G": 8, "words": 8, "R": 64, "images": 1, "pixels": 448}
    lists = {"G": (1, 2, 4, 8, 16, 32), "words": (8, 256, 512), "R": (16, 32, 64, 128), "images": (1, 2, 4)}
    if quick:
        base, lists = {**base, "R": 16, "pixels": 224}, {"G": (1, 8)}

    def calls(prompts: list[Prompt], G: int, R: int) -> dict:
        responses = [[Response(tokens) for tokens in several] for several in make_responses(prompts, G, R)]

        def one_update():
            for prompt, several in zip(prompts, responses):
                (-model(**vars(collate(pack_group(prompt, several), model.lm_head.weight.device)))[0].sum()).backward()
            model.zero_grad(set_to_none=True)
        return {"sampling": lambda: rollouts(model, prompts, G, R), "training": one_update}
    for name, values in lists.items():
        for value in values:
            now = {**base, name: value}
            prompts = make_prompts(folder, now["images"], now["pixels"], now["words"])
            both = calls(prompts, now["G"], now["R"])
            if name == "G":
                bare = [Processor(folder).prompt(Example("bare", (), "word", "1", "vqa"))]
                both |= {f"{k} alone": v for k, v in calls(bare, now["G"], now["R"]).items()}
            times = compare(both, repeats)
            table.line(f"growth with {name} = {value}", f"{size}, {len(prompts)}×{len(prompts[0].tokens)} tokens, "
                       f"G {now['G']}, {now['R']} new", **{k: seconds for k, (seconds, _) in times.items()})


class Counted(TorchDispatchMode):
    """Counts the operators that are a kernel on a GPU, and the bytes that these read and write."""
    PART_OF_INPUT = ("embedding", "gather", "index")      # read as much as they return

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not (func.is_view or name in ("_unsafe_view", "empty")):
            self.operators += 1
            touched = tree_leaves((args, out))
            if name in self.PART_OF_INPUT:
                touched = [out, *tree_leaves((args[1:], out))]
            elif name == "index_copy_":
                touched = [args[3], args[3]]
            self.bytes += sum(map(stored_bytes, touched))
        return out


def stored_bytes(x) -> int:
    """What an expanded tensor repeats counts once."""
    if not isinstance(x, torch.Tensor):
        return 0
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride()) if stride)


def count_token_step(config: Config, B: int, G: int, P: int, R: int) -> tuple[Counted, Counted, int]:
    """A token step of G rollouts of each of B prompts of P tokens, R slots of each being read: what decoding and what
    drawing a token take in bfloat16, and the bytes of all weights and caches. Tensors have no memory, only shapes.
    RMSNorm is one kernel on CUDA: one that reads and writes as much stands for it."""
    with mock.patch.object(F, "rms_norm", lambda x, *_: x.neg()), mock.patch.object(joined, "DEVICES", ("meta",)):
        with torch.device("meta"):
            model = Qwen2_5_VL(config).to("meta", torch.bfloat16)
            cache = rollout.KVCache(config.num_hidden_layers, G, R, torch.ones(B, P, dtype=torch.bool))
            token, u = torch.zeros(B * G, dtype=torch.long), torch.zeros(B * G, dtype=torch.float64)
            x, position = model.model.embed_tokens(token.new_zeros(B, P)), token.new_zeros(3, B, P)
        with torch.no_grad(), joined.joined_products(model):
            model.decode(x, position, functools.partial(cache.attend_prompt, row_mask(position[0])))
            cache.window = R
            with Counted() as decoding:
                hidden = rollout.decode_one_token(model, token, token, cache)
            with Counted() as drawing:
                rollout.sample(model.logits(hidden), u)
    weights = [*model.model.layers.parameters(), *model.model.norm.parameters(), model.lm_head.weight]
    caches = [x for layer in (*cache.prompt, *cache.suffix) for x in layer]
    return decoding, drawing, sum(map(stored_bytes, [*weights, *caches]))


def counted(table: Table, size: str, folder: Path, B: int, G: int, P: int, R: int) -> None:
    config = Config.from_json(make_folder(size, folder) / "config.json")
    decoding, drawing, bound = count_token_step(config, B, G, P, R)
    less = replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    layer = decoding.operators - count_token_step(less, B, G, P, R)[0].operators
    moved = decoding.bytes + drawing.bytes
    table.line("token step, counted", f"{size}, {B}×{P} tokens, G {G}, {R} slots", operators_per_layer=layer,
               operators=decoding.operators + drawing.operators, gb=moved / 1e9, gb_drawing=drawing.bytes / 1e9,
               gb_bound=bound / 1e9, times_bound=moved / bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of less, a few minutes")
    parser.add_argument("--json", default="", help="file for the table")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    _, _, device = start_ranks()
    on_gpu = device.type == "cuda"
    repeats, table = 1 if args.quick else args.repeats, Table()
    machine = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    print(f"{machine}, {platform.machine()}, torch {torch.__version__}, "
          f"{'bfloat16' if on_gpu else 'float32'}, medians of {repeats}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (run_gpu if on_gpu else run_cpu)(table, device, Path(folder), repeats, args.quick)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "torch": torch.__version__, "repeats": repeats,
                                               "lines": table}, indent=1) + "\n")
    leave_ranks()


def run_cpu(table: Table, device: torch.device, folder: Path, repeats: int, quick: bool) -> None:
    G, R, pixels = (8, 16, 224) if quick else (8, 64, 448)
    threads = torch.get_num_threads()
    for size in ("tiny", "116M"):
        torch.set_num_threads(1 if size == "tiny" else threads)     # as train.py does for a narrow model
        model = make_model(size, folder / size, device, torch.float32)
        prompts = make_prompts(model.folder, 2, pixels, 7)
        theirs = transformers_model(model, folder / f"{size}-transformers", device)
        sampling(table, size, model, theirs, prompts, G, R, repeats)
        leaving(table, size, model, prompts[0], 4, G, 4 * R, repeats)
        by_length(table, size, model, prompts[0], 3, R, repeats)
        training(table, size, model, theirs, prompts[0], G + 1, R, repeats)
        if importlib.util.find_spec("trl") and not quick:
            against_trl(table, size, model, theirs, prompts, G, R, repeats, folder / f"{size}-transformers")
        del theirs
        mixed_pictures(table, size, model, repeats)
        entropy_gradient(table, size, model, repeats)
        if size == "116M" and not quick:
            against_mkl(table, size, model, prompts, G, R, repeats)
        growth(table, size, model, model.folder, repeats, quick)
    if not importlib.util.find_spec("trl"):
        print("step / TRL GRPOTrainer: not measured, trl is not installed")
    torch.set_num_threads(1)
    parts(table, 2 if quick else 10)
    for size, B in (("3B", 2), ("3B", 16), ("7B", 16)):
        counted(table, size, folder / size, B, 8, 1160, 128)


def run_gpu(table: Table, device: torch.device, folder: Path, repeats: int, quick: bool) -> None:
    model = make_model("3B", folder / "3B", device, torch.bfloat16)
    prompts = make_prompts(model.folder, 16, 840, 60)
    theirs = transformers_model(model, folder / "3B-transformers", device)
    for graphs in (False, True):
        sampling(table, "3B", model, theirs, prompts[:4], 8, 32 if quick else 128, min(repeats, 2), graphs)
    leaving(table, "3B", model, prompts[0], 16, 8, 128, 1)
    training(table, "3B", model, theirs, prompts[0], 4, 256, min(repeats, 2))   # 9 separate rows need over 140 GB


if __name__ == "__main__":
    main()
