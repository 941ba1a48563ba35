"""The arithmetic of experiments/photos.py, and that its stages are commands that train.py takes."""
import json

import pytest

import train
from experiments import photos as plan

PRESENT = [{"bbox_2d": [0, 0, 9, 9], "point_2d": [4, 4]}]
FOUND = {"predicted": PRESENT, "truth": PRESENT, "response": "<answer>[…]</answer>"}
TRAILING = FOUND | {"response": "<answer>[…]</answer> and more"}
MISSED = FOUND | {"predicted": []}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results; a function that puts one there."""
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    return lambda own, kind, **metrics: (tmp_path / f"{own}.json").write_text(json.dumps(
        {"kind": kind, "seconds": 9, "metrics": metrics}))


def test_the_sign_flip_test_by_hand():
    # Of the eight signs of (1, 2, 4) the sum is 7 once; of (−1, 2, 4) it is 5 or more twice.
    assert plan.flips([1, 2, 4]) == 1 / 8 and plan.flips([-1, 2, 4]) == 2 / 8
    assert plan.flips([-1, -2, -4]) == 1
    # Above the margin of 3: (−2, −1, 1) sums to −2, which six of eight reach (4, 2, 0, 2, −2 …).
    assert plan.flips([1, 2, 4], 3) == sum(
        a * -2 + b * -1 + c >= -2 for a in (1, -1) for b in (1, -1) for c in (1, -1)) / 8
    assert plan.flips([0.1] * 12) == 1 / 4096


def test_what_refutes_is_an_upper_limit():
    twelve = [0.01] * 6 + [0.02] * 6
    assert plan.below(twelve, 0.0201) and not plan.below(twelve, 0.015) and not plan.below(twelve, 0)
    assert plan.below([-0.02] * 12, -0.01) and not plan.below([-0.02] * 4, -0.01)       # 1 / 16 is above 2.5 %


def test_holm_stops_at_the_first_that_fails():
    p = {"a": 0.004, "b": 0.03, "c": 0.011, "d": 0.001}
    assert plan.holm(p) == {"d": True, "a": True, "c": True, "b": False}    # .00625 .0083 .0125 .025
    assert plan.holm(p | {"c": 0.0126}) == {"d": True, "a": True, "c": False, "b": False}


def test_the_operations_of_a_step_by_hand():
    tower, language = 42.4e6, 657_024
    assert plan.flops(0, 85) == 6 * (tower + 85 * language)                             # nothing is sampled
    assert plan.flops(200, 150, 0.5, 50) == 2 * (tower + 250 * language) + 6 * (tower / 2 + 150 * language)


def test_the_compute_of_steps_by_hand():
    """300 steps as in the plan's table have the compute of one run; a step that trains on nothing has that of sampling."""
    step = {"seconds": 3.0, "seconds_data": 0.5, "seconds_sampling": 0.5, "sampling_tokens_per_s": 16 * 2 * 233.3,
            "training_tokens_per_s": 16 * 291.9 / 2, "tied": 0.031}
    assert plan.compute([step] * 300) == pytest.approx(1)
    idle = {key: value for key, value in step.items() if key != "training_tokens_per_s"} | {"tied": 1.0}
    assert plan.compute([idle] * 300) == pytest.approx(plan.flops(233.3, 0, 0) / plan.flops(233.3, 291.9, 0.969))


def test_the_runs_have_the_compute_of_the_trials_of_sft():
    trials = plan.read("tune")
    share = {arm: [sum(both) / 2 for both in zip(*(trials[plan.name(arm, "tune", *plan.chosen(arm), seed)]["compute"]
                                                   for seed in plan.TUNING))] for arm in plan.TRIALS}
    for arm, (*before, last) in share.items():
        steps = int(plan.stages(arm, *plan.chosen(arm))[-1][-1])
        assert plan.RUN_STEPS[arm] == round(steps * (sum(share["sft"]) - sum(before)) / last)
    assert plan.EIGHT == {arm: round(steps * plan.RUN_STEPS[arm] / plan.STEPS[arm])
                          for arm, steps in (("visurf", 176), ("rlvr", 272))}


def test_what_is_measured_by_hand():
    metrics = {"": {"N-acc": 0.6, "T-acc": 0.9, "boxes": 0.5, "answers": 0.8},
               "new-": {"N-acc": 0.3, "T-acc": 0.6, "boxes": 0.4},
               "colour-": {"answers": 0.5}, "left-": {"boxes": 0.2}}
    for key in ("thinks, present", "thinks, absent", "trailing text, present", "trailing text, absent"):
        metrics[""][key] = metrics["new-"][key] = 0.0
    records = [FOUND, MISSED, FOUND, TRAILING, MISSED, FOUND, MISSED]
    made = plan.measures(metrics, records, "08-1375")
    # 768 absent named garments to 384 absent new ones; of the base's 1, 3, 7 and 5 of eight one of four.
    assert (made["absent"], made["T-acc"]) == (0.5, 0.8)
    assert (made["dead"], made["mastered"], made["hard"]) == (1.0, 0.0, 0.25)
    assert (made["new"], made["kept"]) == (0.4, 0.5)
    assert made["primary"] == round((0.5 + 0.4 + 0.25 + 0.5) / 4, 4)
    with pytest.raises(ValueError):
        plan.measures(metrics, records, "08-137")


