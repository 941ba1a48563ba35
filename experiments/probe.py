"""What a base knows of absent things before it is post-trained: `python experiments/probe.py [BASE ...]`.

A linear probe: logistic regression from the hidden state after the prompt, where the first token of the answer is
decided, to whether the thing that is asked for is in the picture. It is fitted on questions of scenes:train and judged
on those of scenes:test, against the two kinds of absent things apart: a thing of its colour is in the picture, in
another shape, or none is. 0.5 is chance.

And what it says of them: how many of its rollouts reject a thing that is in the picture, and one that is not. RLVR
learns from these alone.

Into experiments/probe.json, which `reproduce.py tables` reads.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Processor, load  # noqa: E402
from experiments.reproduce import BASES, ROOT, base_of, colour_is_there  # noqa: E402
from model import Qwen2_5_VL, load_model  # noqa: E402
from rewards import TASKS  # noqa: E402
from rollout import generate, prefill, uniforms  # noqa: E402
from support import photos, scenes  # noqa: E402
from support.answers import parse_boxes  # noqa: E402
from support.runs import versions  # noqa: E402

FIT, JUDGE = ("scenes:train", 8192), ("scenes:test", 1536)     # data, and the first so many of its examples
WORLDS = {"scenes": scenes, "photos": photos}
ABSENT_KINDS = ("colour there", "not there")       # as in the tables of reproduce.py
ROLLOUTS, LONGEST = 8, 128                         # of each question, and their tokens, as in the default job


@torch.no_grad()
def states(model: Qwen2_5_VL, processor: Processor, data: str, number: int) -> tuple[Tensor, list[str]]:
    """Of every grounding question: the hidden state [D] after its prompt, and "present" or one of ABSENT_KINDS."""
    source, hidden, kinds = load(data), [], []
    world, _, split = data.partition(":")
    for begin in range(0, number, 64):
        examples = [(i, source[i]) for i in range(begin, begin + 64)]
        asked = [(i, example) for i, example in examples if TASKS[example.task].boxes]
        hidden.append(prefill(model, [processor.prompt(example) for _, example in asked], 1, 1)[0])
        for i, example in asked:
            there = colour_is_there(split, i, example.question, WORLDS[world])
            kinds.append("present" if example.answer != "[]" else ABSENT_KINDS[not there])
    return torch.cat(hidden).double(), kinds


def rejecting(model: Qwen2_5_VL, processor: Processor, data: str, number: int) -> dict[str, float]:
    """The share of rollouts (temperature 1) that answer `[]`, on the present and on the absent things of the
    questions."""
    source = load(data)
    says: dict[str, list[bool]] = {"present": [], "absent": []}
    for begin in range(0, number, 64):
        asked = [example for i in range(begin, begin + 64) if TASKS[(example := source[i]).task].boxes]
        groups = generate(model, [processor.prompt(example) for example in asked], LONGEST,
                          uniforms(0, range(begin, begin + len(asked)), ROLLOUTS, LONGEST))
        for example, group in zip(asked, groups):
            says["present" if example.answer != "[]" else "absent"] += [
                parse_boxes(processor.decode(response.tokens)) == ([], None) for response in group]
    return {kind: round(sum(said) / len(said), 4) for kind, said in says.items()}


def linear_probe(x: Tensor, present: Tensor, x_test: Tensor, present_test: Tensor) -> float:
    """Fitted on x [N, D], present bool [N]; the mean of the shares of present and of absent test questions that are
    told right. In the fit present and absent weigh alike, every feature has unit variance, and the weights are held
    small (L2)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    weights = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    each = torch.where(present, 0.5 / present.sum(), 0.5 / (~present).sum())
    optimizer = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[1:] + weights[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, present.to(x.dtype), each, reduction="sum")
        value = value + 1e-3 * weights[1:].square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    right = (x_test @ weights[1:] + weights[0] > 0).detach() == present_test
    return (right[present_test].double().mean() + right[~present_test].double().mean()).item() / 2


def probe(model: Qwen2_5_VL, processor: Processor, fit: tuple[str, int] = FIT, judge: tuple[str, int] = JUDGE
          ) -> dict[str, float]:
    """ABSENT_KINDS → accuracy."""
    (x, kinds), (x_test, kinds_test) = (states(model, processor, *data) for data in (fit, judge))
    accuracy = {}
    for kind in ABSENT_KINDS:
        questions = []
        for hidden, own in ((x, kinds), (x_test, kinds_test)):
            kept = torch.tensor([k in ("present", kind) for k in own])
            questions += [hidden[kept], torch.tensor([k == "present" for k in own])[kept]]
        accuracy[kind] = round(linear_probe(*questions), 4)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", help=f"of {', '.join(BASES)}; default: all")
    bases = parser.parse_args().bases or BASES
    if unknown := set(bases) - set(BASES):
        parser.error(f"there is no base {', '.join(sorted(unknown))}")
    (ROOT / "runs").mkdir(exist_ok=True)
    path = ROOT / "experiments/probe.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    commit = versions()["commit"]                  # before probe.json changes
    for base in bases:
        folder = Path(base_of(base))
        model, processor = load_model(folder), Processor(folder)
        made[base] = {"commit": commit, "accuracy": probe(model, processor),
                      "rejecting": rejecting(model, processor, *JUDGE)}
        print(base, made[base], flush=True)
        path.write_text(json.dumps({name: made[name] for name in BASES if name in made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
