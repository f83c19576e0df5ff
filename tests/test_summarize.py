"""The summary over folds and seeds: which experiments belong together, and their mean and standard deviation."""

import json
import statistics
import subprocess
import sys

import summarize
from helpers import as_user, clone, dvc
from summarize import Experiment

import pytest

TINY = {
    "model_name": "squeezenet",
    "num_epochs": 1,
    "device": "cpu",
    "data__source": "data/tiny.yaml",
    "data__image_size": 32,
    "data__resize": 40,
    "data__folds": 3,
    "backbone__weights": "none",
}


def experiment(name: str, val_acc: float, finished: str = "2030-01-01T00:00:00", **settings) -> Experiment:
    """Return an experiment; data__fold=1 is its setting data.fold."""
    settings = {"lr": 0.01, "seed": 0, "data.folds": 0, "data.fold": 0, "trainable": ["a"]} | {
        key.replace("__", "."): value for key, value in settings.items()
    }
    return Experiment(name, settings, {"val_acc": val_acc, "val_loss": 1 - val_acc}, finished)


def fold(number: int, val_acc: float, seed: int = 0, folds: int = 3, **settings) -> Experiment:
    return experiment(f"{seed}-{number}", val_acc, seed=seed, data__folds=folds, data__fold=number, **settings)


GROUPINGS = {  # experiments → of each group: what it differs in, names, mean and standard deviation
    "one": ([experiment("a", 0.5)], [({}, ["a"], 0.5, None)]),
    "seeds": (
        [experiment("b", 0.7, seed=1), experiment("a", 0.5), experiment("c", 0.9, seed=2)],
        [({}, ["a", "b", "c"], 0.7, 0.2)],
    ),
    "folds": ([fold(0, 0.5), fold(2, 0.9), fold(1, 0.7)], [({}, ["0-0", "0-1", "0-2"], 0.7, 0.2)]),
    "folds and seeds": (
        [fold(0, 0.5), fold(1, 0.6), fold(0, 0.7, seed=1), fold(1, 0.8, seed=1)],
        [({}, ["0-0", "0-1", "1-0", "1-1"], 0.65, statistics.stdev([0.5, 0.6, 0.7, 0.8]))],
    ),
    "the best mean first, and what differs": (
        [experiment("a", 0.5), experiment("b", 0.8, lr=0.1, momentum=0.9), experiment("c", 0.6, seed=1)],
        [({"lr": 0.1, "momentum": 0.9}, ["b"], 0.8, None), ({"lr": 0.01}, ["a", "c"], 0.55, 0.05 * 2**0.5)],
    ),
    "a list differs": (
        [experiment("a", 0.5), experiment("b", 0.4, trainable=["b"])],
        [({"trainable": ["a"]}, ["a"], 0.5, None), ({"trainable": ["b"]}, ["b"], 0.4, None)],
    ),
    "other numbers of folds are other groups": (
        [fold(0, 0.5), fold(0, 0.4, folds=5)],
        [({"data.folds": 3}, ["0-0"], 0.5, None), ({"data.folds": 5}, ["0-0"], 0.4, None)],
    ),
    "settings without effect": (
        [experiment("a", 0.5), experiment("b", 0.7, seed=1, device="cpu", resume="never", feature_bank_gb=0)],
        [({}, ["a", "b"], 0.6, 0.2 / 2**0.5)],
    ),
    "the newest of equals": (
        [
            experiment("new", 0.6, finished="2030-01-02T00:00:00"),
            experiment("old", 0.5, finished="2030-01-01T09:00:00"),
            experiment("other", 0.6, seed=1),
        ],
        [({}, ["new", "other"], 0.6, 0.0)],
    ),
}


@pytest.mark.parametrize("name", GROUPINGS)
def test_experiments_that_differ_in_fold_and_seed_alone_are_a_group(name):
    experiments, expected = GROUPINGS[name]
    groups = summarize.summarize(experiments, ["val_acc", "val_loss"])
    assert [(group.settings, [each.name for each in group.experiments]) for group in groups] == [
        (settings, names) for settings, names, _, _ in expected
    ]
    for group, (_, _, mean, std) in zip(groups, expected, strict=True):
        assert group.mean == pytest.approx({"val_acc": mean, "val_loss": 1 - mean})
        assert group.std == {name: std if std is None else pytest.approx(std, abs=1e-12) for name in group.mean}


def test_the_table():
    experiments = [fold(0, 0.5), fold(1, 0.7), fold(2, 0.9), fold(0, 0.3, seed=1), experiment("alone", 0.95, lr=0.1)]
    assert summarize.table(summarize.summarize(experiments, ["val_acc", "val_loss"])) == [
        "lr    data.folds  n  folds   seeds  val_acc          val_loss",
        "0.1   0           1  -       1      0.9500 ± -       0.0500 ± -",
        "0.01  3           4  3 of 3  2      0.6000 ± 0.2582  0.4000 ± 0.2582",
    ]


