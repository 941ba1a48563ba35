"""Draws answers as cards: a picture with boxes, or several pictures, and below what was asked and
answered."""
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUTH, PREDICTED = (0, 158, 115), (213, 94, 0)      # Okabe and Ito's green and vermilion
WRONG = (200, 0, 0)
SIDE = 320      # pixels of a card's picture on a sheet
RIGHT_IS = ("right: as many boxes as targets, and each target has a box with IoU > 0.5. "
            "Of answers without boxes: a score of at least 0.5")


def draw_items(picture: Image.Image, items: list[dict], ratio: float, colour, width: int) -> None:
    """Boxes and points, in pixels of the picture divided by ratio. Of a box far outside the part
    near the picture is drawn: Pillow takes seconds over a million pixels that no one sees."""
    pen, limit = ImageDraw.Draw(picture), 2 * max(picture.size) + width

    def near(corners) -> list[float]:
        return [max(-limit, min(limit, c * ratio)) for c in corners]
    for item in items:
        x1, y1, x2, y2 = near(item["bbox_2d"])
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=width)
        x, y = near(item["point_2d"])
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def cut(text: str, width: int, lines: int) -> list[str]:
    """Wraps a text to `width` characters. Where `lines` are not enough, the last one is "…" and the
    end of the text: an answer stands behind its thought.

    >>> cut("one two three four five", 9, 2)
    ['one two', '… ur five']
    """
    wrapped = textwrap.wrap(text, width) or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[:lines - 1], f"… {text[2 - width:]}"]


def scaled(image: Image.Image, ratio: float) -> Image.Image:
    return image.resize([max(1, round(side * ratio)) for side in image.size])


def side_by_side(images: list[Image.Image], side: int) -> Image.Image:
    """Returns n pictures as one that is `side` wide, ⌈√n⌉ in a line, in the order of reading. Each
    is as large as fits into its share of the width, and as high as wide at most."""
    columns = math.ceil(math.sqrt(len(images)))
    share = side // columns
    small = [scaled(image, (share - 4) / max(image.size)) for image in images]
    lines = [small[i:i + columns] for i in range(0, len(small), columns)]
    tops = [0, *itertools.accumulate(max(image.height for image in line) + 4 for line in lines)]
    made = Image.new("RGB", (side, tops[-1]), "white")
    for line, top in zip(lines, tops):
        for column, image in enumerate(line):
            made.paste(image, (column * share, top))
    return made


def card(image: Image.Image, ratio: float, boxes: list[tuple], lines: list[tuple], mask=None,
         frame=None, size: int = 11) -> Image.Image:
    """Returns a picture, `ratio` times as large, with its boxes and the text below it.

    boxes: (items, colour, width of the pen) of each kind. lines: (text, how many lines it may fill,
    colour). mask: bool [height, width], veiled in green. frame: a colour. size: of the letters."""
    picture = scaled(image, ratio)
    if mask is not None:
        veil = Image.fromarray(mask.astype(np.uint8) * 90)
        picture.paste(TRUTH, (0, 0), veil.resize(picture.size))
    for items, colour, width in boxes:
        draw_items(picture, items, ratio, colour, width)
    wide, high = max(picture.width, SIDE), round(size * 1.36)
    letters = round(wide / size / 0.54)         # of a line: one is about half as wide as it is high
    rows = [(row, colour) for text, most, colour in lines for row in cut(text, letters, most)]
    made = Image.new("RGB", (wide + 16, picture.height + 20 + high * len(rows)), "white")
    made.paste(picture, (8, 8))
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(size)
    for at, (row, colour) in enumerate(rows):
        pen.text((8, picture.height + 12 + at * high), row, colour, font=font)
    if frame:
        pen.rectangle((2, 2, made.width - 3, made.height - 3), outline=frame, width=3)
    return made


def draw_sheet(shown: list[tuple], path: Path, columns: int = 4) -> None:
    """Draws a card of each answer. shown: (eval.Record, data.Prompt, reward terms, right?). True
    boxes and masks are green, predicted boxes red."""
    cells = []
    for record, prompt, terms, right in shown:
        images = prompt.images or [Image.new("RGB", (SIDE, 15), "white")]
        image = images[0] if len(images) == 1 else side_by_side(images, SIDE)
        earned = "  ".join(f"{name} {points:g}" for name, points in terms.items())
        colour = TRUTH if right else WRONG
        cells.append(card(
            image, min(SIDE / image.width, SIDE / image.height),      # the aspect stays
            [(record.truth, TRUTH, 5), (record.predicted, PREDICTED, 2)],
            [(f"question: {record.question}", 2, "black"), (f"truth: {prompt.answer}", 2, TRUTH),
             (f"answer: {record.response}", 4, PREDICTED),
             ("right" if right else "wrong", 1, colour),
             (f"earned {sum(terms.values()):g}: {earned}", 2, "black")],
            prompt.example.mask, colour))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = (SIDE + 16) * min(columns, max(1, len(cells)))
    rules = cut(RIGHT_IS, width // 7, 3)
    top = 26 + 17 * len(rules)
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, text, ink in ((8, "truth", TRUTH), (60, "prediction", PREDICTED)):
        pen.text((x, 5), text, ink, font=ImageFont.load_default(13))
    pen.multiline_text((8, 22), "\n".join(rules), "black", ImageFont.load_default(13), spacing=4)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (c * (SIDE + 16), top + sum(heights[:r])))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_answer(image: Image.Image, items: list[dict], question: str, answer: str, path: Path
                ) -> None:
    """Draws one answer as a card, a small picture several times as large. items: its boxes, in the
    picture's own pixels."""
    ratio = max(1, 448 // max(image.size))       # four times a picture of the built-in world
    longest = max(image.size) * ratio
    card(image, ratio, [(items, PREDICTED, max(2, longest // 300))],
         [(f"question: {question}", 3, "black"), (f"answer: {answer}", 8, PREDICTED)],
         size=max(13, longest // 60)).save(path)
