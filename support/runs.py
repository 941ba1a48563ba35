"""Runs: what train.py leaves on disk beside its checkpoints (support/checkpoints.py), and who may
write there.

    runs/NAME/config.json            every option, the git commit, the versions, the prompts of the tasks; where the run
                                     went on with other options, those, and under "before" what held until which step
    runs/NAME/metrics.jsonl          one line a step, one an evaluation
    runs/NAME/curves.png             the same, drawn (support/curves.py)
    runs/NAME/samples/step_N.png     answers of an evaluation (support/pictures.py)
    runs/NAME/report.html            all of it on one page (support/report.py)
    runs/NAME/.lock                  held by the process that writes to the run
"""
import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from support.checkpoints import set_aside, set_later_aside
from support.files import as_json, read_lines, read_record, replace_file, writing
from support.mistakes import Mistake
from support.ranks import gather_json

NO_RUN_YET = {"config.json", ".lock"}      # all that a start leaves which was killed before its first line
# folder → open file, which ends with its process, however that ends; what os.stat says of the
# folder
locks: dict[str, tuple] = {}
# What an earlier version called a metric, and its name now.
RENAMED = {"N-acc strict": "N-acc", "bbox accuracy": "boxes", "r_rollouts": "r(o)", "r_y": "r(y)",
           "bbox accuracy official": "boxes official", "targets IoU>0.5": "targets",
           "response_length": "length"}


def today(name: str) -> str:
    """Returns what a metric of metrics.jsonl is called now.

    >>> today("N-acc strict"), today("rollouts/thinking"), today("y/accuracy")
    ('N-acc', 'o/thinks', 'y/accuracy')
    """
    name = re.sub("^rollouts/", "o/", RENAMED.get(name, name))
    return re.sub("^([oy])/thinking$", r"\1/thinks", name)


def versions() -> dict[str, str]:
    commit = ""
    with contextlib.suppress(OSError):      # git is not there
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                cwd=Path(__file__).parent, check=False).stdout.strip()
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "einops", "scipy")
    return {"commit": commit or "unknown", "python": sys.version.split()[0], **{name: version(name) for name in names}}


def open_run(cfg, prompts: dict[str, str], rank: int, device, start: int) -> tuple[Path, list[str]]:
    """Creates runs/NAME with config.json; with cfg.resume re-opens it, cuts metrics.jsonl after
    step `start` and sets later checkpoints aside. The same path on all ranks, and what to say. A
    run that exists is not overwritten."""
    named = Path("runs") / (cfg.name or time.strftime(f"{cfg.method}-%Y%m%d-%H%M%S"))
    run = run_and_step(Path(cfg.resume))[0] if cfg.resume else named
    taken = run.exists() and not (run.is_dir() and {p.name for p in run.iterdir()} <= NO_RUN_YET)
    told = gather_json([str(run), taken, launch()], device)
    (run, taken, _), launches = told[0], sorted({of for *_, of in told})
    run, said = Path(run), []
    if taken and not cfg.resume:
        raise Mistake(f"{run} exists and is not overwritten: choose another --name, or go on with --resume {run}")
    if rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"{run} cannot be made: {error.strerror}; start in a folder that can be written to") from None
        lock(run)
        options = dataclasses.replace(cfg, name=run.name, resume="", accept_changed_data=False)
        record: dict = {"config": dataclasses.asdict(options),
                        "versions": versions(), "command": sys.argv, "prompts": prompts, "launch": launches,
                        "before": []}
        if cfg.resume:
            old = read_config(run)
            record["before"] = [*old.pop("before", []), {"until_step": start, **old}]
            lines, damaged = read_log(run)
            if damaged:
                said.append(f"{run / 'metrics.jsonl'}: {damaged} unreadable line(s) are left out")
            if later := sum(line["step"] > start for line in lines):
                kept = set_aside(run / "metrics.jsonl")
                said.append("no checkpoint is left, so the run begins anew; " * (not start) +
                            f"{later} logged lines of steps after {start} are now in {kept.name} alone")
            replace_file(run / "metrics.jsonl", "".join(
                as_json(line) for line in lines if start and line["step"] <= start))
            said += set_later_aside(run, start)
        replace_file(run / "config.json", as_json(record, 2))
    dist.barrier()
    wait_until_seen(run, rank)
    return run, said


