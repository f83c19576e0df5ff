"""The pipeline through DVC, in scratch clones: experiments, the queue, comparing; and on the real pictures."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

from documents import block
from finetune import datasets
from helpers import COLD, clone, dvc, git, have_environment, make_pictures, typed, wait_for_queue

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
    """The README's commands as they stand there, on small pictures."""
    project = clone(tmp_path / "project", **TINY | {"model_name": "mobilenet_v3_small", "num_epochs": 1})
    have_environment(project)

    setup, run = block("README.md", "make setup && ").lines
    assert "installing" not in typed(project, setup)
    assert "Experiment results have been applied to your workspace" in typed(project, run)
    assert git(project, "status", "--short").split() == ["M", "dvc.lock", "??", "results/"]
    (first,) = experiments(project)
    assert first.keys() >= set(COLUMNS)
    assert (first["step"], first["lr"]) == ("0", "0.001")

    show, edit, again, other_settings, other_network, *queue = block("README.md", "sed -i").lines
    assert first["Experiment"] in typed(project, show)
    typed(project, edit)
    printed = typed(project, again)
    assert "Stage 'prepare' didn't change, skipping" in printed
    assert "Stage 'backbone' didn't change, skipping" in printed
    assert "epoch 2/2" in typed(project, other_settings)
    assert "squeezenet1_1: 0 pretrained parameters" in typed(project, other_network)
    assert [row["lr"] for row in experiments(project)] == ["0.025", "0.025", "0.009", "0.001"]

    *to_queue, show, follow, to_queue_more, start, status, table = queue
    for line in to_queue:
        typed(project, line)
    assert typed(project, show).count("Queued") == 3
    typed(project, follow)
    assert wait_for_queue(project).count("Success") == 3
    typed(project, to_queue_more)
    typed(project, start)
    assert re.search("Running|Queued", typed(project, status))
    assert wait_for_queue(project).count("Success") == 5
    rows = experiments(project)
    assert len(rows) == 9
    assert not any(row.get("continues") for row in rows)
    printed = typed(project, table)
    assert re.search(r"Experiment .*\bacc .*\bval_acc .*\blr ", printed)
    assert not re.search(r"num_classes|src/|models/|params\.yaml:", printed)

    (other,) = (row for row in rows if (row["model_name"], row["lr"]) == ("squeezenet", "0.001"))
    names = {"urban-yank": first["Experiment"], "agley-scut": other["Experiment"]}
    lines = block("README.md", "dvc exp diff").lines
    lines = [re.sub("|".join(names), lambda match: names[match[0]], line) for line in lines]
    diff, metrics, plots, apply, branch, repro = lines
    assert "momentum" in typed(project, diff)
    assert "eval.auroc" in typed(project, metrics)
    plots = json.loads(typed(project, plots.partition("#")[0] + " --json"))
    assert not plots.get("errors")
    drawn = {f"{PICTURES}/{name}.png" for name in ("calibration", "confusion", "highest_loss", "precision_recall",
                                                   "random", "roc")}  # fmt: skip
    listed = {name for plot in read_yaml(project / "dvc.yaml")["plots"] if plot != PICTURES for name in plot}
    assert set(plots["data"]) == listed | drawn
    revisions = [{each for plot in found for each in plot["revisions"]} for found in plots["data"].values()]
    assert all(each == {*names.values()} for each in revisions)
    typed(project, apply)
    assert json.loads((project / "results/train/metrics.json").read_text())["val_acc"] == float(other["val_acc"])
    typed(project, branch)
    assert "best" in git(project, "branch")
    assert "Data and pipelines are up to date" in typed(project, repro)

    # The same experiment again, from another workspace and though it was removed: it is not trained twice.
    dvc(project, "exp", "remove", "-A")
    printed = dvc(project, "exp", "run", "--temp", "-S", "lr=0.025", "-S", "seed=1")
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
    kinds = ["aster", "daisy", "lily", "rose", "tulip"]
    make_pictures(project / "data/flowers", dict.fromkeys(kinds, 5), size=40)
    printed = dvc(project, "exp", "run", "-S", "data.source=data/flowers", status=255)
    assert f"data/flowers has 5 classes ({', '.join(kinds)}): set it with -S num_classes=5" in printed
    (line,) = block("README.md", "dvc exp run -S data.source=data/flowers").lines
    typed(project, line)
    manifest = json.loads((project / "data/prepared/manifest.json").read_text())
    assert manifest["counts"]["val"] == dict.fromkeys(kinds, 1)


def test_the_demo_learns_and_leaves_the_workspace_as_it_was(tmp_path):
    project = clone(tmp_path / "project")
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("num_classes: 2", "num_classes: 5")
    )
    before = git(project, "status", "--short"), git(project, "stash", "list"), git(project, "rev-parse", "HEAD")
    have_environment(project)
    make_demo = block("README.md", "make demo").lines[0]
    for _ in range(2):  # the second time, the results are there
        printed = typed(project, make_demo, **COLD)
        assert "dvc exp run" in printed
        accuracies = re.findall(r"^(alexnet|squeezenet) \(.*\): val_acc (0\.\d+|1\.0+)$", printed, re.MULTILINE)
        assert [model for model, _ in accuracies] == ["alexnet", "squeezenet"]
        assert all(float(accuracy) >= 0.9 for _, accuracy in accuracies)
        after = git(project, "status", "--short"), git(project, "stash", "list"), git(project, "rev-parse", "HEAD")
        assert after == before
    assert printed.count("this run is finished, nothing to train") == 2


@pytest.mark.skipif(
    not (os.environ.get("DATA_ARCHIVE") and os.environ.get("WEIGHTS_DIR")),
    reason="DATA_ARCHIVE and WEIGHTS_DIR do not say where the real pictures and weights are",
)
@pytest.mark.parametrize(("model", "least"), [("alexnet", 0.85), ("squeezenet", 0.88)])
def test_the_defaults_reach_their_accuracy_on_the_real_pictures(tmp_path, model, least):
    project = clone(tmp_path / "project", model_name=model)
    places = {name: os.path.relpath(os.environ[name], project) for name in ("DATA_ARCHIVE", "WEIGHTS_DIR")}
    printed = dvc(project, "exp", "run", **places, **COLD)
    assert "prepared 244 train and 153 val pictures of 2 classes (ants, bees)" in printed
    (row,) = experiments(project)
    assert row["val_acc"] == row["eval.acc"]
    assert float(row["val_acc"]) >= least
