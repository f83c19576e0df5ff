"""What the network sees: training pictures under today's augmentation, epoch by epoch, on one sheet.

    python src/preview.py                                                     # as params.yaml has it
    python src/preview.py -S augment.rotation=20 -S augment.color_jitter=0.4  # before training with it
    python src/preview.py --pictures 4 --epochs 3 --output results/more.png

The random draws are those of training with these settings, and so is what mixup mixes. Needs data/prepared, and writes
nothing but the sheet.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import augment, backbones, canvas, experiment, images, params, stage, training
from finetune.canvas import GRAY, INK, PAPER, TILE, font, shortened
from finetune.errors import UserError
from finetune.files import replaced

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MOST_CLASSES = 8
ROWS = 4  # of all classes together, where --pictures does not say how many
GAP, MARGIN, LINE = 8, 20, 18  # px: between tiles, around the sheet, of a line of text
SPAN = 2.5  # the values from -SPAN to SPAN are shown from black to white


@dataclass(frozen=True)
class View:
    """A picture as it goes into the network."""

    pixels: Tensor  # [3, size, size] float32, normalised
    note: str = ""  # what it is mixed with


@dataclass(frozen=True)
class Strip:
    """A row of the sheet: a line of text, and a tile with its note for each column, or no tile."""

    title: str
    detail: str
    tiles: list[Image.Image | None]
    notes: list[str]


def main() -> None:
    parser = params.parser(__doc__)
    parser.add_argument(
        "--pictures", type=int, metavar="N", help=f"of each class (default: so many that there are {ROWS} rows)"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", default=4, help="how many, from the first on (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        default=Path("results/preview.png"),
        help="the sheet (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.epochs < 1 or (args.pictures is not None and args.pictures < 1):
        raise UserError("--pictures and --epochs should be 1 or more.")
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output} should end in .png.")
    settings, store = experiment.prepared(args.changes)
    mean, std = normalization(settings, store)

    positions = chosen(store, args.pictures)
    columns: list[Iterable[View | None]] = [plain_views(store, settings, positions, mean, std)]
    columns += [epoch_views(store, settings, epoch, positions, mean, std) for epoch in range(args.epochs)]
    rows = list(zip(*columns, strict=True))
    labels = [store.classes[store.labels[i]] for i in store.indices("train")[positions]]
    files = [Path(store.paths[i]).name for i in store.indices("train")[positions]]
    strips = [picture_strip(*row, mean, std) for row in zip(labels, files, rows, strict=True)]
    strips.append(values_strip(rows[0], mean, std))
    about = [described(settings.augment), f"{settings.data.image_size} px, seed {settings.seed}"]
    if len(store.classes) > len(set(labels)):
        about[1] += f", {len(set(labels))} of {len(store.classes)} classes"
    headings = ["as evaluated", *(f"epoch {epoch + 1}" for epoch in range(args.epochs))]
    with replaced(args.output) as temporary:
        sheet(about, headings, strips).save(temporary, format="PNG", optimize=True)
    print(f"{args.output}: {len(rows)} pictures; {'; '.join(about)}")


# What the network gets ------------------------------------------------------------------------------------------------


def normalization(settings: params.Params, store: images.ImageStore) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by which training with these settings normalises."""
    if settings.augment.normalize == "data":
        return store.manifest["mean"], store.manifest["std"]
    return backbones.normalization(backbones.canonical_name(settings.model_name), settings.backbone.weights)


