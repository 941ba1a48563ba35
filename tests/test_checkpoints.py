"""Faults on disk: what is damaged is found and named, the newest sound checkpoint is used, nothing else is lost."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import free_port, run_script
from safetensors.torch import load_file, save_file

import train
from eval import summarise
from support import checkpoints, files, runs
from support.checkpoints import fault, keep_newest, newest_checkpoint, room_for, set_later_aside, sound_checkpoint
from support.mistakes import Mistake
from support.run import Run, best_of
from support.runs import lock, read_log, run_and_step
from support.weights import local_folder
from test_train import ROOT, SMALL, lines, run_train, start_train


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps with all its checkpoints."""
    place = tmp_path_factory.mktemp("finished")
    code, output = run_train(place, "--steps", "3", "--name", "a", "--save-every", "1", "--keep", "0")
    assert code == 0, output
    return place


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path / "runs/a"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {"missing": lambda path: path.unlink(), "empty": lambda path: path.write_bytes(b""),
           "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]), "a bit": flip_a_bit,
           "a folder": lambda path: (path.unlink(), path.mkdir())}
FILES = ("model.safetensors", "optimizer_0.safetensors", "config.json", "tokenizer.json", "state.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(run, name, damage):
    newest = run / "checkpoints/step_3"
    assert fault(newest) is None and sound_checkpoint(run) == (newest, [])
    DAMAGES[damage](newest / name)
    found, [said] = sound_checkpoint(run)
    assert found == run / "checkpoints/step_2" and str(newest) in said and name in said
    checkpoints.newest_checkpoint.cache_clear()
    expected = newest if name == "optimizer_0.safetensors" else found        # an evaluation reads no optimizer
    assert newest_checkpoint(run) == expected
    with pytest.raises(Mistake, match=f"step_3 is passed over: {name}"):
        sound_checkpoint(run, 3)


def test_a_number_in_the_state_that_changed(run):
    path = run / "checkpoints/step_3/state.json"
    path.write_text(path.read_text().replace('"cursor": 12', '"cursor": 13'))
    assert fault(path.parent) == "state.json is not what was written"
    path.write_text('{"step": 3, "cursor": 12, "bad_steps": 0}')       # as it was before there were digests
    assert fault(path.parent) is None
    path.write_text('[3, 12, 0]')
    assert fault(path.parent) == "state.json cannot be read"
    for other in ('{}', '{"step": 3, "bad_steps": 0}', '{"step": "3", "cursor": 12, "bad_steps": 0}',
                  '{"step": 3, "cursor": -1, "bad_steps": 0}', '{"step": true, "cursor": 12, "bad_steps": 0}',
                  '{"step": 3, "cursor": 12, "bad_steps": 0, "files": []}'):
        path.write_text(other)
        assert fault(path.parent) == "state.json is not that of a checkpoint", other
    path.write_text('{"step": 2, "cursor": 8, "bad_steps": 0}')
    assert fault(path.parent) == "it holds step 2"


def test_what_is_no_checkpoint_does_not_disturb(run):
    folder = run / "checkpoints"
    for name in ("step_6_backup", "step_x", ".unfinished_step_7", "step_08"):
        shutil.copytree(folder / "step_2", folder / name)
    (folder / "step_12").write_text("")
    assert sound_checkpoint(run) == (folder / "step_3", [])
    (folder / "step_9").mkdir()
    found, [said] = sound_checkpoint(run)
    assert found == folder / "step_3" and "step_9 is passed over: state.json is missing" in said


@pytest.mark.parametrize("make", [shutil.copytree, lambda old, new: new.symlink_to(old.absolute())])
def test_a_copy_or_a_link_under_another_step_is_no_checkpoint(run, make):
    """Found before anything is renamed; what it leads to stays."""
    make(run / "checkpoints/step_1", run / "checkpoints/step_9")
    found, [said] = sound_checkpoint(run)
    assert found == run / "checkpoints/step_3" and "step_9 is passed over: it holds step 1" in said
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "4", "--keep", "0")
    assert code == 0 and "step_9 is later than step 3: it is now step_9_before_resume" in output, output
    assert [fault(run / f"checkpoints/step_{step}") for step in (1, 2, 3, 4)] == [None] * 4
    keep_newest(run, 1, None)
    assert list(checkpoints.checkpoints(run)) == [4] and (run / "checkpoints/step_9_before_resume").exists() == (
        make is shutil.copytree)        # a link to what is gone


