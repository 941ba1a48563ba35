"""Pictures of answers: sheets of several, and a photo with the boxes of one answer."""
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUTH, PREDICTED = (0, 158, 115), (213, 94, 0)      # Okabe and Ito's green and vermilion
WRONG, LINE = (200, 0, 0), 15


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
    """Wrapped to `width` characters; "…" at the end where `lines` were not enough."""
    wrapped = textwrap.wrap(text, width) or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[:lines - 1], wrapped[lines - 1][:width - 2] + " …"]


def draw_sheet(shown: list[tuple], path: Path, columns: int = 4, side: int = 320) -> None:
    """shown: (eval.Record, data.Prompt, reward terms, right?) of each answer. Its picture with the
    true boxes and masks green and the predicted boxes red; below it the question, the truth, the
    answer and what it earned."""
    width = side + 16
    cells = []
    for record, prompt, terms, right in shown:
        image = prompt.image or Image.new("RGB", (side, LINE), "white")
        ratio = min(side / image.width, side / image.height)      # the aspect stays
        picture = image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))))
        if prompt.example.mask is not None:
            veil = Image.fromarray(prompt.example.mask.astype(np.uint8) * 90)
            picture.paste(TRUTH, (0, 0), veil.resize(picture.size))
        draw_items(picture, record.truth, ratio, TRUTH, 5)
        draw_items(picture, record.predicted, ratio, PREDICTED, 2)
        earned = "  ".join(f"{name} {points:g}" for name, points in terms.items())
        verdict = ("right", TRUTH) if right else ("wrong", WRONG)
        lines = [*((line, "black") for line in cut(f"question: {record.question}", 54, 2)),
                 *((line, TRUTH) for line in cut(f"truth: {prompt.answer}", 54, 2)),
                 *((line, PREDICTED) for line in cut(f"answer: {record.response}", 54, 4)), verdict,
                 *((line, "black") for line in cut(f"earned {sum(terms.values()):g}: {earned}", 54, 2))]
        cell = Image.new("RGB", (width, picture.height + 20 + LINE * len(lines)), "white")
        cell.paste(picture, (8, 8))
        pen = ImageDraw.Draw(cell)
        for at, (line, colour) in enumerate(lines):
            pen.text((8, picture.height + 12 + at * LINE), line, colour, font=ImageFont.load_default(11))
        pen.rectangle((2, 2, width - 3, cell.height - 3), outline=TRUTH if right else WRONG, width=3)
        cells.append(cell)
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (width * min(columns, max(1, len(cells))), 24 + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, text, colour in ((8, "truth", TRUTH), (60, "prediction", PREDICTED)):
        pen.text((x, 5), text, colour, font=ImageFont.load_default(13))
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (c * width, 24 + sum(heights[:r])))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_answer(image: Image.Image, items: list[dict], path: Path) -> None:
    """A photo with the boxes and points of an answer, all in the photo's own pixels."""
    picture = image.copy()
    draw_items(picture, items, 1.0, PREDICTED, max(2, max(image.size) // 300))
    picture.save(path)
