"""A newcomer's mistakes: one sentence each, as the last thing on the screen."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import free_port

import eval as evaluation
import train
from data import load
from support.mistakes import Mistake

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch, one_rank):
    """An empty current folder with some things that are not what they seem."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/taken/checkpoints/step_2").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/step_2/state.json"):
        (tmp_path / "runs/taken" / name).write_text("")
    (tmp_path / "runs/taken/checkpoints/step_2/config.json").write_text('{"model_type": "qwen2_5_vl"}')     # the model's
    (tmp_path / "runs/taken/checkpoints/step_2_backup").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    row = {"image": "a.png", "problem": "x", "task": "grounding"}
    for name, solution in (("three", [{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]), ("none", None),
                           ("outside", [{"bbox_2d": [1, 2, 60, 20], "point_2d": [5, 5]}])):
        line = row if solution is None else row | {"solution": json.dumps(solution)}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


MISTAKES = [
    ("train", "--stepz 3", r"--stepz: did you mean --steps\?"), ("train", "--method vsurf", r"invalid choice: 'vsurf'.*did you mean visurf\?"),
    ("train", "--steps x", "--steps: invalid int value: 'x'"), ("train", "--steps 0", "--steps 0: must be at least 1"),
    ("train", "--max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
    ("train", "--lr -1", "--lr -1.0: .*above 0"), ("train", "--lr 1e38", "--lr 1e.38: must be at most 1e.30"),
    ("train", "--keep -1", "--keep -1: must be at least 0"), ("train", "--lr inf", "--lr inf: .* finite"),
    ("train", "--prompts-per-step 0", "--prompts-per-step 0: must be at least 1"),
    ("train", "--temperature nan", "--temperature nan: must be a finite number"),
    ("train", "--eval-examples -3", "--eval-examples -3: must be at least 0"),
    ("train", "--cooldown 1.5", "--cooldown 1.5: must be at most 1"),
    ("train", "--name ../../x", "--name ../../x: must be a folder's name"), ("train", "--name ..", "--name"),
    ("train", "--preset papr", "invalid choice: 'papr'"), ("train", "--resume runs/x", "--resume runs/x: there is no "),
    ("train", "--resume runs/taken/checkpoints/step_2", "runs/taken/config.json is not JSON.* the options of the run are not known"),
    ("train", "--resume runs/taken/checkpoints/step_2_backup", "goes on from a folder checkpoints/step_N"),
    ("train", "--resume runs/x --lr 3", "--resume runs/x: there is no "),
    ("train", "--name taken --eval-data=", "runs/taken exists and is not overwritten"),
    ("train", "--learning-rate 1", r"--learning-rate: did you mean --lr\?"),
    ("train", "--model nowhere", "--model nowhere: there is no such folder, and it is no hub id"),
    ("train", "--model own/er", "--model own/er: there is no such folder, and the hub does not give it"),
    ("train", "--model empty", "--model empty: empty has no config.json"),
    ("train", "--model broken/config.json",
     "--model broken/config.json: this is a file; give the folder of the model"),
    ("train", "--model broken", "broken/config.json is not JSON"),
    ("train", "--model begun", "begun holds no checkpoint yet"),
    ("train", "--data nowhere.jsonl", "--data nowhere.jsonl: there is no such file"),
    ("train", "--data nowhere", "--data nowhere: give scenes:SPLIT"),
    ("train", "--data broken/config.json",
     "--data broken/config.json: a file must be .jsonl, .* a JSON list becomes lines by jq"),
    ("train", "--data scenes:x", "scenes:x does not exist"),
    ("train", "--data three.jsonl", r"three.jsonl, row 1: bad label: item 1: bbox_2d must be 4 numbers, it is \[1, 2, 3\]"),
    ("train", "--data none.jsonl", "none.jsonl, row 1: no answer: none of the columns"),
    ("train", "--data outside.jsonl", r"outside.jsonl, row 1: the box \[1, 2, 60, 20\] leaves the picture of 40×30"),
    ("train", "--data scenes:test --columns answer", "--columns answer: 'answer' cannot be; give FIELD=NAME"),
    ("train", "--data outside.jsonl --max-row-tokens 9", "outside.jsonl, row 1: "),
    ("train", "--eval-data three.jsonl", r"three.jsonl, row 1: bad label"),
    ("train", "--eval-data outside.jsonl --columns answer=truth", "row 1: no answer: none of the columns truth holds one"),
    ("train", "--data=", "--data : must name what is trained on"),
    ("eval", "--model assets/tiny --image a.png --question <image>,<image>", "--question: the question names 2 picture.s. by <image>, and has 1"),
    ("eval", f"--model assets/tiny --image a.png --question {'x' * 20_001}", "--question: the question has more than 20,000"),
    ("train", "--seed -1", "--seed -1: must be at least 0"), ("train", f"--seed {10**30}", "--seed 1000.*: must be at most 92"),
    ("train", f"--steps {10**30}", "must be at most"), ("train", f"--name {'x' * 300}", "a name of at most 200 bytes"),
    ("train", "--name a\x1b[2Jb", "without control characters"),
    ("train", "--smoothing false", "--smoothing takes no value; its opposite is --no-smoothing"),
    ("train", "--smoothing=false", "--smoothing takes no value; its opposite is --no-smoothing"),
    ("train", "--no-smoothing 1", "--no-smoothing takes no value; its opposite is --smoothing"),
    ("train", "--lora-alpha 64", "--lora-alpha 64.0: belongs to --lora-rank"),
    ("train", "--lora-targets visual.blocks", "--lora-targets visual.blocks: belongs to --lora-rank; without it all learns"),
    ("train", "--keep-best boxes --eval-every 2 --save-every 3", "--keep-best boxes: needs a checkpoint of each evaluation"),
    ("train", "--method sgrpo --no-smoothing", "--no-smoothing: sgrpo has no smoothing"),
    ("train", "--method rlvr --label-style compact", "--label-style compact: rlvr has no label"),
    ("train", "--method sft --reward-label-thinking", r"--reward-label-thinking: sft does not use r\(y\)"),
    ("train", "--method grpo", r"did you mean rlvr \(GRPO\)\?"), ("train", "--precision fp16", r"did you mean bfloat16\?"),
    ("train", "--batch-size 8", "--batch-size: --prompts-per-step is the batch"),
    ("train", "--per_device_train_batch_size 8", "--per_device_train_batch_size: --prompts-per-step is the batch"),
    ("train", "--device cuda", "--device: .*CUDA_VISIBLE_DEVICES chooses"), ("train", "--wandb", "--wandb: metrics.jsonl"),
    ("train", "--nproc-per-node 2", "--nproc-per-node: an option of torchrun stands before the script"),
    ("train", "--nproc_per_node=2", "--nproc_per_node: an option of torchrun stands before the script"),
    ("train", "--prompts_per_step 2", r"--prompts_per_step: did you mean --prompts-per-step\?"),
    ("train", "--resume taken", r"--resume taken: there is no taken/config.json; did you mean runs/taken\?"),
    ("train", "--model taken", r"--model taken: there is no such folder, .*; did you mean runs/taken\?"),
    ("eval", "--model taken", r"did you mean runs/taken\?"), ("eval", "--batch-size 8", "unrecognized arguments: --batch-size"),
    ("eval", "--model empty", "empty has no config.json"), ("eval", "--modle x", "did you mean --model"),
    ("eval", "--model assets/tiny --limit -1", "--limit -1: must be at least 0"),
    ("eval", "--model assets/tiny --image b.png", "--image b.png: the image cannot be read"),
    ("eval", "--model assets/tiny --image empty", "--image empty: .*is a folder"),
    ("eval", "--model assets/tiny --image http://x.org/a.png", "--image http://.*is an address"),
    ("eval", "--model assets/tiny --data none.jsonl --columns answer=truth", "none of the columns truth holds one"),
    ("eval", "--model assets/tiny --image a.png --question=", "--question is empty"),
    ("eval", "--data scenes:test", "--model is missing"),
    ("eval", "--model assets/tiny --data scenes:test --masks empty", "scenes:test has no column mask"),
    ("eval", "--model assets/tiny --precision float16", "--precision: invalid choice"),
    ("eval", "--model assets/tiny --question x", "--question needs the picture"),
]


@pytest.mark.parametrize("script, flags, sentence", MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_one_sentence(place, monkeypatch, script, flags, sentence):
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    with pytest.raises(Mistake, match=sentence) as mistake:
        (train if script == "train" else evaluation).main()
    assert "\n" not in str(mistake.value) and len(str(mistake.value)) < 500
    assert sorted(place.rglob("*")) == before, "a mistake left something behind"


@pytest.mark.parametrize("make", [lambda: Path("runs").write_text(""), lambda: Path("runs").mkdir(mode=0o500)])
def test_runs_that_cannot_be_written(place, monkeypatch, make):
    shutil.rmtree("runs")
    make()
    if os.access("runs", os.W_OK) and Path("runs").is_dir():
        pytest.skip("this user may write anywhere")
    monkeypatch.setattr(sys, "argv", ["train.py", "--eval-data", ""])
    with pytest.raises(Mistake, match="runs/.* cannot be made: "):
        train.main()


def test_resume_takes_what_does_not_change_the_run(place):
    run = place / "runs/a"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": {"lr": 1e-4, "steps": 7, "rollouts": "5", "no_thinking_reward": False, "image_cache": 8.0,
                                                            "cooldown_steps": 3, "checkpoint_activations": True}}))
    options = train.parse_config(["--resume", str(run), "--steps", "9", "--eval-every", "5", "--lr", "1e-4"])
    assert (options.steps, options.lr, options.reward_label_thinking) == (9, 1e-4, True)     # of an earlier version, too
    assert options.cooldown == pytest.approx(3 / 7) and options.rollouts == 5 and options.checkpoint_activations == "blocks"
    with pytest.raises(Mistake, match="--lr 0.01 would make another run of it.* train.py --model .*runs/a --lr 0.01"):
        train.parse_config(["--resume", str(run), "--lr", "0.01"])


