"""DVC's queue with our stages in it: what its commands do to experiments that wait, run, fail and are done."""

import re
import time
from pathlib import Path

from helpers import TINY, clone, dvc, start_queue, wait_for, wait_for_queue

import pytest
from test_pipeline import experiments

pytestmark = pytest.mark.slow

SETTINGS = TINY | {"data__source": "data/tiny.yaml", "backbone__weights": "none"}


def names(folder: Path, state: str) -> list[str]:
    """Return the names of the experiments in the queue that are in that state."""
    return re.findall(rf"^\w+ +(\S+) .*\b{state}\b", dvc(folder, "queue", "status"), re.MULTILINE)


def test_what_waits_runs_fails_and_is_stopped(tmp_path):
    project = clone(tmp_path / "project", **SETTINGS, num_epochs=150)
    dvc(project, "exp", "run", "--queue", "-n", "long", "-S", "num_epochs=3000")
    start_queue(project)
    wait_for(lambda: names(project, "Running") == ["long"], every=2)
    wait_for(lambda: "epoch 1/" in dvc(project, "queue", "logs", "long"))
    dvc(project, "queue", "kill", "long")
    wait_for_queue(project)  # DVC stops the worker, too, which would take the next with it
    dvc(project, "exp", "run", "--queue", "-n", "bad", "-S", "lr=1e30")
    dvc(project, "exp", "run", "--queue", "-n", "good", "-S", "num_epochs=1")
    dvc(project, "exp", "run", "--queue", "-n", "late")
    assert len(names(project, "Queued")) == 3
    dvc(project, "queue", "remove", "late")
    start_queue(project)
    status = wait_for_queue(project)
    assert {name: re.search(rf" {name} .* (\w+) *$", status, re.MULTILINE)[1] for name in ("long", "bad", "good")} == {
        **dict.fromkeys(("long", "bad"), "Failed"),
        "good": "Success",
    }
    assert [row["Experiment"] for row in experiments(project) if row["State"] != "Failed"] == ["good"]
    log = dvc(project, "queue", "logs", "bad")
    assert "error: the loss in epoch 1, step " in log
    assert "Traceback" not in log
    assert re.search(r"stopped in epoch \d+ of 3000 .*all of them saved", dvc(project, "queue", "logs", "long"))
    dvc(project, "queue", "remove", "--failed")
    assert names(project, "Failed") == []

    # A worker that is asked to stop ends with its experiment, and leaves the rest queued.
    dvc(project, "exp", "run", "--queue", "-S", "seed=5,6")
    start_queue(project)
    (running,) = wait_for(lambda: names(project, "Running"), every=2)
    dvc(project, "queue", "stop")
    wait_for(lambda: running in names(project, "Success"), every=2)
    time.sleep(2)
    assert len(names(project, "Queued")) == 1
    dvc(project, "queue", "remove", "--queued")
    status = dvc(project, "queue", "status")
    assert "Queued" not in status
    assert "0 active, 0 idle" in status
