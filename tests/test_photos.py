"""support/photos.py on small IDX files of the test's own: every photograph is an even bar, whose
brightness tells which one it is."""
import gzip
import json
import re
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

import rollout
from data import Processor, load
from experiments import photos as plan
from rewards import TASKS
from support import photos, scenes
from support.mistakes import Mistake
from support.sources import take

TINY = Path(__file__).resolve().parent.parent / "assets/tiny"
COUNT = {"train": 200, "t10k": 20}          # photographs; three sixtieths of 200 hold every label
DARKEST = {"train": 55, "t10k": 30}         # number i has the brightness DARKEST + i
SHOWN = range(30)                           # examples of a split


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    for name, count in COUNT.items():
        pictures = np.zeros((count, 28, 28))
        pictures[:, 4:24, 9:19] = (DARKEST[name] + np.arange(count))[:, None, None]
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    return tmp_path


def named(question: str) -> tuple[str | None, str | None]:
    """Returns the colour and the garment that a question names; "object" is None."""
    colours = [word for word in scenes.COLOURS if re.search(rf"\b{word}\b", question)]
    garments = [word for word in photos.ALL if re.search(rf"\b{word}(e?s)?\b", question)]
    assert len(colours) <= 1 and len(garments) <= 1, question
    return (colours or [None])[0], (garments or [None])[0]


# --------------------------------------------------------------------------------------------------
# The photographs

