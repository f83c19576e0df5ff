"""Pure batched functions from stored pictures to what the network sees; each picture's random draw.

All randomness of an epoch comes from a counter-based generator keyed by (seed, epoch), and a picture's own from its
row, so neither batch size, order, worker count nor device changes what a picture looks like.
"""

import math
from collections.abc import Callable, Sequence

from finetune.params import Augment

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ATTEMPTS = 10  # at a random crop before the fallback, as torchvision's RandomResizedCrop
# Independent streams of one (seed, epoch). There is room for eight.
ORDER, AUGMENTATION, DROPOUT, COLOR, ROTATION, RAND_AUGMENT, MIXUP, SAMPLER = range(8)
BINS = 31  # of RandAugment's magnitude, as in torchvision
OPERATIONS = (  # RandAugment's, in torchvision's order
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip

Draws = dict[str, np.ndarray]  # an augmentation's random numbers, a row for each picture


# Random draws ---------------------------------------------------------------------------------------------------------


def generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return the generator of one stream of an epoch; its numbers follow from the three arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch * 8 + stream]))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order in which the epoch visits the training pictures: a permutation of range(count)."""
    return generator(seed, epoch, ORDER).permutation(count)


def dropout_seeds(seed: int, epoch: int, steps: int) -> list[int]:
    """Return the seed of torch's own generator (dropout) for each step of the epoch; the first ones for fewer steps."""
    return generator(seed, epoch, DROPOUT).integers(2**63, size=steps).tolist()


def epoch_draws(seed: int, epoch: int, count: int, settings: Augment) -> Draws:
    """Return the epoch's random numbers for the augmentations that are on: row i belongs to training picture i.

        crop            [count, 4 * ATTEMPTS]   in [0, 1)
        flip            [count]                 in [0, 1)
        rotation        [count]                 degrees, counter-clockwise
        color_factors   [count, 4]              of brightness, contrast and saturation; shift of the hue
        color_order     [count, 4]              which of these four comes first, second …
        operations      [count, ops]            of RandAugment: index into OPERATIONS
        signs           [count, ops]            of its magnitude: 1 or -1
        mixup           [count]                 share of the picture itself

    For fewer pictures they are the first rows of those for more. What is switched on or off changes nothing else's.
    """
    draws: Draws = {}
    if settings.crop != "center" or settings.flip:
        numbers = generator(seed, epoch, AUGMENTATION).random((count, 4 * ATTEMPTS + 1))
        draws |= {"crop": numbers[:, :-1]} if settings.crop != "center" else {}
        draws |= {"flip": numbers[:, -1]} if settings.flip else {}
    if settings.rotation:
        draws["rotation"] = generator(seed, epoch, ROTATION).uniform(-settings.rotation, settings.rotation, count)
    if settings.color_jitter:
        numbers = generator(seed, epoch, COLOR).random((count, 8))
        change = settings.color_jitter * (2 * numbers[:, :4] - 1)
        draws["color_factors"] = change * [1, 1, 1, 1 / 4] + [1, 1, 1, 0]
        draws["color_order"] = numbers[:, 4:].argsort(axis=1)  # of equal chances, as the numbers are independent
    if settings.rand_augment_ops:
        numbers = generator(seed, epoch, RAND_AUGMENT).random((count, settings.rand_augment_ops, 2))
        draws["operations"] = (numbers[..., 0] * len(OPERATIONS)).astype(int)
        draws["signs"] = np.where(numbers[..., 1] < 0.5, -1, 1)
    if settings.mixup:
        draws["mixup"] = generator(seed, epoch, MIXUP).beta(settings.mixup, settings.mixup, count)
    return draws


def rows_of(draws: Draws, rows: np.ndarray) -> Draws:
    """Return the draws of some of the pictures, in the order of `rows`."""
    return {name: values[rows] for name, values in draws.items()}


# Stored pictures to a batch -------------------------------------------------------------------------------------------


