"""Runs and checkpoints: what train.py leaves on disk, and how it goes on from there. Nothing is pickled.

    runs/NAME/config.json            every option, the git commit, the versions, the prompts of the tasks; where the run
                                     went on with other options, those, and under "before" what held until which step
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
    # A start that was killed before its first line leaves config.json alone: that is no run yet.
    taken = run.exists() and not (run.is_dir() and {p.name for p in run.iterdir()} <= {"config.json"})
    run, taken = gather_json([str(run), taken], device)[0]
    run = Path(run)
    if taken and not cfg.resume:
        raise Mistake(f"{run} exists and is not overwritten: choose another --name, or go on with --resume {run}")
    if rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"{run} cannot be made: {error.strerror}; start in a folder that can be written to") from None
        record = {"config": dataclasses.asdict(dataclasses.replace(cfg, name=run.name, resume="")),
                  "versions": versions(), "command": sys.argv, "prompts": prompts, "before": []}
        if cfg.resume:
            old = json.loads((run / "config.json").read_text())
            record["before"] = [*old.pop("before", []), {"until_step": start, **old}]
        replace_file(run / "config.json", json.dumps(record, indent=2) + "\n")
        metrics = run / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if start and json.loads(line)["step"] <= start]
            replace_file(metrics, "".join(line + "\n" for line in kept))
    dist.barrier()
    return run


def replace_file(path: Path, text: str) -> None:
    """The old file or the new one, whenever the process is killed."""
    beside = path.with_name(f".unfinished_{path.name}")
    beside.write_text(text)
    sync(beside)
    beside.rename(path)


def read_lines(run: Path) -> list[dict]:
    """metrics.jsonl, one record a line; none before the first."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved_options(run: Path) -> dict:
    """The options of the run that --resume names, under today's names. Mistake: it names something else."""
    if run.parent.name == "checkpoints" and (run / "state.json").exists():
        raise Mistake(f"--resume {run}: that is a checkpoint; --resume {run.parent.parent} goes on with its run from "
                      f"the newest one, --model {run} begins another run from these weights")
    if not (run / "config.json").exists():
        raise Mistake(f"--resume {run}: there is no {run / 'config.json'}")
    saved = json.loads((run / "config.json").read_text())["config"]
    if "no_thinking_reward" in saved:
        saved["reward_label_thinking"] = not saved.pop("no_thinking_reward")
    if "cooldown_steps" in saved:
        saved["cooldown"] = min(1.0, saved.pop("cooldown_steps") / saved["steps"])
    return saved


def last_checkpoint(run: Path) -> Path | None:
    """The last complete checkpoint of a run folder, None before the first."""
    steps = {int(p.name.removeprefix("step_")): p for p in (run / "checkpoints").glob("step_*")
             if p.name.removeprefix("step_").isdecimal()}
    return steps[max(steps)] if steps else None


def newest_checkpoint(run: Path) -> Path:
    """The last complete checkpoint of a run folder. Mistake: there is none."""
    if not (found := last_checkpoint(run)):
        raise Mistake(f"{run} holds no checkpoint yet; torchrun train.py --resume {run} goes on with it")
    return found


def save_checkpoint(run: Path, model: nn.Module, optimizers: list, state: dict, rank: int) -> None:
    """Writes step_N beside its place, syncs it to disk, renames it: a folder named step_N is complete."""
    folder = run / "checkpoints" / f"step_{state['step']}"
    for optimizer in optimizers:
        if is_sharded(optimizer):
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
    for optimizer in optimizers:
        if is_sharded(optimizer):
            optimizer._all_state_dicts.clear()      # the state of all ranks, which was gathered for the file
    dist.barrier()


def is_sharded(optimizer) -> bool:
    """Whether it is a ZeroRedundancyOptimizer, which takes more than a second to import and so is not named here."""
    return hasattr(optimizer, "consolidate_state_dict")


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
    if is_sharded(optimizer):
        optimizer.state.clear()         # a second copy of what its inner optimizer has just taken
