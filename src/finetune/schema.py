"""YAML files as typed, validated objects, with errors that name the key, its value and what is allowed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from finetune.errors import UserError, nearest

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class Section(BaseModel):
    """A group of keys: all must be there (but for those with a default), no others, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def read(path: str | Path, kind_of: Callable[[Any], type[S]], changes: Sequence[str] = ()) -> S:
    """Return what the YAML file at `path` holds, as the kind of section that `kind_of` chooses for its contents.

    With `changes`, each "key=value" or "group.key=value" in YAML. Raises UserError, one line for each key that is
    unknown, missing, of the wrong type or out of range.
    """
    try:
        contents = YAML(typ="safe").load(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run from the project's top folder.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    for change in changes:
        _apply(change, contents)
    kind = kind_of(contents)
    try:
        return kind.model_validate(contents)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_explain(each, keys(kind))}" for each in error.errors())) from None


def _apply(change: str, contents: Any) -> None:
    """Make a change such as "data.limit=20" in the contents of a file."""
    key, equals, value = change.partition("=")
    *groups, name = key.split(".")
    try:
        if not equals:
            raise ValueError("it has no =")
        for group in groups:
            contents = contents[group]
        contents[name] = YAML(typ="safe").load(value)
    except (KeyError, TypeError):
        raise UserError(f"-S {change}: there is no group {'.'.join(groups)}.") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"-S {change}: {str(error).splitlines()[0]}. Write it as -S lr=0.01") from None


def _explain(error: ErrorDetails, known: list[str]) -> str:
    """Return one line for an error of pydantic's: the key, its value, what is allowed, the nearest known key."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}.{nearest(key, known) or ' Known: ' + ', '.join(known) + '.'}"
    if error["type"] == "missing":
        return f"the key {key} is missing."
    message = _said(error)
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return message  # of several keys, which it names
    return f"{key} = {error['input']!r} {message}" if key else "should hold `key: value` lines"


def _said(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ")


def keys(kind: type[Section]) -> list[str]:
    """Return the keys of a section, those of the sections in it with their names in front."""
    return list(_fields(kind))


def problem(kind: type[Section], key: str, value: Any) -> str | None:
    """Return what is wrong with a value for one of a section's `keys`, or None. What others ask of it is left aside."""
    field = _fields(kind)[key]
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(annotated, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        return _said(error.errors()[0])
    return None


def _fields(kind: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= _fields(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
