"""Runs: what train.py leaves on disk beside its checkpoints (support/checkpoints.py), and who may write there.

    runs/NAME/config.json            every option, the git commit, the versions, the prompts of the tasks; where the run
                                     went on with other options, those, and under "before" what held until which step
    runs/NAME/metrics.jsonl          one line a step, one an evaluation
    runs/NAME/samples/step_N.png     answers of an evaluation
    runs/NAME/.lock                  held by the process that writes to the run
"""
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from support.checkpoints import set_aside, sync
from support.mistakes import Mistake
from support.ranks import gather_json

NO_RUN_YET = {"config.json", ".lock"}      # all that a start leaves which was killed before its first line
locks: dict = {}                           # folder → open file: a lock ends with its process, however that ends


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                            cwd=Path(__file__).parent, check=False).stdout.strip()
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "einops", "scipy")
    return {"commit": commit or "unknown", "python": sys.version.split()[0], **{name: version(name) for name in names}}


def open_run(cfg, prompts: dict[str, str], rank: int, device, start: int) -> tuple[Path, list[str]]:
    """Creates runs/NAME with config.json; with cfg.resume re-opens it, cuts metrics.jsonl after step `start` and sets
    later checkpoints aside. The same path on all ranks, and what to say. A run that exists is not overwritten."""
    run = Path(cfg.resume or Path("runs") / (cfg.name or time.strftime(f"{cfg.method}-%Y%m%d-%H%M%S")))
    taken = run.exists() and not (run.is_dir() and {p.name for p in run.iterdir()} <= NO_RUN_YET)
    run, taken = gather_json([str(run), taken], device)[0]
    run, said = Path(run), []
    if taken and not cfg.resume:
        raise Mistake(f"{run} exists and is not overwritten: choose another --name, or go on with --resume {run}")
    if rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"{run} cannot be made: {error.strerror}; start in a folder that can be written to") from None
        lock(run)
        record: dict = {"config": dataclasses.asdict(dataclasses.replace(cfg, name=run.name, resume="", from_step=0)),
                        "versions": versions(), "command": sys.argv, "prompts": prompts, "before": []}
        if cfg.resume:
            old = read_config(run)
            record["before"] = [*old.pop("before", []), {"until_step": start, **old}]
            lines, damaged = read_lines(run)
            if damaged:
                said.append(f"{run / 'metrics.jsonl'}: {damaged} unreadable line(s) are left out")
            replace_file(run / "metrics.jsonl", "".join(
                json.dumps(line) + "\n" for line in lines if start and line["step"] <= start))
            said += set_aside(run, start)
        replace_file(run / "config.json", json.dumps(record, indent=2) + "\n")
    dist.barrier()
    wait_until_seen(run, rank)
    return run, said


def wait_until_seen(run: Path, rank: int, seconds: int = 60) -> None:
    """A shared disk may show a new folder late. Mistake: this rank never sees it."""
    for _ in range(seconds):
        if run.is_dir():
            return
        time.sleep(1)
    if not run.is_dir():
        raise Mistake(f"rank {rank} does not see {run.resolve()}, which rank 0 has made: all nodes must share the "
                      "folder of the run")


def lock(folder: Path) -> None:
    """Until this process ends, no other one writes to the folder. Mistake: another one does."""
    if folder.resolve() in locks:
        return
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Mistake(f"process {file.read().strip() or 'unknown'} is writing to {folder}; wait for it, or end "
                      "it") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    locks[folder.resolve()] = file


def replace_file(path: Path, text: str) -> None:
    """The old file or the new one, whenever the process is killed."""
    beside = path.with_name(f".unfinished_{path.name}")
    beside.write_text(text)
    sync(beside)
    beside.rename(path)


def read_lines(run: Path) -> tuple[list[dict], int]:
    """metrics.jsonl: its records, none before the first step, and how many lines are damaged (cut off by a full disk or
    a crash of the machine)."""
    path = run / "metrics.jsonl"
    lines, damaged = [], 0
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
            line["step"] += 0
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            damaged += bool(text.strip())
    return lines, damaged


def read_config(run: Path) -> dict:
    """config.json. Mistake: it is not there or damaged."""
    path = run / "config.json"
    if not path.exists():
        raise Mistake(f"--resume {run}: there is no {path}")
    try:
        return {"config": {}, **json.loads(path.read_bytes())}
    except (ValueError, TypeError):
        raise Mistake(f"{path} is damaged, so the options of the run are not known; --model {run} begins another run "
                      "from its newest weights") from None


def saved_options(run: Path) -> dict:
    """The options of the run that --resume names, under today's names: runs/NAME or, for the checkpoint that it is to
    go on from, runs/NAME/checkpoints/step_N. Mistake: it names something else."""
    run, step = run_and_step(run)
    saved = read_config(run)["config"]
    if "no_thinking_reward" in saved:
        saved["reward_label_thinking"] = not saved.pop("no_thinking_reward")
    if "cooldown_steps" in saved:
        saved["cooldown"] = min(1.0, saved.pop("cooldown_steps") / saved["steps"])
    return {**saved, "from_step": step}


def run_and_step(path: Path) -> tuple[Path, int]:
    """runs/NAME → itself and 0, runs/NAME/checkpoints/step_N → runs/NAME and N."""
    if path.parent.name != "checkpoints":
        return path, 0
    if not path.name.removeprefix("step_").isdecimal():
        raise Mistake(f"--resume {path}: a run goes on from a folder checkpoints/step_N")
    return path.parent.parent, int(path.name.removeprefix("step_"))
