"""Faults: on disk and in data, kills at random moments, endurance, hostile text. docs/reliability.md has what they
found.

    python experiments/faults.py disk                   what is damaged, foreign, in the way or full: a table of how
                                                        train.py and eval.py end, a row a fault

    python experiments/faults.py kills --count 100      SIGKILLs of workers, torchrun or both, resumed until it is done
    python experiments/faults.py restarts               torchrun --max-restarts 3, one of two ranks killed twice
    python experiments/faults.py endurance --steps 2000 the default job, longer: memory, open files, seconds a step
    python experiments/faults.py text --count 1000000   mutated answers through every reward
    python experiments/faults.py atheris --minutes 10   the same, guided by coverage (pip install atheris)

Everything is written into runs/faults/. kills and endurance go on where they were stopped.
"""
import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PLACE = ROOT / "runs/faults"
SMALL = ["--prompts-per-step", "4", "--rollouts", "3", "--max-new-tokens", "24", "--eval-data",
         "scenes:val", "--eval-examples", "4", "--eval-every", "5", "--warmup-steps", "3"]
LONG = 20_000           # characters of an answer that are read (support.answers.MAX_CHARACTERS)


def start(*flags: str, ranks: int = 2, restarts: int = 0) -> subprocess.Popen:
    """train.py under torchrun, in a session of its own; what it prints goes to runs/faults/log."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                "--max-restarts", str(restarts), str(ROOT / "train.py")]
    with open(PLACE / "log", "a") as log:
        return subprocess.Popen([*torchrun, *flags], cwd=PLACE, stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers(torchrun: subprocess.Popen) -> list[int]:
    """Process numbers of its ranks."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
    return []


def end_of(torchrun: subprocess.Popen, ranks: list[int], patience: float = 120) -> bool:
    """Waits until neither torchrun nor a rank is left, each in a session of its own; whether that came by itself."""
    deadline, left = time.time() + patience, [torchrun.pid, *ranks]
    while left and time.time() < deadline:
        torchrun.poll()
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    torchrun.wait()
    return not left


def same(a: Path, b: Path, step: int) -> bool:
    """Whether two runs have the same weights and optimizer after a step, to the bit, and the same log but for its
    clocks."""
    from support.files import digest
    from support.runs import read_log
    clock = ("seconds", "per_s", "memory")
    logs = [[{k: v for k, v in line.items() if not any(c in k for c in clock)} for line in read_log(run)[0]]
            for run in (a, b)]
    files = ("model.safetensors", "optimizer_0.safetensors")
    folders = [run / f"checkpoints/step_{step}" for run in (a, b)]
    return logs[0] == logs[1] and all(digest(folders[0] / f) == digest(folders[1] / f) for f in files)


def run_whole(steps: int) -> list[str]:
    """Makes runs/whole, which nothing disturbs, unless it is there. Returns its flags but for the name."""
    flags = ["--model", str(ROOT / "assets/tiny"), *SMALL, "--steps", str(steps), "--save-every", "1"]
    if not (PLACE / f"runs/whole/checkpoints/step_{steps}").exists():
        assert start(*flags, "--name", "whole").wait() == 0, PLACE / "log"
    return flags


def kills(count: int, steps: int = 40) -> None:
    """Runs of 40 steps with a checkpoint a step; each is killed at random moments until it is done, and compared."""
    tally_file = PLACE / "kills.json"
    tally = Counter(json.loads(tally_file.read_text()) if tally_file.exists() else {})
    flags = run_whole(steps)
    while tally["kills"] < count:
        rng = random.Random(tally["kills"])
        run = PLACE / f"runs/killed_{tally['runs']}"
        begun = (run / "config.json").exists()
        torchrun = start(*(["--resume", str(run)] if begun else [*flags, "--name", run.name]))
        while len(workers(torchrun)) < 2 and torchrun.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 16))              # the first seconds go into imports and joining
        victims = rng.choice(("worker", "torchrun", "both"))
        ranks = workers(torchrun)
        if torchrun.poll() is None:
            moment = ("inside a checkpoint" if list(run.glob("checkpoints/.unfinished*")) else
                      "before the first step" if not (run / "metrics.jsonl").exists() else "in a step")
            killed = {"torchrun": [torchrun.pid], "worker": [rng.choice(ranks or [torchrun.pid])],
                      "both": [*ranks, torchrun.pid]}
            for pid in killed[victims]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            tally.update({"kills": 1, f"of {victims}": 1, moment: 1})
        tally["left over"] += not end_of(torchrun, ranks)
        if (run / f"checkpoints/step_{steps}").exists() and torchrun.returncode == 0:
            tally["runs"] += 1
            tally["bit-identical"] += same(PLACE / "runs/whole", run, steps)
        tally_file.write_text(json.dumps(tally, indent=1) + "\n")
        print(dict(tally), flush=True)


