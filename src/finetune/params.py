"""`params.yaml` as typed, validated objects; its comments say what each setting is for.

The file holds every default, so a key that is missing is an error as much as one that is unknown.
"""

from pathlib import Path
from typing import Annotated, Literal

from finetune.errors import UserError, nearest

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def _inside_weights(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("should be imagenet, none or the name of a file in weights/ (copy yours there)")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Data(_Section):
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


class Backbone(_Section):
    """The group `backbone`: the pretrained network and which part of it trains."""

    weights: Annotated[str, Field(min_length=1), AfterValidator(_inside_weights)]
    trainable: Literal["head", "all"]


class Params(_Section):
    """All settings of an experiment, as `params.yaml` holds them."""

    model_name: Annotated[str, Field(min_length=1)]
    num_classes: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    num_epochs: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    data: Data
    backbone: Backbone


def load(path: str | Path = "params.yaml") -> Params:
    """Return the validated settings in the YAML file at `path`.

    Raises UserError, one line for each key that is unknown, missing, of the wrong type or out of range.
    """
    try:
        settings = YAML(typ="safe").load(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run from the project's top folder.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Params.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_explain(e)}" for e in error.errors())) from None


def _explain(error: dict) -> str:
    """Return one line for a pydantic error: the key, its value, what is allowed, the nearest known key."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields = _known_keys()
        return f"unknown key {key}.{nearest(key, fields) or ' Known: ' + ', '.join(fields) + '.'}"
    if error["type"] == "missing":
        return f"the key {key} is missing. Put it back: `git diff params.yaml` shows what it was."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return message
    if key == "device":
        message = "should be auto, cpu, cuda or cuda:N"
    if not key:
        return "should hold the settings as `key: value` lines"
    return f"{key} = {error['input']!r} {message}"


def _known_keys() -> list[str]:
    keys = []
    for name, field in Params.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys
