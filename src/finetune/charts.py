"""Charts of predictions, as pictures: confusion matrix, ROC, precision and recall, calibration."""

import math
from collections.abc import Iterable, Sequence

from finetune import metrics
from finetune.canvas import BLUE, GRAY, INK, ORANGE, PALE, PAPER, Color, font, shortened, write_upwards

import numpy as np
from PIL import Image, ImageDraw

SIDE = 420  # px, of the square that a chart is in
LEFT, TOP, RIGHT, BOTTOM = 70, 72, 24, 56  # px around it
STRIP = 54  # px, height of the bars that say how many pictures
OVERSAMPLING = 3  # pixels drawn for one pixel of a line, in each direction
DARK = (0, 62, 116)  # of a cell that holds all of its row; white: none
NAME = 120  # px, the longest name of a class beside the matrix
LINE = 15  # px, from one such name to the next
MOST_NUMBERED = 20  # classes, for which the cells have their numbers
MOST_CELLS = 1000  # of a row; with more classes, each cell is of several


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Return the confusion matrix: a row for each actual class, the darker where more of its pictures are."""
    number = min(len(classes), MOST_CELLS)
    cell = max(1, SIDE // number)
    side = cell * number
    rows, columns = (each * number // len(classes) for each in (labels, guesses))
    counts = np.bincount(rows * number + columns, minlength=number**2).reshape(number, number)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    depth = shares if len(classes) <= MOST_NUMBERED else np.sqrt(shares)  # or what is rare would hardly show
    colors = np.array(PAPER) + depth[..., None] * (np.array(DARK) - PAPER)
    cells = Image.fromarray(np.rint(colors).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)

    text, step = font(11), math.ceil(LINE / cell)
    names = [shortened(classes[i * len(classes) // number], text, NAME) for i in range(0, number, step)]
    longest = math.ceil(max(map(text.getlength, names)))
    upright = longest > step * cell - 6
    left, bottom = longest + 42, (longest if upright else LINE) + 38
    picture = Image.new("RGB", (left + side + RIGHT, TOP + side + bottom), PAPER)
    pen = _titled(picture, "Confusion matrix", f"{len(labels):,} pictures; the darker, the larger the share of its row")
    picture.paste(cells, (left, TOP))
    pen.rectangle((left - 1, TOP - 1, left + side, TOP + side), outline=GRAY)
    for place, name in zip(range(0, number, step), names, strict=True):
        middle = place * cell + cell // 2
        pen.text((left - 6, TOP + middle), name, INK, text, anchor="rm")
        if upright:
            below = TOP + side + 8 + math.ceil(text.getlength(name) / 2)
            write_upwards(picture, (left + middle, below), name, text, INK)
        else:
            pen.text((left + middle, TOP + side + 6), name, INK, text, anchor="ma")
    if len(classes) <= MOST_NUMBERED:
        _write_counts(pen, counts, shares, cell, left)
    pen.text((left + side // 2, picture.height - 12), "predicted", INK, font(13), anchor="ms")
    write_upwards(picture, (15, TOP + side // 2), "actual", font(13), INK)
    return picture


def roc(points: Sequence[dict], of: str, auroc: float) -> Image.Image:
    """Return the ROC curve through points with `fpr` and `tpr`; `of` says of what, `auroc` is the metric beside it."""
    picture, _ = _square(
        "ROC", f"{of}; AUROC {auroc:.3f}; dashed: by chance", "false positive rate", "true positive rate"
    )
    _dashed(picture, (0, 0), (1, 1))
    _curve(picture, [(point["fpr"], point["tpr"]) for point in points])
    return picture


def precision_recall(points: Sequence[dict], of: str, share: float) -> Image.Image:
    """Return the curve through points with `recall` and `precision`; `share` of what is asked for has the label."""
    picture, _ = _square("Precision and recall", f"{of}; dashed: by chance", "recall", "precision")
    _dashed(picture, (0, share), (1, share))
    _curve(picture, [(point["recall"], point["precision"]) for point in points])
    return picture


def calibration(logits: np.ndarray, labels: np.ndarray, ece: float) -> Image.Image:
    """Return the reliability diagram: accuracy and mean confidence in each bin of confidence; Guo et al. 2017.

    The bins are those of the expected calibration error `ece`, arXiv:1706.04599. Below, how many pictures each has.
    """
    confidence, bin_of = metrics.confidence(logits)
    count = np.bincount(bin_of, minlength=metrics.BINS)
    hits = np.bincount(bin_of, weights=logits.argmax(axis=1) == labels, minlength=metrics.BINS)
    sums = np.bincount(bin_of, weights=confidence, minlength=metrics.BINS)
    picture, pen = _square(f"Calibration: ECE {ece:.3f}", "", "confidence", "accuracy", STRIP)
    edges = [LEFT + round(SIDE * i / metrics.BINS) for i in range(metrics.BINS + 1)]
    tallest = max(1, count.max())
    for i in np.flatnonzero(count).tolist():
        left, right = edges[i] + 1, edges[i + 1] - 1
        top, mark = (TOP + SIDE - round(SIDE * each[i] / count[i]) for each in (hits, sums))
        pen.rectangle((left, top, right, TOP + SIDE), BLUE)
        pen.rectangle((left, mark - 2, right, mark + 1), ORANGE, outline=PAPER)
        floor = TOP + SIDE + STRIP
        pen.rectangle((left, floor - round((STRIP - 12) * count[i] / tallest), right, floor), GRAY)
    _dashed(picture, (0, 0), (1, 1))
    x = 16
    for color, words in ((BLUE, "accuracy"), (ORANGE, "mean confidence"), (GRAY, "number of pictures")):
        pen.rectangle((x, 43, x + 10, 53), color)
        pen.text((x + 16, 48), words, INK, font(12), anchor="lm")
        x += 34 + int(font(12).getlength(words))
    return picture


def _write_counts(pen: ImageDraw.ImageDraw, counts: np.ndarray, shares: np.ndarray, cell: int, left: int) -> None:
    """Write each cell's number into it, where all have room."""
    size = next((size for size in (20, 16, 13, 11, 9) if font(size).getlength(f"{counts.max()}") < cell - 4), None)
    if size is None:
        return
    for (row, column), count in np.ndenumerate(counts):
        color = PAPER if shares[row, column] > 0.5 else INK if count else GRAY
        middle = (left + column * cell + cell // 2, TOP + row * cell + cell // 2)
        pen.text(middle, f"{count}", color, font(size), anchor="mm")


def _square(title: str, about: str, across: str, up: str, strip: int = 0) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a picture with both axes from 0 to 1, and what draws on it; `strip` px are left below the square."""
    picture = Image.new("RGB", (LEFT + SIDE + RIGHT, TOP + SIDE + strip + BOTTOM), PAPER)
    pen = _titled(picture, title, about)
    for tenths in range(0, 11, 2):
        x, y = LEFT + SIDE * tenths // 10, TOP + SIDE - SIDE * tenths // 10
        pen.line((x, TOP, x, TOP + SIDE), PALE)
        pen.line((LEFT, y, LEFT + SIDE, y), PALE)
        pen.text((x, TOP + SIDE + strip + 8), f"{tenths / 10:g}", INK, font(12), anchor="ma")
        pen.text((LEFT - 8, y), f"{tenths / 10:g}", INK, font(12), anchor="rm")
    pen.rectangle((LEFT, TOP, LEFT + SIDE, TOP + SIDE), outline=GRAY)
    pen.text((LEFT + SIDE // 2, picture.height - 12), across, INK, font(13), anchor="ms")
    write_upwards(picture, (22, TOP + SIDE // 2), up, font(13), INK)
    return picture, pen


def _titled(picture: Image.Image, title: str, about: str) -> ImageDraw.ImageDraw:
    """Return what draws on the picture, which has two lines of text now."""
    pen = ImageDraw.Draw(picture)
    pen.text((16, 14), title, INK, font(17, bold=True))
    pen.text((16, 41), shortened(about, font(12), picture.width - 20), GRAY, font(12))
    return pen


def _curve(picture: Image.Image, points: Sequence[tuple[float, float]]) -> None:
    """Draw a line through points of the square, but for those that are no numbers, as where a class has no pictures."""
    places = np.array([point for point in points if np.isfinite(point).all()]).reshape(-1, 2)
    _draw(picture, [places], BLUE, 2)


def _dashed(picture: Image.Image, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a dashed line between two points of the square."""
    _draw(picture, np.linspace(start, end, 80).reshape(-1, 2, 2), GRAY, 1)


def _draw(picture: Image.Image, lines: Iterable[np.ndarray], color: Color, width: int) -> None:
    """Draw lines of `width` px through points [n, 2] of the square, with smooth edges."""
    mask = Image.new("L", (picture.width * OVERSAMPLING, picture.height * OVERSAMPLING))
    pen = ImageDraw.Draw(mask)
    for points in lines:
        pixels = (np.array([LEFT, TOP + SIDE]) + points * [SIDE, -SIDE]) * OVERSAMPLING + OVERSAMPLING // 2
        corners = dict.fromkeys(map(tuple, np.rint(pixels).astype(int).tolist()))  # many points fall together
        if len(corners) > 1:
            pen.line(list(corners), 255, width * OVERSAMPLING, joint="curve")
    picture.paste(color, (0, 0), mask.reduce(OVERSAMPLING))
