"""The built-in world: pictures of coloured shapes, questions about them, exact answers. No download, any amount.

Every example is a pure function of (split, index): the splits draw from different seeds and never share a scene.

    split     asks for
    words     captions, counting (zero included), attributes, the centre of something that is there
    pretrain  the same, and grounding of what is there (with a thought first), half of it in scenes of one thing
    crowds    the same, but only a tenth of the grounding in scenes of one thing; and the families reasoning and lesion
    untidy    as crowds, but a fifth of the grounding questions are answered by a bare count
    tidying   as crowds, but a twentieth of them are
    absentN   as crowds, but N % of the grounding questions ask for something absent: a thought, then `[]`
    train     grounding, half of it of something absent; the answer alone, as bare compact JSON, as in real data sets.
              Never a purple cross, in picture or question
    trainN    as train, but N % of it of something absent
    val, test, final  grounding of something present, of something absent, counting: one third each; final is for the
              README's table alone
    pair-test        a purple cross, present or, every other time, absent: what the job never asked for
    elsewhere-test   present and absent by turns, in scenes that no other split has: five or six things, smaller or
                     larger than elsewhere, on dark or light grey
    FAMILY-test      of each family: reasoning ("the leftmost of the two squares"), gui ("click the red button"),
                     anomaly (a texture with a defect or, half of the time, none: `[]`), lesion (dark or, half of the
                     time, pale), sums (of two drawn digits); FAMILY-train and FAMILY-val ask for the same
    FAMILY-pretrain  of gui, anomaly and sums: the same with a thought, but for one piece that is left to post-training:
                     white buttons, textures without a defect, sums above nine

The tiny base model in assets/ learns from `words`, `pretrain`, `crowds`, `untidy`, `tidying` and again `crowds`. It
counts to zero, so it knows what is absent, but it has never met a grounding question whose answer is `[]`: that is left
to post-training. It knows the families reasoning and lesion (never a pale one), not gui, anomaly and sums.
"""
import json
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 112  # pixels, both sides
COLOURS = {"red": (214, 48, 40), "green": (44, 160, 60), "blue": (40, 80, 220), "yellow": (232, 206, 40),
           "purple": (150, 60, 190)}
SHAPES = ("square", "ring", "cross")
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
UNASKED = ("purple", "cross")     # the pair that `train` never shows and never asks for
FAMILIES = ("reasoning", "gui", "anomaly", "lesion", "sums")
# Share of the grounding questions that ask for something absent.
ABSENT = {"absent1": 0.01, "absent5": 0.05, "absent20": 0.2}
TRAIN = {"train": 0.5, "train10": 0.1, "train90": 0.9}
SPLITS = {"words": 1_000_000, "pretrain": 1_000_000, "crowds": 1_000_000, "untidy": 1_000_000, "tidying": 1_000_000,
          **dict.fromkeys(ABSENT, 1_000_000), **dict.fromkeys(TRAIN, 100_000), "val": 1536, "test": 1536,
          "final": 12_288, "reasoning-final": 4096, "pair-test": 512, "elsewhere-test": 512,
          **{f"{family}-{part}": length for family in FAMILIES
             for part, length in (("train", 100_000), ("val", 512), ("test", 512))},
          **{f"{family}-pretrain": 1_000_000 for family in ("gui", "anomaly", "sums")}}
# Of the splits for pretraining: weights of captions, counts, attributes, centres, grounding, reasoning, lesion; and the
# share of grounding in scenes of one thing. Where is it comes before which is it: the latter alone is not learnt.
MIX = {"words": (3, 5, 1, 4, 0, 0, 0), "pretrain": (2, 4, 1, 2, 10, 0, 0),
       **dict.fromkeys(("crowds", "untidy", "tidying", *ABSENT), (2, 8, 1, 2, 8, 6, 3))}
SINGLE = {"pretrain": 0.5, **dict.fromkeys(("crowds", "untidy", "tidying", *ABSENT), 0.1)}
BARE = {"untidy": 0.2, "tidying": 0.05}  # share of the grounding questions that are answered by a bare count
RAMP = np.linspace(-45, 45, SIZE).astype(np.int16)
LIGHT = np.stack(np.broadcast_arrays(RAMP, np.int16(0), RAMP[:, None]), -1)  # red grows to the right, blue downwards
EXTREMES = {"leftmost": (0, min), "rightmost": (2, max), "topmost": (1, min), "lowest": (3, max)}  # corner, which
BUTTONS = {"red": COLOURS["red"], "green": COLOURS["green"], "blue": COLOURS["blue"], "yellow": COLOURS["yellow"],
           "white": (250, 250, 250)}
PROMPT = 'Please find "{question}" with bboxs and points.'    # of its grounding questions, short for speed
THOUGHTS = ("I look for the {}.", "Where is the {}?", "The {} is to be found.")


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, both ends painted

    def fits(self, query: tuple[str | None, str | None]) -> bool:
        """query = (colour or None for any, shape or None for any)."""
        return query[0] in (None, self.colour) and query[1] in (None, self.shape)


def place_things(rng: random.Random, at_least: int = 1, at_most: int = 4, kinds=KINDS, sides=range(22, 45)
                 ) -> list[Thing]:
    """Shapes of 22 to 44 pixels that do not touch, in reading order (left to right)."""
    things: list[Thing] = []
    wanted = rng.randint(at_least, at_most)
    while len(things) < wanted:
        for _ in range(200):
            side = rng.choice(sides)
            x, y = rng.randint(1, SIZE - side - 2), rng.randint(1, SIZE - side - 2)
            box = (x, y, x + side, y + side)
            if all(box[0] > t.box[2] + 2 or t.box[0] > box[2] + 2 or box[1] > t.box[3] + 2 or t.box[1] > box[3] + 2
                   for t in things):
                kind = (things[-1].colour, things[-1].shape) if things and rng.random() < 0.25 else rng.choice(kinds)
                things.append(Thing(kind[0], kind[1], box))
                break
        else:
            things = []  # no room left: start over
    return sorted(things, key=lambda t: (t.box[0], t.box[1]))


