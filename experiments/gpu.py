"""How near one H100 or H200 comes to its limits, one part a call; experiments/gpu.sh calls them all.

    python experiments/gpu.py PART FILE [--tiny]

    tests        tests/test_device.py, and the tests that need CUDA
    3B, 7B       token steps of 16 and 128 rollouts, plain and by CUDA graphs, against reading all weights and caches
                 once, at the nominal bandwidth and at that of a large copy; forward and backward of one row and of
                 several, by what is recomputed, against the peak of the matrix units (MFU)
    step         a whole step of 3B: the share of one of the 8 GPUs of --preset paper, 256 new tokens
    1x24G-3b, 1x24G-7b    the dry runs of these presets
    lora, qwen3  token steps of a 3B with adapters and of a Qwen3-VL
    compiled     training of 7B as above, its decoder layers by torch.compile: a candidate, which train.py does not use

FILE holds what was measured so far, as JSON, and "unfinished" until the part has ended. A line that fails leaves its
reason, and the next one goes on. Weights are random. --tiny: on a CPU, to see that all of it runs.
"""
import argparse
import contextlib
import gc
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import Response, collate, pack_group  # noqa: E402
from experiments import bench  # noqa: E402
from rollout import generate  # noqa: E402
from support.equip import equip  # noqa: E402
from support.log import peak_memory_gb  # noqa: E402
from support.ranks import leave_ranks, start_ranks  # noqa: E402
from support.runs import versions  # noqa: E402

PEAK = 989e12       # FLOP/s of an H100 or H200, dense bfloat16
NOMINAL = {"H100": 3.35e12, "H200": 4.8e12}     # bytes/s
PARTS = ("tests", "3B", "7B", "step", "1x24G-3b", "1x24G-7b", "lora", "qwen3", "compiled")


class Lines(bench.Table):
    """What a part has measured, written to its file with every line."""
    def __init__(self, part: str, file: Path):
        super().__init__()
        self.part, self.file = part, file
        self.write(unfinished="it did not end")

    def write(self, **state: str) -> None:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.file.write_text(json.dumps({"part": self.part, **state, "machine": machine, "versions": versions(),
                                         "lines": self}, indent=1) + "\n")

    def append(self, line: dict) -> None:
        super().append(line)
        self.write(unfinished="it did not end")

    def attempt(self, measure, setting, *args, **settings) -> None:
        try:
            measure(self, setting, *args, **settings)
        except Exception as error:
            traceback.print_exc()
            plain = [str(x) for x in (setting, *args) if isinstance(x, (int, str))]
            self.append({"what": measure.__name__, "setting": ", ".join([*plain, *settings]),
                         "failed": f"{type(error).__name__}: {error}"[:400]})
        gc.collect()
        torch.cuda.empty_cache()