def restarts(steps: int = 40) -> None:
    """One of two ranks is killed twice; torchrun starts both again, and the run finishes by itself."""
    flags = run_whole(steps)
    torchrun = start(*flags, "--name", "restarted", restarts=3)
    for wanted in (5, 15):
        while not (PLACE / f"runs/restarted/checkpoints/step_{wanted}").exists() and torchrun.poll() is None:
            time.sleep(0.05)
        os.kill(workers(torchrun)[1], signal.SIGKILL)
    print(f"torchrun ends with {torchrun.wait()}; the same as without a kill: "
          f"{same(PLACE / 'runs/whole', PLACE / 'runs/restarted', steps)}")


def endurance(steps: int) -> None:
    """The default job with more steps, one process: what grows?"""
    run, seen_file = PLACE / "runs/long", PLACE / "endurance.jsonl"
    flags = ["--resume", str(run)] if (run / "config.json").exists() else ["--name", "long", "--steps", str(steps)]
    job = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=PLACE, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    from support.runs import read_log
    with open(seen_file, "a") as seen:
        while job.poll() is None:
            with contextlib.suppress(OSError, IndexError, StopIteration):
                pages = int(Path(f"/proc/{job.pid}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{job.pid}/fd"))
                step = read_log(run)[0][-1]["step"]
                gb = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
                seen.write(json.dumps({"step": step, "gb": gb, "files": files}) + "\n")
                seen.flush()
            time.sleep(5)
    rows = [json.loads(line) for line in seen_file.read_text().splitlines()]
    lines = [line for line in read_log(run)[0] if "seconds" in line]
    for low, high in ((100, 500), (500, 1000), (1000, 1500), (1500, steps + 1)):
        part = [row for row in rows if low <= row["step"] < high]
        pace = [line["seconds"] for line in lines if low <= line["step"] < high]
        if part:
            memory, files = [row["gb"] for row in part], [row["files"] for row in part]
            print(f"steps {low} to {high - 1}: resident {statistics.median(memory):.3f} GB in the median, "
                  f"{max(memory):.3f} at most; {min(files)} to {max(files)} open files; "
                  f"{statistics.median(pace):.2f} s a step in the median")


# ---------------------------------------------------------------------------------------------------------------------
# Faults on disk and in data

SCRIPT = f"{sys.executable} {ROOT}/train.py"
RESUME = f"{SCRIPT} --resume runs/a --steps 3"
ON_MODEL = f"{SCRIPT} --model m {' '.join(SMALL[:6])} --steps 1 --eval-data="
ON_DATA = f"{SCRIPT} --model {ROOT}/assets/tiny --task scene_grounding --steps 2 --prompts-per-step 2 --eval-data="
EVALUATE = f"{sys.executable} {ROOT}/eval.py --model {ROOT}/assets/tiny --data scenes:test --limit 4 --out out"
POSTSCRIPT = "printf '%%!PS-Adobe-3.0 EPSF-3.0\\n%%%%BoundingBox: 0 0 9 9\\n' > "
ROW = '{"image": "a.png", "problem": "red ring", "solution": "[]"'
DAMAGES = {     # how a file is damaged; X stands for its path
    "a folder": "rm -f X; mkdir X", "a pipe": "rm -f X; mkfifo X", "a link to nothing": "rm -f X; ln -s nowhere X",
    "empty": ": > X", "zeros": "head -c 4000 /dev/zero > X", "nested 100,000 deep": "printf '[%.0s' {1..100000} > X",
    "UTF-16": "cp X copy; printf '\\xff\\xfe' > X; sed 's/./&\\x00/g' copy >> X"}