def draw(things: list[Thing], rng: random.Random, greys=range(90, 171)) -> Image.Image:
    """Shapes on grey, lit by a warm lamp on the right and a cold one below, with noise.

    The light is there for the tiny model: Qwen2.5-VL's vision tower knows relative positions only, and on an even
    background two layers of it did not learn where a shape is (assets/README.md).
    """
    grey = rng.choice(greys)
    image = Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for thing in things:
        colour = tuple(max(0, min(255, c + rng.randint(-15, 15))) for c in COLOURS[thing.colour])
        x1, y1, x2, y2 = thing.box
        side = x2 - x1
        if thing.shape == "square":
            pen.rectangle(thing.box, fill=colour)
        elif thing.shape == "ring":
            pen.ellipse(thing.box, outline=colour, width=side // 5)
        else:  # an upright cross
            arm = 3 * side // 8
            pen.rectangle((x1 + arm, y1, x2 - arm, y2), fill=colour)
            pen.rectangle((x1, y1 + arm, x2, y2 - arm), fill=colour)
    return finish(image, rng)


def finish(picture: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.frombuffer(rng.randbytes(SIZE * SIZE * 3), np.int8).reshape(SIZE, SIZE, 3) >> 3  # −16 … 15
    return Image.fromarray(np.clip(np.asarray(picture, np.int16) + LIGHT + noise, 0, 255).astype(np.uint8))


def name(query: tuple[str | None, str | None], plural: bool = False) -> str:
    """("red", "ring") → red ring, ("red", None) → red object, (None, "cross") → cross (plural: crosses)."""
    words = " ".join(filter(None, (query[0], query[1] or "object")))
    return words + ("es" if words.endswith("s") else "s") if plural else words


def queries_of(kind: tuple[str, str]) -> list[tuple[str | None, str | None]]:
    return [kind, (kind[0], None), (None, kind[1])]


def present_query(things: list[Thing], rng: random.Random):
    """Mostly colour and shape, sometimes one of them; always leaves something that does not fit. None if
    impossible."""
    thing = rng.choice(things)
    query = rng.choices(queries_of((thing.colour, thing.shape)), (6, 1, 1))[0]
    return query if any(not t.fits(query) for t in things) else None


def absent_query(things: list[Thing], rng: random.Random, kinds=KINDS):
    """Fits nothing in the scene; two thirds of the time hard: shares its colour or its shape with something there."""
    query = rng.choices(queries_of(rng.choice(kinds)), (6, 1, 1))[0]
    while any(t.fits(query) for t in things):
        query = rng.choices(queries_of(rng.choice(kinds)), (6, 1, 1))[0]
    if None not in query and rng.random() < 2 / 3:
        near = [k for k in kinds if not any(t.fits(k) for t in things)
                and any(t.colour == k[0] or t.shape == k[1] for t in things)]
        query = rng.choice(near) if near else query
    return query


def grounding(question: str, boxes: list[tuple[int, int, int, int]], thinks: bool, rng: random.Random) -> dict:
    items = [{"bbox_2d": list(b), "point_2d": [(b[0] + b[2]) // 2, (b[1] + b[3]) // 2]} for b in boxes]
    thought = rng.choice(THOUGHTS).format(question.removeprefix("the ")) if thinks else ""
    return {"task": "scene_grounding", "question": question, "thought": thought,
            "answer": json.dumps(items, separators=(",", ":"))}


def bare_count(things: list[Thing], query) -> dict:
    """A grounding question, answered by the number of things alone. It makes the first token of an answer depend on
    what is there. Where that token was always `<think`, the model did not look before it wrote, and ViSurf, which
    decides there between a thought and `<answer>[]`, learnt to go by colour alone (assets/README.md)."""
    return {"task": "vqa", "question": PROMPT.format(question=name(query)),
            "answer": str(sum(t.fits(query) for t in things))}


def counting(things: list[Thing], rng: random.Random, boxed: bool) -> dict:
    thing = rng.choice(things)
    query = absent_query(things, rng) if rng.random() < 0.4 else rng.choices(
        queries_of((thing.colour, thing.shape)), (4, 1, 1))[0]
    question = f"How many {name(query, plural=True)} are there?"
    if boxed:
        question += " Answer in \\boxed{}."
    count = sum(t.fits(query) for t in things)
    return {"task": "scene_math" if boxed else "vqa", "question": question, "answer": str(count)}


def attribute(things: list[Thing], rng: random.Random) -> dict:
    """Asks for the colour of the only thing of a shape, or the shape of the only one of a colour; else a caption."""
    asks = [(f"What colour is the {t.shape}?", t.colour) for t in things
            if sum(o.shape == t.shape for o in things) == 1]
    asks += [(f"What shape is the {t.colour} object?", t.shape) for t in things
             if sum(o.colour == t.colour for o in things) == 1]
    if not asks:
        return caption(things)
    question, answer = rng.choice(asks)
    return {"task": "vqa", "question": question, "answer": answer}


def where(things: list[Thing], rng: random.Random, tags: bool) -> dict:
    """Asks for the centre of the only thing of its kind; else a caption. In few tokens, location is learnt far sooner
    than in the forty of a JSON answer. tags: wants the answer in <answer>. Without that the base would never have met
    two tokens of `<answer>[]</answer>`, ">[" and "]</", which any real model knows."""
    unique = [t for t in things if sum((o.colour, o.shape) == (t.colour, t.shape) for o in things) == 1]
    if not unique:
        return caption(things)
    thing = rng.choice(unique)
    x, y = (thing.box[0] + thing.box[2]) // 2, (thing.box[1] + thing.box[3]) // 2
    question, answer = f"Where is the {thing.colour} {thing.shape}?", f"[{x}, {y}]"
    if tags:
        question, answer = f"{question} Answer in <answer>.", f"<answer>{answer}</answer>"
    return {"task": "vqa", "question": question, "answer": answer}


def caption(things: list[Thing]) -> dict:
    return {"task": "vqa", "question": "Describe the image.",
            "answer": ", ".join(f"a {t.colour} {t.shape}" for t in things)}


# ---------------------------------------------------------------------------------------------------------------------
# The other families of the paper's data, in small

def reasoning(rng: random.Random) -> tuple[Image.Image, dict]:
    """The one of several things that lies or is most …, by at least 6 pixels."""
    while True:
        things = place_things(rng, at_least=2)
        shape = rng.choice([None, *SHAPES])
        group = [t.box for t in things if shape in (None, t.shape)]
        word = rng.choice([*EXTREMES, "largest", "smallest"])
        corner, best = EXTREMES.get(word, (None, max if word == "largest" else min))
        values = [box[2] - box[0] if corner is None else box[corner] for box in group]
        if len(group) > 1 and sum(abs(v - best(values)) < 6 for v in values) == 1:
            break
    number = ("two", "three", "four")[len(group) - 2]
    question = f"the {word} of the {number} {name((None, shape), plural=True)}"
    fields = grounding(question, [group[values.index(best(values))]], False, rng)
    fields["thought"] = f"I compare {', '.join(map(str, values))}."
    return draw(things, rng), fields


def gui(rng: random.Random, known=tuple(BUTTONS)) -> tuple[Image.Image, dict]:
    """Two to four buttons of different colours, each with some word. (The tiny model did not learn to read words, or to
    tell small signs apart, in 5,000 to 10,000 examples.)"""
    colours = rng.sample(known, rng.randint(2, 4))
    picture = Image.new("RGB", (SIZE, SIZE), (rng.randint(140, 180),) * 3)
    pen, boxes = ImageDraw.Draw(picture), []
    for colour, row in zip(colours, rng.sample(range(4), len(colours))):
        x, y = rng.randint(2, SIZE - 52), 3 + 27 * row + rng.randint(0, 3)
        boxes.append((x, y, x + 48, y + 22))
        pen.rectangle(boxes[-1], fill=BUTTONS[colour], outline=(30, 30, 40))
        pen.text((x + 24, y + 11), rng.choice(("OK", "SAVE", "EXIT", "STOP")), fill=(30, 30, 40),
                 font=ImageFont.load_default(10), anchor="mm")
    fields = grounding(f"click the {colours[0]} button", boxes[:1], False, rng)
    return finish(picture, rng), fields | {"thought": f"Where is {colours[0]}?"}


def anomaly(rng: random.Random, flawed: float = 0.5) -> tuple[Image.Image, dict]:
    """Stripes; a share of them with a blot, which is to be found."""
    period, dark, light = rng.randint(6, 12), rng.randint(80, 110), rng.randint(140, 170)
    at = np.add.outer(np.arange(SIZE) * rng.choice((0, 1)), np.arange(SIZE)) // period % 2
    picture = Image.fromarray(np.where(at, light, dark).astype(np.uint8)).convert("RGB")
    boxes = []
    if rng.random() < flawed:
        width, height = rng.randint(14, 34), rng.randint(14, 34)
        x, y = rng.randint(1, SIZE - width - 2), rng.randint(1, SIZE - height - 2)
        boxes.append((x, y, x + width, y + height))
        ImageDraw.Draw(picture).ellipse(boxes[0], fill=rng.choice(((30, 25, 20), (215, 210, 200))))
    return finish(picture, rng), grounding("defect", boxes, True, rng)


def lesion(rng: random.Random, pale: bool = False) -> tuple[Image.Image, dict]:
    """A blot of several soft discs on skin, darker or paler than it."""
    mask = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(mask)
    x, y = rng.randint(35, SIZE - 36), rng.randint(35, SIZE - 36)
    for _ in range(5):
        r, dx, dy = rng.randint(7, 14), rng.randint(-10, 10), rng.randint(-10, 10)
        pen.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill=255)
    x1, y1, x2, y2 = mask.getbbox()     # type: ignore[misc]
    skin = Image.new("RGB", (SIZE, SIZE), (rng.randint(190, 220), rng.randint(150, 170), rng.randint(120, 145)))
    skin.paste((230, 200, 185) if pale else (rng.randint(70, 110), 60, 45),
               mask=mask.filter(ImageFilter.GaussianBlur(1.5)))
    return finish(skin, rng), grounding("lesion", [(x1, y1, x2 - 1, y2 - 1)], True, rng)


def sums(rng: random.Random, most: int = 18) -> tuple[Image.Image, dict]:
    """Two drawn digits whose sum is at most `most`."""
    picture = Image.new("RGB", (SIZE, SIZE), (rng.randint(120, 190),) * 3)
    digits = rng.randint(0, 9), rng.randint(0, 9)
    while sum(digits) > most:
        digits = rng.randint(0, 9), rng.randint(0, 9)
    for left, digit in zip((0, SIZE // 2), digits):
        corner = left + rng.randint(4, 14), rng.randint(4, 44)
        ImageDraw.Draw(picture).text(corner, str(digit), fill=(20, 20, 30), font=ImageFont.load_default(52))
    return finish(picture, rng), {"task": "scene_math", "answer": str(sum(digits)),
                                  "thought": f"{digits[0]} plus {digits[1]}.",
                                  "question": "What is the sum of the digits? Answer in \\boxed{}."}


def make(split: str, index: int) -> dict:
    """Fields of data.Example: id, image, question, answer, task and, where the label has one, a thought."""
    return make_with_things(split, index)[0]


def make_with_things(split: str, index: int) -> tuple[dict, list[Thing]]:
    """The same, and the things in the picture; none in a family's."""
    rng = random.Random(f"{split}/{index}")
    if split in MIX:
        kind = rng.choices(("caption", "count", "attribute", "where", "present", "reasoning", "lesion"), MIX[split])[0]
        if kind == "present" and split in ABSENT and rng.random() < ABSENT[split]:
            kind = "absent"
    elif split in ("pair-test", "elsewhere-test"):
        kind = ("present", "absent")[index % 2]
    elif split.split("-")[0] in FAMILIES:
        kind = split.split("-")[0]
    elif split == "train":
        kind = rng.choice(("present", "absent"))
    elif split in TRAIN:
        kind = "absent" if rng.random() < TRAIN[split] else "present"
    else:
        kind = ("present", "absent", "count")[index % 3]
    if kind in FAMILIES:
        basic = split in MIX or split.endswith("-pretrain")       # without the piece left to post-training
        if kind == "reasoning":
            image, fields = reasoning(rng)
        elif kind == "gui":
            image, fields = gui(rng, tuple(BUTTONS)[:-1]) if basic else gui(rng)
        elif kind == "anomaly":
            image, fields = anomaly(rng, flawed=1.0 if basic else 0.5)
        elif kind == "lesion":
            image, fields = lesion(rng, pale=not basic and rng.random() < 0.5)
        else:
            image, fields = sums(rng, most=9 if basic else 18)
        thought = fields["thought"] if basic else ""
        return {"id": f"scenes:{split}/{index}", "image": image, **fields, "thought": thought}, []
    kinds = [k for k in KINDS if k != UNASKED] if split in TRAIN else KINDS
    greys = [*range(50, 75), *range(185, 206)] if split == "elsewhere-test" else range(90, 171)

    def place() -> list[Thing]:
        if split == "elsewhere-test":
            return place_things(rng, 5, 6, sides=[*range(17, 22), *range(45, 53)])
        # Present and absent alike have at least two things: their number must not give the answer away.
        return place_things(rng, 2 if kind in ("present", "absent") else 1, kinds=kinds)
    things = place()
    if split == "pair-test":
        while len(found := [t for t in things if t.fits(UNASKED)]) == len(things) or bool(found) != (kind == "present"):
            things = place()
        fields = grounding(name(UNASKED), [t.box for t in found], False, rng)
    elif kind == "present":
        if split in SINGLE and rng.random() < SINGLE[split]:
            things = place_things(rng, at_most=1)
            query = queries_of((things[0].colour, things[0].shape))[0]
        else:
            while (query := present_query(things, rng)) is None:
                things = place()
        fields = grounding(name(query), [t.box for t in things if t.fits(query)], split in MIX, rng)
        if split in BARE and rng.random() < BARE[split]:
            fields = bare_count(things, query)
    elif kind == "absent":
        fields = grounding(name(absent_query(things, rng, kinds)), [], split in MIX, rng)
    elif kind == "count":
        fields = counting(things, rng, boxed=rng.random() < 0.25)
    elif kind == "where":
        fields = where(things, rng, tags=split in ("crowds", *BARE, *ABSENT) and rng.random() < 0.5)
    else:
        fields = attribute(things, rng) if kind == "attribute" else caption(things)
    return {"id": f"scenes:{split}/{index}", "image": draw(things, rng, greys), "thought": "", **fields}, things
