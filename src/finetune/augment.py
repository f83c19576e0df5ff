"""Pure batched functions from stored pictures to what the network sees; each picture's random draw.

All randomness of an epoch comes from a counter-based generator keyed by (seed, epoch), and a picture's own from its
row, so neither batch size, order, worker count nor device changes what a picture looks like.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ATTEMPTS = 10  # at a random crop before the fallback, as torchvision's RandomResizedCrop
DRAWS = 4 * ATTEMPTS + 1  # numbers that a picture's augmentation takes
ORDER, AUGMENTATION, DROPOUT = range(3)  # independent streams of one (seed, epoch)


def generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return the generator of one stream of an epoch; its numbers follow from the three arguments alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch * 8 + stream]))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order in which the epoch visits the training pictures: a permutation of range(count)."""
    return generator(seed, epoch, ORDER).permutation(count)


def epoch_draws(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return [count, DRAWS] numbers in [0, 1): row i belongs to training picture i, however many there are."""
    return generator(seed, epoch, AUGMENTATION).random((count, DRAWS))


def dropout_seeds(seed: int, epoch: int, steps: int) -> list[int]:
    """Return the seed of torch's own generator (dropout) for each step of the epoch; the first ones for fewer steps."""
    return generator(seed, epoch, DROPOUT).integers(2**63, size=steps).tolist()


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


def center_crops(heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """Return [n, 4] boxes (top, left, height, width) of size × size pixels in the middle of the pictures."""
    top, left = np.rint((heights - size) / 2).astype(int), np.rint((widths - size) / 2).astype(int)
    return np.stack(np.broadcast_arrays(top, left, size, size), axis=-1)


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


def horizontal_flip(batch: Tensor, draws: np.ndarray) -> Tensor:
    """Return the [n, 3, height, width] batch, mirrored left to right where the picture's draw is below one half."""
    mirrored = torch.from_numpy(draws < 0.5)[:, None, None, None].to(batch.device)
    return torch.where(mirrored, batch.flip(-1), batch)


def normalize(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return a uint8 [n, 3, height, width] batch as float32: (value / 255 - mean) / std for each channel."""
    mean, std = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (mean, std))
    return (batch.float() / 255 - mean) / std
