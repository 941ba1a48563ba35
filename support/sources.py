"""Examples, and where they come from: what a --data string may name.

    scenes:SPLIT            the built-in world
    FILE.jsonl              one JSON object a line, images by path
    FILE.parquet            one file, images inside
    FOLDER                  of .jsonl or .parquet files, or one written by datasets' save_to_disk (Arrow)
    OWNER/NAME              a data set of the Hugging Face hub, downloaded once (its token and offline mode count)
    FOLDER:SPLIT, OWNER/NAME:SPLIT     where there is more than one split

Columns: of the authors' training set id, image, problem, solution; of their test sets image, text, mask, image_id,
ann_id and sometimes bbox; of MathVista pid, decoded_image, question, choices, answer; of ChartQA image, query, label;
of DocVQA questionId, image, question, answers; besides them task and thought. Boxes are in the picture's own pixels.
Texts are read and checked when the data is opened; pictures and masks stay on disk until they are wanted, so that
memory does not grow with the data.
"""
import bisect
import functools
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from support import scenes
from support.mistakes import Mistake

HEAVY = ("image", "decoded_image", "mask")   # columns that are read only when their row is wanted
MAX_PIXELS = 100_000_000    # of a picture, before it is decoded
READ_TOGETHER = 16          # rows of a Parquet file that are decoded at a time
PATTERNS = ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.png", "*.jpg", "*.jpeg", "*.webp")


@dataclass
class Example:
    """image: RGB, or None. answer: text; for tasks with boxes, JSON in the image's own pixels. thought: reasoning in
    front of the label, which only pretraining data has. mask: bool [height, width], for evaluation."""
    id: str
    image: Image.Image | None
    question: str
    answer: str
    task: str
    thought: str = ""
    mask: np.ndarray | None = None


class BadRow(Mistake):
    """A row that cannot be used: the message names file, row and reason."""


class Scenes:
    """The built-in world, `scenes:SPLIT`."""
    def __init__(self, split: str):
        if split not in scenes.SPLITS:
            raise Mistake(f"scenes:{split} does not exist; the splits are {', '.join(scenes.SPLITS)}")
        self.split, self.bad = split, []

    def __len__(self) -> int:
        return scenes.SPLITS[self.split]

    def __getitem__(self, index: int) -> Example:
        return Example(**scenes.make(self.split, index))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def open_image(content: Path | bytes) -> Image.Image:
    """A picture as RGB. Grey, palettes, CMYK and opaque alpha become RGB; what would lose or guess something is an
    error: 16 bits a channel (Pillow would clip them), transparency (over what?), a rotation kept beside the pixels (are
    the boxes for the turned picture or the stored one?), a truncated file, more than MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # our own limit is below
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
            if image.getexif().get(0x0112, 1) != 1:
                raise ValueError("EXIF says that it is to be rotated; store it upright, its boxes too")
            image.load()
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError) as error:   # Pillow reports some broken files as SyntaxError
        raise ValueError(f"the image cannot be read: {error}") from None
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}: more than 8 bits a channel; store it with 8")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("it is partly transparent; store it over the background it is meant for")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Files: each yields the light columns of its rows once, and the heavy ones of any row on demand

class JsonlFile:
    """One JSON object a line; a picture is a path relative to the file, or null."""
    columns = ()
    def __init__(self, path: Path):
        self.path = path

    def light(self) -> Iterator[tuple[int, dict | str]]:
        """Each row's number, as an editor counts lines, and its columns, or why it has none."""
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        yield number, row if isinstance(row, dict) else "not a JSON object"
                    except (ValueError, RecursionError) as error:   # not JSON, or not UTF-8
                        yield number, f"not JSON ({error})"

    def heavy(self, number: int) -> dict:
        return {}


