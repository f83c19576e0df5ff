"""What a checkpoint holds: all that training on needs, so that a run that goes on ends as if it had never stopped."""

import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.digests import digest
from finetune.errors import UserError
from finetune.files import replaced
from finetune.runs import Run, make_room

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

FORMAT = 2


class Damaged(Exception):
    """A file that is no whole checkpoint of this format: the message says what is wrong with it."""


@dataclass
class Session:
    """All that changes while a run trains. No generator's state: what is random follows from (seed, epoch, step)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    kept: set[str]  # names of the tensors that are not the backbone's: what trains, buffers, and what a parent trained
    lineage: list[dict] = field(default_factory=list)  # the runs that this one trains on top of, the first one first
    history: list[dict] = field(default_factory=list)  # a row for each complete epoch, with those of the lineage
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch that has begun, see training.Sums
    seconds: float = 0.0  # that the run has taken so far, but for those since `started`
    started: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Return the seconds that the run has taken, those of processes that were killed since their save apart."""
        return self.seconds + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """Return a copy on the CPU, which training on leaves as it is."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return _copied(
            {
                "model": {name: tensor for name, tensor in tensors.items() if name in self.kept},
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "lineage": self.lineage,
                "history": self.history,
                "sums": self.sums,
                "seconds": self.elapsed(),
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was."""
        self._take_tensors(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.lineage, self.history, self.sums = state["lineage"], state["history"], state["sums"]
        self.seconds, self.started = state["seconds"], time.perf_counter()

    def inherit(self, state: dict[str, Any]) -> None:
        """Begin on top of a finished run: with its tensors, its history, and what its optimizer remembers of each.

        The settings, learning rate and schedule are this run's own.
        """
        self._take_tensors(state["model"])
        self.kept |= set(state["model"])
        known = {
            name: state["optimizer"]["state"].get(index)
            for group in state["optimizer"]["param_groups"]
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        own = self.optimizer.state_dict()
        for group in own["param_groups"]:
            for name, index in zip(group["param_names"], group["params"], strict=True):
                if known.get(name):
                    own["state"][index] = known[name]
        self.optimizer.load_state_dict(own)
        self.lineage = [*state["lineage"], {"run": state["run"], "experiment": state["experiment"],
                                            "epochs": len(state["history"])}]  # fmt: skip
        self.history, self.seconds = state["history"], state["seconds"]

    @torch.no_grad()
    def _take_tensors(self, tensors: dict[str, Tensor]) -> None:
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in tensors.items():
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
        """Have nothing written any more, when the run is let go of; what went wrong with it is not raised."""
        self._thread.shutdown()

    def save(self, session: Session) -> None:
        """Begin to write where the session is now. Raises what went wrong with the one before."""
        self.wait()
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
    found = [each for each in run.checkpoints() if (each.epochs, each.steps) <= (epochs, 0)]
    problems = []
    for each in reversed(found):
        try:
            state = load(each.path)
            if state["run"] != run.name:
                raise Damaged(f"is of another run, {state['run']}")
        except Damaged as error:
            problems.append(f"{each.path} {error}")
            continue
        for problem in problems:
            print(f"warning: {problem}: taking the checkpoint before it", file=sys.stderr)
        return state, each.path
    if problems:
        raise UserError(
            "no checkpoint of this run is whole: " + "; ".join(problems) + ".\n"
            f"Bring the files back, or train anew: `python src/checkpoints.py remove {run.name}`, then the same again."
        )
    return None


def steps(state: dict[str, Any]) -> int:
    """Return the number of steps done in the epoch that has begun."""
    return int(state["sums"].get("steps", 0))


def place(stored: Path, target: Path) -> None:
    """Put a stored checkpoint at `target`: as another name of the same file where the disk is the same, else a copy."""
    with replaced(target) as temporary:
        try:
            os.link(stored, temporary)
        except OSError:
            shutil.copyfile(stored, temporary)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