FAULTS = {      # what → (shell commands in a folder with a run of two steps, a model and data; command)
    **{f"{name} of a run: {how}": (damage.replace("X", f"runs/a/{name}"), RESUME) for name in
       ("config.json", "metrics.jsonl", ".lock", "checkpoints/step_2/state.json") for how, damage in DAMAGES.items()},
    **{f"{name} of a model: {how}": (DAMAGES[how].replace("X", f"m/{name}"), ON_MODEL) for name in
       ("config.json", "model.safetensors", "tokenizer.json") for how in ("a folder", "a pipe", "zeros")},
    "step_9 is a copy of step_1": ("cp -r runs/a/checkpoints/step_1 runs/a/checkpoints/step_9", RESUME),
    "step_9 is a link to step_1": ("ln -s step_1 runs/a/checkpoints/step_9", RESUME),
    "a file in the place of step_3": (": > runs/a/checkpoints/step_3", RESUME),
    "config.json of a run: another seed": ("sed -i 's/\"seed\": 42/\"seed\": 7/' runs/a/config.json", RESUME),
    "config.json of a run: null": ("sed -i 's/\"rollouts\": 3/\"rollouts\": null/' runs/a/config.json", RESUME),
    "fewer steps than the run has": ("", RESUME.replace("3", "1")),
    "a file-size limit of 3 MB": ("", f"ulimit -f 3000; {RESUME}"),
    "the run's folder goes in mid-run": ("", f"(sleep 9; mv runs/a b) & {RESUME}0000"),
    "another folder in its place": ("", f"(sleep 9; mv runs/a b; mkdir other; ln -s ../other runs/a) & {RESUME}0000"),
    "ten million layers": ("sed -i 's/\"num_hidden_layers\": [0-9]*/\"num_hidden_layers\": 10000000/' m/config.json",
                           ON_MODEL),
    "an index of shards names a pipe": ("mkfifo m/p; echo '{\"weight_map\": {\"x\": \"p\"}}' > "
                                        "m/model.safetensors.index.json", ON_MODEL),
    "a name of 300 letters": ("", f"{ON_MODEL} --name {'x' * 300}"),
    "PostScript named .png": (f"{POSTSCRIPT} a.png; echo '{ROW}}}' > a.jsonl", f"{ON_DATA} --data a.jsonl"),
    "a video beside the picture": (f"echo '{ROW}, \"video\": \"a.mp4\"}}' > a.jsonl", f"{ON_DATA} --data a.jsonl"),
    "a text of 2 MB": (f"(printf '{ROW}, \"id\": \"'; head -c 2000000 /dev/zero | tr '\\0' x; echo '\"}}') "
                       "> a.jsonl", f"{ON_DATA} --data a.jsonl"),
    "escape sequences in a row": (f"echo '{ROW}, \"id\": \"\\u001b[2J\", \"task\": \"\\u001b[2J\"}}' > a.jsonl",
                                  f"{ON_DATA} --data a.jsonl"),
    "records of an evaluation cut off": ("mkdir out; " + EVALUATE + "; truncate -s -40 out/records.jsonl", EVALUATE),
    "a screen that is ASCII": ("", f"PYTHONIOENCODING=ascii {RESUME}"),
    "a screen that nobody reads": ("", f"{RESUME} 2>&1 | head -n 0; (exit ${{PIPESTATUS[0]}})"),
}


def disk() -> None:
    """Prints a table: the fault; the exit status, 0 where the program went on; what it said of the fault, or its last
    line."""
    prepared, place = PLACE / "prepared", PLACE / "fault"
    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    first = f"{SCRIPT} --model {ROOT}/assets/tiny {' '.join(SMALL[:-6])} --eval-data= --steps 2 --save-every 1 --name a"
    subprocess.run(first, shell=True, cwd=prepared, capture_output=True, check=True)
    shutil.copytree(ROOT / "assets/tiny", prepared / "m")
    shutil.copy(ROOT / "assets/scene.png", prepared / "a.png")
    print("| fault | status | last line |\n|---|---|---|")
    tracebacks = 0
    for what, (disturb, command) in FAULTS.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(prepared, place)
        subprocess.run(["bash", "-c", disturb], cwd=place, capture_output=True, check=True)
        try:
            done = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, timeout=120)
            status, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, said = "hangs", ""
        tracebacks += "Traceback" in said or "\x1b[2J" in said
        told = [line for line in said.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line]
        of_it = [line for line in told if re.search("passed over|it is now|left out", line)]
        print(f"| {what} | {status} | {''.join((of_it or told[::-1])[:1])[:150].strip()} |", flush=True)
    print(f"\n{len(FAULTS)} faults, {tracebacks} tracebacks or escape sequences")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text