class ParquetFile:
    """Row groups are streamed, READ_TOGETHER rows at a time, and only one such piece is kept, whatever the number of
    files: reading in order reads a file once; jumping decodes the row group up to the wanted row. A page is read as a
    whole, and as most writers make one page of a row group's images, that is what memory must hold."""
    reading: "ParquetFile | None" = None   # the file that keeps a piece

    def __init__(self, path: Path):
        import pyarrow.parquet
        self.path = path
        try:
            # Read through a small buffer, page by page; the default reads whole row groups into memory.
            self.file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise Mistake(f"{path}: not a Parquet file ({error})") from None
        metadata = self.file.metadata
        self.starts = [0, *itertools.accumulate(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))]
        self.columns = [name for name in self.file.schema_arrow.names if name in HEAVY]
        self.piece, self.first, self.rest = None, 0, iter(())   # rows in memory, number of the first, those after them

    def light(self) -> Iterator[tuple[int, dict]]:
        names = [name for name in self.file.schema_arrow.names if name not in HEAVY]
        rows = (row for batch in self.file.iter_batches(1024, columns=names) for row in batch.to_pylist())
        return enumerate(rows, 1)

    def heavy(self, number: int) -> dict:
        index = number - 1
        if ParquetFile.reading not in (None, self):
            ParquetFile.reading.piece = ParquetFile.reading.rest = None
        ParquetFile.reading = self
        held = self.piece is not None and self.first <= index
        if not held or self.starts[self.group + 1] <= index:
            self.group = bisect.bisect_right(self.starts, index) - 1
            self.first, self.piece, self.rest = self.starts[self.group], None, None   # freed before the next is read
            self.rest = self.file.iter_batches(READ_TOGETHER, row_groups=[self.group], columns=self.columns,
                                               use_threads=False)
            self.piece = next(self.rest)
        while index >= self.first + self.piece.num_rows:
            self.first += self.piece.num_rows
            self.piece = next(self.rest)
        return {name: self.piece.column(name)[index - self.first] for name in self.columns}


class ArrowFile:
    """A file of datasets' save_to_disk, memory-mapped: the pages of a row are read when it is."""
    def __init__(self, path: Path):
        import pyarrow
        self.path = path
        try:
            self.table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        except (OSError, pyarrow.ArrowException) as error:
            raise Mistake(f"{path}: not an Arrow stream as datasets writes it ({error})") from None
        self.columns = [name for name in self.table.column_names if name in HEAVY]

    def light(self) -> Iterator[tuple[int, dict]]:
        table = self.table.select([name for name in self.table.column_names if name not in HEAVY])
        return enumerate((row for batch in table.to_batches(1024) for row in batch.to_pylist()), 1)

    def heavy(self, number: int) -> dict:
        return {name: self.table.column(name)[number - 1] for name in self.columns}


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def box_items(boxes: list) -> list[dict]:
    """[x1, y1, x2, y2] or a list of such → the items of a label, each with its centre as point."""
    boxes = [boxes] if boxes and not isinstance(boxes[0], (list, tuple)) else boxes
    return [{"bbox_2d": list(b), "point_2d": [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2]} for b in boxes]


