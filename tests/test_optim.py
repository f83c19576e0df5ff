"""Optimizer and schedule: which learning rate each step has, and what the optimizer does to what."""

import io
import math
from itertools import pairwise

from finetune import optim, params
from finetune.layers import Group
from helpers import ROOT

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("error")
EPOCHS, STEPS = 6, 4
LOSSES = [5.0, 4.0, 4.0, 4.0, 3.0, 3.0]  # val_loss after each epoch
GROUPS = [Group("head", ["1"], 0), Group("trunk", ["0"], 0, 0.1)]
NAMES = ["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adamax"]


def settings(*changes: str) -> params.Params:
    return params.load(ROOT / "params.yaml", [f"num_epochs={EPOCHS}", *changes])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def optimizer(model: nn.Module, *changes: str, groups=GROUPS, lr=0.4, momentum=0.9) -> torch.optim.Optimizer:
    return optim.optimizer(model, groups, settings(*changes).optimizer, lr, momentum)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.tensor([[1.0, -2.0, 0.5]])).square().sum().backward()


# The learning rate ----------------------------------------------------------------------------------------------------


def follow(changes: list[str], epochs: int = EPOCHS, steps: int = STEPS) -> list[dict[str, float]]:
    """Return the rates of the two groups at each step; at each, the schedule goes on in another process, so to speak.

    That one's rates are equal to the bit.
    """

    def begun() -> tuple[torch.optim.Optimizer, optim.LearningRate]:
        fresh = optimizer(network())
        return fresh, optim.LearningRate(fresh, schedule, epochs, steps)

    schedule = settings(*changes).schedule
    (going, rates), seen = begun(), []
    for epoch in range(epochs):
        for step in range(steps):
            other, other_rates = begun()
            file = io.BytesIO()
            torch.save([going.state_dict(), rates.state_dict()], file)
            file.seek(0)
            state, where = torch.load(file, weights_only=True)
            other.load_state_dict(state)
            other_rates.load_state_dict(where)
            seen.append(optim.rates(going))
            for one, schedule_of_it in ((going, rates), (other, other_rates)):
                one.step()
                schedule_of_it.after_step()
                if step == steps - 1:
                    schedule_of_it.after_epoch(LOSSES[epoch])
            assert optim.rates(going) == optim.rates(other)
            assert rates.state_dict() == other_rates.state_dict()
    return seen


def by_epoch(*shares: float) -> list[float]:
    return [share for share in shares for _ in range(STEPS)]


def cosine(step: float, of: float) -> float:
    return (1 + math.cos(math.pi * step / of)) / 2


def triangle(step: int, cycle: float, low: float, height=lambda position: 1.0) -> float:
    """Return the share of the highest rate; `height` is that of the cycles, at a position counted in cycles."""
    position = step / cycle
    return low + (1 - low) * (1 - abs(2 * (position % 1) - 1)) * height(position)


def one_cycle(step: int, total: int, low: float, rises: float) -> float:
    top, last = rises * total - 1, total - 1
    if step <= top:
        return 1 - (1 - low) * cosine(step, top)
    return low / 1e4 + (1 - low / 1e4) * cosine(step - top, last - top)


ALL = range(EPOCHS * STEPS)
CYCLE = ["schedule.cycle_epochs=2", "schedule.low=0.1"]


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        (["constant"], [1.0] * len(ALL)),
        (["step", "schedule.step_epochs=2", "schedule.gamma=0.5"], by_epoch(1, 1, 0.5, 0.5, 0.25, 0.25)),
        (["plateau", "schedule.patience=1", "schedule.gamma=0.5"], by_epoch(1, 1, 1, 1, 0.5, 0.5)),
        (["cosine"], [cosine(step, 24) for step in ALL]),
        (["sgdr", "schedule.cycle_epochs=2"], [cosine(step % 8, 8) for step in ALL]),
        (
            ["sgdr", "schedule.cycle_epochs=1", "schedule.cycle_mult=2"],  # cycles of 4, 8 and 16 steps
            [cosine(step - start, size) for start, size, n in ((0, 4, 4), (4, 8, 8), (12, 16, 12))
             for step in range(start, start + n)],
        ),
        (["triangular", *CYCLE], [triangle(step, 8, 0.1) for step in ALL]),
        (["triangular", "schedule.cycle_epochs=3", "schedule.low=0.5"], [triangle(step, 12, 0.5) for step in ALL]),
        (["triangular2", *CYCLE], [triangle(step, 8, 0.1, lambda at: 0.5 ** int(at)) for step in ALL]),
        (["exp_range", *CYCLE, "schedule.gamma=0.3"], [triangle(step, 8, 0.1, lambda at: 0.3**at) for step in ALL]),
        (
            ["one_cycle", "schedule.low=0.04", "schedule.pct_start=0.25"],
            [one_cycle(step, 24, 0.04, 0.25) for step in ALL],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)  # fmt: skip
