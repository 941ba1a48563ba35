"""Evaluation: greedy answers, the paper's metrics, pictures.

    python eval.py --model assets/tiny --data scenes:test
    torchrun --nproc-per-node 8 eval.py --model MODEL --data Ricky06662/grefcoco_val_all --benchmark grefcoco \\
        --masks facebook/sam2-hiera-large

MODEL is a model folder, a run of train.py, or a hub id. Each rank answers its share and writes one line an example as
it goes; the same command again goes on where it was interrupted. The metrics themselves are in metrics.py.
"""
import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import Processor, Prompt, convert_boxes, load
from metrics import Record, box_mask, intersection_union, point_hit, summarise
from model import Qwen2_5_VL
from rewards import TASKS, guarded, has_thinking_format, parse_boxes, parse_points
from rollout import generate
from support.masks import Segmenter
from support.mistakes import Mistake, plainly
from support.onednn import use_onednn
from support.pictures import draw_sheet
from support.ranks import gather_json, leave_ranks, start_ranks
from support.runs import newest_checkpoint
from support.sources import BadRow

# What the table shows: without --benchmark, and with one (task of rows that do not name theirs, metrics). "answers",
# the mean score of the tasks without boxes, has a name of its own in each benchmark: "name = answers".
SHOWN = ("gIoU", "cIoU", "N-acc strict", "N-acc official", "T-acc", "bbox accuracy", "targets IoU>0.5", "answers")
ALWAYS = ("thinks, present", "thinks, absent", "length", "examples")
BENCHMARKS = {
    "grefcoco": ("grounding", ("gIoU", "cIoU", "N-acc strict", "N-acc official", "T-acc", "bbox accuracy")),
    "reasonseg": ("grounding", ("gIoU", "cIoU", "bbox accuracy")),
    "isic": ("grounding", ("gIoU", "cIoU", "bbox accuracy")),
    "realiad": ("grounding", ("anomaly accuracy", "ROC-AUC official", "ROC-AUC by area")),
    "omniact": ("grounding", ("GUI accuracy", "bbox accuracy")),
    "mathvista": ("math", ("math accuracy = answers",)),
    "chartqa": ("chartqa", ("relaxed accuracy = answers",)),
    "docvqa": ("docvqa", ("ANLS = answers",)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Answering

def evaluate(model: Qwen2_5_VL, processor: Processor, examples: Iterable, max_new_tokens: int, batch: int = 64,
             repetition_penalty: float = 1.0, segmenter: Segmenter | None = None) -> Iterator[tuple[Record, Prompt]]:
    """Greedy answers to the examples, in order, `batch` at a time: each one's record, and its prompt for pictures."""
    examples = iter(examples)
    while chunk := [processor.prompt(e) for e in itertools.islice(examples, batch)]:
        answers = generate(model, chunk, 1, max_new_tokens, temperature=0, repetition_penalty=repetition_penalty)
        records = [judge(p, processor.decode(o.tokens), len(o.tokens)) for p, (o,) in zip(chunk, answers)]
        boxed = [(r, p) for r, p in zip(records, chunk) if TASKS[p.example.task].boxes]
        objects = [original_frame(r.predicted, p) for r, p in boxed]
        if segmenter and boxed:
            masks = segmenter([p.example.image for _, p in boxed], objects)
        else:
            masks = [box_mask(items, p.original_size) for items, (_, p) in zip(objects, boxed)]
        for mask, (record, prompt) in zip(masks, boxed):
            boxes = json.loads(prompt.example.answer)
            truth = prompt.example.mask if segmenter else box_mask(boxes, prompt.original_size)
            if truth is None:
                raise ValueError(f"example {record.id}: --masks compares with true masks; the data has no column mask")
            record.intersection, record.union = intersection_union(mask, truth)
            record.area = int(mask.sum())
        yield from zip(records, chunk)


def judge(prompt: Prompt, response: str, length: int) -> Record:
    example, task = prompt.example, TASKS[prompt.example.task]
    record = Record(example.id, example.task, example.question, response, length, has_thinking_format(response), None,
                    [], [], prompt.size, prompt.original_size)
    if task.boxes:
        record.predicted, record.error = parse_boxes(response)
        record.truth = json.loads(prompt.answer)
        record.score = float(point_hit(parse_points(response), record.truth))
    else:
        score, record.error = guarded(task.metric, example.task, response, prompt.answer)
        record.score = score or 0.0
    return record


def original_frame(items: list[dict], prompt: Prompt) -> list[dict]:
    """Boxes in the frame the model saw → in the pixels of the picture as it was given."""
    return json.loads(convert_boxes(json.dumps(items), prompt.size, prompt.original_size))


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees

def table(columns: dict[str, dict[str, float | None]], shown: tuple[str, ...] = SHOWN) -> str:
    """{title: metrics} → a text table, one metric a line."""
    def cell(name: str, value) -> str:
        if value is None:
            return "–"
        return f"{value:d}" if name == "examples" else f"{value:.1f}" if name == "length" else f"{value:.3f}"
    widths = [max(len(title), 8) for title in columns]
    lines = [" " * 16 + "".join(f"  {title:>{w}}" for title, w in zip(columns, widths))]
    for entry in (*shown, *ALWAYS):
        name, metric = entry.split(" = ") if " = " in entry else (entry, entry)
        cells = (f"  {cell(metric, m[metric]):>{w}}" for m, w in zip(columns.values(), widths))
        lines.append(f"{name:<16}" + "".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation as a resumable job

def open_folder(out: Path, settings: dict) -> dict[int, dict]:
    """The lines that an interrupted evaluation with the same settings left in `out`, by example number."""
    path = out / "settings.json"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        different = [f"{name}: {old.get(name)!r} → {new!r}" for name, new in settings.items() if old.get(name) != new]
        raise Mistake(f"{out} holds an evaluation with other settings ({'; '.join(different)}): "
                         "give another --out, or remove it")
    done = {}
    for part in out.glob("records*.jsonl"):
        for line in part.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:      # the line that was being written when it was interrupted
                continue
            done[record["index"]] = record
    return done


def weights_of(folder: Path) -> list:
    """What tells whether a folder holds other weights than before."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))]


def read_examples(source, numbers: list[int], bad: list[str], skip: bool) -> Iterator:
    for number in numbers:
        try:
            yield number, source[number]
        except BadRow as error:
            if not skip:
                raise
            bad.append(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, run folder of train.py, or hub id")
    parser.add_argument("--data", default="scenes:test", help="as in train.py: scenes:SPLIT, files, folder, hub id")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="shows that benchmark's metrics")
    parser.add_argument("--task", default="", help="task of rows without a column task (default: the benchmark's)")
    parser.add_argument("--masks", default="", help="SAM 2 folder or hub id; without it boxes stand in for masks")
    parser.add_argument("--limit", type=int, default=0, help="evaluate the first LIMIT examples only (0: all)")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="the authors' scripts inherit 1.05 from the model's generation_config")
    parser.add_argument("--batch", type=int, default=64, help="prompts decoded together")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and list rows that cannot be used")
    parser.add_argument("--out", default="", help="folder for metrics.json, records.jsonl, overlay.png "
                                                  "(default: eval/DATA beside the model's weights)")
    args = parser.parse_args()
    rank, world, device = start_ranks()
    torch.set_grad_enabled(False)
    task, shown = BENCHMARKS.get(args.benchmark, ("", SHOWN))
    folder = newest_checkpoint(Path(args.model)) if (Path(args.model) / "checkpoints").is_dir() else args.model
    model = Qwen2_5_VL.from_pretrained(folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    segmenter = Segmenter(args.masks, device) if args.masks else None
    source = load(args.data, args.task or task, args.skip_bad_rows)
    out = Path(args.out or model.folder / "eval" / args.data.strip("/").replace("/", "-").replace(":", "-"))
    settings = {"model": str(args.model), "weights": weights_of(model.folder), "data": args.data, "masks": args.masks,
                "task": args.task or task, "max_new_tokens": args.max_new_tokens,
                "repetition_penalty": args.repetition_penalty}
    out.mkdir(parents=True, exist_ok=True)
    done = open_folder(out, settings)
    gather_json(None, device)          # every rank has read the folder before rank 0 writes to it
    if rank == 0:
        (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    numbers = range(min(args.limit or len(source), len(source)))
    missing = [n for n in numbers if n not in done][rank::world]
    if rank == 0:
        print(f"{args.model} on {args.data}: {len(numbers)} examples, {sum(n in done for n in numbers)} of them done "
              f"before; greedy, repetition penalty {args.repetition_penalty}, "
              + (f"masks by {args.masks}" if args.masks else "filled boxes stand in for masks"))
    drawn, bad, order = [], list(source.bad), []

    def examples():
        for number, example in read_examples(source, missing, bad, args.skip_bad_rows):
            order.append(number)
            yield example

    path = out / f"records.rank{rank}.jsonl"
    if path.exists() and not path.read_text().endswith("\n"):   # interrupted in the middle of a line
        path.write_text(path.read_text() + "\n")
    with open(path, "a") as file:
        answered = evaluate(model, Processor(model.folder), examples(), args.max_new_tokens, args.batch,
                            args.repetition_penalty, segmenter)
        for at, (record, prompt) in enumerate(tqdm(answered, total=len(missing), unit="ex", disable=rank > 0)):
            line = {"index": order[at], **vars(record),
                    "predicted_original_frame": original_frame(record.predicted, prompt)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if len(drawn) < 12:
                drawn.append((record, prompt))
    bad = sum(gather_json(bad if rank == 0 else bad[len(source.bad):], device), [])
    if rank == 0:
        finish(out, args, settings, numbers, bad, shown, drawn)
    leave_ranks()


def finish(out: Path, args, settings: dict, numbers: range, bad: list[str], shown: tuple, drawn: list) -> None:
    """Joins what the ranks wrote, prints the table, writes metrics.json and the picture."""
    lines = open_folder(out, settings)
    if len(lines) < len(numbers) - len(bad):
        raise Mistake(f"{out} holds {len(lines)} of {len(numbers)} examples; do all ranks write to the same disk?")
    with open(out / "all.tmp", "w") as file:
        file.writelines(json.dumps(lines[n]) + "\n" for n in sorted(lines))
    (out / "all.tmp").rename(out / "records.jsonl")
    for part in out.glob("records.rank*.jsonl"):
        part.unlink()
    names = Record.__dataclass_fields__
    records = [Record(**{k: v for k, v in lines[n].items() if k in names}) for n in numbers if n in lines]
    metrics = summarise(records)
    print(table({f"{args.model} on {args.data}": metrics}, shown))
    for line in bad:
        print(f"left out: {line}")
    (out / "metrics.json").write_text(json.dumps({**settings, "left_out": bad, "metrics": metrics}, indent=2) + "\n")
    if drawn:
        draw_sheet(drawn, out / "overlay.png")
    print(f"wrote metrics.json, records.jsonl and overlay.png to {out}")


if __name__ == "__main__":
    plainly(main)
