"""Trains, evaluates and tabulates what the paper claims, on the built-in world: several seeds of every method.

    python experiments/reproduce.py run                      all of EXPERIMENTS; goes on where it was stopped
    python experiments/reproduce.py run visurf rlvr --seeds 42 43 --rates 0.001
    python experiments/reproduce.py tables                   tables and figures, from experiments/results/ alone

A result is one small file, experiments/results/NAME-RATE-SEED.json: commit, machine, flags, seconds, metrics of every
split, the course of the training. A file that exists is not made again. Seeds are paired: the same base, the same order
of the data. The first seed tries the learning rates; the rate with the best score on scenes:val is the method's, and
the other seeds are trained at it. `tables` writes the tables into the PAGES, between the lines
`<!-- table: NAME -->` and `<!-- end -->`, and the figures into experiments/figures/.
"""
import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import scenes  # noqa: E402
from support.runs import read_config, read_log, today, versions  # noqa: E402

RESULTS = ROOT / "experiments/results"
PAGES = ("README.md", "experiments/README.md", "experiments/appendix.md", "experiments/final.md",
         "experiments/photos.md", "docs/sensitivity.md")
SEEDS = (42, 43, 44, 45, 46)
RATES = (5e-4, 1e-3, 2e-3)                      # learning rates that every method may choose from
SPLITS = ("test", "reasoning-test", "elsewhere-test", "pair-test")
FAMILIES = ("reasoning", "gui", "anomaly", "lesion", "sums")      # of the paper's data, in small (support/scenes.py)
# Name → the stages of its training, flags of train.py each; a later stage begins from the weights of the one before.
THOUGHT = ["--label-thought", "rollout"]
LENGTHS = (25, 50, 100, 200, 300)               # steps of SFT, of 400, before RLVR
SFT = ["--method", "sft"]
TUNED_SFT = [*SFT, "--lr", "0.002"]             # as a first stage at its own learning rate; RATES are the second's
TWO_STAGE, SAME_RATE = ({f"sft{n}-rlvr{ending}": [[*first, "--steps", str(n)],
                                                  ["--method", "rlvr", "--steps", str(400 - n)]] for n in LENGTHS}
                        for first, ending in ((TUNED_SFT, ""), (SFT, "-same-lr")))
IN_FULL = "sft400-rlvr400"                      # a whole training of each
RIVALS = ("luffy", "hpt", "chord", "sgrpo", "sum")
CONTROLS = {
    "visurf-no-align": [["--label-style", "compact"]],
    "visurf-no-rule": [["--reward-label-thinking"]],
    "visurf-no-smoothing": [["--no-smoothing"]],
    "visurf-no-controls": [["--label-style", "compact", "--reward-label-thinking", "--no-smoothing"]],
}
# Answers that look at nothing, for scale.
POLICIES = {"always-empty": "<answer>[]</answer>",
            "always-whole-picture": '<answer>[{"bbox_2d": [0, 0, 111, 111], "point_2d": [56, 56]}]</answer>'}
LOOKS = ("base", *POLICIES)
# The base at earlier points of its own training, from this repository's history: name → a commit with those weights.
EARLIER = {"stage3": "cd070c3", "stage5": "8347d72"}       # the stages of experiments/make_tiny.sh
ABSENT = ("absent1", "absent5", "absent20")
STRENGTHS = (*EARLIER, *ABSENT)
BASES = (*EARLIER, "base", *ABSENT)             # of the boundary, by strength; "base" is assets/tiny
BOUNDARY_METHODS = ("base", "rlvr", "visurf", "visurf-thought")
UNTRAINED = (*LOOKS, "final-base", *(f"{base}-base" for base in (*FAMILIES, *STRENGTHS)))
# The families are trained for 150 steps. Where assets/tiny knows nothing of one, its base has learnt all but a piece.
FAMILY_STEPS, FAMILY_SFT = 150, 50
FAMILY_METHODS = {"base": [], "sft": [["--method", "sft"]], "rlvr": [["--method", "rlvr"]],
                  "sft-rlvr": [["--method", "sft", "--steps", str(FAMILY_SFT)],
                               ["--method", "rlvr", "--steps", str(FAMILY_STEPS - FAMILY_SFT)]],
                  "visurf": [[]], "visurf-thought": [THOUGHT],
                  "visurf-g2": [["--rollouts", "2"]]}       # y is a third of its group, not a ninth
# Bases that are made here: name → split of scenes and steps of SFT. Of those of the main job N % of the grounding
# questions asked for something absent.
PRETRAINED = {"gui": ("gui-pretrain", 120), "anomaly": ("anomaly-pretrain", 60), "sums": ("sums-pretrain", 200),
              **{base: (base, 60) for base in ABSENT}}
PRETRAINING = ["--method", "sft", "--optimizer", "muon", "--adam-eps", "1e-8", "--lr", "2e-3", "--weight-decay", "0",
               "--warmup-steps", "10", "--cooldown", "0.5", "--prompts-per-step", "64", "--normaliser", "seq-mean"]
