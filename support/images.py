"""Pictures as data sets hold them: their size by their own header, the picture as RGB, and where a
cell says it is; and the size that the model takes them in."""
import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000    # of a picture, before it is decoded
# Read, whatever a file is called; JPEG includes MPO. For PostScript Pillow would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MARK = "<image>"            # in a question: here stands its next picture


class Unfit(ValueError):
    """Tells of a picture that can be decoded, but not without a loss or a guess."""


@contextlib.contextmanager
def opened(content):
    """Yields the picture that Pillow opens. content: path, bytes or open file. Raises ValueError,
    which names the file, for whatever Pillow raises on a damaged one."""
    name = f"{content}: " if isinstance(content, Path) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # its limit of pixels (ours is MAX_PIXELS), broken EXIF
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
                yield image
    except Unfit:
        raise
    except Image.DecompressionBombError:
        raise Unfit(f"more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"the image cannot be read: {name}it is damaged, or in none of the formats that are read: "
                         f"{', '.join(FORMATS)}, MPO") from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:150] or type(error).__name__
        raise ValueError(f"the image cannot be read: {name}{reason}") from None


def upright_size(image: Image.Image, rotate: bool) -> tuple[int, int]:
    """Returns (width, height) of an opened picture once it is rotated as its EXIF says. Raises
    Unfit if it has more than MAX_PIXELS, or 16 bits a channel (Pillow would clip them), or if no
    model takes its shape, or if it is to be rotated and `rotate` is False (are the boxes for the
    rotated picture?)."""
    if image.width * image.height > MAX_PIXELS:
        raise Unfit(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
    check_aspect(*image.size)
    if image.mode.startswith(("I", "F")):
        raise Unfit(f"mode {image.mode}: more than 8 bits a channel; store it with 8")
    if getattr(image, "is_animated", False) and image.format != "MPO":      # a camera's MPO holds views of one scene
        raise Unfit("it holds several pictures (an animation, or pages); store the one that is meant")
    # A PNG that is not decoded yet may hold its EXIF behind the pixels: to ask for it would decode
    # them.
    unknown = image.format == "PNG" and "exif" not in image.info
    orientation = 1 if unknown else image.getexif().get(0x0112, 1)
    if orientation in range(2, 9) and not rotate:
        raise Unfit("EXIF says that it is to be rotated; store it upright, its boxes too")
    lying = orientation in range(5, 9) and image.format != "TIFF"      # a TIFF's size is the rotated one
    return image.size[::-1] if lying else image.size


def picture_size(content, rotate: bool = False) -> tuple[int, int]:
    """Returns (width, height) as the header says; nothing is decoded. content: path, bytes or open
    file. Raises ValueError as upright_size does."""
    with opened(content) as image:
        return upright_size(image, rotate)


def open_image(content, rotate: bool = False, size: tuple[int, int] | None = None) -> Image.Image:
    """Returns a picture as RGB; with `rotate` upright, as ImageOps.exif_transpose makes it. Grey,
    palettes, CMYK and opaque alpha become RGB. size: what picture_size gave earlier. Raises
    ValueError if it cannot be read, has another size now, or would lose or guess something
    (upright_size; transparency: over what?)."""
    with opened(content) as image:
        found = upright_size(image, rotate)
        if size not in (None, found):
            raise Unfit("the picture is {}×{} pixels now; it was {}×{} when the data was opened".format(*found, *size))
        image.load()
        upright_size(image, rotate)
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data and upright.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise Unfit("it is partly transparent; store it over the background it is meant for")
        return upright.convert("RGB")


def each(pictures: Iterable, use: Callable) -> list:
    """Returns use(picture) of each. If there are several, a ValueError says which one it was."""
    pictures, made = list(pictures), []
    for number, picture in enumerate(pictures, 1):
        try:
            made.append(use(picture))
        except ValueError as error:
            which = f"picture {number} of {len(pictures)}: " if len(pictures) > 1 else ""
            raise ValueError(f"{which}{error}") from None
    return made


def marked(question: str, pictures: int) -> str:
    """Returns a question with one <image> where each picture stands, or without any: then all
    pictures come first. So the mark of a single picture goes if the question begins or ends with
    it. Raises ValueError if there are not as many marks as pictures."""
    marks = question.count(MARK)
    if marks and not pictures:
        raise ValueError(f"no picture: the question names one by {MARK}")
    if marks not in (0, pictures):
        raise ValueError(f"the question names {marks} picture(s) by {MARK}, and has {pictures}")
    return re.sub(rf"^\s*{MARK}\s*|\s*{MARK}\s*$", "", question) if marks == 1 else question


def pictures_in(cell, folder: Path) -> list:
    """Returns the paths or open files in a cell of a picture column. A cell is null, a picture
    (`picture_in`), or a list of pictures."""
    if cell is None or cell == [None]:
        return []
    return each(cell if isinstance(cell, list) else [cell], lambda one: picture_in(one, folder))


def picture_in(value, folder: Path):
    """Returns the path or open file of a picture: {"bytes": …, "path": …}, bytes, or a path
    relative to `folder`."""
    if value is None:
        raise ValueError("the picture is null")
    if isinstance(value, dict):
        if not value.keys() & {"bytes", "path"}:
            raise ValueError(f"the picture is a record of {', '.join(value)}; it must hold bytes or a path")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("the picture holds neither bytes nor a path")
    if isinstance(value, str):
        return picture_file(value, folder)
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if not hasattr(value, "read"):
        raise ValueError(f"the picture is a {type(value).__name__}; it must be bytes or a path")
    return value


def picture_file(name: str, folder: Path) -> Path:
    """Returns the file of a picture. Raises ValueError if it is none: to open a pipe would wait for
    ever."""
    shown = name if len(name) <= 80 else name[:60] + " …"
    if name.lower().startswith("data:"):
        raise ValueError(f"the image is a data: URI ({shown[:30]}); store it as a file or as bytes")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise ValueError(f"the image is an address ({shown}); download it and give the file's path")
    path = folder / name
    try:
        if path.is_file():
            return path
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "is no file"
    except (OSError, ValueError):       # too long for a name, or a NUL in it
        what = "is no file"
    if what == "is no file" and len(name) > 40 and re.fullmatch(r"[A-Za-z0-9+/_-]+={0,2}", re.sub(r"\s", "", name)):
        raise ValueError(f"the image looks like base64 text ({name[:20]} …); store it as a file or as bytes")
    raise ValueError(f"the image cannot be read: {shown if what == 'is no file' else path} {what}")


def check_aspect(width: int, height: int) -> None:
    """Raises Unfit if the model takes no picture of this shape."""
    if max(height, width) > 200 * min(height, width):
        raise Unfit(f"an image of {width}×{height} pixels is more than 200 times as long as it is "
                    "wide")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int
                 ) -> tuple[int, int]:
    """Returns a size by Qwen2.5-VL's rule: each side to a multiple of `factor` (round half to
    even), then both scaled by one ratio if the area leaves [min_pixels, max_pixels].

    >>> smart_resize(112, 112, 28, 3136, 12845056), smart_resize(30, 100, 28, 3136, 12845056)
    ((112, 112), (28, 112))
    """
    check_aspect(width, height)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor)
                for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w
