"""A sweep's YAML file as typed, validated objects: which settings to try, how, and what makes one better than another.

metric: val_acc
direction: maximize
method: tpe                # or grid, random
budget: {trials: 30, minutes: 20}
set: {num_epochs: 3}       # other than params.yaml's in all trials
search:
  optimizer.name: [sgd, adamw]
  lr: {low: 0.0001, high: 0.1, log: true}
  momentum: {low: 0.0, high: 0.95, when: {optimizer.name: sgd}}
repeat: {seed: [0, 1, 2]}  # a trial is as good as the mean of these
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from finetune import params, schema
from finetune.errors import UserError, nearest

from pydantic import BeforeValidator, Field, model_validator

OF_EPOCHS = ("acc", "loss", "val_acc", "val_loss")  # the metrics that training prints after each epoch
OF_SPLITS = ("acc", "balanced_acc", "loss", "f1", "auroc", "ece")  # as metrics.summary has them
METRICS = (*OF_EPOCHS, "training_time", *(f"{split}.{name}" for split in ("eval", "test") for name in OF_SPLITS))
DIGITS = 4  # of a number that is drawn from a range: those after are noise, and a command is read and pasted

Point = dict[str, Any]  # settings, {"optimizer.name": "sgd", "lr": 0.01}


class Axis(schema.Section):
    """A setting that is searched: a list of values, or a range."""

    values: list[Any] | None = None
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    step: Annotated[float | int, Field(gt=0)] | None = None
    when: dict[str, Any] = Field(default_factory=dict)  # the values that others must have, {"optimizer.name": "sgd"}

    def problem(self) -> str | None:
        """Return what is wrong with the keys, or None."""
        if [self.low is None, self.high is None] != [self.values is not None] * 2:
            return "should be a list of values, or have low and high"
        if self.low is None or self.high is None:
            if not self.values or self.log or self.step:
                return "is a list of values: it needs at least one, and log and step are of a range"
        elif self.low >= self.high:
            return f"has low = {self.low:g}, which is not below high = {self.high:g}"
        elif self.log and (self.low <= 0 or self.step):
            return "has log: low must be above 0 then, and there is no step"
        return None

    @property
    def is_whole(self) -> bool:
        """Whether the range is one of whole numbers."""
        return all(isinstance(each, int) for each in (self.low, self.high, self.step or 1))

    def holds(self, point: Point) -> bool:
        """Tell whether the setting has a say in a point."""
        return all(key in point and point[key] in _listed(wanted) for key, wanted in self.when.items())

    def grid(self) -> list[Any]:
        """Return the values that a grid has: those listed, or from low to high by the step."""
        if self.low is None or self.high is None:
            return self.values or []
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + index * step for index in range(count)]
        return values if self.is_whole else [_short(value) for value in values]


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _axis(value: Any) -> Any:
    return {"values": value} if isinstance(value, list) else value


class Budget(schema.Section):
    """How much a sweep may do; what ends first."""

    trials: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float | int, Field(gt=0)] | None = None


class Sweep(schema.Section):
    """A sweep, as its file describes it."""

    metric: str
    direction: Literal["maximize", "minimize"]
    method: Literal["grid", "random", "tpe"]
    search: dict[str, Annotated[Axis, BeforeValidator(_axis)]]
    set: dict[str, Any] = Field(default_factory=dict)
    repeat: dict[str, list[Any]] = Field(default_factory=dict)
    budget: Budget = Budget()
    pruner: Literal["none", "median", "successive_halving"] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of random and tpe

    @model_validator(mode="after")
    def _is_possible(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric = {self.metric!r} is none that a trial reports.{_known(self.metric, METRICS)}")
        if not self.search:
            raise ValueError("search is empty: it names the settings to try")
        if self.pruner != "none" and self.metric not in OF_EPOCHS:
            raise ValueError(f"pruner looks at a metric of each epoch ({', '.join(OF_EPOCHS)}), not at {self.metric}")
        if self.method != "grid" and not (self.budget.trials or self.budget.minutes):
            raise ValueError(f"budget is missing: method {self.method} goes on until budget.trials or budget.minutes")
        seen: list[str] = []
        for key, axis in self.search.items():
            if problem := axis.problem():
                raise ValueError(f"search.{key} {problem}")
            if self.method == "grid" and axis.values is None and not (axis.step or axis.is_whole):
                raise ValueError(f"search.{key} is a range: in a grid it needs a step, or a list of values")
            for other in axis.when:
                if other not in seen:
                    raise ValueError(f"search.{key}.when asks for {other}, which is not searched before it")
            seen.append(key)
        for key in self.set:
            if key in self.search or key in self.repeat:
                raise ValueError(f"{key} is in set, and searched or repeated, too")
        for key, values in self.repeat.items():
            if key in self.search or not values:
                raise ValueError(f"repeat.{key} needs values, and not a setting that is searched")
        return self

    @property
    def repeats(self) -> list[Point]:
        """What the experiments of a trial differ in, the first one first."""
        return [dict(zip(self.repeat, values, strict=True)) for values in itertools.product(*self.repeat.values())]

    def points(self) -> Iterator[Point]:
        """Yield the points of the grid."""

        def below(point: Point, axes: list[tuple[str, Axis]]) -> Iterator[Point]:
            if not axes:
                yield point
                return
            (key, axis), *rest = axes
            if not axis.holds(point):
                yield from below(point, rest)
                return
            for value in axis.grid():
                yield from below(point | {key: value}, rest)

        yield from below({}, list(self.search.items()))

    def suggested(self, trial: Any) -> Point:
        """Return the point that a trial of Optuna's is to try."""
        point: Point = {}
        for key, axis in self.search.items():
            if not axis.holds(point):
                continue
            if axis.values is not None:
                labels = [label(value) for value in axis.values]
                point[key] = axis.values[labels.index(trial.suggest_categorical(key, labels))]
            elif axis.is_whole:
                point[key] = trial.suggest_int(key, axis.low, axis.high, step=axis.step or 1, log=axis.log)
            else:
                point[key] = _short(trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log))
        return point


