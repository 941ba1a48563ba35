"""Files of rows: JSON lines, Parquet, folders of save_to_disk; and the columns that are read of them.

Each file yields its rows once, the pictures unread, and the pictures and masks of any row on demand. The library
`datasets` keeps Parquet files as memory-mapped Arrow in its cache. JSON lines are read here, for the sake of their line
numbers.
"""
import contextlib
import itertools
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path

from support.files import parse_json, read_record
from support.mistakes import Mistake

QUESTION = ("problem", "text", "question", "query", "prompt",     # the first that holds something
            "messages", "conversations", "conversation")
ANSWER = ("solution", "answer", "answers", "label")               # the only one that does,
REPLY = ("completion", "response")                                # else the only one of these
CHOICES = ("choices", "options")
LETTERED = ("{}", "choice_{}", "option_{}")                       # else a column a letter: A, B …; choice_a, choice_b …
# "decoded_image" before both (MathVista); else image_1, image_2 … (MMMU), or the only column of image type.
PICTURES, NUMBERED = ("image", "images"), re.compile(r"image_?(\d+)")
NAMES = ("id", "pid", "questionId")
READ_TOGETHER = 16          # rows
MAPPED = 64_000_000         # bytes of a memory map that are read before it is closed and opened anew
MAX_LINE = 16_000_000       # bytes of a line of JSON
AS_LINES = "jq -c '.[]' LIST.json > LINES.jsonl"
# Videos and sounds, which are not read: columns that hold them, files of them, and what stands for
# them in a question.
MEDIA = re.compile(r"(video|audio)s?([_-]?(file|path|url|uri|byte)s?)*", re.I)
MEDIA_FILE = re.compile(r".+\.(mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|3gp|wav|mp3|m4a|aac|flac|ogg|opus)\s*", re.I)


def picture_columns(names, typed: list[str], chosen: str | None) -> list[str]:
    """Returns the columns that may hold the picture. typed: those of image type."""
    if chosen:
        return [chosen] if chosen in names else []
    if "decoded_image" in names:
        return ["decoded_image"]
    numbered = sorted(filter(NUMBERED.fullmatch, names), key=lambda name: int(NUMBERED.fullmatch(name)[1]))
    return [name for name in PICTURES if name in names] or numbered or (typed if len(typed) == 1 else [])


def as_cells(values: dict[str, object]) -> list:
    """Returns the cells of a row's columns of pictures, one a column. Several numbered ones are one list, up to
    the last that holds something."""
    cells = list(values.values())
    if len(cells) < 2 or not any(map(NUMBERED.fullmatch, values)):
        return cells
    while cells and cells[-1] is None:
        cells.pop()
    return [cells]


def columns_read(columns: dict[str, str]) -> set[str]:
    """Returns the names of all columns that texts are read from."""
    letters = {form.format(letter) for form in LETTERED for letter in string.ascii_letters}
    return {*QUESTION, *ANSWER, *REPLY, *CHOICES, *letters, *NAMES, "bbox", "task", "system", "objects", "history",
            "thought", "image_id", "ann_id", *columns.values(), *(name.split(".")[0] for name in columns.values())}


def holds_media(name: str, cell, meant: bool = False) -> bool:
    """Tells whether a cell, by its column's name or a file's ending, holds a video or a sound.
    meant: it does unless it is empty."""
    meant = meant or MEDIA.fullmatch(name) is not None
    if isinstance(cell, dict):
        return any(holds_media(field, part, meant) for field, part in cell.items())
    if isinstance(cell, list):
        return any(holds_media("", part, meant) for part in cell)
    return meant and cell not in (None, "", False) or isinstance(cell, str) and bool(MEDIA_FILE.fullmatch(cell))


def lettered(row: dict) -> dict[str, object]:
    """Returns the choices that stand in columns of their own, by their letters: two or more from A, without a gap."""
    for form in LETTERED:
        for letters in (string.ascii_uppercase, string.ascii_lowercase * (form != "{}")):
            cells = itertools.takewhile(lambda cell: cell[1] not in (None, ""),
                                        ((letter.upper(), row.get(form.format(letter))) for letter in letters))
            if len(found := dict(cells)) > 1:
                return found
    return {}


