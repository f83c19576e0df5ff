"""The file of a sweep: what it may say, what its points are, and what is told of one that makes no sense."""

import itertools

from finetune import search
from finetune.errors import UserError
from helpers import ROOT

import optuna
import pytest
from optuna.trial import FixedTrial
from ruamel.yaml import YAML

GRID = {"metric": "val_acc", "direction": "maximize", "method": "grid"}
RANDOM = GRID | {"method": "random", "budget": {"trials": 3}}


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def load(tmp_path):
    """A function that returns the sweep of a file with that content."""

    def load(content: dict) -> search.Sweep:
        with open(tmp_path / "mine.yaml", "w") as file:
            YAML().dump(content, file)
        return search.load(tmp_path / "mine.yaml")

    return load


@pytest.mark.parametrize("path", sorted(ROOT.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_are_good(path):
    search.load(path)


def test_the_walkthroughs_grid_is_its_rates_and_momenta_over_both_networks():
    points = list(search.load("sweeps/walkthrough.yaml").points())
    assert len(points) == 24
    rates, momenta = (0.0001, 0.001, 0.009, 0.025), (0.017, 0.09, 0.9)
    assert {tuple(point.values()) for point in points} == set(
        itertools.product(("alexnet", "squeezenet"), rates, momenta)
    )


def test_a_grid_has_all_points_and_conditions_are_kept(load):
    sweep = load(
        GRID
        | {
            "search": {
                "optimizer.name": ["sgd", "adamw"],
                "momentum": {"values": [0.1, 0.9], "when": {"optimizer.name": "sgd"}},
                "optimizer.weight_decay": {"low": 0.1, "high": 0.3, "step": 0.1, "when": {"optimizer.name": ["adamw"]}},
                "batch_size": {"low": 2, "high": 7, "step": 4},
            }
        }
    )
    found = [tuple(point.values()) for point in sweep.points()]
    assert found == [
        *[("sgd", momentum, size) for momentum in (0.1, 0.9) for size in (2, 6)],
        *[("adamw", decay, size) for decay in (0.1, 0.2, 0.3) for size in (2, 6)],
    ]
    assert [tuple(point) for point in sweep.points()][-1] == ("optimizer.name", "optimizer.weight_decay", "batch_size")


def test_a_range_without_a_step_is_every_whole_number(load):
    sweep = load(GRID | {"search": {"seed": {"low": 3, "high": 6}}})
    assert [point["seed"] for point in sweep.points()] == [3, 4, 5, 6]


def test_what_is_suggested_lies_in_its_range_is_short_and_keeps_conditions(load):
    sweep = load(
        RANDOM
        | {
            "search": {
                "optimizer.name": ["sgd", "adamw"],
                "lr": {"low": 0.0001, "high": 0.1, "log": True},
                "momentum": {"low": 0.0, "high": 0.9, "when": {"optimizer.name": "sgd"}},
                "batch_size": {"low": 4, "high": 16, "step": 4},
                "backbone.trainable": ["head", 2, ["features.11", "features.12"]],
            }
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [sweep.suggested(study.ask()) for _ in range(60)]
    assert {point["batch_size"] for point in points} == {4, 8, 12, 16}
    rates = [point["lr"] for point in points]
    assert all(
        0.0001 <= rate <= 0.1 and len(f"{rate:e}".rstrip("0")) and rate == float(f"{rate:.4g}") for rate in rates
    )
    assert 15 < sum(rate < 0.00316 for rate in rates) < 45  # the middle of a log range
    assert {("momentum" in point) == (point["optimizer.name"] == "sgd") for point in points} == {True}
    assert ["features.11", "features.12"] in [point["backbone.trainable"] for point in points]


def test_a_grids_points_are_what_is_suggested_of_them(load):
    sweep = load(
        GRID | {"search": {"lr": {"low": 0.1, "high": 0.3, "step": 0.1}, "backbone.trainable": [1, ["a", "b"]]}}
    )
    points = list(sweep.points())
    labels = [{key: search.label(value) for key, value in point.items()} for point in points]
    assert [sweep.suggested(FixedTrial(each)) for each in labels] == points


def test_repeats_are_all_combinations(load):
    sweep = load(
        GRID | {"search": {"lr": [0.1]}, "set": {"data.folds": 2}, "repeat": {"seed": [0, 1], "data.fold": [0, 1]}}
    )
    assert sweep.repeats == [{"seed": seed, "data.fold": fold} for seed in (0, 1) for fold in (0, 1)]
    assert load(GRID | {"search": {"lr": [0.1]}}).repeats == [{}]


def test_overrides_are_as_hydra_reads_them():
    point = {"lr": 1e-05, "backbone.trainable": ["a", "b"], "head.kind": "linear", "batch_size": 4}
    assert search.overrides(point) == ["lr=1e-05", "backbone.trainable=[a,b]", "head.kind=linear", "batch_size=4"]


LR = {"lr": [0.1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GRID | {"search": {"learning_rate": [0.1]}}, "search.learning_rate is no setting of params.yaml."),
        (GRID | {"search": {"optimizer.nam": ["sgd"]}}, "Nearest: optimizer.name"),
        (GRID | {"search": {"lr": [0.1, -1]}}, "search.lr has -1, which should be greater than 0"),
        (GRID | {"search": {"optimizer.name": ["sdg"]}}, "search.optimizer.name has 'sdg', which should be 'sgd'"),
        (GRID | {"search": {"batch_size": [1.5]}}, "search.batch_size has 1.5, which should be a valid integer"),
        (RANDOM | {"search": {"momentum": {"low": 0.5, "high": 1.5}}}, "search.momentum has 1.5, which should be less"),
        (
            RANDOM | {"search": {"lr": {"low": 0.1, "high": 0.01}}},
            "search.lr has low = 0.1, which is not below high = 0.01",
        ),
        (RANDOM | {"search": {"lr": {"low": 0.1}}}, "search.lr should be a list of values, or have low and high"),
        (RANDOM | {"search": {"lr": {"low": 0, "high": 1, "log": True}}}, "search.lr has log: low must be above 0"),
        (RANDOM | {"search": {"lr": []}}, "search.lr is a list of values: it needs at least one"),
        (GRID | {"search": {"lr": {"low": 0.1, "high": 0.2}}}, "search.lr is a range: in a grid it needs a step"),
        (GRID | {"search": {}}, "search is empty"),
        (GRID | {"metric": "val_accuracy", "search": LR}, "'val_accuracy' is none that a trial reports. Nearest: "),
        (GRID | {"metric": "eval.acc", "pruner": "median", "search": LR}, "pruner looks at a metric of each epoch"),
        (GRID | {"method": "tpe", "search": LR}, "budget is missing"),
        (GRID | {"method": "bayes", "search": LR}, "method = 'bayes' should be 'grid', 'random' or 'tpe'"),
        (GRID | {"serach": LR, "search": LR}, "unknown key serach. Nearest: search"),
        (GRID | {"search": LR, "set": {"lr": 0.2}}, "lr is in set, and searched or repeated, too"),
        (GRID | {"search": LR, "set": {"lrr": 0.2}}, "set.lrr is no setting of params.yaml"),
        (GRID | {"search": LR, "repeat": {"lr": [1.0]}}, "repeat.lr needs values, and not a setting that is searched"),
        (GRID | {"search": LR, "repeat": {"seed": []}}, "repeat.seed needs values"),
        (
            GRID | {"search": {"momentum": {"values": [0.1], "when": {"optimizer.name": "sgd"}}}},
            "search.momentum.when asks for optimizer.name, which is not searched before it",
        ),
        (  # each is possible, and not both
            GRID | {"search": {"data.folds": [0], "data.fold": [1]}},
            "data.folds=0 data.fold=1: params.yaml: data.fold = 1 says nothing without folds",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_told_so_in_a_line(load, content, said):
    with pytest.raises(UserError) as raised:
        load(content)
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