def copied(size: int) -> float:
    """Returns bytes per second, read and written, of the best of some copies of so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return max(2 * size / bench.measure(lambda: target.copy_(source))[0] for _ in range(8))


def token_steps(lines: Lines, size: str, model, prompts: list, G: int, R: int, bandwidths: dict[str, float]) -> None:
    """Times the last three quarters of R token steps, sampling included; medians of 3. `same_tokens`: share of the
    greedy answers' tokens that are the same by graphs as without."""
    def seconds(graphs: bool) -> float:
        number, moments = itertools.count(1), []

        def clock(logits, *_):
            if next(number) in (R // 4, R):
                bench.synchronise()
                moments.append(time.perf_counter())
            return logits
        bench.rollouts(model, prompts, G, R, graphs=graphs, adjust=clock)
        return (moments[1] - moments[0]) / (R - R // 4)
    P = len(prompts[0].tokens)
    bound = bench.count_token_step(model.config, len(prompts), G, P, R)[2]
    plain, graphed = (torch.tensor([o.tokens for [o] in generate(model, prompts[:4], R // 4, graphs=graphs)])
                      for graphs in (False, True))
    same = (plain == graphed).double().mean()
    for graphs in (False, True):
        step = statistics.median(seconds(graphs) for _ in range(3))
        lines.line("token step", f"{size}, {len(prompts)}×{P} tokens, G {G}, {R} new{', graphs' * graphs}",
                   ms=1000 * step, tokens_per_s=len(prompts) * G / step, bound_gb=bound / 1e9, same_tokens=float(same),
                   **{f"share_{name}": bound / bandwidth / step for name, bandwidth in bandwidths.items()})


def training(lines: Lines, size: str, model, prompts: list, S: int, R: int, recomputed: str, compiled: bool = False
             ) -> None:
    """Counts 6 FLOP for each weight and useful token (2 forward, 4 backward), and the attention's; neither padding nor
    recomputing counts."""
    batch = collate([pack_group(prompt, list(map(Response, responses)))[0] for prompt, responses
                     in zip(prompts, bench.make_responses(prompts, S, R))], model.lm_head.weight.device)
    for layer in model.model.layers if compiled else ():
        layer.compile()

    def call():
        (-model(**vars(batch), checkpoint=recomputed)[0].sum()).backward()
        model.zero_grad(set_to_none=True)
    first, _ = bench.measure(call)
    seconds, gb = bench.compare({"ours": call}, 3)["ours"]
    c, P = model.config, len(prompts[0].tokens)
    vision = sum(p.numel() for p in model.visual.parameters())
    text = sum(p.numel() for p in model.model.layers.parameters()) * (P + S * R) + model.lm_head.weight.numel() * S * R
    pairs = P * P / 2 + S * (R * P + R * R / 2)        # of a query and a key that it sees
    flop = 6 * (text + vision * len(prompts[0].patches)) + 12 * pairs * c.hidden_size * c.num_hidden_layers
    lines.line("training", f"{size}, {len(prompts)} × ({P} + {S}×{R}) tokens, recomputed: {recomputed}"
               f"{', compiled' * compiled}", mfu=len(prompts) * flop / seconds / PEAK, seconds=seconds, gb=gb,
               useful_tokens_per_s=len(prompts) * (P + S * R) / seconds, first_seconds=first)


def whole_step(lines: Lines, size: str, model, prompts: list, R: int) -> None:
    """One update of all weights by the options of --preset paper: y and 8 rollouts of each prompt. `gb`: all that was
    allocated at the peak."""
    step = bench.our_step(model, train.Config(**{**train.PRESETS["paper"], "max_new_tokens": R}), prompts)
    step()                              # makes the optimizer's state
    seconds: dict[str, float] = {}
    with bench.clocked(seconds, [(train, "make_groups", "sampling"), (train, "update", "updating")]):
        step()
    lines.line("whole step", f"{size}, {len(prompts)}×{len(prompts[0].tokens)} tokens, G 8, {R} new",
               seconds=sum(seconds.values()), **seconds, gb=peak_memory_gb(model.lm_head.weight.device))


def dry_run(lines: Lines, preset: str, size: str, folder: Path, *flags: str) -> None:
    """train.py --dry-run on one made picture of 840×840, its weights random and made where they are used."""
    base = bench.make_folder(size, folder / size)
    prompt, = bench.make_prompts(base, 1, 840, 1)
    prompt.images[0].save(folder / "picture.png")
    (folder / "train.jsonl").write_text(json.dumps({"image": "picture.png", "question": "the cup", "answer": [
        {"bbox_2d": [60, 30, 241, 90], "point_2d": [150, 61]}]}) + "\n")
    command = ["train.py", "--preset", preset, "--model", str(base), "--data", str(folder / "train.jsonl"), "--dry-run",
               *flags]
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(printed), mock.patch.object(
            train, "load_model", lambda _, dtype, device: bench.make_model(size, folder / size, device, dtype)):
        train.main()
    lines.append({"what": "dry run", "setting": preset, "printed": printed.getvalue().splitlines()[-2:]})
    print(printed.getvalue())


def tests(lines: Lines, chosen: str) -> None:
    files = [f"tests/test_{name}.py" for name in ("device", "rollout", "joined")]
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *files, "-k", chosen], capture_output=True, text=True,
                         cwd=Path(__file__).resolve().parent.parent)
    print(ran.stdout)
    lines.append({"what": "tests", "setting": chosen, "printed": ran.stdout.splitlines()[-12:]}
                 | ({"failed": "see printed"} if ran.returncode else {}))


def measure(lines: Lines, part: str, folder: Path, tiny: bool) -> None:
    """Runs a part. Shapes are those of the paper's data: a picture of 840×840 is 900 tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, words, S, R = (112, 7, 3, 8) if tiny else (840, 60, 9, 256)
    if part == "tests":
        return lines.attempt(tests, "wrong_device" if tiny else "test_device or cuda")
    if part in train.PRESETS:
        flags = ("--rollouts", "2", "--max-new-tokens", "4", "--prompts-per-step", "2") if tiny else ()
        return lines.attempt(dry_run, part, "tiny" if tiny else part[-2:].upper(), folder, *flags)
    size = {"step": "3B", "lora": "3B", "compiled": "7B", "qwen3": "Qwen3-4B"}.get(part, part)
    size = {"qwen3": "Qwen3-tiny"}.get(part, "tiny") if tiny else size
    if part == "step":
        start_ranks()
    model = bench.make_model(size, folder / size, device, torch.bfloat16)
    prompts = bench.make_prompts(model.folder, 16, pixels, words)
    if part == "lora":
        equip(model, train.Config(lora_rank=16))
    if part == "step":
        lines.attempt(whole_step, size, model, prompts[:2], R)
        return leave_ranks()
    if part == "compiled":
        for recomputed in ("blocks", "none"):
            lines.attempt(training, size, model, prompts[:1], S, R, recomputed, compiled=True)
        return None
    name = next((name for name in NOMINAL if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    bandwidths = {"of_copy": copied(2 ** 24 if tiny else 2 ** 30)} | ({"of_nominal": NOMINAL[name]} if name else {})
    for B in (16,) if part == "7B" else (2, 16):
        lines.attempt(token_steps, size, model, prompts[:B], 2 if tiny else 8, R // 2, bandwidths)
    for rows in {"3B": (1, 4), "7B": (1, 2)}.get(part, ()):     # several without recomputing need more than 80 GB
        for recomputed in ("blocks", "cheap", "none")[:3 if rows == 1 else 2]:
            lines.attempt(training, size, model, prompts[:rows], S, R, recomputed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path, help="JSON, for what was measured")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tokens")
    args = parser.parse_args()
    lines = Lines(args.part, args.file)
    with tempfile.TemporaryDirectory() as folder:
        measure(lines, args.part, Path(folder), args.tiny)
    lines.write()


if __name__ == "__main__":
    main()