class JsonlFile:
    """Reads one JSON object a line."""
    has_masks, media = False, frozenset[str]()

    def __init__(self, path: Path, columns: dict[str, str]):
        self.path, self.folder, self.columns = path, path.parent, columns
        self.count = sum(1 for _ in self.lines())
        if next((line for line in self.lines() if line.strip()), b"").lstrip().startswith(b"[{"):
            raise Mistake(f"{path} is a JSON list, not one object a line: {AS_LINES}")

    def lines(self) -> Iterator[bytes]:
        """Yields the lines; of a longer one the first MAX_LINE + 1 bytes."""
        with open(self.path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                    pass

    def rows(self) -> Iterator[tuple[int, dict | str, list]]:
        """Yields each row's number, as an editor counts lines; its columns, or why it has none; its
        picture cells."""
        for number, line in enumerate(self.lines(), 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"the line has more than {MAX_LINE:,} bytes")
                row = parse_json(line)
            except ValueError as error:
                yield number, f"not JSON ({error})", []
                continue
            if not isinstance(row, dict):
                yield number, "not a JSON object", []
                continue
            found = picture_columns(row, [], self.columns.get("image"))
            missing = f"the column {self.columns.get('image', 'image')} is missing; null means that there is none"
            yield number, row if found else missing, as_cells({name: row[name] for name in found})

    def heavy(self, number: int) -> tuple[list, object]:
        return [], None         # a row's path is kept when it is checked


class ArrowTable:
    """Reads a Parquet file or a folder of save_to_disk, through the library `datasets`:
    memory-mapped, nothing decoded."""
    mapped: "ArrowTable | None" = None      # the one whose memory map is open, whatever the number of files

    def __init__(self, path: Path, columns: dict[str, str]):
        import datasets
        self.path, self.folder, self.table, self.touched = path, path if path.is_dir() else path.parent, None, 0
        saved = listed_in(path / "state.json", "_data_files") if path.is_dir() else []
        try:
            with quiet(datasets):
                files = saved or parquet_as_arrow(path)
                self.files = {file: stat_of(file) for file in files}
                table = self.whole()
        except Exception as error:
            cache = f"no room or a damaged copy in the cache {datasets.config.HF_DATASETS_CACHE}"
            what = "not Arrow files of save_to_disk" if saved else f"not a Parquet file, or {cache}"
            raise Mistake(f"{path}: {what} ({reason_of(error)})") from None
        self.count = len(table)
        typed = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)
                 or isinstance(getattr(kind, "feature", None), datasets.Image)]
        self.pictures = picture_columns(table.column_names, typed, columns.get("image"))
        for key, name in columns.items():
            if name not in table.column_names and name.split(".")[0] not in table.column_names:
                raise Mistake(f"--columns {key}={name}: {path} has no such column; it has "
                              f"{', '.join(table.column_names)}")
        if not self.pictures:
            several = f"several columns of pictures ({', '.join(typed)})" if typed else "no column of pictures"
            raise Mistake(f"{path} has {several} (its columns: {', '.join(table.column_names)}); name it by --columns "
                          "image=NAME")
        kinds = {name: f"'{name}': {kind!r}" for name, kind in table.features.items() if name not in self.pictures}
        self.media = {name for name, kind in kinds.items() if re.search(r"\b(Video|Audio)\(", kind)}
        wanted = columns_read(columns) | self.media
        self.texts = [name for name, kind in kinds.items()
                      if name in wanted or any(map(MEDIA.fullmatch, re.findall("'([^']*)':", kind)))]
        self.has_masks = "mask" in table.column_names
        self.classes = {name: dict(enumerate(kind.names)) for name, kind in table.features.items()
                        if isinstance(kind, datasets.ClassLabel)}

    def whole(self):
        import datasets
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in self.files])

    def part(self, start: int, stop: int):
        """Returns rows as an Arrow table. What a memory map has read counts as this process's
        memory until it is closed: so it is opened anew after MAPPED bytes. Raises Mistake if a file
        has changed: reading past its end would be fatal."""
        for file, before in self.files.items():
            if before != (file.exists() and stat_of(file)):
                raise Mistake(f"{file} was changed, cut or removed since the data was opened. Bring it back as it was")
        if ArrowTable.mapped is not self or self.touched > MAPPED:
            if ArrowTable.mapped is not None:
                ArrowTable.mapped.table = None
            ArrowTable.mapped, self.table, self.touched = self, self.whole().with_format("arrow"), 0
        rows = self.table[start:stop]
        self.touched += rows.nbytes
        return rows

    def rows(self) -> Iterator[tuple[int, dict | str, list]]:
        for start in range(0, self.count, READ_TOGETHER):
            part = self.part(start, min(start + READ_TOGETHER, self.count))
            for i in range(part.num_rows):
                try:
                    row = {name: in_python(part.column(name)[i]) for name in self.texts}
                    row |= {name: names.get(row[name]) for name, names in self.classes.items() if name in row}
                    pictures = {name: in_python(part.column(name)[i]) for name in self.pictures}
                    yield start + i + 1, row, as_cells(pictures)
                except (ValueError, OverflowError) as error:      # text that is not UTF-8, a date out of range
                    yield start + i + 1, f"it cannot be read ({reason_of(error)})", []

    def heavy(self, number: int) -> tuple[list, object]:
        """Returns the picture cells of a row, and its mask."""
        row = self.part(number - 1, number)
        return (as_cells({name: in_python(row.column(name)[0]) for name in self.pictures}),
                row.column("mask")[0].as_py() if self.has_masks else None)