def test_a_checkpoint_that_is_named_by_its_path_is_looked_at_too(run):
    """Nothing scores another step's weights, or damaged ones."""
    shutil.copytree(run / "checkpoints/step_1", run / "checkpoints/step_9")
    flip_a_bit(run / "checkpoints/step_2/model.safetensors")
    for name, reason in (("step_9", "it holds step 1"), ("step_2", "model.safetensors is not what was written")):
        with pytest.raises(Mistake, match=f"checkpoints/{name} is not used: {reason}"):
            local_folder(run / "checkpoints" / name)
    assert local_folder(run / "checkpoints/step_1") == run / "checkpoints/step_1"


def test_a_file_in_the_place_of_the_next_checkpoint(run):
    (run / "checkpoints/step_4").write_text("mine")
    (run / "checkpoints/.unfinished_step_4").write_text("")
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "4")
    assert code == 0 and "step_4 is later than step 3: it is now step_4_before_resume" in output, output
    assert (run / "checkpoints/step_4_before_resume").read_text() == "mine" and fault(run / "checkpoints/step_4") is None


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("x")])
def test_no_folder_in_the_place_of_the_checkpoints(run, make):
    """The run does not begin anew over what it has logged."""
    shutil.rmtree(run / "checkpoints")
    make(run / "checkpoints")
    with pytest.raises(Mistake, match="runs/a/checkpoints is no folder"):
        sound_checkpoint(run)


def test_fewer_steps_than_a_run_has(run):
    before = sorted(run.rglob("*"))
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "2")
    assert code == 1 and "--steps 2: runs/a/checkpoints/step_3 has 3 steps already" in output, output
    assert sorted(run.rglob("*")) == before and "Traceback" not in output
    code, output = run_train(run.parent.parent, "--resume", "runs/a/checkpoints/step_1", "--steps", "2")
    assert code == 0 and [line["step"] for line in lines(run)] == [1, 2], output


CONFIGS = {     # what may have become of a run's config.json → the sentence
    "empty": (lambda text: "", "config.json is not JSON"), "{}": (lambda text: "{}", "config is 'None'"),
    "no options": (lambda text: '{"config": {}}', "holds no options of a run"),
    "UTF-16": (lambda text: text.encode("utf-16"), "config.json is not JSON: 'utf-8' codec"),
    "nested": (lambda text: '{"config": ' + "[" * 100_000, "nested more than 50 deep"),
    "another seed": (lambda text: text.replace('"seed": 42', '"seed": 7'),
                     "says seed 7, but runs/a/checkpoints/step_3 was trained with 42"),
    "another optimizer": (lambda text: text.replace('"optimizer": "adamw"', '"optimizer": "muon"'), "says optimizer 'muon'"),
    "other adapters": (lambda text: text.replace('"lora_alpha": 32.0', '"lora_alpha": 4.0'), "says lora_alpha 4.0"),
    "defaults": (lambda text: '{"config": {"steps": 9}}', "was trained with"),
    "null": (lambda text: text.replace('"rollouts": 3', '"rollouts": null'), "--rollouts: invalid int value: 'None'"),
    "true": (lambda text: text.replace('"rollouts": 3', '"rollouts": true'), "what is no option here: argument --rollouts: expected one"),
    "unknown choice": (lambda text: text.replace('"method": "visurf"', '"method": "x"'), "--method: invalid choice: 'x'"),
    "unknown option": (lambda text: text.replace('"method"', '"x": 1, "method"', 1), "what is no option here: unrecognized arguments: --x=1"),
    "a word": (lambda text: text.replace('"smoothing": true', '"smoothing": "yes"'), "--smoothing: ignored explicit"),
    "not finite": (lambda text: text.replace('"lr": 0.001', '"lr": NaN'), "--lr nan: must be a finite number"),
    "older, without steps": (lambda text: '{"config": {"cooldown_steps": 3}}', "what is no option here"),
    "before": (lambda text: text.replace('"before": []', '"before": 3'), "holds no options of a run")}


