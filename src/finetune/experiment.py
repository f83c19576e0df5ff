"""What an experiment is made of, as its settings ask: pictures, network, what trains of it, what a step minimises."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from finetune import (
    augment,
    backbones,
    cuts,
    device,
    distributed,
    images,
    inference,
    layers,
    metrics,
    optim,
    params,
    runs,
    training,
)
from finetune.bank import Bank
from finetune.datasets import check_num_classes
from finetune.features import Features, bank_of

import torch
from torch import Tensor, nn
from tqdm import tqdm

STORE, BACKBONE = Path("data/prepared"), Path("models/backbone.safetensors")


@dataclass
class Experiment:
    """The parts of an experiment. The model's tensors change as it trains, and nothing else that can be seen does."""

    settings: params.Params
    store: images.ImageStore
    backbone: dict  # what is known about the pretrained tensors
    model: nn.Module
    groups: list[layers.Group]
    objective: training.Objective
    network: cuts.Network | None  # the model, where it can be cut
    bank: Bank  # of its features
    _cuts: dict[bool, cuts.Cut | None] = field(default_factory=dict)  # in this epoch, by whether it is in training
    _trained: list[layers.Group] = field(default_factory=list)  # what does since the cuts are these

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.model.parameters()).device

    @property
    def precision(self) -> str:
        """What the model computes in, fp32 or bf16."""
        return device.precision(self.settings.precision, self.device)

    @property
    def normalization(self) -> dict[str, Sequence[float]]:
        """The `mean` and `std` of each channel, in [0, 1], by which pictures are normalised."""
        about = self.store.manifest if self.settings.augment.normalize == "data" else self.backbone
        return {key: about[key] for key in ("mean", "std")}

    @property
    def trained(self) -> list[str]:
        """The layers that a run changes: those that train sooner or later, and batch norm that follows the pictures."""
        groups = [group for group in self.groups if group.trains_in(self.settings.num_epochs - 1)]
        follows = self.settings.backbone.batch_norm == "train"
        norms = [name for name, each in self.model.named_modules() if follows and isinstance(each, cuts.BATCH_NORMS)]
        return sorted({layer for group in groups for layer in group.layers}.union(norms))

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
        trained = [group for group in self.groups if group.trains_in(epoch)]
        if trained != self._trained:
            self._trained = trained
            self._cuts = {way: self.network.cut(way) if self.network else None for way in (True, False)}
            if self.settings.augment.mixup:  # a batch is mixed before it goes into the trunk
                self._cuts[True] = None

    @property
    def is_heavy(self) -> bool:
        """Whether a step of this epoch is worth more than one thread: more than a small head trains, or runs uncut.

        On one thread SqueezeNet's takes 0.4 ms instead of 0.8, no bit of it depends on how many there are, and the
        other cores are free for the next features.
        """
        trained = {name: each.numel() for name, each in self.model.named_parameters() if each.requires_grad}
        beyond_head = any(layers.layer_of(name) not in self.groups[0].layers for name in trained)
        return not self._cuts[True] or beyond_head or sum(trained.values()) > 10**6

    def part(self, is_training: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """Return what the batches of this epoch go through, and what makes of their inputs what it takes."""
        cut = self._cuts[is_training]
        module, inputs_of = (cut.rest, inference.as_they_are) if cut else (self.model, self.normalize)
        return device.in_precision(module, self.precision), inputs_of

    def training_batches(self, epoch: int, first: int = 0) -> Iterator[training.Batch]:
        """Yield an epoch's batches, from that number on: of pictures, or of features where the model is cut."""
        if cut := self._cuts[True]:
            return self.features.training_batches(cut, epoch, first)
        return training.training_batches(self.store, self.settings, epoch, first)

    def train_epoch(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: optim.LearningRate,
        batches: Iterable[training.Batch],
        sums: training.Sums,
        bar: tqdm,
    ) -> None:
        """Train on the batches, see training.train_epoch."""
        module, inputs_of = self.part(is_training=True)
        module = distributed.parallel(module)
        training.train_epoch(module, optimizer, schedule, batches, inputs_of, self.objective, sums, bar)

    def val_batches(self) -> Iterator[training.Batch]:
        """Yield the batches of the validation, and put the model into evaluation mode, and with it the trunk."""
        self.model.eval()
        if cut := self._cuts[False]:
            return self.features.validation_batches(cut)
        lot = device.LOT[self.device.type]
        return training.plain_batches(self.store, "val", self.settings.data.image_size, lot)

    def validate(self, batches: Iterable[training.Batch]) -> tuple[float, float]:
        """Return loss (nats) and accuracy on the batches of the validation."""
        module, inputs_of = self.part(is_training=False)
        logits = inference.predict(module, batches, inputs_of)
        labels = self.store.labels[self.store.indices("val")]
        return float(metrics.cross_entropy(logits, labels).mean()), metrics.accuracy(logits, labels)

    @cached_property
    def features(self) -> Features:
        """What the frozen part of the network makes of the pictures."""
        return Features(self.store, self.settings, self.normalization, self.device, self.bank)


def build(settings: params.Params, store: images.ImageStore, tensors: dict[str, Tensor], backbone: dict) -> Experiment:
    """Return the experiment of these settings, on their device, with pretrained `tensors`. Raises UserError.

    `backbone` is what is known about these: which layers have none, and the pictures' mean and std.
    """
    check_num_classes(settings.num_classes, store.classes, store.manifest["source"])
    device.make_deterministic()
    device.keep_freed_memory()
    place = device.claim(settings.device, runs.scratch() / "gpus")
    model, groups = backbones.fine_tuned(settings, tensors, backbone["missing"])
    network = cuts.follow(model, settings.data.image_size)
    objective = training.objective(settings, store.labels[store.indices("train")], place)
    model = model.to(place).to(memory_format=torch.channels_last)
    return Experiment(settings, store, backbone, model, groups, objective, network, bank_of(settings))


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
