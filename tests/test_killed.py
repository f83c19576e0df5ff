"""Kills of DVC itself, of its stages, and of the queue's workers: the same again ends as if nothing had been."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from helpers import as_user, clone, differences, dvc, results, run_forked, start_queue, write_params

import psutil
import pytest
from test_pipeline import TINY

pytestmark = pytest.mark.slow

RECIPE = "drawn: [ants, bees]\ntrain: 30\nval: 4\nsize: 40\nseed: 0\n"
SETTINGS = TINY | {"num_epochs": 6, "momentum": 0.9}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of seeds 0 and 1, of stages that nothing disturbed, DVC neither."""
    folder = clone(tmp_path_factory.mktemp("undisturbed") / "project", RECIPE, **SETTINGS)
    found = []
    for seed in (0, 1):
        write_params(folder, **SETTINGS, seed=seed)
        for stage in ("train", "evaluate") if found else ("backbone", "prepare", "train", "evaluate"):
            run_forked(folder, stage)
        found.append(results(folder))
    return found


def killed(folder: Path, line: str, whole_group: bool, *arguments: str) -> None:
    """Run dvc until it prints a line that begins so, then kill it, alone or with its stage."""
    process = subprocess.Popen(
        ["dvc", *arguments], cwd=folder, env=as_user(folder), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed = []
    for each in process.stdout:
        printed.append(each)
        if each.startswith(line):
            break
    else:
        raise AssertionError("".join(printed))
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.stdout.read()  # until the stage has gone, too
    assert process.wait() == -signal.SIGKILL


def gone_on(printed: str) -> int:
    """Return the number of epochs after which a run went on."""
    return int(re.search(r"^going on after (\d+) epochs", printed, re.MULTILINE)[1])


def test_an_experiment_killed_in_the_workspace(tmp_path, undisturbed):
    project = clone(tmp_path / "project", RECIPE, **SETTINGS)
    killed(project, "> python3 src/prepare.py", True, "exp", "run")
    killed(project, "epoch 2/6", True, "exp", "run")
    killed(project, "epoch 5/6", False, "exp", "run")
    killed(project, "> python3 src/evaluate.py", True, "exp", "run")
    printed = dvc(project, "exp", "run")
    assert "Stage 'train' didn't change, skipping" in printed
    assert differences(results(project), undisturbed[0]) == []


def test_an_experiment_killed_in_a_temporary_folder(tmp_path, undisturbed):
    project = clone(tmp_path / "project", RECIPE, **SETTINGS)
    killed(project, "epoch 3/6", True, "exp", "run", "--temp")
    printed = dvc(project, "exp", "run", "--temp", "--name", "again")
    assert gone_on(printed) >= 2
    dvc(project, "exp", "apply", "again")
    assert differences(results(project), undisturbed[0]) == []


def test_experiments_and_workers_of_the_queue_killed(tmp_path, undisturbed):
    project = clone(tmp_path / "project", RECIPE, **SETTINGS)
    dvc(project, "exp", "run", "--queue", "-S", "seed=0,1")
    start_queue(project, jobs=2)
    store = project / ".dvc/tmp/checkpoints"
    while len({file.parent for file in store.glob("*/*.pt")}) < 2:  # both have an epoch
        time.sleep(0.05)
    one, other = processes(project, "exec-run")
    one.kill()  # DVC, of an experiment
    other.parent().kill()  # the other's worker; its DVC goes on alone, and no one takes its results
    psutil.wait_procs([*processes(project, "src/train.py"), other], timeout=60)

    dvc(project, "exp", "run", "--queue", "-S", "seed=0", "--name", "zero")
    dvc(project, "exp", "run", "--queue", "-S", "seed=1", "--name", "one")
    start_queue(project, jobs=2)
    status = dvc(project, "queue", "status")
    while not all(re.search(rf" {name} .*Success", status) for name in ("zero", "one")):
        assert not re.search(r" (zero|one) .*Failed", status)
        time.sleep(3)
        status = dvc(project, "queue", "status")
    # What DVC has not heard of, it holds to be running until it is told.
    (stuck,) = re.findall(r"^\w{7} +(\S+) .*Running", status, re.MULTILINE)
    dvc(project, "queue", "kill", stuck)
    assert "Running" not in dvc(project, "queue", "status")
    for name, expected in zip(("zero", "one"), undisturbed, strict=True):
        log = dvc(project, "queue", "logs", name)
        assert re.search(r"^going on after [1-5] epochs|^this run is finished", log, re.MULTILINE)
        dvc(project, "exp", "apply", name)
        assert differences(results(project), expected) == []


def processes(project: Path, command: str) -> list[psutil.Process]:
    """Return the processes below a project's folder whose command line has `command` in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if command in " ".join(process.cmdline()) and Path(process.cwd()).is_relative_to(project):
                found.append(process)
    return found