@pytest.mark.parametrize(
    ("experiments", "expected"),
    [
        ([experiment("a", 0.5)], []),
        ([fold(each, 0.5) for each in range(3)], []),
        ([fold(each, 0.5, folds=5) for each in (3, 0, 1)], ["seed 0 has folds 0, 1, 3 of 5 (0 to 4)"]),
        (
            [fold(each, 0.5) for each in range(3)] + [fold(2, 0.5, seed=1)],
            ["seed 1 has folds 2 of 3 (0 to 2)"],
        ),
    ],
)
def test_missing_folds_are_told(experiments, expected):
    (group,) = summarize.summarize(experiments, ["val_acc"])
    assert summarize.missing_folds(group) == expected


def shown(name: str, state: str | None = None, error: bool = False, metrics: dict | None = None) -> dict:
    """Return an entry such as `dvc exp show --json` has for an experiment."""
    data = {
        "timestamp": "2030-01-01T00:00:00",
        "params": {"params.yaml": {"data": {"lr": 0.1, "data": {"fold": 1}}}},
        "metrics": {
            "results/train/metrics.json": {"data": metrics} if metrics else {"error": {"type": "FileNotFoundError"}},
            "results/evaluate/metrics.json": {"data": {"eval": {"acc": 0.25}}},
        },
    }
    tip = {"rev": "0123456789", "name": name, "data": None if error else data, "error": {"msg": "!"} if error else None}
    return {"revs": [tip], "executor": state and {"state": state}, "name": "dvc-task"}


def test_experiments_that_are_not_finished_are_told_apart():
    workspace = {"rev": "workspace", "experiments": None}
    entries = [
        shown("here", metrics={"val_acc": 0.5}),
        shown("queue", "success", metrics={"val_acc": 0.5}),
        shown("later", "queued"),
        shown("now", "running", metrics={"val_acc": 0.5}),
        shown("bad", "failed", error=True),
        shown("worse", "failed"),
        shown("unknown", error=True),
        shown("more", metrics={"val_acc": 0.5, "continues": "here"}),
        shown("half"),
    ]
    finished, others = summarize.collect([workspace, {"rev": "main", "experiments": entries}])
    assert [each.name for each in finished] == ["here", "queue", "half"]
    assert finished[0] == Experiment(
        "here", {"lr": 0.1, "data.fold": 1}, {"val_acc": 0.5, "eval.acc": 0.25}, "2030-01-01T00:00:00"
    )
    assert finished[2].metrics == {"eval.acc": 0.25}
    assert others == {
        "queued": ["later"],
        "running": ["now"],
        "failed": ["bad", "worse"],
        "unreadable": ["unknown"],
        "on top of another": ["more"],
    }


@pytest.mark.parametrize(
    ("finished", "metrics", "message"),
    [
        ([], ["val_acc"], "there is no finished experiment."),
        ([experiment("a", 0.5)], ["val_acc", "val_los"], "no experiment has the metric val_los. Nearest: val_loss"),
        ([experiment("a", 0.5)], ["zzz"], "no experiment has the metric zzz. Known: val_acc, val_loss."),
        (
            [Experiment("a", {}, {"acc": 1.0}, ""), Experiment("b", {}, {"loss": 1.0}, "")],
            ["acc", "loss"],
            "no experiment has all of acc, loss: ask",
        ),
    ],
)
def test_nothing_to_summarize_says_why(finished, metrics, message):
    assert message in summarize.nothing_found(finished, metrics)


@pytest.mark.slow
def test_the_summary_of_three_folds_is_that_of_the_three_experiments(tmp_path):
    project = clone(tmp_path / "project", **TINY)

    def summary(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "src/summarize.py", *arguments]
        result = subprocess.run(command, cwd=project, env=as_user(project), capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        return result

    assert summary(status=1).stderr.startswith("error: there is no finished experiment.")
    for fold in range(3):
        dvc(project, "exp", "run", "-S", f"data.fold={fold}")
    dvc(project, "exp", "run", "--queue", "-S", "lr=0.1")
    (_, commit) = json.loads(dvc(project, "exp", "show", "--json"))
    metrics = [entry["revs"][0]["data"]["metrics"] for entry in commit["experiments"]]
    losses = [files["results/train/metrics.json"]["data"]["val_loss"] for files in metrics if files]
    assert len(set(losses)) == 3  # of three folds, each with other pictures

    told = summary()
    header, line = told.stdout.splitlines()
    assert header.split() == ["n", "folds", "seeds", "val_acc", "val_loss"]
    assert line.startswith("3  3 of 3  1 ")
    assert line.endswith(f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}")
    assert "not in the numbers: 1 queued (" in told.stderr
    assert "warning" not in told.stderr
    (group,) = json.loads(summary("--json", "--metric", "val_loss", "-A").stdout)
    assert group["mean"]["val_loss"] == pytest.approx(statistics.fmean(losses))
    assert sorted(each["fold"] for each in group["experiments"]) == [0, 1, 2]
    assert "Nearest: eval.f1" in summary("--metric", "eval.f", status=1).stderr