# What a user may set otherwise.
SENSITIVITY = {
    **{f"visurf-g{n}": [["--rollouts", str(n)]] for n in (2, 4, 16)},
    **{f"visurf-std-{std}": [["--std", std]] for std in ("population", "none")},
    **{f"visurf-{normaliser}": [["--normaliser", normaliser]] for normaliser in ("seq-mean", "seq-sum")},
    **{f"visurf-train{n}": [["--data", f"scenes:train{n}"]] for n in (10, 90)},
    "visurf-epochs4": [["--inner-epochs", "4"]], "visurf-epochs4-unclipped": [["--inner-epochs", "4", "--clip", "1e9"]],
}
EXPERIMENTS = {
    **{name: [] for name in UNTRAINED},
    "visurf": [[]],
    "rlvr": [["--method", "rlvr"]],
    "sft": [["--method", "sft"]],
    "sft-long": [["--method", "sft", "--steps", "1200"]],       # a step of SFT takes about a third of one that samples
    **TWO_STAGE,
    IN_FULL: [TUNED_SFT, ["--method", "rlvr"]],
    **SAME_RATE,
    "visurf-thought": [THOUGHT],
    **{name: [["--method", name]] for name in RIVALS},
    **CONTROLS,
    "sft-thought": [["--method", "sft", *THOUGHT]],
    "sft-thought-of-one": [["--method", "sft", *THOUGHT, "--rollouts", "1"]],
    "sft50-rlvr-thought": [[*TUNED_SFT, "--steps", "50", *THOUGHT], ["--method", "rlvr", "--steps", "350"]],
    f"{IN_FULL}-thought": [[*TUNED_SFT, *THOUGHT], ["--method", "rlvr"]],
    **{f"{family}-{method}": [["--data", f"scenes:{family}-train", "--eval-data", f"scenes:{family}-val", "--steps",
                               str(FAMILY_STEPS), "--eval-every", "50", *stage] for stage in stages]
       for family in FAMILIES for method, stages in FAMILY_METHODS.items()},
    **{f"{base}-{method}": FAMILY_METHODS[method] for base in STRENGTHS for method in BOUNDARY_METHODS},
    **SENSITIVITY,
}
# The README's rows on one commit, on splits that nothing was chosen by: name → learning rates, and stages. Of three
# rates one is chosen on scenes:val as above; the others were chosen there before. OWN stands for a file of the 6,400
# scenes that ViSurf sees with the same seed.
OWN = "OWN"
FINAL = {
    "final-base": ((), []),
    "final-rlvr": ((5e-4,), [["--method", "rlvr"]]),
    "final-sft": ((2e-3,), [SFT]),
    "final-sft-long": ((1e-3, 2e-3, 4e-3), [[*SFT, "--steps", "1200", "--data", OWN, "--task", "scene_grounding"]]),
    "final-sft400-rlvr400": ((5e-4,), [TUNED_SFT, ["--method", "rlvr"]]),
    "final-sgrpo": ((1e-3,), [["--method", "sgrpo"]]),
    "final-visurf": ((1e-3,), [[]]),
    "final-visurf-thought": ((1e-3,), [THOUGHT]),
}
EXPERIMENTS |= {name: stages for name, (_, stages) in FINAL.items()}
COURSE = ("advantage_y", "smoothed", "tied", "rlvr_weight", "sft_weight", "entropy", "length",
          "logp_y", "r(o)", "o/thinks", "unreadable")
DRAWN = {"advantage_y": "Â_y", "smoothed": "share smoothed", "sft_weight": "SFT term of Eq. 9",
         "rlvr_weight": "RLVR term of Eq. 9", "entropy": "entropy, nats",
         "length": "tokens of a rollout", "o/thinks": "rollouts that think"}
COMPARED = ("rlvr", "sft", "sft-long", IN_FULL)       # with ViSurf, by holm_table
one_base_at_a_time = threading.Lock()
Results = dict[str, dict[float, dict[int, dict]]]          # name → learning rate → seed → result


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation: one result

def call(script: str, *flags: str) -> None:
    """Runs a script of ours on one core; what it prints goes to runs/reproduce.log."""
    with open(ROOT / "runs/reproduce.log", "a") as log:
        subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT, stdout=log, stderr=log, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(name: str, flags: list[str]) -> Path:
    """A stage, gone on with where it was stopped. Returns its run. SystemExit: it has been stopped now."""
    run = ROOT / "runs" / name
    if not (run / "config.json").exists():
        call("train.py", "--name", name, "--keep", "0", *flags)
    elif not last_checkpoint(run).is_dir():
        call("train.py", "--resume", str(run))
    if not last_checkpoint(run).is_dir():          # train.py saves and ends without an error when it is stopped
        raise SystemExit(f"{run} was stopped before its last step; the same command goes on with it")
    return run


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step_{read_config(run)['config']['steps']}"


def steps_of(run: Path) -> list[dict]:
    return [renamed(line) for line in read_log(run)[0] if "eval" not in line]


def renamed(values: dict) -> dict:
    """Returns the values under today's names."""
    return {today(name): value for name, value in values.items()}


def answer(model: str, split: str, out: str) -> dict[str, float]:
    """The metrics of a model's greedy answers to scenes:SPLIT."""
    folder = ROOT / "runs" / out / split
    call("eval.py", "--model", model, "--data", f"scenes:{split}", "--out", str(folder))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    metrics = renamed(json.loads((folder / "metrics.json").read_text())["metrics"])
    metrics["thought tells"] = tells(records)
    return rounded(metrics | (by_size(records, split) if "sums" in split else {}) |
                   (by_colour(records, split) if split in SPLITS else {}) |
                   ({"thought as learnt": as_learnt(records)} if split == "test" else {}))


