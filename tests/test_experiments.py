"""The arithmetic of experiments/reproduce.py, and that every experiment is a command that train.py takes."""
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import Processor, load
from experiments import gpu, probe, reproduce
from experiments.reproduce import (COURSE, EXPERIMENTS, MAIN, PAGES, POLICIES, SPLITS, all_tables,
                                   answer_blindly, as_learnt, base_of, base_table, chosen_rate,
                                   cost_table, course, difference, draw, family_of, fill, grid,
                                   holm_table, in_two_groups, interval, parts, read_results, score,
                                   shown, shown_rate, table, tables, tells)
from model import load_model
from rollout import generate
from support import scenes
from support.runs import today
from support.sources import take

THOUGHT = {"index": 1, "task": "scene_grounding", "question": "red ring", "response": "<think>Where?</think>",
           "truth": [{}], "error": None, "predicted": []}
LABELS = {"N-acc": MAIN["N-acc"], "boxes": MAIN["boxes"]}


def result(n_acc: float, boxes: float | None = None, val: float = 0.0, rate: float = 0.001) -> dict:
    test = {"N-acc": n_acc} | ({} if boxes is None else {"boxes": boxes})
    return {"rate": rate, "metrics": {"test": test, "val": {"N-acc": val, "boxes": val}}}


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)       # t of 2 degrees, s = 1
    for few in ([0.5], [0.25, 0.75]):
        assert interval(few)[0] == 0.5 and math.isnan(interval(few)[1])


def test_a_table_by_hand():
    rows = {"base": {42: result(0.0)}, "visurf": {42: result(0.9), 43: result(0.8), 44: result(0.7, boxes=0.5)},
            "rlvr": {42: result(0.1), 44: result(0.2)}, "sft": {42: result(0.4), 43: result(0.5), 44: result(0.6)}}
    assert cells(table(rows, LABELS)) == [["base", "–", "1", "0.000", "–"],
                                          ["visurf", "0.001", "3", "0.800 ± 0.248", "0.500"],
                                          ["rlvr", "0.001", "2", "0.150", "–"],
                                          ["sft", "0.001", "3", "0.500 ± 0.248", "–"]]
    # The base is one result, taken from every seed of ViSurf; the others are paired: −0.8, −0.5; −0.5, −0.3, −0.1.
    assert cells(table(rows, LABELS, against="visurf")) == [["base", "–", "1", "-0.800 ± 0.248", "–"],
                                                            ["rlvr", "0.001", "2", "-0.650", "–"],
                                                            ["sft", "0.001", "3", "-0.300 ± 0.497", "–"]]
    # A base made anew for the seeds 43 and 44: 0.9 − 0.0, 0.8 − 0.1, 0.7 − 0.1.
    rows = {"base": {42: result(0.0), 43: result(0.1)}, "visurf": rows["visurf"]}
    assert cells(table(rows, LABELS))[0] == ["base", "–", "2", "0.050", "–"]
    assert cells(table(rows, LABELS, against="base")) == [
        ["visurf", "0.001", "3", "+0.733 ± 0.379", "–"]]
    assert cells(table(rows, LABELS, against="visurf")) == [
        ["base", "–", "2", "-0.733 ± 0.379", "–"]]


def test_seeds_in_two_groups_are_printed_by_seed():
    """Where the widest gap is more than 0.15 and more than half of the range. A mean would lie in
    it."""
    for values, cell in (
            ([0.0, 0.31, 0.0, 0.0, 0.0], "0.310 in 1 of 5, else 0.000"),
            ([0.97, 0.0, 0.91, 0.006, 0.01], "0.910 to 0.970 in 2 of 5, else 0.000 to 0.010"),
            ([0.0, 0.86, 0.84, 0.92, 0.82], "0.000 in 1 of 5, else 0.820 to 0.920"),
            ([0.0, 0.15, 0.0], "0.050 ± 0.215"),                 # no gap of more than 0.15
            ([0.0, 0.2, 0.4, 0.6], "0.300 ± 0.411"),             # none of more than half the range
            ([0.0, 1.0], "0.500"),                               # no interval that could mislead
            ([1.0, 5.0, 5.0], "3.667 ± 5.737")):                 # no shares
        assert shown(values) == cell and in_two_groups(values) == ("in" in cell)
    # A difference is, where one of its sides is: here the right one.
    pairs = [(0.3, 0.0), (0.3, 0.31), (0.3, 0.0)]
    assert difference(pairs) == "-0.010 in 1 of 3, else +0.300"
    assert difference([(0.3, 0.1), (0.3, 0.2), (0.3, 0.3)]) == "+0.100 ± 0.248"
    rows = {"visurf": {seed: result(share) for seed, share in zip((42, 43, 44), (0.0, 0.0, 0.5))}}
    assert cells(table(rows, {"N-acc": MAIN["N-acc"]}, origin=False)) == [
        ["visurf", "0.500 in 1 of 3, else 0.000"]]


