"""Sweeps on a Ray cluster: real nodes on this machine, each with its own temporary folder, and what becomes of them."""

import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from finetune import agent, clones, datasets, nodes, search, sharing
from finetune.clones import Repository
from finetune.errors import UserError
from finetune.trials import Driver
from helpers import COLD, clone, differences, dvc, git, make_pictures, results, wait_for, warm

import optuna
import pytest
from optuna.trial import TrialState
from test_sweep import GRID, QUICK, FromTheSecondOn, experiments, start, sweep, write
from zc.lockfile import LockFile

pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="requirements-ray.txt is not installed")

CLOSED = "http://127.0.0.1:9/mine.zip"  # where nobody listens


def shared(folder: Path, recipe: str | None = None) -> Path:
    """Return a repository that is on a git remote with all it has, and has a DVC remote."""
    project = clone(folder / "project", **({"recipe": recipe} if recipe else {}), **QUICK)
    for key, value in {"user.name": "tester", "user.email": "tester@example.org"}.items():
        git(project, "config", key, value)
    git(project, "init", "-q", "--bare", "-b", "main", str(folder / "git"))
    git(project, "remote", "add", "origin", str(folder / "git"))
    dvc(project, "remote", "add", "-d", "storage", str(folder / "storage"))
    save(project)
    return project


def save(project: Path) -> None:
    git(project, "add", "-A")
    git(project, "commit", "-qm", "more", "--allow-empty")
    git(project, "push", "-q", "origin", "main")


