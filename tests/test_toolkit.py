"""Each setting of the toolkit through the scripts: what it changes in what comes of a run."""

import csv
import json
import shutil
from pathlib import Path

import helpers
from finetune import augment, backbones, checkpoint, params
from finetune.digests import digest
from finetune.images import ImageStore
from helpers import ROOT, darken_bees, make_pictures, run_forked, write_params, write_weights

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TINY = helpers.TINY | {
    "backbone__weights": "mine.pth",
    "num_epochs": 1,
    "batch_size": 4,
    "lr": 0.01,
}
ALL = {"backbone__trainable": "all"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the stages prepare and backbone: 11 ants and 7 bees to train, 6 of each to validate."""
    folder = tmp_path_factory.mktemp("prepared")
    make_pictures(folder / "pictures", {"train/ants": 11, "train/bees": 7, "val/ants": 6, "val/bees": 6}, size=36)
    darken_bees(folder / "pictures", 2)
    write_weights(folder, "squeezenet", seed=0)
    write_params(folder, **TINY)
    run_forked(folder, "prepare")
    run_forked(folder, "backbone")
    return folder


@pytest.fixture
def folders(prepared, tmp_path):
    """Return a function that returns a new folder each time, before the stage train, for the settings given."""

    def copy(**settings) -> Path:
        folder = shutil.copytree(prepared, tmp_path / str(len(list(tmp_path.iterdir()))))
        write_params(folder, **TINY | settings)
        return folder

    return copy


@pytest.fixture
def trained(folders):
    """Return a function that trains with the settings given, and returns the folder and what was printed."""

    def train(**settings) -> tuple[Path, str]:
        folder = folders(**settings)
        return folder, run_forked(folder)

    return train


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    """The tensors of the model that the settings as they are end with, and its history."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("plain") / "folder")
    run_forked(folder)
    return load_file(folder / "models/model.safetensors"), history(folder)


def history(folder: Path) -> list[dict]:
    return checkpoint.load(folder / "models/checkpoint.pt")["history"]


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models/model.safetensors")


def trained_layers(folder: Path) -> set[str]:
    """Return the layers, the head apart, whose weights are no longer the pretrained ones."""
    start, end = load_file(folder / "models/backbone.safetensors"), model(folder)
    return {".".join(name.split(".")[:2]) for name, tensor in start.items() if not torch.equal(end[name], tensor)}


# What trains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainable", "layers"),
    [
        ("head", set()),
        (2, {"features.12", "features.11"}),
        ("features.10", {"features.10"}),
        (["features.3", "features.12.squeeze"], {"features.3", "features.12"}),
        ("all", {f"features.{number}" for number in (0, 3, 4, 6, 7, 9, 10, 11, 12)}),
    ],
)
def test_the_layers_that_are_trainable_train(trained, trainable, layers):
    folder, printed = trained(backbone__trainable=trainable)
    assert trained_layers(folder) == layers
    assert f"of {sum(tensor.numel() for tensor in model(folder).values()):,} parameters:" in printed
    assert ("frozen" in printed) == (trainable != "all")


def test_a_layer_that_there_is_not_is_an_error_before_any_picture_is_decoded(folders):
    folder = folders(backbone__trainable="feature.12")
    printed = run_forked(folder, "backbone", status=1)
    assert "error: params.yaml: backbone.trainable: the network has no layer 'feature.12'" in printed
    assert "Nearest: features.12" in printed


def test_the_head_trains_alone_before_the_rest_thaws(trained, plain):
    settings = ALL | {"num_epochs": 2, "backbone__unfreeze_epoch": 1, "optimizer__backbone_lr_scale": 0.1}
    folder, printed = trained(**settings)
    assert "from epoch 2" in printed
    _, first = plain
    row = history(folder)[0]
    assert [row[name] for name in ("loss", "val_loss")] == [first[0][name] for name in ("loss", "val_loss")]
    assert len(trained_layers(folder)) == 9
    rates = json.loads(json.dumps(history(folder)[1]["lr"]))
    assert (rates["head"], rates["features.0"]) == (0.01, pytest.approx(0.001))


def test_blocks_thaw_one_after_another_from_the_last(trained):
    settings = {"backbone__trainable": 3, "num_epochs": 2, "backbone__unfreeze_every": 1}
    folder, _ = trained(**settings)
    assert trained_layers(folder) == {"features.12", "features.11"}  # features.10 would be next


def test_rates_of_layers_are_logged_each_epoch(trained):
    folder, _ = trained(backbone__trainable=2, num_epochs=2, optimizer__layer_decay=0.5, schedule__name="cosine")
    curves = folder / "results/train/plots/metrics"
    for name, peak in {"lr": 0.01, "lr_of/features.12": 0.01, "lr_of/features.11": 0.005}.items():
        with open(curves / f"{name}.tsv", newline="") as file:
            rates = [float(row[name.rpartition("/")[2]]) for row in csv.DictReader(file, delimiter="\t")]
        assert rates == pytest.approx([peak, peak / 2])
    assert not {"lr", "lr_of"} & json.loads((folder / "results/train/metrics.json").read_text()).keys()