def test_holms_correction_by_hand():
    """t of 2 degrees of the differences d, d + s, d + 2s is (d + s)√3/s: 88.3, 3.46 and 1.73."""
    starts = {"boxes": (0.5, 0.01), "N-acc": (0.1, 0.1), "reasoning": (0.0, 0.1)}

    def of(seed):
        metrics = {name: start + seed * step for name, (start, step) in starts.items()}
        return {"metrics": {"test": metrics, "reasoning-test": {"boxes": metrics["reasoning"]}}}
    zero = {"metrics": {"test": dict.fromkeys(starts, 0.0), "reasoning-test": {"boxes": 0.0}}}
    made = holm_table({"visurf": {seed: of(seed) for seed in range(3)},
                       "rlvr": dict.fromkeys(range(3), zero),
                       "sft": {0: zero}})                        # one seed: no test
    assert [(row[0].split(",")[0], *row[2:]) for row in cells(made)] == [
        ("boxes", "0.00013", "0.01667", "yes"), ("N-acc", "0.07418", "0.02500", "no"),
        ("reasoning", "0.22540", "0.05000", "no")]
    assert holm_table({}).count("\n") == 1


def test_results_of_earlier_versions_are_read_by_todays_names(tmp_path, monkeypatch):
    old = {"N-acc strict": 0.1, "bbox accuracy": 0.2, "bbox accuracy official": 0.3,
           "targets IoU>0.5": 0.4, "T-acc": 0.5}
    new = {"N-acc": 0.1, "boxes": 0.2, "boxes official": 0.3, "targets": 0.4, "T-acc": 0.5}
    old_course = {"r_rollouts": [1], "rollouts/thinking": [2], "response_length": [3],
                  "entropy": [4]}
    new_course = {"r(o)": [1], "o/thinks": [2], "length": [3], "entropy": [4]}
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    for seed, metrics, of_steps in ((42, old, old_course), (43, new, new_course)):
        (tmp_path / f"{seed}.json").write_text(json.dumps({
            "experiment": "visurf", "rate": 0.001, "seed": seed, "stages": [[]],
            "metrics": {"test": metrics}, "course": of_steps, "best": {"step": 1, "test": metrics}}))
    seeds = read_results()["visurf"][0.001]
    assert seeds[42] | {"seed": 43} == seeds[43] and seeds[43]["metrics"] == {"test": new}
    assert seeds[43]["course"] == new_course and seeds[43]["best"]["test"] == new
    (tmp_path / "sft.json").write_text(json.dumps({
        "experiment": "sft", "rate": 0.002, "seed": 42, "stages": [["--method", "sft"]],
        "metrics": {"test": old}, "course": {"entropy": [4]}, "best": {"step": 1, "test": old}}))
    assert read_results()["sft"][0.002][42]["course"] == {"entropy_y": [4]}     # over label tokens
    for name, now in {"y/thinking": "y/thinks", "rollouts/accuracy": "o/accuracy", "r_y": "r(y)",
                      "o/thinks": "o/thinks", "thinking": "thinking"}.items():
        assert today(name) == now


