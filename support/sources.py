"""Examples, and where they come from: what a --data string may name.

    scenes:SPLIT            the built-in world
    photos:SPLIT            garments of Fashion-MNIST (support/photos.py)
    FILE.jsonl              one JSON object a line, pictures by path
    FILE.parquet            one file, pictures inside or by path
    FOLDER                  of .jsonl or .parquet files, or one written by datasets' save_to_disk
    OWNER/NAME              a data set of the Hugging Face hub, downloaded once (its token and offline mode count)
    DATA:SPLIT, DATA:CONFIG:SPLIT     of a folder or hub id that has more than one

The library `datasets` finds configurations and splits. No code of a data set is run. support/tables.py reads the
files.

Columns that are found by themselves: QUESTION, ANSWER … NAMES of support/tables.py, bbox, mask, task, system and
thought; --columns names any other. docs/data.md shows the layouts in use.
A picture is as large as its own header says; columns like img_width are not read: in the authors'
data they hold the size before the picture was resized. Texts are read and checked when the data is
opened; pictures and masks stay on disk until they are wanted.
"""
import functools
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import photos, scenes
from support.boxes import FORMATS, UNITS, Misplaced, as_corners, in_pixels
from support.cells import items_in, turns_in
from support.images import MARK, each, marked, open_image, picture_size, pictures_in
from support.mistakes import Mistake
from support.screen import clean, one_line, say
from support.tables import (ANSWER, AS_LINES, CHOICES, NAMES, PICTURES, QUESTION, REPLY, ArrowTable, JsonlFile,
                            columns_read, holds_media, lettered, listed_in, reason_of, stat_of)

BAR_AFTER = 1.0             # seconds of opening a file
MAX_README = 1_000_000      # bytes of a README.md that declares configurations
PATTERNS = ("README.md", "*.parquet", "*.arrow", "*.jsonl", "*.json", "*.png", "*.jpg", "*.jpeg", "*.webp")
MAPPABLE = ("question", "answer", "image", "choices", "id", "task")       # by --columns
PLACEHOLDER = re.compile(r"(?i:</?(?:(image|img)|video|audio)[ _-]?(\d*)(?:here|pad|token|placeholder)?\s*/?>)"
                         r"|(?i:\[(image|img)[ _-]?(\d*)\])|\[VIDEO\]|\[AUDIO\]")


@dataclass(slots=True)      # a data set may have millions
class Example:
    """Holds a row. images: RGB. question: an <image> stands for each picture; without any, all come
    first. answer: text; for tasks with boxes, JSON in the pixels of the only image. thought:
    reasoning in front of the label, which only pretraining data has. mask: bool [height, width],
    for evaluation. system: the system turn of a chat, if it has one."""
    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    task: str
    thought: str = ""
    mask: np.ndarray | None = None
    system: str = field(default="", repr=False)


class BadRow(Mistake):
    """Tells of a row that cannot be used: the message names file, row and reason."""


@dataclass
class Rules:
    """Holds what a source needs to know of the seven scripts. tasks: name → a record of which
    `boxes` says whether its answers are boxes. read_label(task, cell, choices) → the answer.
    check(example, (width, height) of each picture) → a list of (kind of oddity, details). Both
    raise ValueError, which says why the row cannot be used. longest: text that is read, in
    characters."""
    tasks: dict
    read_label: Callable
    check: Callable
    longest: int


