"""A fine-tuned network as a classifier of pictures: the one way from decoded pixels to probabilities."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune import augment, backbones, cuts, device, inference, layers, metrics, runs, training
from finetune.errors import UserError
from finetune.params import Head

import numpy as np
import torch
from torch import Tensor, nn

MODEL = Path("models/model.safetensors")  # the workspace's


@dataclass(frozen=True)
class Classifier:
    """A network on its device, and what is done to pictures before they go in."""

    model: nn.Module
    about: dict  # what its file says: model_name, classes, resize and image_size (px), mean, std, …

    @property
    def network(self) -> nn.Module:
        """The network itself, whatever precision `model` computes in."""
        return self.model.network if isinstance(self.model, device.InBfloat16) else self.model

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        return next(self.network.parameters()).device

    @property
    def classes(self) -> list[str]:
        """The names that the columns of logits and probabilities stand for."""
        return self.about["classes"]

    @property
    def normalize(self) -> Callable[[Tensor], Tensor]:
        """What makes of uint8 pictures [n, 3, size, size] what the network expects."""
        return functools.partial(augment.normalize, mean=self.about["mean"], std=self.about["std"])

    def cut(self) -> cuts.Cut | None:
        """Return the network cut before the first layer that was trained, where its training was cut in validation.

        None where all were, the first was, the network can't be followed, or its file does not say what was trained.
        """
        trained = self.about.get("trained")
        if trained is None or layers.layers(self.network).keys() <= set(trained):
            return None
        network = cuts.follow(self.network, self.about["image_size"], modes=[False])
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(layers.layer_of(name) in trained)
        cut = network.cut(training=False) if network else None
        self.network.requires_grad_(True)
        return cut

    def logits(self, pictures: Iterable[np.ndarray], tta: str = "none") -> Iterator[np.ndarray]:
        """Yield the logits of some pictures at a time, [n, classes], in the pictures' order.

        Pictures are [height, width, 3] uint8, their shorter side `resize` px. `tta` is a way of test-time augmentation:
        the probabilities are the mean over its views. A picture's logits are the same bits whatever comes beside it.
        """
        size = device.LOT[self.device.type]
        waiting = iter(pictures)
        lots = iter(lambda: list(islice(waiting, size)), [])  # until there is an empty one
        shown = (view for lot in lots for view in views(lot, self.about["image_size"], tta))
        found = inference.logits(self.model, shown, self.normalize)
        for of_a_lot in zip(*[found] * len(WAYS[tta]), strict=True):
            yield metrics.mean_prediction([each.numpy() for each in of_a_lot])


# By the name of test-time augmentation: the number of the crop, None for the middle, and whether it is mirrored.
WAYS: dict[str, list[tuple[int | None, bool]]] = {
    "none": [(None, False)],
    "flip": [(None, False), (None, True)],
    "ten_crop": [(crop, flip) for crop in range(5) for flip in (False, True)],
}


def views(pictures: list[np.ndarray], image_size: int, tta: str) -> Iterator[Tensor]:
    """Yield [height, width, 3] uint8 pictures in each of the ways of `tta`, [n, 3, image_size, image_size] uint8."""
    for crop, flip in WAYS[tta]:
        batch = training.cropped(pictures, image_size, crop)
        yield batch.flip(-1) if flip else batch


def load(path: Path, device_name: str, precision: str | None = None) -> Classifier:
    """Return the classifier in a file that the stage train wrote, on the device of that name, see device.claim.

    It computes in the precision in which it was trained, or in the one given. Raises UserError where it can't be.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: `dvc repro` trains a model and puts it there.")
    tensors, about = backbones.read(path)
    if "classes" not in about:
        raise UserError(f"{path} is no fine-tuned classifier, but a backbone: `dvc repro` makes {MODEL} of it.")
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.claim(device_name, runs.scratch() / "gpus")
    model = backbones.build(about["model_name"], len(about["classes"]), about["image_size"], Head(**about["head"]))
    backbones.load_tensors(model, tensors, strict=True)
    model = model.to(place).to(memory_format=torch.channels_last).eval()
    precision = precision or about.get("precision", "fp32")  # files of before it was noted
    return Classifier(device.in_precision(model, device.precision(precision, place)), about)


def probability_columns(probabilities: np.ndarray, classes: list[str]) -> dict[str, str]:
    """Return a picture's probabilities [classes] as the columns of a table: {"p_ants": "0.973210"}."""
    return {f"p_{name}": f"{value:.6f}" for name, value in zip(classes, probabilities, strict=True)}