def test_the_learning_rate_of_each_step(changes, shares):
    seen = follow([f"schedule.name={changes[0]}", *changes[1:]])
    assert [rates["head"] for rates in seen] == pytest.approx([0.4 * share for share in shares], abs=1e-12)
    assert [rates["trunk"] for rates in seen] == pytest.approx([0.04 * share for share in shares], abs=1e-12)


def test_one_cycle_begins_low_and_ends_near_zero():
    rates = [each["head"] for each in follow(["schedule.name=one_cycle", "schedule.low=0.1"])]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(0.4, rel=0.01)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("warmup_epochs", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("name", ["constant", "step", "plateau", "cosine", "sgdr"])
def test_the_rate_rises_linearly_by_steps_and_then_the_schedule_begins(name, warmup_epochs):
    changes = ["schedule.step_epochs=2", "schedule.patience=1", "schedule.cycle_epochs=2", "schedule.gamma=0.5"]
    seen = follow([f"schedule.name={name}", f"schedule.warmup_epochs={warmup_epochs}", *changes])
    steps = round(warmup_epochs * STEPS)
    rising = [(step + 1) / (steps + 1) for step in range(steps)]
    after = range(len(ALL) - steps)
    # Those by epoch count the epochs that end after the warm-up: step's first two are 1 and 2, 1 (half of it) and 2.
    first = math.ceil(warmup_epochs) - (warmup_epochs % 1 > 0)
    shares = {
        "constant": [1.0 for _ in after],
        "step": [0.5 ** ((step // STEPS - first) // 2) for step in list(ALL)[steps:]],
        "plateau": by_epoch(1, 1, 1, 1, *([0.5, 0.5] if warmup_epochs < 2 else [1, 1]))[steps:],
        "cosine": [cosine(step, len(after)) for step in after],
        "sgdr": [cosine(step % 8, 8) for step in after],
    }[name]
    assert [rates["head"] for rates in seen] == pytest.approx([0.4 * each for each in rising + shares], abs=1e-12)
    assert all(rates["trunk"] == pytest.approx(0.1 * rates["head"]) for rates in seen)


@pytest.mark.parametrize("name", ["constant", "step", "plateau", "sgdr", "triangular", "triangular2", "exp_range"])
def test_a_schedule_that_is_made_for_no_number_of_epochs_goes_on_after_the_last(name):
    changes = [f"schedule.name={name}", "schedule.cycle_epochs=1", "schedule.step_epochs=1", "schedule.patience=0"]
    shorter, longer = (optimizer(network()) for _ in range(2))
    schedules = [optim.LearningRate(shorter, settings(*changes).schedule, 2, 3),
                 optim.LearningRate(longer, settings(*changes).schedule, 4, 3)]  # fmt: skip
    for _ in range(4):
        for _ in range(3):
            assert optim.rates(shorter) == optim.rates(longer)
            for each, schedule in zip((shorter, longer), schedules, strict=True):
                each.step()
                schedule.after_step()
        for schedule in schedules:
            schedule.after_epoch(1.0)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "sgdr", "triangular", "exp_range", "one_cycle"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 1), (1, 10), (3, 3)])
def test_runs_of_few_steps_have_rates_too(name, epochs, steps):
    changes = [f"schedule.name={name}", "schedule.pct_start=0.1", "schedule.cycle_epochs=1"]
    rates = [each["head"] for each in follow(changes, epochs, steps)]
    assert all(0 < rate <= 0.4 + 1e-12 for rate in rates)
    if name in ("cosine", "one_cycle"):  # they are made for so many steps, and stay where they end
        one = optimizer(network())
        schedule = optim.LearningRate(one, settings(*changes).schedule, epochs, steps)
        for _ in range(epochs * steps + 5):
            last = optim.rates(one)["head"]
            one.step()
            schedule.after_step()
        assert optim.rates(one)["head"] == last == rates[-1]


# The optimizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_torchs_of_that_name(name):
    ours, theirs = network(), network()
    one = optimizer(ours, f"optimizer.name={name}", "optimizer.weight_decay=0.1", lr=0.01)
    kind = {each.lower(): getattr(torch.optim, each) for each in dir(torch.optim)}[name]
    options = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    groups = [
        {"params": [parameter], "lr": 0.01 * scale, "weight_decay": 0.1 * (parameter.ndim > 1)}
        for layer, scale in ((theirs[1], 1), (theirs[0], 0.1))
        for parameter in layer.parameters()
    ]
    fused = {"fused": True} if name in optim.FUSED else {}
    other = kind(groups, lr=0.01, **options, **fused)
    for _ in range(5):
        for model, each in ((ours, one), (theirs, other)):
            backward(model)
            each.step()
    start = network()
    for name_, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name_))
        assert not torch.equal(parameter, start.get_parameter(name_))


