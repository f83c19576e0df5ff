"""What a report shows: experiments as plain values, and the one HTML page that holds them and what draws them."""

import base64
import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import comparison, repeats
from finetune.comparison import Predictions
from finetune.experiments import PREDICTIONS, Experiment
from finetune.search import overrides

import numpy as np
from PIL import Image
from tqdm import tqdm

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("words.js", "statistics.js", "table.js", "charts.js", "plots.js", "details.js", "main.js")  # see each other

RANKED_BY = (
    ("eval.acc", "eval.loss"),
    ("val_acc", "val_loss"),
)  # what is highest, then lowest; the first that is there
FIRST = ("eval.acc", "val_acc", "val_loss")  # of the metrics' columns
ASIDE = ("continues", "step", "training_time")  # metrics that have a place of their own
MODEL = "models/model.safetensors"
MADE = ("data/prepared", "models/backbone.safetensors", MODEL)  # outs whose bits are worth comparing
RUN = re.compile("[0-9a-f]{16}")  # what an experiment that had no name is called
DIGITS = 5  # of a curve's numbers that count
WITH_PICTURES = 20  # experiments, the best; and within
PICTURES_ROOM = 10 * 2**20  # bytes
WIDTH = 960  # px at most of an embedded picture
SMALL = 40_000  # bytes of one that is embedded as it is


@dataclass(frozen=True)
class Record:
    """An experiment with all that a report reads of it."""

    experiment: Experiment
    state: str = "finished"  # or queued, running, failed
    epochs: dict[str, Sequence[float | None]] = field(default_factory=dict)  # {"step": [0, 1], "val_acc": [0.8, 0.9]}
    predictions: Predictions | None = None  # of the validation pictures
    pictures: dict[str, Path] = field(default_factory=dict)
    changed: Sequence[str] = ()  # project files that are not as in the commit on which it was run, settings apart
    missing: Sequence[str] = ()  # what could not be read, and what to do about it

    def rank(self) -> tuple[float, float]:
        """The key to sort by, the best first; inf where it has no results."""
        for names in RANKED_BY:
            highest, lowest = (_number(self.experiment.metrics.get(name)) for name in names)
            if highest is not None:
                return -highest, math.inf if lowest is None else lowest
        return math.inf, math.inf


def contents(records: Sequence[Record], baselines: dict[str, dict[str, Any]], head: str) -> dict[str, Any]:
    """Return what the page shows of the experiments, the best first, in plain values.

    `baselines` has the settings of each commit on which an experiment was run; `head` is the one that is checked out.
    The best have their pictures in it, as many as there is room for.
    """
    ordered = sorted(records, key=Record.rank)
    names, common = split([each.experiment.settings for each in ordered if each.experiment.settings])
    numbers = [key for each in ordered for key, value in each.experiment.metrics.items() if _is_number(value)]
    found = [key for key in dict.fromkeys(numbers) if key not in (*ASIDE, *names, *common)]
    metrics = [*(key for key in FIRST if key in found), *(key for key in found if key not in FIRST)]
    verdicts, groups = against_best(ordered), grouped(ordered)
    sets: dict[str, int] = {}  # the files that stages read, each collection once
    pictures = Pictures(WITH_PICTURES, PICTURES_ROOM)
    plain = []
    all_of_each = tqdm(
        zip(ordered, verdicts, groups, strict=True),
        "pictures",
        len(ordered),
        unit=" experiments",
        delay=2,
        disable=None,
    )
    for record, verdict, group in all_of_each:
        experiment = record.experiment
        embedded = pictures.embedded(record.pictures)
        values = {
            "name": experiment.name,
            "state": record.state,
            "revision": experiment.revision,
            "baseline": experiment.baseline,
            "created": experiment.created,
            "settings": [_plain(experiment.settings.get(name)) for name in names],
            "metrics": [_number(experiment.metrics.get(name)) for name in metrics],
            "seconds": _number(experiment.metrics.get("training_time")),
            "size": experiment.sizes.get(MODEL),
            "continues": experiment.metrics.get("continues"),
            "epochs": {name: [_number(value, DIGITS) for value in column] for name, column in record.epochs.items()},
            "command": reproduction(record, baselines.get(experiment.baseline), head),
            "changed": list(record.changed),
            "read": [sets.setdefault(each, len(sets)) for each in _read(experiment)],
            "made": {path: experiment.outs[path][:12] for path in MADE if path in experiment.outs},
            "missing": list(record.missing),
            "pictures": embedded,
            "leftOut": (bool(record.pictures) and not embedded) or None,
            **verdict,
            **group,
        }
        plain.append({key: value for key, value in values.items() if value not in (None, [], {}, "")})
    return {
        "params": names,
        "common": {name: _plain(value) for name, value in common.items()},
        "metrics": metrics,
        "sets": [json.loads(each) for each in sets],
        "head": head,
        "experiments": plain,
    }


