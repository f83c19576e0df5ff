"""What an experiment is made of, as its settings ask: pictures, network, what trains of it, what a step minimises."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import augment, backbones, device, images, layers, metrics, optim, params, training
from finetune.datasets import check_num_classes

import torch
from torch import Tensor, nn
from tqdm import tqdm

STORE, BACKBONE = Path("data/prepared"), Path("models/backbone.safetensors")


@dataclass(frozen=True)
class Experiment:
    """The parts of an experiment. The model's tensors change as it trains, and nothing else does."""

    settings: params.Params
    store: images.ImageStore
    backbone: dict  # what is known about the pretrained tensors
    model: nn.Module
    groups: list[layers.Group]
    objective: training.Objective

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.model.parameters()).device

    @property
    def normalization(self) -> dict[str, list[float]]:
        """The `mean` and `std` of each channel, in [0, 1], by which pictures are normalised."""
        about = self.store.manifest if self.settings.augment.normalize == "data" else self.backbone
        return {key: about[key] for key in ("mean", "std")}

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return len(training.slices(len(self.store.indices("train")), self.settings.batch_size))

    def normalize(self, pictures: Tensor) -> Tensor:
        """Return uint8 pictures [n, 3, size, size] as the network expects them."""
        return augment.normalize(pictures, **self.normalization)

    def optimizer(self) -> tuple[torch.optim.Optimizer, optim.LearningRate]:
        """Return a new optimizer of what trains sooner or later, and its schedule."""
        settings = self.settings
        result = optim.optimizer(self.model, self.groups, settings.optimizer, settings.lr, settings.momentum)
        return result, optim.LearningRate(result, settings.schedule, settings.num_epochs, self.steps)

    def set_full_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer's groups the rates of the settings, wherever the schedule has them."""
        scales = {group.name: group.lr_scale for group in self.groups if group.thaws is not None}
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * scales[group["name"]]

    def begin_epoch(self, epoch: int) -> None:
        """Have those layers train that do in an epoch, counted from the run's first."""
        layers.thaw(self.model, self.groups, epoch)
        layers.train_mode(self.model, self.settings.backbone.batch_norm)

    def train_epoch(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: optim.LearningRate,
        batches: Iterable[training.Batch],
        sums: training.Sums,
        bar: tqdm,
    ) -> None:
        """Train on the batches, see training.train_epoch."""
        training.train_epoch(self.model, optimizer, schedule, batches, self.normalize, self.objective, sums, bar)

    def val_batches(self) -> Iterable[training.Batch]:
        """Return the batches of the validation."""
        return training.plain_batches(self.store, "val", self.settings.data.image_size)

    def validate(self, batches: Iterable[training.Batch]) -> tuple[float, float]:
        """Return loss (nats) and accuracy on the batches of the validation."""
        logits = training.predict(self.model, batches, self.normalize)
        labels = self.store.labels[self.store.indices("val")]
        return float(metrics.cross_entropy(logits, labels).mean()), metrics.accuracy(logits, labels)


def build(settings: params.Params, store: images.ImageStore, tensors: dict[str, Tensor], backbone: dict) -> Experiment:
    """Return the experiment of these settings, on their device, with pretrained `tensors`. Raises UserError.

    `backbone` is what is known about these: which layers have none, and the pictures' mean and std.
    """
    check_num_classes(settings.num_classes, store.classes, store.manifest["source"])
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.choose(settings.device)
    model, groups = backbones.fine_tuned(settings, tensors, backbone["missing"])
    objective = training.objective(settings, store.labels[store.indices("train")], place)
    return Experiment(settings, store, backbone, model.to(place), groups, objective)


def prepared(changes: Sequence[str]) -> tuple[params.Params, images.ImageStore]:
    """Return the settings of params.yaml with `changes`, and the pictures in the workspace.

    Raises UserError where these were prepared with other settings.
    """
    settings = params.load(changes=changes)
    store = images.ImageStore(STORE)
    images.check_settings(store.manifest, settings.data)
    return settings, store


def by_hand(changes: Sequence[str]) -> Experiment:
    """Return the experiment of params.yaml with `changes`, for a script that leaves the workspace as it is.

    With the pretrained tensors of the workspace, where they are of this model. Raises UserError as `prepared` does.
    """
    settings, store = prepared(changes)
    if BACKBONE.exists() and not any(change.startswith("backbone.weights=") for change in changes):
        tensors, backbone = backbones.read(BACKBONE)
        if backbone["model_name"] == backbones.canonical_name(settings.model_name):
            return build(settings, store, tensors, backbone)
    return build(settings, store, *backbones.pretrained(settings.model_name, settings.backbone.weights)[:2])
