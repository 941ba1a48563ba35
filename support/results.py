"""The folder of an evaluation: settings.json, records.jsonl. An evaluation that was interrupted goes on
there, if every setting is the same."""
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

from support.files import read_lines, read_record
from support.mistakes import Mistake


def default_folder(model: str, folder: Path, data: str, limit: int) -> Path:
    """Returns a folder in the run, with the checkpoint's step, or else in the current folder: a
    model folder is never written into. Another --limit is another evaluation. folder: the model's,
    which is the checkpoint's if --model names a run."""
    def plain(name: str) -> str:
        return re.sub(r"[^\w.-]+", "-", name).strip("-.")
    data = plain(data) + (f"-first{limit}" if limit else "")
    if (Path(model) / "metrics.jsonl").exists():
        return Path(model) / "evaluations" / f"{folder.name}-{data}"
    return Path("evaluations") / f"{plain(model)}-{data}"


def results_folder(usual: Path, given: bool, settings: dict) -> tuple[Path, str]:    # type: ignore[return]
    """Returns where the results go, and a notice. If the usual folder holds another evaluation,
    NAME-2, NAME-3 … is taken. given: by --out; raises Mistake if that one does."""
    out, said = usual, ""
    for attempt in itertools.count(2):
        path = out / "settings.json"
        try:
            old = read_record(path) if os.path.lexists(path) else settings
        except Mistake:         # nothing says what the records there are of
            old = {}
        if old == settings:
            return out, said and f"{said}; writing to {out}\n"
        if given and not old:
            raise Mistake(f"{path} is damaged: give another --out, or remove {out}")
        changed = [name for name in settings if old.get(name) != settings[name]]
        if given:
            changes = "; ".join(f"{name}: {old.get(name)!r} → {settings[name]!r}" for name in changed)
            raise Mistake(f"{out} holds the results of an evaluation with other settings "
                          f"({changes}): give another --out, or remove {out}")
        another = " and ".join(changed) if old else "evaluation (damaged)"
        said = said or f"{usual} holds results of another {another}"
        out = usual.with_name(f"{usual.name}-{attempt}")


def read_finished(out: Path, check: Callable[[dict], object]) -> tuple[dict[int, dict], int]:
    """Returns the records that an interrupted evaluation left in `out`, by example number; and how
    many of its lines hold none, such as the one that was being written. check: raises an error
    if a line is no record."""
    def fits(line: dict) -> bool:
        try:
            check(line)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            return False
        return type(line.get("index")) is int

    parts = [read_lines(part, fits) for part in sorted(out.glob("records*.jsonl"))]
    return {line["index"]: line for lines, _ in parts for line in lines}, sum(damaged for _, damaged in parts)
