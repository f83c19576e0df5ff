"""The search for a learning rate, through its script."""

import json
import re
import shlex

import find_lr
from finetune import backbones, experiment, inference, layers, metrics, optim, params, training
from finetune.layers import Group
from helpers import ROOT, run, run_forked, write_params

import numpy as np
import pytest
import torch
from PIL import Image

SETTINGS = {
    "data__source": "pictures",
    "data__resize": 52,
    "data__image_size": 48,
    "model_name": "squeezenet",
    "backbone__weights": "mine.pth",
    "augment__normalize": "data",
    "optimizer__name": "adam",
    "batch_size": 4,
    "num_epochs": 3,
}
FEW = ("--steps", "50", "--low", "1e-5", "--high", "10")
ALL = ("-S", "backbone.trainable=all")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the stage prepare, with dark and bright pictures, and weights of SqueezeNet's that are random."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for name, number in {"train/dark": 6, "train/bright": 7, "val/dark": 3, "val/bright": 4}.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(number):
            pixels = rng.integers(0, 100, (52, 56, 3), dtype=np.uint8) + 150 * name.endswith("bright")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "pictures" / name / f"{index}.png")
    torch.manual_seed(0)
    (folder / "weights").mkdir()
    torch.save(backbones.build("squeezenet", 2, 48).state_dict(), folder / "weights/mine.pth")
    write_params(folder, **SETTINGS)
    run_forked(folder, "prepare")
    run_forked(folder, "backbone")
    return folder


def files(folder) -> dict[str, bytes]:
    """Return all files of a folder, but for what a fork prints to, and the feature bank's."""
    passing = ("printed.txt", "*.features")
    paths = [path for path in folder.rglob("*") if path.is_file() and not any(map(path.match, passing))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def find(folder, *arguments) -> tuple[dict, list[str]]:
    """Return what the script found with these arguments, and the words of the command that it printed."""
    said, command = run_forked(folder, "find_lr", *FEW, *arguments).splitlines()
    found = json.loads((folder / "results/find_lr.json").read_text())
    assert said == (
        f"steepest descent at {found['steepest']:.2g}, safer {found['safer']:.2g}: "
        "results/find_lr.png, results/find_lr.json"
    )
    return found, shlex.split(command)


@pytest.mark.slow
def test_it_prints_the_command_writes_two_files_and_leaves_the_rest_as_it_is(prepared, tmp_path):
    before = files(prepared)
    found, command = find(prepared)
    made = {f"results/find_lr.{kind}": (prepared / f"results/find_lr.{kind}").read_bytes() for kind in ("json", "png")}
    assert files(prepared) == before | made
    assert command == ["dvc", "exp", "run", "-S", f"lr={found['steepest']:.2g}"]
    assert found["group"] == "all"
    assert len(found["lr"]) == len(found["loss"]) == len(found["smoothed"]) <= 50
    assert 1e-5 <= found["safer"] < found["steepest"] <= 10
    with Image.open(prepared / "results/find_lr.png") as picture:
        assert picture.format == "PNG"
    result = run("find_lr.py", prepared, *FEW, XDG_CACHE_HOME=str(tmp_path))  # as a process of its own
    assert (result.returncode, result.stderr) == (0, "")
    assert files(prepared) == before | made  # to the bit


@pytest.mark.slow
def test_the_rate_of_the_backbone_and_the_settings_that_were_given_are_in_the_command(prepared):
    changes = ("-S", "backbone.trainable=[features.10, features.12]", "-S", "lr=0.01", *ALL[:1], "optimizer.name=nadam")
    scales = ("-S", "optimizer.backbone_lr_scale=0.2", "-S", "optimizer.layer_decay=0.5")
    found, command = find(prepared, *changes, *scales, "--group", "features.10")
    assert found["group"] == "features.10"
    # Its own rate is lr × backbone_lr_scale × layer_decay², two blocks before the last one.
    *given, last = command
    assert given == ["dvc", "exp", "run", *changes, "-S", "optimizer.layer_decay=0.5", "-S"]
    key, value = last.split("=")
    assert key == "optimizer.backbone_lr_scale"
    assert 0.01 * float(value) * 0.5**2 == pytest.approx(found["steepest"], rel=0.06)


@pytest.mark.slow
def test_after_some_epochs_it_is_of_what_has_thawed_by_then(prepared):
    thawing = (*ALL, "-S", "backbone.unfreeze_epoch=1", "-S", "schedule.name=plateau")
    found, command = find(prepared, *thawing, "--group", "backbone", "--epoch", "1")
    assert re.fullmatch(r"optimizer\.backbone_lr_scale=[\de.+-]+", command[-1])
    assert float(command[-1].split("=")[1]) == pytest.approx(found["steepest"] / 0.001, rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-S", "data.val_fraction=0.5"], "run `dvc repro prepare`"),
        (["--group", "backbone"], "-S backbone.trainable=all"),
        ([*ALL, "-S", "lr=1e30", "--epoch", "1", "--group", "head"], "the loss in epoch 1"),
        (["--low", "1e-9", "--high", "1e-8"], "does not fall at any of these rates"),
    ],
)
def test_what_can_be_mended_is_an_error_in_a_few_lines(prepared, arguments, words):
    before = files(prepared)
    printed = run_forked(prepared, "find_lr", "--steps", "20", *arguments, status=1)
    assert printed.startswith("error: ")
    assert words in printed
    assert len(printed.splitlines()) <= 3
    assert files(prepared) == before


