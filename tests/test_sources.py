"""Where examples come from: the authors' formats, pictures of every kind, bad rows, memory, order."""
import base64
import decimal
import io
import json
import os
import random
import re
import runpy
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from tokenizers import normalizers

import rewards
import train
from data import Processor, Response, load, pack_group
from support import sources, tables
from support.cells import read_plain
from support.images import open_image
from support.sources import BadRow, Example, noticed, order, read, take

ROOT = Path(__file__).resolve().parent.parent
BOX = {"bbox_2d": [10, 5, 30, 25], "point_2d": [20, 15]}


def png(width: int = 56, height: int = 28, colour=(200, 30, 30), mode: str = "RGB", **options) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (width, height), colour).save(data, options.pop("format", "PNG"), **options)
    return data.getvalue()


CUT = png(64, 64, format="JPEG")[:-60]      # its header is whole


def train_row(i: int, **change) -> dict:
    """The columns of the authors' training set."""
    return {"id": f"r{i}", "problem": f"the cup {i}", "solution": json.dumps([BOX] if i % 2 else []),
            "image": {"bytes": png(colour=(i % 256, 0, 0)), "path": None}, "img_height": 28, "img_width": 56} | change


def mask_of(x1: int, y1: int, x2: int, y2: int, width: int = 56, height: int = 28) -> list[list[bool]]:
    return [[x1 <= x <= x2 and y1 <= y <= y2 for x in range(width)] for y in range(height)]


EMPTY = [[False] * 56 for _ in range(28)]


def benchmark_row(i: int, **change) -> dict:
    """The columns of the authors' test sets."""
    return {"image": {"bytes": png(), "path": None}, "text": "The Cup.", "mask": mask_of(3, 4, 20, 11), "image_id": i,
            "ann_id": 7, "img_height": 28, "img_width": 56} | change


def write_parquet(path: Path, rows: list[dict], **options) -> str:
    names = dict.fromkeys(name for row in rows for name in row)          # of the first row alone Arrow takes them
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path, **options)
    return str(path)


def write_arrow(folder: Path, rows: list[dict], parts: int = 2) -> None:
    """A folder as datasets' save_to_disk lays it out."""
    folder.mkdir(parents=True)
    names = [f"data-{p:05}-of-{parts:05}.arrow" for p in range(parts)]
    for p, name in enumerate(names):
        table = pa.Table.from_pylist(rows[p::parts])
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def summary(source) -> list[tuple]:
    return [(e.id, e.question, e.answer, e.task, e.images[0].size, e.images[0].getpixel((0, 0))) for e in source]


EXPECTED = [(f"r{i}", f"the cup {i}", json.dumps([BOX] if i % 2 else []), "grounding", (56, 28), (i, 0, 0))
            for i in range(5)]


@pytest.mark.parametrize("row_group", [1, 2, 5])
def test_parquet_in_any_order(tmp_path, row_group, monkeypatch):
    monkeypatch.setattr(tables, "READ_TOGETHER", 2)
    source = load(write_parquet(tmp_path / "a.parquet", [train_row(i) for i in range(5)], row_group_size=row_group),
                  "grounding")
    assert summary(source) == EXPECTED
    for i in (4, 0, 3, 3, 1, 2, 4, 0):
        assert source[i].id == f"r{i}" and source[i].images[0].getpixel((0, 0)) == (i, 0, 0)


def test_every_container_gives_the_same(tmp_path):
    rows = [train_row(i) for i in range(5)]
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:3])
    write_parquet(folder / "train-00001-of-00002.parquet", rows[3:])
    assert summary(load(str(tmp_path / "hub"), "grounding")) == EXPECTED
    write_arrow(tmp_path / "saved", rows)
    assert sorted(summary(load(str(tmp_path / "saved"), "grounding"))) == EXPECTED
    write_arrow(tmp_path / "dict" / "train", rows)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert sorted(summary(load(str(tmp_path / "dict"), "grounding"))) == EXPECTED
    lines = tmp_path / "lines"
    lines.mkdir()
    for i, row in enumerate(rows):
        (lines / f"{i}.png").write_bytes(row["image"]["bytes"])
    (lines / "a.jsonl").write_text("\n".join(
        json.dumps(row | {"image": f"{i}.png", "task": "grounding"}) for i, row in enumerate(rows)))
    assert summary(load(str(lines))) == EXPECTED == summary(load(str(lines / "a.jsonl")))


def test_hub_id_from_the_cache(tmp_path):
    """In huggingface_hub's own cache layout, offline."""
    root = tmp_path / "datasets--owner--name"
    folder = root / "snapshots" / ("0" * 40) / "data"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    write_parquet(folder / "test-00000-of-00001.parquet", [benchmark_row(0)])
    code = "import data; print(data.load('owner/name', 'grounding')[0].question)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=True).stdout == "The Cup.\n"
    missing = subprocess.run([sys.executable, "-c", "import data; data.load('owner/other')"], cwd=ROOT,
                             env=environment, capture_output=True, text=True)
    assert "Mistake: --data owner/other: no such folder, and the hub does not give it" in missing.stderr


def test_authors_test_sets(tmp_path):
    rows = [benchmark_row(0), benchmark_row(1, mask=EMPTY), benchmark_row(2, bbox=[3.0, 4.0, 20.0, 11.0]),
            benchmark_row(3, bbox=[0.0, 0.0, 0.0, 0.0], mask=EMPTY)]
    source = load(write_parquet(tmp_path / "a.parquet", rows), "grounding")
    present, absent, boxed, empty = source
    assert present.id == "0/7" and present.question == "The Cup."
    assert json.loads(present.answer) == json.loads(boxed.answer) == [
        {"bbox_2d": [3, 4, 20, 11], "point_2d": [11.5, 7.5]}]
    assert present.mask.shape == (28, 56) and present.mask.sum() == 18 * 8
    assert present.mask[4, 3] and not present.mask[3, 3]
    assert absent.answer == empty.answer == "[]" and not absent.mask.any()


