"""Galleries of predictions: which pictures, and the sheet that shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.canvas import CIVIDIS, GRAY, INK, PAPER, RUST, TILE, font, shortened, tile

import numpy as np
from PIL import Image, ImageDraw

GAP, MARGIN, LINE = 14, 16, 17  # px: between pictures, around the sheet, of a line of text
HEAD = 52  # px, for the title and what it is about
WIDTH = 6  # tiles in a row: so many pictures, or half as many with what decided beside them
VEIL = (0.3, 0.65)  # how much of a pixel is the map's colour, where that is 0 and where it is 1


@dataclass(frozen=True)
class Prediction:
    """A picture, and what the network made of it."""

    pixels: np.ndarray  # [size, size, 3] uint8, as the network sees it
    path: str
    label: str
    guess: str
    probability: float  # of the guess
    loss: float  # nats
    decided: np.ndarray | None = None  # [rows, columns], from 0 to 1: how much each part spoke for the guess


def highest_loss(losses: np.ndarray, number: int) -> list[int]:
    """Return the positions of the `number` pictures of the highest loss, the highest first; of equal ones in order."""
    return np.argsort(-losses, kind="stable")[:number].tolist()


def random(count: int, number: int, seed: int) -> list[int]:
    """Return `number` positions of `count` pictures, which follow from the seed; fewer are the first of more."""
    return np.random.default_rng(seed).permutation(count)[:number].tolist()


def sheet(title: str, predictions: Sequence[Prediction]) -> Image.Image:
    """Return the sheet of the predictions, row by row. All of them show what decided, or none does."""
    pairs = predictions[0].decided is not None
    about = "left what the network sees, right what spoke for its prediction: the more, the yellower" if pairs else ""
    side = tile(predictions[0].pixels, TILE).width
    across = WIDTH // 2 if pairs else WIDTH
    step = side * (2 if pairs else 1) + GAP + (2 if pairs else 0)
    rows = -(-len(predictions) // across)
    width = 2 * MARGIN + min(across, len(predictions)) * step - GAP
    picture = Image.new("RGB", (width, HEAD + rows * (side + 3 * LINE + GAP) + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, 10), shortened(title, font(17, bold=True), width - 2 * MARGIN), INK, font(17, bold=True))
    pen.text((MARGIN, 33), shortened(about, font(11), width - 2 * MARGIN), GRAY, font(11))
    for number, each in enumerate(predictions):
        left, top = MARGIN + number % across * step, HEAD + number // across * (side + 3 * LINE + GAP)
        shown = tile(each.pixels, TILE)
        picture.paste(shown, (left, top))
        if each.decided is not None:
            picture.paste(laid_over(shown, each.decided), (left + side + 2, top))
        _caption(pen, (left, top + side + 2), each, step - GAP)
    return picture


def laid_over(picture: Image.Image, decided: np.ndarray) -> Image.Image:
    """Return the picture in grey under the map's colours, from dark blue for 0 to yellow for 1."""
    values = Image.fromarray(np.rint(decided * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    steps = np.linspace(0, 255, len(CIVIDIS))
    table = np.stack([np.interp(np.arange(256), steps, channel) for channel in CIVIDIS.T], axis=1)
    veil = np.linspace(*VEIL, 256)[np.asarray(values)][..., None]
    grey = np.asarray(picture.convert("L"))[..., None]
    return Image.fromarray(np.rint((1 - veil) * grey + veil * table[np.asarray(values)]).astype(np.uint8))


def _caption(pen: ImageDraw.ImageDraw, place: tuple[int, int], each: Prediction, room: int) -> None:
    """Write label and loss, the prediction (a wrong one in another colour) with its probability, and the path."""
    wrong, text = each.guess != each.label, font(11)
    sure = f" {each.probability:.1%}"
    loss = f"  loss {max(0.0, each.loss):.2f}"  # which may be -0.0
    lines = [
        (shortened(f"label {each.label}", text, room - text.getlength(loss)) + loss, INK),
        (shortened(f"predicted {each.guess}", text, room - text.getlength(sure)) + sure, RUST if wrong else INK),
        (shortened(each.path, text, room, keep_end=True), GRAY),
    ]
    for number, (words, color) in enumerate(lines):
        pen.text((place[0], place[1] + number * LINE), words, color, text)
