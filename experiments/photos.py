"""Runs the plan of experiments/photos.md, on scenes of photographs.

    python experiments/photos.py base 1 2 3 boxing      what the bases know before anything is trained
    python experiments/photos.py tune                   the trials of every arm, on base 1
    python experiments/photos.py run                    every arm on every base, with its chosen setting
    python experiments/photos.py asides                 the questions beside the hypotheses, and the bases untrained
    python experiments/photos.py again                  three runs, chosen at random, a second time
    python experiments/photos.py known                  what the runs of the first seed know of absent things

Each goes on where it was stopped. A result is one small file, experiments/photos/NAME.json; one that exists is not made
again. `python experiments/reproduce.py tables` renews the tables and the figure from them. The bases are those of
experiments/make_photos.sh, rounded to bfloat16; the history of this repository has them.
"""
import argparse
import itertools
import json
import random
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.figures import draw_points  # noqa: E402
from experiments.reproduce import (ROOT, Column, bar, by_colour, call, from_history, interval,  # noqa: E402
                                   last_checkpoint, machine, shown, steps_of, table, train)
from support import photos  # noqa: E402
from support.answers import trailing_text  # noqa: E402
from support.boxes import box_hit  # noqa: E402
from support.runs import read_config, versions  # noqa: E402

RESULTS = ROOT / "experiments/photos"
BASES, SEEDS, BUDGETS = ("1", "2", "3"), (42, 43, 44, 45), (640, 6400)
COMMITS = {"1": "5c2e2df", "2": "20f67f4", "3": "787ce0b", "boxing": "35ec988"}   # base → the commit of its weights
TUNING = (101, 102)                             # seeds that are thrown away
FAMILIES = ("", "new-", "colour-", "left-")     # prefixes of a judged part of photos
ROLLOUTS, LONGEST = 8, 128                      # of a base, for the strata; tokens of one
# A trial has the compute of 300 steps of ViSurf (`flops`, with the tokens of the pilots).
STEPS = {"visurf": 300, "sft": 943, "rlvr": 495, "sgrpo": 300}
# A run has that of SFT's trials, by the tokens of the chosen setting's two trials: steps of its last stage.
RUN_STEPS = {"visurf": 397, "sft": 943, "rlvr": 493, "sgrpo": 382, "sft-rlvr": 342}
EIGHT = {"visurf": 233, "rlvr": 271}            # and with 8 rollouts instead of 4
NORMALISERS = ("token-mean", "seq-mean", "seq-sum")
RATES = (3e-4, 6e-4, 1e-3, 2e-3)
EPS = (1e-3, 1e-5)                              # of AdamW
# Arm → its eight settings: learning rate, and eps or, of SFT → RLVR, the share of compute that SFT has.
TRIALS = {**{arm: [*itertools.product(RATES, EPS)] for arm in ("sft", "rlvr", "visurf", "sgrpo")},
          "sft-rlvr": [*((rate, 0.15) for rate in RATES),
                       *itertools.product(RATES[1:3], (0.05, 0.40))]}
COMMON = ["--rollouts", "4", "--eval-data", ""]
PARTS = ("absent", "new", "hard", "kept")       # of the primary number


def measured(key: str) -> Column:
    return lambda result: result["metrics"].get(key)


COLUMNS = {**{key: measured(key) for key in (*PARTS, "dead", "mastered", "T-acc", "thinks, present",
                                             "trailing text, absent")},
           **{f"pass@8, {family.strip('-')}": lambda result, family=family: result.get("pass@8", {}).get(family)
              for family in ("named", "new-")},
           "compute": lambda result: sum(result["compute"]) if "compute" in result else None}
PROBE = {f"probe: {kind}": lambda result, kind=kind: result["accuracy"][kind] for kind in ("colour there", "not there")}
KNOWN = {**{key: measured(key) for key in ("N-acc, colour there", "N-acc, colour not there", "T-acc")}, **PROBE,
         "smoothed, last": measured("smoothed, last")}