def test_the_learning_rate_is_chosen_on_val():
    tried = {0.0005: {42: result(0.9, val=0.5, rate=0.0005)}, 0.001: {42: result(0.1, val=0.7), 43: result(0.2)},
             0.002: {43: result(1.0)}}                     # not tried with the first seed
    assert chosen_rate(tried) == 0.001 and score({"N-acc": 1.0, "boxes": 0.5}) == 0.75
    assert score({"N-acc": None, "boxes": 0.5}) == 0.5
    assert score({"N-acc": None, "boxes": None, "answers": 0.25}) == 0.25
    assert parts({"visurf": tried})["main"] == {"visurf": tried[0.001]}
    tried[0.002][42] = result(0.8, val=0.9)                # chosen, with as many seeds as 0.001; then with fewer
    assert chosen_rate(tried) == shown_rate(tried) == 0.002
    del tried[0.002][43]
    assert chosen_rate(tried) == 0.002 and shown_rate(tried) == 0.001
    del tried[0.002]
    stages = {f"sft{n}-rlvr": {0.001: {42: result(0.5, val=n / 100 if n < 200 else 0.0)}} for n in (25, 100, 200)}
    assert list(parts(stages)["main"]) == ["sft100-rlvr"] and len(parts(stages)["lengths"]) == 3
    assert cells(grid({"visurf": tried, "sft": {0.004: {42: result(0.5, val=0.9)}}})) == [
        ["visurf", "0.500", "0.700", "–"], ["sft", "–", "–", "0.900"]]


def test_tables_are_written_between_their_marks():
    text = "a\n<!-- table: main -->\nold\nold\n<!-- end -->\nb\n<!-- table: grid -->\n<!-- end -->\n"
    made = {"main": "| new |", "grid": "| 1 |"}
    filled = "a\n<!-- table: main -->\n| new |\n<!-- end -->\nb\n<!-- table: grid -->\n| 1 |\n<!-- end -->\n"
    assert fill(text, made) == fill(filled, made) == filled
    assert set(tables({})) >= {"main", "grid"}             # with no result at all


def test_the_course_by_hand():
    lines = [{"advantage_y": float(step), "smoothed": 0.5} for step in range(30)]
    made = course(lines)
    assert made["advantage_y"] == [9.5, 24.5] and made["smoothed"] == [0.5, 0.5] and made["logp_y"] == [None, None]


def test_every_table_and_figure_is_made_of_what_there_is(tmp_path):
    """Two seeds, the base one; a course without log π(y) at its end."""
    metrics = {"N-acc": 0.5, "N-acc, colour there": 0.25, "N-acc, colour not there": 0.75,
               "T-acc": 1.0, "boxes": 0.25, "answers": 0.75, "thinks, present": 1.0,
               "thinks, absent": 0.0}

    def made(seed):
        return {"rate": 0.001, "seed": seed, "metrics": dict.fromkeys((*SPLITS, "val"), metrics), "seconds": 5,
                "peak_memory_gb": 0.5, "best": {"step": 300, "test": metrics},
                "course": {name: [0.5, None] if name == "logp_y" else [0.5, 1.0] for name in COURSE}}
    results = {name: {0.001: {seed: made(seed) for seed in (42, 43)[:1 if name == "base" else 2]}} for name in (
        "base", "visurf", "rlvr", "sft", "sft25-rlvr", "visurf-no-align", "visurf-g2", "absent5-rlvr", "stage5-rlvr",
        "sums-sft")}
    written = tables(results)
    assert [row[0] for row in cells(written["lengths"])] == ["rlvr", "sft25-rlvr", "sft", "visurf"]
    draw(results, tmp_path)
    assert {path.name for path in tmp_path.glob("experiments/figures/*.png")} == {
        "methods.png", "elsewhere.png", "course.png", "controls.png", "lengths.png", "families.png", "boundary.png",
        "sensitivity.png", "cost.png"}
    assert (tmp_path / "docs/weights.png").exists()
    draw({}, tmp_path)                             # with no result at all