@pytest.mark.parametrize("name", optim.FUSED)
def test_fused_is_what_the_loop_over_tensors_gives(name):
    ours, theirs = network(), network()
    one, other = (optimizer(each, f"optimizer.name={name}", lr=0.01) for each in (ours, theirs))
    for group in other.param_groups:
        group |= {"fused": False, "foreach": False}
    for _ in range(5):
        for model, each in ((ours, one), (theirs, other)):
            backward(model)
            each.step()
    for one_, other_ in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one_, other_, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_momentum_is_of_sgd_and_rmsprop(name):
    groups = optimizer(network(), f"optimizer.name={name}", momentum=0.7).param_groups
    momenta = {group.get("momentum") for group in groups}
    assert momenta == ({0.7} if name in ("sgd", "rmsprop") else {None})


class Table(nn.Module):
    """All kinds of parameters that the networks have."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.batch_norm, self.layer_norm, self.group_norm = nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.class_token, self.pos_embedding = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 5, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))


def test_what_is_a_weight():
    model = Table()
    weights = {name for name, parameter in model.named_parameters() if optim.is_weight(name, parameter)}
    assert weights == {"conv.weight", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


def test_l1_adds_the_sign_of_weights_to_their_gradients_after_clipping():
    model = network()
    one = optimizer(model, "optimizer.l1=0.25")
    backward(model)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.cat([grad.flatten() for grad in before.values()]).norm()
    for clip, factor in ((0.0, 1.0), (2 * float(norm), 1.0), (0.5, 0.5 / (norm + 1e-6))):
        for name, parameter in model.named_parameters():
            parameter.grad.copy_(before[name])
        optim.finish_gradients(one, clip)
        for name, parameter in model.named_parameters():
            penalty = 0.25 * parameter.sign() if name.endswith("weight") else 0
            torch.testing.assert_close(parameter.grad, before[name] * factor + penalty)


@pytest.mark.parametrize(("clip", "expected"), [(0.1, 0.1), (1.0, 1.0), (1e9, None), (0.0, None)])
def test_the_gradient_is_clipped_to_a_norm_of_all_parameters_together(clip, expected):
    def norm() -> float:
        return float(torch.cat([each.grad.flatten() for each in model.parameters()]).norm())

    model = network()
    backward(model)
    before = norm()
    optim.finish_gradients(optimizer(model), clip)
    assert norm() == pytest.approx(expected or before, rel=1e-4)


# What is frozen -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, one: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optim.finish_gradients(one, 0.0)
        one.step()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_stays_and_trains_once_it_has_thawed(name):
    changes = (f"optimizer.name={name}", "optimizer.weight_decay=0.1", "optimizer.l1=0.1")
    groups = [Group("head", ["1"], 0), Group("trunk", ["0"], 1, 0.5)]
    model, start = network(), network()
    one = optimizer(model, *changes, groups=groups, lr=0.01)
    model[0].requires_grad_(False)
    train(model, one, steps=3)
    assert all(map(torch.equal, model[0].parameters(), start[0].parameters()))
    assert not torch.equal(model[1].weight, start[1].weight)

    # The trunk begins as with an optimizer that sees it for the first time.
    model[0].requires_grad_(True)
    copy = network()
    copy.load_state_dict(model.state_dict())
    train(model, one, steps=1)
    train(copy, optimizer(copy, *changes, groups=groups[1:], lr=0.01), steps=1)
    for trained, expected, before in zip(*(each[0].parameters() for each in (model, copy, start)), strict=True):
        assert torch.equal(trained, expected)
        assert not torch.equal(trained, before)


def test_what_never_thaws_is_not_the_optimizers():
    groups = [Group("head", ["1"], 0), Group("trunk", ["0"])]
    owned = optimizer(network(), groups=groups, lr=0.1).param_groups
    assert [(each["name"], each["kind"], each["param_names"]) for each in owned] == [
        ("head", "weights", ["1.weight"]),
        ("head", "biases and norms", ["1.bias"]),
    ]
    assert {(each["lr"], each["momentum"], each["weight_decay"], each["l1"]) for each in owned} == {(0.1, 0.9, 0, 0)}


def test_groups_have_their_share_of_the_rate_and_penalties_are_of_weights():
    owned = optimizer(network(), "optimizer.weight_decay=0.1", "optimizer.l1=0.2").param_groups
    assert [(each["name"], each["lr"], each["weight_decay"], each["l1"]) for each in owned] == [
        (name, pytest.approx(rate), 0.1 * is_weight, 0.2 * is_weight)
        for name, rate in (("head", 0.4), ("trunk", 0.04))
        for is_weight in (1, 0)
    ]
    assert all(one["lr"] == other["lr"] for one, other in pairwise(owned) if one["name"] == other["name"])
