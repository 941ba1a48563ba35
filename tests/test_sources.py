"""Where examples come from: the authors' formats, pictures of every kind, bad rows, memory, order."""
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support import sources
from data import load
from support.sources import BadRow, Example, open_image, order, take

ROOT = Path(__file__).resolve().parent.parent
BOX = {"bbox_2d": [10, 5, 30, 25], "point_2d": [20, 15]}


def png(width: int = 56, height: int = 28, colour=(200, 30, 30), mode: str = "RGB", **options) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (width, height), colour).save(data, options.pop("format", "PNG"), **options)
    return data.getvalue()


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
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
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
    return [(e.id, e.question, e.answer, e.task, e.image.size, e.image.getpixel((0, 0))) for e in source]


EXPECTED = [(f"r{i}", f"the cup {i}", json.dumps([BOX] if i % 2 else []), "grounding", (56, 28), (i, 0, 0))
            for i in range(5)]


@pytest.mark.parametrize("row_group", [1, 2, 5])
def test_parquet_in_any_order(tmp_path, row_group, monkeypatch):
    monkeypatch.setattr(sources, "READ_TOGETHER", 2)
    source = load(write_parquet(tmp_path / "a.parquet", [train_row(i) for i in range(5)], row_group_size=row_group),
                  "grounding")
    assert summary(source) == EXPECTED
    for i in (4, 0, 3, 3, 1, 2, 4, 0):
        assert source[i].id == f"r{i}" and source[i].image.getpixel((0, 0)) == (i, 0, 0)


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


@pytest.mark.parametrize("content, reason", [
    (png(64, 64, format="JPEG")[:300], "cannot be read"), (b"nothing", "cannot be read"), (b"", "cannot be read"),
    (png(mode="I;16", colour=300), "more than 8 bits"), (png(mode="RGBA", colour=(1, 2, 3, 254)), "partly transparent"),
    (rotated(), "EXIF says"), (png(10_001, 10_000, 0, "1"), "more than 100,000,000"),
    (png(20_000, 20_000, 0, "1"), "more than 100,000,000"),
], ids=["truncated", "no image", "nothing", "16 bits", "transparent", "rotated", "large", "bomb"])
def test_pictures_that_are_errors(content, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        open_image(content)
    rows = [train_row(0), train_row(1, image={"bytes": content, "path": None}), train_row(2)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRow, match=rf"^{re.escape(path)}, row 2 \(id r1\): .*{reason}"):
        load(path, "grounding")[1]


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
    (benchmark_row(0, mask=None), "no answer")])
def test_bad_masks(tmp_path, row, reason):
    schema = pa.Table.from_pylist([benchmark_row(0)]).schema
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row], schema), path)
    with pytest.raises(BadRow, match=reason):
        load(str(path), "grounding")[0]


def test_bad_pictures_while_training(tmp_path):
    """The row after a bad one stands in for it; without --skip-bad-rows the load stops."""
    rows = [train_row(i, **({"image": {"bytes": b"bad", "path": None}} if i in (1, 2) else {})) for i in range(5)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadRow, match="row [23] "):
        take(load(path, "grounding"), range(5), 0)
    source = load(path, "grounding", True)
    taken = [e.id for e in take(source, range(5), 0)]
    assert taken == [f"r{3 if i in (1, 2) else i}" for i in order(5, 0, 0)]
    assert len(source.bad) == 3 and all("row 2" in b or "row 3" in b for b in source.bad)
    hopeless = load(write_parquet(tmp_path / "b.parquet", rows[1:3]), "grounding", True)
    with pytest.raises(ValueError, match="all 2 rows are bad"):
        take(hopeless, range(1), 0)


@pytest.mark.parametrize("name, reason", [
    ("nowhere.parquet", "no such file"), ("broken.parquet", "not a Parquet file"),
    ("empty", "holds no .parquet, .jsonl"),
    ("splits", "the splits are test, train; name one after a colon"), ("splits:val", "the splits are test, train"),
    ("saved", "not an Arrow stream"), ("a b", "give scenes:SPLIT, a .jsonl or .parquet file")])
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
    """400 MB of pictures in row groups of 20 MB, in 4 files: reading all of them, in order and at random, never holds
    more than a few row groups. (Measured by VmHWM: getrusage's maximum begins with that of the parent.)"""
    noise = np.random.default_rng(0)
    for name in "abcd":
        rows = [train_row(i, image={"bytes": png(56, 28) + noise.bytes(1 << 20), "path": None}) for i in range(100)]
        write_parquet(tmp_path / f"train-{ord(name) - 97:05}-of-00004.parquet", rows, compression="none",
                      row_group_size=20)
    code = f"""
import re, data
from support import sources
import pyarrow.parquet, PIL.PngImagePlugin
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
source = data.load({str(tmp_path)!r}, "grounding")
for i in [*range(400), *sources.order(400, 0, 0)[:40]]:
    assert source[int(i)].id == f"r{{i % 100}}"
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                               check=True).stdout)
    assert grown < 120_000, f"{grown / 1000:.0f} MB"


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
    assert [replace(e, image=e.image and e.image.size) for e in source] == [
        Example("1", (40, 30), "red ring", json.dumps([BOX]), "grounding"),
        Example("b", None, "1+1, é?", "2", "math", "Easy."),
        Example("1", (40, 30), "red ring", json.dumps([BOX]), "scene_grounding"),
        Example("4", (40, 30), "red ring", "[]", "grounding")]


def without(column: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != column}


@pytest.mark.parametrize("row, reason", [
    ("{not json", "not JSON"), ("[1, 2]", "not a JSON object"),
    (without("image"), "the column image is missing"), (without("problem"), "no question"),
    (without("task"), "no column task"),
    (GOOD | {"image": "pictures/b.png"}, "image cannot be read: .*b.png"),
    (GOOD | {"image": "pictures/corrupt.png"}, "image cannot be read: .*corrupt.png"),
    (GOOD | {"solution": "red"}, "bad label: the solution is not JSON"),
    (GOOD | {"solution": BOX}, "the column 'solution' holds a dict"),
    (GOOD | {"solution": [{"point_2d": [1, 2]}]}, "bad label: item 1: bbox_2d is missing"),
    (GOOD | {"solution": [BOX | {"bbox_2d": [1, 2, 3]}]}, "bad label: item 1: bbox_2d must be 4 numbers"),
    (GOOD | {"solution": [BOX | {"point_2d": "1, 2"}]}, "bad label: item 1: point_2d must be 2 numbers"),
    (GOOD | {"solution": " ", "task": "vqa"}, "bad label: the solution is empty"),
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
     "nowhere does not exist; the splits are words, pretrain, crowds, untidy, tidying, train, val, test"),
    ("scenes", ValueError, "give scenes:SPLIT"), ("data.csv", ValueError, "data.csv: give scenes:SPLIT"),
    ("nowhere.jsonl", ValueError, "nowhere.jsonl: there is no such file")])
def test_unknown_data(name, error, reason):
    with pytest.raises(error, match=reason):
        load(name)


def test_empty_file(folder):
    with pytest.raises(ValueError, match="a.jsonl holds no usable rows"):
        load(write(folder, "", " "))
