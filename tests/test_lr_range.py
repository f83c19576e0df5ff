"""The learning-rate range test in parts: which layers, the losses of rising rates, and what curves suggest."""

import itertools
import math
from types import SimpleNamespace

from finetune import layers, lr_range, optim, params, training
from finetune.errors import UserError
from finetune.layers import Group
from helpers import ROOT

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

BAR = SimpleNamespace(update=lambda: None)


# What curves suggest --------------------------------------------------------------------------------------------------

RATES = lr_range.rising(1e-6, 10.0, 100)
STEPS = np.arange(100)


def falling(middle: float, width: float = 6.0, high: float = 2.0, low: float = 0.2) -> np.ndarray:
    """Return losses that fall from high to low, the fastest at the step `middle`."""
    return low + (high - low) / (1 + np.exp((STEPS - middle) / width))


def test_rates_rise_by_the_same_factor():
    assert (RATES[0], RATES[-1], len(RATES)) == (pytest.approx(1e-6), pytest.approx(10.0), 100)
    assert np.diff(np.log(RATES)) == pytest.approx(math.log(1e7) / 99)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("middle", [25, 50, 70])
@pytest.mark.parametrize("explodes", [100, 85])
def test_the_steepest_point_is_found_within_the_width_of_the_smoothing(middle, noise, explodes):
    losses = falling(middle) + np.random.default_rng(0).normal(0, noise, 100)
    losses = np.where(explodes > STEPS, losses, 0.2 + 0.5 * (STEPS - explodes))
    found = lr_range.suggestion(RATES, losses)
    assert abs(np.abs(np.array(RATES) - found.steepest).argmin() - middle) <= lr_range.WIDTH
    lowest = RATES[int(np.argmin(found.smoothed))]
    assert found.safer == pytest.approx(min(found.steepest / 3, lowest / 10))
    assert (found.rates, found.losses) == (RATES, losses.tolist())
    assert len(found.smoothed) == 100


def test_what_comes_after_the_lowest_loss_is_not_looked_at():
    losses = np.where(STEPS < 60, falling(30), 3.0)
    losses[80:] = 0.5  # it falls steeply, but from where it had got too high
    found = lr_range.suggestion(RATES, losses)
    assert RATES[26] <= found.steepest <= RATES[34]


@pytest.mark.parametrize(
    "losses",
    [
        np.full(100, 0.7),
        0.7 + np.random.default_rng(0).normal(0, 0.01, 100),
        0.7 + 0.01 * STEPS,
        np.where(STEPS < 50, 0.7, 0.7 * 1.1 ** np.maximum(0, STEPS - 50)),
    ],
    ids=["flat", "wavering", "rising", "flat and then diverging"],
)
def test_a_loss_that_never_falls_is_an_error(losses):
    with pytest.raises(UserError, match="does not fall at any of these rates"):
        lr_range.suggestion(RATES, losses)


@pytest.mark.parametrize("number", [0, 1, 9])
def test_a_loss_that_diverges_at_once_is_an_error(number):
    with pytest.raises(UserError, match="begin lower, with --low"):
        lr_range.suggestion(RATES[:number], falling(3)[:number])


def test_smoothing_keeps_lines_and_does_not_lag():
    assert lr_range.smoothed([2.0] * 20) == pytest.approx([2.0] * 20)
    line = lr_range.smoothed(STEPS.tolist())
    assert line[20:80] == pytest.approx(STEPS[20:80].tolist())
    peak = lr_range.smoothed((STEPS == 40).tolist())
    assert int(np.argmax(peak)) == 40
    assert sum(peak) == pytest.approx(1)


def test_a_plot_is_a_picture(tmp_path):
    lr_range.plot(lr_range.suggestion(RATES, falling(50)), "learning rate of head", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (840, 504))


# Which layers ---------------------------------------------------------------------------------------------------------

GROUPS = [
    Group("head", ["c"], 0),
    Group("layer4", ["b4"], 2, 0.5),
    Group("layer3", ["b3"], 4, 0.25),
    Group("layer2", ["b2"]),
    Group("layer2", ["b1"], 4, 0.125),
    Group("stem", ["b0"]),
]


@pytest.mark.parametrize(
    ("name", "epoch", "chosen"),
    [
        ("all", 0, "c"),
        ("all", 1, "c"),
        ("all", 2, "c b4"),
        ("all", 9, "c b4 b3 b1"),
        ("head", 0, "c"),
        ("head", 9, "c"),
        ("backbone", 3, "b4"),
        ("backbone", 4, "b4 b3 b1"),
        ("layer4", 2, "b4"),
        ("layer2", 4, "b1"),  # the part that trains
    ],
)
def test_chosen_groups(name, epoch, chosen):
    found = lr_range.chosen_groups(GROUPS, name, epoch)
    assert [layer for group in found for layer in group.layers] == chosen.split()


@pytest.mark.parametrize(
    ("name", "epoch", "words"),
    [
        ("backbone", 0, "these layers thaw later.\nTry layer4 with --epoch 2, layer3 with --epoch 4, layer2"),
        ("layer3", 2, "--group layer3: these layers thaw later.\nTry layer3 with --epoch 4."),
        ("stem", 9, "--group stem: no such layers train.\n"),
        ("layer5", 9, "--group layer5: no such layers train. Nearest: layer4, layer3, layer2.\nWhat trains"),
        ("backbon", 9, "Nearest: backbone."),
    ],
)
def test_layers_that_do_not_train_are_an_error_that_says_what_does(name, epoch, words):
    with pytest.raises(UserError) as error:
        lr_range.chosen_groups(GROUPS, name, epoch)
    assert words in str(error.value)
    assert str(error.value).count("\n") == 1