def test_a_result_is_what_the_trainings_and_evaluations_left(tmp_path, monkeypatch):
    """Of sft25-rlvr, with scripts that only write files: the stages follow each other, a stage that was stopped goes
    on, and the best checkpoint is that of step 300."""
    calls = []

    def call(script, *flags):
        flag = dict(zip(flags[::2], flags[1::2]))
        calls.append((script, flag))
        if script == "eval.py":
            folder = Path(flag["--out"])
            folder.mkdir(parents=True)
            measured = ("N-acc", "T-acc", "boxes", "thinks, present", "thinks, absent", "answers")
            (folder / "metrics.json").write_text(json.dumps({"metrics": dict.fromkeys(measured, 0.123456)}))
            lines = [json.dumps(record) + "\n" for record in (THOUGHT, THOUGHT | {"truth": []})]
            (folder / "records.jsonl").write_text("".join(lines))
            return
        run = Path(flag.get("--resume") or tmp_path / "runs" / flag["--name"])
        steps = int(flag.get("--steps", 375))
        for step in {300, steps}:
            (run / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "eval": {"N-acc": value, "boxes": 0.5}}
                 for step, value in ((0, 1.0), (150, 1.0), (300, 0.9), (375, 0.8))]      # none is kept of step 150
        lines += [{"step": step, "seconds": 2.0, "peak_memory_gb": 0.5, "entropy": 1.0} for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "config.json").write_text(json.dumps({"config": {"steps": steps}, "versions": {"commit": "abc"}}))
    monkeypatch.setattr(reproduce, "call", call)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    stopped = tmp_path / "runs/reproduce-sft25-rlvr-0.001-43-2"
    stopped.mkdir(parents=True)
    (stopped / "config.json").write_text(json.dumps({"config": {"steps": 375}, "versions": {"commit": "abc"}}))
    said = reproduce.make("sft25-rlvr", 0.001, 43)
    first, second, *evaluations = calls
    assert first[1] | {"--method": "sft", "--steps": "25", "--lr": "0.002", "--seed": "43"} == first[1]
    assert second == ("train.py", {"--resume": str(stopped)})
    assert said.startswith("sft25-rlvr-0.001-43.json: N-acc 0.1235")
    made = json.loads((tmp_path / "results/sft25-rlvr-0.001-43.json").read_text())
    assert made["seconds"] == 800 and len(made["course"]["entropy"]) == 20 and made["best"]["step"] == 300
    assert [flag["--model"].rsplit("/", 1)[1] for _, flag in evaluations] == ["step_375"] * len(SPLITS) + ["step_300"]
    assert made["metrics"]["test"]["thought tells"] == 0.5
    assert made["metrics"]["test"]["T-acc"] == 0.1235 and reproduce.make("sft25-rlvr", 0.001, 43).endswith("already")

    calls.clear()                                  # a row of the README: other splits, and no best checkpoint
    monkeypatch.setattr(reproduce, "own_scenes", lambda seed: tmp_path / f"own-{seed}.parquet")
    reproduce.make("final-sft-long", 0.002, 43)
    (_, trained), *evaluations = calls
    assert trained["--data"] == str(tmp_path / "own-43.parquet") and trained["--steps"] == "1200"
    assert [flag["--data"] for _, flag in evaluations] == ["scenes:final", "scenes:reasoning-final"]
    made = json.loads((tmp_path / "results/final-sft-long-0.002-43.json").read_text())
    assert "best" not in made and made["metrics"]["test"]["T-acc"] == 0.1235