def mutate(text: str, rng: random.Random, others: list[str]) -> str:
    """One to six changes: bytes, pieces repeated, moved, cut, of another answer; odd characters; deep nesting."""
    odd = ["\x00", "\ud800", "\u202e", "٣", "ß", "𝟗", "1e999", "-0", "NaN", "\\boxed{", "{" * 30, "[" * 30, '"', "\\",
           "<answer>", "</answer>", "<think>", "</think>", "null", "9" * 400, "\n" * 50, "^{9^{9", "\\frac{", "%",
           "e-7"]
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        piece = rng.choice((rng.choice(odd), text[i:j], text[i:j] * rng.randint(2, 30), rng.choice(others)[i:j], ""))
        text = (text[:i] + piece + text[rng.choice((i, j)):])[:2 * LONG]
    return text


def seeds_of_text() -> tuple[list[str], dict[str, str]]:
    """Answers to begin from; of each task a truth."""
    items = [{"bbox_2d": [10, 20, 50, 60], "point_2d": [30, 40]}, {"bbox_2d": [70, 10, 100, 40], "point_2d": [80, 20]}]
    texts = [f"<think>a thought. and one more.</think><answer>{json.dumps(items)}</answer>", "<answer>[]</answer>",
             "<think>x</think><answer>\\boxed{\\frac{1}{2}}</answer>", "so it is \\boxed{41.2}.", "12 %", "yes",
             "<answer>B. red</answer>", '<answer>{"bbox_2d": [1, 2, 3, 4]}</answer>']
    from rewards import TASKS
    plain = {"math": "1/2", "scene_math": "2", "vqa": "yes"}
    truths = {name: json.dumps(items) if task.boxes else plain.get(name, '["14"]') for name, task in TASKS.items()}
    return texts, truths


def check(text: str, truths: dict[str, str]) -> list[str]:
    """What is wrong with the rewards of a text: an exception, too slow, more than the task's best; in grounding other
    points than the slow, strict reward of the tests gives."""
    from rewards import TASKS, score
    from tests.test_rewards import slow_terms
    faults = []
    for name, truth in truths.items():
        best = 7.0 if TASKS[name].boxes else 1.0
        began = time.process_time()
        reward = score(name, text, truth)
        seconds = time.process_time() - began
        if reward.error and reward.error.startswith("reward_failed"):
            faults.append(f"{name}: {reward.error}")
        if not 0 <= reward.total <= best:
            faults.append(f"{name}: {reward.total} points of {best}")
        if name == "grounding" and len(text) < 3000:
            expected = sum(slow_terms(text, json.loads(truth)).values())
            if abs(reward.total - expected) > 1e-9:
                faults.append(f"{name}: {reward.total} points instead of {expected}")
        if seconds > 0.05:       # of this process: the verifier of math is another
            faults.append(f"{name}: {seconds:.3f} s")
    return faults


def text(count: int) -> None:
    texts, truths = seeds_of_text()
    without_math = {name: truth for name, truth in truths.items() if "math" not in name}     # sympy takes 10 ms a text
    faults: Counter = Counter()
    rng, pool = random.Random(1), list(texts)
    for number in range(count):
        candidate = mutate(rng.choice(pool), rng, texts)
        if len(pool) < 2000:
            pool.append(candidate)
        for fault in check(candidate, truths if number % 20 == 0 else without_math):
            if faults[fault.split(",")[0]] < 1:
                print(f"{number}: {fault}: {candidate[:300]!a}", flush=True)
            faults[fault.split(":")[0]] += 1
        if number % 50_000 == 49_999:
            print(f"{number + 1} texts, each through {len(without_math)} rewards, every 20th through math too; faults: "
                  f"{dict(faults) or 'none'}", flush=True)


def guided(minutes: float) -> None:
    import atheris
    with atheris.instrument_imports(include=["rewards", "support.answers", "support.math_answers"]):
        import rewards  # noqa: F401
    texts, truths = seeds_of_text()
    corpus = PLACE / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(texts):
        (corpus / f"seed{number}").write_text(seed)

    def one(data: bytes) -> None:
        if faults := check(data.decode(errors="surrogateescape"), truths):
            raise AssertionError(faults)
    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={int(60 * minutes)}", f"-max_len={LONG}"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("disk", "kills", "restarts", "endurance", "text", "atheris"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if args.what == "disk":
        disk()
    elif args.what == "kills":
        kills(args.count)
    elif args.what == "restarts":
        restarts()
    elif args.what == "endurance":
        endurance(args.steps)
    elif args.what == "text":
        text(args.count)
    else:
        guided(args.minutes)


if __name__ == "__main__":
    main()
