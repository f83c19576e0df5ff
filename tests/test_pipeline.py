"""The pipeline through DVC, in scratch clones: experiments, the queue, comparing; and on the real pictures."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from finetune import datasets
from helpers import clone, dvc, git, make_pictures, start_queue, wait_for_queue, write_params

import pytest
import torch
import torchvision
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

COLUMNS = ["step", "acc", "loss", "training_time", "val_acc", "val_loss", "lr"]
COLUMNS += ["eval.acc", "eval.loss", "eval.f1", "eval.auroc", "eval.ece"]
PICTURES = "results/evaluate/pictures"
TINY = {
    "model_name": "squeezenet",
    "num_epochs": 2,
    "device": "cpu",
    "data__source": "data/tiny.yaml",
    "data__image_size": 32,
    "data__resize": 40,
    "backbone__weights": "none",
}


def read_yaml(path: Path) -> dict:
    return YAML(typ="safe").load(path)


def experiments(folder: Path) -> list[dict[str, str]]:
    """Return the rows of `dvc exp show` that are experiments."""
    rows = csv.DictReader(io.StringIO(dvc(folder, "exp", "show", "--csv")))
    return [row for row in rows if row["typ"].startswith("branch")]


def test_the_walkthrough(tmp_path):
    project = clone(tmp_path / "project", **TINY)

    printed = dvc(project, "exp", "run")
    assert "Experiment results have been applied to your workspace" in printed
    assert git(project, "status", "--short").split() == ["M", "dvc.lock", "??", "results/"]
    (first,) = experiments(project)
    assert first.keys() >= set(COLUMNS)
    assert (first["step"], first["lr"]) == ("1", "0.001")

    write_params(project, **TINY, lr=0.009, momentum=0.017)
    printed = dvc(project, "exp", "run")
    assert "Stage 'prepare' didn't change, skipping" in printed
    assert "Stage 'backbone' didn't change, skipping" in printed
    printed = dvc(project, "exp", "run", "-S", "lr=0.025", "-S", "momentum=0.5", "-S", "num_epochs=1")
    assert "epoch 1/1" in printed
    printed = dvc(project, "exp", "run", "-S", "model_name=mobilenet_v3_small")
    assert "mobilenet_v3_small: 0 pretrained parameters" in printed
    assert [row["lr"] for row in experiments(project)] == ["0.025", "0.025", "0.009", "0.001"]

    dvc(project, "exp", "run", "--queue", "-S", "lr=0.0001", "-S", "momentum=0.9", "-S", "num_epochs=1")
    printed = dvc(project, "exp", "run", "--queue", "-S", "lr=0.001,1e30")
    failing = re.findall(r"Queued experiment '([^']+)'", printed)[1]
    assert dvc(project, "exp", "show", "--no-pager").count("Queued") == 3
    dvc(project, "exp", "run", "--run-all")
    status = wait_for_queue(project)
    assert status.count("Success") == 2
    assert re.search(rf"{failing}\s.*Failed", status)
    log = dvc(project, "queue", "logs", failing)
    assert "error: the loss in epoch 1, step " in log
    assert "Traceback" not in log

    dvc(project, "exp", "run", "--queue", "-S", "lr=0.002,0.003")
    start_queue(project, jobs=2)
    assert wait_for_queue(project).count("Success") == 4
    assert len([row for row in experiments(project) if row["State"] != "Failed"]) == 8

    table = dvc(project, "exp", "show", "--no-pager", "--only-changed", "--sort-by", "val_acc", "--sort-order", "desc",
                "--drop", "src|data|models|weights|Created")  # fmt: skip
    assert re.search(r"Experiment .*\bacc .*\bval_acc .*\blr ", table)
    assert not re.search(r"num_classes|src/|models/|params\.yaml:", table)
    assert "momentum" in dvc(project, "exp", "diff", first["Experiment"])
    assert "eval.auroc" in dvc(project, "metrics", "show")
    plots = json.loads(dvc(project, "plots", "diff", first["Experiment"], "--json"))
    assert not plots.get("errors")
    drawn = {f"{PICTURES}/{name}.png" for name in ("calibration", "confusion", "highest_loss", "precision_recall",
                                                   "random", "roc")}  # fmt: skip
    listed = {name for plot in read_yaml(project / "dvc.yaml")["plots"] if plot != PICTURES for name in plot}
    assert set(plots["data"]) == listed | drawn
    revisions = {name: {each for plot in found for each in plot["revisions"]} for name, found in plots["data"].items()}
    assert all({first["Experiment"], "workspace"} <= each for each in revisions.values())

    dvc(project, "exp", "apply", first["Experiment"])
    assert json.loads((project / "results/train/metrics.json").read_text())["val_acc"] == float(first["val_acc"])
    dvc(project, "exp", "branch", first["Experiment"], "best")
    assert "best" in git(project, "branch")
    assert "Data and pipelines are up to date" in dvc(project, "repro")

    # The same experiment again, from another workspace and though it was removed: it is not trained twice.
    dvc(project, "exp", "remove", "-A")
    printed = dvc(project, "exp", "run", "--temp", "-S", "lr=0.003", "-S", "model_name=mobilenet_v3_small",
                  "-S", "momentum=0.5", "-S", "num_epochs=1")  # fmt: skip
    assert "this run is finished, nothing to train" in printed

    # A key that no stage knows is an error, though nothing else has changed.
    with open(project / "params.yaml", "a") as file:
        file.write("learning_rate: 0.1\n")
    printed = dvc(project, "exp", "run", status=255)
    assert "error: params.yaml: unknown key learning_rate" in printed


def test_relative_paths_of_data_and_weights_hold_in_the_queue(tmp_path):
    make_pictures(tmp_path / "pictures", {"train/ants": 3, "train/bees": 3, "val/ants": 2, "val/bees": 2}, size=40)
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path / "pictures"))
    (tmp_path / "weights").mkdir()
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "weights/squeezenet1_1.pth")
    project = clone(tmp_path / "project", **TINY | {"data__source": "data/mine.yaml", "backbone__weights": "imagenet"})
    digest = datasets.read(tmp_path / "pictures", "pictures").digest
    (project / "data/mine.yaml").write_text(
        f"url: http://127.0.0.1:9/mine.zip\nbytes: {archive.stat().st_size}\nsha256: {'a' * 64}\ndigest: {digest}\n"
    )
    git(project, "add", "-A")
    git(project, "commit", "-qm", "mine")

    places = {"DATA_ARCHIVE": "../pictures.zip", "WEIGHTS_DIR": "../weights"}
    dvc(project, "exp", "run", "--queue", **places)
    dvc(project, "queue", "start", **places)
    status = wait_for_queue(project)
    assert "Success" in status, dvc(project, "queue", "logs", re.search(r"^(\w{7})\s", status, re.MULTILINE)[1])
    assert git(project, "status", "--short") == ""


def test_a_folder_of_ones_own(tmp_path):
    project = clone(tmp_path / "project", **TINY)
    make_pictures(project / "data/flowers", {"daisy": 5, "rose": 5, "tulip": 5}, size=40)
    printed = dvc(project, "exp", "run", "-S", "data.source=data/flowers", status=255)
    assert "data/flowers has 3 classes (daisy, rose, tulip): set it with -S num_classes=3" in printed
    dvc(project, "exp", "run", "-S", "data.source=data/flowers", "-S", "num_classes=3")
    manifest = json.loads((project / "data/prepared/manifest.json").read_text())
    assert manifest["counts"]["val"] == {"daisy": 1, "rose": 1, "tulip": 1}


def test_the_demo_learns_and_leaves_the_workspace_as_it_was(tmp_path):
    project = clone(tmp_path / "project")
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("num_classes: 2", "num_classes: 5")
    )
    before = git(project, "status", "--short"), git(project, "stash", "list"), git(project, "rev-parse", "HEAD")
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for _ in range(2):  # the second time, the results are there
        result = subprocess.run(
            [sys.executable, "src/demo.py"], cwd=project, env=environ, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "dvc exp run" in result.stdout
        accuracies = re.findall(r"^(alexnet|squeezenet) \(.*\): val_acc (0\.\d+|1\.0+)$", result.stdout, re.MULTILINE)
        assert [model for model, _ in accuracies] == ["alexnet", "squeezenet"]
        assert all(float(accuracy) >= 0.9 for _, accuracy in accuracies)
        after = git(project, "status", "--short"), git(project, "stash", "list"), git(project, "rev-parse", "HEAD")
        assert after == before
    assert result.stdout.count("this run is finished, nothing to train") == 2


@pytest.mark.skipif(
    not (os.environ.get("DATA_ARCHIVE") and os.environ.get("WEIGHTS_DIR")),
    reason="DATA_ARCHIVE and WEIGHTS_DIR do not say where the real pictures and weights are",
)
@pytest.mark.parametrize(("model", "least"), [("alexnet", 0.85), ("squeezenet", 0.88)])
def test_the_defaults_reach_their_accuracy_on_the_real_pictures(tmp_path, model, least):
    project = clone(tmp_path / "project", model_name=model)
    places = {name: os.path.relpath(os.environ[name], project) for name in ("DATA_ARCHIVE", "WEIGHTS_DIR")}
    printed = dvc(project, "exp", "run", **places)
    assert "prepared 244 train and 153 val pictures of 2 classes (ants, bees)" in printed
    (row,) = experiments(project)
    assert row["val_acc"] == row["eval.acc"]
    assert float(row["val_acc"]) >= least
