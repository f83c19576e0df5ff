"""Stages backbone, train and evaluate, through their scripts, on tiny pictures of noise."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import train
from finetune import augment, backbones, checkpoint, dropout
from finetune.images import ImageStore
from helpers import ROOT, make_pictures, run_forked, write_params

import pytest
import torch
import torchvision
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TINY = helpers.TINY | {
    "backbone__weights": "none",
    "num_epochs": 2,
}
PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}  # refuses: no network


def stage(script: str, folder: Path, status: int = 0, **variables: str) -> str:
    """Run a script with an empty cache unless told otherwise; return what it printed."""
    variables = {"XDG_CACHE_HOME": str(folder / "cache")} | variables
    return run_forked(folder, script.removesuffix(".py"), status=status, **variables)


def refused(script: str, folder: Path, **variables: str) -> str:
    """Return the error of a script that must fail, in a few lines and without a traceback."""
    printed = stage(script, folder, status=1, **variables)
    assert "Traceback" not in printed
    message = printed[printed.index("error: ") :]
    assert len(message.splitlines()) <= 3
    return message


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the stages prepare and backbone."""
    folder = tmp_path_factory.mktemp("prepared")
    make_pictures(folder / "pictures", {"train/ants": 6, "train/bees": 7, "val/ants": 3, "val/bees": 4, "test/ants": 2,
                                        "test/bees": 3}, size=36)  # fmt: skip
    write_params(folder, **TINY)
    stage("prepare.py", folder)
    stage("backbone.py", folder)
    return folder


@pytest.fixture(scope="module")
def trained(prepared):
    """The folder after train and evaluate, too, and what they printed."""
    return prepared, stage("train.py", prepared) + stage("evaluate.py", prepared)


@pytest.fixture
def fresh(prepared, tmp_path):
    """A copy of the folder before training."""
    return shutil.copytree(
        prepared, tmp_path / "fresh", ignore=shutil.ignore_patterns("results", "checkpoint.pt", "model.safetensors")
    )


def test_every_epoch_is_logged(trained):
    folder, printed = trained
    assert "training 723,522 of 723,522 parameters" in printed
    assert "epoch 2/2: loss" in printed
    latest = json.loads((folder / "results/train/metrics.json").read_text())
    assert set(latest) == {"step", "acc", "loss", "training_time", "val_acc", "val_loss"}
    assert latest["step"] == 1
    for name in ("acc", "loss", "training_time", "val_acc", "val_loss", "lr"):
        with open(folder / f"results/train/plots/metrics/{name}.tsv", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert [row["step"] for row in rows] == ["0", "1"]
        assert float(rows[-1][name]) == pytest.approx(latest.get(name, 0.001))


@pytest.mark.parametrize(
    ("times", "epochs", "words"),
    [
        ([10.0], 5, ", about 0:00:40 left"),
        ([10.0, 1810.0], 4, ", about 1:00:00 left"),
        ([10.0, 10.4], 5, ""),
        ([10.0, 20.0], 2, ""),
    ],
)
def test_an_epochs_line_says_how_long_the_others_take(times, epochs, words):
    assert train.time_left([{"training_time": each} for each in times], epochs) == words


def test_the_checkpoint_has_what_training_on_needs(trained):
    folder, _ = trained
    state = checkpoint.load(folder / "models/checkpoint.pt")
    model = load_file(folder / "models/model.safetensors")
    assert [row["step"] for row in state["history"]] == [0, 1]
    assert state["model"].keys() == model.keys()
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in model.items())
    assert len(state["optimizer"]["state"]) == len(model)


def test_the_model_file_says_what_a_prediction_needs(trained):
    folder, _ = trained
    _, about = backbones.read(folder / "models/model.safetensors")
    assert (about["model_name"], about["classes"]) == ("squeezenet1_1", ["ants", "bees"])
    assert (about["image_size"], about["resize"], about["mean"][0]) == (32, 36, 0.485)
    assert about["precision"] == "fp32"


