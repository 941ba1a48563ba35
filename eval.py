"""Evaluation: greedy answers, the paper's metrics, pictures.

    python eval.py --model assets/tiny --data scenes:test
    torchrun --nproc-per-node 8 eval.py --model MODEL --data Ricky06662/grefcoco_val_all --benchmark grefcoco \\
        --masks facebook/sam2-hiera-large

    python eval.py --model assets/tiny --image photo.png --question "red ring"

MODEL is a model folder, a run of train.py, or a hub id. Each rank answers its share and writes one
line an example as it goes; the same command again goes on where it was interrupted. The metrics are
those of docs/paper.md, section 5.

Glossary
    record     an example with its answer and all that the metrics need of both; a line of records.jsonl
    truth      the label's boxes; present, absent: a grounding question with and without one
    boxes      lists of {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, in pixels, corners inclusive
    masks      bool [height, width], of SAM 2 (support/masks.py), or the filled boxes in their place
    official   as the authors' scripts compute a metric, where that is not what its name says
"""
import hashlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Processor, Prompt, load
from model import Qwen2_5_VL, load_model
from rewards import TASKS, score
from rollout import generate
from support import report, scenes
from support.answers import (MAX_CHARACTERS, answer_text, check_text, has_thinking_format, parse_boxes,
                             parse_json, parse_points, trailing_text)
from support.boxes import (FORMATS, UNITS, box_hit, box_mask, convert_boxes, hull, official_box_hit,
                           point_hit, targets_found)
from support.checkpoints import precision_of
from support.equip import equip
from support.files import as_json, replace_file, writing
from support.images import marked, open_image, picture_file
from support.log import metric_text
from support.masks import Segmenter
from support.mistakes import Mistake, run_main
from support.options import option, parse
from support.penalty import RepetitionPenalty
from support.pictures import draw_answer, draw_sheet
from support.ranks import gather_json, leave_ranks, start_ranks
from support.results import default_folder, read_finished, results_folder
from support.runs import lock
from support.screen import say
from support.sources import Example, noticed, read
from support.tables import stat_of
from support.weights import local_folder

# What the table shows: without --benchmark, and with one (task of rows that do not name theirs,
# metrics). "answers", the mean score of the tasks without boxes, has a name of its own in each
# benchmark: "name = answers".
SHOWN = ("gIoU", "cIoU", "N-acc", "N-acc official", "unreadable", "T-acc", "boxes", "targets", "answers")
ALWAYS = ("thinks, present", "thinks, absent", "trailing text, present", "trailing text, absent", "length", "examples")
JUDGES = ("rewards.py", "data.py", "eval.py", *(f"support/{name}.py" for name in (     # what makes a score
    "answers", "boxes", "cells", "folders", "images", "masks", "math_answers", "verify_math")))
BOX_ACCURACIES = ("boxes official", "boxes")    # the authors'; ours, of present targets
BENCHMARKS = {
    "grefcoco": ("grounding", ("gIoU", "cIoU", "N-acc official", "N-acc", "unreadable", "T-acc",
                               *BOX_ACCURACIES)),
    "reasonseg": ("grounding", ("gIoU", "cIoU", *BOX_ACCURACIES)),
    "isic": ("grounding", ("gIoU", "cIoU", *BOX_ACCURACIES)),
    "realiad": ("grounding", ("anomaly accuracy", "ROC-AUC official", "ROC-AUC by area")),
    "omniact": ("grounding", ("GUI accuracy official", "GUI accuracy", *BOX_ACCURACIES)),
    "mathvista": ("math", ("math accuracy = answers",)),
    "chartqa": ("chartqa", ("relaxed accuracy = answers",)),
    "docvqa": ("docvqa", ("ANLS = answers",)),
}