def augmented(pictures: Sequence[np.ndarray], rows: Draws, settings: Augment, size: int) -> Tensor:
    """Return [height, width, 3] uint8 pictures as the network sees them in training: [n, 3, size, size] uint8.

    Cropped and resized, flipped, rotated, their colours jittered, then RandAugment's operations; each where it is on.
    `rows` are these pictures' own draws, by `epoch_draws` of the same settings.
    """
    heights, widths = np.array([picture.shape[:2] for picture in pictures]).T
    if settings.crop == "random_resized":
        boxes = random_resized_crops(rows["crop"], heights, widths, settings.min_scale)
    elif settings.crop == "random":
        boxes = random_crops(rows["crop"][:, :2], heights, widths, size)
    else:
        boxes = center_crops(heights, widths, size)
    batch = crop_resize(pictures, boxes, size)
    if settings.flip:
        batch = horizontal_flip(batch, rows["flip"], settings.flip)
    if settings.rotation:
        batch = rotate(batch, rows["rotation"])
    if settings.color_jitter:
        batch = color_jitter(batch, rows["color_factors"], rows["color_order"])
    if settings.rand_augment_ops:
        batch = rand_augment(batch, rows["operations"], rows["signs"], settings.rand_augment_magnitude)
    return batch


def random_resized_crops(
    draws: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    min_scale: float,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Return [n, 4] boxes (top, left, height, width) of a random aspect ratio and an area of `min_scale` to 1.

    Up to ten attempts a picture, then the largest centred box whose ratio is allowed: Szegedy et al. 2014,
    arXiv:1409.4842, as torchvision's RandomResizedCrop draws it. `draws` is [n, 4 * ATTEMPTS] in [0, 1).
    """
    area, log_ratio, top, left = draws.reshape(len(draws), ATTEMPTS, 4).transpose(2, 0, 1)
    heights, widths = heights[:, None], widths[:, None]
    area = (min_scale + area * (1 - min_scale)) * heights * widths
    aspect = np.exp(np.log(ratio[0]) + log_ratio * np.log(ratio[1] / ratio[0]))
    w, h = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    drawn = np.stack([top * (heights - h + 1), left * (widths - w + 1), h, w], axis=-1).astype(int)
    first = drawn[np.arange(len(drawn)), fits.argmax(axis=1)]

    h = np.minimum(heights, np.rint(widths / ratio[0]).astype(int))
    w = np.minimum(widths, np.rint(heights * ratio[1]).astype(int))
    largest = np.concatenate([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], first, largest)


def random_crops(draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """Return [n, 4] boxes (top, left, height, width) of size × size pixels; every place has the same chance.

    As torchvision's RandomCrop. `draws` is [n, 2] in [0, 1), of top and left.
    """
    top, left = draws.T * (np.stack([heights, widths]) - size + 1)
    return np.stack(np.broadcast_arrays(top, left, size, size), axis=-1).astype(int)


def center_crops(heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """Return [n, 4] boxes (top, left, height, width) of size × size pixels in the middle of the pictures."""
    top, left = np.rint((heights - size) / 2).astype(int), np.rint((widths - size) / 2).astype(int)
    return np.stack(np.broadcast_arrays(top, left, size, size), axis=-1)


def five_crops(heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """Return [n, 5, 4] boxes (top, left, height, width) of size × size pixels: the corners and the middle.

    Top left, top right, bottom left, bottom right, middle, as torchvision's FiveCrop.
    """
    bottom, right = heights - size, widths - size
    corners = [(top, left, size, size) for top in (0, bottom) for left in (0, right)]
    boxes = [np.stack(np.broadcast_arrays(*corner, heights)[:4], axis=-1) for corner in corners]
    return np.stack([*boxes, center_crops(heights, widths, size)], axis=1)


def crop_resize(pictures: Sequence[np.ndarray], boxes: np.ndarray, size: int) -> Tensor:
    """Return the boxes of [height, width, 3] uint8 pictures, resized: [n, 3, size, size] uint8.

    Bilinear with antialias, as torchvision's resize; a box that has the size already is taken as it is.
    """
    batch = torch.empty(len(pictures), 3, size, size, dtype=torch.uint8)
    for out, picture, (top, left, height, width) in zip(batch, pictures, boxes, strict=True):
        crop = torch.tensor(picture[top : top + height, left : left + width]).permute(2, 0, 1)
        if crop.shape != out.shape:
            crop = functional.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        out.copy_(crop)
    return batch


# A uint8 batch to one that is changed ---------------------------------------------------------------------------------


def horizontal_flip(batch: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    """Return the [n, 3, height, width] batch, mirrored left to right where a picture's draw is below `probability`."""
    mirrored = torch.from_numpy(draws < probability)[:, None, None, None].to(batch.device)
    return torch.where(mirrored, batch.flip(-1), batch)


def rotate(batch: Tensor, angles: np.ndarray) -> Tensor:
    """Return the uint8 [n, 3, height, width] batch, each picture rotated counter-clockwise by its own angle in degrees.

    About its middle, without growing, black where nothing is: torchvision's RandomRotation, but bilinear where that
    takes the nearest pixel, which frays edges.
    """
    height, width = batch.shape[-2:]
    # The grid is computed number by number: a matrix product may round differently with the number of pictures.
    angles = np.radians(angles)
    cos, sin = _per_picture(np.cos(angles), batch)[..., 0], _per_picture(np.sin(angles), batch)[..., 0]
    y = torch.arange(height, device=batch.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=batch.device) - (width - 1) / 2
    grid = torch.stack([(x * cos - y * sin) * (2 / width), (x * sin + y * cos) * (2 / height)], dim=-1)
    return functional.grid_sample(batch.float(), grid, align_corners=False).round_().to(torch.uint8)


def color_jitter(batch: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
    """Return the uint8 [n, 3, height, width] batch, each picture with its own colours, as torchvision's ColorJitter.

    `factors` is [n, 4]: of brightness, contrast and saturation, and the hue's shift as a share of the circle. `order`
    is [n, 4], a permutation of 0 … 3 a picture: which of these comes first. The pixels are whole numbers after each.
    """
    adjusts = (_brightness, _contrast, _saturation, _hue)
    batch = batch.clone()
    # One by one, the pixels stay in the processor's cache: half as long again in groups of the same adjustment.
    for picture, factor, chosen in zip(batch.split(1), factors.tolist(), order.tolist(), strict=True):
        pixels = picture.float()
        for index in chosen:
            pixels = adjusts[index](pixels, factor[index])
        picture.copy_(pixels)
    return batch


def rand_augment(batch: Tensor, operations: np.ndarray, signs: np.ndarray, magnitude: int) -> Tensor:
    """Return the uint8 [n, 3, height, width] batch after RandAugment: each picture's own operations, one after another.

    `operations` [n, ops] are indices into OPERATIONS, `signs` [n, ops] are 1 or -1, for those that have a direction;
    `magnitude` is 0 to BINS - 1. Cubuk et al. 2019, arXiv:1909.13719, with torchvision's operations and magnitudes;
    what is outside a picture is black.
    """
    batch = batch.clone()
    for picture, chosen, directions in zip(batch.split(1), operations.tolist(), signs.tolist(), strict=True):
        changed = picture
        for index, sign in zip(chosen, directions, strict=True):
            changed = _operation(OPERATIONS[index], changed, sign, magnitude)
        picture.copy_(changed)
    return batch


def _operation(name: str, batch: Tensor, sign: int, magnitude: int) -> Tensor:
    from torchvision.transforms.v2 import functional as kernels  # here, as its import delays every script's start

    def strength(most: float) -> float:
        return sign * float(torch.linspace(0.0, most, BINS)[magnitude])

    def affine(translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        center = [0.0, 0.0] if any(shear) else None  # torchvision shears about the corner
        return kernels.affine(batch, 0.0, list(translate), 1.0, list(shear), center=center)

    def changed(adjust: Callable[[Tensor, float], Tensor]) -> Tensor:
        return adjust(batch.float(), 1 + strength(0.9)).to(torch.uint8)

    height, width = batch.shape[-2:]
    match name:
        case "Identity":
            return batch
        case "ShearX":
            return affine(shear=(math.degrees(math.atan(strength(0.3))), 0.0))
        case "ShearY":
            return affine(shear=(0.0, math.degrees(math.atan(strength(0.3)))))
        case "TranslateX":
            return affine(translate=(int(strength(150 / 331 * width)), 0))
        case "TranslateY":
            return affine(translate=(0, int(strength(150 / 331 * height))))
        case "Rotate":
            return kernels.rotate(batch, strength(30.0))
        case "Brightness":
            return changed(_brightness)
        case "Color":
            return changed(_saturation)
        case "Contrast":
            return changed(_contrast)
        case "Sharpness":
            return kernels.adjust_sharpness(batch, 1 + strength(0.9))
        case "Posterize":
            return kernels.posterize(batch, 8 - round(4 * magnitude / (BINS - 1)))
        case "Solarize":
            return kernels.solarize(batch, 255 * float(torch.linspace(1.0, 0.0, BINS)[magnitude]))
        case "AutoContrast":
            return kernels.autocontrast(batch)
        case "Equalize":
            return kernels.equalize(batch)
    raise ValueError(name)


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return (pixels * factor).clamp_(0, 255).floor_()


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    # The mean in 64 bits is exact, so that it does not depend on the order of the sum.
    mean = _gray(pixels).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend(pixels, mean.float(), factor)


def _saturation(pixels: Tensor, factor: float) -> Tensor:
    return _blend(pixels, _gray(pixels), factor)


def _hue(pixels: Tensor, shift: float) -> Tensor:
    """Return the pixels with their hue in HSV shifted by a share of the circle.

    By the formula without case distinctions, three times as fast as torchvision's:
    https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    divisor = chroma.clamp(min=1)  # a gray pixel has no hue, and its chroma of 0 hides any
    of_others = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, of_others) + 6 * shift  # in sixths of the circle
    hue -= (hue / 6).floor_() * 6
    # Red lacks all of the chroma at hue 3, its opposite, and none from a distance of 2 on; green at 5, blue at 1.
    lack = torch.stack([hue - 3, hue - 5, hue - 1], dim=1).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    changed = value[:, None] - chroma[:, None] * lack
    return changed.mul_(255.999 / 255).floor_()  # as torchvision goes from 0 … 1 to whole numbers


def _gray(pixels: Tensor) -> Tensor:
    """Return the luma (ITU-R BT.601) in whole numbers, [n, 1, height, width]."""
    red, green, blue = pixels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()[:, None]


def _blend(pixels: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return `factor` parts of the pixels and 1 - factor of `other`, in whole numbers.

    Multiplied, then added: in one step, as torchvision does, some processors and numbers of threads round otherwise.
    """
    return (pixels * factor).add_(other * (1 - factor)).clamp_(0, 255).floor_()


def _per_picture(values: np.ndarray, batch: Tensor) -> Tensor:
    """Return a number a picture as float32, [n, 1, 1, 1], on the batch's device."""
    return torch.from_numpy(values.astype(np.float32))[:, None, None, None].to(batch.device)


# What goes into the network -------------------------------------------------------------------------------------------


def normalize(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return a uint8 [n, 3, height, width] batch as float32: (value / 255 - mean) / std for each channel."""
    shift, scale = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (mean, std))
    return (batch.float() / 255 - shift) / scale


def mixup(batch: Tensor, targets: Tensor, weights: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the batch and its targets, each picture mixed with the one before it, the first with the last.

    `batch` is [n, 3, height, width] and `targets` [n, classes], both float; `weights` [n] is the picture's own share,
    drawn from a beta distribution. Zhang et al. 2018, arXiv:1710.09412, paired as in torchvision's MixUp.
    """
    share, rest = _per_picture(weights, batch), _per_picture(1 - weights, batch)
    pictures = batch * share + batch.roll(1, 0) * rest
    share, rest = share[:, :, 0, 0], rest[:, :, 0, 0]
    return pictures, targets * share + targets.roll(1, 0) * rest