def test_evaluation_agrees_with_training_and_with_the_predictions(trained):
    folder, _ = trained
    results = json.loads((folder / "results/evaluate/metrics.json").read_text())
    latest = json.loads((folder / "results/train/metrics.json").read_text())
    assert set(results) == {"eval", "test"}
    assert set(results["eval"]) == {"acc", "loss", "balanced_acc", "f1", "auroc", "ece"}
    assert results["eval"]["acc"] == latest["val_acc"]
    assert results["eval"]["loss"] == pytest.approx(latest["val_loss"], abs=1e-6)

    with open(folder / "results/evaluate/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["val"] * 7 + ["test"] * 5
    assert rows[0].keys() == {"split", "path", "label", "prediction", "p_ants", "p_bees", "loss"}
    assert all((folder / "pictures" / row["path"]).exists() and row["label"] in row["path"] for row in rows)
    val = rows[:7]
    assert sum(row["label"] == row["prediction"] for row in val) / 7 == results["eval"]["acc"]
    assert sum(float(row["loss"]) for row in val) / 7 == pytest.approx(results["eval"]["loss"], abs=1e-5)

    for name, columns in (
        ("confusion", "actual,predicted"),
        ("roc", "fpr,tpr"),
        ("precision_recall", "recall,precision"),
    ):
        lines = (folder / f"results/evaluate/plots/{name}.csv").read_text().splitlines()
        assert lines[0] == columns
        assert len(lines) > 2


def history(folder):
    rows = checkpoint.load(folder / "models/checkpoint.pt")["history"]
    return [{name: value for name, value in row.items() if name != "training_time"} for row in rows]


def test_two_runs_of_one_seed_are_equal_to_the_bit_and_another_seed_is_not(trained, fresh):
    folder, _ = trained
    stage("train.py", fresh)
    assert (fresh / "models/model.safetensors").read_bytes() == (folder / "models/model.safetensors").read_bytes()
    assert history(fresh) == history(folder)
    write_params(fresh, **TINY, seed=1)
    stage("train.py", fresh)
    assert (fresh / "models/model.safetensors").read_bytes() != (folder / "models/model.safetensors").read_bytes()


def test_training_equals_a_loop_written_out(trained):
    folder, _ = trained
    store = ImageStore(folder / "data/prepared")
    indices = store.indices("train")
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=2)
    model.classifier[2] = torch.nn.Identity()
    dropout.replace(model)  # of other masks than torch's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.09)
    for epoch in range(2):
        draws = augment.generator(0, epoch, augment.AUGMENTATION).random((len(indices), 4 * augment.ATTEMPTS + 1))
        boxes = augment.random_resized_crops(draws[:, :-1], store.heights[indices], store.widths[indices], 0.25)
        model.train()
        order = augment.epoch_order(0, epoch, 13)
        for part, dropout_seed in zip((order[:8], order[8:]), augment.dropout_seeds(0, epoch, 2), strict=True):
            pictures = augment.crop_resize([store[indices[i]] for i in part], boxes[part], 32)
            pictures = augment.horizontal_flip(pictures, draws[part, -1], 0.5)
            pictures = augment.normalize(pictures, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            torch.manual_seed(dropout_seed)
            loss = torch.nn.functional.cross_entropy(model(pictures), torch.from_numpy(store.labels[indices[part]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = load_file(folder / "models/model.safetensors")
    start = torchvision.models.squeezenet1_1(num_classes=2).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-6)
        assert result[name].shape == start[name].shape


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_pretrained_layers_are_frozen_or_fine_tuned_and_layers_without_weights_always_train(fresh, trainable):
    state = torchvision.models.squeezenet1_1(num_classes=10).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("features.12")}
    (fresh / "weights").mkdir()
    torch.save(state, fresh / "weights/mine.pth")
    settings = TINY | {"backbone__weights": "mine.pth", "backbone__trainable": trainable, "num_epochs": 1, "lr": 0.1}
    write_params(fresh, **settings)
    printed = stage("backbone.py", fresh)
    assert "3 layers have none and will train: features.12.squeeze, features.12.expand1x1" in printed
    tensors, _ = backbones.read(fresh / "models/backbone.safetensors")
    assert tensors.keys() == {name for name in state if not name.startswith("classifier")}
    stage("train.py", fresh)
    model = load_file(fresh / "models/model.safetensors")
    unchanged = {name for name, tensor in tensors.items() if torch.equal(model[name], tensor)}
    assert unchanged == (tensors.keys() if trainable == "head" else set())


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(fresh):
    write_params(fresh, **TINY | {"lr": 1e30})
    message = refused("train.py", fresh)
    assert "the loss in epoch 1, step 2 became NaN" in message or "the loss in epoch 1, step 1 became NaN" in message
    assert "smaller lr (now 1e+30)" in message
    assert not (fresh / "models/model.safetensors").exists()


def test_num_classes_must_fit_the_store(fresh):
    write_params(fresh, **TINY | {"num_classes": 3})
    assert "set it with -S num_classes=2" in refused("train.py", fresh)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_not_there(fresh):
    write_params(fresh, **TINY | {"device": "cuda"})
    assert "device = 'cuda', but torch finds no CUDA device here. Set it to auto or cpu" in refused("train.py", fresh)


def test_an_unknown_model_names_the_nearest(fresh):
    write_params(fresh, **TINY | {"model_name": "alexnett"})
    assert "Nearest: alexnet" in refused("backbone.py", fresh)


def test_without_network_and_weights_the_error_names_both_ways_out(fresh):
    write_params(fresh, **TINY | {"backbone__weights": "imagenet"})
    message = refused("backbone.py", fresh, TORCH_HOME=str(fresh / "torch"), **PROXY)
    assert "WEIGHTS_DIR=<folder with squeezenet1_1-b8a52dc0.pth or squeezenet1_1.pth>" in message
    assert "-S backbone.weights=none" in message


def test_weights_dir_is_looked_in_first(fresh, tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet1_1.pth")
    write_params(fresh, **TINY | {"backbone__weights": "imagenet"})
    printed = stage("backbone.py", fresh, WEIGHTS_DIR="..", **PROXY)  # relative to where the user stands
    assert "722,496 pretrained parameters from squeezenet1_1.pth" in printed


def test_the_same_weights_are_the_same_bytes_wherever_they_were_found(fresh, tmp_path):
    state = torchvision.models.squeezenet1_1().state_dict()
    written = []
    for name, weights in (("squeezenet1_1.pth", "imagenet"), ("mine.pth", "mine.pth")):
        torch.save(state, tmp_path / name)
        (fresh / "weights").mkdir(exist_ok=True)
        torch.save({"state_dict": state}, fresh / "weights/mine.pth")
        write_params(fresh, **TINY | {"backbone__weights": weights})
        stage("backbone.py", fresh, WEIGHTS_DIR="..", **PROXY)
        written.append((fresh / "models/backbone.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_file_that_is_no_state_dict_is_refused(fresh):
    (fresh / "weights").mkdir()
    write_params(fresh, **TINY | {"backbone__weights": "mine.pth"})
    for content, words in ((torch.zeros(3), "holds no state dict"), ({}, "none of the weights' tensors")):
        torch.save(content, fresh / "weights/mine.pth")
        assert words in refused("backbone.py", fresh)


def test_files_of_dvcs_cache_are_not_written_through(trained):
    folder, _ = trained
    names = ("results/evaluate/predictions.csv", "results/evaluate/metrics.json", "models/model.safetensors")
    linked = {name: folder / f"linked-{Path(name).name}" for name in names}
    for name, link in linked.items():
        link.hardlink_to(folder / name)
    before = {name: link.read_bytes() for name, link in linked.items()}
    shutil.copytree(folder, folder.parent / "seed1", copy_function=lambda a, b: Path(b).hardlink_to(a))
    write_params(folder.parent / "seed1", **TINY, seed=1)
    stage("train.py", folder.parent / "seed1")
    stage("evaluate.py", folder.parent / "seed1")
    assert {name: link.read_bytes() for name, link in linked.items()} == before
    assert (folder.parent / "seed1/models/model.safetensors").read_bytes() != before["models/model.safetensors"]


def test_weights_that_lack_say_where_to_put_them(fresh):
    write_params(fresh, **TINY | {"backbone__weights": "mine.pth"})
    assert "weights/mine.pth is missing" in refused("backbone.py", fresh)


def test_an_unknown_setting_stops_every_stage(fresh):
    params = fresh / "params.yaml"
    params.write_text(params.read_text() + "learning_rate: 0.1\n")
    for script in ("prepare.py", "backbone.py", "train.py", "evaluate.py"):
        assert "unknown key learning_rate" in refused(script, fresh)


def test_a_python_without_the_environment_says_so():
    result = subprocess.run([sys.executable, "-S", ROOT / "src/train.py"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "the environment is not on PATH" in result.stderr
    assert ". .venv/bin/activate" in result.stderr
    assert "Traceback" not in result.stderr
