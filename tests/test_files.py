"""Reader and writer of JSON, what the disk refuses, what reaches the screen."""
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import save_file
from test_train import ROOT, SMALL, lines, run_train

import train
from model import load_model
from support import files, run, screen
from support.files import as_json, check_regular, read_lines, read_record, remove, replace_file, writing
from support.mistakes import Mistake, sentence_of
from support.runs import read_log


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


NO_RECORDS = {      # what stands in the place of a JSON file → the sentence
    "missing": (lambda path: None, "is missing; it must be a file"), "a folder": (Path.mkdir, "is a folder"),
    "a pipe": (pipe, "is no regular file"), "a link to a pipe": (link_to_a_pipe, "is no regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is not JSON"), "zeros": (lambda path: path.write_bytes(b"\0" * 9), "is not JSON"),
    "cut": (lambda path: path.write_bytes(b'{"a": 1, "b": '), "is not JSON"),
    "UTF-16": (lambda path: path.write_bytes('{"a": 1}'.encode("utf-16")), "is not JSON: 'utf-8' codec"),
    "Latin-1": (lambda path: path.write_bytes('{"a": "ä"}'.encode("latin-1")), "is not JSON: 'utf-8' codec"),
    "nested": (lambda path: path.write_bytes(b'{"a": ' * 100_000), "nested more than 50 deep"),
    "long": (lambda path: path.write_bytes(b'"' + b"x" * 2000 + b'"'), "longer than 1,000 bytes"),
    "a list": (lambda path: path.write_bytes(b"[1]"), "holds a JSON list, not an object"),
    "no field": (lambda path: path.write_bytes(b'{"b": 1}'), "a is 'None'; it must be of type int"),
    "true": (lambda path: path.write_bytes(b'{"a": true}'), "a is 'True'; it must be of type int")}


@pytest.mark.parametrize("kind", NO_RECORDS)
def test_what_is_no_record(tmp_path, monkeypatch, kind):
    make, sentence = NO_RECORDS[kind]
    if kind == "long":
        monkeypatch.setattr(files, "MAX_BYTES", 1000)
    make(tmp_path / "x.json")
    with pytest.raises(Mistake, match=f"{tmp_path}/x.json.*{sentence}"):
        read_record(tmp_path / "x.json", a=int)


def test_a_record(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": {"[[[": "\\"]]"}}')     # as Windows saves it
    assert read_record(tmp_path / "x.json", a=int, b=dict) == {"a": 1, "b": {"[[[": '"]]'}}


def test_lines_that_hold_no_record(tmp_path):
    good = [{"index": 0}, {"index": 7, "more": [1]}]
    parts = [as_json(good[0]).encode(), b"\n", b"[1]\n", b"{" * 100_000, b"\n", b'{"index": "x"}\n', b"\xff\n",
             as_json(good[1]).encode(), b'{"index": 8']
    (tmp_path / "x").write_bytes(b"".join(parts))
    assert read_lines(tmp_path / "x", lambda line: type(line.get("index")) is int) == (good, 5)
    assert read_lines(tmp_path / "none", lambda line: True) == ([], 0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Mistake, match="is no regular file"):
        read_lines(tmp_path / "pipe", lambda line: True)


def test_what_is_written_is_json():
    def refuse(name: str):
        raise AssertionError(name)
    text = as_json({"loss": float("nan"), "norm": [float("inf"), (1, -float("inf"))], "ä": 0.5})
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "norm": [None, [1, None]], "ä": 0.5}
    assert text.isascii() and text.endswith("}\n")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    replace_file(tmp_path / "x", "old")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError) as error:
        replace_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and sentence_of(error.value).startswith(
        f"{tmp_path}/.unfinished_x: No space left on device. What was complete before is still there: free some space")


def test_what_a_link_leads_to_is_not_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    remove(tmp_path / "b")
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# What the system refuses

@pytest.fixture
def small_files():
    """No file longer than 100,000 bytes can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_find_no_room(tmp_path, small_files):
    """safetensors hides the system's error in one of its own, without a name."""
    def write_tensors():
        with writing(tmp_path / "x"):
            save_file({"x": torch.zeros(100_000)}, tmp_path / "x")
    def write_text():
        with writing(tmp_path / "x"), open(tmp_path / "x", "a") as file:
            file.write("x" * 200_000)
    for write in (lambda: load_model(ROOT / "assets/tiny").save_pretrained(tmp_path / "x"),
                  write_tensors, write_text):
        with pytest.raises(OSError) as error:
            write()
        assert error.value.errno == errno.EFBIG and str(tmp_path / "x") in sentence_of(error.value)
        remove(tmp_path / "x")


def test_a_run_that_finds_no_room(tmp_path):
    """The sentence; what was saved stays, half a checkpoint does not; and it goes on."""
    code, output = run_train(tmp_path, "--steps", "1", "--name", "a")
    assert code == 0, output
    limited = f"ulimit -f 3000; exec {sys.executable} {ROOT}/train.py --resume runs/a --steps 2"      # 3 MB
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "step_2: File too large. What was complete before is still there" in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()] == ["step_1"]
    code, output = run_script(ROOT / "train.py", "--resume", "runs/a", "--steps", "2", folder=tmp_path)
    assert code == 0 and [line["step"] for line in lines(tmp_path / "runs/a")] == [1, 2], output


