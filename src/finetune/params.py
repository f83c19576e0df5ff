"""`params.yaml` as typed, validated objects; its comments say what each setting is for.

The file holds every default, so a key that is missing is an error as much as one that is unknown.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from finetune import schema

from pydantic import AfterValidator, BeforeValidator, Field, model_validator


def device(name: str) -> str:
    if not re.fullmatch(r"auto|all|cpu|cuda(:\d+)?", name):
        raise ValueError("should be all, auto, cpu, cuda or cuda:N")
    return name


def _inside_weights(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("should be imagenet, none or the name of a file in weights/ (copy yours there)")
    return name


def _trainable(value: Any) -> str | int | list[str]:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    names = value if isinstance(value, list) else [value]
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_count and not (names and all(isinstance(name, str) and name for name in names)):
        raise ValueError("should be head, all, a number of last blocks (1 or more), a layer's name or a list of such")
    return value


class Data(schema.Section):
    """The group `data`: which pictures, which of them validate, and how they are kept."""

    source: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=8, le=4096)]
    resize: Annotated[int, Field(ge=8, le=4096)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    folds: Annotated[int, Field(ge=0)]
    fold: Annotated[int, Field(ge=0)]
    split_seed: Annotated[int, Field(ge=0)]
    limit: Annotated[int, Field(ge=0)]
    max_skipped: Annotated[float, Field(ge=0, le=1)]
    balance: Literal["none", "loss", "sampler"]

    @model_validator(mode="after")
    def _fits(self):
        if self.image_size > self.resize:
            raise ValueError(
                f"data.image_size = {self.image_size} is larger than data.resize = {self.resize}: "
                f"set data.resize to {self.image_size} or more"
            )
        if self.folds == 1:
            raise ValueError("data.folds = 1 leaves nothing to train on: set 2 or more, or 0 for none")
        if self.fold and not self.folds:
            raise ValueError(f"data.fold = {self.fold} says nothing without folds: set data.folds, such as 5")
        if self.folds and self.fold >= self.folds:
            raise ValueError(f"data.fold = {self.fold} is none of {self.folds}: it counts from 0 to data.folds - 1")
        return self


class Backbone(schema.Section):
    """The group `backbone`: the pretrained network, which part of it trains, and from when on."""

    weights: Annotated[str, Field(min_length=1), AfterValidator(_inside_weights)]
    trainable: Annotated[str | int | list[str], BeforeValidator(_trainable)]
    unfreeze_epoch: Annotated[int, Field(ge=0)]
    unfreeze_every: Annotated[int, Field(ge=0)]
    batch_norm: Literal["frozen", "train"]


class Head(schema.Section):
    """The group `head`: what turns the backbone's features into logits."""

    kind: Literal["linear", "concat_pool"]
    hidden: Annotated[int, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Optimizer(schema.Section):
    """The group `optimizer`: what a step minimises, and how."""

    name: Literal["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adamax"]
    weight_decay: Annotated[float, Field(ge=0)]
    l1: Annotated[float, Field(ge=0)]
    backbone_lr_scale: Annotated[float, Field(gt=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    grad_clip: Annotated[float, Field(ge=0)]

    @property
    def has_momentum(self) -> bool:
        """Whether the optimizer takes the setting `momentum`; the others have their own."""
        return self.name in ("sgd", "rmsprop")


class Schedule(schema.Section):
    """The group `schedule`: how the learning rate changes from epoch to epoch, or from step to step."""

    name: Literal[
        "constant", "step", "plateau", "cosine", "sgdr", "triangular", "triangular2", "exp_range", "one_cycle"
    ]
    warmup_epochs: Annotated[float, Field(ge=0)]
    gamma: Annotated[float, Field(gt=0, lt=1)]
    step_epochs: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=0)]
    cycle_epochs: Annotated[int, Field(ge=1)]
    cycle_mult: Annotated[int, Field(ge=1)]
    low: Annotated[float, Field(gt=0, lt=1)]
    pct_start: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _warms_up_once(self):
        if self.warmup_epochs and "low" in self.used():
            raise ValueError(
                f"schedule.warmup_epochs = {self.warmup_epochs:g}, but {self.name} rises from schedule.low by itself: "
                "set warmup_epochs to 0"
            )
        return self

    def used(self) -> dict[str, Any]:
        """Return the settings that the schedule of this name follows."""
        cycle = ("cycle_epochs", "low")
        keys = {
            "step": ("gamma", "step_epochs"),
            "plateau": ("gamma", "patience"),
            "sgdr": ("cycle_epochs", "cycle_mult"),
            "triangular": cycle,
            "triangular2": cycle,
            "exp_range": (*cycle, "gamma"),
            "one_cycle": ("low", "pct_start"),
        }
        return self.model_dump(include={"name", "warmup_epochs", *keys.get(self.name, ())})

    def depends_on_num_epochs(self) -> bool:
        """Tell whether an epoch's learning rate depends on how many are to come."""
        return self.name in ("cosine", "one_cycle")


class Augment(schema.Section):
    """The group `augment`: how a training picture varies from epoch to epoch, and what is made of every picture."""

    crop: Literal["random_resized", "random", "center"]
    min_scale: Annotated[float, Field(gt=0, le=1)]
    flip: Annotated[float, Field(ge=0, le=1)]
    rotation: Annotated[float, Field(ge=0, le=180)]
    color_jitter: Annotated[float, Field(ge=0, le=1)]
    rand_augment_ops: Annotated[int, Field(ge=0)]
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)]
    mixup: Annotated[float, Field(ge=0)]
    normalize: Literal["imagenet", "data"]
    views: Annotated[int, Field(ge=0)]

    def used(self) -> dict[str, Any]:
        """Return the settings that have a say: not those of another crop, or of RandAugment where it is off."""
        unused = {
            *({"min_scale"} if self.crop != "random_resized" else ()),
            *({"rand_augment_magnitude"} if not self.rand_augment_ops else ()),
        }
        return self.model_dump(exclude=unused)

    def drawn(self) -> dict[str, Any]:
        """Return those that a picture's looks follow from, beside its draws and before it is normalised."""
        return {key: value for key, value in self.used().items() if key not in ("normalize", "views")}


