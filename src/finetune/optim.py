"""Optimizer, penalties and learning-rate schedule from their settings."""

from collections.abc import Sequence
from typing import Any

from finetune.layers import Group, layer_of
from finetune.params import Optimizer, Schedule

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

OPTIMIZERS: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
}
FUSED = ("sgd", "adam", "adamw", "adagrad")  # one pass over a tensor instead of one for each operation
BY_EPOCH = ("constant", "step", "plateau")  # the other schedules move after each step
CYCLIC = ("triangular", "triangular2", "exp_range")
SHORTEST = 2  # steps of a cycle: up, and down again


def optimizer(
    model: nn.Module, groups: Sequence[Group], settings: Optimizer, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """Return torch's optimizer of that name over all that trains sooner or later.

    Each group has one or two of its own: weights, which decay, and biases and norms, which do not. What has not thawed
    yet has no gradients, and so is left alone.
    """
    parameters = []
    for group in groups:
        if group.thaws is None:
            continue
        chosen = set(group.layers)
        owned = [(name, each) for name, each in model.named_parameters() if layer_of(name) in chosen]
        for kind, penalised in (("weights", True), ("biases and norms", False)):
            some = [(name, each) for name, each in owned if is_weight(name, each) == penalised]
            penalties = {"weight_decay": settings.weight_decay * penalised, "l1": settings.l1 * penalised}
            if some:
                about = {"name": group.name, "kind": kind, "lr": lr * group.lr_scale}
                parameters.append({"params": some} | about | penalties)
    options: dict[str, Any] = {"momentum": momentum} if settings.has_momentum else {}
    if settings.name in FUSED:
        options["fused"] = True
    return OPTIMIZERS[settings.name](parameters, lr=lr, **options)


def is_weight(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is a layer's weight, and so decays: no bias, norm, scale, embedding or token."""
    return name.endswith("weight") and parameter.ndim > 1


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each group of layers, the head's first."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def finish_gradients(optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """Clip the gradients to a norm of `grad_clip` (0: not), all of them together; then add those of the L1 penalty."""
    groups = [[each for each in group["params"] if each.grad is not None] for group in optimizer.param_groups]
    if grad_clip:
        nn.utils.clip_grad_norm_([each for some in groups for each in some], grad_clip)
    for group, some in zip(optimizer.param_groups, groups, strict=True):
        if group["l1"]:
            for each in some:
                each.grad.add_(each.detach().sign(), alpha=group["l1"])


class LearningRate:
    """The learning rates of an optimizer's groups as training goes on: a warm-up, then torch's scheduler of a name."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Schedule, num_epochs: int, steps: int):
        """Set the rates of the first step; `steps` are those of an epoch."""
        self.settings = settings
        self._warmup_steps = round(settings.warmup_epochs * steps)
        self._steps = num_epochs * steps - self._warmup_steps
        self._epochs = 0
        self._scheduler = _scheduler(optimizer, settings, self._steps, steps)
        # Behind the other one, which has set the rate that this one leads up to.
        start = 1 / (self._warmup_steps + 1)
        self._warmup = lr_scheduler.LinearLR(optimizer, start, total_iters=self._warmup_steps)

    def after_step(self) -> None:
        """Set the rates of the next step."""
        if self._warmup.last_epoch < self._warmup_steps:
            self._warmup.step()
        elif self.settings.name not in BY_EPOCH and not self._is_over():
            self._scheduler.step()

    def after_epoch(self, val_loss: float) -> None:
        """Set the rates of the next epoch."""
        self._epochs += 1
        if self.settings.name in BY_EPOCH and self._epochs > self.settings.warmup_epochs:
            measured: list[Any] = [val_loss] if self.settings.name == "plateau" else []
            self._scheduler.step(*measured)

    def _is_over(self) -> bool:
        """Tell whether a schedule that is made for a number of epochs is at its last step, where its rates stay."""
        return self.settings.depends_on_num_epochs() and self._scheduler.last_epoch >= self._steps - 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is; the rates themselves are the optimizer's."""
        states = {"scheduler": self._scheduler.state_dict(), "warmup": self._warmup.state_dict()}
        return states | {"epochs": self._epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was."""
        self._scheduler.load_state_dict(state["scheduler"])
        self._warmup.load_state_dict(state["warmup"])
        self._epochs = state["epochs"]


def _scheduler(
    optimizer: torch.optim.Optimizer, settings: Schedule, total_steps: int, steps: int
) -> lr_scheduler.LRScheduler:
    name, high = settings.name, [group["lr"] for group in optimizer.param_groups]
    cycle = settings.cycle_epochs * steps
    if name == "step":
        return lr_scheduler.StepLR(optimizer, settings.step_epochs, settings.gamma)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=settings.gamma, patience=settings.patience)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    if name == "sgdr":
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle, settings.cycle_mult)
    if name in CYCLIC:
        low, cycle = [rate * settings.low for rate in high], max(cycle, SHORTEST)
        options = {"mode": name, "gamma": settings.gamma ** (1 / cycle), "cycle_momentum": False}
        return lr_scheduler.CyclicLR(optimizer, low, high, step_size_up=cycle / 2, **options)  # type: ignore[arg-type]  # halves will do
    if name == "one_cycle":
        total_steps = max(total_steps, SHORTEST)
        rises = max(settings.pct_start, SHORTEST / total_steps)  # in fewer, torch may divide by zero
        options = {"pct_start": rises, "div_factor": 1 / settings.low, "cycle_momentum": False}
        return lr_scheduler.OneCycleLR(optimizer, high, total_steps, **options)
    return lr_scheduler.ConstantLR(optimizer, factor=1)
