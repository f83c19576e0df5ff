"""What the project's PNGs are drawn with: colours, fonts, tiles; the same picture gives the same bytes.

By Pillow alone. matplotlib would draw the charts in 0.7 s of every experiment, half of them its import.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

from finetune.files import replaced

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, GRAY, PALE, PAPER = (32, 32, 32), (100, 100, 100), (224, 224, 224), (255, 255, 255)
# Blue and vermilion of Okabe and Ito, which those who can't tell red from green tell apart; the latter in text, darker.
BLUE, ORANGE, RUST = (0, 114, 178), (213, 94, 0), (176, 72, 0)
CIVIDIS = np.array([(0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 174, 108), (254, 232, 56)])  # in equal steps
TILE = 144  # px; larger pictures are shown smaller, and small ones at a multiple of their size
COMPRESSION = 3  # a gallery of photographs in 40 ms; 6, zlib's default, takes three times as long to save a tenth


@functools.cache
def font(size: int, bold: bool = False) -> Font:
    """Return a font of that size, in px: DejaVu, which comes with matplotlib and has the letters of most of Europe.

    Without it Pillow's own, which has no accents. Letter by letter, as not every machine can do more.
    """
    package = find_spec("matplotlib")
    folders = package.submodule_search_locations if package else None
    name = f"mpl-data/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf"
    for file in [Path(folder, name) for folder in folders or []]:
        if file.is_file():
            return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.load_default(size)


def shortened(words: str, font: Font, room: float, keep_end: bool = False) -> str:
    """Return the words, or as many of their characters as there is room for, in px, and an ellipsis.

    The first ones, or with `keep_end` the last ones.
    """
    if font.getlength(words) <= room:
        return words
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        kept = "…" + words[-middle:] if keep_end else words[:middle] + "…"
        low, high = (middle, high) if font.getlength(kept) <= room else (low, middle - 1)
    return ("…" + words[len(words) - low :]) if keep_end else words[:low] + "…"


def tile(pixels: np.ndarray, size: int) -> Image.Image:
    """Return [height, width, 3] uint8 of a square as one of about `size` px; small pictures show their pixels."""
    picture, side = Image.fromarray(pixels), pixels.shape[0]
    if side > size:
        return picture.resize((size, size), Image.Resampling.LANCZOS)
    return picture.resize((side * (size // side),) * 2, Image.Resampling.NEAREST)


def write_upwards(picture: Image.Image, middle: tuple[int, int], words: str, font: Font, color: Color) -> None:
    """Write the words from bottom to top, around a point of the picture."""
    width, height = (int(each) for each in font.getbbox(words)[2:])
    mask = Image.new("L", (width + 2, height + 2))
    ImageDraw.Draw(mask).text((1, 1), words, 255, font)
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    picture.paste(color, (middle[0] - mask.width // 2, middle[1] - mask.height // 2), mask)


def save(picture: Image.Image, path: Path) -> None:
    """Write the picture as a PNG without a date or the names of programs."""
    with replaced(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=COMPRESSION)