@pytest.mark.parametrize("disturb, sentence", [
    (lambda run: run.rename(run.with_name("b")), "is not the folder any more"),
    (lambda run: (run.rename(run.with_name("b")), run.symlink_to("b")), ""),        # moved, and found through a link
    (lambda run: (run.rename(run.with_name("b")), run.mkdir()), "is not the folder any more"),
    (lambda run: (run / "metrics.jsonl").unlink(missing_ok=True) or (run / "metrics.jsonl").mkdir(), "metrics.jsonl: Is a directory")])
def test_a_folder_that_changes_in_mid_run(tmp_path, monkeypatch, one_rank, disturb, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "2", "--name", "a"])
    step = train.train_step

    def disturbed(job):
        if job.run.step == 0:
            disturb(job.run.folder)
        return step(job)
    monkeypatch.setattr(train, "train_step", disturbed)
    if not sentence:
        return train.main()
    with pytest.raises((Mistake, OSError)) as error:
        train.main()
    assert sentence in sentence_of(error.value)
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def test_a_clock_that_stands_still(tmp_path, monkeypatch, one_rank):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "1", "--name", "a"])
    monkeypatch.setattr(run.time, "perf_counter", lambda: 7.0)
    train.main()
    [line] = [json.loads(text) for text in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert line["seconds"] == 0 and "sampling_tokens_per_s" not in line     # a rate that nobody measured


def test_skipped_steps_are_json_too(tmp_path, monkeypatch, one_rank):
    """Their loss and norm are no numbers; the curves are drawn, and the run is read again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "3", "--name", "a"])
    plain = train.objective.loss

    def broken(cfg, **terms):
        loss, logged = plain(cfg, **terms)
        return loss * torch.nan, logged
    monkeypatch.setattr(train.objective, "loss", broken)
    train.main()

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")
    text = (tmp_path / "runs/a/metrics.jsonl").read_text()
    read = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in read] == [(None, None, True)] * 3
    assert read_log(tmp_path / "runs/a") == (read, 0) and (tmp_path / "runs/a/curves.png").exists()


def test_memory_that_a_cpu_does_not_have():
    """PyTorch raises a RuntimeError there; any other one is none of ours."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 52)
    assert sentence_of(error.value).startswith("out of memory: ") and "\n" not in sentence_of(error.value)
    with pytest.raises(RuntimeError, match="sizes"):
        sentence_of(RuntimeError("sizes do not match"))


# ---------------------------------------------------------------------------------------------------------------------
# The screen

def test_a_terminal_obeys_no_data():
    assert screen.clean("a\tb\nä 中 \x1b[2J\x1b]0;x\x07\r\x9b1m\x7f\u202eb") == (
        "a\tb\nä 中 \\x1b[2J\\x1b]0;x\\x07\\r\\x9b1m\\x7f\\u202eb")


def test_escape_sequences_of_data_do_not_reach_the_screen(tmp_path):
    """In questions, ids, answers, names of files, flags and mistakes."""
    evil = "\x1b[2J\x1b]0;owned\x07"
    row = {"image": None, "problem": f"how many{evil}?", "solution": f"two{evil}", "task": "vqa", "id": f"7{evil}"}
    (tmp_path / f"a{evil}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"solution": ""}) + "\n")
    flags = ["--data", f"a{evil}.jsonl", "--skip-bad-rows"]
    outputs = [run_train(tmp_path, *flags, "--steps", "1", "--name", "a"), run_train(tmp_path, *flags[:2]),
               run_train(tmp_path, "--data", evil),
               run_script(ROOT / "eval.py", "--model", str(ROOT / "assets/tiny"), *flags, folder=tmp_path)]
    assert [code for code, _ in outputs] == [0, 1, 1, 0], outputs
    for _, output in outputs:
        assert "\\x1b[2J" in output and "\x1b[2J" not in output and "\x07" not in output


@pytest.mark.parametrize("flags", ["train.py --help", "objective.py", "eval.py --help"])
def test_a_screen_that_is_ascii_or_that_nobody_reads(flags):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} {ROOT}/{flags}"
    for shell in (command, f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}", f"{command} >&-"):
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.isascii()


def test_a_run_that_nobody_reads_goes_on(tmp_path):
    """Screen and bar end in a pipe whose reader has gone; the encoding is ASCII."""
    flags = " ".join([f"--model {ROOT}/assets/tiny", *SMALL]).replace("--eval-data ", "--eval-data= ")
    shell = (f"PYTHONIOENCODING=ascii {sys.executable} {ROOT}/train.py {flags} --steps 2 --name a 2>&1 | head -n 1; "
             "exit ${PIPESTATUS[0]}")
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.isascii(), done
    assert (tmp_path / "runs/a/checkpoints/step_2/state.json").exists()


def test_what_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))
    (tmp_path / "a").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied: '.*a'"):
        check_regular(tmp_path / "a")