def test_the_parts_share_no_photograph_and_a_garment_is_one_of_its_label(monkeypatch):
    used: dict[str, set] = {}
    whole = photos.photograph

    def spy(part, garment, rng):
        piece = whole(part, garment, rng)
        bright = int(piece[piece.shape[0] // 2, piece.shape[1] // 2])
        name = "train" if bright >= DARKEST["train"] else "t10k"
        number = bright - DARKEST[name]
        assert photos.GARMENTS[number % 10] == garment
        used.setdefault(part, set()).add((name, number))
        return piece
    monkeypatch.setattr(photos, "photograph", spy)
    of_part = {}
    for split in photos.SPLITS:
        used.clear()
        for index in SHOWN:
            photos.make(split, index)
        [part] = used                           # a split takes from one part only
        of_part.setdefault(part, set()).update(used[part])
    assert of_part.keys() == photos.PARTS.keys()
    every = set.union(*of_part.values())
    assert sum(map(len, of_part.values())) == len(every) > 150
    for part, photographs in of_part.items():
        names = {name for name, _ in photographs}
        assert names == {"t10k" if part in ("test", "final") else "train"}


def test_the_hub_gives_the_same(folder, monkeypatch):
    def load_dataset(name, split):
        assert name == "zalando-datasets/fashion_mnist"
        pictures, labels = photos.read(str(folder), split)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
        rows = {"image": [Image.fromarray(picture) for picture in pictures], "label": labels}
        return datasets.Dataset.from_dict(rows, features)
    by_files = photos.digest()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("FASHION_MNIST")
    monkeypatch.setattr(photos, "FOLDER", str(folder / "nowhere"))
    photos.read.cache_clear()
    assert photos.digest() == by_files
    photos.read.cache_clear()


def test_without_the_photographs_it_says_both_ways_to_get_them(folder, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("FASHION_MNIST")
    monkeypatch.setattr(photos, "FOLDER", str(folder / "nowhere"))
    photos.read.cache_clear()
    with pytest.raises(Mistake) as mistake:
        load("photos:val")
    assert "`apt-get install dataset-fashion-mnist`" in str(mistake.value)
    assert "datasets.load_dataset('zalando-datasets/fashion_mnist')" in str(mistake.value)
    with pytest.raises(Mistake, match="^photos:nowhere does not exist; the splits are words,"):
        load("photos:nowhere")


SOUND = struct.pack(">2I", 0x801, 200) + bytes(range(10)) * 20


@pytest.mark.parametrize("content", [
    b"", b"no gzip", gzip.compress(b"", mtime=0), gzip.compress(SOUND, mtime=0)[:-12], gzip.compress(SOUND[:-1], mtime=0),
    gzip.compress(SOUND + b"0", mtime=0), gzip.compress(b"\1" + SOUND[1:], mtime=0),
    gzip.compress(struct.pack(">2I", 0x801, 2 ** 32 - 1) + SOUND[8:], mtime=0),
    gzip.compress(SOUND[:8] + bytes(200), mtime=0)])
def test_a_file_that_is_none_of_the_four_is_refused(folder, content):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(Mistake, match=re.escape(str(folder)) + ".*apt-get install dataset-"):
        photos.read.__wrapped__(str(folder), "train")


def test_pictures_of_another_size_or_number_are_refused(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    for shape in ((20, 28, 27), (19, 28, 28)):
        write_idx(path, np.ones(shape))
        with pytest.raises(Mistake, match=re.escape(str(folder))):
            photos.read.__wrapped__(str(folder), "test")
    path.unlink()
    with pytest.raises(Mistake, match="t10k-images-idx3-ubyte.gz is no IDX file.*No such file"):
        photos.read.__wrapped__(str(folder), "test")


# --------------------------------------------------------------------------------------------------
# Scenes and questions

def test_boxes_are_true_to_the_pixels(monkeypatch):
    glaring = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1),
               "purple": (1, -1, 1)}       # clipped to 0 and 255, which the ground never reaches
    monkeypatch.setattr(photos, "COLOURS", {name: tuple(9999 * c for c in colour)
                                            for name, colour in glaring.items()})
    sides, counts, covered = [], Counter(), 0
    for index in range(100):
        fields, things = photos.make_with_things("pretrain", index)
        pixels = np.asarray(fields["image"])
        assert fields["image"].size == (112, 112) and things == sorted(things, key=lambda t: t.box)
        rest = np.isin(pixels, (0, 255)).all(-1)
        counts[len(things)] += 1
        boxes = np.array([thing.box for thing in things])
        for colour, signs in glaring.items():
            own = (pixels == 255 * (np.array(signs) > 0)).all(-1)
            its = boxes[[thing.colour == colour for thing in things]]
            assert own.any() == bool(len(its))
            for x1, y1, x2, y2 in its:          # colour at each of the four sides, and none outside
                inside = own[y1:y2 + 1, x1:x2 + 1]
                edges = inside[0], inside[-1], inside[:, 0], inside[:, -1]
                assert all(edge.any() for edge in edges)
                rest[y1:y2 + 1, x1:x2 + 1] &= ~own[y1:y2 + 1, x1:x2 + 1]
            if len(its) == 1:
                ys, xs = np.nonzero(own)
                assert its[0].tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
        assert not rest.any()
        sides += (boxes[:, 2:] - boxes[:, :2] + 1).max(1).tolist()
        covered += sum((a[:2] <= b[2:]).all() and (b[:2] <= a[2:]).all()
                       for k, a in enumerate(boxes) for b in boxes[:k])
    assert counts.keys() == {2, 3, 4, 5} and min(counts.values()) > 10
    assert 24 < min(sides) and max(sides) <= 46 and covered       # some overlap, and are cut short


@pytest.mark.parametrize("split", photos.SPLITS)
def test_every_answer_is_true(split):
    source = load(f"photos:{split}")
    assert len(source) == photos.SPLITS[split]
    basic = split in photos.MIX
    for index in SHOWN:
        example, things = source[index], photos.make_with_things(split, index)[1]
        question, answer, words = example.question, example.answer, named(example.question)
        fitting = [thing.box for thing in things if thing.fits(words)]
        if basic or split in photos.JUDGED or split.startswith(("colour", "left")):
            assert words[1] not in photos.NEW, question
        if split != "words":
            assert 2 <= len(things) <= 5
        if TASKS[example.task].boxes:
            assert bool(example.thought) == basic
            boxes = [tuple(item["bbox_2d"]) for item in json.loads(answer)]
            if question.startswith("the leftmost of the two "):
                assert len(fitting) == 2 and boxes == fitting[:1]
                assert fitting[1][0] - fitting[0][0] >= 6
                assert example.thought in ("", f"I compare {fitting[0][0]}, {fitting[1][0]}.")
            else:
                assert question == scenes.name(words) and boxes == fitting
                assert len(fitting) < len(things) or split == "words" and len(things) == 1
                assert not basic or boxes and question in example.thought
            continue
        answer = re.sub("</?answer>", "", answer)
        assert not example.thought
        if question.startswith("How many "):
            assert int(answer) == len(fitting)
        elif question.startswith("What colour is the "):
            assert [thing.colour for thing in things if thing.shape == words[1]] == [answer]
        elif question.startswith("What is the "):
            assert [thing.shape for thing in things if thing.colour == words[0]] == [answer]
            assert answer in photos.NAMED
        elif question.startswith("Where is the "):
            [(x1, y1, x2, y2)] = fitting
            assert json.loads(answer) == [(x1 + x2) // 2, (y1 + y2) // 2]
        else:
            assert question == "Describe the image." and basic
            assert answer == ", ".join(
                f"{thing.colour} {'object' if thing.shape in photos.NEW else thing.shape}"
                for thing in things)


def test_what_is_asked_for():
    asked = {}          # split → kinds of question; "present" and "absent" are of grounding
    for split in photos.SPLITS:
        asked[split] = kinds = Counter()
        for index in range(60 if split.endswith(photos.JUDGED) else 180):
            fields = photos.make(split, index)
            if fields["task"] != "scene_grounding" or "leftmost" in fields["question"]:
                kinds[" ".join(fields["question"].split()[:2])] += 1
            else:
                kinds["absent" if fields["answer"] == "[]" else "present"] += 1
    for split in ("words", "pretrain"):
        assert asked[split].keys() == {"Describe the", "How many", "What colour", "What is",
                                       "Where is", "present", "the leftmost"}
    assert asked["boxing"] == {"present": 180}
    for split in photos.JUDGED:
        assert asked[split] == {"present": 20, "absent": 20, "How many": 20}
        assert asked[f"new-{split}"] == {"present": 30, "absent": 30}
        assert asked[f"colour-{split}"] == {"What colour": 60}
        assert asked[f"left-{split}"] == {"the leftmost": 60}
    assert asked["train"].keys() == {"present", "absent"} and 60 < asked["train"]["absent"] < 120


def test_the_question_does_not_tell_what_is_there_and_absent_things_are_of_four_kinds():
    kinds, words = Counter(), {True: Counter(), False: Counter()}
    for index in range(600):
        fields, things = photos.make_with_things("train", index)
        colour, garment = named(fields["question"])
        present = fields["answer"] != "[]"
        words[present].update([colour, garment, len(things)])
        if not present and colour and garment:
            kinds[any(t.colour == colour for t in things),
                  any(t.shape == garment for t in things)] += 1
    assert set(photos.ALL) < words[True].keys() and min(words[True].values()) > 10
    for word, count in words[True].items():
        assert 0.5 < words[False][word] / count < 2, word
    assert len(kinds) == 4 and min(kinds.values()) > 0.18 * kinds.total()
    new = [named(photos.make("new-test", index)["question"])[1] for index in SHOWN]
    assert set(new) == set(photos.NEW)


def test_a_budget_is_the_first_examples_of_train():
    source = load("photos:train640")
    examples = take(source, range(640, 1280), seed=7)          # the second epoch
    assert {example.id for example in examples} == {f"photos:train/{i}" for i in range(640)}
    assert len({(example.question, example.images[0].tobytes()) for example in examples}) == 640
    assert load("photos:train6400")[639].images[0] == load("photos:train")[639].images[0]
    assert load("photos:train6400").fingerprint != source.fingerprint


def test_examples_and_fingerprint_depend_on_the_photographs_alone(folder):
    def examples() -> list[tuple]:
        return [(fields.pop("image").tobytes(), fields)
                for split in photos.SPLITS for fields in [photos.make(split, 5)]]
    before, fingerprint = examples(), load("photos:val").fingerprint
    photos.read.cache_clear()
    assert examples() == before and load("photos:val").fingerprint == fingerprint
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(20)[::-1] % 10)
    photos.read.cache_clear()
    assert load("photos:val").fingerprint != fingerprint


def test_every_word_is_known_to_the_tiny_tokenizer():
    processor = Processor(TINY)
    for garment in photos.ALL:
        tokens = processor.encode(f"red {garment}")
        assert processor.decode(tokens) == f"red {garment}" and len(tokens) <= 10
    assert load("photos:train", fits=lambda example, size: processor.check_label(
        example, size, "spaced", 128)).judged == 64


def test_how_many_of_a_bases_rollouts_find_what_is_there(monkeypatch):
    """Of eight, three repeat the label, one with text behind it; the others say `[]`."""
    monkeypatch.setattr(photos, "SPLITS", {"tune": 9, "new-tune": 4})
    processor, asked = Processor(TINY), []

    def say(model, prompts, longest, u):
        assert u.shape == (len(prompts), 8, longest)
        asked.extend(prompt.example.answer for prompt in prompts)
        texts = [[f"<answer>{prompt.example.answer}</answer>"] * 2
                 + [f"<answer>{prompt.example.answer}</answer> x"] + ["<answer>[]</answer>"] * 5
                 for prompt in prompts]
        return [[SimpleNamespace(tokens=processor.encode(text)) for text in of] for of in texts]
    monkeypatch.setattr(rollout, "generate", say)
    assert plan.right_of_eight(str(TINY), "tune") == {"": "2--2--2--", "new-": "2-2-"}
    assert len(asked) == 5 and "[]" not in asked