def test_with_the_head_alone_the_backbone_is_an_error_that_says_what_to_set():
    with pytest.raises(UserError, match=r"no such layers train\.\nWhat .* -S backbone\.trainable=all"):
        lr_range.chosen_groups([Group("head", ["b"], 0), Group("layer4", ["a"])], "backbone", 0)


# The losses of rising rates -------------------------------------------------------------------------------------------

TRAINED = [Group("head", ["2"], 0), Group("second", ["1"], 0, 0.5), Group("first", ["0"])]


class Task:
    """Two classes of inputs [n, 4] that a linear layer can tell apart, and a small network to do so."""

    def __init__(self, *changes: str, dropout: float = 0.0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout(dropout))
        layers.thaw(self.model, TRAINED, 0)
        settings = params.load(ROOT / "params.yaml", changes)
        self.optimizer = optim.optimizer(self.model, TRAINED, settings.optimizer, 1e-3, 0.0)
        self.seen: list[dict[str, float]] = []
        step = self.optimizer.step

        def noted() -> None:
            self.seen.append(optim.rates(self.optimizer))
            step()

        self.optimizer.step = noted

    def batches(self, n: int = 8):
        generator = torch.Generator().manual_seed(1)
        while True:
            labels = np.arange(n) % 2
            inputs = torch.randn(n, 4, generator=generator) + 2 * torch.from_numpy(labels)[:, None] - 1
            yield training.Batch(inputs, labels)

    def losses(self, rates, shares, batches=None, objective=None) -> list[float]:
        arguments = (batches or self.batches(), lambda x: x, objective or training.Objective(2), BAR)
        return lr_range.losses(self.model, self.optimizer, rates, shares, *arguments)


def test_groups_have_their_shares_of_the_rate_and_others_keep_theirs():
    rates = lr_range.rising(1e-5, 1e-2, 20)
    for shares, expected in (
        ({"head": 1.0, "second": 0.5}, lambda rate: (rate, 0.5 * rate)),
        ({"head": 1.0}, lambda rate: (rate, 5e-4)),
        ({"second": 1.0}, lambda rate: (1e-3, rate)),
    ):
        task = Task()
        assert len(task.losses(rates, shares)) == 20
        assert [tuple(each.values()) for each in task.seen] == [pytest.approx(expected(rate)) for rate in rates]


def test_the_model_is_trained_with_these_rates_and_what_is_frozen_stays():
    task, by_hand = Task(), Task()
    rates = lr_range.rising(1e-3, 1.0, 30)
    task.losses(rates, {"head": 1.0, "second": 0.5})
    for rate, batch in zip(rates, by_hand.batches(), strict=False):
        for group in by_hand.optimizer.param_groups:
            group["lr"] = rate * {"head": 1.0, "second": 0.5}[group["name"]]
        training.step(by_hand.model, by_hand.optimizer, batch, lambda x: x, training.Objective(2))
    for one, other in zip(task.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(task.model[0].weight, Task().model[0].weight)
    assert not torch.equal(task.model[1].weight, Task().model[1].weight)


def test_the_rate_of_a_task_that_can_be_learnt_is_found_and_the_test_ends_where_it_diverges():
    rates = lr_range.rising(1e-5, 1e4, 150)
    losses = Task("optimizer.name=sgd").losses(rates, {"head": 1.0, "second": 0.5})
    assert 60 < len(losses) < 150
    ends = [lr_range.smoothed(losses[:number])[-1] for number in (len(losses) - 1, len(losses))]
    assert ends[0] < 1.5 * lr_range.DIVERGED * losses[0]  # not before, and at once
    assert ends[1] > losses[0]
    found = lr_range.suggestion(rates[: len(losses)], losses)
    assert 1e-3 < found.safer < found.steepest < 1
    assert min(losses) < 0.5 * losses[0]


def test_the_test_ends_where_the_loss_is_no_number():
    def batches():
        for number, batch in enumerate(Task().batches()):
            yield batch._replace(inputs=batch.inputs * (float("nan") if number == 12 else 1))

    assert len(Task().losses([1e-3] * 30, {"head": 1.0}, batches())) == 12


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_rate_that_does_nothing_has_a_flat_loss_though_batches_and_dropout_differ(dropout):
    losses = Task(dropout=dropout).losses([1e-12] * 30, {"head": 1.0, "second": 1.0})
    assert np.ptp(losses) < 1e-5
    task = Task(dropout=dropout)
    batches = itertools.islice(task.batches(), 30)
    with torch.no_grad():
        raw = [float(training.forward(task.model, each, lambda x: x, training.Objective(2))[2]) for each in batches]
    assert np.ptp(raw) > 0.01  # without the level set off
    assert dropout or losses[0] == pytest.approx(np.mean(raw), abs=1e-5)


def test_penalties_and_clipping_are_the_runs():
    plain, clipped = Task(), Task()
    plain.losses([0.1] * 3, {"head": 1.0})
    clipped.losses([0.1] * 3, {"head": 1.0}, objective=training.Objective(2, grad_clip=1e-6))
    start = Task().model[2].weight
    assert (clipped.model[2].weight - start).norm() < 1e-5 < (plain.model[2].weight - start).norm()
