"""Quantities joined over ranks, the line of a step, peak memory."""
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from support.lora import adapters
from support.optimizers import learn, state_bytes
from support.ranks import gather_json
from support.verify_math import ended_now


class Meter(defaultdict):
    """Holds named quantities, joined over micro-batches and ranks: name → [sum, number of values];
    a total has number 0. If the name ends in _max: the largest, with number 0."""
    def __init__(self):
        super().__init__(lambda: [0.0, 0])

    def add(self, name: str, values) -> None:
        """Adds to a mean: every one of `values` counts once."""
        if values := [float(v) for v in values]:
            largest = name.endswith("_max")
            self.join(name, max(values) if largest else sum(values), 0 if largest else len(values))

    def total(self, name: str, value: float) -> None:
        self.join(name, value, 0)

    def join(self, name: str, value: float, count: int) -> None:
        known = self[name]
        self[name] = [max(known[0], value) if name.endswith("_max") else known[0] + value, known[1] + count]

    def take(self, logged: dict[str, Tensor]) -> None:
        """Takes what objective.loss logs, in one piece from a GPU: adds up tensors without
        dimensions, and averages all others."""
        numbers = torch.cat([x.double().flatten() for x in logged.values()]).tolist() if logged else []
        for name, values in logged.items():
            own, numbers = numbers[:values.numel()], numbers[values.numel():]
            self.add(name, own) if values.dim() else self.total(name, *own)

    def read(self, device) -> dict[str, float]:
        joined = Meter()
        for part in gather_json(self, device):
            for name, (value, count) in part.items():
                joined.join(name, value, count)
        return {name: total / count if count else total for name, (total, count) in joined.items()}


def measure_groups(groups: list, meter: Meter, full_accuracy: Callable[[str], float]) -> None:
    """Measures groups (train.Group) before any gradient. docs/logged.md defines each name.
    full_accuracy: task → the most points of its accuracy term (rewards.py)."""
    if unverified := ended_now():
        meter.total("errors/math_ended", unverified)
    for group in groups:
        rollouts, ys = group.rollouts, [o for o in group.responses if o.is_y and o.reward is not None]
        if not rollouts:        # nothing was rewarded
            continue
        for who, responses in (("o", rollouts), ("y", ys)):
            for o in responses:
                for term, points in o.reward.terms.items():
                    meter.add(f"{who}/{term}", [points])
        most = full_accuracy(group.prompt.example.task)
        meter.add("accuracy", [o.reward.terms.get("accuracy", 0.0) / most for o in rollouts])
        for o in rollouts:
            meter.add("unreadable", [o.reward.error is not None])
            if o.reward.error:
                meter.total(f"errors/{o.reward.error}", 1)
            meter.add("entropy", o.entropy)
        meter.add("r(o)", [o.r for o in rollouts])
        meter.add("length", [len(o.tokens) for o in rollouts])
        meter.add("truncated", [o.truncated for o in rollouts])
        meter.add("tied", [not any(o.advantage for o in group.responses)])
        for y in ys:
            meter.add("r(y)", [y.r])
            meter.add("advantage_y", [y.advantage])
            meter.add("smoothed", [group.smoothed])


def peak_memory_gb(device: torch.device) -> float:
    """Returns the peak in 1e9 bytes: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":         # its ru_maxrss begins with that of the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9              # macOS counts in bytes


def memory_line(model: nn.Module, world: int, offload: bool) -> str:
    """Says, by arithmetic, what a rank needs before any activation."""
    weights, learning = (sum(p.numel() * p.element_size() for p in parameters) / 1e9
                         for parameters in (model.parameters(), learn(model)))
    base = sum(layer.base.numel() * layer.base.element_size() for layer in adapters(model).values()) / 1e9
    return (f"memory of each rank before activations: weights {weights:.2f} GB, gradients {learning:.2f} GB, optimizer "
            f"{state_bytes(model) / world / 1e9:.2f} GB{' in the memory of the host' if offload else ''}"
            + (f"; {base:.2f} GB of the base in the memory of the host" if base else ""))


def metric_text(name: str, value: float | None) -> str:
    """Returns a metric of an evaluation as it is shown: a dash if there was nothing to measure."""
    digits = {"examples": 0, "length": 1}.get(name, 3)
    return "–" if value is None else f"{value:.{digits}f}"


def bar_line(m: dict, evaluation: dict) -> str:
    """Returns what stands behind the bar. m: a line of metrics.jsonl. evaluation: the newest."""
    parts = [f"r(o) {m['r(o)']:.2f}" if "r(o)" in m else "",
             f"N-acc {evaluation['N-acc']:.3f}" if evaluation.get("N-acc") is not None else ""]
    for verb, name in (("samples", "sampling_tokens_per_s"), ("trains", "training_tokens_per_s")):
        if name in m:
            parts.append(f"{verb} {m[name]:,.0f} tokens/s")
            break
    return ", ".join(filter(None, parts))


def progress_line(m: dict) -> str:
    """Returns a line of metrics.jsonl in at most 120 columns."""
    shown = {"r(o)": ".2f", "accuracy": ".2f", "o/thinks": ".2f", "advantage_y": "+.2f",
             "smoothed": ".2f", "tied": ".2f", "entropy": ".2f", "entropy_y": ".2f", "length": ".0f"}
    parts = (f"{name.removeprefix('o/')} {m[name]:{form}}" for name, form in shown.items() if name in m)
    return f"{m['step']:>4}  " + "  ".join(parts)