def thought_of(record: dict) -> str:
    """What an answer says up to the end of its thought, with the first tag; "" of an answer without one."""
    thought, end, _ = record["response"].partition("</think>")
    return thought if end else ""


def tells(records: list[dict]) -> float | None:
    """How often the wording of the thought alone, without numbers and the words of the question, tells an absent thing
    from a present one by the best guess. 0.5 is chance, where as many are absent as present; None without both."""
    seen: dict[str, list[int]] = {}
    for record in records:
        if "grounding" in record["task"]:
            wording = thought_of(record)
            for word in record["question"].split():
                wording = wording.replace(word, "…")
            seen.setdefault(re.sub(r"\d+", "…", wording), [0, 0])[not record["truth"]] += 1
    present, absent = (sum(count[kind] for count in seen.values()) for kind in (0, 1))
    return sum(map(max, seen.values())) / (present + absent) if present and absent else None


def as_learnt(records: list[dict]) -> float | None:
    """Of the thoughts, the share that is one of the sentences that the base learnt, about the thing asked for."""
    kept = [thought_of(record) in ["<think>" + sentence.format(record["question"]) for sentence in scenes.THOUGHTS]
            for record in records if "grounding" in record["task"] and thought_of(record)]
    return statistics.fmean(kept) if kept else None


def by_size(records: list[dict], split: str) -> dict[str, float]:
    """Right answers among the sums that the base has met and among those that it has not."""
    right: dict[str, list[bool]] = {"up to nine": [], "above nine": []}
    for record in records:
        small = int(scenes.make(split, record["index"])["answer"]) <= 9
        right["up to nine" if small else "above nine"].append(record["score"] == 1)
    return {size: statistics.fmean(of_size) for size, of_size in right.items() if of_size}


def colour_is_there(split: str, index: int, question: str, world: ModuleType = scenes) -> bool:
    """Whether a thing of the colour that is asked for is in the picture."""
    return any(thing.colour in question.split() for thing in world.make_with_things(split, index)[1])


def by_colour(records: list[dict], split: str, world: ModuleType = scenes) -> dict[str, float]:
    """N-acc where a thing of the colour that is asked for is in the picture, in another shape, and where none is."""
    rejected: dict[str, list[bool]] = {"N-acc, colour there": [], "N-acc, colour not there": []}
    for record in records:
        if "grounding" in record["task"] and not record["truth"]:
            there = colour_is_there(split, record["index"], record["question"], world)
            rejected["N-acc, colour there" if there else "N-acc, colour not there"].append(
                record["error"] is None and not record["predicted"])
    return {place: statistics.fmean(of_place) for place, of_place in rejected.items() if of_place}


def answer_blindly(response: str, split: str) -> dict[str, float]:
    """The metrics of a policy that gives every question the same response."""
    from data import Processor, load
    from eval import judge, summarise
    processor, source = Processor(ROOT / "assets/tiny"), load(f"scenes:{split}")
    return rounded(renamed(summarise([judge(processor.prompt(source[i]), response, 0)
                                      for i in range(len(source))])))


def rounded(values: dict) -> dict:
    return {name: round(value, 4) for name, value in values.items() if value is not None}


def score(metrics: dict[str, float]) -> float:
    """What a learning rate and a checkpoint are chosen by, on a val split: the mean of the shares of absent and of
    present things that are answered right, as far as the split has them; of sums the share of right ones."""
    shares = [metrics[name] for name in ("N-acc", "boxes") if metrics.get(name) is not None]
    return statistics.fmean(shares or [metrics["answers"]])


def family_of(name: str) -> str:
    """The family that an experiment is about; "" of the main job."""
    return name.split("-")[0] if name.split("-")[0] in FAMILIES else ""


def base_of(name: str) -> str:
    """The model that an experiment begins from; made if need be."""
    base = name.split("-")[0]
    if base in EARLIER:
        return str(from_history(f"reproduce-{base}", EARLIER[base], "assets/tiny/model.safetensors"))
    if base not in PRETRAINED:
        return str(ROOT / "assets/tiny")
    split, steps = PRETRAINED[base]
    with one_base_at_a_time:
        run = train(f"reproduce-{base}-pretrained", ["--data", f"scenes:{split}", "--eval-data", "", "--steps",
                                                     str(steps), *PRETRAINING])
    return str(last_checkpoint(run))


def from_history(name: str, commit: str, file: str) -> Path:
    """The folder runs/NAME: assets/tiny with the weights that a file had at an earlier commit."""
    folder = ROOT / "runs" / name
    with one_base_at_a_time:
        if not folder.exists():
            weights = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True)
            if weights.returncode:
                raise SystemExit(f"{name}: the weights of commit {commit} are not in this clone. A shallow clone gets "
                                 "them by git fetch --unshallow.")
            partial = folder.with_suffix(".partial")
            shutil.copytree(ROOT / "assets/tiny", partial, dirs_exist_ok=True)
            (partial / "model.safetensors").write_bytes(weights.stdout)
            partial.rename(folder)
    return folder


def own_scenes(seed: int, number: int = 6400) -> Path:
    """The file of the scenes that the default job sees with this seed, made if need be."""
    from datasets import Dataset

    from data import load
    from support.sources import take
    path = ROOT / f"runs/reproduce-own-{seed}.parquet"
    with one_base_at_a_time:
        if not path.exists():
            examples = take(load("scenes:train"), range(number), seed)
            rows = [{"id": e.id, "image": e.images[0], "question": e.question, "answer": e.answer} for e in examples]
            partial = path.with_suffix(".partial")
            Dataset.from_list(rows).to_parquet(partial)
            partial.rename(path)
    return path