class EarlyStopping(schema.Section):
    """The group `early_stopping`: when a run ends before its last epoch."""

    patience: Annotated[int, Field(ge=0)]
    min_delta: Annotated[float, Field(ge=0)]


class Evaluate(schema.Section):
    """The group `evaluate`: how the finished model is measured."""

    tta: Literal["none", "flip", "ten_crop"]
    gallery: Annotated[int, Field(ge=0)]


class Params(schema.Section):
    """All settings of an experiment, as `params.yaml` holds them."""

    model_name: Annotated[str, Field(min_length=1)]
    num_classes: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    num_epochs: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, AfterValidator(device)]
    precision: Literal["fp32", "bf16", "auto"]
    keep: Literal["last", "best"]
    data: Data
    backbone: Backbone
    head: Head
    optimizer: Optimizer
    schedule: Schedule
    augment: Augment
    early_stopping: EarlyStopping
    evaluate: Evaluate
    resume: Annotated[str, Field(min_length=1)]
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    checkpoint_store_gb: Annotated[float, Field(ge=0)]
    feature_bank_gb: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _says_nothing_in_vain(self):
        backbone, optimizer = self.backbone, self.optimizer
        if backbone.trainable == "head":
            off = {
                "backbone.unfreeze_epoch": (backbone.unfreeze_epoch, 0),
                "backbone.unfreeze_every": (backbone.unfreeze_every, 0),
                "optimizer.backbone_lr_scale": (optimizer.backbone_lr_scale, 1),
                "optimizer.layer_decay": (optimizer.layer_decay, 1),
            }
            for key, (value, nothing) in off.items():
                if value != nothing:
                    raise ValueError(
                        f"{key} = {value:g} is of pretrained layers, and with backbone.trainable = head none trains: "
                        f"set trainable to all, or {key} to {nothing}"
                    )
        for key, value in {
            "backbone.unfreeze_epoch": backbone.unfreeze_epoch,
            "schedule.warmup_epochs": self.schedule.warmup_epochs,
        }.items():
            if value >= self.num_epochs:
                raise ValueError(f"{key} = {value:g} never ends: num_epochs is {self.num_epochs}, and must be more")
        if self.augment.mixup and self.batch_size == 1:
            raise ValueError("augment.mixup mixes the pictures of a batch, and batch_size is 1: set it to 2 or more")
        return self

    def used(self) -> dict[str, Any]:
        """Return the settings that have a say: not those of another optimizer, schedule, head or crop."""
        unused = {
            "momentum": not self.optimizer.has_momentum,
            "head": self.head.kind == "linear" and {"hidden", "dropout"},
            "early_stopping": not self.early_stopping.patience,
        }
        dump = self.model_dump(exclude={key: value for key, value in unused.items() if value})
        return dump | {"schedule": self.schedule.used(), "augment": self.augment.used()}


def load(path: str | Path = "params.yaml", changes: Sequence[str] = ()) -> Params:
    """Return the validated settings in the YAML file at `path`, with `changes` such as "lr=0.01" or "data.limit=20".

    Raises UserError, one line for each wrong key.
    """
    return schema.read(path, lambda _: Params, changes)


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of a script that people run by hand: its `-S key=value`, as `dvc exp run` has, gives `changes`.

    `description` is the script's docstring.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "-S",
        "--set-param",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting other than params.yaml's, which stays as it is",
    )
    return result
