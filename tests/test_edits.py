"""docs/edits.md: each diff is small, trains, and does what its name says; each command is one that train.py takes."""
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port
from test_house import SEVEN
from test_objective import SPLITS, check_splits, summed
from test_train import SMALL, apply_diff

import objective
import train

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/edits.md").read_text()
EDITS = {}
for section in PAGE.split("\n### ")[1:]:
    [diff], [flags] = re.findall(r"```diff\n(.*?)```", section, re.S), re.findall(r"^    torchrun train\.py(.*)", section, re.M)
    EDITS[section.splitlines()[0]] = diff, flags.split()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Applies a diff to a copy of the seven scripts, and returns its train.py and objective.py as modules."""
    def build(name: str):
        for script in SEVEN:
            shutil.copy(ROOT / f"{script}.py", tmp_path)
            monkeypatch.delitem(sys.modules, script, raising=False)
        hunks = apply_diff(EDITS[name][0], tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        modules = [importlib.import_module(script) for script in ("train", "objective")]
        assert all(Path(module.__file__).parent == tmp_path for module in modules)
        return *modules, hunks
    return build


def git_apply(diff: str, folder: Path) -> None:
    """Applies a diff to a copy of the seven scripts as a reader does, with the lines around it where they are today."""
    folder.mkdir()
    for script in SEVEN:
        shutil.copy(ROOT / f"{script}.py", folder)
    done = subprocess.run(["git", "apply", "-"], input=diff, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_diff_of_the_readme_can_be_applied(tmp_path):
    [diff] = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    git_apply(diff, tmp_path / "by_git")
    assert "cfg.label_nll" in (tmp_path / "by_git/objective.py").read_text()


def two_steps(script, folder: Path, monkeypatch, *flags: str) -> list[dict]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(ROOT / "assets/tiny"), *SMALL, "--steps", "2",
                                      "--name", "a", *flags])
    script.main()
    return [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_and_does_not_depend_on_the_split(tmp_path, edited, one_rank, monkeypatch, name):
    diff, flags = EDITS[name]
    script, edited_objective, hunks = edited(name)
    git_apply(diff, tmp_path / "by_git")
    assert all((tmp_path / "by_git" / file).read_text() == (tmp_path / file).read_text() for file in hunks)
    assert sum(hunks.values()) <= 2 and sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in diff.splitlines()) <= 12
    cfg = script.parse_config([*flags, "--steps", "4"])
    with_y = ["--method", "visurf"] if cfg.method == "rlvr" else []     # of random weights all rollouts earn the same
    steps = two_steps(script, tmp_path / "edited", monkeypatch, *flags, *with_y)
    assert len(steps) == 2
    for line in steps:      # GSPO's bounds are so narrow that the last of the inner epochs is all clipped
        assert math.isfinite(line["loss"]) and (line["grad_norm"] > 0 or line["clipped_rollouts"] == line["clipped_y"] == 1)
    check_splits(edited_objective.loss, cfg)
    if "overlong penalty" in name:
        assert all("o/overlong" in line for line in steps)
    else:
        ours, plain = (summed(loss, cfg, SPLITS["one forward"])["by logp"] for loss in (edited_objective.loss, objective.loss))
        assert (ours - plain).abs().max() > 1e-3, "the edit changes nothing"
    if "decaying" in name:      # the same first step, and half of y's weight in the second
        without = two_steps(train, tmp_path / "without", monkeypatch, "--method", "sum")
        assert [a["sft_weight"] / b["sft_weight"] for a, b in zip(steps, without)] == pytest.approx([1, 0.5])


@pytest.mark.parametrize("name", [None, "GSPO", "CISPO", "Truncated importance sampling"])
def test_at_ratio_one_these_are_grpo(edited, name):
    """None: clip-higher. The gradient is GRPO's where ρ = 1 and the sampler is exact, and another elsewhere."""
    script, other, flags = (train, objective, ["--clip-high", "0.28"]) if name is None else (*edited(name)[:2], EDITS[name][1])
    cfg, plain = script.parse_config([*flags, "--method", "rlvr"]), train.parse_config(["--method", "rlvr", "--normaliser", "seq-mean"])
    cfg.normaliser = "seq-mean"
    for moved, same in ((0.0, True), (0.3, False)):
        ours, grpo = (summed(loss, options, SPLITS["one forward"], moved)["by logp"] for loss, options in ((other.loss, cfg), (objective.loss, plain)))
        assert torch.allclose(ours, grpo, rtol=1e-12, atol=1e-12) is same and grpo.abs().max() > 1e-2


def test_k1_in_the_reward_has_the_gradient_of_k2(edited):
    found = []
    for name in ("KL: k1", "KL: k2"):
        script, other, _ = edited(name)
        found.append(summed(other.loss, script.parse_config(["--kl", "0.5"]), SPLITS["one forward"], 0.0)["by logp"])
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], summed(objective.loss, train.Config(kl=0.5), SPLITS["one forward"], 0.0)["by logp"])


def test_the_flags_of_the_table_are_options():
    commands = re.findall(r"`(--[^`]+)`", PAGE.split("\n###")[0])
    for flags in [c.split() for c in commands if " " in c]:
        train.parse_config(flags).check(1)
    assert len(EDITS) == PAGE.count("```diff") >= 9 and len(PAGE.split()) <= 1200
