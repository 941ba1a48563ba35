"""The first picture of the README: one question, and N-acc over the steps of three methods.

    python experiments/first.py                                   draws assets/first.png from experiments/first.json
    python experiments/first.py runs/sft runs/rlvr runs/visurf    makes experiments/first.json anew, then draws

The runs are those of `torchrun train.py --eval-every 20`, with `--method sft --lr 0.002`, with `--method rlvr
--lr 0.0005`, and as it is; seed 42. N-acc is of their own evaluations, 192 examples of `scenes:val`.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from PIL import Image  # noqa: E402

from support.curves import COLOURS, read_metrics  # noqa: E402
from support.files import as_json  # noqa: E402
from support.runs import read_config, versions  # noqa: E402

DATA, PICTURE, SCENE = (ROOT / path for path in ("experiments/first.json", "assets/first.png", "assets/scene.png"))
QUESTION = "yellow ring"


def answer_of(model: str) -> str:
    """Returns the greedy answer of a model to the question about the scene."""
    from data import Processor
    from model import load_model
    from rollout import generate
    from support.sources import Example
    processor = Processor(model)
    scene = Image.open(SCENE).convert("RGB")
    prompt = processor.prompt(Example("scene", (scene,), QUESTION, "[]", "scene_grounding"))
    [[response]] = generate(load_model(model), [prompt], 128)
    return processor.decode(response.tokens)


def measure(runs: list[Path]) -> None:
    """Writes DATA from the runs; the last one answers beside the base."""
    answers = {"base": answer_of("assets/tiny"), "visurf": answer_of(str(runs[-1]))}
    data: dict = {"question": QUESTION, "answers": answers, "N-acc": {}, "versions": versions()}
    for run in runs:
        steps, values = read_metrics(run)["EVAL N-acc"]
        data["N-acc"][read_config(run)["config"]["method"]] = dict(zip(steps, values))
    DATA.write_text(as_json(data, 1))


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from support.answers import parse_boxes
    data = json.loads(DATA.read_text())
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    figure.suptitle(f'"Please find the {data["question"]}." There is none, so the right answer is []', fontsize=12)
    for at, title, name in ((axes[0], "the base model", "base"), (axes[1], "after ViSurf", "visurf")):
        response = data["answers"][name]
        boxes, _ = parse_boxes(response)
        at.imshow(Image.open(SCENE).convert("RGB"), interpolation="nearest")
        for box in boxes:
            x1, y1, x2, y2 = box["bbox_2d"]
            at.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1 + 1, y2 - y1 + 1, fill=False,
                                   edgecolor=COLOURS[1], linewidth=2.5))
        at.set_title(title)
        answer = response.partition("<answer>")[2].partition("</answer>")[0]
        at.set_xlabel(answer.replace(', "point', ',\n"point'), family="monospace", fontsize=14 if answer == "[]" else 9)
        at.set_xticks([])
        at.set_yticks([])
    for title, colour in (("SFT", COLOURS[1]), ("RLVR", COLOURS[6]), ("ViSurf", COLOURS[0])):
        points = {int(step): value for step, value in data["N-acc"][title.lower()].items()}
        axes[2].plot(list(points), list(points.values()), color=colour, marker="o", markersize=3, label=title)
    axes[2].set(xlabel="step", title="N-acc: absent things answered by []", ylim=(-0.03, 1.03), xlim=(0, None))
    axes[2].grid(alpha=0.3)
    axes[2].legend(loc="center right")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure([Path(run) for run in sys.argv[1:]])
    draw()
    print(PICTURE.relative_to(ROOT))