@pytest.mark.parametrize("change", CONFIGS)
def test_options_belong_to_the_checkpoint_as_well(run, change):
    """One sentence, and nothing is removed or renamed."""
    how, sentence = CONFIGS[change]
    changed = how((run / "config.json").read_text())
    (run / "config.json").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    before = sorted(run.rglob("*"))
    code, output = run_script(ROOT / "train.py", "--resume", "runs/a", "--steps", "9", "--keep", "1",
                              folder=run.parent.parent)
    assert code == 1 and sentence in output and "Traceback" not in output, output
    assert sorted(run.rglob("*")) == before
    if change == "another seed":        # the same where a checkpoint is named
        code, output = run_script(ROOT / "train.py", "--resume", "runs/a/checkpoints/step_3", folder=run.parent.parent)
        assert code == 1 and "runs/a/config.json says seed 7" in output, output


def test_no_checkpoint_is_sound(run):
    for step in (1, 2, 3):
        flip_a_bit(run / f"checkpoints/step_{step}/model.safetensors")
    with pytest.raises(Mistake, match="step_3 is passed.*step_1 is passed over.*no checkpoint of the run is sound"):
        sound_checkpoint(run)
    with pytest.raises(Mistake, match="has no checkpoint of step 4; it has 1, 2, 3"):
        sound_checkpoint(run, 4)