@pytest.mark.slow
def test_without_prepared_pictures_it_says_how_to_get_them(tmp_path):
    write_params(tmp_path, **SETTINGS)
    before = files(tmp_path)
    printed = run_forked(tmp_path, "find_lr", status=1)
    assert printed == "error: data/prepared/manifest.json is missing: run `dvc repro prepare`.\n"
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--low", "0"], "--low must be above 0 and below --high"),
        (["--low", "1", "--high", "0.1"], "--low must be above 0 and below --high"),
        (["--high", "inf"], "--low must be above 0 and below --high"),
        (["--low", "nan"], "--low must be above 0 and below --high"),
        (["--steps", "19"], "--steps 20 or more"),
        (["--epoch", "-1"], "--epoch is -1: it must be 0 or more"),
        (["--epoch", "3"], "--epoch is 3: it must be 0 or more, and below num_epochs"),
        (["-S", "lr"], "Write it as -S lr=0.01"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_read(arguments, words, tmp_path, monkeypatch):
    write_params(tmp_path, **SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["find_lr.py", *arguments])
    with pytest.raises(find_lr.UserError) as error:
        find_lr.main()
    assert words in str(error.value)


def load(*changes: str) -> params.Params:
    return params.load(ROOT / "params.yaml", ["lr=0.01", "backbone.trainable=all", *changes])


@pytest.mark.parametrize(
    ("group", "others", "suggested"),
    [
        (Group("head", [], 0), False, {"lr": 0.05}),
        (Group("head", [], 0), True, {"lr": 0.05, "optimizer.backbone_lr_scale": 0.02}),  # what makes 0.001 of 0.05
        (Group("layer4", [], 0, 0.1), True, {"optimizer.backbone_lr_scale": 5.0}),
        (Group("layer2", [], 0, 0.1 * 0.5**2), True, {"optimizer.backbone_lr_scale": 20.0}),
    ],
)
def test_the_suggested_settings_give_the_group_that_rate_and_the_others_theirs(group, others, suggested):
    settings = load("optimizer.backbone_lr_scale=0.1", "optimizer.layer_decay=0.5")
    assert find_lr.suggested(settings, 0.05, group, others) == pytest.approx(suggested)


def test_a_command_can_be_pasted_and_names_a_setting_once():
    changes = ["lr=1", "backbone.trainable=[layer3, layer4]", "model_name=resnet18"]
    assert find_lr.command(changes, {"lr": 0.012345}) == (
        "dvc exp run -S 'backbone.trainable=[layer3, layer4]' -S model_name=resnet18 -S lr=0.012"
    )


class Store:
    """Six pictures of noise, of which two validate."""

    labels = np.array([0, 1, 0, 1, 0, 1])
    heights = widths = np.full(6, 40)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)

    def indices(self, split: str) -> np.ndarray:
        return np.arange(4) if split == "train" else np.array([4, 5])


@pytest.mark.parametrize("name", ["constant", "plateau", "one_cycle"])
def test_what_is_trained_before_is_what_the_run_trains_and_the_rates_are_whole_again(name):
    sizes = ("data.image_size=32", "data.resize=40", "batch_size=2", "num_epochs=3")
    settings = load(*sizes, f"schedule.name={name}", "schedule.patience=0", "optimizer.backbone_lr_scale=0.5")
    groups = [Group("head", ["3"], 0), Group("first", ["0"], 1, 0.5)]
    about = {"mean": [0.5] * 3, "std": [0.25] * 3}

    def begun() -> experiment.Experiment:
        torch.manual_seed(0)
        pool = torch.nn.AdaptiveAvgPool2d(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), pool, torch.nn.Flatten(), torch.nn.Linear(4, 2))
        return experiment.Experiment(settings, Store(), about, model, groups, training.Objective(2), None, None)

    this = begun()
    optimizer = find_lr.train_first(this, 2)
    assert optim.rates(optimizer) == {"head": 0.01, "first": 0.005}

    expected = begun()
    other = optim.optimizer(expected.model, groups, settings.optimizer, 0.01, settings.momentum)
    schedule = optim.LearningRate(other, settings.schedule, 3, 2)
    for epoch in range(2):
        layers.thaw(expected.model, groups, epoch)
        expected.model.train()
        for batch in training.training_batches(Store(), settings, epoch):
            training.step(expected.model, other, batch, expected.normalize, expected.objective)
            schedule.after_step()
        logits = inference.predict(
            expected.model, training.plain_batches(Store(), "val", 32, 16), lambda x: (x / 255 - 0.5) / 0.25
        )
        schedule.after_epoch(float(metrics.cross_entropy(logits, np.array([0, 1])).mean()))
    assert all(map(torch.equal, this.model.state_dict().values(), expected.model.state_dict().values()))
    assert not torch.equal(this.model[0].weight, begun().model[0].weight)
