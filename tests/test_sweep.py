"""Sweeps through src/sweep.py: what becomes of trials, of a killed sweep, and of the workspace."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from finetune import search
from finetune.clones import Clone, Repository
from finetune.trials import Driver
from helpers import TINY, as_user, clone, dvc, git, wait_for, warm

import optuna
import pytest
from optuna.trial import TrialState
from ruamel.yaml import YAML

QUICK = TINY | {"data__source": "data/tiny.yaml", "backbone__weights": "none", "num_epochs": 2}
GRID = {"metric": "val_loss", "direction": "minimize", "method": "grid"}


@pytest.fixture
def project(tmp_path):
    """A repository on whose settings an experiment takes seconds."""
    folder = clone(tmp_path / "project", **QUICK)
    for key, value in {"user.name": "tester", "user.email": "tester@example.org"}.items():
        git(folder, "config", key, value)
    return folder


def write(folder: Path, name: str, content: dict) -> str:
    with open(folder / f"sweeps/{name}.yaml", "w") as file:
        YAML().dump(content, file)
    return f"sweeps/{name}.yaml"


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "src/sweep.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=as_user(folder) | warm() | variables, **pipes)


def sweep(folder: Path, *arguments: str, status: int = 0) -> str:
    """Run a sweep to its end; return what it printed."""
    process = start(folder, *arguments)
    said = process.communicate()[0]
    assert process.returncode == status, said
    return said


def experiments(folder: Path) -> dict[str, dict]:
    """Return what `dvc exp show` says of the experiments, by name."""
    (commit,) = [each for each in json.loads(dvc(folder, "exp", "show", "--json")) if each["experiments"]]
    return {each["name"]: each["revs"][0]["data"] for each in commit["experiments"]}


def metrics(data: dict) -> dict:
    return {key: value for file in data["metrics"].values() for key, value in file["data"].items()}


def settings(data: dict) -> dict:
    return data["params"]["params.yaml"]["data"]


@pytest.mark.slow
def test_a_grids_trials_are_experiments_and_the_workspace_stays_as_it_is(project):
    content = GRID | {"search": {"lr": [0.001, 0.02], "backbone.weights": ["none", "lost.pth"]}}
    file = write(project, "rates", content)
    with open(project / "params.yaml", "a") as params:
        params.write("# mine\n")
    text = (project / "params.yaml").read_text().replace("seed: 0", "seed: 5")
    (project / "params.yaml").write_text(text)
    before = git(project, "status", "--short")
    said = sweep(project, file, "-j", "2")
    assert (project / "params.yaml").read_text() == text
    assert git(project, "status", "--short") == before
    assert not (project / ".dvc/tmp/sweeps/rates/clone-0").exists()

    found = experiments(project)
    assert found.keys() == {"rates-000", "rates-002"}  # the others, of weights that are not there, failed
    assert [settings(found[name])["lr"] for name in sorted(found)] == [0.001, 0.02]
    assert {settings(each)["seed"] for each in found.values()} == {5}  # the workspace's, though not committed
    for name in ("rates-001", "rates-003"):
        assert re.search(rf"^{name}: failed: .*lost.pth", said, re.MULTILINE)
    assert "2 finished, 2 failed" in said
    best = min(found, key=lambda name: metrics(found[name])["val_loss"])
    assert f"best: {best}, val_loss {metrics(found[best])['val_loss']:.4f}" in said

    command = said.splitlines()[-1].split()
    assert command[:3] == ["dvc", "exp", "run"]
    dvc(project, *command[1:])
    again = json.loads((project / "results/train/metrics.json").read_text())
    assert again["val_loss"] == metrics(found[best])["val_loss"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_it_had(project):
    content = {"metric": "val_acc", "direction": "maximize", "method": "tpe", "budget": {"trials": 3}}
    search_ = {"optimizer.name": ["sgd", "adamw"], "lr": {"low": 0.0001, "high": 0.1, "log": True}}
    file = write(project, "mine", content | {"search": search_, "set": {"num_epochs": 100}})
    process = start(project, file)
    for line in process.stdout:
        if line.startswith("mine-000: val_acc"):
            break
    log = project / ".dvc/tmp/sweeps/mine/mine-001.log"
    wait_for(lambda: log.exists() and "epoch 3/100" in log.read_text())
    process.kill()
    process.communicate()
    first = git(project, "for-each-ref", "refs/exps", "--format=%(objectname) %(refname)")
    assert first.count("mine-") == 1

    said = sweep(project, file)
    assert "mine-000: val_acc" not in said  # it was not made again
    assert "going on after" in log.read_text()
    found = experiments(project)
    assert found.keys() == {"mine-000", "mine-001", "mine-002"}
    assert first.strip() in git(project, "for-each-ref", "refs/exps", "--format=%(objectname) %(refname)")
    assert len({settings(each)["lr"] for each in found.values()}) == 3
    assert "3 finished" in said
    assert sweep(project, file).count("dvc exp run") == 1  # nothing is left to do but to say what was best

    git(project, "commit", "-qm", "another", "--allow-empty")
    assert "the commit (HEAD) changed since this sweep began" in sweep(project, file, status=1)


@pytest.mark.slow
def test_stopped_by_the_user_it_saves_what_is_running(project):
    file = write(project, "mine", GRID | {"search": {"lr": [0.001, 0.01]}, "set": {"num_epochs": 20000}})
    process = start(project, file, "-j", "2")
    logs = [project / f".dvc/tmp/sweeps/mine/mine-00{number}.log" for number in range(2)]
    wait_for(lambda: all(log.exists() and "epoch 2/20000" in log.read_text() for log in logs))
    assert "another process runs this sweep" in sweep(project, file, status=1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "What was running is saved; the same command goes on from there." in said
    assert all("all of them saved" in log.read_text() for log in logs)
    assert "refs/exps/" not in git(project, "for-each-ref", "refs/exps").replace("refs/exps/exec", "")


@pytest.mark.slow
def test_a_trial_is_as_good_as_the_mean_of_its_repeats(project):
    content = GRID | {"metric": "eval.loss", "search": {"lr": [0.01]}, "repeat": {"seed": [3, 4]}}
    said = sweep(project, write(project, "seeds", content))
    found = experiments(project)
    assert {name: settings(each)["seed"] for name, each in found.items()} == {"seeds-000-1": 3, "seeds-000-2": 4}
    losses = [metrics(each)["eval"]["loss"] for each in found.values()]
    assert losses[0] != losses[1]
    assert f"best: seeds-000, eval.loss {sum(losses) / 2:.4f}" in said
    assert said.splitlines()[-2:] == [f"  dvc exp run -S lr=0.01 -S seed={seed}" for seed in (3, 4)]


@pytest.mark.slow
def test_a_clone_is_made_anew_though_something_writes_in_the_one_before(project):
    folder = project / ".dvc/tmp/sweeps/mine/clone-0"
    (folder / "models").mkdir(parents=True)
    writes = "i=0; while :; do mkdir -p models; echo > models/$((i++)); done"
    writer = subprocess.Popen(["bash", "-c", writes], cwd=folder)
    try:
        wait_for(lambda: len(list((folder / "models").iterdir())) > 1000)
        clone_ = Clone(Repository(project), folder)
        assert (folder / "params.yaml").read_bytes() == (project / "params.yaml").read_bytes()
        assert not list((folder / "models").glob("1*"))
        assert (
            git(folder, "config", "--local", "user.name") == "tester\n"
        )  # as the repository's, not the tests' variables
    finally:
        writer.kill()
        writer.wait()
    clone_.close()
    assert list(folder.parent.iterdir()) == []


class FromTheSecondOn(optuna.pruners.BasePruner):
    """Stops every trial but the first, after an epoch."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number > 0 and bool(trial.intermediate_values)


