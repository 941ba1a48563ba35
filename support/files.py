"""Files: one reader and one writer of JSON, one digest. Nothing is unpickled, and no pipe is waited
for."""
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from support.mistakes import Mistake

MAX_BYTES, MAX_DEPTH = 64_000_000, 50       # of a JSON file, or of a line of one


def nesting_depth(text: str) -> int:
    """Returns how deep JSON text is nested; the brackets in its strings do not count."""
    outside = re.sub(r'"(?:[^"\\]|\\.)*"?', "", text, flags=re.DOTALL)
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", outside))
    return max(itertools.accumulate(steps, initial=0))


def parse_json(data: bytes):
    """Returns the value of JSON in UTF-8. Raises ValueError if it is none, too long or nested too
    deep."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES:,} bytes")
    text = data.decode("utf-8-sig")
    if nesting_depth(text) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text)


def check_regular(path: Path) -> None:
    """Raises Mistake if there is no regular file at path: opening a pipe would wait for ever. Raises
    OSError if this user may not read it: libraries say then that there is none."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "missing"
        raise Mistake(f"{path} is {what}; it must be a file")
    path.open("rb").close()


def read_record(path: Path, **kinds) -> dict:
    """Returns the JSON object in a file. kinds: names of fields that it must have, with their
    types. Raises Mistake if there is no such object."""
    check_regular(path)
    again = "Copy it anew from where it came"
    try:
        with open(path, "rb") as file:
            record = parse_json(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Mistake(f"{path} is not JSON: {error}. Is it damaged? {again}") from None
    if not isinstance(record, dict):
        raise Mistake(f"{path} holds a JSON {type(record).__name__}, not an object. {again}")
    for name, kind in kinds.items():
        if type(record.get(name)) is not kind:
            raise Mistake(f"{path}: {name} is {str(record.get(name))[:100]!r}; it must be of type "
                          f"{kind.__name__}. Is the file damaged? {again}")
    return record


def read_lines(path: Path, fits: Callable[[dict], bool]) -> tuple[list[dict], int]:
    """Returns the objects of a file with one JSON object a line, none if there is no file; and how
    many lines hold no object that `fits`, such as one cut off by a full disk."""
    lines: list[dict] = []
    damaged = 0
    if not os.path.lexists(path):
        return lines, damaged
    check_regular(path)
    with open(path, "rb") as file:
        for data in iter(lambda: file.readline(MAX_BYTES + 1), b""):
            try:
                line = parse_json(data)
                fine = isinstance(line, dict) and fits(line)
            except ValueError:
                fine = False
            if fine:
                lines.append(line)
            else:
                damaged += bool(data.strip())
    return lines, damaged


def as_json(value, indent: int | None = None) -> str:
    """Returns JSON text with a newline at its end. A number that is not finite becomes null: JSON
    has none."""
    def finite(part):
        if isinstance(part, dict):
            return {name: finite(each) for name, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part
    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that the old or the new one is there whenever the process is killed."""
    beside = path.with_name(f".unfinished_{path.name}")
    with writing(beside):
        beside.write_text(text)
        sync(beside)
    beside.rename(path)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def writing(path: Path):
    """Names the file in what the system says when it refuses to write. safetensors hides that in
    its own error."""
    try:
        yield
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove(path: Path) -> None:
    """Removes a file, a folder with all it holds, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