def machine() -> str:
    import torch
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"


def make(name: str, rate: float, seed: int) -> str:
    """One file of results. Returns a line about it."""
    path = RESULTS / f"{name}-{rate:g}-{seed}.json"
    if path.exists():
        return f"{path.name}: there already"
    result = {"experiment": name, "rate": rate, "seed": seed, "commit": versions()["commit"],
              "machine": machine(), "stages": EXPERIMENTS[name]}
    model, lines, own, seconds = base_of(name), [], f"reproduce-{name}-{rate:g}-{seed}", 0.0
    for number, stage in enumerate(EXPERIMENTS[name], 1):
        stage = [str(own_scenes(seed)) if flag == OWN else flag for flag in stage]
        run = train(f"{own}-{number}", ["--seed", str(seed), "--model", model, "--lr", str(rate), *stage])
        result["commit"] = read_config(run)["versions"]["commit"]
        stage_lines = steps_of(run)
        # By the median step: a stop in between, or a busy hour, says nothing of the method.
        seconds += len(stage_lines) * statistics.median(line["seconds"] for line in stage_lines)
        model, lines = str(last_checkpoint(run)), lines + stage_lines
    family = family_of(name)
    own_splits = {"test": f"{family}-test", "val": f"{family}-val"} if family else {s: s for s in (*SPLITS, "val")}
    if name in FINAL:
        own_splits = {"test": "final", "reasoning-test": "reasoning-final", "val": "val"}
    if seed != SEEDS[0]:
        del own_splits["val"]
    if name in POLICIES:
        result["metrics"] = {key: answer_blindly(POLICIES[name], split) for key, split in own_splits.items()}
    else:
        result["metrics"] = {key: answer(model, split, f"{own}-answers") for key, split in own_splits.items()}
    if lines:
        result |= {"seconds": round(seconds), "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
                   "course": course(lines)}
    if lines and name not in FINAL:
        evaluated = {line["step"]: renamed(line["eval"]) for line in read_log(run)[0]
                     if "eval" in line and (run / "checkpoints" / f"step_{line['step']}").is_dir()}
        step = max(evaluated, key=lambda s: score(evaluated[s]))     # of those kept, the first of the best
        last = step == stage_lines[-1]["step"]
        result["best"] = {"step": step, "test": result["metrics"]["test"] if last else answer(
            str(run / "checkpoints" / f"step_{step}"), own_splits["test"], f"{own}-best")}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return f"{path.name}: " + ", ".join(f"{key} {value:g}" for key, value in result["metrics"]["test"].items())


def course(lines: list[dict], width: int = 20) -> dict[str, list]:
    """Means over 20 steps each, of what COURSE names; None where no step has it."""
    def means(name: str) -> list:
        parts = [[line[name] for line in lines[i:i + width] if name in line] for i in range(0, len(lines), width)]
        return [round(statistics.fmean(part), 4) if part else None for part in parts]
    return {name: means(name) for name in COURSE}


# ---------------------------------------------------------------------------------------------------------------------
# Tables

Column = Callable[[dict], float | None]


def at(split: str, key: str) -> Column:
    return lambda result: result["metrics"][split].get(key)


def at_end(name: str) -> Column:
    """The last 20 steps of the training."""
    return lambda result: result["course"].get(name, [None])[-1]


def at_start(name: str) -> Column:
    """The first 20 steps."""
    return lambda result: result["course"][name][0]


def highest(name: str) -> Column:
    """Of the means over 20 steps each."""
    return lambda result: max(value for value in result["course"][name] if value is not None)


MAIN = {**{name: at("test", name) for name in (
            "N-acc", "T-acc", "boxes", "thinks, present", "thinks, absent",
            "trailing text, absent", "answers")},
        "reasoning": at("reasoning-test", "boxes")}
FIRST = {name: MAIN[name] for name in ("N-acc", "boxes", "thinks, present", "answers", "reasoning")}


def found(split: str) -> Column:
    """Boxes, of the answers about present things that have one."""
    boxes, given = at(split, "boxes"), at(split, "T-acc")
    return lambda result: boxes(result) / (given(result) or math.inf)


# What is lost, in its parts: no box, as `[]` or because nothing can be read; a box beside the thing.
PARTS = {"T-acc": MAIN["T-acc"], "boxes": MAIN["boxes"], "boxes, of those given": found("test"),
         "reasoning: T-acc": at("reasoning-test", "T-acc"), "unreadable": at("reasoning-test", "unreadable"),
         "thinks": at("reasoning-test", "thinks, present"), "reasoning": MAIN["reasoning"],
         "reasoning, of those given": found("reasoning-test")}
ELSEWHERE = {f"{place}: {name}": at(split, name) for place, split in (
    ("here", "test"), ("pair", "pair-test"), ("elsewhere", "elsewhere-test"))
    for name in ("N-acc", "T-acc", "boxes")}
PRESENT_IN = {"test": 512, "pair-test": 256, "elsewhere-test": 256}       # present things of a split


def pooled(result: dict) -> float:
    """Boxes, over the present things of all three splits."""
    return sum(number * result["metrics"][split]["boxes"] for split, number in PRESENT_IN.items()
               ) / sum(PRESENT_IN.values())


