"""The arithmetic of experiments/reproduce.py, and that every experiment is a command that train.py takes."""
import math

import pytest

import train
from experiments.reproduce import EXPERIMENTS, interval, tables


def result(n_acc: float) -> dict:
    return {"metrics": {"scenes:test": {"N-acc strict": n_acc, "T-acc": 1.0}}}


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)       # t of 2 degrees, s = 1
    assert interval([0.5])[0] == 0.5 and math.isnan(interval([0.5])[1])


def test_tables_by_hand():
    printed = tables({"visurf": {1: result(0.9), 2: result(0.8), 3: result(0.7)},
                      "rlvr": {1: result(0.1), 2: result(0.2)}, "base": {1: result(0.0)}}, "scenes:test")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert ["visurf", "3", "0.800 ± 0.248", "1.000 ± 0.000", "–", "–", "–", "–"] in rows
    assert ["base", "1", "-0.900", "+0.000", "–", "–", "–", "–"] in rows
    assert ["rlvr", "2", "-0.700 ± 1.271", "+0.000 ± 0.000", "–", "–", "–", "–"] in rows        # −0.8 and −0.6
    assert [row[0] for row in rows].count("visurf") == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_command(name):
    for stage in EXPERIMENTS[name]:
        train.parse_config(stage).check(1)