def test_what_would_make_another_run_is_shown_as_flags(place):
    (place / "runs/b").mkdir()
    (place / "runs/b/config.json").write_text(json.dumps({"config": {"lr": 1e-4, "smoothing": True}}))
    with pytest.raises(Mistake, match="torchrun train.py --model runs/b --no-smoothing --lr 0.01$"):
        train.parse_config(["--resume", "runs/b", "--no-smoothing", "--lr", "0.01"])


def test_help_shows_the_defaults_of_the_preset(capsys):
    for preset, shown in (("laptop", "learning rate [recipe 1e-6, constant, for 7B] (default: 0.001)"),
                          ("paper", "learning rate [recipe 1e-6, constant, for 7B] (default: 1e-06)")):
        with pytest.raises(SystemExit) as left:
            train.parse_config(["--preset", preset, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert left.value.code == 0 and shown in printed
    for group in ("method:", "controls:", "data:", "sampling:", "optimisation:", "output:"):
        assert group in printed
    assert "--no-no-" not in printed


def test_rows_are_judged_when_the_data_is_opened(place):
    lines = [(place / name).read_text() for name in ("outside.jsonl", "none.jsonl", "three.jsonl")]
    good = json.dumps({"image": "a.png", "problem": "x", "task": "grounding", "solution": "[]"}) + "\n"
    (place / "all.jsonl").write_text("".join([lines[0], good, *lines[1:]]))
    source = load("all.jsonl", skip_bad_rows=True)
    assert len(source) == 1 and [reason.split(": ")[0] for reason in source.bad] == [
        f"all.jsonl, row {n}" for n in (1, 3, 4)]


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """train.py under torchrun, as everyone runs it, in a session of its own, like a terminal's."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()),
                             str(ROOT / "train.py"), *flags], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_under_torchrun_the_sentence_stands_alone_before_the_last_line(tmp_path):
    process = start(tmp_path, "--steps", "0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not list(tmp_path.iterdir())
    assert [line.strip() for line in output.splitlines() if line.strip()][-2] == "--steps 0: must be at least 1"
    assert "train.py\", line" not in output      # no traceback of ours


def test_ctrl_c_saves_shows_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, "--prompts-per-step", "2", "--rollouts", "2", "--max-new-tokens", "8",
                    "--eval-data", "", "--name", "a")
    metrics = tmp_path / "runs/a/metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)        # as a terminal does: to torchrun and to the worker
    output, _ = process.communicate(timeout=120)
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped at step {step}; go on with torchrun train.py --resume runs/a" in output, output
    assert (tmp_path / f"runs/a/checkpoints/step_{step}/state.json").exists()
    for ours in ("support", "train.py"):         # the traceback is torchrun's alone
        assert f'File "{ROOT / ours}' not in output, output
    assert (tmp_path / "runs/a/curves.png").exists()
    assert f", step {step} of 400</title>" in (tmp_path / "runs/a/report.html").read_text()


def test_ctrl_c_does_not_reach_the_verifier_of_math():
    code = ("import signal, time\nfrom support import verify_math\nverify_math.same_value('1/2', '0.5')\n"
            "came, child = [], verify_math.child\nsignal.signal(signal.SIGINT, lambda *_: came.append(1))\n"
            "print('ready', flush=True)\nwhile not came: time.sleep(0.01)\ntime.sleep(0.3)\n"
            "print(verify_math.same_value('3/6', '0.5'), verify_math.child is child)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "True True\n"