POOLED = {**{label: column for label, column in ELSEWHERE.items() if "boxes" in label}, "boxes, pooled": pooled}
REJECTS = {f"{place}: {label}": at(split, key)
           for place, split in (("here", "test"), ("elsewhere", "elsewhere-test"))
           for label, key in (("N-acc", "N-acc"), ("colour there", "N-acc, colour there"),
                              ("not there", "N-acc, colour not there"))}
# MAIN, with the two parts of N-acc behind it.
REJECTING = {"N-acc": MAIN["N-acc"], "colour there": REJECTS["here: colour there"],
             "not there": REJECTS["here: not there"], **MAIN}
FOUR = ("N-acc", "T-acc", "boxes", "thinks, present")
SETTINGS = {name: MAIN[name] for name in (*FOUR, "reasoning")}
AT_END = {**{name: MAIN[name] for name in FOUR},
          **{name: at_end(name) for name in ("entropy", "entropy_y", "smoothed", "tied", "r(o)", "length")}}
THOUGHTS = {**MAIN, "thought tells": at("test", "thought tells"),
            "as learnt": at("test", "thought as learnt")}
CONTROLLED = {**SETTINGS, "logp_y, first": at_start("logp_y"),
              "advantage_y, last": at_end("advantage_y"), "smoothed": at_end("smoothed"),
              "entropy, highest": highest("entropy"), "last": at_end("entropy"),
              "unreadable, highest": highest("unreadable"), "r(o), last": at_end("r(o)")}
BEST = {"step": lambda r: r["best"]["step"],
        **{name: lambda r, name=name: r["best"]["test"].get(name) for name in FOUR}}


def in_family(family: str, key: str = "") -> Column:
    """Of a row of families: the score on the test split, or one metric of it."""
    def value(results: dict) -> float | None:
        if family not in results:
            return None
        metrics = results[family]["metrics"]["test"]
        return metrics.get(key) if key else score(metrics)
    return value


def in_all_families(results: dict) -> float | None:
    values = [in_family(family)(results) for family in FAMILIES]
    return None if None in values else statistics.fmean(values)


FAMILY = {**{family: in_family(family) for family in FAMILIES}, "mean of all": in_all_families,
          **{f"anomaly: {name}": in_family("anomaly", name) for name in ("N-acc", "boxes")},
          "sums up to nine": in_family("sums", "up to nine"),
          "above": in_family("sums", "above nine")}
THINKS = {**{family: in_family(family, "thinks, present") for family in FAMILIES[:-1]},
          "anomaly: none": in_family("anomaly", "thinks, absent"),
          "none: trailing text": in_family("anomaly", "trailing text, absent")}


def read_results() -> Results:
    results: Results = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        result["metrics"] = {split: renamed(of) for split, of in result["metrics"].items()}
        if "best" in result:
            result["best"]["test"] = renamed(result["best"]["test"])
        if "course" in result:
            result["course"] = renamed(result["course"])
            if result["stages"][-1][:2] == ["--method", "sft"] and "entropy" in result["course"]:
                result["course"]["entropy_y"] = result["course"].pop("entropy")     # over label tokens
        rates = results.setdefault(result["experiment"], {})
        rates.setdefault(result["rate"], {})[result["seed"]] = result
    return results


def chosen_rate(rates: dict[float, dict[int, dict]]) -> float:
    """Of the rates tried with the first seed the best on scenes:val; of equal ones the smallest."""
    tried = {rate: score(seeds[SEEDS[0]]["metrics"]["val"]) for rate, seeds in rates.items()
             if SEEDS[0] in seeds}
    return max(sorted(tried), key=tried.get) if tried else min(rates)


