"""The pictures of an evaluation: charts of its predictions, and galleries of some with what decided them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune import canvas, charts, gallery, gradcam, metrics
from finetune.classifier import Classifier
from finetune.parallel import parallel_map

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Evaluated:
    """What a network made of a split's pictures."""

    labels: np.ndarray  # [n]
    logits: np.ndarray  # [n, classes]
    paths: list[str]
    classes: list[str]

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers of metrics.summary."""
        return metrics.summary(self.logits, self.labels)

    @cached_property
    def curves(self) -> tuple[list[dict], list[dict]]:
        """The points of ROC and precision-recall curve, of metrics.curves."""
        return metrics.curves(self.logits, self.labels)

    @property
    def guesses(self) -> np.ndarray:
        """The predicted classes, [n]."""
        return self.logits.argmax(axis=1)


def draw_charts(folder: Path, done: Evaluated) -> None:
    """Draw confusion matrix, ROC, precision and recall, and calibration, as PNG files in the folder."""
    two = len(done.classes) == 2
    of = f"of {done.classes[1]}" if two else "of each class against the rest, together"
    share = float((done.labels == 1).mean()) if two else 1 / len(done.classes)
    roc, precision_recall = done.curves
    drawn = {
        "confusion": charts.confusion(done.labels, done.guesses, done.classes),
        "roc": charts.roc(roc, of, done.metrics["auroc"]),
        "precision_recall": charts.precision_recall(precision_recall, of, share),
        "calibration": charts.calibration(done.logits, done.labels, done.metrics["ece"]),
    }
    for name, picture in drawn.items():
        canvas.save(picture, folder / f"{name}.png")


def draw_galleries(
    folder: Path,
    done: Evaluated,
    number: int,
    seed: int,
    pictures_at: Callable[[list[int]], Tensor],
    decided: Callable[[Tensor, np.ndarray], np.ndarray | None],
) -> None:
    """Draw `number` pictures of the highest loss, and as many random ones, as PNG files in the folder.

    Which are random follows from the seed and how many pictures there are, so experiments show the same. `pictures_at`
    returns pictures by position, [n, 3, size, size] uint8 as the network sees them; `decided` what in them spoke for
    their guesses, or None where that is not known.
    """
    losses, probabilities = metrics.cross_entropy(done.logits, done.labels), metrics.confidence(done.logits)[0]
    highest, random = gallery.highest_loss(losses, number), gallery.random(len(losses), number, seed)
    shown = sorted({*highest, *random})
    pictures = pictures_at(shown)
    maps = decided(pictures, done.guesses[shown])
    predictions = {
        at: gallery.Prediction(
            pixels=pictures[row].permute(1, 2, 0).numpy(),
            path=done.paths[at],
            label=done.classes[done.labels[at]],
            guess=done.classes[done.guesses[at]],
            probability=float(probabilities[at]),
            loss=float(losses[at]),
            decided=None if maps is None else maps[row],
        )
        for row, at in enumerate(shown)
    }
    many = f"{len(highest)} of {len(losses):,} validation pictures"

    galleries = {
        "highest_loss": (f"Highest loss: {many}", highest),
        "random": (f"At random: {many}, seed {seed}", random),
    }

    def draw(name: str) -> None:
        title, chosen = galleries[name]
        canvas.save(gallery.sheet(title, [predictions[at] for at in chosen]), folder / f"{name}.png")

    list(parallel_map(draw, galleries))


def what_decided(model: Classifier, pictures: Tensor, guesses: np.ndarray) -> np.ndarray | None:
    """Return the Grad-CAM of uint8 pictures for the model's guesses; None where there is none, which is said.

    Its network has no parameters that require gradients any more.
    """
    network = model.network.requires_grad_(False)
    pictures = pictures.to(next(network.parameters()).device)
    try:
        layer = gradcam.map_layer(network, model.normalize(pictures[:1]))
        if layer:
            return gradcam.heat_maps(network, layer, pictures, guesses, model.normalize)
        reason = "it has no feature maps before its head"
    except RuntimeError as error:  # torch's own, as of memory: the numbers are worth more than these pictures
        reason = str(error).strip().partition("\n")[0]
    print(f"galleries without Grad-CAM of {model.about['model_name']}: {reason}")
    return None