@contextlib.contextmanager
def cluster(folder: Path, *variables: dict[str, str]) -> Iterator:
    """Yield a cluster: a head that runs nothing, and a node of one core for each of the sets of variables."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for number, each in enumerate(variables):
            temporary = folder / f"node-{number}"
            temporary.mkdir()
            made.add_node(num_cpus=1, env_vars={"TMPDIR": str(temporary)} | each)
        yield made
    finally:
        made.shutdown()


# What is wrong is told before anything runs ---------------------------------------------------------------------------


def test_what_other_machines_would_not_get_is_an_error(tmp_path):
    project = shared(tmp_path)

    def problem() -> str:
        with pytest.raises(UserError) as error:
            sharing.check(Repository(project))
        assert len(str(error.value).splitlines()) <= 2
        return str(error.value)

    assert sharing.check(Repository(project)) == str(tmp_path / "git")
    assert not list((tmp_path / "storage").rglob("*.*"))
    with open(project / "params.yaml", "a") as params:
        params.write("# mine\n")
    assert "params.yaml: uncommitted changes, which the other machines would not see." in problem()
    git(project, "commit", "-qam", "mine")
    assert "is not on origin, so the other machines can't get it: git push" in problem()
    git(project, "push", "-q", "origin", "main")

    shutil.move(tmp_path / "git", tmp_path / "away")
    assert "the git remote origin refuses: " in problem()
    shutil.move(tmp_path / "away", tmp_path / "git")
    (tmp_path / "file").touch()
    dvc(project, "remote", "modify", "--local", "storage", "url", str(tmp_path / "file/storage"))
    assert "the DVC remote refuses: " in problem()
    (project / ".dvc/config.local").unlink()
    dvc(project, "remote", "remove", "storage")
    save(project)
    assert "there is no DVC remote" in problem()
    git(project, "remote", "remove", "origin")
    assert "there is no git remote origin" in problem()


@needs_ray
def test_nodes_that_differ_are_named(tmp_path, monkeypatch):
    project = shared(tmp_path)
    file = write(project, "mine", GRID | {"search": {"lr": [0.01]}})
    said = sweep(project, file, "--ray", "127.0.0.1:9", status=1)
    assert "error: --ray 127.0.0.1:9: " in said
    assert len(said.splitlines()) == 2
    monkeypatch.chdir(project)
    metadata = tmp_path / "other/torch-0.1.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    with (
        cluster(tmp_path, {}, {"PYTHONPATH": str(tmp_path / "other")}) as made,
        nodes.connected(made.address),
    ):
        other = next(node for node in made.worker_nodes if "PYTHONPATH" in node._ray_params.env_vars)
        repository = Repository(project)
        with pytest.raises(UserError, match="no node of the cluster has what an experiment wants: 2 CPU"):
            nodes.Nodes(repository, str(tmp_path / "git"), cpus=2, gpus=0)
        with pytest.raises(UserError, match=rf"{other.node_id[:8]}\) has torch 0.1, not 2") as error:
            nodes.Nodes(repository, str(tmp_path / "git"), cpus=1, gpus=0)
        assert len(str(error.value).splitlines()) == 2  # the other node is as it should be


# Nodes that fail ------------------------------------------------------------------------------------------------------


@needs_ray
def test_a_lost_nodes_trial_goes_on_elsewhere_and_ends_the_same_to_the_bit(tmp_path):
    project = shared(tmp_path)
    make_pictures(project / "data/flowers", {f"{part}/{name}": 5 for part in ("train", "val") for name in "ab"})
    dvc(project, "add", "data/flowers")
    dvc(project, "push")
    settings = {"data.source": "data/flowers", "num_epochs": 60}
    file = write(project, "rates", GRID | {"search": {"lr": [0.001, 0.02]}, "set": settings})
    save(project)
    (tmp_path / "checkpoints").mkdir()
    with cluster(tmp_path, {}, {}) as made:
        process = start(project, file, "--ray", made.address, CHECKPOINTS_DIR=str(tmp_path / "checkpoints"), **COLD)
        log = project / ".dvc/tmp/sweeps/rates/rates-001.log"
        wait_for(lambda: log.exists() and "epoch 3/" in log.read_text())
        lost = next(node for node in made.worker_nodes if node.node_id[:8] in log.read_text())
        made.remove_node(lost, allow_graceful=False)
        said = process.communicate()[0]
        assert process.returncode == 0, said
    assert f"({lost.node_id[:8]}) was lost; it goes on elsewhere" in said
    assert re.search("going on after|this run is finished", log.read_text())  # the latter: it had just come to its end
    assert "2 finished" in said
    assert experiments(project).keys() == {"rates-000", "rates-001"}

    dvc(project, "exp", "pull", "origin", "rates-001")
    dvc(project, "exp", "apply", "rates-001")
    found = results(project)
    printed = dvc(project, "exp", "run", "--force", OMP_NUM_THREADS="1", **COLD)
    assert "going on after" not in printed
    assert differences(found, results(project)) == []


def test_a_push_that_takes_longer_than_the_training_is_in_nobodys_way(tmp_path, monkeypatch):
    project = shared(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for key, value in (warm() | {"FINETUNE_SCRATCH": ""}).items():  # the latter is the agent's to set
        monkeypatch.setenv(key, value)
    node, pushed, usual = agent.Agent(), [], clones.dvc

    def slow(folder: Path, *arguments: str) -> str:
        if arguments[0] == "push":
            (folder / ".dvc/tmp").mkdir(exist_ok=True)
            with contextlib.closing(LockFile(str(folder / ".dvc/tmp/lock"))):  # as DVC has it as long as it pushes
                wait_for(lambda: "epoch 2/2" in node.running.log.read_text())
                time.sleep(6)
            pushed.extend(arguments)
        return usual(folder, *arguments)

    monkeypatch.setattr(clones, "dvc", slow)
    commit = git(project, "rev-parse", "HEAD").strip()
    assert node.set_up(str(tmp_path / "git"), commit, agent.versions(), {}, clones.identity(project)) == ""
    node.start("mine", ["seed=1"])
    looks = [node.look()]
    while looks[-1][1] is None:
        looks.append(node.look())
    assert looks[-1][1] == 0, node.running.log.read_text()
    assert pushed == ["push", "--run-cache", "backbone", "prepare"]

    # Another node then has nothing to prepare.
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", "git", str(other))
    printed = dvc(other, "repro", "--pull", "backbone", "prepare")
    assert printed.count("is cached - skipping run") == 2


@needs_ray
def test_a_node_without_the_pictures_trains_on_nothing_else_and_a_bad_trial_is_stopped(tmp_path, monkeypatch, capsys):
    make_pictures(tmp_path / "pictures", {f"{part}/{name}": 3 for part in ("train", "val") for name in "ab"})
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path / "pictures"))
    digest = datasets.read(tmp_path / "pictures", "pictures").digest
    recipe = f"url: {CLOSED}\nbytes: {archive.stat().st_size}\nsha256: {'a' * 64}\ndigest: {digest}\n"
    project = shared(tmp_path, recipe)
    monkeypatch.chdir(project)
    monkeypatch.delenv("DATA_ARCHIVE", raising=False)
    repository = Repository(project)

    variables = ({}, {"DATA_ARCHIVE": str(archive)})
    with cluster(tmp_path, *(each | warm() for each in variables)) as made, nodes.connected(made.address):
        (bare,) = (node.node_id for node in made.worker_nodes if "DATA_ARCHIVE" not in node._ray_params.env_vars)

        def study(name: str, content: dict, is_bare_alone: bool) -> list:
            slots = list(nodes.Nodes(repository, sharing.check(repository), cpus=1, gpus=0).slots(2))
            wait_for(lambda: all([slot.is_ready for slot in slots]))
            slots.sort(key=lambda slot: slot.place != bare)
            folder = project / ".dvc/tmp/sweeps" / name
            folder.mkdir(parents=True)
            content = search.load(write(project, name, GRID | content))
            driver = Driver(name, content, repository, folder, slots[: 1 if is_bare_alone else None])
            driver.run()
            for slot in slots[1:] if is_bare_alone else ():
                slot.close()
            return [trial.state for trial in driver.study.trials]

        alone = {"search": {"lr": [0.01]}}
        assert study("alone", alone, is_bare_alone=True) == [TrialState.FAIL]
        assert f"alone-000: failed: error: can't fetch {CLOSED}: " in capsys.readouterr().out
        monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: FromTheSecondOn())
        both = {"pruner": "median", "search": {"num_epochs": [2, 300]}, "set": {"lr": 0.02}}
        assert study("both", both, is_bare_alone=False) == [TrialState.COMPLETE, TrialState.PRUNED]
        said = capsys.readouterr().out
        assert f"({bare[:8]}) is not used: error: can't fetch {CLOSED}: " in said
        assert "both-001: stopped early  dvc exp run -S lr=0.02 -S num_epochs=300" in said
    (log,) = tmp_path.glob("node-0/finetune-*/*/slot-0.log")
    assert "Running stage 'prepare'" in log.read_text()
    assert "Running stage 'train'" not in log.read_text()