@pytest.mark.parametrize(("batch_norm", "moves"), [("frozen", False), ("train", True)])
def test_frozen_batch_norm_keeps_its_statistics_unless_told_otherwise(folders, batch_norm, moves):
    folder = folders(model_name="shufflenet_v2_x0_5", backbone__batch_norm=batch_norm, data__image_size=36)
    torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), folder / "weights/mine.pth")
    run_forked(folder, "backbone")
    run_forked(folder)
    assert torch.equal(model(folder)["conv1.1.running_mean"], torch.zeros(24)) != moves
    assert torch.equal(model(folder)["conv1.1.weight"], torch.ones(24))


def test_concat_pooling_is_trained_kept_and_evaluated(trained):
    folder, printed = trained(head__kind="concat_pool", head__hidden=16)
    tensors, about = backbones.read(folder / "models/model.safetensors")
    assert tensors["concat_pool.2.weight"].shape == (16, 1024)
    assert about["head"] == {"kind": "concat_pool", "hidden": 16, "dropout": 0.5}
    assert "training 18,514 of" in printed  # 2 x 1024, 1024 x 16 + 16, 2 x 16, 16 x 2 + 2
    printed = run_forked(folder, "evaluate")
    assert f"loss {history(folder)[-1]['val_loss']:.4f}" in printed


# Each of the others says something ------------------------------------------------------------------------------------

CONCAT = {"head__kind": "concat_pool", "head__hidden": 16}
CHANGES = [
    {"lr": 0.02},
    {"momentum": 0.9},
    {"seed": 1},
    {"batch_size": 6},
    {"data__balance": "loss"},
    {"data__balance": "sampler"},
    {"data__image_size": 36},
    CONCAT,
    CONCAT | {"head__hidden": 0},
    CONCAT | {"head__dropout": 0.2},
    ALL,
    ALL | {"optimizer__backbone_lr_scale": 0.1},
    ALL | {"optimizer__layer_decay": 0.5},
    {"optimizer__name": "adam", "optimizer__weight_decay": 0.1},
    {"optimizer__name": "adamw", "optimizer__weight_decay": 0.1},
    {"optimizer__name": "rmsprop"},
    {"optimizer__weight_decay": 0.1},
    {"optimizer__l1": 0.01},
    {"optimizer__label_smoothing": 0.1},
    {"optimizer__grad_clip": 0.1},
    {"schedule__warmup_epochs": 0.5},
    {"schedule__name": "cosine"},
    {"schedule__name": "sgdr"},
    {"schedule__name": "sgdr", "schedule__cycle_epochs": 3},
    {"schedule__name": "triangular"},
    {"schedule__name": "triangular", "schedule__low": 0.2},
    {"schedule__name": "one_cycle"},
    {"schedule__name": "one_cycle", "schedule__pct_start": 0.6},
    {"augment__crop": "random"},
    {"augment__crop": "center"},
    {"augment__min_scale": 0.9},
    {"augment__flip": 0.0},
    {"augment__rotation": 20.0},
    {"augment__color_jitter": 0.4},
    {"augment__rand_augment_ops": 2},
    {"augment__rand_augment_ops": 2, "augment__rand_augment_magnitude": 25},
    {"augment__mixup": 0.4},
    {"augment__normalize": "data"},
]


def test_no_two_of_these_settings_give_the_same_weights(folders, plain):
    """In one test, as they are compared with each other, too. In one folder: each of them is another run."""
    tensors, _ = plain
    seen = {digest(tensors): "the settings as they are"}
    folder = folders()
    for changes in CHANGES:
        write_params(folder, **TINY | changes)
        run_forked(folder)
        found = digest(model(folder))
        assert found not in seen, f"{changes} gives what {seen[found]} gives"
        seen[found] = changes


# Which epoch ----------------------------------------------------------------------------------------------------------


def test_the_best_epochs_weights_are_kept_and_evaluated(trained, folders):
    settings = {"num_epochs": 6, "lr": 0.1, "momentum": 0.9}  # wild
    folder, _ = trained(**settings, keep="best")
    rows = history(folder)
    best = max(rows, key=lambda row: (row["val_acc"], -row["val_loss"]))
    assert best["step"] < 5, "the best one must not be the last, or this tests nothing"
    assert json.loads((folder / "results/train/metrics.json").read_text())["best_step"] == best["step"]
    shorter, _ = trained(**settings | {"num_epochs": best["step"] + 1})
    last, _ = trained(**settings)
    assert all(torch.equal(tensor, model(shorter)[name]) for name, tensor in model(folder).items())
    assert not all(torch.equal(tensor, model(last)[name]) for name, tensor in model(folder).items())
    assert f"acc {best['val_acc']:.4f}" in run_forked(folder, "evaluate")


