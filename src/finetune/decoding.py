"""One encoded picture to RGB pixels of the store's size."""

import contextlib
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Not all that PIL knows: some formats start programs (EPS), some are not pictures.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
MAX_PIXELS = 100_000_000  # in memory at a time; of a JPEG, after its reduction while decoding
MAX_SIDE = 16_384  # px of a resized picture's longer side

ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {  # what turns a picture of that orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What matters of them is in the reason of Undecodable. A filter set for a while is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Undecodable(ValueError):
    """The data can't be decoded as a picture: the message is the reason, in a few words."""


def decode(data: bytes, resize: int) -> np.ndarray:
    """Return the picture as [height, width, 3] uint8, upright, its shorter side exactly `resize` px.

    Transparency is composited on white; of an animation it is the first frame; gray of more than 8 bits is scaled.
    Resized bilinearly with antialias. Raises Undecodable.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            size = _resized(picture.size, resize)
            picture.draft(picture.mode, (2 * resize, 2 * resize))  # a JPEG's own reduction, 2 to 4 times as fast
            if picture.width * picture.height > MAX_PIXELS:
                raise Undecodable(f"too large: {picture.width} × {picture.height} px")
            picture.load()
            method = TRANSPOSE.get(_orientation(picture) or 0)
            rgb = _rgb(picture).resize(size, Image.Resampling.BILINEAR)
            return np.asarray(rgb.transpose(method) if method is not None else rgb)
    except (Undecodable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Undecodable("not a picture of a known format") from None
    except Image.DecompressionBombError:
        raise Undecodable("too large: a decompression bomb") from None
    except Exception as error:  # PIL's plugins raise whatever comes on damaged data
        raise Undecodable(f"truncated or damaged: {' '.join(str(error).split())}") from None


def _resized(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Return (width, height) with `resize` as the shorter side and the same aspect ratio."""
    width, height = size
    short = min(size)
    if short < 1:
        raise Undecodable("no pixels")
    if max(size) * resize > MAX_SIDE * short:
        raise Undecodable(f"too narrow: {width} × {height} px")
    return round(width * resize / short), round(height * resize / short)


def _orientation(picture: Image.Image) -> int | None:
    with contextlib.suppress(Exception):  # damaged EXIF, which says nothing of the pixels
        return picture.getexif().get(ORIENTATION)
    return None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] == "I" or picture.mode == "F":  # "I;16", "I;16B", "I", "F"
        return Image.fromarray(_to_8_bit(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _to_8_bit(gray: np.ndarray) -> np.ndarray:
    """Return the gray values as uint8, their white as 255.

    White is 65535 for 16 bits. 32-bit integers and floats don't say what theirs is: the least of 1 (for floats), 255
    and 65535 that no value exceeds.
    """
    values = np.where(np.isfinite(gray), gray, 0).astype(np.float32)
    white = 65535
    if gray.dtype.itemsize == 4:
        whites = (255, 65535) if gray.dtype.kind == "i" else (1, 255, 65535)
        white = next((each for each in whites if values.max() <= each), 65535)
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
