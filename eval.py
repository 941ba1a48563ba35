"""Evaluation: greedy answers, the paper's metrics, a picture.

    python eval.py --model assets/tiny --data scenes:test        (a model folder, a run of train.py, or a hub id)

Metrics are pure functions of (predicted boxes, true boxes). Without segmentation masks the filled boxes stand in for
them, and the table says so. Corners are inclusive pixels throughout (paper.md, section 5).
"""
import argparse
import json
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoint import newest_checkpoint
from data import Processor, Prompt, convert_boxes, load
from model import Qwen2_5_VL
from rewards import TASKS, has_thinking_format, iou_matrix, parse_boxes
from rollout import generate


@dataclass
class Record:
    """One evaluated example. predicted, truth: boxes in the frame the model saw; error: why no box could be read."""
    id: str
    task: str
    question: str
    response: str
    length: int
    thinks: bool
    correct: bool            # tasks without boxes: full reward
    error: str | None
    predicted: list[dict]
    truth: list[dict]
    size: tuple[int, int]    # (width, height) of that frame


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def box_mask(items: list[dict], size: tuple[int, int]) -> np.ndarray:
    """The union of the filled boxes, bool [height, width], cut at the picture's border. Stands in for a mask."""
    mask = np.zeros((size[1], size[0]), bool)
    for x1, y1, x2, y2 in (item["bbox_2d"] for item in items):
        x1, y1 = max(0, round(x1)), max(0, round(y1))
        mask[y1:max(y1, round(y2) + 1), x1:max(x1, round(x2) + 1)] = True
    return mask


def intersection_union(predicted: list[dict], truth: list[dict], size: tuple[int, int]) -> tuple[int, int]:
    """Pixels in both masks, pixels in either."""
    a, b = box_mask(predicted, size), box_mask(truth, size)
    return int((a & b).sum()), int((a | b).sum())


def mask_iou(predicted: list[dict], truth: list[dict], size: tuple[int, int]) -> float:
    """I/U; 1 if the truth is empty and no box was predicted; 0 if U = 0 otherwise."""
    if not truth and not predicted:
        return 1.0
    i, u = intersection_union(predicted, truth, size)
    return i / u if u else 0.0


def hull(items: list[dict]) -> list[float]:
    """The box around all boxes."""
    boxes = np.array([item["bbox_2d"] for item in items], float)
    return [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]


def box_hit(predicted: list[dict], truth: list[dict]) -> bool:
    """Whether any predicted box, or the union of all, has IoU > 0.5 with the truth box (the box around all true boxes).
    Empty truth: whether nothing was predicted."""
    if not truth or not predicted:
        return not truth and not predicted
    candidates = np.array([item["bbox_2d"] for item in predicted] + [hull(predicted)], float)
    return bool((iou_matrix(candidates, np.array([hull(truth)])) > 0.5).any())


def targets_found(predicted: list[dict], truth: list[dict]) -> int:
    """How many true boxes have a predicted box with IoU > 0.5."""
    if not predicted or not truth:
        return 0
    boxes, true_boxes = (np.array([item["bbox_2d"] for item in items], float) for items in (predicted, truth))
    return int((iou_matrix(boxes, true_boxes) > 0.5).any(0).sum())


def mean(values) -> float | None:
    """None where there is nothing to average: the table shows a dash, never a 0 that was not measured."""
    values = list(values)
    return float(statistics.fmean(values)) if values else None


def summarise(records: list[Record]) -> dict[str, float | None]:
    """Every metric of the table. Present and absent: grounding questions with and without a true box."""
    grounding = [r for r in records if TASKS[r.task].boxes]
    present, absent = [r for r in grounding if r.truth], [r for r in grounding if not r.truth]
    others = [r for r in records if not TASKS[r.task].boxes]
    areas = [intersection_union(r.predicted, r.truth, r.size) for r in grounding]
    union, targets = sum(u for _, u in areas), sum(len(r.truth) for r in present)
    return {
        "gIoU": mean(mask_iou(r.predicted, r.truth, r.size) for r in grounding),
        "cIoU": sum(i for i, _ in areas) / union if union else None,
        "N-acc strict": mean(not r.predicted and r.error is None for r in absent),
        "N-acc official": mean(not r.predicted for r in absent),     # an unreadable answer counts as a rejection
        "T-acc": mean(bool(r.predicted) for r in present),
        "bbox accuracy": mean(box_hit(r.predicted, r.truth) for r in present),
        "targets IoU>0.5": sum(targets_found(r.predicted, r.truth) for r in present) / targets if targets else None,
        "thinks, present": mean(r.thinks for r in present),
        "thinks, absent": mean(r.thinks for r in absent),
        "answers": mean(r.correct for r in others),                  # counting and other short answers
        "length": mean(r.length for r in records),
        "examples": len(records),
    }