@dataclass
class Options:
    """Holds every option of eval.py."""
    model: str = option("", "what is answered", "model folder, run folder of train.py, or hub id; must be given")
    data: str = option("scenes:test", "what is answered", "as in train.py: scenes:SPLIT, photos:SPLIT, .jsonl or "
                       ".parquet file, folder, or hub id")
    task: str = option("", "what is answered", "task of rows that name none (without it, the benchmark's)",
                       ("", *TASKS))
    columns: str = option("", "what is answered", "as in train.py: FIELD=NAME,… for columns with other names")
    box_format: str = option("xyxy", "what is answered", "as in train.py", FORMATS)
    box_units: str = option("pixels", "what is answered", "as in train.py", UNITS)
    min_pixels: int = option(0, "what is answered", "as in train.py; a run's own are in its checkpoints", least=0)
    max_pixels: int = option(0, "what is answered", "as in train.py", least=0)
    skip_bad_rows: bool = option(False, "what is answered", "leave out rows that cannot be used, and list them")
    limit: int = option(0, "what is answered", "the first LIMIT examples only (0: all)", least=0)
    image: str = option("", "what is answered", "a picture to answer --question about, instead of --data")
    question: str = option(None, "what is answered", "about --image; without it, one question a line is read")

    max_new_tokens: int = option(0, "how", "longest answer (0: 2048, as in the authors' scripts; 128 "
                                 "for a tiny model)", least=0)
    repetition_penalty: float = option(1.0, "how", "the authors' scripts inherit 1.05 from the model's "
                                       "generation_config", above=0)
    sampling_batch: int = option(64, "how", "prompts answered together; any value gives the same answers", least=1)
    precision: str = option("", "how", "of the weights (default: a run's own, else float32)",
                            ("", "float32", "bfloat16"))

    benchmark: str = option("", "output", "shows that benchmark's metrics", ("", *BENCHMARKS))
    masks: str = option("", "output", "SAM 2 folder or hub id; without it filled boxes stand in for masks")
    out: str = option("", "output", "folder for report.html, metrics.json, records.jsonl, "
                      "overlay.png (default: evaluations/MODEL-DATA, or RUN/evaluations/step_N-DATA); "
                      "with --image the picture")

    def check(self) -> None:
        """Raises Mistake if options cannot be together."""
        if not self.model:
            raise Mistake("--model is missing: give a model folder, a run folder of train.py, or a hub id")
        if self.question is not None and not self.image:
            raise Mistake("--question needs the picture that it is about: --image FILE")
        if self.question is not None and not self.question.strip():
            raise Mistake("--question is empty: ask something, or leave it out to be asked for questions")
        if self.image and self.out and Path(self.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise Mistake(f"--out {self.out}: with --image the answer is drawn; give a file such as answer.png")


# The words of the built-in world's questions.
WORDS = frozenset("""a an answer any are blue boxed button click colour cross crosses defect describe digits four green
how image in is largest leftmost lesion lowest many object objects of purple red rightmost ring rings shape shapes
smallest square squares sum the there three topmost two what where white yellow""".split())


def is_tiny(model: Qwen2_5_VL) -> bool:
    """Returns whether it is of the size of assets/tiny, which knows the built-in world only."""
    return model.config.vocab_size < 1000


def unknown_to(model: Qwen2_5_VL, example: Example) -> list[str]:
    """Returns what to say if the tiny model is asked for what it cannot know; nothing for any other
    model, and nothing about photos:SPLIT, whose bases have the size of the tiny model."""
    words = re.findall(r"[^\W\d_]+", example.question)
    foreign = [f"the word {word!r}" for word in words if word.lower() not in WORDS][:1]
    foreign += ["a picture of {}×{} pixels".format(*image.size) for image in example.images
                if image.size != (scenes.SIZE, scenes.SIZE)][:1]
    foreign += ["several pictures"] * (len(example.images) > 1)
    if not foreign or not is_tiny(model) or example.id.startswith("photos:"):
        return []
    return [f"the tiny model knows the built-in world alone, and not {' and '.join(foreign)}: what it makes of it says "
            "nothing; take a real model, such as --model Qwen/Qwen2.5-VL-3B-Instruct"]


def longest_answer(cfg: Options, model: Qwen2_5_VL) -> int:
    """Returns how many tokens an answer may have."""
    return cfg.max_new_tokens or (128 if is_tiny(model) else 2048)


# --------------------------------------------------------------------------------------------------
# Metrics, as pure functions of predictions and truths

@dataclass
class Record:
    """Holds one evaluated example. Boxes are in the frame the model saw, masks in the picture as it
    was given."""
    id: str
    task: str
    question: str
    response: str
    length: int                        # tokens
    thinks: bool
    error: str | None                  # why the answer could not be read
    predicted: list[dict]
    truth: list[dict]
    size: tuple[int, int]              # (width, height) of the frame the model saw
    original_size: tuple[int, int]     # and of the picture; of several, the first
    official_boxes: list = field(default_factory=list)    # what the authors' scripts read in the answer, in the
    official_points: list = field(default_factory=list)   # pixels of the picture (`official_reading`)
    true_box: list | None = None       # around the truth, in the pixels of the picture; None: there is nothing
    intersection: int = 0              # pixels of the masks
    union: int = 0
    area: int = 0                      # of the predicted mask
    score: float = 0.0                 # 0 … 1: of boxes whether a point hits, else the accuracy of the reward


def official_reading(response: str, scale: tuple[float, float]) -> tuple[list, list]:
    """Returns the boxes [x1, y1, x2, y2] and points [x, y] that the authors' scripts read
    (visurf_model.py), times scale = (original / seen) of width and height. Boxes are read first: if
    one item has none, there are neither boxes nor points. Then the points: if one item has none,
    the boxes stay, but there are no points."""
    text = answer_text(response)
    items = parse_json(text, list_only=False)[0] if text is not None else []

    def read(key: str, count: int) -> list:
        return [[int(item[key][i] * scale[i % 2] + 0.5) for i in range(count)] for item in items]
    boxes, points = [], []
    try:
        boxes = read("bbox_2d", 4)
        points = read("point_2d", 2)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        pass
    return boxes, points


def intersection_union(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Counts the pixels in both masks, and those in either."""
    return int((a & b).sum()), int((a | b).sum())


def mask_iou(record: Record) -> float:
    """Returns I/U; 1 if the truth is empty and no box was read; 0 if U = 0 otherwise."""
    if not record.truth and not record.official_boxes:
        return 1.0
    return record.intersection / record.union if record.union else 0.0


def roc_auc(scores: list[float], labels: list[bool]) -> float | None:
    """Returns the chance that a positive scores above a negative, ties counting half; None unless
    there are both. For scores of 0 and 1 it is the balanced accuracy.

    >>> roc_auc([1, 0, 1, 0], [True, True, False, False]), roc_auc([3, 1, 2], [True, False, False])
    (0.5, 1.0)
    """
    values, chosen = np.array(scores, float), np.array(labels, bool)
    positive, negative = values[chosen], np.sort(values[~chosen])
    if not len(positive) or not len(negative):
        return None
    below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + upto).sum() / (2 * len(positive) * len(negative)))


def mean(values) -> float | None:
    """Returns the mean, or None if there is nothing to average: the table then shows a dash, never
    a 0 that nobody measured."""
    values = list(values)
    return float(statistics.fmean(values)) if values else None


def summarise(records: list[Record]) -> dict[str, float | None]:
    """Returns every metric of the table. Present and absent: grounding questions with and without a
    true box. N-acc, boxes and targets count an answer only if nothing follows it. "official": as
    the authors' scripts compute it, where that is not what the name says: over all questions, by
    `official_reading`."""
    grounding = [r for r in records if TASKS[r.task].boxes]
    present, absent = [r for r in grounding if r.truth], [r for r in grounding if not r.truth]
    others = [r for r in records if not TASKS[r.task].boxes]
    union, targets = sum(r.union for r in grounding), sum(len(r.truth) for r in present)
    anomalous = [bool(r.truth) for r in grounding]

    def ends(record: Record) -> bool:
        return not trailing_text(record.response)
    return {
        "gIoU": mean(map(mask_iou, grounding)),
        "cIoU": sum(r.intersection for r in grounding) / union if union else None,
        "N-acc": mean(not r.predicted and r.error is None and ends(r) for r in absent),
        "N-acc official": mean(not r.official_boxes for r in absent),     # an unreadable answer counts as a rejection
        "unreadable": mean(r.error is not None for r in records),
        "T-acc": mean(bool(r.predicted) for r in present),
        "boxes": mean(ends(r) and box_hit(r.predicted, r.truth) for r in present),
        "boxes official": mean(official_box_hit(r.official_boxes, r.true_box) for r in grounding),
        "targets": sum(targets_found(r.predicted, r.truth) for r in present if ends(r)) / targets if targets else None,
        "anomaly accuracy": mean((r.area > 0) == bool(r.truth) for r in grounding),
        "ROC-AUC official": roc_auc([float(r.area > 0) for r in grounding], anomalous),
        "ROC-AUC by area": roc_auc([r.area / (r.original_size[0] * r.original_size[1]) for r in grounding], anomalous),
        "GUI accuracy": mean(r.score for r in present),
        "GUI accuracy official": mean(r.true_box is not None and point_hit(r.official_points, [{"bbox_2d": r.true_box}])
                                      for r in grounding),
        "thinks, present": mean(r.thinks for r in present),
        "thinks, absent": mean(r.thinks for r in absent),
        "trailing text, present": mean(not ends(r) for r in present),
        "trailing text, absent": mean(not ends(r) for r in absent),
        "answers": mean(r.score for r in others),                    # counting and other short answers
        "length": mean(r.length for r in records),
        "examples": len(records),
    }


# --------------------------------------------------------------------------------------------------
# Answering

def evaluate(model: Qwen2_5_VL, processor: Processor, examples: Iterable, max_new_tokens: int, batch: int = 64,
             repetition_penalty: float = 1.0, segmenter: Segmenter | None = None, graphs: bool = True,
             stop: Sequence = ()) -> Iterator[tuple[Record, Prompt]]:
    """Answers the examples greedily, in order, `batch` at a time. Yields the record of each, and
    its prompt for pictures. Raises Stopped as soon as `stop` is not empty."""
    examples = iter(examples)
    while chunk := [processor.prompt(e) for e in itertools.islice(examples, batch)]:
        penalty = RepetitionPenalty(repetition_penalty, [prompt.tokens for prompt in chunk])
        answers = generate(model, chunk, max_new_tokens, graphs=graphs, adjust=penalty, stop=stop)
        records = [judge(p, processor.decode(o.tokens), len(o.tokens)) for p, (o,) in zip(chunk, answers)]
        boxed = [(r, p) for r, p in zip(records, chunk) if TASKS[p.example.task].boxes]
        # As the authors' scripts: no masks where an item lacks its point.
        objects = [[{"bbox_2d": b, "point_2d": xy} for b, xy in zip(r.official_boxes, r.official_points)]
                   for r, _ in boxed]
        if segmenter and boxed:
            images = [p.example.images[0] for _, p in boxed]
            masks = segmenter(images, objects)
        else:
            masks = [box_mask(items, p.original_size) for items, (_, p) in zip(objects, boxed)]
        for mask, (record, prompt) in zip(masks, boxed):
            boxes = json.loads(prompt.example.answer)
            truth = prompt.example.mask if segmenter else box_mask(boxes, prompt.original_size)
            if truth is None:
                raise Mistake(f"example {record.id}: --masks compares with true masks, and its column mask is empty; "
                              "leave --masks out, or the row")
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
        (width, height), (seen_width, seen_height) = prompt.original_size, prompt.size
        record.official_boxes, record.official_points = official_reading(
            response, (width / seen_width, height / seen_height))
        if boxes := json.loads(example.answer):
            record.true_box = hull(boxes)
        record.score = float(point_hit(parse_points(response), record.truth))
    else:
        reward = score(example.task, response, prompt.answer)
        record.score = float(reward.terms.get("accuracy", 0.0))        # a reward may compute with NumPy or torch
        record.error = reward.error
    return record


def for_sheet(pairs: list[tuple[Record, Prompt]]) -> list[tuple]:
    """Returns what support.pictures.draw_sheet shows of each answer: its reward's terms, and
    whether it is right. With boxes it is if every target is found and no box is too many."""
    shown = []
    for record, prompt in pairs:
        if TASKS[record.task].boxes:
            boxes, targets = len(record.predicted), len(record.truth)
            found = targets_found(record.predicted, record.truth)
            right = record.error is None and boxes == targets == found
        else:
            right = record.score >= 0.5
        reward = score(record.task, record.response, prompt.answer, prompt.side)
        shown.append((record, prompt, reward.terms, right))
    return shown


def original_frame(items: list[dict], prompt: Prompt) -> list[dict]:
    """Converts boxes from the frame the model saw to the pixels of the picture as it was given."""
    return json.loads(convert_boxes(json.dumps(items), prompt.size, prompt.original_size))


# --------------------------------------------------------------------------------------------------
# What a person sees

def table(columns: dict[str, dict[str, float | None]], shown: tuple[str, ...] = SHOWN) -> str:
    """Returns a table of {title: metrics} as text, one metric a line, without those that none
    has."""
    widths = [max(len(title), 8) for title in columns]
    lines = [" " * 22 + "".join(f"  {title:>{w}}" for title, w in zip(columns, widths))]
    for entry in (*shown, *ALWAYS):
        name, metric = entry.split(" = ") if " = " in entry else (entry, entry)
        if all(m.get(metric) is None for m in columns.values()):      # an earlier version may lack a metric
            continue
        cells = (f"  {metric_text(metric, m.get(metric)):>{w}}"
                 for m, w in zip(columns.values(), widths))
        lines.append(f"{name:<22}" + "".join(cells))
    return "\n".join(lines)


def predict(cfg: Options, model: Qwen2_5_VL) -> None:
    """Answers --question about --image, or one line of standard input after the other. Prints the
    answers, with boxes in the photo's own pixels, and draws them as NAME.answer.png,
    NAME.answer-2.png, …"""
    task = cfg.task or ("scene_grounding" if is_tiny(model) else "grounding")
    try:
        image = open_image(picture_file(cfg.image, Path()), rotate=True)
    except ValueError as error:
        raise Mistake(f"--image {cfg.image}: {error}") from None
    processor = Processor(model.folder, cfg.min_pixels, cfg.max_pixels)
    limit = longest_answer(cfg, model)
    asked = 0
    for question in questions() if cfg.question is None else [cfg.question]:
        try:
            check_text("question", question)
            if len(question) > MAX_CHARACTERS:
                raise ValueError(f"the question has more than {MAX_CHARACTERS:,} characters")
            text = marked(question, 1)
        except ValueError as error:
            raise Mistake(f"--question: {error}") from None
        asked += 1
        example = Example("photo", (image,), text, "[]" if TASKS[task].boxes else "", task)
        for line in unknown_to(model, example) if asked == 1 else ():
            say(line)
        prompt = processor.prompt(example)
        penalty = RepetitionPenalty(cfg.repetition_penalty, [prompt.tokens])
        [[answer]] = generate(model, [prompt], limit, adjust=penalty)
        response = processor.decode(answer.tokens)
        say(response)
        if answer.truncated:
            say(f"the answer did not end within {limit} tokens (--max-new-tokens)")
        if TASKS[task].boxes:
            items, unreadable = parse_boxes(response)
            items = original_frame(items, prompt)
            picture = Path(cfg.out or f"{Path(cfg.image).stem}.answer.png")
            if asked > 1:
                picture = picture.with_stem(f"{picture.stem}-{asked}")
            draw_answer(image, items, question, response, picture)
            boxes = f"in pixels of {cfg.image}: {json.dumps(items)}"
            say(f"the answer cannot be read: {unreadable}" if unreadable else boxes)
            say(f"drawn: {picture}")


def questions() -> Iterator[str]:
    """Yields the lines of standard input that are not empty; asks for them if a person types."""
    while True:
        if sys.stdin.isatty():
            print("question (Ctrl-D ends): ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


# --------------------------------------------------------------------------------------------------
# The evaluation as a resumable job

def what_matters(cfg: Options, task: str, model: Qwen2_5_VL, source) -> dict:
    """Returns all that an answer and its score depend on. Finished records count only if every one
    of these is the same."""
    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]

    def weights(folder: Path) -> str:
        return digest(*(repr((p.name, stat_of(p))).encode() for p in sorted(folder.glob("*.safetensors"))))
    companions = [p for p in sorted(model.folder.iterdir()) if p.suffix in (".json", ".jinja", ".txt")]
    return {"model": f"{cfg.model} ({weights(model.folder)})",
            "processor": digest(*(p.read_bytes() for p in companions)),
            "data": f"{cfg.data} ({source.fingerprint})", "columns": cfg.columns, "task": cfg.task or task,
            "masks": cfg.masks and f"{cfg.masks} ({weights(Path(cfg.masks))})",
            "code of the rewards": digest(*((Path(__file__).parent / name).read_bytes() for name in JUDGES)),
            "pixels": [cfg.min_pixels, cfg.max_pixels], "precision": cfg.precision,
            "max_new_tokens": longest_answer(cfg, model),
            "repetition_penalty": cfg.repetition_penalty}


def record_of(line: dict) -> Record:
    return Record(**{name: line[name] for name in Record.__dataclass_fields__})


def answer_data(cfg: Options, model: Qwen2_5_VL, source, rank: int, world: int, device) -> None:
    """Answers, on every rank, its share of the examples that no interrupted evaluation has left;
    rank 0 sums up."""
    task, shown = BENCHMARKS.get(cfg.benchmark, ("", SHOWN))
    if cfg.masks and not source.has_masks:
        raise Mistake(f"--masks compares with true masks, and {cfg.data} has no column mask: leave it out")
    segmenter = Segmenter(cfg.masks, device) if cfg.masks else None
    settings = what_matters(cfg, task, model, source)
    usual = Path(cfg.out) if cfg.out else default_folder(cfg.model, model.folder, cfg.data, cfg.limit)
    out, elsewhere = results_folder(usual, bool(cfg.out), settings)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        lock(out)
    done, damaged = read_finished(out, lambda line: summarise([record_of(line)]))
    gather_json(None, device)          # every rank has read the folder before rank 0 writes to it
    if rank == 0:
        replace_file(out / "settings.json", as_json(settings, 2))
    numbers = range(min(cfg.limit or len(source), len(source)))
    missing = [n for n in numbers if n not in done][rank::world]
    if rank == 0:
        say("".join(f"{line}\n" for line in noticed(source)) + elsewhere
            + f"{out}: {damaged} unreadable line(s) of the evaluation before are left out\n" * bool(damaged)
            + f"{cfg.model} on {cfg.data}: {len(numbers)} examples, {sum(n in done for n in numbers)} of them done "
            f"before; greedy, {cfg.precision}, repetition penalty {cfg.repetition_penalty}"
            + (f", masks by {cfg.masks}" if cfg.masks else ""))
    opened = len(source.bad)
    drawn: list[tuple[Record, Prompt]] = []
    order: list[int] = []

    def examples():
        for number, example in read(source, missing):
            order.append(number)
            yield example

    path = out / f"records.rank{rank}.jsonl"
    with writing(path), open(path, "a") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):     # interrupted in the middle of a line
            file.write("\n")
        processor = Processor(model.folder, cfg.min_pixels, cfg.max_pixels)
        answered = evaluate(model, processor, examples(), longest_answer(cfg, model), cfg.sampling_batch,
                            cfg.repetition_penalty, segmenter)
        for at, (record, prompt) in enumerate(tqdm(answered, total=len(missing), unit="ex", disable=rank > 0)):
            line = {"index": order[at], **vars(record),
                    "predicted_original_frame": original_frame(record.predicted, prompt)}
            file.write(as_json(line))
            file.flush()
            for said in unknown_to(model, prompt.example) if at == rank == 0 else ():
                say(said)
            if len(drawn) < 12:
                drawn.append((record, prompt))
    bad: list[str] = sum(gather_json(list(source.bad if rank == 0 else source.bad[opened:]), device), [])
    if rank == 0:
        finish(cfg, out, settings, numbers, bad, shown, drawn)


def finish(cfg: Options, out: Path, settings: dict, numbers: range, bad: list[str], shown: tuple, drawn: list) -> None:
    """Joins what the ranks wrote, prints the table, writes metrics.json and the picture."""
    lines, _ = read_finished(out, lambda line: summarise([record_of(line)]))
    if len(lines) < len(numbers) - len(bad):
        raise Mistake(f"{out} holds {len(lines)} of {len(numbers)} examples; do all ranks write to the same disk?")
    replace_file(out / "records.jsonl", "".join(as_json(lines[n]) for n in sorted(lines)))
    for part in out.glob("records.rank*.jsonl"):
        part.unlink()
    metrics = summarise([record_of(lines[n]) for n in numbers if n in lines])
    say(table({f"{cfg.model} on {cfg.data}, {cfg.precision}": metrics}, shown))
    if metrics["gIoU"] is not None and not cfg.masks and {"gIoU", "anomaly accuracy"} & set(shown):
        say("filled boxes stand in for masks (--masks)")
    if bad:
        say(f"left out: {len(bad)} rows, listed in metrics.json")
    measured = {name: value for name, value in metrics.items() if value is not None}
    replace_file(out / "metrics.json", as_json({**settings, "left_out": bad, "metrics": measured}, 2))
    if drawn:
        draw_sheet(for_sheet(drawn), out / "overlay.png")
    first = [entry.split(" = ")[-1] for entry in (*shown, *ALWAYS)]
    report.write(out / "report.html", f"{cfg.model} on {cfg.data}",
                 report.table(("setting", "value"), [*settings.items()]),
                 report.evaluations({"value": measured}, first),
                 report.pictures("Answers", {"overlay.png": out / "overlay.png"}))
    pictures = ", overlay.png" if drawn else ""
    say(f"wrote report.html, metrics.json, records.jsonl{pictures} to {out}")


def main() -> None:
    cfg = parse(Options, "eval.py", __doc__)
    cfg.check()
    rank, world, device = start_ranks()
    torch.set_grad_enabled(False)
    task, _ = BENCHMARKS.get(cfg.benchmark, ("", SHOWN))
    source = None if cfg.image else load(cfg.data, cfg.task or task, cfg.skip_bad_rows, cfg.columns,
                                         box_format=cfg.box_format, box_units=cfg.box_units)
    folder = local_folder(cfg.model)
    cfg.precision = cfg.precision or precision_of(folder)
    model = load_model(folder, getattr(torch, cfg.precision), device)
    equip(model)
    if source is not None:
        answer_data(cfg, model, source, rank, world, device)
    elif rank == 0:
        predict(cfg, model)
    leave_ranks()


if __name__ == "__main__":
    run_main(main)