PROBED = (("photos:val", 2304), ("photos:tune", 2304))      # what the probe is fitted on, and judged on
BESIDE = {key: measured(key) for key in ("absent", "T-acc", "boxes", "new", "hard", "primary")}


def stratum(own: str) -> Column:
    """Of the named things of photos:final that are there, the share that a base's rollouts put here."""
    def share(result: dict) -> float:
        marks = [mark for mark in result["right"]["final"][""] if mark != "-"]
        return statistics.fmean(STRATA.get(mark, "hard") == own for mark in marks)
    return share


STRATA = {"0": "dead", "8": "mastered"}         # how many of a base's 8 rollouts find a thing; else it is hard
BASE_COLUMNS = {**{key: measured(key) for key in ("primary", "boxes", "new", "hard", "counting", "colour", "left",
                                                  "T-acc")},
                **{f"share {own}": stratum(own) for own in ("dead", "hard", "mastered")},
                "says `[]`": lambda result: statistics.fmean(result["rejecting"].values()), **PROBE}


# ---------------------------------------------------------------------------------------------------------------------
# What is trained

def flops(sampled: float, rows: float, groups: float = 1.0, prompt: float = 51.0) -> float:
    """Floating-point operations of one prompt of a step, by tokens: 2 for each parameter that a token meets forward, 4
    backward. Attention's products of two tokens are left out. prompt, sampled: tokens read and sampled. rows: tokens
    of the row that is trained on, the prompt's among them. groups: the share of prompts that are trained on at all; a
    group of equal rewards is not."""
    tower, language = 42.4e6, 657_024           # of assets/tiny: a picture of 112×112; each token of text or picture
    sampling = 2 * (tower + language * (prompt + sampled)) if sampled else 0.0
    return sampling + 6 * (tower * groups + language * rows)


def compute(steps: list[dict]) -> float:
    """The compute of these steps, lines of metrics.jsonl of one process, as a share of a run's nominal 8.9e12."""
    total = 0.0
    for line in steps:
        updating = line["seconds"] - line["seconds_data"] - line["seconds_sampling"]
        sampled = line.get("sampling_tokens_per_s", 0.0) * line["seconds_sampling"]
        rows = line.get("training_tokens_per_s", 0.0) * updating
        total += 16 * flops(sampled / 16, rows / 16, 1 - line.get("tied", 0.0))
    return total / (16 * 300 * flops(233.3, 291.9, 0.969))


def stages(arm: str, rate: float, knob: float) -> list[list[str]]:
    """The flags of each stage of a training."""
    if arm == "sft-rlvr":
        first, = stages("sft", *chosen("sft"))
        first[-1] = str(round(STEPS["sft"] * knob))
        return [first, ["--method", "rlvr", "--lr", str(rate), "--steps", str(round(STEPS["rlvr"] * (1 - knob)))]]
    return [["--method", arm, "--lr", str(rate), "--adam-eps", str(knob), "--steps", str(STEPS[arm])]]


def tried(arm: str) -> dict[tuple[float, float], float]:
    """Setting → mean of the primary number over the tuning seeds, of each setting that has both."""
    results, found = read("tune"), {}
    for setting in TRIALS[arm]:
        names = [name(arm, "tune", *setting, seed) for seed in TUNING]
        if results.keys() >= {*names}:
            found[setting] = statistics.fmean(results[own]["metrics"]["primary"] for own in names)
    return found


def chosen(arm: str) -> tuple[float, float]:
    """The setting with the best mean; the first of equals."""
    means = tried(arm)
    if missing := [setting for setting in TRIALS[arm] if setting not in means]:
        raise SystemExit(f"{arm} has no trials yet of the settings {missing}: python experiments/photos.py tune")
    return max(means, key=lambda setting: means[setting])


def name(arm: str, *what: object) -> str:
    return "-".join([arm, *(f"{part:g}" if isinstance(part, float) else str(part) for part in what)])


