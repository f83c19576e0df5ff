"""Optimizer and learning-rate schedule from their settings."""

from finetune.params import Schedule

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR


def optimizer(model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    """Return SGD over the parameters that require gradients, which its state knows by name."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=lr, momentum=momentum, fused=True)


def schedule(optimizer: torch.optim.Optimizer, settings: Schedule, num_epochs: int) -> LRScheduler:
    """Return torch's scheduler of that name, to be stepped at each epoch's end by `step`."""
    if settings.name == "step":
        return StepLR(optimizer, settings.step_epochs, settings.gamma)
    if settings.name == "plateau":
        return ReduceLROnPlateau(optimizer, factor=settings.gamma, patience=settings.patience)
    if settings.name == "cosine":
        return CosineAnnealingLR(optimizer, num_epochs)
    return ConstantLR(optimizer, factor=1)


def step(schedule: LRScheduler, val_loss: float) -> None:
    """Move the schedule on to the next epoch."""
    if isinstance(schedule, ReduceLROnPlateau):
        schedule.step(val_loss)
    else:
        schedule.step()
