"""Runs and checkpoints: what train.py leaves on disk, and how it goes on from there. Nothing is pickled.

    runs/NAME/config.json            every option, the git commit, the versions, the prompts of the tasks
    runs/NAME/metrics.jsonl          one line a step, one an evaluation
    runs/NAME/samples/step_N.png     answers of an evaluation
    runs/NAME/checkpoints/step_N/    a complete model folder, optimizer_K.safetensors, state.json (step, cursor)

All randomness of a run is a function of (seed, place in the endless sequence of examples), so a step number and a
cursor restore it.
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from support.mistakes import Mistake
from support.ranks import gather_json


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                            cwd=Path(__file__).parent, check=False).stdout.strip()
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "einops", "scipy")
    return {"commit": commit or "unknown", "python": sys.version.split()[0], **{name: version(name) for name in names}}


def open_run(cfg, prompts: dict[str, str], rank: int, device, start: int) -> Path:
    """Creates runs/NAME with config.json; with cfg.resume re-opens it and cuts metrics.jsonl after step `start`. The
    same path on all ranks. A run that exists is not overwritten."""
    run = Path(cfg.resume or Path("runs") / (cfg.name or time.strftime(f"{cfg.method}-%Y%m%d-%H%M%S")))
    run, exists = gather_json([str(run), run.exists()], device)[0]
    run = Path(run)
    if exists and not cfg.resume:
        raise Mistake(f"{run} exists and is not overwritten: choose another --name, or go on with --resume {run}")
    if rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"{run} cannot be made: {error.strerror}; start in a folder that can be written to") from None
        record = {"config": dataclasses.asdict(dataclasses.replace(cfg, name=run.name, resume="")),
                  "versions": versions(), "command": sys.argv,
                  "prompts": prompts}
        name = f"config.resumed_at_{start}.json" if cfg.resume else "config.json"
        (run / name).write_text(json.dumps(record, indent=2) + "\n")
        metrics = run / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= start]
            metrics.write_text("".join(line + "\n" for line in kept))
    dist.barrier()
    return run


def renamed_options(saved: dict) -> dict:
    """The options of a run that an earlier version saved, under today's names."""
    if "no_thinking_reward" in saved:
        saved["reward_label_thinking"] = not saved.pop("no_thinking_reward")
    if "cooldown_steps" in saved:
        saved["cooldown"] = min(1.0, saved.pop("cooldown_steps") / saved["steps"])
    return saved


def newest_checkpoint(run: Path) -> Path:
    """The last complete checkpoint of a run folder."""
    steps = sorted((int(p.name.removeprefix("step_")), p) for p in (run / "checkpoints").glob("step_*")
                   if p.name.removeprefix("step_").isdecimal())
    if not steps:
        raise Mistake(f"{run} holds no checkpoint yet; start it again under another --name")
    return steps[-1][1]


def save_checkpoint(run: Path, model: nn.Module, optimizers: list, state: dict, rank: int) -> None:
    """Writes step_N beside its place, syncs it to disk, renames it: a folder named step_N is complete."""
    folder = run / "checkpoints" / f"step_{state['step']}"
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict(to=0)
    if rank == 0 and not folder.exists():
        temporary = folder.with_name(f".unfinished_{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        for k, optimizer in enumerate(optimizers):
            save_file(optimizer_tensors(optimizer), temporary / f"optimizer_{k}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state) + "\n")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    dist.barrier()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def optimizer_tensors(optimizer) -> dict[str, Tensor]:
    """Optimizer state as named tensors: "number of the parameter.quantity"."""
    return {f"{index}.{name}": torch.as_tensor(value).contiguous().cpu()
            for index, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def load_optimizer(optimizer, path: Path) -> None:
    """The inverse. A sharded optimizer takes its own part, so the number of ranks may have changed."""
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    groups, first = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        groups.append({**group, "params": list(range(first, first + count))})
        first += count
    if set(state) != set(range(first)):
        raise ValueError(f"{path} holds the state of {len(state)} parameters; the optimizer has {first}")
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
