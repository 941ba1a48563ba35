"""Seconds of a step and memory of every method: `python experiments/cost.py [--repeats 9]`, with nothing beside it,
after experiments/reproduce.py has trained.

Memory: the most that the first 20 steps of each stage hold, a process each, without an evaluation. Seconds: a step of
each stage from the weights that the stage began with and from those it ended with (seed 42, at the learning rates that
are in runs/), on the same 16 prompts; nothing is learnt. All methods take turns in one process, so that other work on
the machine falls on all of them alike; medians. Into experiments/cost.json, which `reproduce.py tables` reads.
"""
import argparse
import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import train  # noqa: E402
from data import Processor, load  # noqa: E402
from experiments.reproduce import (EXPERIMENTS, ROOT, SEEDS, call, last_checkpoint, parts,  # noqa: E402
                                   read_results, steps_of)
from model import load_model  # noqa: E402
from support.equip import equip  # noqa: E402
from support.optimizers import make_optimizers  # noqa: E402
from support.ranks import start_ranks  # noqa: E402
from support.run import Run  # noqa: E402
from support.runs import versions  # noqa: E402


def job_of(flags: list[str], model: Path, device) -> train.Job:
    """A training that has just begun from the model, and learns nothing."""
    cfg = replace(train.parse_config(flags), lr=1e-30)
    ddp = DistributedDataParallel(equip(load_model(model)), gradient_as_bucket_view=True)
    state = {"step": 0, "cursor": 0, "bad_steps": 0}
    return train.Job(cfg, Run(cfg, 0, 1, device, state), ddp, None, Processor(model), make_optimizers(cfg, ddp.module),
                     load(cfg.data))


def peak_memory(flags: list[str], model: Path) -> float:
    """GB resident at most, in the first 20 steps of a training."""
    run = ROOT / "runs/cost-memory"
    shutil.rmtree(run, ignore_errors=True)
    call("train.py", "--name", run.name, "--model", str(model), *flags, "--steps", "20", "--eval-data", "")
    return max(line["peak_memory_gb"] for line in steps_of(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    stages: dict[tuple[str, int], tuple[list[str], Path, Path]] = {}        # flags, weights before and after
    for name, seeds in parts(read_results())["trained"].items():
        before = ROOT / "assets/tiny"
        for number, flags in enumerate(EXPERIMENTS[name]):
            run = ROOT / "runs" / f"reproduce-{name}-{seeds[SEEDS[0]]['rate']:g}-{SEEDS[0]}-{number + 1}"
            if not run.is_dir() or not last_checkpoint(run).is_dir():
                raise SystemExit(f"{run} is missing or not complete: first python experiments/reproduce.py run {name}, "
                                 "on this machine")
            after = last_checkpoint(run)
            stages[name, number] = flags, before, after
            before = after
    memory: dict[str, float] = {}
    for (name, _), (flags, before, _) in stages.items():       # first: a process of its own must not join these ranks
        memory[name] = max(memory.get(name, 0.0), round(peak_memory(flags, before), 3))
    _, _, device = start_ranks()
    jobs = {(*key, moment): job_of(flags, model, device) for key, (flags, before, after) in stages.items()
            for moment, model in (("start", before), ("end", after))}
    seconds: dict[tuple, list[float]] = {key: [] for key in jobs}
    for _ in range(repeats + 1):                    # the first of each warms up
        for key, job in jobs.items():
            job.run.state.update(step=0, cursor=0)
            seconds[key].append(train.train_step(job)["seconds"])
    measured: dict[str, list[dict]] = {}
    for (name, number, moment), values in seconds.items():
        own = measured.setdefault(name, [])
        if number == len(own):
            own.append({"steps": jobs[name, number, "start"].cfg.steps})
        own[number][moment] = round(statistics.median(values[1:]), 3)
    (ROOT / "experiments/cost.json").write_text(json.dumps({"commit": versions()["commit"], "repeats": repeats,
                                                            "seconds": measured, "memory": memory}, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
