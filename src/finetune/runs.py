"""What a run is, and the store that keeps the checkpoints of each.

    <run>/about.json                        what the run's result follows from, and who asked for it first
    <run>/00003-0000012.pt                  a checkpoint: after 3 epochs and 12 steps of the next
    <run>/00005-0000000.finished.pt         the one at the end of the epochs that were asked for
    locks/<run>                             held by the process that trains the run

A run's name is the digest of all that its result follows from, so a checkpoint that is found is the right one. The
store belongs to the main checkout (DVC_ROOT), as DVC removes the folder of a queued experiment that failed.
"""

import ast
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

from finetune.files import replaced, resolve_user_path
from finetune.params import Params

from filelock import FileLock, Timeout

SOURCES = Path(__file__).parent.parent
KEPT = 2  # unfinished checkpoints of a run, so that there is one before the newest

# Settings that a run's result does not follow from, or only by way of the digests of data, weights and device.
ASIDE = {
    *("model_name", "num_classes", "device", "precision", "evaluate", "resume"),
    *("checkpoint_minutes", "checkpoint_store_gb", "feature_bank_gb"),
}
ASIDE_IN_GROUPS = {
    "data": {"source", "resize", "val_fraction", "folds", "fold", "split_seed", "limit", "max_skipped"},
    "backbone": {"weights"},
}


# What a run is ------------------------------------------------------------------------------------------------------


def identity(
    settings: Params, store_files: dict, classes: list[str], backbone: dict, arithmetic: list[str], parent: dict | None
) -> dict:
    """Return all that a run's result follows from, in plain values.

    `store_files` are the digests of the image store's files; `backbone` is what is said about its weights, with their
    digest; `arithmetic` the type of the device and its precision; `parent` the run and the number of epochs that this
    one trains on top of. `num_epochs` is in it only where the schedule depends on it: else a longer run begins as the
    shorter one did.
    """
    chosen = {key: value for key, value in settings.used().items() if key not in ASIDE}
    for group, keys in ASIDE_IN_GROUPS.items():
        chosen[group] = {key: value for key, value in chosen[group].items() if key not in keys}
    if not settings.schedule.depends_on_num_epochs():
        del chosen["num_epochs"]
    return {
        "settings": chosen,
        "data": {name: file["sha256"] for name, file in store_files.items()} | {"classes": classes},
        "backbone": backbone,
        "arithmetic": arithmetic,
        "parent": parent,
        "code": code_digests(),
        "versions": versions(backbone["model_name"]),
    }


def versions(model_name: str) -> dict[str, str]:
    """Return the versions of the packages that a model's arithmetic is made of."""
    names = ["numpy", "torch", "torchvision", *(["timm"] if model_name.startswith("timm:") else [])]
    return {name: version(name) for name in names}


def run_id(identity: dict) -> str:
    """Return the run's name: 16 hexadecimal digits of the digest of its identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def code_digests() -> dict[str, str]:
    """Return the digest of each of the project's files that this process has imported, by name.

    Of what the code does, not how it is written: neither comments, docstrings nor layout count.
    """
    places = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    files = {Path(place) for place in places if place}
    own = sorted(file for file in files if file.is_relative_to(SOURCES) and file.suffix == ".py")
    return {file.relative_to(SOURCES).as_posix(): code_digest(file.read_text("utf-8")) for file in own}


@cache
def code_digest(source: str) -> str:
    """Return the sha256 of Python source as this version of Python reads it: no comments, docstrings or layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


# The store ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint's file. They sort by how far they are, which no clock has a say in."""

    epochs: int  # that are complete
    steps: int  # of the next
    finished: bool
    path: Path

    @classmethod
    def at(cls, path: Path) -> "Checkpoint | None":
        """Return the checkpoint that a file's name says it is, or None."""
        match = re.fullmatch(r"(\d+)-(\d+)(\.finished)?\.pt", path.name)
        return match and cls(int(match[1]), int(match[2]), bool(match[3]), path)