def test_sft_long_has_the_scenes_that_the_default_job_sees(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    stored = load(str(reproduce.own_scenes(43, 5)), task="scene_grounding")
    seen = take(load("scenes:train"), range(5), 43)
    assert [(e.question, json.loads(e.answer), e.images[0].tobytes()) for e in stored] == [
        (e.question, json.loads(e.answer), e.images[0].tobytes()) for e in seen]


def test_rejections_by_colour(monkeypatch):
    """A red square and a blue ring. Absent are the red ring and the blue square (colour there), green things and the
    cross (not there); the red square is there, and counting is no grounding."""
    assert scenes.make("test", 1) == scenes.make_with_things("test", 1)[0]
    things = [scenes.Thing("red", "square", (0, 0, 9, 9)), scenes.Thing("blue", "ring", (20, 20, 29, 29))]
    monkeypatch.setattr(scenes, "make_with_things", lambda split, index: ({}, things))

    def record(question, predicted, truth=(), error=None, task="scene_grounding"):
        return {"index": 0, "task": task, "question": question, "truth": truth, "predicted": predicted, "error": error}
    records = [record("red ring", [{}]), record("blue square", []), record("green ring", []), record("cross", []),
               record("green object", [], error="not_json"), record("red square", [], truth=[{}]),
               record("How many red rings?", [], task="vqa")]
    assert reproduce.by_colour(records, "test") == {"N-acc, colour there": 1 / 2, "N-acc, colour not there": 2 / 3}
    assert reproduce.by_colour(records[5:], "test") == {}


def test_sums_by_size():
    sums = [int(scenes.make("sums-test", i)["answer"]) for i in range(40)]
    records = [{"index": i, "score": 1.0 if total in (3, 12) else 0.1} for i, total in enumerate(sums)]
    small, large = (sum(s in (3, 12) for s in some) / len(some) for some in (
        [s for s in sums if s <= 9], [s for s in sums if s > 9]))
    assert 0 < small < 1 and 0 < large < 1
    assert reproduce.by_size(records, "sums-test") == {"up to nine": small, "above nine": large}
    assert reproduce.by_size(records[:1], "sums-test").keys() == {"up to nine" if sums[0] <= 9 else "above nine"}


def test_what_the_wording_of_a_thought_tells_and_whether_it_is_kept():
    def record(response, *truth, question="red ring", task="scene_grounding"):
        return {"task": task, "question": question, "response": response, "truth": list(truth)}
    box = {"bbox_2d": [0, 0, 2, 2]}
    thought = "<think>Where is the red ring? {}</think><answer>{}</answer>"
    # The answer is no part of it.
    assert tells([record(thought.format(5, []), box), record(thought.format(7, [box]))]) == 0.5
    assert tells([record("<think>Where is the red ring?</think>", box),                               # nor the question
                  record("<think>Where is the blue disc?</think>", question="blue disc")]) == 0.5
    both = [record("<think>It is there.</think>", box), record("<think>I see none.</think>"),
            record("<answer>[]</answer>"), record("<answer>[]</answer>", box)]
    assert tells(both) == 0.75 and tells([*both, record("3", task="vqa")]) == 0.75
    assert tells([record("3", box)]) is None
    learnt = record("<think>Where is the red ring?</think><answer>[]</answer>")
    decayed, of_another = record("<think>I look look.</think>"), learnt | {"question": "blue ring"}
    assert as_learnt([learnt, decayed, of_another, record("<answer>[]</answer>"),
                      record("<think>I count.</think>3", task="vqa")]) == pytest.approx(1 / 3)
    assert as_learnt([record("<answer>[]</answer>")]) is None


def test_the_cost_by_hand():
    stages = [{"steps": 50, "start": 0.25, "end": 0.75}, {"steps": 350, "start": 1.5, "end": 0.5}]
    made = cost_table({"seconds": {"rlvr": [{"steps": 400, "start": 1.0, "end": 3.0}], "sft50-rlvr": stages},
                       "memory": {"rlvr": 0.5}})
    assert cells(made) == [["rlvr", "1.00", "3.00", "800", "1.00", "0.500"],
                           ["sft50-rlvr", "0.25", "0.50", "375", "0.47", "–"]]           # 25 + 350


def test_a_linear_probe_tells_what_is_there_to_tell():
    """Nine tenths are present, one tenth absent. One of eight normal features has another mean for the present: 8, 2
    and 0 standard deviations away. Of 2, each kind is right by Φ(1) = 0.841, as present and absent weigh alike."""
    noise = torch.randn(8000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    present = torch.arange(8000) % 10 > 0
    for distance, least, most in ((8.0, 0.99, 1.0), (2.0, 0.81, 0.87), (0.0, 0.45, 0.55)):
        features = noise.clone()
        features[:, 5] += distance * present
        half = slice(0, 4000), slice(4000, 8000)
        (x, y), (x_test, y_test) = ((features[part], present[part]) for part in half)
        assert least <= probe.linear_probe(x, y, x_test, y_test) <= most


def test_the_probe_judges_each_kind_of_absent_things_apart(monkeypatch):
    """The feature tells the present from those with the colour there, and not from those without."""
    kinds = ["present", *probe.ABSENT_KINDS] * 100
    features = torch.tensor([[{"present": 1.0, "colour there": 0.0, "not there": 1.0}[kind]] for kind in kinds])
    monkeypatch.setattr(probe, "states", lambda model, processor, data, number: (features.double(), kinds))
    assert probe.probe(None, None) == {"colour there": 1.0, "not there": 0.5}


def test_the_probe_counts_the_rollouts_that_reject(monkeypatch):
    """Of 64 questions 22 are about present things and 21 about absent ones. One rollout of each says `[]`, of the
    absent a second; what cannot be read is no rejection."""
    processor = Processor(reproduce.ROOT / "assets/tiny")
    a_box = '[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]'
    empty, box, broken = ([SimpleNamespace(tokens=processor.encode(f"<answer>{answer}</answer>"))]
                          for answer in ("[]", a_box, "["))

    def say(model, prompts, longest, u):
        assert (longest, u.shape) == (128, (43, 8, 128)) and len(prompts) == 43
        return [empty + (box if p.example.answer != "[]" else empty) + broken * 6 for p in prompts]
    monkeypatch.setattr(probe, "generate", say)
    assert probe.rejecting(None, processor, "scenes:test", 64) == {"present": 0.125, "absent": 0.25}


def test_the_probe_reads_the_state_after_the_prompt(monkeypatch):
    """The state that the first token of the answer is decided from; the kinds as in by_colour."""
    folder = reproduce.ROOT / "assets/tiny"
    model, processor = load_model(folder), Processor(folder)
    hidden, kinds = probe.states(model, processor, "scenes:test", 64)
    asked = [i for i in range(64) if i % 3 < 2]                    # every third is about counting
    assert [kind == "present" for kind in kinds] == [i % 3 == 0 for i in asked]
    assert set(kinds[1::2]) == set(probe.ABSENT_KINDS)
    records = [{"index": i, "task": "scene_grounding", "question": scenes.make("test", i)["question"], "truth": [],
                "predicted": [] if kind == "colour there" else [{}], "error": None} for i, kind in zip(asked, kinds)]
    assert reproduce.by_colour(records[1::2], "test") == {"N-acc, colour there": 1.0, "N-acc, colour not there": 0.0}
    response, = generate(model, [processor.prompt(load("scenes:test")[4])], 1)[0]
    assert model.logits(hidden[asked.index(4)].float()).argmax() == response.tokens[0]


def test_the_gain_of_every_base_by_hand():
    """Two bases, one of them probed; of three seeds RLVR has two."""
    def of(n_acc, there=0.0, boxes=0.5):
        test = {"N-acc": n_acc, "N-acc, colour there": there, "N-acc, colour not there": 1.0,
                "boxes": boxes}
        return {"rate": 0.001, "metrics": {"test": test, "reasoning-test": test}}
    rows = {"visurf": {42: of(0.75, 0.5), 43: of(1.0, 1.0), 44: of(0.0)}, "rlvr": {42: of(0.0), 43: of(0.5, boxes=1.0)},
            "stage3-visurf": {42: of(0.5)}, "stage3-rlvr": {42: of(0.25)}, "absent5-visurf": {42: of(1.0)}}
    probed = {"accuracy": {"colour there": 0.875, "not there": 1.0}, "rejecting": {"present": 0.25, "absent": 0.125}}
    assert cells(base_table(rows, {"base": probed})) == [
        ["stage3", "1", "+0.250", "+0.000", "+0.000", "–", "–", "–", "–", "0.000", "1.000"],
        ["base", "2", "+0.625", "-0.250", "-0.250", "0.250", "0.125", "0.875", "1.000", "0.500 ± 1.242",
         "1.000 ± 0.000"]]


def test_the_families_by_hand():
    """Two families, one seed of one of them missing; the base is one result, taken from every seed."""
    def of(**test):
        return {"rate": 0.001, "metrics": {"test": test, "val": test}}
    results = {"gui-base": {0.0: {42: of(**{"boxes": 0.25, "thinks, present": 1.0})}},
               "sums-base": {0.0: {42: of(answers=0.5, **{"up to nine": 0.75, "above nine": 0.0})}},
               "gui-visurf": {0.001: {42: of(**{"boxes": 0.75, "thinks, present": 0.5})}},
               "sums-visurf": {0.001: {42: of(answers=0.75), 43: of(answers=1.0)}},
               "anomaly-visurf": {0.001: {43: of(**{"boxes": 1.0, "N-acc": 0.5})}}}
    made = tables(results)
    none = ["–"] * 3
    #        reasoning, gui, anomaly, lesion, sums, mean of all, the two parts of anomaly and those of sums
    assert cells(made["families"]) == [
        ["base", "–", "1", "–", "0.250", "–", "–", "0.500", *none, "0.750", "0.000"],
        ["visurf", "–", "2", "–", "0.750", "0.750", "–", "0.875", "–", "0.500", "1.000", "–", "–"]]
    gain = ["visurf", "–", "2", "–", "+0.500", "–", "–", "+0.375", *none, "–", "–"]
    assert cells(made["families-gain"]) == [gain]
    assert cells(made["families-thinks"])[1][4] == "0.500" and cells(made["main"]) == []
    assert [(family_of(name), base_of(name) == str(reproduce.ROOT / "assets/tiny")) for name in (
        "visurf", "sum", "lesion-sft")] == [("", True), ("", True), ("lesion", True)]


def test_a_familys_base_is_trained_once(tmp_path, monkeypatch):
    calls = []

    def call(script, *flags):
        calls.append(flags)
        run = tmp_path / "runs/reproduce-anomaly-pretrained"
        (run / f"checkpoints/step_{reproduce.PRETRAINED['anomaly'][1]}").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"config": {"steps": reproduce.PRETRAINED["anomaly"][1]}}))
    monkeypatch.setattr(reproduce, "call", call)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    first, second = base_of("anomaly-rlvr"), base_of("anomaly-visurf")
    assert first == second and Path(first).is_dir() and len(calls) == 1
    train.parse_config(list(calls[0][2:])).check(1)