def table(columns: dict[str, dict[str, float | None]]) -> str:
    """{title: metrics} → a text table, one metric a line."""
    def cell(name: str, value) -> str:
        if value is None:
            return "–"
        return f"{value:d}" if name == "examples" else f"{value:.1f}" if name == "length" else f"{value:.3f}"
    names = list(next(iter(columns.values())))
    widths = [max(len(title), 8) for title in columns]
    lines = [" " * 16 + "".join(f"  {title:>{w}}" for title, w in zip(columns, widths))]
    lines += [f"{name:<16}" + "".join(f"  {cell(name, m[name]):>{w}}" for m, w in zip(columns.values(), widths))
              for name in names]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Running a model

def evaluate(model: Qwen2_5_VL, processor: Processor, examples: list, max_new_tokens: int, batch: int = 64,
             progress: bool = True) -> tuple[list[Record], list[Prompt]]:
    """Greedy answers to the examples, in order. Returns their records and, for pictures, their prompts."""
    records, prompts = [], []
    with tqdm(total=len(examples), desc="evaluating", unit="ex", disable=not progress, leave=False) as bar:
        for start in range(0, len(examples), batch):
            chunk = [processor.prompt(e) for e in examples[start:start + batch]]
            for prompt, (response,) in zip(chunk, generate(model, chunk, 1, max_new_tokens, temperature=0)):
                records.append(judge(prompt, processor.decode(response.tokens), len(response.tokens)))
            prompts += chunk
            bar.update(len(chunk))
    return records, prompts


def judge(prompt: Prompt, response: str, length: int) -> Record:
    example, task = prompt.example, TASKS[prompt.example.task]
    predicted, error = parse_boxes(response) if task.boxes else ([], None)
    correct = not task.boxes and task.reward(response, prompt.answer).terms["accuracy"] == 1
    return Record(example.id, example.task, example.question, response, length, has_thinking_format(response), correct,
                  error, predicted, json.loads(prompt.answer) if task.boxes else [], prompt.size)


def original_frame(record: Record, prompt: Prompt) -> list[dict]:
    """Predicted boxes in the pixels of the picture as it was given."""
    return json.loads(convert_boxes(json.dumps(record.predicted), prompt.size, prompt.original_size))


def draw_overlay(records: list[Record], prompts: list[Prompt], path: Path, columns: int = 4, side: int = 320) -> None:
    """A sheet of pictures: true boxes green, predicted boxes red with their point, question and answer below."""
    lines_of_text, line = 7, 14
    cell = (side + 8, side + lines_of_text * line + 8)
    shown = [(r, p) for r, p in zip(records, prompts) if p.image is not None]
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(shown) // columns)), "white")
    for at, (record, prompt) in enumerate(shown):
        ratio = side / max(prompt.image.size)
        picture = prompt.image.resize((round(prompt.image.width * ratio), round(prompt.image.height * ratio)))
        pen = ImageDraw.Draw(picture)
        for items, colour, width in ((record.truth, (0, 255, 60), 4), (record.predicted, (255, 0, 0), 2)):
            for item in items:
                x1, y1, x2, y2 = (c * ratio for c in item["bbox_2d"])
                pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=width)
                x, y = (c * ratio for c in item["point_2d"])
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        corner = (at % columns * cell[0] + 4, at // columns * cell[1] + 4)
        sheet.paste(picture, corner)
        text = textwrap.wrap(f"Q: {record.question}", 52)[:2] + textwrap.wrap(record.response, 52)
        below = (corner[0], corner[1] + side + 2)
        ImageDraw.Draw(sheet).multiline_text(below, "\n".join(text[:lines_of_text]), "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, run folder of train.py, or hub id")
    parser.add_argument("--data", default="scenes:test", help="scenes:SPLIT or a .jsonl file")
    parser.add_argument("--limit", type=int, default=0, help="evaluate the first LIMIT examples only (0: all)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="prompts decoded together")
    parser.add_argument("--out", default="", help="folder for metrics.json, records.jsonl, overlay.png "
                                                  "(default: eval/ beside the model's weights)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.model
    if (Path(folder) / "checkpoints").is_dir():
        folder = newest_checkpoint(Path(folder))
    model = Qwen2_5_VL.from_pretrained(folder, torch.bfloat16 if device == "cuda" else torch.float32, device)
    source = load(args.data)
    count = min(args.limit or len(source), len(source))
    records, prompts = evaluate(model, Processor(model.folder), [source[i] for i in range(count)], args.max_new_tokens,
                                args.batch)
    metrics = summarise(records)
    print(table({f"{args.model} on {args.data}": metrics}))
    print("gIoU and cIoU: filled boxes stand in for masks")
    out = Path(args.out or model.folder / "eval")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(
        {"model": str(folder), "data": args.data, "examples": count, "metrics": metrics}, indent=2) + "\n")
    with open(out / "records.jsonl", "w") as file:
        for record, prompt in zip(records, prompts):
            file.write(json.dumps({**vars(record), "predicted_original_frame": original_frame(record, prompt)}) + "\n")
    draw_overlay(records[:12], prompts[:12], out / "overlay.png")
    print(f"wrote metrics.json, records.jsonl and overlay.png to {out}")


if __name__ == "__main__":
    main()
