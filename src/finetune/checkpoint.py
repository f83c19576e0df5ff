"""What a checkpoint holds: all that training on needs, so that a run that goes on ends as if it had never stopped."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import distributed
from finetune.digests import digest
from finetune.errors import UserError
from finetune.files import replaced
from finetune.optim import LearningRate
from finetune.runs import Run, make_room

import torch
from torch import Tensor, nn

FORMAT = 3


class Damaged(Exception):
    """A file that is no whole checkpoint of this format: the message says what is wrong with it."""


@dataclass
class Session:
    """All that changes while a run trains. No generator's state: what is random follows from (seed, epoch, step)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LearningRate
    lineage: list[dict] = field(default_factory=list)  # the runs that this one trains on top of, the first one first
    history: list[dict] = field(default_factory=list)  # a row for each complete epoch, with those of the lineage
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch that has begun, see training.Sums
    rates: dict[str, float] = field(default_factory=dict)  # at its first step, of each group of layers
    best: dict[str, Any] = field(default_factory=dict)  # the best epoch's row and tensors, where they are to be kept
    seconds: float = 0.0  # that the run has taken so far, but for those since `started`
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        # The names of the tensors that are not the backbone's: what trains, buffers, and what a parent has trained.
        self.kept = {name for name, _ in _indices(self.optimizer.state_dict())}
        self.kept |= {name for name, _ in self.model.named_buffers()}

    def elapsed(self) -> float:
        """Return the run's seconds of training; what a killed process did after its last save does not count."""
        return self.seconds + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """Return a copy on the CPU, which training on leaves as it is."""
        return _copied(
            {
                "model": self._tensors(),
                "optimizer": self.optimizer.state_dict(),
                "optimizer_name": type(self.optimizer).__name__,
                "schedule": self.schedule.state_dict(),
                "lineage": self.lineage,
                "history": self.history,
                "sums": self.sums,
                "rates": self.rates,
                "seconds": self.elapsed(),
            }
        ) | {"best": self.best}  # a copy already, which nothing changes

    def keep_if_best(self) -> None:
        """Keep the tensors where the last epoch is the best one: by val_acc, then val_loss, the first of equals."""

        def rank(row: dict) -> tuple[float, float]:
            return row["val_acc"], -row["val_loss"]

        if not self.best or rank(self.history[-1]) > rank(self.best["row"]):
            self.best = _copied({"row": self.history[-1], "model": self._tensors()})

    def take_best(self) -> None:
        """Put the tensors of the best epoch into the model."""
        self._take_tensors(self.best["model"])

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was."""
        self._take_tensors(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.lineage, self.history, self.sums = state["lineage"], state["history"], state["sums"]
        self.rates, self.best = state["rates"], state["best"]
        self.seconds, self.started = state["seconds"], time.perf_counter()

    def inherit(self, name: str, state: dict[str, Any]) -> None:
        """Begin on top of a finished run: with its tensors, its history, and what its optimizer remembers of each.

        Where the run has kept an epoch before its last, with the tensors of that one, and no memories. The settings,
        learning rate and schedule are this run's own. Raises UserError where a tensor does not fit.
        """
        best = state["best"]
        earlier = bool(best) and best["row"]["step"] < state["history"][-1]["step"]
        self._take_tensors(best["model"] if earlier else state["model"])
        self.kept |= set(state["model"])
        if not earlier and state["optimizer_name"] == type(self.optimizer).__name__:
            self._inherit_memories(_by_name(state["optimizer"]))
        self.lineage = [*state["lineage"], {"run": state["run"], "name": name, "epochs": len(state["history"])}]
        self.history, self.seconds = state["history"], state["seconds"]

    def _inherit_memories(self, memories: dict[str, dict[str, Any]]) -> None:
        own, parameters = self.optimizer.state_dict(), dict(self.model.named_parameters())
        for group in own["param_groups"]:
            known = {index: memories[name] for name, index in _indices_of(group) if memories.get(name)}
            if known and group.get("momentum"):
                # Fused SGD takes momentum for all of a group or for none; zeros are what a first step begins with.
                for name, index in _indices_of(group):
                    if index in known or isinstance(self.optimizer, torch.optim.SGD):
                        known[index] = {"momentum_buffer": torch.zeros_like(parameters[name])} | known.get(index, {})
            own["state"] |= known
        self.optimizer.load_state_dict(own)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: tensor for name, tensor in tensors.items() if name in self.kept}

    @torch.no_grad()
    def _take_tensors(self, tensors: dict[str, Tensor]) -> None:
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(
                    f"the checkpoint's {name} is {tuple(tensor.shape)}, and does not fit this model.\n"
                    "Set data.image_size and head as they were, or resume=auto to begin anew."
                )
            own[name].copy_(tensor)


class Writer:
    """Writes a run's checkpoints, one at a time, beside the training that goes on."""

    def __init__(self, run: Run, epochs: int, about: dict[str, Any], limit: float):
        self.run, self.epochs, self.about = run, epochs, about  # `epochs` are those that the run is to have
        self.limit = limit  # of the store, in bytes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last write, before the run is let go of. Its error, if any, is not raised here."""
        self._thread.shutdown()

    def save(self, session: Session) -> None:
        """Begin to write where the session is now. Raises what went wrong with the one before.

        Where several processes train together, only the first one writes.
        """
        self.wait()
        if distributed.is_first():
            self._last = self._thread.submit(self._write, self.about | session.state())

    def wait(self) -> None:
        """Return once all is written. Raises OSError, and FloatingPointError where a tensor was not finite."""
        last, self._last = self._last, None
        if last:
            last.result()

    def _write(self, state: dict[str, Any]) -> None:
        if not all(tensor.isfinite().all() for tensor in state["model"].values()):
            raise FloatingPointError(f"a weight by epoch {len(state['history']) + bool(state['sums'])}")
        save(self.run.path(len(state["history"]), steps(state)), state)
        self.run.tidy(self.epochs)
        make_room(self.run.store, self.limit)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, with its digest: the whole of it or nothing."""
    state = state | {"format": FORMAT}
    with replaced(path) as temporary:
        torch.save(state | {"digest": digest(state)}, temporary)  # by its path: faster than through a Python file


def load(path: Path) -> dict[str, Any]:
    """Return what `save` wrote, on the CPU. Nothing in the file can run code. Raises Damaged, and OSError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a dozen types, for a file that was cut, changed, or holds more than plain values
        code = "unsupported global" in str(error).lower()
        refused = "holds code, which is not run" if code else "is cut or changed"
        raise Damaged(refused) from error
    if not isinstance(state, dict) or "format" not in state:
        raise Damaged("is none of this project's")
    if state["format"] != FORMAT:
        raise Damaged(f"has format {state['format']}, and this version reads {FORMAT}")
    if state.pop("digest", None) != digest(state):
        raise Damaged("its digest is another")
    return state