def test_a_stopped_training_gives_no_result(tmp_path, monkeypatch):
    """train.py ends without an error then."""
    def call(script, *flags):
        run = tmp_path / "runs/reproduce-visurf-0.001-43-1"
        (run / "checkpoints/step_31").mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps({"config": {"steps": 400}}))
    monkeypatch.setattr(reproduce, "call", call)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    for _ in ("stopped", "stopped again"):
        with pytest.raises(SystemExit, match="visurf-0.001-43-1 was stopped before its last step"):
            reproduce.make("visurf", 0.001, 43)
    assert not (tmp_path / "results").exists()


def test_policies_that_look_at_nothing():
    nothing, everything = (answer_blindly(response, "pair-test") for response in POLICIES.values())
    assert (nothing["N-acc"], nothing["T-acc"], nothing["boxes"]) == (1.0, 0.0, 0.0)
    assert (everything["N-acc"], everything["T-acc"]) == (0.0, 1.0) and everything["boxes"] < 0.05


def matches(said: str, mean: float, half: float) -> bool:
    """Whether a sentence's "a" or "a ± b" is this: as it is, in points, or as the rest to 1. A
    number of a table has three decimals."""
    def same(text: str, value: float) -> bool:
        digits = len(text.partition(".")[2])
        return abs(abs(float(text)) - value) <= 0.5 * 10 ** -digits + (1e-9 if value < 1 else 0.05)
    a, _, b = said.partition(" ± ")
    return any(same(a, abs(value)) and (not b or same(b, scale * half))
               for scale, value in ((1, mean), (100, 100 * mean), (100, 100 * (1 - abs(mean)))))