def listed_in(record: Path, key: str) -> list[Path]:
    """Returns the files or folders that a record of save_to_disk lists. Raises Mistake if they do
    not all lie beside it."""
    entries = read_record(record).get(key) if record.is_file() else None
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in
             (entries if isinstance(entries, list) else [])]
    beside = [path.name for path in record.parent.iterdir() if path.is_file() or path.is_dir()]
    if wrong := [name for name in names or [entries] if name not in beside]:
        raise Mistake(f"{record}: {key} must list what lies beside it, not {wrong[0]!r:.100}. Copy the folder anew")
    return [record.parent / name for name in names]


def parquet_as_arrow(path: Path) -> list[Path]:
    """Returns the Arrow files that `datasets` keeps of a Parquet file in its cache. They are made
    at the first opening, a few rows at a time: its default, whole row groups read ahead, takes
    gigabytes of memory."""
    import datasets
    import pyarrow.dataset
    streamed = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
    table = datasets.Dataset.from_parquet(str(path), batch_size=READ_TOGETHER, fragment_scan_options=streamed)
    pyarrow.default_memory_pool().release_unused()
    return [Path(file["filename"]) for file in table.cache_files]


def in_python(cell):
    """Returns an Arrow cell as Python has it. Bytes become an open file, of which only what is read
    is copied."""
    import pyarrow
    if not cell.is_valid:
        return None
    if isinstance(cell, pyarrow.StructScalar):
        return {name: in_python(value) for name, value in cell.items()}
    if isinstance(cell, (pyarrow.ListScalar, pyarrow.LargeListScalar)):
        return [in_python(value) for value in cell.values]
    if pyarrow.types.is_binary(cell.type) or pyarrow.types.is_large_binary(cell.type):
        return pyarrow.BufferReader(cell.as_buffer())
    return cell.as_py()


def reason_of(error: BaseException) -> str:
    """Returns an error of a library in short; of a chain of them the first, which says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def quiet(datasets):
    """Lets one rank show the bars of `datasets`, and none its log, which repeats what our sentences
    say."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def stat_of(path: Path) -> tuple[int, int]:
    """Returns what changes when a file does: its size and the time of its last change."""
    return path.stat().st_size, path.stat().st_mtime_ns