def test_every_arm_has_eight_trials_and_every_stage_is_a_command(results):
    with pytest.raises(SystemExit, match=r"rlvr has no trials yet .* python experiments/photos.py tune"):
        plan.chosen("rlvr")
    for arm, settings in plan.TRIALS.items():
        assert len({*settings}) == 8
        for k, (setting, seed) in enumerate((s, seed) for s in settings for seed in plan.TUNING):
            results(plan.name(arm, "tune", *setting, seed), "tune", primary=k % 7 / 7)
    jobs = [*(job for arm in plan.TRIALS for job in plan.trials(arm)), *plan.runs("run"), *plan.runs("asides")]
    names = [job[1] for job in jobs]
    assert len({*names}) == len(names) == 80 + 120 + 18
    again = plan.runs("again")
    assert [job[1] for job in again] == ["again-rlvr-1-640-43", "again-visurf-1-6400-45", "again-sft-rlvr-1-640-44"]
    assert all(("run", own.removeprefix("again-"), *rest) in jobs for _, own, *rest in again)
    for _, _, _, budget, _, stages, _ in jobs:
        for stage in stages:
            cfg = train.parse_config(["--data", f"photos:train{budget}", *plan.COMMON, *stage])
            assert cfg.method in plan.STEPS and cfg.rollouts in (4, 8) and cfg.steps > 0
    # Over both seeds k % 7 is highest at k = 12 and 13, the seventh setting.
    assert plan.chosen("visurf") == (2e-3, 1e-3) and plan.chosen("sft-rlvr") == (1e-3, 0.05)
    table = plan.trials_table().splitlines()
    assert table[3] == "| rlvr | 0.357 / 0.071 | 0.429 / 0.643 | 0.500 / 0.214 | 0.071 / 0.786 | 0.002, 0.001 |"
    assert table[6] == ("| sft-rlvr | – / 0.071 / – | 0.214 / 0.357 / 0.500 | 0.786 / 0.643 / 0.071 | – / 0.429 / – | "
                        "0.001, 0.05 |")
    [[*first], [*second]] = plan.stages("sft-rlvr", 2e-3, 0.4)
    assert first[-1] == str(round(0.4 * plan.STEPS["sft"])) and first[1] == "sft"
    assert second[-1] == str(round(0.6 * plan.STEPS["rlvr"])) and second[1] == "rlvr"


def test_the_verdicts_by_hand(results):
    """Every arm is the same for all bases and seeds, so that p is 1 / 4,096 where a margin is
    exceeded and 1 where it is missed."""
    level = {"sft": 0.5, "rlvr": 0.6, "sft-rlvr": 0.65, "visurf": 0.7, "sgrpo": 0.705}
    for budget in plan.BUDGETS:
        for arm, primary in level.items():
            fewer = 0.02 if budget == 640 and arm == "sft" else 0
            for base in plan.BASES:
                for seed in plan.SEEDS:
                    results(plan.name(arm, base, budget, seed), "run", primary=primary - fewer,
                            hard=0.4, kept=0.9 - (arm == "visurf") * 0.03, **dict.fromkeys(
                                ("absent", "new", "dead", "mastered", "T-acc"), 0.5))
    found = plan.verdicts(plan.read("run"))
    differences = {own[:2]: round(values[0], 6) for own, (values, *_) in found.items()}
    assert differences == {"H1": 0.05, "H2": -0.005, "H3": 0.02, "H4": 0.0, "H5": -0.03}
    p = {own[:2]: p for own, (_, p, _) in found.items()}
    assert p == {"H1": 1 / 4096, "H2": 1 / 4096, "H3": 1 / 4096, "H4": 1 / 4096, "H5": 1}
    # The upper limits: 0.05 is not below 0.02; −0.03 is below −0.02.
    assert [refuted for *_, refuted in found.values()] == [False, False, False, False, True]
    assert list(found)[0] == "H1 ViSurf above sft-rlvr"
    made = plan.tables(plan.read("run"))
    assert made["photos-verdicts"].count("| yes | no |") == 4 and made["photos-verdicts"].count("| no | yes |") == 1
    assert made["photos-verdicts"].count("; 640 labels |") == 5 == made["photos-verdicts"].count("| – | – |") - 1
    assert "| +0.050, +0.050, +0.050 | 0.0002 |" in made["photos-verdicts"]
    assert "| kept: above SFT (a side of H5) | -0.030 ± 0.000 | -0.030, -0.030, -0.030 | 1.0000 | – | – |" in made["photos-verdicts"]
    assert "| visurf | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.400 ± 0.000 | 0.870 ± 0.000 |" in made["photos-6400"]
    assert made["photos-first"].splitlines()[0::2] == [
        "| | base | sft | rlvr | visurf | sgrpo | sft-rlvr |",
        "| primary, 6,400 labels | – | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.705 ± 0.000 | 0.650 ± 0.000 |"]
    assert made["photos-short"].splitlines()[2].startswith("| primary, 640 labels | – | 0.480 ± 0.000 | 0.600 ± 0.000 |")
    # Where the runs fall into two groups their mean stays, and the parts show the groups.
    for seed in plan.SEEDS[:2]:
        results(plan.name("visurf", "1", 6400, seed), "run", primary=0.3, **dict.fromkeys(
            ("absent", "new", "hard", "kept", "dead", "mastered", "T-acc"), 0.1))
    made = plan.tables(plan.read("run"))
    assert " | 0.633 ± 0.099 | " in made["photos-first"] and "| 0.100 in 2 of 12, else 0.500 |" in made["photos-6400"]
    (plan.RESULTS / f"{plan.name('visurf', '1', 6400, 42)}.json").unlink()      # before all are there
    made = plan.tables(plan.read("run"))
    assert made["photos-verdicts"].count("\n") == 1 and "visurf" not in made["photos-6400"]
    assert "| – | 0.705 ± 0.000 |" in made["photos-first"] and "| visurf | " in made["photos-640"]


