"""The random draws, and each augmentation beside torchvision's own."""

import math

from finetune import augment

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


def picture(seed: int, height: int = 256, width: int = 341) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def test_a_pictures_draw_depends_on_seed_epoch_and_index_alone():
    few, many = augment.epoch_draws(3, 7, 5), augment.epoch_draws(3, 7, 500)
    assert np.array_equal(few, many[:5])
    assert not np.array_equal(few, augment.epoch_draws(3, 8, 5))
    assert not np.array_equal(few, augment.epoch_draws(4, 7, 5))
    assert len(np.unique(many)) == many.size


def test_the_order_is_a_permutation_of_its_own_stream():
    order = augment.epoch_order(0, 1, 100)
    assert sorted(order) == list(range(100))
    assert not np.array_equal(order, augment.epoch_order(0, 2, 100))


def test_each_step_has_a_dropout_seed_that_the_number_of_steps_does_not_change():
    seeds = augment.dropout_seeds(0, 1, 50)
    assert augment.dropout_seeds(0, 1, 7) == seeds[:7]
    others = augment.dropout_seeds(0, 2, 50) + augment.dropout_seeds(1, 1, 50)
    assert len({*seeds, *others}) == 150


def torchvisions_crop(
    monkeypatch, height: int, width: int, min_scale: float, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Return the box that torchvision chooses when its generator gives `draws`."""
    attempts = iter(draws.reshape(-1, 4))
    numbers = iter(())

    def uniform(tensor, low, high):
        nonlocal numbers
        if high == 1.0:  # the area's share, with which an attempt begins
            numbers = iter(next(attempts))
        return tensor.fill_(low + next(numbers) * (high - low))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size: torch.tensor([math.floor(low + next(numbers) * (high - low))])
    )
    params = v2.RandomResizedCrop(224, scale=(min_scale, 1.0)).make_params([torch.empty(3, height, width)])
    return params["top"], params["left"], params["height"], params["width"]


@pytest.mark.parametrize("min_scale", [0.08, 0.25])
@pytest.mark.parametrize(("height", "width"), [(256, 341), (400, 256), (256, 256), (256, 2000), (2000, 256)])
def test_random_resized_crop_is_torchvisions_given_the_same_draw(monkeypatch, height, width, min_scale):
    monkeypatch.setattr(torch, "empty", lambda *size, make=torch.empty: make(*size, dtype=torch.float64))
    draws = np.random.default_rng(height + width).random((100, 4 * augment.ATTEMPTS))
    boxes = augment.random_resized_crops(draws, np.full(100, height), np.full(100, width), min_scale)
    expected = [torchvisions_crop(monkeypatch, height, width, min_scale, row) for row in draws]
    assert np.abs(boxes - expected).max() <= 1  # torchvision keeps the ratio's bounds in 32 bits
    assert (boxes == expected).all(axis=1).mean() > 0.95


def test_crop_and_resize_are_torchvisions():
    pictures = [picture(0), picture(1, 500, 256)]
    boxes = np.array([[3, 5, 200, 150], [100, 0, 90, 120]])
    batch = augment.crop_resize(pictures, boxes, 224)
    for got, source, (top, left, height, width) in zip(batch, pictures, boxes.tolist(), strict=True):
        assert torch.equal(got, functional.resized_crop(as_tensor(source), top, left, height, width, [224, 224]))


@pytest.mark.parametrize(("height", "width"), [(256, 341), (257, 256), (300, 256), (256, 256)])
def test_center_crop_is_torchvisions(height, width):
    source = picture(2, height, width)
    boxes = augment.center_crops(np.array([height]), np.array([width]), 224)
    assert torch.equal(augment.crop_resize([source], boxes, 224)[0], functional.center_crop(as_tensor(source), [224]))


def test_each_picture_is_flipped_by_its_own_draw():
    batch = torch.stack([as_tensor(picture(i, 8, 8)) for i in range(3)])
    flipped = augment.horizontal_flip(batch, np.array([0.1, 0.9, 0.499]))
    assert torch.equal(flipped[0], functional.horizontal_flip(batch[0]))
    assert torch.equal(flipped[1], batch[1])
    assert torch.equal(flipped[2], functional.horizontal_flip(batch[2]))


def test_normalize_is_torchvisions():
    batch = torch.stack([as_tensor(picture(0, 8, 8))])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = functional.normalize(functional.to_dtype(batch, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(augment.normalize(batch, mean, std), expected)
