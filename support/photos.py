"""Scenes of photographs: garments of Fashion-MNIST (Zalando, MIT licence), with questions.

The 60,000 + 10,000 grey photographs of 28×28 are read from the folder that the environment variable
FASHION_MNIST names, from Debian's package dataset-fashion-mnist, or from the hub. Every example is
a pure function of (split, index), as in support/scenes.py.

    split       asks for
    words       mostly captions, counts (zero too), colours, names, centres; also boxes of what is
                there, and of the left one of two, with a thought. NEW garments are not named
    pretrain    the same, with more boxes, and never in a scene of one thing
    boxing      boxes of what is there and nothing else, with a thought
    train       boxes of any garment, half of the time of an absent one; the answer alone
    trainN      the first N examples of train, N = 640 or 6400
    X           of tune, val, test, final: boxes of something present, of something absent, a count:
                one third each, of garments that pretraining names
    new-X       present and absent by turns, of the garments of NEW
    colour-X, left-X    "What colour is the bag?", "the leftmost of the two bags"

A base is pretrained on the first two, or on the third alone. It, train, tune, val, test and final share no photograph.
"""
import functools
import gzip
import hashlib
import os
import random
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from support import scenes
from support.mistakes import Mistake
from support.scenes import COLOURS, LIGHT, SIZE, Thing

# A word for each of the labels 0 … 9. T-shirts and shirts, which people confuse too, share one.
GARMENTS = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
            "boot")
NEW = ("dress", "coat", "sandal")           # seen in pretraining, but first named in `train`
ALL = tuple(sorted({*GARMENTS}))
NAMED = tuple(garment for garment in ALL if garment not in NEW)
KINDS = [(colour, garment) for colour in COLOURS for garment in ALL]
# Photographs: from … to, in sixtieths of the data set's own train or test split.
PARTS = {"pretrain": ("train", 0, 42), "train": ("train", 42, 54), "tune": ("train", 54, 57),
         "val": ("train", 57, 60), "test": ("test", 0, 30), "final": ("test", 30, 60)}
JUDGED = ("tune", "val", "test", "final")
SPLITS = {**dict.fromkeys(("words", "pretrain", "boxing"), 1_000_000),
          "train": 100_000, "train640": 640, "train6400": 6400, **dict.fromkeys(JUDGED, 2304),
          **{f"{family}-{part}": number for part in JUDGED        # 4,096 of each part in all
             for family, number in (("new", 768), ("colour", 512), ("left", 512))}}
# Weights of the kinds of question in pretraining.
ASKED = ("caption", "count", "colour", "name", "where", "present", "left")
MIX = {"words": (8, 6, 1, 3, 2, 3, 1), "pretrain": (2, 8, 3, 3, 2, 8, 2),
       "boxing": (0, 0, 0, 0, 0, 1, 0)}