def base_of(base: str) -> Path:
    """The folder of a base, with its weights from this repository's history."""
    return from_history(f"photos-base-{base}", COMMITS[base], f"experiments/bases/{base}.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# What is measured

def right_of_eight(model: str, part: str, seed: int = 0) -> dict[str, str]:
    """Of every question of photos:PART and photos:new-PART about something present: how many of 8 rollouts at
    temperature 1 find it. Family → a character an example: the number, or "-" of any other question."""
    import torch

    from data import Processor, load
    from model import load_model
    from rollout import generate, uniforms
    from support.answers import parse_boxes
    torch.set_num_threads(1)
    processor, net, found = Processor(Path(model)), load_model(Path(model)), {}
    for family in FAMILIES[:2]:
        source = load(f"photos:{family}{part}")
        marks = ["-"] * len(source)
        asked = [i for i in range(len(source)) if i % (2 if family else 3) == 0]        # about something present
        for begin in range(0, len(asked), 64):
            indices = asked[begin:begin + 64]
            prompts = [processor.prompt(source[i]) for i in indices]
            with torch.no_grad():
                groups = generate(net, prompts, LONGEST, uniforms(seed, indices, ROLLOUTS, LONGEST))
            for i, prompt, group in zip(indices, prompts, groups):
                texts = [processor.decode(response.tokens) for response in group]
                hits = [hit(parse_boxes(text)[0], json.loads(prompt.answer), text) for text in texts]
                marks[i] = str(sum(hits))
        found[family] = "".join(marks)
    return found


def hit(predicted: list, truth: list, response: str) -> bool:
    """Whether an answer finds what is there, with nothing behind it."""
    return box_hit(predicted, truth) and not trailing_text(response)


def measures(metrics: dict[str, dict], records: list[dict], right: str) -> dict[str, float]:
    """What an evaluation of the four families says. metrics: family → eval.py's; records: eval.py's, of the family "";
    right: the base's own `right_of_eight` of them.

    absent    absent things answered by `[]`, garments that pretraining names and NEW ones alike by number
    new       present NEW garments found
    hard      present named garments found, of those that 1 to 7 of the base's rollouts find; dead: none; mastered: all
    kept      mean of counting, the colour of a thing, the left one of two
    primary   the mean of these four"""
    of = {family: (metrics[family], photos.SPLITS[f"{family}test"] / (2 if family else 3)) for family in FAMILIES[:2]}

    def both(key: str) -> float:
        return sum(own[key] * number for own, number in of.values()) / sum(number for _, number in of.values())
    strata: dict[str, list[bool]] = {"dead": [], "hard": [], "mastered": []}
    for record, mark in zip(records, right, strict=True):
        if mark != "-":
            strata[STRATA.get(mark, "hard")].append(hit(record["predicted"], record["truth"], record["response"]))
    found = {"absent": both("N-acc"), "new": metrics["new-"]["boxes"],
             **{own: statistics.fmean(hits) for own, hits in strata.items() if hits},
             "counting": metrics[""]["answers"], "colour": metrics["colour-"]["answers"],
             "left": metrics["left-"]["boxes"], "boxes": metrics[""]["boxes"], "T-acc": both("T-acc"),
             "N-acc, named": metrics[""]["N-acc"], "N-acc, new": metrics["new-"]["N-acc"],
             "thinks, present": both("thinks, present"), "thinks, absent": both("thinks, absent"),
             "trailing text, present": both("trailing text, present"),
             "trailing text, absent": both("trailing text, absent")}
    found["kept"] = statistics.fmean(found[skill] for skill in ("counting", "colour", "left"))
    found["primary"] = statistics.fmean(found[part] for part in PARTS)
    return {key: round(value, 4) for key, value in found.items()}


def judge(model: str, part: str, base: str, out: str) -> dict[str, float]:
    """The measures of a model's greedy answers to a judged part of photos."""
    metrics, records = {}, []
    for family in FAMILIES:
        folder = ROOT / "runs" / out / f"{family}{part}"
        call("eval.py", "--model", model, "--data", f"photos:{family}{part}", "--out", str(folder))
        metrics[family] = json.loads((folder / "metrics.json").read_text())["metrics"]
        if not family:
            records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return measures(metrics, sorted(records, key=lambda record: record["index"]),
                    read("base")[f"base-{base}"]["right"][part][""])


# ---------------------------------------------------------------------------------------------------------------------
# Results

def read(kind: str) -> dict[str, dict]:
    """The results of this kind, which each of them names: name → result."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {own: result for own, result in found.items() if result["kind"] == kind}


def write(own: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{own}.json").write_text(json.dumps(result, indent=1) + "\n")


def make(kind: str, own: str, base: str, budget: int, seed: int, flags: list[list[str]], part: str) -> str:
    """One result: the training by these stages, and its answers to a judged part. Returns its name."""
    if (RESULTS / f"{own}.json").exists():
        return f"{own}: there already"
    model, lines = str(base_of(base)), []               # lines: of each stage
    for number, stage in enumerate(flags, 1):
        run = train(f"photos-{own}-{number}", ["--seed", str(seed), "--model", model, "--data", f"photos:train{budget}",
                                               *COMMON, *stage])
        model, lines = str(last_checkpoint(run)), [*lines, steps_of(run)]
    metrics = judge(model, part, base, f"photos-{own}-answers")
    result = {"kind": kind, "base": base, "budget": budget, "seed": seed, "stages": flags, "machine": machine(),
              "commit": read_config(run)["versions"]["commit"], "part": part,
              "seconds": round(sum(line["seconds"] for stage in lines for line in stage)),
              "compute": [round(compute(stage), 3) for stage in lines], "metrics": metrics}
    if kind == "run" and seed == SEEDS[0]:
        marks = right_of_eight(model, part)
        result["pass@8"] = {family or "named": round(statistics.fmean(
            mark != "0" for mark in of if mark != "-"), 4) for family, of in marks.items()}
    write(own, result)
    return own


def look(base: str) -> str:
    """What a base knows: its measures on photos:tune, its own rollouts, how many of them say `[]`, and the probe."""
    from data import Processor
    from experiments.probe import probe, rejecting
    from model import load_model
    from support.weights import model_digest
    own = f"base-{base}"
    if (RESULTS / f"{own}.json").exists():
        return f"{own}: there already"
    folder = base_of(base)
    net, processor = load_model(folder), Processor(folder)
    result = {"kind": "base", "commit": versions()["commit"], "digest": model_digest(folder),
              "accuracy": probe(net, processor, *PROBED),
              "rejecting": rejecting(net, processor, "photos:tune", 2304),
              "right": {part: right_of_eight(str(folder), part) for part in ("tune", "final")}}
    write(own, result)
    write(own, result | {"metrics": judge(str(folder), "tune", base, f"photos-{own}-answers")})
    return own


def untrained(base: str) -> str:
    """A base's own answers to photos:final, beside which the arms' stand."""
    own = f"base-{base}-final"
    if (RESULTS / f"{own}.json").exists():
        return f"{own}: there already"
    write(own, {"kind": "final", "base": base, "commit": versions()["commit"], "part": "final",
                "metrics": judge(str(base_of(base)), "final", base, f"photos-{own}-answers")})
    return own


def known(arm: str, base: str) -> str:
    """What a model knows of absent things and says of them, on photos:tune. arm: "base", untrained, or one whose run of
    the first seed, with 6,400 labels, is still under runs/."""
    from data import Processor
    from experiments.probe import probe
    from model import load_model
    own = f"known-{arm}-{base}"
    if (RESULTS / f"{own}.json").exists():
        return f"{own}: there already"
    run = ROOT / "runs" / f"photos-{name(arm, base, BUDGETS[-1], SEEDS[0])}-{2 if arm == 'sft-rlvr' else 1}"
    if arm != "base" and not run.is_dir():
        trained = RESULTS / f"{name(arm, base, BUDGETS[-1], SEEDS[0])}.json"
        raise SystemExit(f"{run} is not there: move {trained} away, and `photos.py run` trains it again")
    folder = base_of(base) if arm == "base" else last_checkpoint(run)
    answers = ROOT / "runs" / f"photos-{own}-answers"
    call("eval.py", "--model", str(folder), "--data", "photos:tune", "--out", str(answers))
    records = [json.loads(line) for line in (answers / "records.jsonl").read_text().splitlines()]
    metrics = {**by_colour(records, "tune", photos),
               "T-acc": json.loads((answers / "metrics.json").read_text())["metrics"]["T-acc"]}
    if arm == "visurf":
        metrics["smoothed, last"] = statistics.fmean(line["smoothed"] for line in steps_of(run)[-20:])
    write(own, {"kind": "known", "arm": arm, "base": base, "commit": versions()["commit"], "metrics": metrics,
                "accuracy": probe(load_model(folder), Processor(folder), *PROBED)})
    return own


def trials(arm: str) -> list[tuple]:
    """The arguments of `make` for every trial of an arm. SFT → RLVR needs the results of SFT's."""
    return [("tune", name(arm, "tune", *setting, seed), BASES[0], 6400, seed, stages(arm, *setting), "tune")
            for setting in TRIALS[arm] for seed in TUNING]


def runs(what: str) -> list[tuple]:
    """The arguments of `make` for everything of `run`, `asides` or `again`. They need the results of all trials."""
    flags = {arm: stages(arm, *chosen(arm)) for arm in TRIALS}
    for arm, of in flags.items():
        of[-1][-1] = str(RUN_STEPS[arm])
    if what == "run":
        return [("run", name(arm, base, budget, seed), base, budget, seed, flags[arm], "final")
                for seed in SEEDS for budget in BUDGETS for base in BASES for arm in TRIALS]
    if what == "again":
        return [("again", f"again-{own}", *rest) for _, own, *rest in random.Random(51).sample(runs("run"), 3)]
    plain = {arm: flags[arm][0] for arm in EIGHT}
    normalisers = [("aside", name("visurf", normaliser, "boxing", seed), "boxing", 6400, seed,
                    [[*plain["visurf"], "--normaliser", normaliser]], "final")
                   for normaliser in NORMALISERS for seed in SEEDS[:2]]
    return normalisers + [("aside", name(f"{arm}-8", base, seed), base, 6400, seed,
                           [[*plain[arm], "--rollouts", "8", "--steps", str(steps)]], "final")
                          for seed in SEEDS[:2] for base in BASES for arm, steps in EIGHT.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts

def flips(differences: list[float], margin: float = 0.0) -> float:
    """p, one-sided, of the exact sign-flip test that the mean of these paired differences is above `margin`: of all 2^n
    ways to choose the signs of what is above it, the share with a sum as large as the one that was found."""
    values = [value - margin for value in differences]
    sums = [sum(sign * value for sign, value in zip(signs, values))
            for signs in itertools.product((1, -1), repeat=len(values))]
    return statistics.fmean(each >= sum(values) - 1e-12 for each in sums)


def holm(p: dict[str, float], level: float = 0.025) -> dict[str, bool]:
    """Which of these survive Holm's correction."""
    kept, survives = {}, True
    for place, own in enumerate(sorted(p, key=lambda own: p[own])):
        survives = survives and p[own] <= level / (len(p) - place)
        kept[own] = survives
    return kept


def paired(results: dict[str, dict], a: str, b: str, key: str, budget: int) -> list[float]:
    """a minus b over all bases and seeds."""
    return [results[name(a, base, budget, seed)]["metrics"][key] - results[name(b, base, budget, seed)]["metrics"][key]
            for base in BASES for seed in SEEDS]


def best_of(results: dict[str, dict], arms: tuple[str, ...], budget: int) -> str:
    return max(arms, key=lambda arm: statistics.fmean(
        results[name(arm, base, budget, seed)]["metrics"]["primary"] for base in BASES for seed in SEEDS))


def below(differences: list[float], margin: float, level: float = 0.025) -> bool:
    """Whether the upper limit of the mean of these paired differences is below `margin`, by the same test."""
    return flips([-value for value in differences], -margin) <= level


def verdicts(results: dict[str, dict], budget: int = 6400) -> dict[str, tuple[list[float], float, bool]]:
    """Hypothesis → the paired differences that it is about, p, and whether they refute it."""
    best = best_of(results, ("sft", "rlvr", "sft-rlvr"), budget)
    h1 = paired(results, "visurf", best, "primary", budget)
    h2 = paired(results, "visurf", "sgrpo", "primary", budget)
    h3 = [few - many for few, many in zip(*(paired(results, "visurf", "sft", "primary", own) for own in BUDGETS))]
    h4 = paired(results, "visurf", "rlvr", "hard", budget)
    h5, above = (paired(results, "visurf", arm, "kept", budget) for arm in ("rlvr", "sft"))
    return {f"H1 ViSurf above {best}": (h1, flips(h1), below(h1, 0.02)),
            "H2 ViSurf and S-GRPO within 1 point": (
                h2, max(flips(h2, -0.01), flips([-d for d in h2], -0.01)),
                below(h2, -0.01) or below([-d for d in h2], -0.01)),
            "H3 more above SFT with 640 labels than with 6,400": (h3, flips(h3), below(h3, 0)),
            "H4 hard: at most 1 point below RLVR": (h4, flips(h4, -0.01), below(h4, -0.01)),
            "H5 kept: at most 2 points below RLVR, and above SFT": (
                h5, max(flips(h5, -0.02), flips(above)), below(h5, -0.02) or below(above, 0))}


def asides(results: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """The rows of the two questions beside the hypotheses, of those that have all of their runs. results: of `run` and
    `asides`, as a row with 4 rollouts stands beside the one with 8, of the same seeds."""
    def those(arm: str, *rest: tuple) -> dict:
        names = {what: name(arm, *what) for what in rest}
        return {what: results[own] for what, own in names.items()} if {*names.values()} <= results.keys() else {}
    normalisers = {way: those(f"visurf-{way}", *(("boxing", seed) for seed in SEEDS[:2])) for way in NORMALISERS}
    many = [(base, seed) for seed in SEEDS[:2] for base in BASES]
    rollouts = {}
    for arm in EIGHT:
        rollouts[f"{arm}, 4"] = those(arm, *((base, 6400, seed) for base, seed in many))
        rollouts[f"{arm}, 8"] = those(f"{arm}-8", *many)
    return {"normalisers": normalisers, "rollouts": rollouts}


def rows_of(results: dict[str, dict], budget: int) -> dict[str, dict]:
    """arm → (base, seed) → result, of the arms that have all of their runs, behind the bases themselves."""
    own = {base: result for base in BASES if (result := read("final").get(f"base-{base}-final"))}
    rows = {arm: {(base, seed): results.get(name(arm, base, budget, seed)) for base in BASES for seed in SEEDS}
            for arm in TRIALS}
    return {"base": own} | {arm: found for arm, found in rows.items() if all(found.values())}


def trials_table() -> str:
    """The primary number of each trial's setting: a row for each arm, a column for each rate. The values of a cell
    are those of its eps or shares, the lowest first."""
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in RATES) + " | chosen |", "|---" * (len(RATES) + 2) + "|"]
    for arm, settings in TRIALS.items():
        means, knobs = tried(arm), sorted({knob for _, knob in settings})
        cells = [" / ".join(f"{means[rate, knob]:.3f}" if (rate, knob) in means else "–" for knob in knobs)
                 for rate in RATES]
        best = "{:g}, {:g}".format(*chosen(arm)) if len(means) == len(settings) else "–"
        lines.append("| " + " | ".join([arm, *cells, best]) + " |")
    return "\n".join(lines)


def turned(results: dict[str, dict], rows: list[tuple[str, int]]) -> str:
    """A column for the untrained bases and for each arm. rows: measure, budget of labels. The primary number, which the
    hypotheses compare, is a mean also where the runs fall into two groups."""
    arms = {budget: rows_of(results, budget) for budget in BUDGETS}
    titles = ["base", *TRIALS]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for key, budget in rows:
        cells = [shown([result["metrics"][key] for result in arms[budget].get(arm, {}).values()],
                       parted=False if key == "primary" else None) for arm in titles]
        lines.append("| " + " | ".join([f"{key}, {budget:,} labels", *cells]) + " |")
    return "\n".join(lines)


def tables(results: dict[str, dict]) -> dict[str, str]:
    """Name of a table → its Markdown: the trials, the arms, and the verdicts once all runs are there."""
    made = {f"photos-{budget}": table(rows_of(results, budget), COLUMNS, origin=False) for budget in BUDGETS}
    made["photos-first"] = turned(results, [("primary", 6400)])
    made["photos-short"] = turned(results, [("primary", budget) for budget in BUDGETS])
    made["photos-bases"] = table({own: {0: result} for own, result in read("base").items()}, BASE_COLUMNS, origin=False)
    for own, rows in asides(results | read("aside")).items():
        made[f"photos-{own}"] = table(rows, BESIDE, origin=False)
    again = {}
    for own, result in read("again").items():
        if (first := own.removeprefix("again-")) in results:
            again |= {first: {0: results[first]}, own: {0: result}}
    made["photos-again"] = table(again, BESIDE | {"kept": measured("kept")}, origin=False)
    those = read("known")
    made["photos-known"] = table({arm: {base: those[own] for base in BASES if (own := f"known-{arm}-{base}") in those}
                                  for arm in ("base", *TRIALS)}, KNOWN, origin=False)
    lines = ["| hypothesis | mean difference | by base | p | survives Holm | refuted, uncorrected |", "|---" * 6 + "|"]
    if len(results) == len(BASES) * len(SEEDS) * len(BUDGETS) * len(TRIALS):
        decided = verdicts(results)
        kept = holm({own: p for own, (_, p, _) in decided.items()})
        above = {budget: paired(results, "visurf", "sft", "kept", budget) for budget in BUDGETS}
        beside = {"kept: above SFT (a side of H5)": (above[6400], flips(above[6400]), below(above[6400], 0)),
                  **{f"{own}; 640 labels": found for own, found in verdicts(results, 640).items() if own[:2] != "H3"},
                  "kept: above SFT; 640 labels": (above[640], flips(above[640]), below(above[640], 0))}
        for own, (differences, p, refuted) in (decided | beside).items():
            mean, half = interval(differences)
            by_base = [statistics.fmean(differences[i:i + len(SEEDS)]) for i in range(0, len(differences), len(SEEDS))]
            settled = [("no", "yes")[each] if own in kept else "–" for each in (kept.get(own, False), refuted)]
            lines.append(f"| {own} | {mean:+.3f} ± {half:.3f} | {', '.join(f'{each:+.3f}' for each in by_base)} | "
                         f"{p:.4f} | {' | '.join(settled)} |")
    return made | {"photos-trials": trials_table(), "photos-verdicts": "\n".join(lines)}


def draw(root: Path) -> None:
    """The figure of the arms, into the repository at root."""
    rows = {arm + f", {budget:,}" * (arm != "base"): own for budget in BUDGETS
            for arm, own in rows_of(read("run"), budget).items()}
    if len(rows) > 1:
        draw_points(rows, {key: measured(key) for key in ("primary", *PARTS)}, bar,
                    root / "experiments/figures/photos.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "tune", "run", "asides", "again", "known"))
    parser.add_argument("bases", nargs="*", help="of `base`")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    args = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    if args.what == "base":
        for base in args.bases:
            print(look(base), flush=True)
        return
    if args.what == "known":
        for arm, base in itertools.product(("base", *TRIALS), BASES):
            print(known(arm, base), flush=True)
        return
    for batch in ((trials(arm) for arm in TRIALS) if args.what == "tune" else [runs(args.what)]):
        with ThreadPoolExecutor(args.jobs) as pool:
            for own in pool.map(lambda job: make(*job), batch):
                print(own, flush=True)
    for base in BASES if args.what == "asides" else ():
        print(untrained(base), flush=True)


if __name__ == "__main__":
    main()