def shown_rate(rates: dict[float, dict[int, dict]]) -> float:
    """The chosen one, as soon as it has as many seeds as any other."""
    chosen = chosen_rate(rates)
    return max(rates, key=lambda rate: (len(rates[rate]), rate == chosen))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; nan of fewer than three values, of which
    it says nothing."""
    from scipy.stats import t
    n, mean = len(values), statistics.fmean(values)
    if n < 3:
        return mean, math.nan
    return mean, t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)


def table(rows: dict[str, dict[int, dict]], columns: dict[str, Column], against: str | None = None,
          origin: bool = True) -> str:
    """Mean ± 95 % interval over the seeds; with `against` of the differences to it, on the seeds
    that both have. origin: show the learning rate and the number of seeds of a row."""
    lines = ["| | " + "lr | seeds | " * origin + " | ".join(columns) + " |",
             "|---" * (1 + 2 * origin + len(columns)) + "|"]
    for name, seeds in rows.items():
        others = rows.get(against, {})
        if against in UNTRAINED and others:
            others = {seed: begun_from(others, seed) for seed in seeds}
        if name in UNTRAINED:                      # compared with every seed of the other
            pairs = [(begun_from(seeds, seed), other) for seed, other in others.items()]
            pairs = pairs or [(own, None) for own in seeds.values()]
        else:
            pairs = [(seeds[seed], others.get(seed)) for seed in seeds
                     if not against or seed in others]
        if name == against or not pairs or against and not others:
            continue
        # A row of all families has no one rate.
        rated = name not in UNTRAINED and "rate" in pairs[0][0]
        count = len(seeds if name in UNTRAINED else pairs)
        cells = [name, *((f"{pairs[0][0]['rate']:g}" if rated else "–", f"{count}") * origin)]
        for column in columns.values():
            values = [(column(own), column(other) if other else None) for own, other in pairs]
            if against:
                cells.append(difference([(a, b) for a, b in values if None not in (a, b)]))
            else:
                cells.append(shown([a for a, _ in values if a is not None]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def begun_from(bases: dict[int, dict], seed: int) -> dict:
    """The result of the base that the training of a seed began from. A base that was made anew, on
    another machine, is evaluated under the first seed that begins from it: `run gui-base --seeds
    45`."""
    return bases[max((first for first in bases if first <= seed), default=min(bases))]


def shown(values: list[float], sign: str = "", parted: bool | None = None) -> str:
    """The text of a cell: mean ± interval or, of seeds that fall into two groups, both groups.
    parted: whether they do; asked here by default."""
    if not values:
        return "–"
    mean, half = interval(values)
    digits = 0 if abs(mean) >= 100 else 3
    if in_two_groups(values) if parted is None else parted:
        few, others = sorted(two_groups(values), key=len)
        spans = [" to ".join(dict.fromkeys(f"{end:{sign}.{digits}f}"
                                           for end in (group[0], group[-1])))
                 for group in (few, others)]
        return f"{spans[0]} in {len(few)} of {len(values)}, else {spans[1]}"
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def bar(values: list[float]) -> tuple[float, float] | None:
    """Mean and half of the interval, for a figure; None where the seeds stand for themselves."""
    return None if in_two_groups(values) else interval(values)


def difference(pairs: list[tuple[float, float]]) -> str:
    """The text of a cell of differences: in two groups where one of the two sides is."""
    parted = any(in_two_groups(list(side)) for side in zip(*pairs))
    return shown([a - b for a, b in pairs], "+", parted)


def two_groups(values: list[float]) -> tuple[list[float], list[float]]:
    """The values in order, parted at their widest gap.

    >>> two_groups([0.9, 0.0, 1.0])
    ([0.0], [0.9, 1.0])
    """
    ordered = sorted(values)
    cut = max(range(1, len(ordered)), key=lambda i: ordered[i] - ordered[i - 1])
    return ordered[:cut], ordered[cut:]


def in_two_groups(shares: list[float]) -> bool:
    """Whether three or more shares leave a gap of more than 0.15 that is also more than half of
    their range. Their mean would lie in the gap, where no seed is."""
    if len(shares) < 3 or not all(0 <= share <= 1 for share in shares):
        return False
    low, high = two_groups(shares)
    return high[0] - low[-1] > max(0.15, (high[-1] - low[0]) / 2)


def holm_table(rows: dict[str, dict[int, dict]]) -> str:
    """ViSurf minus each method of COMPARED, paired by seed: p of a t test, smallest first, and what
    p may be at most by Holm's method, which keeps the chance of any false one at 5 %."""
    from scipy.stats import ttest_1samp
    found = []
    for name in COMPARED:
        seeds = [seed for seed in rows.get("visurf", {}) if seed in rows.get(name, {})]
        for label in ("N-acc", "boxes", "reasoning"):
            values = [MAIN[label](rows["visurf"][s]) - MAIN[label](rows[name][s]) for s in seeds]
            if len(values) > 2:
                found.append((ttest_1samp(values, 0).pvalue, f"{label}, against {name}", values))
    lines, survives = ["| | ViSurf's gain | p | p at most | survives |", "|---" * 5 + "|"], True
    for place, (p, name, values) in enumerate(sorted(found)):
        most = 0.05 / (len(found) - place)
        survives = survives and bool(p <= most)          # after the first that fails none does
        lines.append(f"| {name} | {shown(values, '+', False)} | {p:.5f} | {most:.5f} | "
                     f"{'yes' if survives else 'no'} |")
    return "\n".join(lines)


def read_cost() -> dict[str, dict]:
    """What experiments/cost.py measured: "seconds": name → its stages: steps, and seconds of a step
    at its start and its end; "memory": name → GB. Unless sft-long was measured, it is 1,200 steps
    of sft."""
    path = ROOT / "experiments/cost.json"
    cost = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "memory": {}}
    if "sft" in cost["seconds"]:
        long = [stage | {"steps": 1200} for stage in cost["seconds"]["sft"]]
        cost["seconds"].setdefault("sft-long", long)          # where it was not measured
    return cost


def read_probe() -> dict[str, dict[str, dict[str, float]]]:
    """What experiments/probe.py measured: base → "accuracy" → a kind of absent things, or
    "rejecting" → present or absent."""
    path = ROOT / "experiments/probe.json"
    return json.loads(path.read_text()) if path.exists() else {}


def times(measured: dict[str, list[dict]]) -> dict[str, float]:
    """Seconds of a whole training: the steps of each stage times the mean of a step at its start
    and at its end."""
    return {name: sum(stage["steps"] * (stage["start"] + stage["end"]) / 2 for stage in stages)
            for name, stages in measured.items()}


def cost_table(measured: dict[str, dict]) -> str:
    whole = times(measured["seconds"])
    lines = ["| | a step at the start, s | at the end, s | whole training, s | against RLVR | "
             "peak memory, GB |", "|---" * 6 + "|"]
    for name, stages in measured["seconds"].items():
        memory = f"{measured['memory'][name]:.3f}" if name in measured["memory"] else "–"
        lines.append(f"| {name} | {stages[0]['start']:.2f} | {stages[-1]['end']:.2f} | "
                     f"{whole[name]:.0f} | {whole[name] / whole['rlvr']:.2f} | {memory} |")
    return "\n".join(lines)


