from finetune.drawing import CLASSES

import numpy as np
import pytest


def drawn(name, seed, size=48):
    return CLASSES[name](np.random.default_rng(seed), size)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [17, 96])
def test_a_picture_has_the_asked_size_and_is_rgb(name, size):
    picture = drawn(name, seed=0, size=size)

    assert picture.mode == "RGB"
    assert picture.size == (size, size)


@pytest.mark.parametrize("name", CLASSES)
def test_same_generator_state_gives_same_pixels(name):
    assert drawn(name, seed=3).tobytes() == drawn(name, seed=3).tobytes()


@pytest.mark.parametrize("name", CLASSES)
def test_every_picture_is_another(name):
    rng = np.random.default_rng(0)
    one_generator = {CLASSES[name](rng, 32).tobytes() for _ in range(5)}
    many_generators = {drawn(name, seed, 32).tobytes() for seed in range(5)}

    assert len(one_generator) == len(many_generators) == 5


def test_the_generators_state_alone_decides():
    np.random.seed(0)
    first = drawn("bees", seed=1)
    np.random.seed(1)

    assert drawn("bees", seed=1).tobytes() == first.tobytes()


def test_mean_colour_does_not_tell_the_classes_apart():
    means = [[np.asarray(drawn(name, seed)).mean((0, 1)) for seed in range(200)] for name in CLASSES]
    inputs = np.column_stack([np.concatenate(means), np.ones(400)])
    labels = np.repeat([-1, 1], 200)
    rule = np.linalg.lstsq(inputs[::2], labels[::2], rcond=None)[0]

    assert (np.sign(inputs[1::2] @ rule) == labels[1::2]).mean() < 0.7