def test_a_run_goes_on_from_its_newest_sound_checkpoint(run, finished):
    """The same bits as without the damage, and the damaged one is kept under another name."""
    flip_a_bit(run / "checkpoints/step_3/optimizer_0.safetensors")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\n\x00\x00\n{"step": 4, "lo')               # the disk was full, the machine went down
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--keep", "0")
    assert code == 0, output
    for said in ("step_3 is passed over: optimizer_0.safetensors is not what was written", "step_3_before_resume",
                 "metrics.jsonl: 2 unreadable line(s) are left out"):
        assert said in output, output
    assert lines(run) == lines(finished / "runs/a") and (run / "checkpoints/step_3_before_resume").is_dir()
    a, b = (load_file(place / "checkpoints/step_3/model.safetensors") for place in (run, finished / "runs/a"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_can_be_chosen(run):
    by_path = train.parse_config(["--resume", str(run / "checkpoints/step_2")])
    assert run_and_step(Path(by_path.resume)) == (run, 2) and by_path.rollouts == 3       # the run's options
    code, output = run_train(run.parent.parent, "--resume", "runs/a/checkpoints/step_1", "--steps", "2")
    assert code == 0 and "step_2 is later than step 1" in output, output
    assert [line["step"] for line in lines(run)] == [1, 2]
    assert "2 logged lines of steps after 1 are now in metrics.jsonl_before_resume alone" in output
    before = (run / "metrics.jsonl_before_resume").read_text().splitlines()
    assert [json.loads(line)["step"] for line in before] == [1, 2, 3]
    shutil.rmtree(run / "checkpoints")
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "1")
    assert code == 0 and "no checkpoint is left, so the run begins anew; 2 logged lines" in output, output
    assert (run / "metrics.jsonl_before_resume_2").exists() and [line["step"] for line in lines(run)] == [1]


def test_a_restart_by_torchrun_goes_on(run, monkeypatch):
    """torchrun --max-restarts gives the same command again. A run of that name from another launch is not gone on with."""
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_1/0/error.json")
    assert not train.parse_config(["--name", "a"]).resume
    record = json.loads((run / "config.json").read_text())
    assert record["launch"] == [""]                             # without torchrun
    (run / "config.json").write_text(json.dumps(record | {"launch": ["/tmp/torchelastic_x/none_y"]}))
    for count, resumed in (("0", ""), ("1", "runs/a")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert train.parse_config(["--name", "a"]).resume == resumed
        assert not train.parse_config(["--name", "new"]).resume
    assert train.parse_config(["--name", "a"]).rollouts == 3       # the run's own options
    assert train.parse_config(["--resume", "runs/a/checkpoints/step_1"]).resume == "runs/a"     # not from step 1 again
    with pytest.raises(Mistake, match="--max-restarts .* give a --name"):
        train.parse_config([])


def test_torchrun_restarts_a_run_whose_worker_was_killed(tmp_path):
    """Twice: the store that torchrun keeps over a restart holds the addresses of ranks that are gone."""
    process = start_train(tmp_path, "--steps", "6", "--name", "a", "--save-every", "1", ranks=2, restarts=3)
    for step in (1, 3):
        for _ in range(1200):
            if process.poll() is not None or (tmp_path / f"runs/a/checkpoints/step_{step}").exists():
                break
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[step % 2]), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert [line["step"] for line in lines(tmp_path / "runs/a")] == [1, 2, 3, 4, 5, 6]


def test_two_nodes_are_as_two_ranks_of_one(tmp_path):
    """Two agents of torchrun on this machine, one worker each."""
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                  f"127.0.0.1:{free_port()}", "--rdzv-id", "two"]
    flags = [str(ROOT / "train.py"), "--model", str(ROOT / "assets/tiny"), *SMALL, "--steps", "2", "--name", "nodes"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *flags]
    nodes = [subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
             for _ in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    code, output = run_train(tmp_path, "--steps", "2", "--name", "ranks", ranks=2)
    assert code == 0 and lines(tmp_path / "runs/nodes") == lines(tmp_path / "runs/ranks"), output


def test_a_node_that_does_not_see_the_run_says_so(tmp_path):
    runs.wait_until_seen(tmp_path, 3, 0)
    with pytest.raises(Mistake, match=f"rank 3 does not see {tmp_path}/a, which rank 0 has made: all nodes must share"):
        runs.wait_until_seen(tmp_path / "a", 3, 1)


def test_later_checkpoints_are_set_aside(run):
    (run / "checkpoints/.unfinished_step_5").mkdir()
    assert len(set_later_aside(run, 1)) == 2 and len(set_later_aside(run, 1)) == 0
    shutil.copytree(run / "checkpoints/step_1", run / "checkpoints/step_3")
    set_later_aside(run, 2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step_1", "step_2_before_resume", "step_3_before_resume", "step_3_before_resume_2"]


def test_changed_data_is_not_gone_on_with_in_silence(run):
    place = run.parent.parent
    rows = [{"image": None, "problem": f"{i}?", "solution": "1", "task": "vqa"} for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "a.jsonl").write_text(text)
    code, output = run_train(place, "--steps", "1", "--name", "b", "--data", "a.jsonl")
    assert code == 0, output
    (place / "a.jsonl").write_text(text.replace("7?", "8?"))
    code, output = run_train(place, "--resume", "runs/b", "--steps", "2")
    assert code == 1 and "--data a.jsonl has changed since" in output and "Traceback" not in output, output
    code, output = run_train(place, "--resume", "runs/b", "--steps", "2", "--accept-changed-data")
    assert code == 0, output
    code, output = run_train(place, "--resume", "runs/b", "--steps", "3")       # it is the data of the run by now
    assert code == 0, output
    (place / "a.jsonl").write_text(text)
    code, output = run_train(place, "--resume", "runs/b", "--steps", "4")       # what was accepted once was that change
    assert code == 1 and "--data a.jsonl has changed since" in output, output


@pytest.mark.parametrize("inside, resumed", [("", "."), ("", "checkpoints/step_3"), ("checkpoints", "step_3")])
def test_a_run_goes_on_from_within_its_folder(run, inside, resumed):
    code, output = run_train(run / inside, "--resume", resumed, "--steps", "4", "--keep", "1")
    assert code == 0, output
    assert [line["step"] for line in read_log(run)[0]] == [1, 2, 3, 4] and list(checkpoints.checkpoints(run)) == [4]
    assert train.parse_config(["--resume", str(run)]).name == "a"


# ---------------------------------------------------------------------------------------------------------------------
# Lines, locks, room

@pytest.mark.parametrize("tail, damaged", [
    (b"", 0), (b"\n\n", 0), (b'{"step": 3, "loss"', 1), (b"\x00" * 40, 1), (b"[1]\n", 1), (b'{"loss": 1}\n3\n', 2),
    (b'{"step": "x"}\n', 1), (b"\xff\xfe\n", 1), (b'{"step": 3, "loss": NaN}\n', 0)])
def test_lines_of_the_log_that_cannot_be_read(tmp_path, tail, damaged):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    read, count = read_log(tmp_path)
    assert [line["step"] for line in read][:2] == [1, 2] and count == damaged


def test_old_names_are_read_as_those_of_today(tmp_path):
    old = [{"step": 0, "eval": {"N-acc strict": 0.5, "bbox accuracy": 0.25, "targets IoU>0.5": 0.75, "T-acc": 1.0}},
           {"step": 1, "loss": 0.0, "r_rollouts": 4.0, "rollouts/thinking": 0.5, "rollouts/accuracy": 1.5, "response_length": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    [evaluation, step], damaged = read_log(tmp_path)
    assert evaluation["eval"] == {"N-acc": 0.5, "boxes": 0.25, "targets": 0.75, "T-acc": 1.0} and not damaged
    assert step == {"step": 1, "loss": 0.0, "r(o)": 4.0, "o/thinks": 0.5, "o/accuracy": 1.5, "length": 9}


def test_one_writer(tmp_path):
    """A second one is refused as long as the first lives, however that ends."""
    code = "import sys; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\nfrom support.runs import lock\n" \
           "lock(Path(sys.argv[1])); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(train.Path(train.__file__).parent)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Mistake, match=f"process {other.pid} is writing to {tmp_path}"):
        lock(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    runs.locks.popitem()[1][0].close()


def test_a_run_that_is_written_to_is_not_resumed(run):
    lock(run)
    try:
        code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "4")
        assert code == 1 and f"process {os.getpid()} is writing to runs/a" in output, output
        assert "Traceback" not in output
    finally:
        runs.locks.popitem()[1][0].close()


def test_a_worker_whose_torchrun_was_killed_saves_and_ends(tmp_path):
    """Else it would go on beside the run that --resume starts."""
    process = start_train(tmp_path, "--steps", "100000", "--name", "a", ranks=2)
    try:
        for _ in range(1200):
            if process.poll() is not None or len(read_log(tmp_path / "runs/a")[0]) >= 2:
                break
            time.sleep(0.1)
        process.kill()                                     # torchrun alone
        output, _ = process.communicate(timeout=120)       # ends when the last worker has closed its output
    finally:
        subprocess.run(["pkill", "-f", "steps 100000 --name a"], check=False)
    assert "stopping: the step at work is left" in output and "stopped at step" in output, output
    step = read_log(tmp_path / "runs/a")[0][-1]["step"]
    assert fault(tmp_path / f"runs/a/checkpoints/step_{step}") is None


@pytest.mark.parametrize("seconds", [0, 4])
def test_ranks_whose_torchrun_was_killed_at_the_start_end(tmp_path, seconds):
    """While they import, or join each other: they would wait for torchrun's store for an hour."""
    process = start_train(tmp_path, "--steps", "100000", "--name", "b", ranks=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.05)
    ranks = children.read_text().split()
    time.sleep(seconds)
    process.kill()
    try:
        process.communicate(timeout=90)                    # ends when the last rank has closed its output
        assert len(ranks) == 2
    finally:
        subprocess.run(["pkill", "-KILL", "-f", "steps 100000 --name b"], check=False)


def test_retention(run):
    keep_newest(run, 0, None)
    assert list(checkpoints.checkpoints(run)) == [1, 2, 3]
    keep_newest(run, 1, 1)
    assert list(checkpoints.checkpoints(run)) == [1, 3] and len(list((run / "checkpoints").iterdir())) == 2
    history = {"step 0": {"T-acc": 1.0, "gIoU": None}, "step 100": {"T-acc": 0.5, "gIoU": 0.1},
               "step 200": {"T-acc": 1.0, "gIoU": 0.1}}
    for metric, best in (("T-acc", "0"), ("gIoU", "100"), ("", None), ("answers", None)):
        assert best_of(history, metric) == (None if best is None else int(best))
    assert "T-acc" in summarise([])
    train.parse_config(["--keep-best", "T-acc"])
    for name in ("T-ac", "unreadable"):
        with pytest.raises(Mistake, match=f"invalid choice: '{name}'"):
            train.parse_config(["--keep-best", name])


def test_the_best_that_has_a_checkpoint_stays(run):
    """Step 0 has none, nor has a step that is evaluated and not saved."""
    book = Run(train.Config(keep=1, keep_best="boxes"), 0, 1, torch.device("cpu"), dict(checkpoints.FIRST, step=3))
    book.folder, book.history = run, {f"step {step}": {"boxes": value} for step, value in (
        (0, 0.9), (1, 0.4), (2, 0.5), (3, 0.3), (7, 0.8))}
    book.remove_old_checkpoints()
    assert list(checkpoints.checkpoints(run)) == [2, 3]


def test_a_run_goes_on_when_the_checkpoint_that_it_began_from_is_gone(run):
    """It is removed as soon as a newer one is there; its config and tokenizer are needed at every save."""
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "6", "--keep", "1")
    assert code == 0, output
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_6"] and fault(run / "checkpoints/step_6") is None


def test_room_on_the_disk(tmp_path, monkeypatch):
    """1e9 parameters: 4 bytes of weights and 8 of the optimizer; in bfloat16 2 and 12; of what is frozen the weights
    alone, of what is frozen under an adapter nothing."""
    def model(dtype: str) -> torch.nn.Module:
        return torch.nn.Linear(10**9, 1, bias=False, device="meta", dtype=getattr(torch, dtype))
    scarce = [f"{tmp_path}: --keep 2 takes 36.0 GB of checkpoints, and 36.0 GB are free"]
    for free, precision, said in ((12e9 - 1, "float32", None), (14e9 - 1, "bfloat16", None), (36e9, "float32", []),
                                  (36e9 - 1, "float32", scarce)):
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
        if said is None:
            with pytest.raises(Mistake, match="a checkpoint takes 1[24].0 GB"):
                room_for(tmp_path, model(precision), 2)
        else:
            assert room_for(tmp_path, model(precision), 2) == said
    frozen = model("bfloat16").requires_grad_(False)
    with pytest.raises(Mistake, match="a checkpoint takes 2.0 GB"):
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2e9 - 1))
        room_for(tmp_path, frozen, 2)


def test_weights_that_are_not_finite_are_not_saved(run):
    """A learning rate beyond all reason, and weights that hold NaN from the start: one sentence, and what can be gone
    on with."""
    code, output = run_train(run.parent.parent, "--steps", "3", "--name", "b", "--lr", "1e30", "--save-every", "1")
    assert code == 1 and "weights hold NaN or Inf" in output and "Traceback" not in output, output
    assert "Last checkpoint from before that: none" in output        # step_1 would end in the same way
    weights = run / "checkpoints/step_3/model.safetensors"
    tensors = load_file(weights)
    tensors["visual.merger.mlp.0.weight"][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    state = json.loads((run / "checkpoints/step_3/state.json").read_text())
    undigested = {name: state[name] for name in ("step", "cursor", "bad_steps")}
    (run / "checkpoints/step_3/state.json").write_text(json.dumps(undigested))
    code, output = run_train(run.parent.parent, "--resume", "runs/a", "--steps", "4")
    assert code == 1 and "weights hold NaN or Inf" in output and "Traceback" not in output, output
    assert "Last checkpoint from before that: runs/a/checkpoints/step_2" in output
    assert not (run / "checkpoints/step_4").exists()


def test_the_commit_of_a_run(monkeypatch):
    """What git says; a copy without git has none."""
    for told, commit in (("abc1234-dirty\n", "abc1234-dirty"), ("", "unknown")):
        monkeypatch.setattr(runs.subprocess, "run", lambda *_, told=told, **__: SimpleNamespace(stdout=told))
        assert runs.versions()["commit"] == commit


@pytest.mark.skipif(sys.platform != "linux", reason="counts the open files of Linux")
def test_syncing_leaves_no_file_open(tmp_path):
    (tmp_path / "a").write_text("a")
    before = len(os.listdir("/proc/self/fd"))
    files.sync(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == before