def launch() -> str:
    """Names the torchrun that started this process, the same after --max-restarts starts it again."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")        # LAUNCH/attempt_N/RANK/error.json
    return str(Path(path).parents[2]) if path.count("/") > 3 else ""


def was_launched_with(run: Path) -> bool:
    """Whether the same torchrun has already opened the run, before a restart."""
    return bool(launch()) and (run / "config.json").exists() and launch() in read_config(run).get("launch", [])


def wait_until_seen(run: Path, rank: int, seconds: int = 60) -> None:
    """Waits, as a shared disk may show a new folder late. Raises Mistake if it never does."""
    for _ in range(seconds):
        if run.is_dir():
            return
        time.sleep(1)
    if not run.is_dir():
        raise Mistake(f"rank {rank} does not see {run.resolve()}, which rank 0 has made: all nodes must share the "
                      "folder of the run")


def lock(folder: Path) -> None:
    """Keeps every other process from writing to the folder, until this one ends. Raises Mistake if
    another one does."""
    name = os.path.abspath(folder)
    if name in locks:
        return
    path = folder / ".lock"
    try:    # a link could lead to a file that is not ours, and a pipe would be waited for
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "r+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f"process {file.read(20).strip() or 'unknown'} is writing to {folder}; wait for it, or end "
                      "it") from None
    except OSError as error:
        other = error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO)
        advice = "; is it a link, or a folder? Remove it" * other
        raise Mistake(f"{path} is no file that can be locked ({error.strerror or error}){advice}") from None
    with writing(path):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    locks[name] = file, os.stat(folder)


def is_ours(folder: Path) -> bool:
    """Tells whether the folder is still the one that was locked, and was not removed or
    replaced."""
    try:
        return os.path.samestat(os.stat(folder), locks[os.path.abspath(folder)][1])
    except (OSError, KeyError):
        return False


def check_ours(run: Path) -> None:
    """Raises Mistake if the run's folder was locked and is not `is_ours` any more."""
    if os.path.abspath(run) in locks and not is_ours(run):
        raise Mistake(f"{run} is not the folder any more that this run wrote to: it was removed, or another stands in "
                      "its place. Nothing more is written; bring it back, then go on with --resume")


def read_log(run: Path) -> tuple[list[dict], int]:
    """Returns the records of metrics.jsonl by today's names, none before the first step; and how
    many of its lines hold none (cut off by a full disk or a crash of the machine)."""
    def number(value) -> bool:
        return type(value) in (int, float)

    def fits(line: dict) -> bool:
        evaluation = line.get("eval", {})
        return (type(line.get("step")) is int and number(line.get("lr", 0.0)) and isinstance(evaluation, dict)
                and all(value is None or number(value) for value in evaluation.values()))
    def named(values: dict) -> dict:
        return {today(name): value for name, value in values.items()}
    lines, damaged = read_lines(run / "metrics.jsonl", fits)
    return [named({**line, "eval": named(line["eval"])} if "eval" in line else line)
            for line in lines], damaged


def comparable(lines: list[dict]) -> list[dict]:
    """Returns the records of a run without evaluations of other examples than the last one's ("of")."""
    of = next((line.get("of") for line in reversed(lines) if "eval" in line), None)
    return [line for line in lines if "eval" not in line or line.get("of", of) == of]


def read_config(run: Path) -> dict:
    """Returns config.json. Raises Mistake if it is not there, damaged, or without options."""
    path = run / "config.json"
    if not os.path.lexists(path):
        raise Mistake(f"--resume {run}: there is no {path}{did_you_mean(run)}")
    try:
        record = read_record(path, config=dict)
    except Mistake as mistake:
        raise Mistake(f"{mistake}. So the options of the run are not known; --model {run} begins another run from its "
                      "newest weights") from None
    if not record["config"] or not isinstance(record.get("before", []), list):
        raise Mistake(f"{path} holds no options of a run; --model {run} begins another run from its newest weights")
    return record


def did_you_mean(name) -> str:
    """Returns what to add to a sentence about a folder that is not there."""
    meant = Path("runs") / name
    return f"; did you mean {meant}?" if meant.is_dir() else ""


def saved_options(run: Path) -> dict:
    """Returns the options of the run that --resume names, under today's names: runs/NAME or, for
    the checkpoint that it is to go on from, runs/NAME/checkpoints/step_N. Raises Mistake if it
    names something else."""
    saved = read_config(run_and_step(run)[0])["config"]
    for name in ("image_cache", "from_step", "log_every", "tensorboard", "onednn", "accept_changed_data"):
        saved.pop(name, None)       # options of earlier versions that changed no number, and what holds once
    for name, value in (("random_weights", False), ("label_weight", 0.1)):
        if saved.pop(name, value) != value:
            raise Mistake(f"{run} was started with --{name.replace('_', '-')}, which is no option "
                          "any more: go on with the version that its config.json names")
    if isinstance(saved.get("keep_best"), str):
        saved["keep_best"] = today(saved["keep_best"])
    if isinstance(saved.get("checkpoint_activations"), bool):
        saved["checkpoint_activations"] = "blocks" if saved["checkpoint_activations"] else "none"
    if "no_thinking_reward" in saved:
        saved["reward_label_thinking"] = not saved.pop("no_thinking_reward")
    if all(type(saved.get(name)) is int for name in ("cooldown_steps", "steps")):
        saved["cooldown"] = min(1.0, saved.pop("cooldown_steps") / max(1, saved["steps"]))
    return saved


def run_and_step(path: Path) -> tuple[Path, int]:
    """Returns runs/NAME → itself and 0, runs/NAME/checkpoints/step_N → runs/NAME and N."""
    whole = Path(os.path.abspath(path))
    if not path.name or whole.parent.name == "checkpoints" and len(path.parts) < 3:     # from within: "." has no name
        path = whole
    if path.parent.name != "checkpoints":
        return path, 0
    if not path.name.removeprefix("step_").isdecimal():
        raise Mistake(f"--resume {path}: a run goes on from a folder checkpoints/step_N")
    return path.parent.parent, int(path.name.removeprefix("step_"))