def split(settings: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the settings that differ, in their order, and those that are the same in all."""
    names = dict.fromkeys(name for each in settings for name in each)
    first = settings[0] if settings else {}
    same = [name for name in names if all(name in each and each[name] == first.get(name) for each in settings)]
    return [name for name in names if name not in same], {name: first[name] for name in same}


def against_best(ordered: Sequence[Record]) -> list[dict[str, Any]]:
    """Return for each record how it compares with the first, which has the highest accuracy.

    `equal` is True where the two can't be told apart and False where it is shown to be worse. `right` has a bit for
    each picture, in base64, in the order of their paths, `n` is their number, and `of` identifies pictures and labels:
    two with the same can be compared.
    """
    if not ordered:
        return []
    best = ordered[0]
    found: list[dict[str, Any]] = [_right(each.predictions) if each.predictions else {} for each in ordered]
    if not best.predictions:
        return found
    others = {index: each.predictions for index, each in enumerate(ordered) if index and each.predictions}
    for index, is_worse in zip(others, comparison.told_apart(best.predictions, list(others.values())), strict=True):
        if is_worse is not None:
            found[index]["equal"] = not is_worse
    return found


def grouped(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return for each record what tells the page which others repeat it, as src/compare.py finds them.

    Two with the same `alike` have the same settings, seed and fold apart. Two with the same `group` repeat each other:
    their code and files are the same, too, and their commit, and they were evaluated. `repeat` is seed and fold,
    `folds` says whether each fold validates other pictures.
    """
    settings: list[Any] = []
    shared: list[Any] = []
    found: list[dict[str, Any]] = []
    for experiment, state in ((each.experiment, each.state) for each in records):
        known: dict[str, Any] = {"alike": _place(settings, repeats.shared_settings(experiment.settings))}
        group = repeats.group(experiment)
        if group and experiment.baseline and state == "finished" and PREDICTIONS in experiment.outs:
            known["group"] = _place(shared, (group, experiment.baseline))
            known["repeat"] = repeats.seed_and_fold(experiment.settings)
            known["folds"] = bool(experiment.settings.get("data.folds")) or None
        found.append(known)
    return found


def _place(known: list[Any], thing: Any) -> int:
    """Return the place of a thing in a list of what is known, where it is added if need be."""
    if thing not in known:
        known.append(thing)
    return known.index(thing)


def _right(predictions: Predictions) -> dict[str, Any]:
    order = np.argsort(predictions.keys)
    pictures = [f"{predictions.keys[index]}\0{predictions.labels[index]}" for index in order]
    bits = np.packbits(predictions.correct[order]).tobytes()
    return {
        "right": base64.b64encode(bits).decode(),
        "n": len(order),
        "of": hashlib.sha256("\0".join(pictures).encode()).hexdigest()[:12],
    }


def epochs(files: dict[str, Path]) -> dict[str, Sequence[float | None]]:
    """Return the columns of curves, each a TSV file of `step` and a value: "step" first, None where one has no value.

    Raises ValueError where a file is something else.
    """
    curves: dict[str, dict[int, float]] = {}
    for name, file in files.items():
        _, *rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
        curves[name] = {int(step): float(value) for step, value in rows}
    steps = sorted({step for curve in curves.values() for step in curve})
    return {"step": steps} | {name: [curve.get(step) for step in steps] for name, curve in curves.items()}


def reproduction(record: Record, baseline: dict[str, Any] | None, head: str) -> list[str]:
    """Return the lines that run the experiment once more, for a shell; none where its settings are not known.

    `baseline` has the settings of the commit on which it was run; None of a branch or commit, which has its results.
    """
    experiment, settings = record.experiment, record.experiment.settings
    if baseline is None:
        return [f"git checkout {experiment.revision[:10]}", "dvc repro"] if experiment.revision else []
    if not settings:
        return []
    parent = str(experiment.metrics.get("continues", ""))
    if settings.get("resume") == "last" and parent and not RUN.fullmatch(parent):
        settings = settings | {"resume": parent}  # by now `last` is another one
    lines = []
    if experiment.baseline != head:
        lines.append(f"git checkout {experiment.baseline[:10]}")
    if record.changed and experiment.revision:
        lines.append(shlex.join(["git", "checkout", experiment.revision[:10], "--", *record.changed]))
    other = {name: value for name, value in settings.items() if baseline.get(name, value) != value}
    new = {name: value for name, value in settings.items() if name not in baseline}
    removed = [f"~{name}" for name in baseline if name not in settings]
    options = [*overrides(other), *(f"+{each}" for each in overrides(new)), *removed]
    return [*lines, shlex.join(["dvc", "exp", "run", *(word for option in options for word in ("-S", option))])]


def _read(experiment: Experiment) -> list[str]:
    """Return for each stage the digests of what it read and no stage made, {"train": {path: digest}}, as JSON."""
    outs = experiment.outs
    return [
        json.dumps({name: {path: digest[:12] for path, digest in stage["deps"].items() if path not in outs}})
        for name, stage in experiment.stages.items()
    ]


class Pictures:
    """Pictures for a page, scaled down, of a number of experiments and within a number of bytes."""

    def __init__(self, experiments: int, room: int):
        self.experiments = experiments
        self.room = room

    def embedded(self, files: dict[str, Path]) -> list[dict[str, str]]:
        """Return the name of each picture and what an <img> shows; those of an experiment all, or none of them."""
        if not files or not self.experiments:
            return []
        found = []
        for name, file in files.items():
            with suppress(OSError):  # it is no picture
                found.append({"name": name, "src": _source(file)})
        size = sum(len(each["src"]) for each in found)
        if size > self.room:
            self.experiments = 0  # or a worse one would have what a better one lacks
            return []
        self.experiments -= 1
        self.room -= size
        return found


def _source(file: Path) -> str:
    """Return what an <img> shows: a small PNG as it is, else a picture scaled down. Raises OSError where it is none."""
    with Image.open(file) as picture:
        kind, content = "png", file.read_bytes()
        if picture.format != "PNG" or len(content) > SMALL:
            picture.thumbnail((WIDTH, 4 * WIDTH))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "webp", quality=80, method=2)
            kind, content = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Return a setting as JSON can have it."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, str)) or _is_number(value) else str(value)


def _number(value: Any, digits: int = 8) -> float | None:
    """Return a number with so many digits that count, or None of anything else: JSON knows neither nan nor inf."""
    if not _is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def page(shown: dict[str, Any]) -> str:
    """Return the HTML page that shows `contents`. It loads nothing, and is barred from it by its own policy."""
    script = "\n".join(["'use strict';", *((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)])
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    values = {
        "SCRIPT_DIGEST": _digest(script),
        "STYLE_DIGEST": _digest(style),
        "STYLE": style,
        "DATA": json.dumps(shown, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    parts = (PAGE / "page.html").read_text(encoding="utf-8").split("@@")  # text, name, text, name, …
    return "".join(values[part] if index % 2 else part for index, part in enumerate(parts))


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