def test_the_questions_beside_the_hypotheses_have_their_rows(results):
    results("visurf-seq-sum-boxing-42", "aside", absent=0.25, primary=0.5)
    results("visurf-seq-sum-boxing-43", "aside", absent=0.75, primary=0.5)
    results("visurf-seq-mean-boxing-43", "aside", absent=0.25, primary=0.5)             # half of its row
    for base, eight in (("1", 0.6), ("2", 0.7), ("3", 0.8)):
        for seed in (42, 43):
            results(f"rlvr-8-{base}-{seed}", "aside", primary=eight)
            results(f"rlvr-{base}-6400-{seed}", "run", primary=0.5)
    results("rlvr-1-6400-44", "run", primary=0.9)           # no aside has this seed
    made = plan.tables(plan.read("run"))
    assert made["photos-normalisers"].splitlines()[2:] == ["| seq-sum | 0.500 | – | – | – | – | 0.500 |"]
    assert made["photos-rollouts"].splitlines()[2:] == [
        "| rlvr, 4 | – | – | – | – | – | 0.500 ± 0.000 |", "| rlvr, 8 | – | – | – | – | – | 0.700 ± 0.094 |"]


def test_a_run_that_was_made_again_stands_below_the_first(results):
    results("again-rlvr-1-640-43", "again", absent=0.25, kept=0.5)
    assert plan.tables(plan.read("run"))["photos-again"].count("\n") == 1      # not without the first
    results("rlvr-1-640-43", "run", absent=0.5)
    assert plan.tables(plan.read("run"))["photos-again"].splitlines()[2:] == [
        "| rlvr-1-640-43 | 0.500 | – | – | – | – | – | – |", "| again-rlvr-1-640-43 | 0.250 | – | – | – | – | – | 0.500 |"]


def test_the_bases_stand_beside_the_arms(results):
    for base, absent in (("1", 0.0), ("2", 0.02), ("3", 0.04)):
        results(f"base-{base}-final", "final", absent=absent, primary=0.5, **dict.fromkeys(("new", "hard", "kept", "T-acc"), 1))
    assert "| base | 0.020 ± 0.050 | 1.000 ± 0.000 |" in plan.tables({})["photos-640"]
    assert plan.tables({})["photos-first"].endswith("| primary, 6,400 labels | 0.500 ± 0.000 | – | – | – | – | – |")


def test_what_the_runs_know_has_a_row_for_each_arm(results):
    for base, told in (("1", 0.5), ("2", 0.6), ("3", 0.7)):
        results(f"known-visurf-{base}", "known", **{"N-acc, colour there": told, "T-acc": 1.0})
    for path in plan.RESULTS.iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": {"colour there": 0.6, "not there": 0.8}}))
    assert plan.tables({})["photos-known"].splitlines()[2:] == [
        "| visurf | 0.600 ± 0.248 | – | 1.000 ± 0.000 | 0.600 ± 0.000 | 0.800 ± 0.000 | – |"]


def test_the_strata_of_a_base_by_hand():
    base = {"right": {"final": {"": "-08-1-7-4"}}}
    shares = [plan.BASE_COLUMNS[f"share {own}"](base) for own in ("dead", "hard", "mastered")]
    assert shares == [0.2, 0.6, 0.2]
