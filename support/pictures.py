"""Pictures of answers."""
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw_sheet(pairs: list[tuple], path: Path, columns: int = 4, side: int = 320) -> None:
    """pairs: (eval.Record, data.Prompt). A sheet of pictures: true boxes and masks green, predicted boxes red with their point, question and answer
    below."""
    lines_of_text, line = 7, 14
    cell = (side + 8, side + lines_of_text * line + 8)
    shown = [(r, p) for r, p in pairs if p.image is not None]
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(shown) // columns)), "white")
    for at, (record, prompt) in enumerate(shown):
        ratio = side / max(prompt.image.size)
        picture = prompt.image.resize((round(prompt.image.width * ratio), round(prompt.image.height * ratio)))
        if prompt.example.mask is not None:
            tint = Image.fromarray(prompt.example.mask.astype(np.uint8) * 90).resize(picture.size)
            picture.paste((0, 255, 60), (0, 0), tint)
        pen = ImageDraw.Draw(picture)
        for items, colour, width in ((record.truth, (0, 255, 60), 4), (record.predicted, (255, 0, 0), 2)):
            for item in items:
                x1, y1, x2, y2 = (c * ratio for c in item["bbox_2d"])
                pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=width)
                x, y = (c * ratio for c in item["point_2d"])
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        corner = (at % columns * cell[0] + 4, at // columns * cell[1] + 4)
        sheet.paste(picture, corner)
        text = textwrap.wrap(f"Q: {record.question}", 52)[:2] + textwrap.wrap(record.response, 52)
        below = (corner[0], corner[1] + side + 2)
        ImageDraw.Draw(sheet).multiline_text(below, "\n".join(text[:lines_of_text]), "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