INTERVAL = r"[+-]?\d+(?:\.\d+)? ± \d+(?:\.\d+)?"


def numbers(cell: str) -> tuple[float, float]:
    mean, _, half = cell.partition(" ± ")
    return float(mean), float(half or 0)


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_of_a_sentence_is_in_a_table(page):
    """A new seed changes the tables, and a sentence is soon forgotten."""
    in_tables = {numbers(cell) for made in all_tables().values()
                 for cell in re.findall(INTERVAL, made)}
    text = (reproduce.ROOT / page).read_text()
    sentences = re.sub("<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    said = re.findall(INTERVAL, re.sub(r"\s+", " ", sentences))
    assert said or page in ("README.md", "experiments/final.md", "experiments/photos.md")
    assert not [one for one in said if not any(matches(one, *cell) for cell in in_tables)]


def test_a_number_with_a_place_is_what_stands_there():
    """`0.970 ± 0.012<!--main/sft/N-acc-->`: table, row and column of a number of a sentence."""
    made, found = all_tables(), 0
    for page in PAGES:
        text = re.sub(r"\s*\n\s*", " ", (reproduce.ROOT / page).read_text())
        for said, place in re.findall(rf"({INTERVAL}|\d+\.\d+)<!--(\S.*?)-->", text):
            name, row, column = place.split("/")
            columns = [title.strip() for title in made[name].splitlines()[0].split("|")[1:-1]]
            [cell] = [line[columns.index(column)] for line in cells(made[name]) if line[0] == row]
            assert matches(said, *numbers(cell)), f"{page}: {said} is {cell} in {place}"
            found += 1
    assert found > 20


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_command(name):
    for stage in EXPERIMENTS[name]:
        train.parse_config(stage).check(1)


def test_the_tables_of_the_pages_are_what_the_results_say():
    made = all_tables()
    for page in (reproduce.ROOT / name for name in PAGES):
        assert fill(page.read_text(), made) == page.read_text(), f"python experiments/reproduce.py tables renews {page}"


def test_a_part_of_the_gpu_script_goes_on_after_a_line_that_fails(tmp_path, monkeypatch):
    """A token step and the training of the part 7B, in tiny shapes; one line of training runs out of memory."""
    plain, file = gpu.training, tmp_path / "7B.json"

    def training(lines, *args):
        assert json.loads(file.read_text())["unfinished"]
        if args[-1] == "cheap":
            raise torch.OutOfMemoryError("out of memory")
        plain(lines, *args)
    training.__name__ = "training"
    monkeypatch.setattr(gpu, "training", training)
    monkeypatch.setattr("gc.collect", int)          # before each of 30 measurements; it takes longer than they do
    monkeypatch.setattr("sys.argv", ["gpu.py", "7B", str(file), "--tiny"])
    gpu.main()
    record = json.loads(file.read_text())
    assert "unfinished" not in record and record["machine"] == "CPU"
    steps, trained = record["lines"][:2], record["lines"][2:]
    for line in steps:          # 16 prompts × 2 rollouts a step, all as plain: a CPU has no graphs
        assert line["tokens_per_s"] == pytest.approx(32_000 / line["ms"]) and line["same_tokens"] == 1
    assert [line["setting"].endswith(", graphs") for line in steps] == [False, True]
    assert ["failed" in line for line in trained] == [False, True, False, False, True]
    assert trained[1]["failed"] == "OutOfMemoryError: out of memory" and "cheap" in trained[1]["setting"]
    one, two = trained[0], trained[3]       # as much work for each row: 64 tokens and 3 × 8
    for line, rows in ((one, 1), (two, 2)):
        assert line["useful_tokens_per_s"] * line["seconds"] == pytest.approx(88 * rows)
    assert two["mfu"] * two["seconds"] == pytest.approx(2 * one["mfu"] * one["seconds"])


@pytest.mark.skipif(not shutil.which("timeout"), reason="gpu.sh needs timeout")
def test_the_gpu_script_leaves_out_what_is_done(tmp_path):
    """A python that ends every part but 7B, which is killed once."""
    (tmp_path / "python").write_text(
        '#!/bin/bash\necho "$2 $4" >> "$FOLDER/calls"\n'
        'if [[ $2 == 7B && ! -e $FOLDER/killed ]]; then touch "$FOLDER/killed"; kill -9 $$; fi\necho "{}" > "$3"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}
    command = ["bash", str(Path(gpu.__file__).with_suffix(".sh")), str(tmp_path / "out"), "--tiny"]
    for began in (list(gpu.PARTS), ["7B"], []):
        (tmp_path / "calls").write_text("")
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / "calls").read_text().split("\n")[:-1] == [f"{part} --tiny" for part in began]
        written = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()}
        assert written.keys() == set(gpu.PARTS)
        assert (written["7B"].get("unfinished") == "it did not start") == (len(began) > 1)
