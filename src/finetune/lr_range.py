"""The learning-rate range test: rates that rise, the losses that come of them, and what they suggest."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import layers, training
from finetune.errors import UserError, nearest

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

WIDTH = 4.0  # steps, the standard deviation of the smoothing
DIVERGED = 4.0  # times the loss of the beginning, at which there is nothing more to learn
FELL = 0.99  # share of the first smoothed loss that the lowest must be below, or it has only wavered


@dataclass(frozen=True)
class Suggestion:
    """What a test found. The three lists have an entry a step."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float  # the rate at which the smoothed loss falls fastest
    safer: float  # a third of it, or a tenth of the rate with the lowest loss where that is less


def rising(low: float, high: float, steps: int) -> list[float]:
    """Return rates from low to high, each the same factor above the one before."""
    return np.geomspace(low, high, steps).tolist()


def chosen_groups(groups: Sequence[layers.Group], name: str, epoch: int) -> list[layers.Group]:
    """Return the groups of layers that `name` means (all, head, backbone, or a block), the nearest to the head first.

    Raises UserError where none of them trains after so many epochs.
    """
    named = [group for group in groups if group.thaws is not None and _is_meant(group, name)]
    chosen = [group for group in named if group.trains_in(epoch)]
    if named and not chosen:
        when = ", ".join(f"{group.name} with --epoch {group.thaws}" for group in named[:3])
        raise UserError(f"--group {name}: these layers thaw later.\nTry {when}.")
    if not chosen:
        blocks = [group.name for group in groups[1:] if group.thaws is not None]
        known = ["all", "head", *(["backbone", *blocks] if blocks else [])]
        raise UserError(
            f"--group {name}: no such layers train.{nearest(name, known)}\n"
            "What trains is set by backbone.trainable, such as -S backbone.trainable=all"
        )
    return chosen


def _is_meant(group: layers.Group, name: str) -> bool:
    return name in ("all", group.name) or (name == "backbone" and group.name != "head")


def losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    shares: dict[str, float],
    batches: Iterator[training.Batch],
    inputs_of: Callable[[Tensor], Tensor],
    objective: training.Objective,
    bar: tqdm,
) -> list[float]:
    """Return the loss of each step, whose rates are those of `rates`; fewer where it diverges.

    As it would be on a batch of mean difficulty: what the model as it was in the beginning makes of the same batch,
    with the same dropout, is set off. With small batches, a batch's own difficulty would hide what the rate does.
    `shares` are those of the rate that the groups of layers have, by name; the groups that are not in it keep theirs.
    """
    beginning = copy.deepcopy(model)
    changes: list[float] = []
    level: list[float] = []
    for rate, batch in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            if group["name"] in shares:
                group["lr"] = rate * shares[group["name"]]
        with torch.random.fork_rng(), torch.no_grad():
            level.append(float(training.forward(beginning, batch, inputs_of, objective)[2]))
        loss = float(training.step(model, optimizer, batch, inputs_of, objective)[2])
        if not math.isfinite(loss):
            break
        changes.append(loss - level[-1])
        bar.update()
        if smoothed(changes)[-1] > (DIVERGED - 1) * np.mean(level):
            break
    return [change + float(np.mean(level)) for change in changes]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the losses, each the mean of those around it by a bell curve: unlike a running mean, it does not lag."""
    steps = np.arange(len(losses))
    shares = np.exp(-0.5 * ((steps[:, None] - steps) / WIDTH) ** 2)
    return (shares @ np.array(losses) / shares.sum(axis=1)).tolist()


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return what losses at rising rates suggest. Raises UserError where the loss never falls."""
    if len(losses) < 10:
        raise UserError("the loss diverged within ten steps: begin lower, with --low.")
    mean = smoothed(losses)
    lowest = int(np.argmin(mean))
    slope = np.gradient(mean, np.log(rates))[: lowest + 1]
    if mean[lowest] > FELL * mean[0]:
        raise UserError(
            "the loss does not fall at any of these rates.\nTry another --low and --high, more --steps, or see whether "
            "one batch can be learnt: python src/overfit.py"
        )
    steepest = float(rates[int(np.argmin(slope))])
    return Suggestion(list(rates), list(losses), mean, steepest, min(steepest / 3, rates[lowest] / 10))


def plot(found: Suggestion, title: str, path: Path) -> None:
    """Draw loss over rate, with both suggestions, as a PNG."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.8", linewidth=1, label="a step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    for rate, color, name in (
        (found.steepest, "tab:red", f"steepest {found.steepest:.2g}"),
        (found.safer, "tab:green", f"safer {found.safer:.2g}"),
    ):
        axes.axvline(rate, color=color, linestyle="--", linewidth=1.2, label=name)
    axes.set(xscale="log", xlabel=title, ylabel="loss (nats)")
    start, lowest = found.smoothed[0], min(found.smoothed)
    axes.set_ylim(max(0.0, lowest - 0.3 * (start - lowest) - 0.1), start + 0.8 * (start - lowest) + 0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})
