"""Training on top of another run, through DVC: `resume` in the workspace and in the queue."""

import csv
import json
import re

from documents import block
from finetune import checkpoint
from helpers import clone, dvc, typed, wait_for_queue

import pytest
import torch
from test_pipeline import TINY, experiments

pytestmark = pytest.mark.slow


def steps(folder) -> list[str]:
    """Return the steps of the curve that the workspace has."""
    with open(folder / "results/train/plots/metrics/loss.tsv", newline="") as file:
        return [row["step"] for row in csv.DictReader(file, delimiter="\t")]


def metrics(folder) -> dict:
    return json.loads((folder / "results/train/metrics.json").read_text())


def newest(folder) -> dict[str, str]:
    return experiments(folder)[0]


def trained(printed: str) -> list[str]:
    """Return the epochs that a command trained, as it counts them."""
    return re.findall(r"^epoch (\d+)/", printed, re.MULTILINE)


def test_the_walkthrough_of_resume(tmp_path):
    """The document's commands as they stand there, on small pictures."""
    project = clone(tmp_path / "project", **TINY | {"model_name": "mobilenet_v3_small", "num_epochs": 1})
    lines = block("docs/resuming.md", "dvc exp run -S resume=last").lines
    run, slower, longer, from_scratch, to_queue, start, show = lines
    assert trained(typed(project, run)) == ["1"]
    first = newest(project)["Experiment"]
    assert "continues" not in metrics(project)

    assert trained(typed(project, slower)) == ["2"]
    second = newest(project)["Experiment"]
    assert (metrics(project)["step"], metrics(project)["continues"]) == (1, first)
    assert steps(project) == ["0", "1"]
    assert trained(typed(project, longer)) == ["3", "4"]
    assert metrics(project)["continues"] == second
    lineage = checkpoint.load(project / "models/checkpoint.pt")["lineage"]
    assert [(run["name"], run["epochs"]) for run in lineage] == [(first, 1), (second, 2)]

    assert trained(typed(project, from_scratch)) == ["1", "2"]
    assert steps(project) == ["0", "1"]
    here = newest(project)["Experiment"]
    typed(project, to_queue)

    # On top of an experiment, by its name; what does not fit or is not there says so, and the workspace stays.
    printed = dvc(project, "exp", "run", "-S", f"resume={first}", status=255)
    assert f"error: resume = {first}: that checkpoint is of mobilenet_v3_small (ants, bees; " in printed
    arguments = ["-S", "model_name=mobilenet_v3_small", "-S", "num_epochs=1", "-S", "lr=0.02"]
    printed = dvc(project, "exp", "run", "-S", f"resume={first[:-1]}x", *arguments, status=255)
    assert f"Nearest: {first}" in printed
    assert trained(dvc(project, "exp", "run", "-S", f"resume={first}", *arguments)) == ["2"]
    assert (metrics(project)["step"], metrics(project)["continues"]) == (1, first)

    # In the queue, `last` is the workspace's checkpoint of when the experiment was queued.
    typed(project, start)
    assert wait_for_queue(project).count("Success") == 2
    rows = [row for row in experiments(project) if row["lr"] in ("0.0001", "0.003")]
    assert [(row["step"], row["continues"]) for row in rows] == [("3", here)] * 2
    (header,) = re.findall(r"^ +Experiment +(.*\S)", typed(project, show), re.MULTILINE)
    assert {"step", "continues", "resume"} <= set(header.split())


def test_last_without_a_run_before_says_so(tmp_path):
    project = clone(tmp_path / "project", **TINY, resume="last")
    assert "error: resume = last, but dvc.lock has no checkpoint yet" in dvc(project, "exp", "run", status=255)


def test_on_top_with_the_same_settings_equals_one_longer_run(tmp_path):
    project = clone(tmp_path / "project", **TINY | {"num_epochs": 1, "momentum": 0.9})
    dvc(project, "exp", "run")
    assert trained(dvc(project, "exp", "run", "-S", "resume=last")) == ["2"]
    on_top = checkpoint.load(project / "models/checkpoint.pt")
    # A run of two epochs goes on where that of one had ended, in the store: one epoch to train.
    assert trained(dvc(project, "exp", "run", "-S", "resume=auto", "-S", "num_epochs=2")) == ["2"]
    longer = checkpoint.load(project / "models/checkpoint.pt")
    assert all(torch.equal(tensor, longer["model"][name]) for name, tensor in on_top["model"].items())
    strip = [{**row, "training_time": None} for row in on_top["history"]]
    assert strip == [{**row, "training_time": None} for row in longer["history"]]
    assert (on_top["lineage"] != [], longer["lineage"]) == (True, [])