# What is asked for, if not by chance: 0 a colour and a garment, 1 a colour, 2 a garment.
FORM = {"where": 0, "caption": 1, "name": 1, "colour": 2, "left": 2}
LAMPS = 1 + LIGHT.astype(np.float32) / 150
FLOOR = 12                                          # darker pixels of a photograph are its ground
FOLDER = "/usr/share/datasets/fashion-mnist"        # of Debian's package
HUB = "zalando-datasets/fashion_mnist"              # without either
MISSING = ("photos:SPLIT needs Fashion-MNIST: `apt-get install dataset-fashion-mnist` "
           "(FASHION_MNIST names another folder of its IDX files) or, with a network, "
           f"`python -c \"import datasets; datasets.load_dataset('{HUB}')\"`")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Returns the bytes of a gzipped IDX file as an array, [n] or [n, 28, 28]. Raises Mistake if it
    is anything else."""
    try:
        with gzip.open(path) as file:
            magic, count, *sides = np.frombuffer(file.read(4 + 4 * dimensions), ">u4").tolist()
            size = count * int(np.prod(sides))
            data = file.read(min(size, 60_000 * 28 * 28) + 1)
            if magic != 0x800 + dimensions or sides not in ([], [28, 28]) or len(data) != size:
                raise ValueError(f"{magic:#x}, {count}, {sides}, then {len(data):,} bytes")
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise Mistake(f"{path} is no IDX file of Fashion-MNIST: {error}. {MISSING}") from None
    return np.frombuffer(data, np.uint8).reshape(count, *sides)


@functools.lru_cache(maxsize=4)
def read(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the photographs, uint8 [n, 28, 28], and the labels [n] of the data set's own train or
    test split. folder: of IDX files; empty: from the hub. Raises Mistake if they are not there."""
    if folder:
        stem = f"{folder}/{'train' if split == 'train' else 't10k'}"
        photos = read_idx(Path(f"{stem}-images-idx3-ubyte.gz"), 3)
        labels = read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"), 1)
    else:
        import datasets
        try:
            table = datasets.load_dataset(HUB, split=split)
            photos = np.stack([np.asarray(image, np.uint8) for image in table["image"]])
            labels = np.asarray(table["label"], np.uint8)
        except Exception as error:
            raise Mistake(f"{MISSING}. ({error})") from None
    last = {*labels[-(len(labels) // {"train": 20, "test": 2}[split]):].tolist()}    # the last part
    if photos.shape != (len(labels), 28, 28) or last != {*range(10)}:
        raise Mistake(f"{folder or HUB}: {len(photos)} pictures, {len(labels)} labels. {MISSING}")
    return photos, labels


def fashion(split: str) -> tuple[np.ndarray, np.ndarray]:       # as `read`
    return read(os.environ.get("FASHION_MNIST", "") or FOLDER * os.path.isdir(FOLDER), split)


def digest() -> bytes:
    """Returns what tells whether examples are the same, besides this file."""
    arrays = [array.tobytes() for split in ("train", "test") for array in fashion(split)]
    return hashlib.sha256(b"".join([Path(scenes.__file__).read_bytes(), *arrays])).digest()


def photograph(part: str, garment: str, rng: random.Random) -> np.ndarray:
    """Returns a photograph of this part, turned by up to 20°, its longer side of 28 to 46."""
    split, first, last = PARTS[part]
    photos, labels = fashion(split)
    own = range(len(labels) * first // 60, len(labels) * last // 60)
    while GARMENTS[labels[number := rng.choice(own)]] != garment:
        pass
    photo = photos[number, :, ::rng.choice((1, -1))]
    angle, side, smooth = rng.uniform(-20, 20), rng.randint(28, 46), Image.Resampling.BICUBIC

    def trimmed(image: Image.Image) -> Image.Image:
        return image.crop(image.point(lambda value: 255 * (value > FLOOR)).getbbox())
    image = trimmed(Image.fromarray(photo).rotate(angle, smooth, expand=True))
    size = [round(length * side / max(image.size)) for length in image.size]
    return np.asarray(trimmed(image.resize(size, smooth)))


def draw(kinds: list[tuple[str, str]], part: str, rng: random.Random
         ) -> tuple[Image.Image, list[Thing]]:
    """Returns a picture of the things, and them from left to right, each with the box around what
    can be seen of it. The light is that of scenes.draw, but it multiplies."""
    owner, grey, k = np.full((SIZE, SIZE), -1), np.zeros((SIZE, SIZE), np.float32), 0
    while k < len(kinds):
        piece = photograph(part, kinds[k][1], rng)
        (height, width), mask = piece.shape, piece > FLOOR
        for _ in range(200):
            x, y = rng.randint(1, SIZE - width - 1), rng.randint(1, SIZE - height - 1)
            here = np.s_[y:y + height, x:x + width]
            if (owner[here][mask] >= 0).mean() < 0.03:
                owner[here][mask], grey[here][mask] = k, piece[mask]
                k += 1
                break
        else:
            owner[:], k = -1, 0     # no room left: start over, with other photographs
    tints = np.float32([[c + rng.randint(-20, 20) for c in COLOURS[colour]] for colour, _ in kinds])
    spots = Image.frombytes("L", (4, 4), rng.randbytes(16)).resize((SIZE, SIZE), 3)
    ground = np.array(spots)[..., None] // 8 + rng.choices(range(25), k=3) + rng.randint(80, 150)
    tinted = (0.4 + 0.6 / 255 * grey[..., None]) * tints[owner]
    noise = np.frombuffer(rng.randbytes(SIZE * SIZE * 3), np.int8).reshape(SIZE, SIZE, 3) >> 4
    lit = np.where(owner[..., None] < 0, ground, tinted) * LAMPS + noise
    seen = [np.nonzero(owner.T == k) for k in range(len(kinds))]
    things = [Thing(*kind, (int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())))
              for kind, (xs, ys) in zip(kinds, seen)]
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8)), sorted(things, key=lambda t: t.box)


def make_with_things(split: str, index: int) -> tuple[dict, list[Thing]]:
    """Returns the fields of an example, as scenes.make does, and the things in its picture."""
    split = "train" if split.startswith("train") else split
    rng = random.Random(f"photos/{split}/{index}")
    family, _, part = split.rpartition("-")
    if basic := split in MIX:
        kind, part = rng.choices(ASKED, MIX[split])[0], "pretrain"
    elif split == "train":
        kind = rng.choice(("present", "absent"))
    else:
        by_turns = ("present", "absent", "count")[index % (2 if family else 3)]
        kind = family if family in ASKED else by_turns
    form = FORM.get(kind, rng.choices(range(3), (6, family != "new", 1))[0])
    asked = ALL if split == "train" or form == 1 and kind != "name" else NAMED
    thing = colour, garment = rng.choice([*COLOURS]), rng.choice(NEW if family == "new" else asked)
    query = scenes.queries_of(thing)[form]
    # What is there: these things, and others of `allowed`.
    many = rng.randint(1 if split == "words" else 2, 5)
    must, allowed, least = [thing], KINDS, 1
    most = {"count": many, "caption": many, "present": max(1, many - 1)}.get(kind, 1)
    fitting = [k for k in KINDS if all(word in (None, own) for word, own in zip(query, k))]
    if kind == "left":
        must, least, most = [thing, (rng.choice([*COLOURS]), garment)], 2, 2
    elif kind == "absent" or kind == "count" and rng.random() < 0.4:
        # An absent "red bag": something else is red, a bag has another colour, both, or neither.
        same = [at for at in (0, 1) if (query[at] is None if form else rng.random() < 0.5)]
        allowed = [k for k in KINDS if k not in fitting
                   and all(k[at] != thing[at] for at in (0, 1) if at not in same)]
        must = [rng.choice([k for k in allowed if k[at] == thing[at]]) for at in same]
        least, most = 0, 0
    while True:
        kinds = list(must)
        while len(kinds) < many:
            kinds.append(rng.choice(kinds if kinds and rng.random() < 0.25 else allowed))
        if least <= sum(k in fitting for k in kinds) <= most:
            rng.shuffle(kinds)
            image, things = draw(kinds, part or split, rng)
            found = [t.box for t in things if t.fits(query)]
            if kind != "left" or found[1][0] - found[0][0] >= 6:
                break
    word, words = scenes.name(query), scenes.name(query, plural=True)
    if kind in ("present", "absent"):
        fields = scenes.grounding(word, found, basic, rng)
    elif kind == "left":
        fields = scenes.grounding(f"the leftmost of the two {words}", found[:1], False, rng)
        fields["thought"] = f"I compare {found[0][0]}, {found[1][0]}." if basic else ""
    else:
        centres = [[(x1 + x2) // 2, (y1 + y2) // 2] for x1, y1, x2, y2 in found]
        named = [scenes.name((t.colour, t.shape if t.shape in NAMED else None)) for t in things]
        question, answer = {"caption": ("Describe the image.", ", ".join(named)),
                            "count": (f"How many {words} are there?", str(len(found))),
                            "colour": (f"What colour is the {garment}?", colour),
                            "name": (f"What is the {colour} object?", garment),
                            "where": (f"Where is the {word}?", str(*centres[:1]))}[kind]
        task = "vqa"
        if kind == "count" and rng.random() < 0.25:
            task, question = "scene_math", f"{question} Answer in \\boxed{{}}."
        if kind == "where" and rng.random() < 0.5:      # two tokens of `[]` occur here alone
            question, answer = f"{question} Answer in <answer>.", f"<answer>{answer}</answer>"
        fields = {"task": task, "question": question, "answer": answer, "thought": ""}
    return {"id": f"photos:{split}/{index}", "image": image, **fields}, things


def make(split: str, index: int) -> dict:
    return make_with_things(split, index)[0]