def label(value: Any) -> Any:
    """Return a value as Optuna takes it: a list as text."""
    return json.dumps(value) if isinstance(value, list) else value


def overrides(point: Point) -> list[str]:
    """Return what `dvc exp run -S` takes for each setting of a point, "lr=0.01"."""
    return [f"{key}={_written(value)}" for key, value in point.items()]


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def load(path: str | Path) -> Sweep:
    """Return the sweep in the YAML file at `path`. Raises UserError, a line for each key that is wrong.

    Its settings must be those of params.yaml, and each value one that its setting may have.
    """
    sweep = schema.read(path, lambda _: Sweep)
    wrong = []
    groups = {
        "set": {key: [value] for key, value in sweep.set.items()},
        "repeat": sweep.repeat,
        "search": {key: axis.values or [axis.low, axis.high] for key, axis in sweep.search.items()},
    }
    known = schema.keys(params.Params)
    for group, settings in groups.items():
        for key, values in settings.items():
            if key not in known:
                wrong.append(f"{path}: {group}.{key} is no setting of params.yaml.{_known(key, known)}")
                continue
            for value in values:
                problem = schema.problem(params.Params, key, value)
                if problem:
                    wrong.append(f"{path}: {group}.{key} has {value!r}, which {problem}")
    if wrong:
        raise UserError("\n".join(wrong))
    if sweep.method == "grid":
        for point in sweep.points():  # each of them may be one of settings that do not go together
            check(sweep, point)
    return sweep


def check(sweep: Sweep, point: Point) -> None:
    """Raise UserError where params.yaml with a point's settings is none of an experiment's."""
    for repeat in sweep.repeats:
        changes = overrides(sweep.set | point | repeat)
        try:
            params.load(changes=changes)
        except UserError as error:
            raise UserError(f"{' '.join(changes)}: {error}") from None


def _known(name: str, names: tuple[str, ...] | list[str]) -> str:
    return nearest(name, names) or f" Known: {', '.join(names)}."
