"""The one way from decoded pictures to probabilities, which evaluation, prediction and export share."""

from finetune import backbones, classifier, device, heads, metrics
from finetune.errors import UserError
from finetune.params import Head

import numpy as np
import pytest
import torch

SIZE = 32
ABOUT = {
    "model_name": "squeezenet1_1",
    "head": {"kind": "linear", "hidden": 0, "dropout": 0.0},
    "classes": ["ants", "bees", "wasps"],
    "image_size": SIZE,
    "resize": 40,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}
WAYS = [
    ("none", [(None, False)]),
    ("flip", [(None, False), (None, True)]),
    ("ten_crop", [(crop, flip) for crop in range(5) for flip in (False, True)]),
]


@pytest.fixture
def pictures():
    """Twenty pictures of several sizes, more than a lot."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 40 + i, 3), dtype=np.uint8) for i in range(20)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return backbones.build("squeezenet1_1", 3, SIZE).eval()


@pytest.fixture
def file(network, tmp_path):
    """Return a function that writes a model's file, with other words about it, and returns its path."""

    def write(**about):
        backbones.write(tmp_path / "model.safetensors", network.state_dict(), ABOUT | about)
        return tmp_path / "model.safetensors"

    return write


@pytest.mark.parametrize(("tta", "ways"), WAYS)
def test_views_are_crops_and_their_mirror_images(pictures, tta, ways):
    views = list(classifier.views(pictures, SIZE, tta))
    assert len(views) == len(ways)
    for view, (crop, flip) in zip(views, ways, strict=True):
        for picture, seen in zip(pictures, view, strict=True):
            height, width = picture.shape[:2]
            bottom, right = height - SIZE, width - SIZE
            middle = (round(bottom / 2), round(right / 2))
            top, left = [(0, 0), (0, right), (bottom, 0), (bottom, right), middle][4 if crop is None else crop]
            pixels = torch.from_numpy(picture[top : top + SIZE, left : left + SIZE].copy()).permute(2, 0, 1)
            assert torch.equal(seen, pixels.flip(-1) if flip else pixels)


@pytest.mark.parametrize("tta", classifier.WAYS)
def test_logits_are_those_of_the_normalised_views(pictures, network, file, tta):
    found = np.concatenate(list(classifier.load(file(), "cpu").logits(pictures, tta)))
    mean, std = (torch.tensor(ABOUT[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        views = [network((view / 255 - mean) / std).softmax(1) for view in classifier.views(pictures, SIZE, tta)]
    probabilities = torch.stack(views).mean(0).numpy()
    assert np.exp(metrics.log_softmax(found)) == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("tta", classifier.WAYS)
def test_logits_are_the_same_bits_whatever_comes_beside_a_picture(pictures, file, tta):
    model = classifier.load(file(), "cpu")
    whole = np.concatenate(list(model.logits(pictures, tta)))
    for chosen in ([7], [19, 0, 3], list(range(19, -1, -1))):
        some = np.concatenate(list(model.logits([pictures[i] for i in chosen], tta)))
        assert some.tobytes() == whole[chosen].tobytes()
    assert list(model.logits([], tta)) == []


def test_the_model_computes_in_the_precision_in_which_it_was_trained(file):
    assert isinstance(classifier.load(file(precision="bf16"), "cpu").model, device.InBfloat16)
    assert not isinstance(classifier.load(file(precision="bf16"), "cpu", "fp32").model, device.InBfloat16)
    assert not isinstance(classifier.load(file(), "cpu").model, device.InBfloat16)  # written before it was noted


def test_the_head_is_that_of_the_training(tmp_path):
    head = {"kind": "concat_pool", "hidden": 8, "dropout": 0.0}
    network = backbones.build("squeezenet1_1", 3, SIZE, Head(**head))
    backbones.write(tmp_path / "model.safetensors", network.state_dict(), ABOUT | {"head": head})
    assert hasattr(classifier.load(tmp_path / "model.safetensors", "cpu").model, heads.NAME)


def test_what_is_no_model_is_told_so(file, tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors is missing: `dvc repro`"):
        classifier.load(tmp_path / "model.safetensors", "cpu")
    backbones.write(tmp_path / "backbone.safetensors", {"a": torch.zeros(2)}, {"model_name": "alexnet", "missing": []})
    with pytest.raises(UserError, match="no fine-tuned classifier, but a backbone"):
        classifier.load(tmp_path / "backbone.safetensors", "cpu")
