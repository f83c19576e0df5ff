"""Optimizer and schedule: which learning rate an epoch has, and what the optimizer trains."""

import math

from finetune import optim
from finetune.params import Schedule

import pytest
import torch

LOSSES = [5.0, 4.0, 4.0, 4.0, 3.0, 3.0]  # val_loss after each epoch


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [0.4] * 6),
        ({"name": "step", "step_epochs": 2, "gamma": 0.5}, [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
        ({"name": "plateau", "patience": 1, "gamma": 0.5}, [0.4, 0.4, 0.4, 0.4, 0.2, 0.2]),
        ({"name": "cosine"}, [0.2 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]),
    ],
)
def test_the_learning_rate_of_each_epoch(changes, rates):
    optimizer = optim.optimizer(torch.nn.Linear(1, 1), lr=0.4, momentum=0.0)
    settings = Schedule(**{"name": "constant", "gamma": 0.1, "step_epochs": 7, "patience": 3} | changes)
    schedule = optim.schedule(optimizer, settings, num_epochs=6)
    seen = []
    for loss in LOSSES:
        seen.append(optimizer.param_groups[0]["lr"])
        optim.step(schedule, loss)
    assert seen == pytest.approx(rates)


def test_frozen_parameters_are_not_the_optimizers():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[0].requires_grad_(False)
    (group,) = optim.optimizer(model, lr=0.1, momentum=0.9).param_groups
    assert group["param_names"] == ["1.weight", "1.bias"]
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