def chosen(store: images.ImageStore, number: int | None) -> list[int]:
    """Return positions in the training split: the first pictures of each class, `number` or as many as ROWS allows."""
    labels = store.labels[store.indices("train")]
    classes = np.unique(labels)[:MOST_CLASSES]
    number = number or max(1, ROWS // len(classes))
    return [position for label in classes for position in np.flatnonzero(labels == label)[:number].tolist()]


def plain_views(
    store: images.ImageStore,
    settings: params.Params,
    positions: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[View]:
    """Return how evaluation shows the pictures at these positions in the training split."""
    indices, size = store.indices("train")[positions], settings.data.image_size
    boxes = augment.center_crops(store.heights[indices], store.widths[indices], size)
    batch = augment.crop_resize([store[i] for i in indices], boxes, size)
    return [View(pixels) for pixels in augment.normalize(batch, mean, std)]


def epoch_views(
    store: images.ImageStore,
    settings: params.Params,
    epoch: int,
    positions: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[View | None]:
    """Yield how the epoch shows them when they come for the first time; None for one that it does not have."""
    size, visits = settings.data.image_size, training.visits(settings, store, epoch)
    for position in positions:
        if position not in visits.positions:  # the sampler has left it out
            yield None
            continue
        place = int(np.flatnonzero(visits.positions == position)[0])
        batch = next(each for each in visits.steps if each.start <= place < each.stop)
        partner = place - 1 if place > batch.start else batch.stop - 1  # mixup's
        pair = np.array([partner, place])
        own = augment.rows_of(visits.draws, pair)
        pictures = [store[i] for i in visits.indices[pair]]
        pixels = augment.normalize(augment.augmented(pictures, own, settings.augment, size), mean, std)
        note = ""
        if "mixup" in own:
            pixels, _ = augment.mixup(pixels, torch.eye(2), own["mixup"])
            note = f"+ {1 - own['mixup'][1]:.0%} {store.paths[visits.indices[partner]].partition('/')[2]}"
        yield View(pixels[1], note)


# How it is shown ------------------------------------------------------------------------------------------------------


def described(settings: params.Augment) -> str:
    """Return what is switched on of the augmentation, in a line."""
    share = f" ({settings.min_scale:g} to 1 of the area)" if settings.crop == "random_resized" else ""
    operations = f"RandAugment {settings.rand_augment_ops} of magnitude {settings.rand_augment_magnitude}"
    parts = [
        (True, f"crop {settings.crop}{share}"),
        (settings.flip, f"flip {settings.flip:g}"),
        (settings.rotation, f"rotation ±{settings.rotation:g}°"),
        (settings.color_jitter, f"color_jitter {settings.color_jitter:g}"),
        (settings.rand_augment_ops, operations),
        (settings.mixup, f"mixup {settings.mixup:g}"),
    ]
    return ", ".join(words for is_on, words in parts if is_on)


def picture_strip(
    label: str, file: str, views: Sequence[View | None], mean: Sequence[float], std: Sequence[float]
) -> Strip:
    """Return the row of a picture, as one sees it: without the normalisation."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    tiles = [tile(view.pixels * scale + shift, TILE) if view else None for view in views]
    return Strip(label, file, tiles, [view.note if view else "not drawn" for view in views])


def values_strip(views: Sequence[View | None], mean: Sequence[float], std: Sequence[float]) -> Strip:
    """Return the row of a picture's normalised values, smaller, with their range in numbers."""
    minus, divided = (", ".join(f"{value:.3f}" for value in values) for values in (mean, std))
    tiles = [tile((view.pixels + SPAN) / (2 * SPAN), TILE // 2) if view else None for view in views]
    ranges = [
        f"{view.pixels.min():.2f} to {view.pixels.max():.2f}, mean {view.pixels.mean():.2f}" if view else ""
        for view in views
    ]
    detail = f"the first one's, minus {minus}, divided by {divided}; black is {-SPAN}, white {SPAN}"
    return Strip("input values", detail, tiles, ranges)


def tile(pixels: Tensor, size: int) -> Image.Image:
    """Return [3, side, side] values of 0 to 1 as a square of about `size` px."""
    return canvas.tile((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), size)


def sheet(about: Sequence[str], headings: Sequence[str], strips: Sequence[Strip]) -> Image.Image:
    """Return the sheet: lines about all, a heading for each column, and the strips."""
    title, text, small = font(19), font(12), font(10)
    sides = [max(tile.height for tile in strip.tiles if tile) for strip in strips]
    step = max(sides) + GAP
    width = 2 * MARGIN + len(headings) * step - GAP
    tops = [MARGIN + 32 + LINE * (len(about) + 1) + 2 * GAP]
    for strip, side in zip(strips, sides, strict=True):
        tops.append(tops[-1] + LINE + side + (LINE if any(strip.notes) else 0) + GAP)
    picture = Image.new("RGB", (width, tops[-1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    lefts = range(MARGIN, width - MARGIN, step)

    def write(left: int, top: int, words: str, style: canvas.Font, color: canvas.Color, room: int) -> None:
        draw.text((left, top), shortened(words, style, room), color, style)

    draw.text((MARGIN, MARGIN), "What the network sees in training", INK, title)
    for number, line in enumerate(about):
        write(MARGIN, MARGIN + 32 + LINE * number, line, text, GRAY, width - 2 * MARGIN)
    for left, heading in zip(lefts, headings, strict=True):
        write(left, tops[0] - LINE - GAP, heading, text, INK, step - GAP)
    for strip, top, side in zip(strips, tops[:-1], sides, strict=True):
        draw.text((MARGIN, top), strip.title, INK, text)
        indent = MARGIN + int(text.getlength(strip.title)) + 8
        write(indent, top, strip.detail, text, GRAY, width - MARGIN - indent)
        for left, each, note in zip(lefts, strip.tiles, strip.notes, strict=True):
            if each:
                picture.paste(each, (left, top + LINE))
            write(left, top + LINE + side + 2, note, small, GRAY, step - GAP)
    return picture


if __name__ == "__main__":
    stage.run(main)