def base_table(rows: dict[str, dict[int, dict]],
               probed: dict[str, dict[str, dict[str, float]]]) -> str:
    """Of each base of the boundary: what ViSurf gains over RLVR on the seeds that both have, what
    experiments/probe.py measured of the base, and what ViSurf rejects that began from it, on all
    its seeds."""
    lines = ["| | seeds of both | gain over RLVR: N-acc | boxes | reasoning "
             "| its rollouts reject: present | absent | the probe: colour there | not there "
             "| ViSurf rejects: colour there | not there |", "|---" * 11 + "|"]
    for base in BASES:
        rlvr, visurf = (rows.get(f"{base}-{method}".removeprefix("base-"), {})
                        for method in ("rlvr", "visurf"))
        pairs = [(visurf[seed], rlvr[seed]) for seed in visurf if seed in rlvr]
        gains = [[(MAIN[name](own), MAIN[name](other)) for own, other in pairs]
                 for name in ("N-acc", "boxes", "reasoning")]
        rejected = [[REJECTING[place](own) for own in visurf.values()]
                    for place in ("colour there", "not there")]
        measured = [f"{value:.3f}" for what in ("rejecting", "accuracy")
                    for value in probed[base][what].values()] if base in probed else ["–"] * 4
        cells = [*map(difference, gains), *measured, *map(shown, rejected)]
        if pairs:
            lines.append(f"| {base} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grid(results: Results) -> str:
    """score on scenes:val of the first seed, for every learning rate that was tried."""
    trained = {name: results[name] for name in EXPERIMENTS
               if name in results and name not in UNTRAINED and len(FINAL.get(name, (RATES,))[0]) > 1}
    rates = sorted({rate for of_name in trained.values() for rate in of_name})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
             "|---" * (1 + len(rates)) + "|"]
    for name, of_name in trained.items():
        tried = [of_name.get(rate, {}).get(SEEDS[0]) for rate in rates]
        cells = (f"{score(r['metrics']['val']):.3f}" if r else "–" for r in tried)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(results: Results) -> dict[str, dict[str, dict[int, dict]]]:
    """The rows of each table: name → seed → result, at each method's own learning rate; of two
    stages the best."""
    rows = {name: results[name][shown_rate(results[name])]
            for name in EXPERIMENTS if name in results}

    def of(*names: str) -> dict[str, dict[int, dict]]:
        return {name: rows[name] for name in names if name in rows}
    stages = {name: score(rows[name][SEEDS[0]]["metrics"]["val"]) for name in TWO_STAGE
              if SEEDS[0] in rows.get(name, ())}
    two_stage = [max(stages, key=stages.get)] if stages else []
    main = of(*LOOKS, "sft", "sft-long", "rlvr", *two_stage, IN_FULL, "visurf", "visurf-thought",
              *RIVALS)
    other_rates = {f"visurf-lr-{rate:g}": seeds
                   for rate, seeds in results.get("visurf", {}).items()
                   if seeds is not rows["visurf"]}
    equal = results.get("rlvr", {}).get(shown_rate(results["visurf"])) if "visurf" in rows else None
    same_rate = {"rlvr-same-lr": equal} if equal else {}        # RLVR at the rate of ViSurf
    families: dict[str, dict[int, dict]] = {}              # method → seed → family → result
    for family in FAMILIES:
        for method in FAMILY_METHODS:
            for seed, result in rows.get(f"{family}-{method}", {}).items():
                families.setdefault(method, {}).setdefault(seed, {})[family] = result
    final = {name.removeprefix("final-"): seeds for name, seeds in of(*FINAL).items()}
    return {"first": {name: final[name] for name in ("base", *COMPARED, "visurf") if name in final},
            "final": final, "main": main,
            "trained": {name: seeds for name, seeds in main.items() if name not in UNTRAINED},
            "boundary": of(*(f"{base}-{method}".removeprefix("base-") for base in BASES
                             for method in BOUNDARY_METHODS)),
            "sensitivity": of("visurf") | other_rates | of(*SENSITIVITY),
            "families": {method: families[method] for method in FAMILY_METHODS
                         if method in families},
            "parts": {name: final[name] for name in ("base", "visurf", *COMPARED, "visurf-thought") if name in final},
            "pooled": of("base", "rlvr") | same_rate | of("sft", "sft-long", IN_FULL, "sgrpo", "visurf"),
            "lengths": of("rlvr", *TWO_STAGE, "sft", IN_FULL, *SAME_RATE, "visurf"),
            "controls": of("visurf", *CONTROLS),
            "thought": of("base", "rlvr", "visurf", "visurf-thought", "sft", "sft-thought",
                          "sft-thought-of-one", "sft50-rlvr", "sft50-rlvr-thought", IN_FULL,
                          f"{IN_FULL}-thought"),
            "injection": of("base", "rlvr", "sgrpo", "visurf", "visurf-no-smoothing",
                            "visurf-no-controls", "sft"),
            # Six lines at most can be told apart.
            "course": of("visurf", "visurf-thought", "rlvr", "sft", IN_FULL, "hpt")}