def test_answers_of_several_kinds(tmp_path):
    rows = [{"pid": 5, "question": "2+2?", "image": None, "answer": "4", "choices": ["3", "4"], "task": "math"},
            {"questionId": 6, "question": "when?", "image": None, "answers": ["1990", "in 1990"], "task": "docvqa"},
            {"query": "how much?", "image": None, "label": ["14"], "task": "chartqa"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    choice, several, chart = load(str(path))
    assert choice.question == "2+2?\nChoices:\n(A) 3\n(B) 4"
    assert (several.id, chart.id, chart.question, chart.answer) == ("6", "3", "how much?", '["14"]')
    assert choice.id == "5" and json.loads(choice.answer) == {"answer": "4", "choices": ["3", "4"]}
    assert json.loads(several.answer) == ["1990", "in 1990"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

@pytest.mark.parametrize("content, pixel", [
    (png(colour=200, mode="L"), (200, 200, 200)), (png(colour=1, mode="1"), (255, 255, 255)),
    (png(colour=(1, 2, 3, 255), mode="RGBA"), (1, 2, 3)), (png(colour=(9, 255), mode="LA"), (9, 9, 9)),
    (png(colour=(0, 0, 0, 0), mode="CMYK", format="JPEG"), (255, 255, 255)),
], ids=["grey", "bits", "opaque alpha", "grey and opaque alpha", "CMYK"])
def test_pictures_that_become_rgb(content, pixel):
    image = open_image(content)
    assert image.mode == "RGB" and image.getpixel((5, 5)) == pixel


def test_palette():
    data = io.BytesIO()
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(data, "PNG")
    assert open_image(data.getvalue()).getpixel((0, 0)) == (10, 20, 30)
    data = io.BytesIO()
    image.save(data, "PNG", transparency=1)
    with pytest.raises(ValueError, match="partly transparent"):
        open_image(data.getvalue())


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(format="JPEG", exif=exif)


def animation(format: str, frames: int = 2) -> bytes:
    data = io.BytesIO()
    first, *others = (Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(0, 200, 200 // frames))
    first.save(data, format, save_all=True, append_images=others[:frames - 1])
    return data.getvalue()


def test_one_picture_of_a_kind_that_may_hold_several():
    for format in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        assert open_image(animation(format, 1)).getpixel((0, 0))[0] < 30
    assert open_image(animation("MPO")).getpixel((0, 0))[0] < 30       # a camera's second view of the same


@pytest.mark.parametrize("content, reason", [
    *[(animation(format), "holds several pictures") for format in ("GIF", "TIFF", "WEBP", "PNG")],
    (png(64, 64, format="JPEG")[:300], "cannot be read"), (b"nothing", "cannot be read"), (b"", "cannot be read"),
    (png(mode="I;16", colour=300), "more than 8 bits"), (png(mode="RGBA", colour=(1, 2, 3, 254)), "partly transparent"),
    (rotated(), "EXIF says"), (png(10_001, 10_000, 0, "1"), "more than 100,000,000"),
    (png(20_000, 20_000, 0, "1"), "more than 100,000,000"),
], ids=["GIF", "TIFF", "WEBP", "APNG", "truncated", "no image", "nothing", "16 bits", "transparent", "rotated", "large", "bomb"])
def test_pictures_that_are_errors(content, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        open_image(content)
    rows = [train_row(0), train_row(1, image={"bytes": content, "path": None}), train_row(2)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRow, match=rf"^{re.escape(path)}, row 2( \(id r1\))?: .*{reason}"):
        load(path, "grounding")[1]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 28\n%%EndComments\nshowpage\n%%EOF\n"
PREVIEWED = b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS


@pytest.mark.parametrize("content", [EPS, PREVIEWED], ids=["plain", "previewed"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
def test_a_picture_starts_no_program(tmp_path, monkeypatch, content, name):
    """Pillow would give PostScript to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)      # where Pillow has found it before, or not
    lines = lines_of(tmp_path, {"image": name})
    (tmp_path / name).write_bytes(content)
    parquet = parquet_of(tmp_path, train_row(0, image={"bytes": content, "path": name}))
    formats = "in none of the formats that are read: PNG, JPEG, WEBP, GIF, BMP, TIFF, MPO"
    for read_it in (lambda: load(lines)[0], lambda: load(parquet, "grounding")[0],
                    lambda: open_image(tmp_path / name, rotate=True), lambda: open_image(content)):
        with pytest.raises(ValueError, match=formats) as error:
            read_it()
        assert len(str(error.value)) < 500 + len(str(tmp_path))
    assert not (tmp_path / "started").exists()


def test_what_is_noticed_once(tmp_path):
    """Ids that come twice, and pictures outside the folder of the data: by an absolute path or by "..", not by a link
    (the hub's cache consists of links)."""
    (tmp_path / "data").mkdir()
    for name in ("a.png", "data/b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "data/link.png").symlink_to(tmp_path / "a.png")
    rows = [{"id": name, "image": image, "question": "1+1?", "answer": "2", "task": "math"} for name, image in (
        ("1", "b.png"), ("2", "../a.png"), ("1", str(tmp_path / "a.png")), ("3", "link.png"), ("1", "../data/b.png"),
        ("4", str(tmp_path / "data/b.png")))]
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load(str(tmp_path / "data/a.jsonl"))
    assert len(source) == 6 and [line.split("; the first: ")[0] for line in noticed(source)] == [
        "2 of 6 rows have pictures outside the folder of the data", "2 of 6 rows have the id of an earlier row"]
    assert "row 2: " in noticed(source)[0] and "row 3: 1" in noticed(source)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows

@pytest.mark.parametrize("change, reason", [
    ({"problem": " "}, "no question"), ({"solution": "[{}]"}, "bad label: item 1: bbox_2d is missing"),
    ({"solution": "no"}, "bad label: the solution is not JSON"),
    ({"solution": json.dumps([{"bbox_2d": [30, 20, 10, 40], "point_2d": [20, 30]}])}, "bad label: .*inverted"),
    ({"task": "nonsense"}, "task 'nonsense' is not one of"),
], ids=["no question", "no box", "not JSON", "inverted box", "task"])
def test_bad_row_is_named_or_left_out(tmp_path, change, reason):
    rows = [train_row(i, task="grounding") for i in range(3)]
    rows[1] |= change
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRow, match=f"^{re.escape(path)}, row 2: {reason}"):
        load(path)
    source = load(path, skip_bad_rows=True)
    assert [e.id for e in source] == ["r0", "r2"] and len(source.bad) == 1 and "row 2" in source.bad[0]


def test_no_task(tmp_path):
    with pytest.raises(BadRow, match="no column task: give it, or --task"):
        load(write_parquet(tmp_path / "a.parquet", [train_row(0)]))


@pytest.mark.parametrize("row, reason", [
    (benchmark_row(0, mask=[[True] * 5] * 5), r"the mask is \(5, 5\) and the picture \(56, 28\)"),
    (benchmark_row(0, mask=[[True] * 56] * 27 + [[True] * 55]), "differ in length"),
    *((benchmark_row(0, mask=[[cell] * 56] * 28), "must have rows, of true and false or of numbers") for cell in ("0", "x", [1], {"a": 1})),
    (benchmark_row(0, mask=[]), "must have rows"), (benchmark_row(0, mask=[[None] * 55 + [True]] * 28), "must have rows"),
    (benchmark_row(0, mask=None), "no answer")])
def test_bad_masks(tmp_path, row, reason):
    schema = pa.Table.from_pylist([benchmark_row(0)]).schema if row["mask"] is None else None
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row], schema), path)
    with pytest.raises(BadRow, match=reason):
        load(str(path), "grounding")[0]


def test_bad_pictures_while_training(tmp_path, capsys):
    """What only decoding shows. The row after a bad one stands in for it; without --skip-bad-rows the run stops."""
    rows = [train_row(i, **({"image": {"bytes": CUT, "path": None}} if i in (1, 2) else {})) for i in range(5)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRow, match="row [23] "):
        take(load(path, "grounding"), range(5), 0)
    source = load(path, "grounding", True)
    assert not source.bad
    taken = [e.id for e in take(source, range(5), 0)]
    assert capsys.readouterr().out.count("left out: ") == 2     # at once
    assert taken == [f"r{3 if i in (1, 2) else i}" for i in order(5, 0, 0)]
    assert len(source.bad) == 3 and all("row 2" in b or "row 3" in b for b in source.bad)
    take(source, range(5, 10), 0)                               # the second epoch
    assert not capsys.readouterr().out and len(source.bad) > 3
    hopeless = load(write_parquet(tmp_path / "b.parquet", rows[1:3]), "grounding", True)
    with pytest.raises(ValueError, match="all 2 rows are bad"):
        take(hopeless, range(1), 0)
    assert [number for number, _ in read(load(path, "grounding", True), range(5))] == [0, 3, 4]


@pytest.mark.parametrize("name, reason", [
    ("nowhere.parquet", "no such file"), ("broken.parquet", "not a Parquet file"),
    ("empty", "holds no .parquet, .jsonl"),
    ("splits", "more than one fits; it can be splits:test, splits:train$"),
    ("splits:val", "there is no such split; it can be splits:test, splits:train$"), ("saved", "not Arrow files"),
    ("a b", "give scenes:SPLIT, a .jsonl or .parquet file")])
def test_what_cannot_be_opened(tmp_path, name, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    for folder in ("empty", "splits", "saved"):
        Path(folder).mkdir()
    for split in ("train", "test"):
        write_parquet(Path("splits") / f"{split}-00000-of-00001.parquet", [train_row(0)])
    Path("saved/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    Path("saved/a.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=reason):
        load(name, "grounding")
    assert len(load("splits:test", "grounding")) == 1


def test_memory_does_not_grow_with_the_files(tmp_path):
    """400 MB of pictures in 4 files: reading all of them, in order and at random, never holds more than a few tens of
    MB; the first opening, which converts them, holds some row groups of 20 MB more. (Measured by VmHWM, memory maps
    included: getrusage's maximum begins with that of the parent.)"""
    noise = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in "abcd":
        rows = [train_row(i, image={"bytes": png(56, 28) + noise.bytes(1 << 20), "path": None}) for i in range(100)]
        write_parquet(tmp_path / "data" / f"train-{ord(name) - 97:05}-of-00004.parquet", rows, compression="none",
                      row_group_size=20)
    code = f"""
import re, data
from support import sources
import datasets, pyarrow.dataset, PIL.PngImagePlugin
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
source = data.load({str(tmp_path / "data")!r}, "grounding")
for i in [*range(400), *sources.order(400, 0, 0)[:40]]:
    assert source[int(i)].id == f"r{{i % 100}}"
print(peak() - before)
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for limit in (300_000, 120_000):
        grown = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                                   check=True).stdout)
        assert grown < limit, f"{grown / 1000:.0f} MB"


CHANGES = {"cut": lambda file: os.truncate(file, 0), "removed": lambda file: file.unlink(),
           "replaced": lambda file: (file.with_suffix(".new").write_bytes(b"x"), file.with_suffix(".new").replace(file))}


def test_a_memory_mapped_file_that_changes_under_a_run(tmp_path):
    """To read behind the new end of one would kill the process by SIGBUS: so in a process of its own."""
    write_parquet(tmp_path / "a.parquet", [train_row(i) for i in range(40)])
    code = """
import shutil, sys; sys.path.insert(0, "tests")
from test_sources import *
for name, change in CHANGES.items():
    write_arrow(Path(sys.argv[1], name), [train_row(i) for i in range(40)])
    for data in (sys.argv[1] + "/a.parquet", sys.argv[1] + "/" + name):
        source = load(data, "grounding", True)
        change(file := [*source.rows[0][0].files][-1])
        try:
            print(source[39])
        except sources.Mistake as error:
            print(str(error).startswith(f"{file} was changed, cut or removed since the data was opened. "), type(error).__name__)
        shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert (done.returncode, done.stdout.splitlines()) == (0, ["True Mistake"] * 6), done.stderr[-2000:]


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.9])
def test_arrow_files_that_are_cut_before(tmp_path, share):
    write_arrow(tmp_path / "saved", [train_row(i) for i in range(9)])
    file = tmp_path / "saved/data-00001-of-00002.arrow"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(ValueError, match="saved: not Arrow files of save_to_disk .*(Expected|Tried)"):
        load(str(tmp_path / "saved"), "grounding")


ARROW = "data-00000-of-00002.arrow"


@pytest.mark.parametrize("text, reason", [
    *((text, "") for text in ("[", "", "[]", "5", "[" * 100_000, '{"a":' * 100_000)),
    *(({"_data_files": files, "splits": files}, "must list what lies beside it, not ") for files in
      (None, 5, [], [5], ["nowhere"], [".."], ["."], [""], ["/etc"], [f"../saved/{ARROW}"], [{"filename": f"../saved/{ARROW}"}],
       [{"name": ARROW}], ["x\0"], ["x" * 9999], [[ARROW]], {ARROW: 1}))])
@pytest.mark.parametrize("name", ["saved/state.json", "dict/dataset_dict.json"])
def test_damaged_records_of_save_to_disk(tmp_path, name, text, reason):
    write_arrow(tmp_path / "saved", [train_row(i) for i in range(2)])
    (tmp_path / "dict").mkdir()
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=f"{name}.*{reason}") as error:
        load(str((tmp_path / name).parent), "grounding")
    assert type(error.value) is sources.Mistake and "--data" not in str(error.value)        # from read_record or beside it
    assert len(str(error.value)) < len(str(tmp_path)) + 300 and "\n" not in str(error.value)


def test_a_line_that_is_too_long_or_nested_too_deep_is_a_bad_row(tmp_path):
    """A line of 300 MB is never held; nesting that json.loads just allows is too deep for what follows."""
    path = Path(lines_of(tmp_path, {}))
    good, deep = path.read_text().strip(), "[" * 100_000 + "]" * 100_000
    nested = [good[:-1] + ', "solution": ' + "[" * depth + "]" * depth + "}" for depth in (100_000, *range(700, 1000, 10))]
    with open(path, "w") as file:
        file.write("\n".join([good, deep, *nested]) + "\n")
        file.truncate(file.tell() + 300_000_000)
        file.seek(0, 2)
        file.write("\n" + good)
    tracemalloc.start()
    source = load(str(path), skip_bad_rows=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and len(source) == 2 and len(source.bad) == len(nested) + 2 and source.rows[1][1] == len(nested) + 4
    assert "row 2: not JSON" in source.bad[0] and "the line has more than 16,000,000 bytes" in source.bad[-1]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_no_file_is_not_waited_for(tmp_path, ending):
    (tmp_path / f"folder.{ending}").mkdir()
    os.mkfifo(tmp_path / f"pipe.{ending}")
    for name, reason in (("folder", "it is no regular file"), ("pipe", "it is no regular file"), ("nowhere", "there is no such file")):
        with pytest.raises(ValueError, match=f"--data .*{name}.{ending}: {reason}$"):
            load(f"{tmp_path}/{name}.{ending}")
    with pytest.raises(ValueError, match="holds no .parquet"):
        load(str(tmp_path))


@pytest.mark.parametrize("readme, reason", [
    (None, ""), (b"\xff\0" * 10**6, ""), (b"---\ndata_files: [" + b"[" * 9999 + b"\n---\n", "cannot be read as a data set"),
    (b"---\ndata_files: x\n---\n" + b" " * 10**6, "README.md declares data_files and has more than 1,000,000 bytes")])
def test_any_readme_beside_the_data(tmp_path, readme, reason):
    write_parquet(tmp_path / "train.parquet", [train_row(0)])
    os.mkfifo(tmp_path / "README.md") if readme is None else (tmp_path / "README.md").write_bytes(readme)
    if reason:
        with pytest.raises(ValueError, match=reason):
            load(str(tmp_path), "grounding")
    else:
        assert len(load(str(tmp_path), "grounding")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Order

def test_order():
    orders = {(seed, epoch): order(40, seed, epoch).tolist() for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(o) == list(range(40)) for o in orders.values())
    assert len(set(map(tuple, orders.values()))) == 9  # (1, 2) and (2, 1) differ as well
    order.cache_clear()
    assert all(order(40, *key).tolist() == o for key, o in orders.items())


@pytest.mark.parametrize("count", [1, 3, 7, 10, 16])
def test_take_visits_everything_once_an_epoch(count):
    source, seen = list("abcdefghij"), []
    while len(seen) < 50:
        seen += take(source, range(len(seen), len(seen) + count), seed=5)
    epochs = [seen[at:at + 10] for at in range(0, 50, 10)]
    assert all(sorted(epoch) == source for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert seen == take(source, range(len(seen)), seed=5) != take(source, range(len(seen)), seed=6)


# ---------------------------------------------------------------------------------------------------------------------
# Files

GOOD = {"id": 1, "image": "pictures/a.png", "problem": "red ring", "solution": [BOX], "task": "grounding"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "corrupt.png").write_bytes(b"not a picture")
    return tmp_path


def write(folder: Path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "a.jsonl")


def test_jsonl(folder, monkeypatch):
    text = GOOD | {"id": "b", "image": None, "problem": "1+1, é?", "solution": "2", "task": "math", "thought": "Easy."}
    as_text = GOOD | {"solution": json.dumps([BOX]), "task": "scene_grounding"}
    nothing = GOOD | {"id": 4, "solution": []}
    path = write(folder, GOOD, "", text, as_text, nothing)
    monkeypatch.chdir("/")  # image paths are relative to the file
    source = load(path)
    assert len(source) == 4
    assert [replace(e, images=[image.size for image in e.images]) for e in source] == [
        Example("1", [(40, 30)], "red ring", json.dumps([BOX]), "grounding"),
        Example("b", [], "1+1, é?", "2", "math", "Easy."),
        Example("1", [(40, 30)], "red ring", json.dumps([BOX]), "scene_grounding"),
        Example("4", [(40, 30)], "red ring", "[]", "grounding")]


def without(column: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != column}


@pytest.mark.parametrize("row, reason", [
    ("{not json", "not JSON"), ("[1, 2]", "not a JSON object"),
    (without("image"), "the column image is missing"), (without("problem"), "no question"),
    (without("task"), "no column task"),
    (GOOD | {"image": "pictures/b.png"}, "image cannot be read: .*b.png"),
    (GOOD | {"image": "pictures/corrupt.png"}, "image cannot be read: .*corrupt.png"),
    (GOOD | {"solution": "red"}, "bad label: the solution is not JSON"),
    (GOOD | {"solution": {"x": 1}}, "bad label: the solution is a dict, no list"),
    (GOOD | {"solution": [{"point_2d": [1, 2]}]}, "bad label: item 1: bbox_2d is missing"),
    (GOOD | {"solution": [BOX | {"bbox_2d": [1, 2, 3]}]}, "bad label: item 1: bbox_2d must be 4 numbers"),
    (GOOD | {"solution": [BOX | {"point_2d": "1, 2"}]}, "bad label: item 1: point_2d must be 2 numbers"),
    (GOOD | {"solution": " ", "task": "vqa"}, "bad label: .* is empty"),
    (GOOD | {"task": "chess"}, "task 'chess' is not one of"), (GOOD | {"problem": " \n"}, "no question"),
    (GOOD | {"problem": None}, "no question")])
def test_bad_row(folder, row, reason):
    path = write(folder, GOOD, "", row, GOOD)  # the blank line counts: it is the number an editor shows
    with pytest.raises(ValueError, match=f"^{re.escape(path)}, row 3: .*{reason}"):
        load(path)


@pytest.mark.parametrize("change", [{"image": 5}, {"task": ["vqa"]}, {"id": 1.5}],
                         ids=["image is a number", "task is a list", "id is a fraction"])
def test_row_of_wrong_types(folder, change):
    path = write(folder, GOOD, GOOD | change)
    with pytest.raises(ValueError, match=f"^{re.escape(path)}, row 2: "):
        load(path)


@pytest.mark.parametrize("name, error, reason", [
    ("scenes:nowhere", ValueError,
     "nowhere does not exist; the splits are words, pretrain, crowds, untidy, tidying, absent1"),
    ("scenes", ValueError, "give scenes:SPLIT"), ("data.csv", ValueError, "data.csv: give scenes:SPLIT"),
    ("nowhere.jsonl", ValueError, "nowhere.jsonl: there is no such file")])
def test_unknown_data(name, error, reason):
    with pytest.raises(error, match=reason):
        load(name)


def test_empty_file(folder):
    with pytest.raises(ValueError, match="a.jsonl holds no usable rows"):
        load(write(folder, "", " "))


# ---------------------------------------------------------------------------------------------------------------------
# Other people's data

def lines_of(folder: Path, *rows: dict) -> str:
    """Rows of JSON lines beside a picture of 56×28 pixels, a.png."""
    (folder / "a.png").write_bytes(png())
    return write(folder, *({"image": "a.png", "problem": "the cup", "task": "grounding", "solution": "[]"} | row
                           for row in rows))


def parquet_of(folder: Path, *rows: dict, name: str = "a.parquet") -> str:
    return write_parquet(folder / name, list(rows))


def test_the_pictures_own_header_counts(tmp_path):
    """The authors' script stores the photo's size before it and its boxes were brought to 840×840."""
    box = {"bbox_2d": [700, 700, 800, 820], "point_2d": [750, 760]}
    row = train_row(1, image={"bytes": png(840, 840), "path": None}, img_height=480, img_width=640, solution=json.dumps([box]))
    assert json.loads(load(parquet_of(tmp_path, row), "grounding")[0].answer) == [box]
    small = train_row(1, img_height=4000, img_width=4000, solution=json.dumps([box]))     # and a size that is too large
    with pytest.raises(BadRow, match=r"row 1: the box \[700, 700, 800, 820\] leaves the picture of 56×28"):
        load(parquet_of(tmp_path, small, name="b.parquet"), "grounding")


SPLITS = {
    "folders": ({"train/0000.parquet": 1, "test/0000.parquet": 2}, ":test", 2, "folders:test, folders:train"),
    "configs": ({"DocVQA/validation-00000-of-00001.parquet": 1, "InfoVQA/validation-00000-of-00001.parquet": 2},
                ":InfoVQA:validation", 2, "configs:DocVQA:validation, configs:InfoVQA:validation"),
    "both": ({"A/train/0000.parquet": 1, "A/test/0000.parquet": 2, "B/train/0000.parquet": 3}, ":A:train", 1,
             "both:A:test, both:A:train, both:B:train"),
    "names": ({"grefcoco.parquet": 1, "isic.parquet": 2}, ":isic", 2, "names:grefcoco, names:isic"),
    "lines": ({"train.jsonl": 1, "val.jsonl": 2}, ":validation", 2, "lines:train, lines:validation")}


@pytest.mark.parametrize("name", SPLITS)
def test_configurations_and_splits_are_kept_apart(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    files, chosen, count, listed = SPLITS[name]
    for path, rows in files.items():
        path = tmp_path / name / path
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [train_row(i) for i in range(rows)]
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row | {"image": None, "task": "vqa", "solution": "x"}) + "\n" for row in made))
        else:
            write_parquet(path, made)
    assert len(load(name + chosen, "grounding")) == count
    for wrong in ("", ":nothing", chosen + "x"):
        with pytest.raises(ValueError, match=f"it can be {listed}$"):
            load(name + wrong, "grounding")
    if name == "configs":
        with pytest.raises(ValueError, match="more than one fits"):
            load("configs:validation", "grounding")         # both have it
        assert len(load("configs:DocVQA", "grounding")) == 1


@pytest.mark.parametrize("name", ["link", "link/x", "x/../link", "folder"])
def test_a_folder_behind_a_link(tmp_path, monkeypatch, name):
    """By a path that begins at the current folder, too."""
    (tmp_path / "folder/x").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write_parquet(tmp_path / "folder/x/train.parquet", [train_row(0)])
    monkeypatch.chdir(tmp_path)
    assert len(load(name, "grounding")) == len(load(str(tmp_path / name), "grounding")) == 1


def test_what_the_readme_of_a_data_set_declares(tmp_path):
    """Configurations with patterns of their own; several files of one split are one."""
    for name, rows in (("x/a.parquet", 1), ("x/b.parquet", 2), ("y/c.parquet", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, [train_row(i) for i in range(rows)])
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/*.parquet\n" for c in "xy") + "---\n")
    assert (len(load(f"{tmp_path}:x:train", "grounding")), len(load(f"{tmp_path}:y", "grounding"))) == (3, 4)
    (tmp_path / "README.md").unlink()
    write_parquet(tmp_path / "x" / "0001.parquet", [train_row(0)])
    with pytest.raises(ValueError, match="it can be .*:x:0001|it can be .*:x:a"):
        load(f"{tmp_path}:x:train", "grounding")


def test_no_code_of_a_data_set_is_run(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: train.parquet\n---\n")
    write_parquet(folder / "train.parquet", [train_row(0)])
    try:
        load(str(folder), "grounding")
    except ValueError as error:
        assert "scripts are no longer supported" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_real_folder_of_save_to_disk(tmp_path):
    """Written by datasets, with pictures as its Image feature, one split and several, shuffled and filtered."""
    import datasets
    rows = [train_row(i) for i in range(6)]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).select([5, 3, 1, 0, 2, 4])
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert [e.id for e in load(str(tmp_path / "one"), "grounding")] == [f"r{i}" for i in (5, 3, 1, 0, 2, 4)]
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    assert [e.id for e in load(f"{tmp_path}/two:test", "grounding")] == ["r3"]
    with pytest.raises(ValueError, match="two:test, .*two:train$"):
        load(str(tmp_path / "two"), "grounding")


IMAGE = {"bytes": png(), "path": None}
LAYOUTS = {     # row, --task, --columns → question and answer
    "EasyR1": ({"images": [IMAGE], "problem": "<image>the cup", "answer": "[]"}, "grounding", "", ("the cup", "[]")),
    "verl": ({"data_source": "x", "images": [IMAGE], "prompt": [{"role": "user", "content": "<image>\nHow many?"}],
              "reward_model": {"style": "rule", "ground_truth": "3"}}, "math",
             "answer=reward_model.ground_truth", ("How many?", "3")),
    "TRL": ({"image": IMAGE, "prompt": [{"role": "user", "content": [{"type": "image", "text": None},
                                                                     {"type": "text", "text": "How many?"}]}],
             "solution": "<think>1, 2, 3</think> <answer>3</answer>"}, "math", "", ("How many?", "3")),
    "open-r1": ({"image": IMAGE, "problem": "How many?", "solution": "<answer>$3$</answer>", "original_answer": "3"}, "math",
                "", ("How many?", "3")),
    "names of one's own": ({"picture": IMAGE, "ask": "How many?", "truth": 3, "question": "no", "answer": "no"}, "math",
                           "question=ask,answer=truth,image=picture", ("How many?", "3")),
    "a worked solution": ({"image": IMAGE, "problem": "How many?", "solution": r"1+2, so \boxed{3}"}, "math", "",
                          ("How many?", "3")),
    "MMMU": ({"image_1": IMAGE, "image_2": None, "question": "<image 1> Which?", "options": "['red', 'blue']", "answer": "B"}, "math", "",
             ("<image 1> Which?\nChoices:\n(A) red\n(B) blue", '{"answer": "blue", "choices": ["red", "blue"]}')),
    "MMMU, open": ({"image_1": IMAGE, "question": "How many?", "options": "[]", "answer": "3"}, "math", "", ("How many?", "3")),
    "MMBench": ({"image": IMAGE, "question": "Which?", "A": "red", "B": "blue", "C": None, "D": None, "answer": "B"}, "math", "",
                ("Which?\nChoices:\n(A) red\n(B) blue", '{"answer": "blue", "choices": ["red", "blue"]}')),
    "SEED-Bench": ({"image": [IMAGE], "question": "Which?", "choice_a": "red", "choice_b": "blue", "answer": "A"}, "math", "",
                   ("Which?\nChoices:\n(A) red\n(B) blue", '{"answer": "red", "choices": ["red", "blue"]}')),
    "a small number": ({"image": IMAGE, "question": "How far?", "answer": 0.00001}, "math", "", ("How far?", "0.00001")),
    "VQAv2": ({"image": IMAGE, "question": "Is it?", "answers": [{"answer": "no"}, {"answer": "yes"}, {"answer": "yes"}]},
              "vqa", "", ("Is it?", '["yes", "no"]'))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_use(tmp_path, name):
    row, task, columns, expected = LAYOUTS[name]
    example = load(parquet_of(tmp_path, row, row), task, columns=columns)[1]
    assert (example.question, example.answer) == expected and example.images[0].size == (56, 28)


def chat(*turns, keys: str = "role content") -> list[dict]:
    return [dict(zip(keys.split(), turn)) for turn in turns]


IMAGE_PART = {"type": "image", "text": None}
ASKED, SAID = ("user", "<image>\nHow many?"), ("assistant", "3")
CHATS = {       # columns beside the picture → the system turn, the question and the answer
    "LLaVA": {"conversations": chat(("human", "<image>\nHow many?"), ("gpt", "3"), keys="from value")},
    "LLaMA-Factory": {"messages": chat(ASKED, SAID)},
    "with a system turn": {"messages": chat(("system", "Be short."), ASKED, SAID)},
    "ShareGPT with a system turn": {"conversations": chat(("system", "Be short."), ("human", "How many?"), ("gpt", "3"), keys="from value")},
    "a column system": {"system": "Be short.", "messages": chat(ASKED, SAID)},
    "an empty column system": {"system": "", "messages": chat(ASKED, SAID)},
    "roles in other cases": {"messages": chat(("User", "How many?"), ("ASSISTANT", "3"))},
    "parts": {"messages": chat(("user", [IMAGE_PART, {"type": "text", "text": "How many?"}]), ("assistant", [{"type": "text", "text": "3"}]))},
    "parts, the picture last": {"messages": chat(("user", [{"type": "text", "text": "How many?"}, IMAGE_PART]), ("assistant", [{"type": "text", "text": "3"}]))},
    "TRL prompt and completion": {"prompt": chat(ASKED), "completion": chat(SAID)},
    "TRL with a system turn": {"prompt": chat(("system", "Be short."), ASKED), "completion": chat(SAID)},
    "completion as text": {"prompt": chat(ASKED), "completion": "3"},
    "both as text": {"prompt": "<image>How many?", "completion": "3"},
    "one turn, no list": {"prompt": dict(role="user", content="How many?"), "completion": dict(role="assistant", content="3")},
    "an answer beside": {"messages": chat(ASKED), "solution": "<answer>3</answer>"},
    "thought and answer": {"messages": chat(ASKED, ("assistant", "<think>1, 2, 3</think> <answer>3</answer>"))},
    "JSON text": {"messages": json.dumps(chat(("system", ""), ("user", "How many?"), SAID))},
    "Python's text": {"conversations": str(chat(("human", "<image>How many?"), ("gpt", "3"), keys="from value"))},
    "ms-swift query": {"query": "<image>How many?", "response": "3"},
    "ms-swift pair": {"conversation": [{"system": None, "human": "How many?", "assistant": "3"}]}}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CHATS)
def test_chats(tmp_path, name, ending):
    row = {"images": ["a.png"] if ending == "jsonl" else [IMAGE]} | CHATS[name]
    if ending == "jsonl":
        (tmp_path / "a.png").write_bytes(png())
        path = write(tmp_path, row)
    else:
        path = parquet_of(tmp_path, row, row)
    example = load(path, "vqa")[0]
    assert (example.question, example.answer, example.images[0].size) == ("How many?", "3", (56, 28))
    assert example.system == ("Be short." if "system" in name and "empty" not in name else "")


@pytest.mark.parametrize("row, reason", [
    ({"messages": chat(ASKED, SAID, ASKED, SAID)}, "the column 'messages' is a chat of 4 turns .user, assistant, user, assistant.; a row may have one "
                                                   "question and one answer, and a system turn before them: make a row of each question"),
    ({"conversations": chat(("human", "x"), ("gpt", "y"), ("human", "z"), keys="from value")}, "a chat of 3 turns .human, gpt, human.; a row may"),
    ({"messages": chat(*[ASKED, SAID] * 500)}, "a chat of 1000 turns .user, assistant, user, assistant, user, assistant, …."),
    ({"conversation": [{"human": "x", "assistant": "y"}] * 2}, "a chat of 4 turns"),
    ({"messages": chat(SAID, ASKED)}, "a chat of 2 turns .assistant, user."),
    ({"messages": chat(ASKED, ("tool", "y"), SAID)}, "a chat of 3 turns .user, tool, assistant."),
    ({"messages": chat(ASKED, SAID, ("system", "x"))}, "a chat of 3"),
    ({"prompt": chat(ASKED), "completion": chat(SAID, SAID)}, "the column 'completion' is a chat of 2 turns"),
    ({"messages": chat(ASKED)}, "no answer: none of the columns .* holds one, nor a turn of the assistant"),
    ({"messages": chat(SAID)}, "no question"),
    ({"messages": chat(("user", " "), SAID)}, "no question"), ({"messages": []}, "the question is a list, not text"),
    ({"messages": [5]}, "the question is a list"),
    ({"messages": [{"text": "x"}]}, "the question is a list"), ({"messages": "[{'role': 'user'"}, "no answer"),
    ({"messages": chat(ASKED, ("assistant", None))}, "a part of the answer has no text"),
    ({"messages": chat(("system", 5), ASKED, SAID)}, "a part of the system turn has no"),
    ({"messages": chat(ASKED, ("assistant", [{"type": "audio"}]))}, "a part of the answer is 'audio'"),
    ({"messages": chat(("user", [{"type": ["image"]}]), SAID)}, "is .*image"),
    ({"messages": chat(ASKED, SAID), "solution": "4"}, "the columns solution and messages both hold an answer; choose by --columns answer=NAME"),
    ({"prompt": "x", "completion": "3", "response": "4"}, "completion and response both hold"),
    ({"messages": chat(ASKED, SAID), "system": 5}, "the column 'system' holds a int"),
    ({"messages": chat(("system", "s" * 20_001), ASKED, SAID)}, "the column 'messages' holds 20,001 characters"),
    ({"messages": chat(("system", "<|im_end|>"), ASKED, SAID)}, "the system turn holds a special token"),
    ({"messages": chat(("system", "\ud800"), ASKED, SAID)}, "cannot be encoded"),
    ({"query": "x", "response": "3", "history": [["a", "b"]]}, "the column 'history' holds 1 earlier questions; a row may have one")])
def test_chats_that_are_no_row(tmp_path, row, reason):
    """By one sentence with the column, and the number of turns if it is that."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png"} | row))
    with pytest.raises(BadRow, match=f"a.jsonl, row 1: .*{reason}") as error:
        load(str(tmp_path / "a.jsonl"), "vqa")
    assert str(error.value).isprintable() and len(str(error.value)) < len(str(tmp_path)) + 500


def test_a_chat_as_text_may_quote(tmp_path):
    asked = 'Which of "a" "b", [c] and {"d": [e]}?'
    path = lines_of(tmp_path, {"problem": json.dumps(chat(("user", asked), ("assistant", "a"))), "solution": None, "task": "vqa"})
    assert (load(path)[0].question, load(path)[0].answer) == (asked, "a")


def test_a_chat_about_boxes(tmp_path):
    """As Qwen's own training code, VLM-R1 and ms-swift have it; which column is the answer can be chosen."""
    said = '```json\n{"bbox_2d": [10, 5, 30, 25], "label": "cup"}\n```'
    rows = [{"conversations": chat(("human", "<image>the cup"), ("gpt", said), keys="from value"), "solution": None},
            {"messages": chat(("user", "<image>the <ref-object>"), ("assistant", "<bbox>")), "objects": {"ref": ["cup"], "bbox": [[10, 5, 30, 25]]}},
            {"messages": chat(("user", "the cup"), ("assistant", [{"type": "text", "text": said}]))}]
    source = load(lines_of(tmp_path, *({"problem": None, "solution": None} | row for row in rows)))
    assert [(e.question, json.loads(e.answer)) for e in source] == [("the cup", [BOX | {"point_2d": [20.0, 15.0]}])] * 3
    both = lines_of(tmp_path, {"problem": "the cup", "completion": "[]", "solution": [BOX], "messages": chat(("user", "x"), ("assistant", said))})
    assert [load(both, columns=f"answer={name}")[0].answer for name in ("completion", "messages")] == [
        "[]", source[0].answer]
    for objects, reason in (({"ref": [], "bbox": []}, "the question names <ref-object>, which nothing in the column 'objects' fills"),
                            ({"ref": ["cup"], "bbox": [[1, 2, 3, 4]] * 2}, "bad label: the solution is not JSON .column 'messages'.")):
        with pytest.raises(BadRow, match=reason):
            load(lines_of(tmp_path, rows[1] | {"problem": None, "solution": None, "objects": objects}))


def test_a_system_turn_counts_for_the_fingerprint(tmp_path):
    def of(system: str) -> str:
        path = lines_of(tmp_path, {"problem": chat(("system", system), ("user", "the cup"))})
        for name in ("a.jsonl", "a.png"):
            os.utime(tmp_path / name, (0, 0))
        return load(path).fingerprint
    assert of("a") == of("a") != of("b")


SCIENCE = {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "task": "closed choice", "solution": "It is the sky.", "hint": ""}


def test_a_column_task_of_other_people(tmp_path):
    """--task counts where the column names none of ours, which is said once, with what it names; a task of ours wins."""
    others = [SCIENCE | {"task": name} for name in ("closed choice", "yes or no", "", "math", "closed choice", 3)]
    path = lines_of(tmp_path, *({"problem": None, "solution": None} | row for row in others))
    with pytest.raises(BadRow, match="row 1: the columns solution and answer both hold an answer; choose by --columns answer=NAME"):
        load(path, "scene_math")
    source = load(path, "scene_math", columns="answer=answer")
    assert [e.task for e in source] == [*["scene_math"] * 3, "math", "scene_math", "scene_math"]
    assert [json.loads(e.answer)["answer"] for e in source] == ["blue"] * 6
    assert [line for line in noticed(source) if "task" in line] == [
        f"4 of 6 rows name tasks that are none of ours ('closed choice', 'yes or no', '3'), so --task scene_math counts; the first: {path}, row 1"]
    with pytest.raises(BadRow, match="row 1: task 'closed choice' is not one of ours: give --task with one of grounding, "):
        load(path, columns="answer=answer")
    many = load(lines_of(tmp_path, *({"task": f"{i}{ESC}" + "x" * 99} for i in range(50)), {"task": ["vqa"]}), "grounding")
    [line] = noticed(many)
    assert line.startswith("51 of 51 rows name tasks") and line.isprintable() and len(line) < 500 and ", …)" in line


def test_the_column_of_the_task_can_be_named(tmp_path):
    path = lines_of(tmp_path, {"kind": "vqa", "solution": "5"}, {"kind": None, "solution": "5"}, {"meta": {"kind": "docvqa"}, "solution": "5"})
    assert [e.task for e in load(path, "chartqa", columns="task=kind")] == ["vqa", "chartqa", "chartqa"]
    assert load(path, "chartqa", columns="task=meta.kind")[2].task == "docvqa"
    with pytest.raises(BadRow, match="row 2: no column kind: give it, or --task with one of grounding"):
        load(path, columns="task=kind")
    with pytest.raises(ValueError, match="--columns task=kind: .*b.parquet has no such column"):
        load(parquet_of(tmp_path, train_row(0), name="b.parquet"), "vqa", columns="task=kind")


def test_a_class_is_its_name(tmp_path):
    """Not its number; −1, which datasets writes where there is none, is no answer."""
    import datasets
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = [{"image": IMAGE, "question": "what?", "label": label} for label in (1, 0, -1)]
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "a.parquet")
    source = load(str(tmp_path / "a.parquet"), "vqa", True)
    assert [e.answer for e in source] == ["dog", "cat"] and "row 3: no answer" in source.bad[0]


def test_the_one_column_of_image_type(tmp_path):
    import datasets
    row = {"photo": IMAGE, "problem": "the cup", "solution": "[]"}
    made = datasets.Dataset.from_list([row]).cast_column("photo", datasets.Image())
    made.to_parquet(tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.parquet"), "grounding")[0].images[0].size == (56, 28)
    made.add_column("other", [IMAGE]).cast_column("other", datasets.Image()).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has several columns of pictures \(photo, other\)"):
        load(str(tmp_path / "b.parquet"), "grounding")
    assert load(str(tmp_path / "b.parquet"), "grounding", columns="image=other")[0].images


@pytest.mark.parametrize("row, task, columns, reason", [
    ({"problem": "x", "solution": "[]"}, "grounding", "", "has no column of pictures"),
    ({"problem": "x", "answer": "5", "image": None}, "math", "", "holds no picture in any row"),
    ({"problem": "x", "answer": "5", "images": []}, "vqa", "", "holds no picture in any row"),
    ({"problem": "x", "solution": "[]", "image": None}, "grounding", "", "row 1: no picture: boxes need one"),
    ({"problem": "x", "solution": "[]", "images": [IMAGE, IMAGE]}, "grounding", "",
     "row 1: 2 pictures in one row; boxes, which the task grounding has, need a single one"),
    ({"problem": "x", "solution": "[]", "image": IMAGE, "images": [IMAGE]}, "grounding", "", "both hold a picture"),
    ({"problem": "x", "answer": "5", "images": [IMAGE, {"bytes": b"cut", "path": None}]}, "vqa", "", "row 1: picture 2 of 2: .* cannot"),
    ({"problem": "x", "solution": "5", "answer": "6", "image": IMAGE}, "math", "", "solution and answer both hold"),
    ({"problem": "x", "answer": "6", "image": IMAGE}, "math", "answer=truth", "--columns answer=truth: .*a.parquet has no such"),
    ({"problem": "x", "answer": "6", "image": IMAGE}, "math", "answr=truth", "--columns answr=truth: 'answr' cannot be"),
    ({"problem": "x", "answer": "6", "image": IMAGE}, "math", "answer", "'answer' cannot be"),
    ({"prompt": [{"role": "user", "content": "s"}, {"role": "user", "content": "x"}], "answer": "6", "image": IMAGE},
     "math", "", "the column 'prompt' is a chat of 2 turns .user, user.; a row may have one question"),
    *(({"prompt": [{"role": "user", "content": [part]}], "answer": "6", "image": IMAGE}, "math", "", f"a part of the question {reason}")
      for part, reason in [("x", "is 'str without"), ({"type": "video"}, "is 'video'"), ({"type": "text", "text": None}, "has no text"),
                           ({"type": "text", "text": 5}, "has no text"), (["x"], "is 'list without"), ({"type": "y" * 9999}, "is 'y+'")]),
    ({"problem": 5, "answer": "6", "image": IMAGE}, "math", "", "the question is a int"),
    ({"problem": "x", "answer": "6", "image": IMAGE, "task": "t" * 9999}, "", "", "row 1: task 't+' is not one of"),
    ({"problem": "x", "answer": "6", "image": {"url": "u"}}, "math", "", "the picture is a record of url"),
    ({"problem": "x", "answer": "6", "image": {"bytes": None, "path": None}}, "math", "", "neither bytes nor a path")])
def test_columns_that_do_not_fit_are_named(tmp_path, row, task, columns, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load(parquet_of(tmp_path, row), task, columns=columns)
    assert len(str(error.value)) < len(str(tmp_path)) + 400


MEDIA = [
    ({"video": "a.mp4"}, "video"), ({"videos": ["a.mp4"]}, "videos"), ({"audio": {"path": None, "bytes": "UklGR"}}, "audio"),
    ({"Audios": [{"path": "a"}]}, "Audios"), ({"video_path": "clips/a"}, "video_path"), ({"audio_url": "http://x.org/a"}, "audio_url"),
    ({"video_bytes": "AAAA"}, "video_bytes"), ({"audioFilePath": "a"}, "audioFilePath"), ({"videos": [[0.5, 1.0]]}, "videos"),
    ({"clip": "clips/a b.MP4"}, "clip"), ({"media": [{"x": "a.wav"}]}, "media"), ({"extra": {"video": ["a"]}}, "extra"),
    ({"image": "a.webm"}, "image")]
NO_MEDIA = [{"video": None}, {"videos": []}, {"audio": ""}, {"video": {"bytes": None, "path": None}}, {"videos": [None, []]}, {"audio": False},
            {"video_id": "v12"}, {"source": "the mp4"}, {"problem": "what is a.mp4"}, {"id": "a.mp4"}, {"audible": "yes"}, {"videogame": "x"},
            {"extra": {"video": None, "note": "x"}}]


@pytest.mark.parametrize("row, name", [*MEDIA, *((row, "") for row in NO_MEDIA)])
def test_columns_that_hold_a_video_or_a_sound(tmp_path, row, name):
    """They are refused by name, in JSON lines beside a picture or none; empty cells are none (verl writes "videos": [])."""
    for picture in ("a.png", None):
        path = lines_of(tmp_path, {"task": "vqa", "solution": "5", "image": picture} | row)
        if name:
            with pytest.raises(BadRow, match=f"row 1: the column '{name}' holds a video or a sound"):
                load(path)
        else:
            assert len(load(path)) == 1


@pytest.mark.parametrize("row, name", [*((row, name) for row, name in MEDIA if name not in ("clip", "media", "image")),
                                       *((row, "") for row in NO_MEDIA), ({"video": b"abc"}, "video")])
def test_columns_of_parquet_that_hold_a_video_or_a_sound(tmp_path, row, name):
    path = parquet_of(tmp_path, {"problem": "x", "solution": "5", "image": IMAGE} | row)
    if name:
        with pytest.raises(BadRow, match=f"row 1: the column '{name}' holds a video or a sound"):
            load(path, "vqa")
    else:
        assert len(load(path, "vqa")) == 1


@pytest.mark.parametrize("kind", ["Video", "Audio"])
@pytest.mark.parametrize("several", [False, True])
def test_columns_of_the_type_video_or_audio(tmp_path, kind, several):
    """Under any name."""
    import datasets
    cells = [{"bytes": b"abc", "path": "x"}, None]
    feature = getattr(datasets, kind)(decode=False)
    table = datasets.Dataset.from_list(
        [{"image": IMAGE, "problem": "x", "solution": "5", "clip": [cell] if several and cell else cell} for cell in cells])
    table = table.cast(datasets.Features(table.features | {
        "image": datasets.Image(), "clip": datasets.List(feature) if several else feature}))
    table.to_parquet(tmp_path / "a.parquet")
    source = load(str(tmp_path / "a.parquet"), "vqa", True)
    assert len(source) == 1 and "row 1: the column 'clip' holds a video or a sound" in source.bad[0]


@pytest.mark.parametrize("question, without, beside_one", [     # whether it is refused without a picture, and beside one
    *((f"{mark} What is it?", True, False) for mark in ("<image 1>", "<image_1>", "<image1>", "<image-1>", "<img>", "<Image>", "<IMAGE>",
                                                       "[IMG]", "[image]", "[img1]", "<ImageHere>", "<image_placeholder>", "<image/>", "<image>")),
    *((f"What is in {mark}?", True, False) for mark in ("<image 1>", "[Image 1]", "<IMG>")),
    *((f"What is in {mark}?", True, True) for mark in ("<video>", "<Video>", "<audio>", "<video_1>", "[VIDEO]", "<AUDIO/>", "<image 2>",
                                                      "<image 1> and <image 2>", "<img>a.png</img>", "<Image> and <Image>", "<image_0> or <image_1>",
                                                      "<image> or <image 1>")),
    ("Is <image1> larger than its frame, and is <image1> red?", True, False),
    *((text, False, False) for text in ("What is the image of f?", "Describe image 1.", "the video", "x < image > y", "<image of a cat>", "a[image_of(x)]",
                                        "[images]", "<b>image</b>", "<imagine>", "is [video] a word?", "image <1>"))])
def test_placeholders_that_no_picture_fills(tmp_path, question, without, beside_one):
    """<image> is as it was: at the beginning or end of a question, once."""
    for picture, refused in ((None, without), ("a.png", beside_one)):
        path = lines_of(tmp_path, {"task": "vqa", "solution": "5", "image": picture, "problem": question})
        if refused:
            with pytest.raises(BadRow, match="row 1: (the question names|no picture: the question names one by) *[<.[]") as error:
                load(path)
            assert re.search(r"[<[]/?(im|vid|aud)", str(error.value), re.I)
        else:
            assert load(path)[0].question == question.removeprefix("<image>").lstrip()


PICTURES = {"a": png(56, 28), "b": png(28, 112, (0, 0, 9)), "cut": CUT, "thin": png(1, 400), "none": b"none"}


def row_of(folder: Path, question, names: str, kind: str, **more) -> str:
    """One row of short answer in a file of JSON lines or Parquet. names: of its pictures; of "null" and "no" there are
    none."""
    for name, data in PICTURES.items():
        (folder / f"{name}.png").write_bytes(data)
    paths = [None if name == "null" else f"{name}.png" for name in names.split()]
    row = {"images": paths, "problem": question, "solution": "5", "task": "vqa"} | more
    if kind == "lines":
        return write(folder, row)
    row["images"] = [path and {"bytes": PICTURES.get(path[:-4]), "path": path} for path in paths]
    other = [row | {"images": [IMAGE], "problem": "x"}] * (not any(paths))       # no picture in any row would be refused
    return parquet_of(folder, row, *other)


PARTS = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " as "}, {"type": "image"}]


@pytest.mark.parametrize("kind", ["lines", "parquet"])
@pytest.mark.parametrize("question, names, kept", [
    ("Which?", "a b", "Which?"), ("<image><image>\nWhich?", "b a", "<image><image>\nWhich?"), ("Is<image>as <image>", "b b", "Is<image>as <image>"),
    ("<image>, <image> or <image>?", "b a b", "<image>, <image> or <image>?"), ("Is <image 2> <image 1>?", "a b", "Is <image 2> <image 1>?"),
    ("[IMG] or [IMG]", "a b", "[IMG] or [IMG]"), ([{"role": "user", "content": PARTS}], "b a", "Is <image> as <image>"),
    (" <image> x", "b", "x"), ("x\n<image>", "b", "x"), ("in <image> it is", "b", "in <image> it is"), ("1+1?", "", "1+1?"), ("1+1?", "null", "1+1?")])
def test_pictures_stand_at_the_marks_of_the_question(tmp_path, kind, question, names, kept):
    """In their order, the same one twice, of any size. The mark of a single one goes at the beginning and at the end."""
    example = load(row_of(tmp_path, question, names, kind))[0]
    assert example.question == kept and [image.size for image in example.images] == [
        {"a": (56, 28), "b": (28, 112)}[name] for name in names.replace("null", "").split()]
    prompt = Processor(ROOT / "assets/tiny").prompt(example)
    assert [grid == (8, 2) for grid in prompt.grids] == [image.size == (28, 112) for image in example.images]


@pytest.mark.parametrize("kind", ["lines", "parquet"])
@pytest.mark.parametrize("question, names, reason", [
    ("<image> and <image>", "a", "the question names 2 picture.s. by <image>, and has 1"),
    ("<image>", "a b", "the question names 1 picture.s. by <image>, and has 2"),
    ("<image> or <image>", "", "no picture: the question names one by <image>"),
    ("<image 1> or <image 3>", "a b", "the question names <image 3>, which no picture of the row fills; it has 2"),
    ("<img> <img> <img>", "a b", "the question names <img>, .* it has 2"), ("<video>", "a b", "the question names <video>"),
    ("x", "a null a", "picture 2 of 3: the picture is null"), ("x", "null null", "picture 1 of 2: the picture is null"),
    ("x", "a no", "picture 2 of 2: .*(no.png is no file|neither bytes nor a path|cannot be read)"),
    ("x", "none a", "picture 1 of 2: the image cannot be read"), ("x", "a b thin", "picture 3 of 3: an image of 1×400 pixels"),
    ("x", "a cut", "picture 2 of 2: the image cannot be read")])
def test_several_pictures_that_cannot_be(tmp_path, kind, question, names, reason):
    with pytest.raises(BadRow, match=f"row 1( .id 1.)?: {reason}"):
        assert load(row_of(tmp_path, question, names, kind))[0]


@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_numbered_columns_of_pictures_are_one_list(tmp_path, kind):
    """image_2 before image_10; nulls behind the last are none, a null before it is a mistake."""
    def row(**names: str | None) -> str:
        cells = {name: own and (f"{own}.png" if kind == "lines" else {"bytes": PICTURES[own], "path": None}) for name, own in names.items()}
        for own in "ab":
            (tmp_path / f"{own}.png").write_bytes(PICTURES[own])
        asked = {"problem": "Is <image 2> in <image 1>?", "solution": "5", "task": "vqa"}
        full = {**dict.fromkeys(names, cells["image_2"]), **asked}                  # so that each column has its type
        return write(tmp_path, asked | cells) if kind == "lines" else parquet_of(tmp_path, asked | cells, full)

    [first, second] = load(row(image_10=None, image_2="b", image_1="a"))[0].images
    assert (first.size, second.size) == ((56, 28), (28, 112))
    assert [image.size for image in load(row(image_10="b", image_2="a", image_9="a"))[0].images] == [(56, 28), (56, 28), (28, 112)]
    with pytest.raises(BadRow, match="row 1: picture 1 of 2: the picture is null"):
        load(row(image_1=None, image_2="b"))
    with pytest.raises(BadRow, match="row 1: the question names <image 2>, which no picture of the row fills; it has 1"):
        load(row(image_2="b", image_3=None))


def test_one_of_several_pictures_that_changed(tmp_path):
    source = load(row_of(tmp_path, "x", "a b", "lines"))
    (tmp_path / "b.png").write_bytes(PICTURES["a"])
    with pytest.raises(BadRow, match="row 1 .id 1.: picture 2 of 2: the picture is 56×28 pixels now; it was 28×112"):
        assert source[0]


@pytest.mark.parametrize("kind", ["video", "image_url", "input_audio", "audio"])
def test_parts_of_a_message_that_are_no_text_and_no_picture(tmp_path, kind):
    parts = [{"type": kind, kind: {"url": "x"}}, {"type": "text", "text": "What?"}]
    path = lines_of(tmp_path, {"task": "vqa", "solution": "5", "image": None, "problem": [{"role": "user", "content": parts}]})
    with pytest.raises(BadRow, match=f"a part of the question is '{kind}'"):
        load(path)


@pytest.mark.parametrize("row, column", [
    ({"problem": "x" * 2_000_000}, "problem"), ({"problem": "x" * 20_001}, "problem"), ({"problem": "x" * 20_000}, ""),
    ({"problem": [{"role": "user", "content": [{"type": "text", "text": "x" * 15_000}] * 2}]}, "problem"),
    ({"thought": "x" * 20_001}, "thought"), ({"id": "x" * 20_001}, "id"), ({"image_id": "x" * 20_001}, "image_id"),
    ({"question": "x" * 99_999, "problem": ""}, "question"), ({"unused": "x" * 99_999}, ""),
    ({"choices": ["5", "x" * 20_001]}, "choice B"), ({"options": ["5", *(letter * 900 for letter in "abcdefghijklmnopqrstuvwxy")]}, "options"),
    ({"solution": "5" * 20_001}, "answer"), ({"task": "vqa", "solution": ["y", "x" * 20_001]}, "solution"),
    ({"task": "mine", "solution": "x" * 20_001}, "solution")])
def test_texts_have_a_limit(tmp_path, monkeypatch, row, column):
    """A question of 2 MB asks for 194 GB of memory."""
    monkeypatch.setitem(rewards.TASKS, "mine", replace(rewards.TASKS["vqa"], read=read_plain))
    path = lines_of(tmp_path, {"task": "math", "solution": "5", "problem": "1+4"} | row)
    if not column:
        assert len(load(path)) == 1
        return
    reason = (f"bad label: the {column} has more than 20,000 characters" if column in ("solution", "answer", "choice B") else
              rf"the column '{column}' holds [\d,]+ characters, more than 20,000")
    with pytest.raises(BadRow, match=f"row 1: {reason}") as error:
        load(path)
    assert len(str(error.value)) < len(str(tmp_path)) + 200


ESC = "\x1b[2J\n"


@pytest.mark.parametrize("row", [
    {"problem": [{"role": ESC * 1000, "content": "x"}] * 50}, {"image": f"a{ESC}.png"}, {"image": "a\ud800.png"},
    {"image": {f"{ESC}{i}" * 50: 1 for i in range(100)}}, {"task": "math", "choices": {f"k{i}" * 50: "x" for i in range(100)}},
    {"task": "math", "choices": ["a" * 900] * 20, "solution": int("7" * 4000)}, {"x" * 10**6: {"video": "a"}}, {f"video{ESC}": "a.mp4"},
    {"id": ESC * 99, "image": "cut.jpg"}, {"id": "x" * 9999, "image": "cut.jpg"}, {"task": ESC}])
def test_what_a_row_holds_does_not_rule_the_screen(tmp_path, row):
    """No escape sequences, no halves of characters, no line of 300 kB: in what is said of bad rows and of odd ones."""
    (tmp_path / "cut.jpg").write_bytes(CUT)
    path = lines_of(tmp_path)
    Path(path).write_text(json.dumps({"image": "a.png", "problem": "x", "solution": "5", "task": "vqa"} | row))
    with pytest.raises(BadRow) as error:
        load(path)[0]
    assert str(error.value).isprintable() and len(str(error.value)) < 900 + len(str(tmp_path))
    source = load(lines_of(tmp_path, *[{"id": ESC * 99}] * 3))
    assert all(line.isprintable() and len(line) < 500 for line in noticed(source)) and len(noticed(source)) == 1


@pytest.mark.parametrize("name", ["none", "None", "null", "false", "", "nowhere.jsonl", "a b", "scenes"])
def test_messages_name_the_flag_that_was_given(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lines_of(tmp_path, {})          # an empty name is not the current folder
    with pytest.raises(ValueError, match=f"^--data {name or chr(39) * 2}: ") as error:
        load(name)
    assert "--eval-data" not in str(error.value)
    with pytest.raises(ValueError, match=f"^--eval-data {name or chr(39) * 2}: ") as error:
        train.open_data(train.Config(eval_data=name), Processor(ROOT / "assets/tiny"), name)
    assert " --data" not in str(error.value) and ('; an empty --eval-data "" means never' in str(error.value)) == (name != "nowhere.jsonl")


@pytest.mark.parametrize("name, reason", [
    (base64.b64encode(png()).decode(), "looks like base64 text"), ("data:image/png;base64,iVBORw0", "is a data: URI"),
    ("http://x.org/a.png", "is an address"), ("s3://x/a.png", "is an address"), (".", "is a folder"),
    ("pipe", "is no regular"),
    ("b.png", "b.png is no file"), ("x" * 5000 + ".png", "is no file"), ("a\0b", "is no file"), ("", "is a folder")])
def test_what_is_no_picture_file_is_said_shortly(tmp_path, name, reason):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadRow, match=f"row 1: .*{reason}") as error:
        load(lines_of(tmp_path, {"image": name}))
    assert len(str(error.value)) < len(str(tmp_path)) * 2 + 200


def test_any_damage_to_a_picture_is_a_bad_row(tmp_path):
    """Every format that Pillow writes, cut and flipped at many places: a picture, or a ValueError of one line."""
    Image.init()
    rng, tried, refused = np.random.default_rng(0), 0, 0
    for kind in sorted(Image.SAVE):
        whole = io.BytesIO()
        try:
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(whole, kind)
        except Exception:       # a kind that does not hold RGB, or needs a program that is not here
            continue
        for _ in range(25):
            data = bytearray(whole.getvalue()[:rng.integers(1, len(whole.getvalue()) + 1)])
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
            tried += 1
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 300
    assert tried > 400 and refused > 100


def exif(orientation: int, kind: str = "JPEG") -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(np.arange(56 * 28 * 3, dtype=np.uint8).reshape(28, 56, 3)).save(data, kind, exif=tags)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_rotation_beside_the_pixels(tmp_path, orientation, kind):
    """Values that turn nothing are upright. Where there are no boxes a picture is turned, where there are it is refused."""
    cell = {"bytes": exif(orientation, kind), "path": None}
    turned = orientation in range(2, 9)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(cell["bytes"]))).convert("RGB")
    for task, answer in (("vqa", "5"), ("grounding", "[]")):
        path = parquet_of(tmp_path, {"problem": "x", "solution": answer, "image": cell}, name=f"{task}.parquet")
        image = load(path, task)[0].images[0]
        assert image.size == expected.size == ((28, 56) if orientation in range(5, 9) else (56, 28))
        assert image.tobytes() == expected.tobytes()
    boxed = parquet_of(tmp_path, {"problem": "x", "solution": json.dumps([BOX]), "image": cell})
    if turned:
        with pytest.raises(BadRow, match="row 1: EXIF says that it is to be rotated"):
            load(boxed, "grounding")
    else:
        assert load(boxed, "grounding")[0].images[0].size == (56, 28)


@pytest.mark.parametrize("box", [[1, 2, 3], ["1", "2", "3", "4"], [1.0, None, 3.0, 4.0], [decimal.Decimal(n) for n in (1, 2, 3, 4)],
                                 [[1, 2], [3, 4]], [{"x": 1, "y": 2}], {"x": 1}, [0.1, 0.2, 0.5, 0.9], [5, 5, 4, 9], []],
                         ids=["short", "text", "null", "decimals", "corners", "records", "record", "relative", "inverted", "[]"])
def test_a_column_bbox_of_another_kind(tmp_path, box):
    path = parquet_of(tmp_path, {"image": IMAGE, "text": "the cup", "bbox": box})
    if box == []:
        assert load(path, "grounding")[0].answer == "[]"
        return
    with pytest.raises(BadRow, match="row 1: bad label: "):
        load(path, "grounding")
    with pytest.raises(ValueError, match="holds no usable rows"):
        load(path, "grounding", True)


@pytest.mark.parametrize("box, size, inside", [
    ([0, 0, 40, 90], (50, 100), True), ([0, 0, 60, 40], (50, 100), False), ([0, 0, 40, 101], (50, 100), False),
    ([0, 0, 90, 40], (100, 50), True), ([0, 0, 101, 40], (100, 50), False), ([-1, 0, 9, 9], (100, 50), False)])
def test_a_box_must_lie_in_its_picture(tmp_path, box, size, inside):
    item = {"bbox_2d": box, "point_2d": [5, 5]}
    (tmp_path / "b.png").write_bytes(png(*size))
    path = lines_of(tmp_path, {"image": "b.png", "solution": [item]})
    if inside:
        assert json.loads(load(path)[0].answer) == [item]
    else:
        with pytest.raises(BadRow, match=f"row 1: the box .* leaves the picture of {size[0]}×{size[1]}"):
            load(path)


FORMS = {"xyxy": lambda x1, y1, x2, y2: [x1, y1, x2, y2], "xywh": lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1]}


def boxed_rows(box_format: str, box_units: str, size: tuple[int, int], count: int = 200) -> list[dict]:
    """Random boxes inside a picture of this size, in a form."""
    rng, rows = random.Random(5), []
    for _ in range(count):
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(side + 1), 2)) for side in size)
        box = [x1, y1, x2, y2]
        if box_units == "thousandths":
            box = [round(1000 * c / size[i % 2]) for i, c in enumerate(box)]
        rows.append({"image": "b.png", "solution": [FORMS[box_format](*box)]})
    return rows


@pytest.mark.parametrize("form", [(f, u) for f in ("xyxy", "xywh") for u in ("pixels", "thousandths")])
@pytest.mark.parametrize("size", [(112, 112), (640, 480)])
def test_boxes_of_other_forms(tmp_path, form, size):
    """They become corners in pixels. Read another way, the file is refused, with how many rows would be right in which
    way; and --skip-bad-rows does not leave in those that fit by chance."""
    (tmp_path / "b.png").write_bytes(png(*size))
    path = lines_of(tmp_path, *boxed_rows(*form, size))
    rows = [json.loads(e.answer) for e in load(path, box_format=form[0], box_units=form[1])]
    expected = [row["solution"] for row in boxed_rows("xyxy", "pixels", size)]
    within = 0.5 if form[1] == "pixels" else max(size) / 1000
    for [item], [box] in zip(rows, expected):
        assert np.abs(np.subtract(item["bbox_2d"], box)).max() < within
        assert np.abs(np.subtract(item["point_2d"], [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])).max() < within
    flags = " ".join(f"--box-{name} {value}" for name, value, usual in zip(("format", "units"), form, ("xyxy", "pixels")) if value != usual)
    if not flags:
        return
    said = rf"of the file's 200 rows with boxes (\d+) are right as xyxy in pixels, and 200 with {flags}"
    with pytest.raises(BadRow, match=rf"a.jsonl, row \d+: .*the box .*; {said} \(--skip-bad-rows") as error:
        load(path)
    assert len(str(error.value)) < len(str(tmp_path)) + 400
    with pytest.raises(sources.Mistake, match=f"a.jsonl: {said}; the rows that stayed would have wrong boxes") as error:
        load(path, skip_bad_rows=True)
    assert type(error.value) is sources.Mistake and int(re.search(said, str(error.value))[1]) < 100


def test_corners_read_as_sizes(tmp_path):
    (tmp_path / "b.png").write_bytes(png(640, 480))
    path = lines_of(tmp_path, *boxed_rows("xyxy", "pixels", (640, 480)))
    with pytest.raises(BadRow, match=r"row \d: the box .* leaves the picture of 640×480 pixels; of .* as xywh in pixels, and 200 with --box-format xyxy"):
        load(path, box_format="xywh")
    with pytest.raises(sources.Mistake, match="a.jsonl: of the file's 200 rows .*, and 200 with --box-format xyxy; the rows that"):
        load(path, box_format="xywh", skip_bad_rows=True)


def test_some_wrong_boxes_are_bad_rows(tmp_path):
    """Less than a tenth of a file, or one row: they are left out, and the count is said all the same. Rows of other
    faults, without boxes or of other tasks do not count."""
    (tmp_path / "b.png").write_bytes(png(640, 480))
    others = [{"solution": "no"}, {"solution": "[]"}, {"task": "vqa", "solution": "[900, 900, 1, 1]"}, {"problem": ""}]
    wrong = {"image": "b.png", "solution": [[600, 400, 700, 410]]}
    rows = boxed_rows("xyxy", "pixels", (640, 480), 19)
    source = load(lines_of(tmp_path, *rows, wrong, wrong, *others), skip_bad_rows=True)
    assert len(source) == 21 and [re.search(r"row (\d+)", line)[1] for line in source.bad] == ["20", "21", "22", "25"]
    assert source.bad[1].endswith("of the file's 21 rows with boxes 19 are right as xyxy in pixels, and 21 with --box-units thousandths")
    with pytest.raises(sources.Mistake, match="of the file's 20 rows with boxes 18 are right"):
        load(lines_of(tmp_path, *rows[1:], wrong, wrong, *others), skip_bad_rows=True)
    assert len(load(lines_of(tmp_path, *rows[:1], wrong), skip_bad_rows=True)) == 1


@pytest.mark.parametrize("units, box, reason", [
    ("thousandths", [0, 0, 1000, 1000], ""),
    ("thousandths", [0, 0, 1001, 9], "leaves the picture of 1000×1000 thousandths"),
    ("thousandths", [-1, 0, 9, 9], "leaves the picture"), ("thousandths", [9, 0, 8, 9], "is inverted"),
    ("thousandths", [0.1, 0.2, 0.5, 0.9], "relative coordinates"),
    ("pixels", [0.1, 0.2, 0.5, 0.9], "relative coordinates")])
def test_thousandths(tmp_path, units, box, reason):
    path = lines_of(tmp_path, {"solution": [{"bbox_2d": box, "point_2d": [503, 250]}]})
    if reason:
        with pytest.raises(BadRow, match=f"row 1: .*{reason}"):
            load(path, box_units=units)
    else:
        assert json.loads(load(path, box_units=units)[0].answer) == [{"bbox_2d": [0, 0, 56, 28], "point_2d": [28.168, 7.0]}]


def test_thousandths_come_back_to_qwen3(tmp_path, qwen3_folder):
    """In a picture of any size y has the numbers of the label, which its model gives."""
    processor, rng = Processor(qwen3_folder), random.Random(1)
    for size in ((60, 90), (112, 112), (997, 1003), (1500, 640)):
        (tmp_path / "b.png").write_bytes(png(*size))
        item = {"bbox_2d": [rng.randint(0, 500), rng.randint(0, 500), rng.randint(501, 1000), rng.randint(501, 1000)], "point_2d": [500, 503]}
        example = load(lines_of(tmp_path, {"image": "b.png", "solution": [item]}), box_units="thousandths")[0]
        assert json.loads(processor.prompt(example).answer) == [item]


def test_sizes_around_a_mask_are_not_asked_for(tmp_path):
    """The box of a mask is made here, in corners and pixels, whatever the boxes of the data are."""
    rows = [benchmark_row(0), benchmark_row(1, mask=EMPTY, bbox=[0.0] * 4), benchmark_row(2, bbox=[3.0, 4.0, 17.0, 7.0])]
    source = load(write_parquet(tmp_path / "a.parquet", rows), "grounding", box_format="xywh")
    assert [json.loads(e.answer) for e in source] == [[{"bbox_2d": [3, 4, 20, 11], "point_2d": [11.5, 7.5]}], [], [
        {"bbox_2d": [3, 4, 20, 11], "point_2d": [11.5, 7.5]}]]


def test_the_layouts_of_detection_sets(tmp_path):
    """COCO's annotations, and objects as a record of lists, which a dot opens."""
    row = {"problem": "the cups", "solution": None, "objects": {"bbox": [[1, 2, 30, 20], [2.25, 3.5, 4, 5]], "category": [1, 1]},
           "annotations": [{"bbox": [1, 2, 30, 20], "category_id": 3, "iscrowd": 0}, {"bbox": [2.25, 3.5, 4, 5], "area": 20}]}
    expected = [{"bbox_2d": [1, 2, 31, 22], "point_2d": [16, 12]}, {"bbox_2d": [2.25, 3.5, 6.25, 8.5], "point_2d": [4.25, 6]}]
    parquet = parquet_of(tmp_path, row | {"image": IMAGE, "objects": {"bbox": [[1.0, 2.0, 30.0, 20.0], [2.25, 3.5, 4.0, 5.0]], "category": [1, 1]}})
    for name in ("objects", "objects.bbox", "annotations"):
        for path in (lines_of(tmp_path, row), parquet):
            assert json.loads(load(path, "grounding", columns=f"answer={name}", box_format="xywh")[0].answer) == expected


@pytest.mark.parametrize("task, answer", [("grounding", json.dumps([BOX])), ("grounding", "[]"), ("vqa", "5")])
def test_a_picture_replaced_by_one_of_another_size(tmp_path, task, answer):
    """The boxes and the checks of its row were of the old one."""
    source = load(lines_of(tmp_path, {"solution": answer, "task": task}), skip_bad_rows=True)
    (tmp_path / "a.png").write_bytes(png(colour=(0, 0, 9)))
    assert source[0].images[0].getpixel((0, 0)) == (0, 0, 9)
    (tmp_path / "a.png").write_bytes(png(28, 56))
    with pytest.raises(BadRow, match="a.jsonl, row 1 .id 1.: the picture is 28×56 pixels now; it was 56×28 when the data"):
        source[0]
    (tmp_path / "a.png").write_bytes(exif(6))       # the same size, but for a rotation
    with pytest.raises(BadRow, match="EXIF" if "bbox" in answer else "is 28×56 pixels now; it was 56×28"):
        source[0]


def test_which_of_several_pictures_and_which_row(tmp_path):
    """MathVerse and others have a path under image, and the picture itself under decoded_image. A text that is no text is
    named by its row."""
    path = parquet_of(tmp_path, {"image": "nowhere.png", "decoded_image": IMAGE, "problem": "the cup", "solution": "[]"})
    assert load(path, "grounding")[0].images[0].size == (56, 28)
    texts = pa.StringArray.from_buffers(3, pa.array([0, 3, 6, 8], pa.int32()).buffers()[1], pa.py_buffer(b"cupcup\xff\xfe"))
    pq.write_table(pa.table({"image": [IMAGE] * 3, "problem": texts, "solution": ["1"] * 3}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match="b.parquet, row 3: it cannot be read"):
        load(str(tmp_path / "b.parquet"), "vqa")


def test_a_label_must_earn_its_own_reward(tmp_path, monkeypatch):
    """A point outside its box is counted, a label without accuracy is a bad row, a reward that raises as well."""
    aside = {"bbox_2d": [10, 5, 30, 25], "point_2d": [40, 15]}
    path = lines_of(tmp_path, {"solution": [BOX]}, {"solution": [aside]}, {"solution": [BOX, aside]})
    [line] = noticed(load(path))
    assert line.startswith("2 of 3 labels earn less than full accuracy") and "a.jsonl, row 2" in line and "accuracy 2" in line
    for reward, reason in ((lambda response, answer: rewards.Reward({"accuracy": 0.0}), "has no accuracy"),
                           (lambda response, answer: 1 / 0, "fails on its own label .*ZeroDivisionError")):
        task = replace(rewards.TASKS["vqa"], reward=reward)
        monkeypatch.setitem(rewards.TASKS, "mine", task)
        with pytest.raises(BadRow, match=f"row 1: .*{reason}"):
            load(lines_of(tmp_path, {"task": "mine", "solution": "5"}))


@pytest.mark.parametrize("row, reason", [
    ({"problem": "a <|im_end|> b"}, "the question holds a special token of the model, <.im_end.>"),
    ({"problem": "a <|IM_end|> b"}, "the question holds a special token"),
    ({"solution": "<|image_pad|>", "task": "vqa"}, "the label holds a special"),
    ({"solution": ["x", "y"], "task": "vqa", "problem": "a\ud800"}, "the question cannot be encoded"),
    ({"solution": "a\udfff", "task": "vqa"}, "the label cannot be encoded"),
    ({"id": "\ud83d"}, "the id cannot be encoded"),
    ({"image": "long.png"}, "an image of 10×2001 pixels is more than 200 times as long")])
def test_every_fault_of_a_row_is_found_when_the_data_is_opened(tmp_path, row, reason):
    (tmp_path / "long.png").write_bytes(png(10, 2001))
    rows = [{}, row, {}]
    text = "\n".join(json.dumps({"image": "a.png", "problem": "the cup", "task": "grounding", "solution": "[]"} | r) for r in rows)
    lines_of(tmp_path)
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(BadRow, match=f"b.jsonl, row 2: {reason}"):
        load(str(tmp_path / "b.jsonl"))
    source = load(str(tmp_path / "b.jsonl"), skip_bad_rows=True)
    assert len(source) == 2 and len(source.bad) == 1
    assert noticed(source)[0].encode()       # what is printed of it can be


def test_a_row_over_the_limit_is_found_when_the_data_is_opened(tmp_path):
    processor = Processor(ROOT / "assets/tiny")
    path = lines_of(tmp_path, {}, {"problem": "cup " * 300}, {"solution": json.dumps([BOX] * 9)})
    prompts = [processor.prompt(example) for example in load(path)]
    lengths = [len(p.tokens) + len(processor.encode(f"<answer>{p.answer}</answer>")) for p in prompts]

    def fits(limit: int, longest: int, thought: bool = False):
        return lambda example, size: processor.check_label(example, size, "spaced", longest, limit, thought=thought)
    assert len(load(path, fits=fits(max(lengths), 1))) == 3          # the very number of tokens that a row has
    for limit, left in ((max(lengths) - 1, 2), (sorted(lengths)[1] - 1, 1), (min(lengths) - 1, 0)):
        with pytest.raises(BadRow, match=f"exceed --max-row-tokens {limit}"):
            load(path, fits=fits(limit, 1))
        if left:
            assert len(load(path, skip_bad_rows=True, fits=fits(limit, 1))) == left
    longest = max(len(p.tokens) for p in prompts) + 999
    with pytest.raises(BadRow, match="row 2: its prompt of .* and a response of 999, exceed"):
        load(path, fits=fits(longest - 1, 999))
    assert len(load(path, fits=fits(max(lengths) + 9, 9, thought=True))) == 3      # a borrowed thought makes y longer
    with pytest.raises(BadRow, match="exceed"):
        load(path, fits=fits(max(lengths) + 8, 9, thought=True))


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_what_was_opened_can_be_packed(family, qwen3_folder):
    """Labels of every kind, in pictures of every size: under the smallest limit that the check at opening lets pass, y
    in any style and the longest rollout are packed, and a limit of one token less does not pass."""
    processor, rng = Processor(qwen3_folder if family == "qwen3" else ROOT / "assets/tiny"), random.Random(3)
    longer = 0
    for _ in range(60):
        size = tuple(rng.choice([28, 56, 90, 112, 300]) for _ in "wh")
        item = {"bbox_2d": [0, 0, *(rng.randint(1, side) for side in size)], "point_2d": rng.choice([[3, 9], [7.25, 9.5]])}
        task, answer = rng.choice([("grounding", json.dumps([item] * rng.randint(0, 5))), ("scene_grounding", json.dumps([item])),
                                   ("vqa", "word " * rng.randint(1, 9)), ("math", "12")])
        sizes = [size] if "grounding" in task else [size, (28, 300), (200, 90)][:rng.randint(0, 3)]
        question = "cup " * rng.randint(1, 9) + rng.choice(["", "<image>"] if len(sizes) != 1 else [""]) * len(sizes)
        images = tuple(Image.new("RGB", size) for size in sizes)
        example = Example("x", images, question, answer, task, rng.choice(["", "It is."]))
        longest, style = rng.choice([1, 30, 90]), rng.choice([*rewards.LABEL_STYLES])
        prompt = processor.prompt(example)
        y = Response(processor.encode(rewards.label_text(task, prompt.answer, style, example.thought)))
        most = len(prompt.tokens) + max(longest, len(y.tokens))
        raw = len(processor.encode(rewards.label_text(task, answer, style, example.thought)))
        longer += len(y.tokens) > max(raw, longest)
        odd = processor.check_label(example, sizes, style, longest, most)
        assert bool(odd) == (len(y.tokens) > longest)
        pack_group(prompt, [y, Response([5] * longest)], most)
        with pytest.raises(ValueError, match=f"exceed --max-row-tokens {most - 1}"):
            processor.check_label(example, sizes, style, longest, most - 1)
    assert longer > 3       # y was longer in the frame than in the picture's own pixels


def test_a_page_that_is_too_large_is_told_what_fits(tmp_path):
    """A value of --max-pixels with which the row is taken, and not with one image token more."""
    Image.new("RGB", (1700, 2200), "white").save(tmp_path / "page.png")
    path = lines_of(tmp_path, {"image": "page.png", "problem": "What is the total?", "solution": "9", "task": "docvqa"})

    def fits(processor: Processor):
        return lambda example, sizes: processor.check_label(example, sizes, "spaced", 512, 2048)
    with pytest.raises(BadRow, match=r"exceed --max-row-tokens 2048; --max-pixels (\d+) makes its pictures small enough") as error:
        load(path, "docvqa", fits=fits(Processor(ROOT / "assets/tiny")))
    most = int(re.search(r"--max-pixels (\d+)", str(error.value))[1])
    assert len(load(path, "docvqa", fits=fits(Processor(ROOT / "assets/tiny", max_pixels=most)))) == 1
    prompt = Processor(ROOT / "assets/tiny", max_pixels=most).prompt(load(path, "docvqa")[0])
    assert 0.9 * 2048 < len(prompt.tokens) + 512 <= 2048


def test_rows_of_the_built_in_world_are_counted_at_the_start():
    processor = Processor(ROOT / "assets/tiny")
    assert len(train.open_data(train.Config(max_row_tokens=300), processor, "scenes:train")) == 100_000
    with pytest.raises(sources.Mistake, match="^--eval-data scenes:val: example scenes:val/.*: its prompt of .* exceed --max-row-tokens 150"):
        train.open_data(train.Config(max_row_tokens=150), processor, "scenes:val")


def test_a_box_around_a_mask_is_counted_before_it_is_known(tmp_path):
    processor = Processor(ROOT / "assets/tiny")
    path = write_parquet(tmp_path / "a.parquet", [benchmark_row(0)])

    def fits(limit: int):
        return lambda example, size: processor.check_label(example, size, "spaced", 1, limit)
    prompt = processor.prompt(load(path, "grounding")[0])
    y = Response(processor.encode(rewards.label_text("grounding", prompt.answer, "spaced")))
    most = len(prompt.tokens) + len(processor.encode(rewards.label_text("grounding", json.dumps(
        [{"bbox_2d": [840] * 4, "point_2d": [840] * 2}]), "spaced")))
    pack_group(prompt, [y], most)
    assert load(path, "grounding", fits=fits(most))[0].answer != "[]"
    with pytest.raises(BadRow, match="exceed --max-row-tokens"):
        load(path, "grounding", fits=fits(most - 1))


DECOMPOSED = {"vqa": "cafe\u0301", "docvqa": "cafe\u0301", "chartqa": "cafe\u0301", "math": "u\u0308ber"}


@pytest.mark.parametrize("task, kind", [*((task, "text") for task in DECOMPOSED), *((task, "list") for task in (
    "vqa", "docvqa", "chartqa")), ("math", "choices")])
def test_labels_are_brought_to_the_form_that_tokenizers_give_back(tmp_path, task, kind):
    """Qwen's tokenizer composes é: a label of e and an accent would be one that no rollout can equal."""
    processor, text = Processor(ROOT / "assets/tiny"), DECOMPOSED[task]
    composed = unicodedata.normalize("NFC", text)
    row = {"text": {"solution": text}, "list": {"solution": ["x", composed, text]},
           "choices": {"solution": composed, "choices": ["x", text]}}[kind]
    path = lines_of(tmp_path, row | {"problem": f"a {text}?", "task": task, "thought": text})
    source = load(path, fits=lambda example, size: processor.check_label(example, size, "spaced", 99))
    example = source[0]
    y = rewards.label_text(task, example.answer, "spaced")
    assert composed in y and example.question.startswith(f"a {composed}?") and example.thought == composed
    assert processor.decode(processor.encode(y)) == y and rewards.score(task, y, example.answer).total == 1
    if kind == "list":
        assert json.loads(example.answer) == [composed, "x"]
    if kind == "choices":
        assert f"(B) {composed}" in example.question


@pytest.mark.parametrize("normalizer, task, answer, lost", [
    (normalizers.NFKC(), "vqa", "½ ﬁsh", True), (normalizers.NFKC(), "docvqa", "½", True), (normalizers.NFKC(), "vqa", "fish", False),
    (normalizers.Replace("+", "-"), "math", "x+y", True), (normalizers.Lowercase(), "vqa", "Paris", False),      # to its reward equal
    (normalizers.Replace("<answer>", ""), "grounding", [BOX], True), (normalizers.Replace(", ", ","), "grounding", [BOX], False)])
def test_a_label_that_no_rollout_can_equal(tmp_path, normalizer, task, answer, lost):
    """Its text, brought back from its own tokens, must earn what it earns."""
    processor = Processor(ROOT / "assets/tiny")
    processor.tokenizer.backend_tokenizer.normalizer = normalizer
    path = lines_of(tmp_path, {"solution": answer, "task": task})

    def open_it(skip: bool = False):
        return load(path, "", skip, fits=lambda example, size: processor.check_label(example, size, "spaced", 999))
    if not lost:
        assert len(open_it()) == 1 and not noticed(open_it())
        return
    with pytest.raises(BadRow, match="row 1: no rollout can equal the label: its text comes back from its own tokens as") as error:
        open_it()
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_labels_longer_than_any_rollout_are_told_once(tmp_path, monkeypatch):
    """By train.py, for every style and method, beside what else is odd in the same row."""
    aside = {"bbox_2d": [10, 5, 30, 25], "point_2d": [40, 15]}
    path = lines_of(tmp_path, {}, {"solution": [BOX, aside]}, {"solution": [BOX]})
    processor = Processor(ROOT / "assets/tiny")
    for method, style in (("visurf", "spaced"), ("sft", "compact"), ("rlvr", "compact")):
        cfg = train.Config(method=method, label_style=style, max_new_tokens=20)
        lines = noticed(train.open_data(cfg, processor, path))
        assert len(lines) == 2 and lines[0].startswith("1 of 3 labels earn less than full accuracy")
        assert re.match("2 of 3 labels are longer than --max-new-tokens 20, which no rollout can equal; the first: .*a.jsonl, "
                        r"row 2: y has \d\d tokens$", lines[1])
    assert len(noticed(train.open_data(train.Config(max_new_tokens=200), processor, path))) == 1
    y = processor.encode(rewards.label_text("grounding", processor.prompt(load(path)[0]).answer, "spaced"))
    assert not any("longer" in line for line in noticed(train.open_data(
        train.Config(max_new_tokens=len(y)), processor, lines_of(tmp_path, {}))))


def test_a_list_is_no_lines_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"problem": "x"}], indent=1).replace("[\n {", "[{"))
    with pytest.raises(ValueError, match="a.jsonl is a JSON list, not one object a line"):
        load(str(tmp_path / "a.jsonl"))


def test_opening_many_rows_shows_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sources, "BAR_AFTER", 0)
    load(lines_of(tmp_path, *({} for _ in range(50))))
    assert "opening a.jsonl" in capfd.readouterr().err


def test_the_fingerprint_is_of_the_rows(tmp_path):
    def of(*rows: dict) -> str:
        return load(lines_of(tmp_path, *rows)).fingerprint
    same = lines_of(tmp_path, {}, {"problem": "x"})
    first = load(same).fingerprint
    assert first == load(same).fingerprint
    assert len({first, of({}, {"problem": "y"}), of({}), of({}, {"solution": [BOX]}), of({"problem": "x"}, {})}) == 5
    before = of({})
    (tmp_path / "a.png").write_bytes(png(colour=(1, 2, 3)))
    assert load(str(tmp_path / "a.jsonl")).fingerprint != before
    (tmp_path / "b.png").write_bytes(png())
    several = {"images": ["a.png", "b.png"], "image": None, "task": "vqa", "solution": "5"}
    assert len({of(several), of(several | {"images": ["b.png", "a.png"]}), of(several | {"images": ["a.png"]})}) == 3
    before = of(several)
    (tmp_path / "b.png").write_bytes(png(colour=(1, 2, 3)))
    assert load(str(tmp_path / "a.jsonl")).fingerprint != before


def test_the_fingerprint_of_rows_with_one_picture_is_as_before_there_were_several(tmp_path):
    """So runs that were begun then go on."""
    Image.new("RGB", (56, 28), (200, 30, 30)).save(tmp_path / "a.bmp")
    path = write(tmp_path, {"problem": "<image> the cup", "solution": "[]", "image": "a.bmp", "task": "grounding"},
                 {"problem": "1+1?", "solution": "2", "image": None, "task": "math"})
    for name in ("a.bmp", "a.jsonl"):
        os.utime(tmp_path / name, ns=(0, 10**18))
    assert load(path).fingerprint == "3374032c0ebfe2c4"


def test_the_commands_of_the_page_on_data_open(tmp_path, monkeypatch):
    """Every layout of docs/data.md, as experiments/made_data.py writes it, with the options that are printed there."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "experiments/made_data.py"))["write_layouts"](Path("made"))
    monkeypatch.setenv("HF_HUB_CACHE", "made/hub")
    page = (ROOT / "docs/data.md").read_text()
    commands = re.findall(r"train.py (--data made/[^`\n]*)", page)
    made = {re.match(r"--data made/(\w+)", command)[1] for command in commands}
    assert len(page.split()) <= 1200
    assert made == {"shapes", *(path.stem for path in Path("made").iterdir() if path.name != "hub")}
    for command in commands:
        options = dict(zip(*[iter(command.split())] * 2))
        if "made/shapes" in command:        # the cache's place is read when huggingface_hub is imported
            code = f"import data; print(len(data.load({options['--data']!r}, {options['--task']!r})))"
            done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
                                  capture_output=True, text=True)
            assert done.stdout == "12\n"
            continue
        monkeypatch.setattr(sys, "argv", ["train.py", *command.split()])
        cfg, processor = train.parse_config(), Processor(ROOT / "assets/tiny")
        for data, count in ((cfg.data, 12), (options.get("--eval-data"), 4)):
            if data:
                source = train.open_data(cfg, processor, data)
                assert len(source) == count and source[0].images[0].size == (112, 112)
                assert len(noticed(source)) == ("scienceqa" in data)         # its column task
                assert source[0].system == ("Answer by a number." if "messages" in data else "")
    shapes = [[(e.question, [item["bbox_2d"] for item in json.loads(e.answer)]) for e in load(f"made/{name}", "grounding", **options)]
              for name, options in (("lines", {}), ("qwen", {}), ("coco", {"columns": "answer=annotations", "box_format": "xywh"}))]
    assert shapes[0] == shapes[1] == shapes[2] and any(boxes for _, boxes in shapes[0])
    sums = [[(e.question, e.answer) for e in load(f"made/{name}", "scene_math")] for name in (
        "llava", "messages.parquet", "completions.parquet", "trl")]
    assert sums[0] == sums[1] == sums[2] == sums[3]