def newest(run: Run, epochs: int) -> tuple[dict[str, Any], Path] | None:
    """Return the run's furthest whole checkpoint of up to `epochs` epochs and its file, or None where there is none.

    One that is damaged is named, and the one before it taken. Raises UserError where none of them is whole.
    """
    damaged = {}
    for each in reversed(run.checkpoints(epochs)):
        try:
            state = load(each.path)
            if state["run"] != run.name:
                raise Damaged(f"is of another run, {state['run']}")
        except Damaged as error:
            damaged[each.path] = error
            continue
        for path, damage in damaged.items():
            print(f"warning: {path} {damage}: taking the checkpoint before it", file=sys.stderr)
            path.rename(f"{path}.damaged")  # or it would be taken for further than those to come
        return state, each.path
    if damaged:
        problems = "; ".join(f"{path} {error}" for path, error in damaged.items())
        raise UserError(
            f"no checkpoint of this run is whole: {problems}.\n"
            f"Bring the files back, or train anew: `python src/checkpoints.py remove {run.name}`, then the same again."
        )
    return None


def steps(state: dict[str, Any]) -> int:
    """Return the number of steps done in the epoch that has begun."""
    return int(state["sums"].get("steps", 0))


def put(stored: Path, target: Path) -> None:
    """Put a stored checkpoint at `target`: as another name of the same file where the disk is the same, else a copy."""
    with replaced(target) as temporary:
        try:
            os.link(stored, temporary)
        except OSError:
            shutil.copyfile(stored, temporary)


def _indices(optimizer: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the name of each parameter in an optimizer's state, and its index there."""
    for group in optimizer["param_groups"]:
        yield from _indices_of(group)


def _indices_of(group: dict[str, Any]) -> Iterator[tuple[str, int]]:
    return zip(group["param_names"], group["params"], strict=True)


def _by_name(optimizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an optimizer's state remembers of each parameter."""
    return {name: optimizer["state"].get(index, {}) for name, index in _indices(optimizer)}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