@pytest.mark.slow
def test_a_bad_trial_is_stopped_and_its_command_would_go_on(project, monkeypatch):
    monkeypatch.chdir(project)
    for name in ("DATA_ARCHIVE", "WEIGHTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: FromTheSecondOn())
    content = GRID | {"pruner": "median", "search": {"num_epochs": [3, 150]}, "set": {"lr": 0.01}}
    folder = project / ".dvc/tmp/sweeps/mine"
    folder.mkdir(parents=True)
    repository = Repository(project)
    slots = [Clone(repository, folder / "clone-0")]
    driver = Driver("mine", search.load(write(project, "mine", content)), repository, folder, slots)
    driver.run()
    assert [each.state for each in driver.study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    epochs = driver.study.trials[0].intermediate_values
    assert list(epochs) == [1, 2, 3]
    assert experiments(project).keys() == {"mine-000"}
    last = metrics(experiments(project)["mine-000"])["val_loss"]
    assert epochs[3] == pytest.approx(last, abs=1e-4)
    stopped = (folder / "mine-001.log").read_text()
    assert "all of them saved" in stopped
    assert "epoch 150/150" not in stopped
    assert "going on after" in dvc(project, "exp", "run", "-S", "num_epochs=150", "-S", "lr=0.01")


@pytest.mark.slow
def test_when_nothing_but_failures_comes_of_it_the_sweep_ends(project):
    content = GRID | {"search": {"lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, "set": {"data.source": "data/lost.yaml"}}
    said = sweep(project, write(project, "lost", content), status=1)
    assert said.count("failed: ") == 3
    assert "the first 3 trials failed, so the sweep ends here." in said


def test_what_is_wrong_is_told_before_anything_runs(project):
    for arguments, wanted in {
        ("sweeps/lost.yaml",): "error: sweeps/lost.yaml is missing",
        (write(project, "a b", GRID | {"search": {"lr": [0.1]}}),): "experiments begin with the file's name",
        (write(project, "mine", GRID | {"search": {"lr": [-1]}}),): "search.lr has -1, which should be greater than 0",
        (write(project, "one", GRID | {"search": {"lr": [0.1]}}), "-j", "0"): "-j 0: give the number of experiments",
    }.items():
        said = sweep(project, *arguments, status=1)
        assert wanted in said
        assert len(said.splitlines()) == 1
    assert not (project / ".dvc/tmp/sweeps").exists()