def tables(results: Results) -> dict[str, str]:
    """Name of a table → its Markdown."""
    of = parts(results)
    return {
        "first": table(of["first"], FIRST, origin=False), "main": table(of["main"], MAIN),
        "final": table(of["final"], MAIN), "final-paired": table(of["final"], MAIN, against="visurf"),
        "holm": holm_table(of["final"]),
        "grid": grid(results), "paired": table(of["main"], MAIN, against="visurf"),
        "lengths": table(of["lengths"], MAIN),
        "parts": table(of["parts"], PARTS),
        "parts-paired": table(of["parts"], PARTS, against="rlvr"),
        "thought": table(of["thought"], THOUGHTS), "rejects": table(of["trained"], REJECTS),
        "controls": table(of["controls"], CONTROLLED),
        "controls-paired": table(of["controls"], MAIN, against="visurf"),
        "course": table(of["trained"], AT_END), "elsewhere": table(of["main"], ELSEWHERE),
        "pooled": table(of["pooled"], POOLED), "pooled-paired": table(of["pooled"], POOLED, against="visurf"),
        "injection": table(of["injection"], ELSEWHERE, against="rlvr"),
        "best": table(of["trained"], BEST), "cost": cost_table(read_cost()),
        "families": table(of["families"], FAMILY),
        "families-gain": table(of["families"], FAMILY, against="base"),
        "families-paired": table(of["families"], FAMILY, against="visurf"),
        "families-thinks": table(of["families"], THINKS),
        "boundary": table(of["boundary"], REJECTING),
        "bases": base_table(of["boundary"], read_probe()),
        "settings": table(of["sensitivity"], SETTINGS, origin=False),
        "sensitivity": table(of["sensitivity"], REJECTING),
        "sensitivity-paired": table(of["sensitivity"], REJECTING, against="visurf")}


def all_tables() -> dict[str, str]:
    """The tables of all pages, those of experiments/photos.py among them."""
    from experiments import photos                  # which imports this file
    return tables(read_results()) | photos.tables(photos.read("run"))


def draw(results: Results, root: Path) -> None:
    """Every figure that there are results for, into the repository at root."""
    from experiments import figures
    of, folder = parts(results), root / "experiments/figures"
    for needed in (folder, root / "docs"):
        needed.mkdir(parents=True, exist_ok=True)
    figures.draw_weights(root / "docs/weights.png")
    if of["trained"]:
        looking = {name: seeds for name, seeds in of["main"].items() if name not in POLICIES}
        figures.draw_points(looking, MAIN, bar, folder / "methods.png")
        few = {label: column for label, column in ELSEWHERE.items() if "T-acc" not in label}
        figures.draw_points(of["injection"], few, bar, folder / "elsewhere.png")
        figures.draw_course(of["course"], DRAWN, folder / "course.png")
        if measured := times(read_cost()["seconds"]):
            figures.draw_cost({name: seconds / measured["rlvr"]
                               for name, seconds in measured.items()}, of["trained"], interval,
                              lambda result: score(result["metrics"]["test"]),
                              folder / "cost.png")
    if of["controls"]:
        figures.draw_course(of["controls"], DRAWN, folder / "controls.png")
    if of["families"]:
        scores = {name: FAMILY[name] for name in (*FAMILIES, "mean of all")}
        figures.draw_points(of["families"], scores, bar, folder / "families.png")
    if len(of["sensitivity"]) > 1:
        figures.draw_points(of["sensitivity"], MAIN, bar, folder / "sensitivity.png")
    if any(name.startswith(STRENGTHS) and name not in UNTRAINED for name in of["boundary"]):
        shown_there = {name: MAIN[name] for name in ("N-acc", "T-acc", "boxes")}
        figures.draw_boundary(of["boundary"], STRENGTHS, shown_there, folder / "boundary.png")
    lengths = {name: seeds for name, seeds in of["lengths"].items()
               if name not in (IN_FULL, *SAME_RATE)}
    if len(lengths) > 1:
        columns = {name: MAIN[name] for name in (
            "N-acc", "boxes", "thinks, present", "thinks, absent")}
        figures.draw_lengths(lengths, interval, columns, folder / "lengths.png")


def fill(text: str, made: dict[str, str]) -> str:
    """The text with every table renewed."""
    return re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{made[m[2]]}\n{m[3]}", text, flags=re.DOTALL)


def run(names: list[str], seeds: list[int], rates: list[float], jobs: int) -> None:
    """The first seed at every rate, then the others at the chosen one."""
    (ROOT / "runs").mkdir(exist_ok=True)

    def all_of(wanted: list[tuple]) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            for line in pool.map(lambda job: make(*job), wanted):
                print(line, flush=True)
    of = {name: [0.0] if name in UNTRAINED else FINAL[name][0] if name in FINAL else rates for name in names}
    all_of([(name, rate, seeds[0]) for name in names for rate in of[name]])
    results = read_results()

    def chosen(name: str) -> float:
        tried = of[name]
        return tried[0] if len(tried) == 1 else chosen_rate({rate: results[name][rate] for rate in tried})
    # Seed by seed, so that a table of few seeds is there early.
    all_of([(name, chosen(name), seed) for seed in seeds[1:] for name in names if name not in UNTRAINED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {', '.join(unknown)}")
    if args.what == "run":
        run(args.names or [*EXPERIMENTS], list(args.seeds), list(args.rates), args.jobs)
    from experiments import photos                  # which imports this file
    made = all_tables()
    for path in (ROOT / page for page in PAGES):
        path.write_text(fill(path.read_text(), made))
    draw(read_results(), ROOT)
    photos.draw(ROOT)
    for name, text in made.items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