class Scenes:
    """Draws the built-in world, `scenes:SPLIT`, or another one, `photos:SPLIT`."""
    bad: tuple = ()
    has_masks = False

    def __init__(self, split: str, name: str = "scenes"):
        self.world: ModuleType = photos if name == "photos" else scenes
        self.split = split
        if split not in self.world.SPLITS:
            raise Mistake(f"{name}:{split} does not exist; the splits are {', '.join(self.world.SPLITS)}")
        self.odd: dict[str, list] = {}
        self.judged = 0         # examples that were looked at before the start
        made_of = Path(str(self.world.__file__)).read_bytes() + split.encode()
        made_of += photos.digest() if name == "photos" else b""
        self.fingerprint = hashlib.sha256(made_of).hexdigest()[:16]

    def __len__(self) -> int:
        return self.world.SPLITS[self.split]

    def __getitem__(self, index: int) -> Example:
        fields = self.world.make(self.split, index)
        return Example(images=(fields.pop("image"),), **fields)

    def look_at_some(self, check: Callable, name: str) -> None:
        """Checks 64 examples, which stand for all: each is drawn when it is wanted. Raises Mistake,
        which names the data, if one cannot be used. check: as in Rules."""
        for index in range(0, len(self), -(-len(self) // 64)):
            self.judged += 1
            example = self[index]
            try:
                for what, this in check(example, [image.size for image in example.images]):
                    self.odd.setdefault(what, [0, f"example {example.id}: {this}"])[0] += 1
            except ValueError as error:
                raise Mistake(f"{name}: example {example.id}: {error}") from None


# --------------------------------------------------------------------------------------------------
# Rows

def lookup(row: dict, name: str):
    """Returns a column, or with dots a field of a record: reward_model.ground_truth."""
    if name in row or "." not in name:
        return row.get(name)
    root, _, rest = name.partition(".")
    return lookup(row[root], rest) if isinstance(row.get(root), dict) else None


def light_example(row: dict, number: int, task: str, columns: dict[str, str], has_masks: bool, rules: Rules,
                  box_format: str = "xyxy") -> Example:
    """Returns the example of a row, still without its picture. Raises ValueError, which says why
    the row cannot be used."""
    def held(*names: str) -> list[str]:
        return [name for name in names if lookup(row, name) not in (None, "")]

    def chosen(field: str, names: tuple[str, ...]) -> list[str]:
        return held(columns[field]) if field in columns else held(*names)

    def text(name: str, kinds: tuple = (str,)) -> str:
        if row.get(name) is not None and not isinstance(row[name], kinds):
            raise ValueError(f"the column {name!r} holds a {type(row[name]).__name__}")
        return str(row[name]) if row.get(name) is not None else ""

    def turns(column: list[str]) -> dict[str, str] | None:
        try:
            return turns_in(lookup(row, column[0])) if column else None
        except ValueError as error:
            raise ValueError(f"the column {column[0]!r} is {error}") from None

    asked = chosen("question", QUESTION)[:1]
    question, system, has_boxes = lookup(row, asked[0]) if asked else "", "", rules.tasks[task].boxes
    if chat := turns(asked):
        question, system = chat.get("question", ""), chat.get("system turn") or text("system")
    elif not isinstance(question, str):
        raise ValueError(f"the question is a {type(question).__name__}, not text")
    if isinstance(earlier := row.get("history"), list) and earlier:
        raise ValueError(f"the column 'history' holds {len(earlier)} earlier questions; a row may have one")
    answers = chosen("answer", ANSWER)
    if "answer" not in columns:
        answers = answers + asked * bool(chat and "answer" in chat) or held(*REPLY)
        if not answers and has_boxes:
            # Where there is nothing, the authors' test sets have a box of zeros beside an empty mask.
            answers = [name for name in held("bbox") if not (has_masks and row[name] == [0, 0, 0, 0])]
    if len(answers) > 1:
        raise ValueError(f"the columns {' and '.join(answers)} both hold an answer; choose by --columns answer=NAME")
    value = lookup(row, answers[0]) if answers else None
    if (reply := turns(answers)) is not None:
        value = reply.get("answer")
    if chat and isinstance(objects := row.get("objects"), dict):    # ms-swift: what <ref-object> and <bbox> stand for
        refs, boxes = iter(objects.get("ref") or []), objects.get("bbox") or []
        question = re.sub("<ref-object>", lambda mark: str(next(refs, mark[0])), question)
        value = boxes if has_boxes and str(value).count("<bbox>") == len(boxes) > 0 else value
        if mark := re.search("<ref-object>|<bbox>", question):
            raise ValueError(f"the question names {mark[0]}, which nothing in the column 'objects' fills")
    if not question.strip():
        raise ValueError(f"no question: none of the columns {columns.get('question') or ', '.join(QUESTION)} holds one")
    if value is None and not has_masks:
        known = columns.get("answer") or ", ".join((*ANSWER, *REPLY, "bbox"))
        raise ValueError(f"no answer: none of the columns {known} holds one, nor a turn of the assistant in a chat")
    offered = chosen("choices", CHOICES)
    choices = lookup(row, offered[0]) if offered else {} if "choices" in columns else lettered(row)
    if isinstance(choices, str) and choices.strip() == "[]":        # an open question of MMMU
        choices = None
    try:
        if value is not None and has_boxes and box_format == "xywh":
            value = [item | {"bbox_2d": as_corners(item["bbox_2d"])} for item in items_in(value)]
        answer = "" if value is None else rules.read_label(task, value, choices)
    except ValueError as error:
        raise ValueError(f"bad label: {error} (column {answers[0]!r})") from None
    names = chosen("id", NAMES)
    name = text(names[0], (str, int)) if names else str(number)
    if not names and (picture := text("image_id", (str, int))):
        name = f"{picture}/{row.get('ann_id') or 0}"
    options = "\nChoices:" * bool(choices) + "".join(f"\n({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(
        json.loads(answer)["choices"] if choices else ()))
    thought = text("thought")
    for column, held_text in ((asked[0], question), (asked[0], system), ((offered or [""])[0], options),
                              ((names or ["image_id"])[0], name), ("thought", thought)):
        if len(held_text) > rules.longest:
            raise ValueError(f"the column {column!r} holds {len(held_text):,} characters, more than {rules.longest:,}")
    question, thought, system = (unicodedata.normalize("NFC", held_text)
                                 for held_text in (question + options, thought, system))
    return Example(name, (), question, answer, task, thought, system=system)


def read_mask(value) -> np.ndarray | None:
    """Returns a mask, bool [height, width], from a list of rows."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise ValueError(f"the mask is a {type(value).__name__}; it must be a list of rows of true and false")
    if len({len(row) for row in value}) > 1:
        raise ValueError("the rows of the mask differ in length")
    if (grid := np.array(value)).ndim != 2 or grid.dtype.kind not in "biuf":        # "0" as text would be true
        raise ValueError("the mask must have rows, of true and false or of numbers")
    return grid.astype(bool)


class StoredExamples:
    """Holds the rows of one or more files, checked when they are opened. bad: what was left out
    under skip_bad_rows, one line each. odd: what was noticed, and how often. fingerprint: of all
    rows and of the files that hold their pictures."""
    def __init__(self, files: list, columns: dict[str, str], rules: Rules, task: str = "", skip_bad_rows: bool = False,
                 form: tuple[str, str] = (FORMATS[0], UNITS[0])):
        self.columns, self.rules, self.task, self.skip, self.form = columns, rules, task, skip_bad_rows, form
        self.bad: list[str] = []
        self.odd: dict[str, list] = {}      # what → [how often, the first row]
        # Of each: its file and number, the example, the sizes of its pictures, and their paths.
        self.rows: list[tuple] = []
        self.ids: set[str] = set()
        self.foreign: dict[str, None] = {}          # what a column task holds that is no task here
        self.counted: dict[Path, str] = {}          # `other_ways` of each file
        digest = hashlib.sha256()
        for file in files:
            pictures = 0
            digest.update(repr((file.path.name, stat_of(file.path))).encode())
            for number, row, cells in with_bar(file, "opening"):
                try:
                    example, contents, sizes = self.check(file, row, cells, number)
                except Mistake:     # of the installation, not of the row
                    raise
                except (ValueError, RecursionError) as error:       # the latter of lists in lists
                    self.leave_out(BadRow(f"{file.path}, row {number}: {one_line(error)}"), report=False)
                    continue
                pictures += len(contents)
                paths = tuple(content for content in contents if isinstance(content, Path))
                stats = map(stat_of, paths) if paths else (None,)
                # Spelled as when a row had one picture at most: runs of that time can go on.
                line = repr((number, example, *stats)).replace("images=()", "image=None", 1)
                digest.update((line + example.system).encode())
                paths = paths if len(paths) == len(contents) else ()
                self.rows.append((file, number, example, sizes, *paths))
            if not pictures and isinstance(file, ArrowTable) and self.rows and self.rows[-1][0] is file:
                raise Mistake(f"{file.path} holds no picture in any row (column {', '.join(file.pictures)}); name its "
                              "column by --columns image=NAME; text alone is read from JSON lines with \"image\": null")
        if not self.rows:
            raise Mistake(f"{', '.join(str(f.path) for f in files)} holds no usable rows. {' '.join(self.bad[:3])}")
        if found := self.odd.pop("foreign", None):
            values = ", ".join(map(repr, [*self.foreign][:5])) + ", …" * (len(self.foreign) > 5)
            self.odd[f"rows name tasks that are none of ours ({one_line(values)}), so --task {task} counts"] = found
        self.judged, self.fingerprint = len(self.rows), digest.hexdigest()[:16]
        self.has_masks = any(file.has_masks for file in files)

    def leave_out(self, error: BadRow, report: bool = True) -> None:
        """Raises BadRow, unless such rows are to be left out: then its reason is noted and, with
        `report`, printed at once, in the first epoch alone."""
        if not self.skip:
            raise BadRow(f"{error} (--skip-bad-rows leaves such rows out)") from None
        if report and str(error) not in self.bad:
            say(f"left out: {error}")
        self.bad.append(str(error))

    def task_of(self, row: dict) -> str:
        """Returns the task that the row names, if there is one of that name, else --task."""
        own = lookup(row, name := self.columns.get("task", "task"))
        if not (task := own if isinstance(own, str) and own in self.rules.tasks else self.task):
            wrong = f"no column {name}: give it, or" if own in (None, "") else (
                f"task {str(own)[:100]!r} is not one of ours: give")
            raise ValueError(f"{wrong} --task with one of {', '.join(self.rules.tasks)}")
        return task

    def check(self, file, row: dict | str, cells: list, number: int):
        """Returns what read_row does, and notices what is odd. Raises ValueError if the row cannot be
        used."""
        try:
            example, contents, sizes = self.read_row(file, row, cells, number, self.form)
        except Misplaced as error:
            raise ValueError(f"{error}; {self.other_ways(file)}") from None
        for what, this in self.rules.check(example, sizes):
            self.notice(what, f"{file.path}, row {number}: {this}")
        own = lookup(row, self.columns.get("task", "task")) if isinstance(row, dict) else None
        if own not in (None, "", example.task):
            self.foreign[str(own)[:40]] = None
            self.notice("foreign", f"{file.path}, row {number}")
        if example.id in self.ids:
            self.notice("rows have the id of an earlier row", f"{file.path}, row {number}: {example.id}")
        self.ids.add(example.id)
        inside = os.path.abspath(file.folder) + os.sep
        if outside := [content for content in contents if isinstance(content, Path)
                       and not os.path.abspath(content).startswith(inside)]:
            self.notice("rows have pictures outside the folder of the data",
                        f"{file.path}, row {number}: {outside[0]}")
        return example, contents, sizes

    def other_ways(self, file) -> str:
        """Says how many rows of a file have right boxes, as they are read and in the best other way.
        Raises Mistake if many would be left out that are right there: then those that stay are
        wrong too."""
        if file.path in self.counted:
            return self.counted[file.path]
        right, wrong = dict.fromkeys(itertools.product(FORMATS, UNITS), 0), 0
        for number, row, cells in with_bar(file, "counting boxes of"):
            for form in right:
                try:
                    example = self.read_row(file, row, cells, number, form)[0]
                    right[form] += self.rules.tasks[example.task].boxes and example.answer not in ("", "[]")
                except Misplaced:
                    wrong += form == self.form
                except (ValueError, RecursionError):
                    pass
        best = max((form for form in right if form != self.form), key=lambda form: right[form])
        flags = [f"{flag} {value}" for flag, value, now in zip(("--box-format", "--box-units"), best, self.form)
                 if value != now]
        said = (f"of the file's {right[self.form] + wrong} rows with boxes {right[self.form]} are right as "
                f"{' in '.join(self.form)}, and {right[best]} with {' '.join(flags)}")
        if self.skip and wrong > 1 and wrong >= right[self.form] / 9 and right[best] > right[self.form]:
            raise Mistake(f"{file.path}: {said}; the rows that stayed would have wrong boxes: give that option")
        return self.counted.setdefault(file.path, said)

    def read_row(self, file, row: dict | str, cells: list, number: int, form: tuple[str, str]):
        """Returns the example of a row, its pictures as paths or open files, and their sizes.
        form: the format and units of boxes. Raises ValueError if the row cannot be read."""
        if isinstance(row, str):
            raise ValueError(row)
        for name in row.keys() - columns_read(self.columns):
            if holds_media(name, row[name], name in file.media):
                raise ValueError(f"the column {name!r} holds a video or a sound; only pictures and text are read")
        example = light_example(row, number, self.task_of(row), self.columns, file.has_masks, self.rules, form[0])
        contents = self.pictures(file, cells)
        boxes, count = self.rules.tasks[example.task].boxes, len(contents)
        if boxes and count > 1:
            raise ValueError(f"{count} pictures in one row; boxes, which the task {example.task} "
                             "has, need a single one")
        named = set()       # pictures that the question names; a numbered one may come again
        for mark in PLACEHOLDER.finditer(example.question):
            named.add(which := mark[2] or mark[4] or f"at {mark.start()}")
            beyond = len(named) > count or which.isdecimal() and int(which) > count
            if mark[0] != MARK and (beyond or not (mark[1] or mark[3])):
                raise ValueError(f"the question names {mark[0]}, which no picture of the row fills; "
                                 f"it has {count}")
        example.question = marked(example.question, count)
        if boxes and not contents:
            raise ValueError("no picture: boxes need one")
        rotate = self.may_rotate(example, file)
        sizes = tuple(each(contents, lambda content: picture_size(content, rotate)))
        if boxes and example.answer:
            example = replace(example, answer=in_pixels(example.answer, form[1], sizes[0]))
        return example, contents, sizes

    def notice(self, what: str, first: str) -> None:
        self.odd.setdefault(what, [0, one_line(first)])[0] += 1

    def pictures(self, file, cells: list) -> list:
        found = [contents for cell in cells if (contents := pictures_in(cell, file.folder))]
        if len(found) > 1:
            raise ValueError(f"the columns {' and '.join(PICTURES)} both hold a picture; choose by --columns "
                             "image=NAME")
        return found[0] if found else []

    def may_rotate(self, example: Example, file) -> bool:
        """Tells whether a picture may be rotated as its EXIF says: not if boxes or a mask may
        belong to the stored one."""
        return not file.has_masks and (not self.rules.tasks[example.task].boxes or example.answer == "[]")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Returns the example with its pictures, which are decoded now. Raises BadRow if that
        fails."""
        file, number, example, sizes, *paths = self.rows[index]
        try:
            cells, mask = file.heavy(number)
            contents, rotate = paths or self.pictures(file, cells), self.may_rotate(example, file)
            images = tuple(each(zip(contents, sizes),
                                lambda one: open_image(one[0], rotate, one[1])))
            mask, answer = read_mask(mask), example.answer
            if mask is not None and self.rules.tasks[example.task].boxes:
                if mask.shape[::-1] != sizes[0] and mask.any():
                    raise ValueError(f"the mask is {mask.shape[::-1]} and the picture {sizes[0]}")
                ys, xs = np.nonzero(mask)
                if not len(xs):
                    answer = "[]"
                elif not answer:
                    around = [int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())]
                    answer = self.rules.read_label(example.task, around, None)
            if not answer:
                raise ValueError(f"no answer: none of the columns {', '.join((*ANSWER, 'bbox', 'mask'))} holds one")
            whole = replace(example, images=images, mask=mask, answer=answer)
            if not example.answer:
                self.rules.check(whole, sizes)
            return whole
        except Mistake:
            raise
        except ValueError as error:
            raise BadRow(f"{file.path}, row {number} (id {one_line(example.id)}): {one_line(error)}") from None