class Run:
    """A run's folder in the store."""

    def __init__(self, store: Path, name: str):
        self.store, self.name = store, name
        self.folder = store / name

    @contextmanager
    def held(self, about: dict) -> Iterator[None]:
        """Hold the run, so that no other process trains it or removes it; wait for one that does.

        `about` is kept beside the checkpoints. The system frees a killed process's hold at once.
        """
        lock = self._lock()
        try:
            lock.acquire(timeout=1)  # longer than one needs that only looks whether it is held
        except Timeout:
            print(f"another process is training this very run ({self.name}): waiting, to take its result")
            lock.acquire()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):  # by a process killed while writing
                left.unlink()
            if not (self.folder / "about.json").exists():
                with replaced(self.folder / "about.json") as temporary:
                    temporary.write_text(json.dumps(about, indent=2) + "\n")
            yield
        finally:
            lock.release()

    def checkpoints(self, epochs: float = math.inf) -> list[Checkpoint]:
        """Return the run's checkpoints of up to that many epochs, the furthest last."""
        found = filter(None, map(Checkpoint.at, self.folder.glob("*.pt")))
        return sorted(each for each in found if (each.epochs, each.steps) <= (epochs, 0))

    def path(self, epochs: int, steps: int) -> Path:
        """Return where the checkpoint of that moment belongs."""
        return self.folder / f"{epochs:05}-{steps:07}.pt"

    def finish(self, epochs: int) -> Path:
        """Mark the checkpoint after that many epochs as one to keep, and return its file."""
        path = self.path(epochs, 0)
        finished = path.with_suffix(".finished.pt")
        if path.exists():
            path.replace(finished)
        self.tidy(epochs)
        self._anew.unlink(missing_ok=True)
        return finished

    def tidy(self, epochs: int) -> None:
        """Remove checkpoints on the way to `epochs`: all but the last two, or all where the run got there.

        Not those that are further, of a longer run that was interrupted.
        """
        found = self.checkpoints(epochs)
        way = [each for each in found if not each.finished]
        there = found and found[-1].finished and found[-1].epochs == epochs
        for each in way if there else way[:-KEPT]:
            each.path.unlink()

    def begin_anew(self) -> None:
        """Remove the run's checkpoints, once: if it is killed then, those it has had since stay until it is done."""
        if not self._anew.exists():
            for each in self.checkpoints():
                each.path.unlink()
            self._anew.touch()

    def remove(self) -> bool:
        """Remove the run from the store, unless a process holds it; tell whether it is gone."""
        with self._held_if_free() as free:
            if free:
                with suppress(FileNotFoundError):  # another process was first
                    shutil.rmtree(self.folder)
        return free

    def in_use(self) -> bool:
        """Tell whether a process holds the run."""
        with self._held_if_free() as free:
            return not free

    @property
    def is_finished(self) -> bool:
        """Whether the run has got as far as it was asked to, and no process has taken it further since."""
        found = self.checkpoints()
        return bool(found) and found[-1].finished

    @cached_property
    def about(self) -> dict:
        """What was kept beside the checkpoints; empty where it can't be read."""
        try:
            return json.loads((self.folder / "about.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def bytes(self) -> int:
        """The size of the run's files."""
        return sum(status.st_size for status in self._statuses())

    @property
    def saved(self) -> float:
        """When the run was saved last, in seconds since 1970 by the clock of then."""
        return max((status.st_mtime for status in self._statuses()), default=0)

    def _statuses(self) -> Iterator[os.stat_result]:
        """Yield the status of each of the run's files; another process may remove some meanwhile."""
        for file in self.folder.glob("*"):
            with suppress(FileNotFoundError):
                yield file.stat()

    @property
    def _anew(self) -> Path:
        return self.folder / "anew"

    @contextmanager
    def _held_if_free(self) -> Iterator[bool]:
        """Hold the run where no process does; yield whether that is so."""
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self) -> FileLock:
        return FileLock(self.store / "locks" / self.name)


def store_folder() -> Path:
    """Return the folder of the store: CHECKPOINTS_DIR where it is set, else in the main checkout. Raises UserError."""
    if os.environ.get("CHECKPOINTS_DIR"):
        return resolve_user_path(os.environ["CHECKPOINTS_DIR"], "CHECKPOINTS_DIR")
    return scratch() / "checkpoints"


def scratch() -> Path:
    """Return the main checkout's folder for what every run may use and none needs; a sweep's clones are told which."""
    return Path(os.environ.get("FINETUNE_SCRATCH") or Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp"))


def stored_runs(store: Path) -> list[Run]:
    """Return the runs in the store, the one saved longest ago first."""
    folders = [path for path in store.glob("*/") if re.fullmatch("[0-9a-f]{16}", path.name)]
    return sorted((Run(store, folder.name) for folder in folders), key=lambda run: (run.saved, run.name))


def make_room(store: Path, limit: float) -> None:
    """Remove runs until the store is within `limit` bytes: finished ones first, of each kind the oldest first.

    Never one that a process holds, so the store may stay larger.
    """
    runs = stored_runs(store)
    total = sum(run.bytes for run in runs)
    for run in sorted(runs, key=lambda run: not run.is_finished):  # keeps the order
        if total <= limit:
            return
        size = run.bytes
        with suppress(OSError):  # another user's, perhaps
            if run.remove():
                total -= size


def age(saved: float) -> float:
    """Return the seconds since `saved`; 0 where the clock was set back since."""
    return max(0.0, time.time() - saved)
