"""Trains, evaluates and tabulates what the paper claims, on the built-in world: several seeds of every method.

    python experiments/reproduce.py run                      all of EXPERIMENTS; goes on where it was stopped
    python experiments/reproduce.py run visurf rlvr --seeds 42 43
    python experiments/reproduce.py tables                   from experiments/results/ alone

A seed of an experiment is one small file, experiments/results/NAME-SEED.json: commit, machine, flags, seconds, metrics
of every split. A file that exists is not made again. Seeds are paired: the same base, the same order of the data.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
SEEDS = (42, 43, 44, 45, 46)
SPLITS = ("scenes:test", "scenes:reasoning-test")
# Name → the stages of its training, flags of train.py each; a later stage begins from the weights of the one before.
EXPERIMENTS = {
    "base": [],
    "visurf": [[]],
    "visurf-thought": [["--label-thought", "rollout"]],
    "rlvr": [["--method", "rlvr"]],
    "sft": [["--method", "sft"]],
    "sft-thought": [["--method", "sft", "--label-thought", "rollout"]],
    "sft-rlvr": [["--method", "sft", "--steps", "100"], ["--method", "rlvr", "--steps", "300"]],
    "luffy": [["--method", "luffy"]],
    "hpt": [["--method", "hpt"]],
    "chord": [["--method", "chord"]],
    "sgrpo": [["--method", "sgrpo"]],
    "sum": [["--method", "sum"]],
    "visurf-no-align": [["--label-style", "compact"]],
    "visurf-no-rule": [["--reward-label-thinking"]],
    "visurf-no-smoothing": [["--no-smoothing"]],
    "visurf-no-controls": [["--label-style", "compact", "--reward-label-thinking", "--no-smoothing"]],
}
SHOWN = {"N-acc strict": "N-acc", "T-acc": "T-acc", "bbox accuracy": "boxes", "thinks, present": "thinks, present",
         "thinks, absent": "thinks, absent", "answers": "counting"}


def call(script: str, *flags: str) -> None:
    """Runs a script of ours on one core; what it prints goes to runs/reproduce.log."""
    with open(ROOT / "runs/reproduce.log", "a") as log:
        subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT, stdout=log, stderr=log, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(name: str, stage: list[str], seed: int, model: str) -> tuple[str, float]:
    """A stage, gone on with where it was stopped. Returns its newest checkpoint and the seconds of its steps."""
    run = ROOT / "runs" / name
    if not (run / "config.json").exists():
        call("train.py", "--name", name, "--seed", str(seed), "--model", model, "--eval-data", "", *stage)
    else:
        call("train.py", "--resume", str(run))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return str(run / "checkpoints" / f"step_{steps[-1]['step']}"), sum(line.get("seconds", 0) for line in steps)


def make(name: str, seed: int) -> str:
    """One file of results. Returns a line about it."""
    path = RESULTS / f"{name}-{seed}.json"
    if path.exists():
        return f"{path.name}: there already"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.strip()
    model, seconds = str(ROOT / "assets/tiny"), 0.0
    for number, stage in enumerate(EXPERIMENTS[name], 1):
        model, took = train(f"reproduce-{name}-{seed}-{number}", stage, seed, model)
        seconds += took
    metrics = {}
    for split in SPLITS:
        out = ROOT / "runs" / f"reproduce-{name}-{seed}-{split.removeprefix('scenes:')}"
        call("eval.py", "--model", model, "--data", split, "--out", str(out))
        metrics[split] = json.loads((out / "metrics.json").read_text())["metrics"]
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"experiment": name, "seed": seed, "commit": commit, "stages": EXPERIMENTS[name],
                                "machine": f"{platform.machine()}, {os.cpu_count()} cores", "seconds": round(seconds),
                                "metrics": metrics}, indent=1) + "\n")
    return f"{path.name}: " + ", ".join(f"{label} {metrics[SPLITS[0]][key]:.3f}" for key, label in SHOWN.items())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t (nan for one value)."""
    from scipy.stats import t
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def tables(results: dict[str, dict[int, dict]], split: str) -> str:
    """Two tables in Markdown: mean ± 95 % interval over the seeds; difference to visurf on the seeds that both have."""
    def number(values: list[float], signed: bool) -> str:
        mean, half = interval(values)
        return f"{mean:{'+' if signed else ''}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
    lines = []
    for against in (None, "visurf"):
        lines += [f"{split}, " + (f"minus {against}, paired by seed" if against else "mean ± 95 % interval"), "",
                  "| | seeds | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
        for name in (n for n in EXPERIMENTS if n in results and n != against):
            seeds = sorted(set(results[name]) & set(results.get(against, results[name])))
            row = [results[name][seed]["metrics"][split] for seed in seeds]
            other = [results[against][seed]["metrics"][split] for seed in seeds] if against else [{}] * len(row)
            cells = [[a[key] - b.get(key, 0.0) for a, b in zip(row, other) if key in a] for key in SHOWN]
            if seeds and (not against or against in results):
                lines.append(f"| {name} | {len(seeds)} | " +
                             " | ".join(number(c, bool(against)) if c else "–" for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {', '.join(unknown)}")
    if args.what == "run":
        (ROOT / "runs").mkdir(exist_ok=True)
        # Seed by seed, so that a table of few seeds is there early; the base has none.
        wanted = [(name, seed) for seed in args.seeds for name in args.names or EXPERIMENTS
                  if name != "base" or seed == args.seeds[0]]
        with ThreadPoolExecutor(args.jobs) as pool:
            for line in pool.map(lambda job: make(*job), wanted):
                print(line, flush=True)
    results: dict[str, dict[int, dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["experiment"], {})[result["seed"]] = result
    for split in SPLITS:
        print(tables(results, split))


if __name__ == "__main__":
    main()