def light_example(row: dict, number: int, task: str, tasks: dict, label_error) -> Example:
    """The example of a row's light columns, still without its picture. ValueError: why the row cannot be used. tasks,
    label_error: as for `load`."""
    def column(*names: str, kinds: tuple = (str,)):
        """The first of these columns that is not null, and its type right; None if there is none."""
        name = next((n for n in names if row.get(n) is not None), None)
        if name is not None and not isinstance(row[name], kinds):
            raise ValueError(f"the column {name!r} holds a {type(row[name]).__name__}")
        return row.get(name)

    task, question = column("task") or task, column("problem", "text", "question", "query")
    if not task:
        raise ValueError(f"no column task: give it, or --task with one of {', '.join(tasks)}")
    if task not in tasks:
        raise ValueError(f"task {task!r} is not one of {', '.join(tasks)}")
    if not (question or "").strip():
        raise ValueError("no question: none of the columns problem, text, question, query holds one")
    answer, boxes = column("solution", "answer", "answers", "label", kinds=(str, list)), column("bbox", kinds=(list,))
    if answer is None and boxes is not None and tasks[task].boxes:
        answer = box_items(boxes)
    if choices := column("choices", kinds=(list,)):
        answer = {"answer": answer, "choices": choices}
        question += "\nChoices:" + "".join(f"\n({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    if answer is not None and (reason := label_error(task, answer)) is not None:
        raise ValueError(f"bad label: {reason}")
    name = column("id", "pid", "questionId", kinds=(str, int))
    if name is None and (picture := column("image_id", kinds=(str, int))) is not None:
        name = f"{picture}/{row.get('ann_id', 0)}"
    return Example(str(number if name is None else name), None, question, answer or "", task, column("thought") or "")


def read_mask(value) -> np.ndarray | None:
    """An Arrow list of rows of bool → bool [height, width]."""
    rows = value.as_py() if value is not None else None
    if rows is None:
        return None
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the rows of the mask differ in length")
    return np.array(rows, bool).reshape(len(rows), -1)


class Rows:
    """The rows of one or more files. `bad`: what was left out under skip_bad_rows, one line each."""
    def __init__(self, files: list, tasks: dict, label_error, task: str = "", skip_bad_rows: bool = False):
        self.tasks, self.label_error = tasks, label_error
        self.skip, self.bad = skip_bad_rows, []
        self.rows: list[tuple[object, int, Example, object]] = []   # file, number of the row, example, light image
        for file in files:
            for number, row in file.light():
                try:
                    self.rows.append((file, number, *self.check(file, number, row, task)))
                except ValueError as error:
                    bad = BadRow(f"{file.path}, row {number}: {error}")
                    if not self.skip:
                        raise bad from None
                    self.bad.append(str(bad))
        if not self.rows:
            raise Mistake(f"{', '.join(str(f.path) for f in files)} holds no usable rows. {' '.join(self.bad[:3])}")

    def check(self, file, number: int, row: dict | str, task: str) -> tuple[Example, Path | None]:
        if isinstance(row, str):
            raise ValueError(row)
        example, image = light_example(row, number, task, self.tasks, self.label_error), None
        boxes = self.tasks[example.task].boxes and example.answer not in ("", "[]")
        size = tuple(row.get(name) for name in ("img_width", "img_height"))      # of the authors' data
        if not example.answer and "mask" not in file.columns:
            raise ValueError("no answer: none of the columns solution, answer, answers, label, bbox holds one")
        if not isinstance(file, JsonlFile) and boxes and not all(isinstance(n, int) for n in size):
            size = header_size(picture_of(file.heavy(number), file.path))
        if isinstance(file, JsonlFile):
            if "image" not in row:
                raise ValueError("the column image is missing; null means that there is none")
            if row["image"] is not None:
                if not isinstance(row["image"], str):
                    raise ValueError(f"the column 'image' holds a {type(row['image']).__name__}")
                image = file.path.parent / row["image"]
                size = header_size(image)
        if boxes and all(isinstance(n, int) for n in size):
            check_boxes(example.answer, size)
        return example, image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """The example with its picture, which is decoded now. BadRow if that fails."""
        file, number, example, image = self.rows[index]
        try:
            heavy = file.heavy(number)
            if (picture := picture_of(heavy, file.path)) is not None:
                image = picture
            return finish(example, image, heavy.get("mask"), self.tasks[example.task].boxes)
        except ValueError as error:
            raise BadRow(f"{file.path}, row {number} (id {example.id}): {error}") from None


def picture_of(heavy: dict, path: Path) -> bytes | Path | None:
    column = next((c for c in ("decoded_image", "image") if c in heavy), None)
    return image_of(heavy[column].as_py(), path) if column else None


def header_size(content: bytes | Path | None) -> tuple:
    """(width, height) as the header of a picture says, nothing decoded; () where there is none. ValueError: it cannot
    be read, or the path names no file (to open a pipe would wait for ever)."""
    if content is None:
        return ()
    if isinstance(content, Path) and not content.is_file():
        raise ValueError(f"the image cannot be read: {content} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                return image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be read: {error}") from None


def check_boxes(answer: str, size: tuple[int, int]) -> None:
    """ValueError: a box of a label leaves its picture of (width, height) pixels."""
    for box in (item["bbox_2d"] for item in json.loads(answer)):
        if min(box) < 0 or max(box[::2]) > size[0] or max(box[1::2]) > size[1]:
            raise ValueError(f"the box {box} leaves the picture of {size[0]}×{size[1]} pixels")


def image_of(value, path: Path) -> bytes | Path | None:
    """A cell of an image column: {"bytes": …, "path": …}, bytes, a path relative to the file, or null."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("the column image holds neither bytes nor a path")
    if not isinstance(value, (bytes, str, type(None))):
        raise ValueError(f"the column image holds a {type(value).__name__}")
    return path.parent / value if isinstance(value, str) else value


def finish(example: Example, image: bytes | Path | None, mask, boxes: bool) -> Example:
    """Adds picture and mask; boxes: whether the answer is boxes. A label of boxes that the light columns did
    not hold is the box around the mask."""
    picture = None if image is None else open_image(image)
    mask, answer = read_mask(mask), example.answer
    if mask is not None:
        if picture is None or mask.shape != (picture.height, picture.width) and mask.any():
            raise ValueError(f"the mask is {mask.shape[::-1]} and the picture {picture and picture.size}")
        ys, xs = np.nonzero(mask)
        if not len(xs):
            answer = "[]"
        elif not answer:
            answer = json.dumps(box_items([int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())]))
    if not answer:
        raise ValueError("no answer: none of the columns solution, answer, answers, label, bbox, mask holds one")
    if picture is not None and boxes:
        check_boxes(answer, picture.size)
    return replace(example, image=picture, mask=mask, answer=answer)


# ---------------------------------------------------------------------------------------------------------------------
# --data

def files_of(folder: Path, split: str) -> list:
    """The data files of a folder. Splits: the folders of a DatasetDict, or what stands before -00000-of-00012."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return files_of(folder / choose(folder, splits, split), "")
    if (folder / "state.json").exists():
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
        return [ArrowFile(folder / name) for name in names]
    for ending, kind in (("parquet", ParquetFile), ("jsonl", JsonlFile)):
        paths = sorted(folder.rglob(f"*.{ending}"))
        by_split: dict[str, list[Path]] = {}
        for path in paths:
            by_split.setdefault(re.sub(r"-\d{5}-of-\d{5}.*", "", path.stem), []).append(path)
        if paths:
            return [kind(path) for path in by_split[choose(folder, list(by_split), split)]]
    raise Mistake(f"--data {folder}: holds no .parquet, .jsonl or save_to_disk files")


def choose(folder: Path, splits: list[str], split: str) -> str:
    if split in splits or (not split and len(splits) == 1):
        return split or splits[0]
    raise Mistake(f"--data {folder}: the splits are {', '.join(splits)}; name one after a colon")


def load(data: str, tasks: dict, label_error, task: str = "", skip_bad_rows: bool = False) -> Scenes | Rows:
    """The source that a --data string names. tasks: name → a record of which `boxes` says whether its answers are
    boxes; label_error(task, answer): why it cannot be a label, or None; task: of rows that do not say theirs."""
    if data.startswith("scenes:"):
        return Scenes(data.removeprefix("scenes:"))
    path, split = Path(data), ""
    if not path.exists() and ":" in data:
        path, split = Path(data.rpartition(":")[0]), data.rpartition(":")[2]
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise Mistake(f"--data {data}: there is no such file")
        return Rows([JsonlFile(path) if path.suffix == ".jsonl" else ParquetFile(path)], tasks,
                    label_error, task, skip_bad_rows)
    if not path.is_dir():
        path = download(str(path))
    return Rows(files_of(path, split), tasks, label_error, task, skip_bad_rows)


def download(name: str) -> Path:
    """A data set of the hub, in huggingface_hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Mistake(f"--data {name}: give scenes:SPLIT, a .jsonl or .parquet file, a folder, or a hub id "
                         "OWNER/NAME")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=PATTERNS))
    except Exception as error:
        raise Mistake(f"--data {name}: no such folder, and the hub does not give it "
                      f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})") from error


@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n examples: a permutation, a pure function of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def take(source, numbers: range, seed: int) -> list[Example]:
    """The examples of these numbers in the endless sequence of epochs. No remainder is dropped. Where the source skips
    bad rows, the row after a bad one stands in for it."""
    n, taken = len(source), []
    for number in numbers:
        index = int(order(n, seed, number // n)[number % n])
        for _ in range(n):
            try:
                taken.append(source[index])
                break
            except BadRow as error:
                if not source.skip:
                    raise
                source.bad.append(str(error))
                index = (index + 1) % n
        else:
            raise Mistake(f"all {n} rows are bad; the last: {source.bad[-1]}")
    return taken