def with_bar(file, what: str) -> Iterator[tuple[int, dict | str, list]]:
    """Yields the rows of a file, with a bar if that takes long."""
    yield from tqdm(file.rows(), clean(f"{what} {file.path.name}"), file.count, unit="row", delay=BAR_AFTER,
                    leave=False, disable=os.environ.get("RANK", "0") != "0")


Source = Scenes | StoredExamples


# --------------------------------------------------------------------------------------------------
# --data

def splits_of(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """Returns (configuration, split) → the files, or folders of save_to_disk, that hold it. What
    the data set's README.md declares counts; else `datasets` finds the splits by the names of files
    and folders. It would pour together files of different folders or names (a.parquet, b.parquet):
    each of these is kept apart. 0000, 0001 and train-00000-of-00002 are parts of one."""
    if (folder / "dataset_dict.json").exists():
        return {("", path.name): [path] for path in listed_in(folder / "dataset_dict.json", "splits")}
    if (folder / "state.json").exists():
        return {("", ""): [folder]}
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns
    found: dict[tuple[str, str], list[Path]] = {}
    readme = folder / "README.md"
    with open(readme, "rb") if readme.is_file() else io.BytesIO() as file:
        declared = file.read(MAX_README + 1)
    if b"data_files:" in declared:
        if len(declared) > MAX_README:
            raise Mistake(f"{readme} declares data_files and has more than {MAX_README:,} bytes: shorten it")
        for config in datasets.get_dataset_config_names(str(folder)):
            files = datasets.load_dataset_builder(str(folder), config).config.data_files
            found |= {(config, str(split)): [Path(path) for path in paths] for split, paths in files.items()}
        return found
    for ending in (".parquet", ".jsonl"):
        try:
            patterns = get_data_patterns(str(folder))
            files = DataFilesDict.from_patterns(patterns, str(folder), allowed_extensions=[ending])
        except FileNotFoundError:       # datasets' name for a folder without data
            continue
        for split, paths in files.items():
            paths = [Path(path) for path in paths]
            names = {path: re.sub(r"[-_.]?\d*(-of-\d+.*)?$", "", path.stem) for path in paths}
            for path in paths:
                top = next(top for top in (folder.resolve(), folder.absolute()) if path.is_relative_to(top))
                config = "/".join(part for part in path.relative_to(top).parts[:-1] if part not in (split, names[path]))
                name = split if len(set(names.values())) == 1 else names[path]
                found.setdefault((config, str(name)), []).append(path)
        if found:
            break
    one = len({config for config, _ in found}) == 1         # data/train-….parquet: "data" tells nothing
    return {("" if one else config, split): paths for (config, split), paths in found.items()}


def load(data: str, rules: Rules, task: str = "", skip_bad_rows: bool = False, columns: str = "",
         flag: str = "--data", form: tuple[str, str] = (FORMATS[0], UNITS[0])) -> Scenes | StoredExamples:
    """Returns the source that the string of `flag` names. task: of rows that do not say theirs;
    columns: field=NAME,…; form: the format and units of boxes."""
    named = dict(part.partition("=")[::2] for part in columns.split(",")) if columns else {}
    if wrong := [field for field, name in named.items() if field not in MAPPABLE or not name]:
        raise Mistake(f"--columns {columns}: {wrong[0]!r} cannot be; give FIELD=NAME,… with the fields "
                      f"{', '.join(MAPPABLE)}")
    if data.startswith(("scenes:", "photos:")):
        name, _, split = data.partition(":")
        return Scenes(split, name)
    parts = data.split(":")
    wanted: list[str] = []
    while len(parts) > 1 and len(wanted) < 2 and not Path(":".join(parts)).exists():
        wanted.insert(0, parts.pop())
    path = Path(":".join(parts))
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise Mistake(f"{flag} {data}: {'it is no regular file' if path.exists() else 'there is no such file'}")
        found = {("", ""): [path]}
        fitting = found if not wanted else {}
    elif path.is_file():
        raise Mistake(f"{flag} {data}: a file must be .jsonl, with one JSON object a line, or .parquet; a JSON list "
                      f"becomes lines by {AS_LINES}")
    else:
        try:
            found = splits_of(path if data and path.is_dir() else download(data and str(path), flag))
        except Mistake:
            raise
        except Exception as error:
            raise Mistake(f"{flag} {data}: cannot be read as a data set ({reason_of(error)})") from error
        fitting = {(config, split): paths for (config, split), paths in found.items()
                   if wanted in ([], [split], [config], [config, split])}
    if not found:
        raise Mistake(f"{flag} {data}: holds no .parquet, .jsonl or save_to_disk files")
    if len(fitting) != 1:
        listed = ", ".join(":".join(filter(None, (str(path), config, split))) for config, split in sorted(found))
        reason = "more than one fits" if fitting else "there is no such split"
        raise Mistake(f"{flag} {data}: {reason}; it can be {listed}")
    [files] = fitting.values()
    if other := [file for file in files if file.is_file() and file.suffix not in (".parquet", ".jsonl")]:
        raise Mistake(f"{flag} {data}: {other[0].name} is neither Parquet nor JSON lines")
    tables = [(JsonlFile if file.suffix == ".jsonl" else ArrowTable)(file, named) for file in files]
    return StoredExamples(tables, named, rules, task, skip_bad_rows, form)


def download(name: str, flag: str) -> Path:
    """Returns a data set of the hub, in huggingface_hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Mistake(f"{flag} {name or repr(name)}: give scenes:SPLIT, a .jsonl or .parquet file, a folder, or a hub "
                      "id OWNER/NAME" + '; an empty --eval-data "" means never' * (flag == "--eval-data"))
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(PATTERNS)))
    except Exception as error:
        raise Mistake(f"{flag} {name}: no such folder, and the hub does not give it "
                      f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})") from error


@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits n examples: a permutation, a pure function of
    (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def take(source, numbers: range, seed: int) -> list[Example]:
    """Returns the examples of these numbers in the endless sequence of epochs. No remainder is
    dropped. If the source skips bad rows, the row after a bad one stands in for it."""
    n, taken = len(source), []
    for number in numbers:
        index = int(order(n, seed, number // n)[number % n])
        for _ in range(n):
            try:
                taken.append(source[index])
                break
            except BadRow as error:
                source.leave_out(error)
                index = (index + 1) % n
        else:
            raise Mistake(f"all {n} rows are bad; the last: {source.bad[-1]}")
    return taken


def read(source, numbers, report: bool = True) -> Iterator[tuple[int, Example]]:
    """Yields the examples of these rows, with their numbers. If the source skips bad rows, those
    are left out."""
    for number in numbers:
        try:
            yield number, source[number]
        except BadRow as error:
            source.leave_out(error, report)


def noticed(source) -> list[str]:
    """Returns what was found when the data was opened: rows left out, and what is odd."""
    return [*(f"left out: {reason}" for reason in source.bad),
            *(f"{count} of {source.judged} {what}; the first: {first}" for what, (count, first) in source.odd.items())]
