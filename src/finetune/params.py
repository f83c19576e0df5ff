"""`params.yaml` as typed, validated objects; its comments say what each setting is for.

The file holds every default, so a key that is missing is an error as much as one that is unknown.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from finetune import schema

from pydantic import AfterValidator, Field, model_validator


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("should be auto, cpu, cuda or cuda:N")
    return name


def _inside_weights(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("should be imagenet, none or the name of a file in weights/ (copy yours there)")
    return name


class Data(schema.Section):
    """The group `data`: which pictures, and how they are kept."""

    source: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=8, le=4096)]
    resize: Annotated[int, Field(ge=8, le=4096)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Annotated[int, Field(ge=0)]
    max_skipped: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _fits(self):
        if self.image_size > self.resize:
            raise ValueError(
                f"data.image_size = {self.image_size} is larger than data.resize = {self.resize}: "
                f"set data.resize to {self.image_size} or more"
            )
        return self


class Backbone(schema.Section):
    """The group `backbone`: the pretrained network and which part of it trains."""

    weights: Annotated[str, Field(min_length=1), AfterValidator(_inside_weights)]
    trainable: Literal["head", "all"]


class Augment(schema.Section):
    """The group `augment`: how a training picture varies from epoch to epoch."""

    min_scale: Annotated[float, Field(gt=0, le=1)]


class Schedule(schema.Section):
    """The group `schedule`: how the learning rate changes from epoch to epoch."""

    name: Literal["constant", "step", "plateau", "cosine"]
    gamma: Annotated[float, Field(gt=0, lt=1)]
    step_epochs: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=0)]

    def used(self) -> dict[str, str | float | int]:
        """Return the settings that the schedule of this name follows."""
        keys = {"step": ("gamma", "step_epochs"), "plateau": ("gamma", "patience")}.get(self.name, ())
        return self.model_dump(include={"name", *keys})

    def depends_on_num_epochs(self) -> bool:
        """Tell whether an epoch's learning rate depends on how many are to come."""
        return self.name == "cosine"


class Params(schema.Section):
    """All settings of an experiment, as `params.yaml` holds them."""

    model_name: Annotated[str, Field(min_length=1)]
    num_classes: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    num_epochs: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, AfterValidator(_device)]
    data: Data
    backbone: Backbone
    augment: Augment
    schedule: Schedule
    resume: Annotated[str, Field(min_length=1)]
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    checkpoint_store_gb: Annotated[float, Field(ge=0)]


def load(path: str | Path = "params.yaml") -> Params:
    """Return the validated settings in the YAML file at `path`. Raises UserError, one line for each wrong key."""
    return schema.read(path, lambda _: Params)