def test_a_run_that_gets_no_better_stops_early_and_is_finished(trained):
    settings = {"num_epochs": 9, "early_stopping__patience": 2, "early_stopping__min_delta": 10.0}
    folder, printed = trained(**settings)
    assert "stopped early: val_loss is not lower since 2 epochs" in printed
    assert [row["step"] for row in history(folder)] == [0, 1, 2]
    before = (folder / "models/model.safetensors").read_bytes()
    again = run_forked(folder)
    assert "this run is finished, nothing to train" in again
    assert "epoch 4/9" not in again
    assert (folder / "models/model.safetensors").read_bytes() == before
    (stored,) = (folder / ".dvc/tmp/checkpoints").glob("*/*.pt")
    assert stored.name == "00003-0000000.finished.pt"


# Evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head__kind": "concat_pool", "head__hidden": 16, "num_epochs": 2, "keep": "best"},
        {"backbone__trainable": 2},
    ],
)
def test_evaluation_has_the_features_that_training_kept_and_finds_the_same_without(trained, settings):
    folder, _ = trained(**settings)
    bank = folder / ".dvc/tmp/features"
    before = {file: file.stat().st_mtime_ns for file in bank.iterdir()}
    run_forked(folder, "evaluate")
    after = {file: file.stat().st_mtime_ns for file in bank.iterdir()}
    assert after.keys() == before.keys()  # nothing was computed,
    assert [after[file] > before[file] for file in before].count(True) == 1  # as the pictures of val were found
    predictions = (folder / "results/evaluate/predictions.csv").read_bytes()

    shutil.rmtree(bank)
    file = folder / "models/model.safetensors"
    tensors, about = backbones.read(file)
    assert about.pop("trained")
    backbones.write(file, tensors, {key: value for key, value in about.items() if key != "digest"})
    run_forked(folder, "evaluate")
    assert not bank.exists()
    assert (folder / "results/evaluate/predictions.csv").read_bytes() == predictions


def test_test_time_augmentation_is_the_mean_over_views(trained):
    folder, _ = trained()
    probabilities = {}
    for tta in ("none", "flip", "ten_crop"):
        write_params(folder, **TINY | {"evaluate__tta": tta})
        run_forked(folder, "evaluate")
        with open(folder / "results/evaluate/predictions.csv", newline="") as file:
            probabilities[tta] = np.array([float(row["p_ants"]) for row in csv.DictReader(file)])
    network = backbones.build("squeezenet1_1", 2, 32)
    network.load_state_dict(model(folder))
    store = ImageStore(folder / "data/prepared")
    indices = store.indices("val")
    pictures = [store[i] for i in indices]
    boxes = augment.five_crops(store.heights[indices], store.widths[indices], 32)
    views = [augment.crop_resize(pictures, boxes[:, crop], 32) for crop in range(5)]
    views = {
        "none": views[-1:],
        "flip": [views[-1], views[-1].flip(-1)],
        "ten_crop": views + [v.flip(-1) for v in views],
    }
    for tta, shown in views.items():
        with torch.no_grad():
            logits = [network(augment.normalize(v, backbones.IMAGENET_MEAN, backbones.IMAGENET_STD)) for v in shown]
        expected = torch.stack([each.softmax(1)[:, 0] for each in logits]).mean(0)
        np.testing.assert_allclose(probabilities[tta], expected.numpy(), atol=2e-6)
    assert not np.allclose(probabilities["none"], probabilities["flip"], atol=1e-6)


def test_the_models_file_has_the_mean_and_standard_deviation_that_it_was_trained_with(trained):
    folder, _ = trained(augment__normalize="data")
    _, about = backbones.read(folder / "models/model.safetensors")
    manifest = json.loads((folder / "data/prepared/manifest.json").read_text())
    assert (about["mean"], about["std"]) == (manifest["mean"], manifest["std"])


# By hand --------------------------------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart_and_nothing_written(folders):
    folder = folders(**ALL, lr=0.003, momentum=0.9, schedule__name="one_cycle")  # which would begin low
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "printed.txt"}
    printed = run_forked(folder, "overfit")
    assert "one batch of 4 pictures is learnt by heart" in printed
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "printed.txt"}
    assert after == before


def test_a_batch_that_is_not_learnt_says_what_to_look_at(folders):
    printed = run_forked(folders(), "overfit", "-S", "lr=1e-9", status=1)
    assert "error: 100 steps on one batch of 4 pictures, and acc is" in printed
    assert "Try another lr (now 1e-09)" in printed


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").iterdir()), ids=lambda path: path.name)
def test_a_recipe_is_what_dvc_exp_run_takes(recipe):
    words = recipe.read_text().split()
    assert set(words[::2]) == {"-S"}
    settings = params.load(ROOT / "params.yaml", words[1::2])
    assert settings != params.load(ROOT / "params.yaml")
