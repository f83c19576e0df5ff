"""The random draws, and each augmentation beside torchvision's own."""

import itertools
import math
import zlib

from finetune import augment, params
from helpers import ROOT

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

EVERYTHING = {"rotation": 30.0, "color_jitter": 0.4, "rand_augment_ops": 2, "mixup": 0.2}


def settings(**changes) -> params.Augment:
    """Return the project's own settings, with changes."""
    return params.load(ROOT / "params.yaml", [f"augment.{key}={value}" for key, value in changes.items()]).augment


def picture(seed: int, height: int = 256, width: int = 341) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_batch(count: int, size: int = 64) -> torch.Tensor:
    """Return [count, 3, size, size] uint8 pictures with areas, edges of colour, and some gray and black in them."""
    coarse = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (count, 3, 7, 7)).astype(np.float32))
    batch = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)
    batch[:, :, :8, :8] = batch[:, :1, :8, :8]
    batch[:, :, 8:12, :8] = 0
    return batch


def difference(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the largest difference of two batches, in levels of 255."""
    assert got.dtype == expected.dtype == torch.uint8
    return int((got.int() - expected.int()).abs().max())


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def test_a_pictures_draw_depends_on_seed_epoch_and_index_alone():
    on = settings(**EVERYTHING)
    few, many = augment.epoch_draws(3, 7, 5, on), augment.epoch_draws(3, 7, 500, on)
    other_epoch, other_seed = augment.epoch_draws(3, 8, 5, on), augment.epoch_draws(4, 7, 5, on)
    assert few.keys() == {
        "crop", "flip", "rotation", "color_factors", "color_order", "operations", "signs", "mixup",
    }  # fmt: skip
    for name, values in few.items():
        assert np.array_equal(values, many[name][:5])
        assert not np.array_equal(values, other_epoch[name])
        assert not np.array_equal(values, other_seed[name])
    for name in ("crop", "flip", "rotation", "color_factors", "mixup"):
        assert len(np.unique(many[name])) == many[name].size


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"crop": "center"}, {"crop"}),
        ({"flip": 0}, {"flip"}),
        ({"rotation": 0}, {"rotation"}),
        ({"color_jitter": 0}, {"color_factors", "color_order"}),
        ({"rand_augment_ops": 0}, {"operations", "signs"}),
        ({"mixup": 0}, {"mixup"}),
    ],
)
def test_an_augmentation_that_is_off_is_not_drawn_and_changes_no_others_draw(change, names):
    whole, rest = (augment.epoch_draws(0, 1, 20, settings(**EVERYTHING | off)) for off in ({}, change))
    assert whole.keys() - rest.keys() == names
    assert all(np.array_equal(rest[name], whole[name]) for name in rest)


def test_no_two_streams_give_the_same_numbers():
    streams = range(augment.SAMPLER + 1)
    numbers = [augment.generator(0, epoch, stream).random() for epoch in range(3) for stream in streams]
    assert len(set(numbers)) == len(numbers)


def test_draws_have_the_distributions_that_the_settings_name():
    draws = augment.epoch_draws(0, 0, 20_000, settings(**EVERYTHING | {"color_jitter": 0.8, "mixup": 0.5}))

    def assert_uniform(values, low, high):
        assert low <= values.min()
        assert values.max() <= high
        shares = np.histogram(values, 10, (low, high))[0] / values.size
        assert shares == pytest.approx(0.1, abs=0.01)

    assert_uniform(draws["rotation"], -30, 30)
    for factors in draws["color_factors"].T[:3]:
        assert_uniform(factors, 0.2, 1.8)
    assert_uniform(draws["color_factors"][:, 3], -0.2, 0.2)
    orders, counts = np.unique(draws["color_order"], axis=0, return_counts=True)
    assert (np.sort(orders, axis=1) == range(4)).all()
    assert counts / 20_000 == pytest.approx(np.full(24, 1 / 24), abs=0.006)
    pairs = np.unique(np.stack([draws["operations"].ravel(), draws["signs"].ravel()]), axis=1, return_counts=True)
    assert pairs[0].tolist() == [np.repeat(range(14), 2).tolist(), [-1, 1] * 14]
    assert pairs[1] / 40_000 == pytest.approx(np.full(28, 1 / 28), abs=0.005)
    assert draws["mixup"].mean() == pytest.approx(0.5, abs=0.01)
    assert draws["mixup"].var() == pytest.approx(1 / 8, abs=0.005)  # 1 / (4 (2 alpha + 1))


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


@pytest.mark.parametrize(("height", "width"), [(8, 12), (30, 8), (8, 8)])
def test_a_random_crop_can_lie_anywhere_in_the_picture(height, width):
    draws = np.random.default_rng(0).random((3000, 2))
    draws[0] = np.nextafter(1.0, 0.0)
    boxes = augment.random_crops(draws, np.full(3000, height), np.full(3000, width), 8)
    assert (boxes[:, 2:] == 8).all()
    places = {(top, left) for top, left in boxes[:, :2].tolist()}
    assert places == {(top, left) for top in range(height - 7) for left in range(width - 7)}
    for row, most in zip(boxes[:, :2].T, (height - 8, width - 8), strict=True):
        assert np.bincount(row) / 3000 == pytest.approx(np.full(most + 1, 1 / (most + 1)), abs=0.02)


def test_five_crops_are_torchvisions():
    heights, widths = np.array([256, 301]), np.array([341, 256])
    boxes = augment.five_crops(heights, widths, 224)
    assert boxes.shape == (2, 5, 4)
    for five, source in zip(boxes, (picture(0), picture(1, 301, 256)), strict=True):
        expected = functional.five_crop(as_tensor(source), [224, 224])
        assert torch.equal(augment.crop_resize([source] * 5, five, 224), torch.stack(expected))


@pytest.mark.parametrize("probability", [0, 0.3, 0.5, 1])
def test_each_picture_is_flipped_by_its_own_draw(probability):
    batch = torch.stack([as_tensor(picture(i, 8, 8)) for i in range(4)])
    draws = np.array([0.1, 0.9, 0.499, 0.0])
    flipped = augment.horizontal_flip(batch, draws, probability)
    for got, source, draw in zip(flipped, batch, draws, strict=True):
        assert torch.equal(got, functional.horizontal_flip(source) if draw < probability else source)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (63, 63), (40, 70)])
def test_rotation_is_torchvisions(height, width):
    batch = smooth_batch(7, 70)[..., :height, :width]
    angles = np.array([-180.0, -30.0, -0.01, 0.0, 12.3, 45.0, 90.0])
    for got, source, angle in zip(augment.rotate(batch, angles), batch, angles.tolist(), strict=True):
        expected = functional.rotate(source, angle, interpolation=v2.InterpolationMode.BILINEAR)
        assert difference(got, expected) <= 1


def test_color_jitter_is_torchvisions():
    batch = smooth_batch(48)
    draws = augment.epoch_draws(0, 0, 48, settings(color_jitter=1))
    names = ("brightness", "contrast", "saturation", "hue")
    jitter = v2.ColorJitter(0.5, 0.5, 0.5, 0.5)  # these numbers are for its own draw
    jittered = augment.color_jitter(batch, draws["color_factors"], draws["color_order"])
    equal = []
    for got, source, factors, order in zip(jittered, batch, draws["color_factors"], draws["color_order"], strict=True):
        chosen = {f"{name}_factor": float(factor) for name, factor in zip(names, factors, strict=True)}
        expected = jitter.transform(source, {"fn_idx": order.tolist(), **chosen})
        assert difference(got, expected) <= 2  # a level in one adjustment, twice that after a later one
        assert difference(got, source) > 1
        equal.append(float((got == expected).float().mean()))
    assert np.mean(equal) > 0.998


@pytest.mark.parametrize("index", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("change", [-0.4, 0.0, 0.4])
def test_each_colour_adjustment_is_torchvisions(index, change):
    adjust = (
        functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue,
    )[index]  # fmt: skip
    batch = smooth_batch(2)
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (2, 1))
    factors[0, index] += change
    order = np.roll(np.tile(range(4), (2, 1)), index, axis=1)
    got = augment.color_jitter(batch, factors, order)
    assert difference(got[0], adjust(batch[0], factors[0, index])) <= 1
    assert difference(got[1], batch[1]) <= 1


BLENDED = {"Brightness", "Color", "Contrast"}  # rounded in each step, where torchvision may round once


def torchvisions_rand_augment(monkeypatch, batch, operations, signs, magnitude) -> torch.Tensor:
    """Return what torchvision makes of each picture when its generator gives these operations and signs."""
    numbers = iter(())
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(numbers)))
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(next(numbers)))
    rand_augment = v2.RandAugment(operations.shape[1], magnitude)
    signed = {name: signed for name, (_, signed) in rand_augment._AUGMENTATION_SPACE.items()}
    assert tuple(signed) == augment.OPERATIONS
    pictures = []
    for picture, chosen, directions in zip(batch, operations.tolist(), signs.tolist(), strict=True):
        drawn = [
            [index] + [0.5 if sign < 0 else 0.51] * signed[augment.OPERATIONS[index]]
            for index, sign in zip(chosen, directions, strict=True)
        ]
        numbers = iter(itertools.chain(*drawn))
        pictures.append(rand_augment(picture))
        assert not list(numbers)
    return torch.stack(pictures)


@pytest.mark.parametrize("magnitude", range(augment.BINS))
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_operation_of_rand_augment_is_torchvisions(monkeypatch, sign, magnitude):
    batch = smooth_batch(len(augment.OPERATIONS))
    operations, signs = np.arange(len(batch))[:, None], np.full((len(batch), 1), sign)
    got = augment.rand_augment(batch, operations, signs, magnitude)
    expected = torchvisions_rand_augment(monkeypatch, batch, operations, signs, magnitude)
    for name, one, other in zip(augment.OPERATIONS, got, expected, strict=True):
        assert difference(one, other) <= (name in BLENDED), name


def test_rand_augment_is_torchvisions(monkeypatch):
    draws = augment.epoch_draws(0, 0, 100, settings(rand_augment_ops=3))
    blended = np.isin(draws["operations"], [augment.OPERATIONS.index(name) for name in BLENDED]).any(axis=1)
    operations, signs = draws["operations"][~blended], draws["signs"][~blended]
    batch = smooth_batch(len(operations))
    got = augment.rand_augment(batch, operations, signs, 9)
    assert len(got) > 30
    assert torch.equal(got, torchvisions_rand_augment(monkeypatch, batch, operations, signs, 9))


def test_mixup_is_torchvisions_where_all_weights_are_equal(monkeypatch):
    batch = augment.normalize(smooth_batch(4, 8), [0.4] * 3, [0.2] * 3)
    labels = torch.tensor([0, 2, 2, 1])
    targets = torch.nn.functional.one_hot(labels, 3).float()
    mix = v2.MixUp(num_classes=3)
    monkeypatch.setattr(mix, "_dist", torch.distributions.Uniform(0.3, 0.3 + 1e-9, validate_args=False))
    pictures, mixed = augment.mixup(batch, targets, np.full(4, 0.3))
    expected_pictures, expected_targets = mix(batch, labels)
    torch.testing.assert_close(pictures, expected_pictures)
    torch.testing.assert_close(mixed, expected_targets)


def test_mixup_mixes_each_picture_by_its_own_weight_with_the_one_before():
    batch = torch.arange(1.0, 4.0)[:, None, None, None].expand(3, 3, 2, 2)
    pictures, targets = augment.mixup(batch, torch.eye(3), np.array([1.0, 0.25, 0.5]))
    assert pictures[:, 0, 0, 0].tolist() == [1.0, 0.25 * 2 + 0.75 * 1, 0.5 * 3 + 0.5 * 2]
    assert targets.tolist() == [[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]


def test_the_default_augmentation_gives_the_pictures_that_it_always_gave():
    pictures = [picture(i, 40 + i, 60 - i) for i in range(6)]
    heights, widths = np.arange(40, 46), np.arange(60, 54, -1)
    draws = augment.generator(1, 2, augment.AUGMENTATION).random((6, 41))
    boxes = augment.random_resized_crops(draws[:, :-1], heights, widths, 0.25)
    cropped = augment.crop_resize(pictures, boxes, 32)
    expected = torch.where(torch.from_numpy(draws[:, -1] < 0.5)[:, None, None, None], cropped.flip(-1), cropped)
    got = augment.augmented(pictures, augment.epoch_draws(1, 2, 6, settings()), settings(), 32)
    assert torch.equal(got, expected)
    assert zlib.crc32(got.numpy()) == 2617463713  # the numbers behind every run so far


def test_augmentations_come_in_their_order():
    on = settings(**EVERYTHING, crop="random")
    pictures = [picture(i, 40, 50) for i in range(8)]
    rows = augment.epoch_draws(0, 0, 8, on)
    batch = augment.crop_resize(
        pictures, augment.random_crops(rows["crop"][:, :2], np.full(8, 40), np.full(8, 50), 32), 32
    )
    batch = augment.horizontal_flip(batch, rows["flip"], 0.5)
    batch = augment.rotate(batch, rows["rotation"])
    batch = augment.color_jitter(batch, rows["color_factors"], rows["color_order"])
    batch = augment.rand_augment(batch, rows["operations"], rows["signs"], 9)
    assert torch.equal(augment.augmented(pictures, rows, on, 32), batch)


def test_a_centre_crop_alone_is_what_evaluation_sees():
    pictures = [picture(0, 40, 51), picture(1, 45, 40)]
    plain = settings(crop="center", flip=0)
    boxes = augment.center_crops(np.array([40, 45]), np.array([51, 40]), 32)
    assert augment.epoch_draws(0, 0, 2, plain) == {}
    assert torch.equal(augment.augmented(pictures, {}, plain, 32), augment.crop_resize(pictures, boxes, 32))


@pytest.mark.parametrize("changes", [{}, {"crop": "random", **EVERYTHING}])
def test_a_picture_looks_the_same_in_any_batch_and_on_any_number_of_threads(changes):
    on, size = settings(**changes), 300  # px: from 256 on, sums of pixels are beyond 32 bits, and depend on their order
    pictures = [as_tensor(each).permute(1, 2, 0).numpy() for each in (picture(i, 320, 340) for i in range(6))]
    draws = augment.epoch_draws(0, 0, 6, on)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = augment.augmented(pictures, draws, on, size)
        torch.set_num_threads(3)
        for i, expected in enumerate(together):
            rows = augment.rows_of(draws, np.array([i]))
            assert torch.equal(augment.augmented([pictures[i]], rows, on, size)[0], expected)
    finally:
        torch.set_num_threads(threads)


def test_no_augmentation_changes_the_batch_that_it_is_given():
    batch = smooth_batch(8)
    before = batch.clone()
    rows = augment.epoch_draws(0, 0, 8, settings(**EVERYTHING))
    augment.horizontal_flip(batch, rows["flip"], 0.5)
    augment.rotate(batch, rows["rotation"])
    augment.color_jitter(batch, rows["color_factors"], rows["color_order"])
    augment.rand_augment(batch, rows["operations"], rows["signs"], 9)
    assert torch.equal(batch, before)


def test_normalize_is_torchvisions():
    batch = torch.stack([as_tensor(picture(0, 8, 8))])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = functional.normalize(functional.to_dtype(batch, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(augment.normalize(batch, mean, std), expected)
