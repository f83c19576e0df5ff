"""`params.yaml`: what is accepted, and what the error says of the rest."""

from pathlib import Path

from finetune import params
from finetune.errors import UserError

import pytest
from ruamel.yaml import YAML

DEFAULTS = Path(__file__).parent.parent / "params.yaml"


def changed(folder: Path, old: str, new: str) -> Path:
    """Return a copy of params.yaml in which `old` was replaced."""
    text = DEFAULTS.read_text()
    assert old in text
    path = folder / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_defaults_are_those_of_the_walkthrough():
    settings = params.load(DEFAULTS)
    assert (settings.model_name, settings.num_classes, settings.batch_size) == ("alexnet", 2, 8)
    assert (settings.num_epochs, settings.lr, settings.momentum) == (5, 0.001, 0.09)


def test_every_setting_is_one_line_with_a_comment():
    lines = DEFAULTS.read_text().splitlines()
    settings = [line for line in lines if line.strip() and not line.startswith("#") and not line.endswith(":")]
    assert all(" # " in line for line in settings)
    assert len(settings) == sum(
        len(value) if isinstance(value, dict) else 1 for value in YAML(typ="safe").load(DEFAULTS).values()
    )


@pytest.mark.parametrize(
    ("old", "new", "field", "value"),
    [
        ("lr: 0.001", "lr: 1", "lr", 1.0),
        ("lr: 0.001", "lr: 1e-3", "lr", 0.001),
        ("device: auto", "device: cuda:1", "device", "cuda:1"),
        ("momentum: 0.09", "momentum: 0", "momentum", 0.0),
    ],
)
def test_accepted(tmp_path, old, new, field, value):
    assert getattr(params.load(changed(tmp_path, old, new)), field) == value


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr: 0.001", "lr: abc", ["lr = 'abc'", "number"]),
        ("lr: 0.001", "lr: 0", ["lr = 0", "greater than 0"]),
        ("lr: 0.001", "lr: .nan", ["lr = nan", "finite"]),
        ("lr: 0.001", "lr: '0.1'", ["lr = '0.1'"]),
        ("momentum: 0.09", "momentum: 1.0", ["momentum = 1.0", "less than 1"]),
        ("momentum: 0.09", "momentun: 0.09", ["unknown key momentun", "Nearest: momentum", "momentum is missing"]),
        ("  resize: 256", "  rezise: 256", ["unknown key data.rezise", "Nearest: data.resize"]),
        ("model_name:", "image_size: 224\nmodel_name:", ["unknown key image_size", "Nearest: data.image_size"]),
        ("batch_size: 8", "batch_size: 8.5", ["batch_size = 8.5", "integer"]),
        ("num_epochs: 5", "num_epochs: true", ["num_epochs = True", "integer"]),
        ("num_classes: 2", "num_classes: 1", ["num_classes = 1", "greater than or equal to 2"]),
        ("seed: 0", "seed: -1", ["seed = -1"]),
        ("device: auto", "device: gpu", ["device = 'gpu'", "auto, cpu, cuda or cuda:N"]),
        ("trainable: head", "trainable: heads", ["backbone.trainable = 'heads'", "'head' or 'all'"]),
        ("weights: imagenet", "weights: ../x.pth", ["backbone.weights = '../x.pth'", "weights/"]),
        ("image_size: 224", "image_size: 300", ["data.image_size = 300 is larger than data.resize = 256"]),
        ("val_fraction: 0.2", "val_fraction: 1.0", ["data.val_fraction = 1.0"]),
        ("max_skipped: 0.1", "max_skipped: 2", ["data.max_skipped = 2"]),
        ("min_scale: 0.25", "min_scale: 0", ["augment.min_scale = 0", "greater than 0"]),
        ("name: constant", "name: cosin", ["schedule.name = 'cosin'", "'constant', 'step', 'plateau' or 'cosine'"]),
        ("gamma: 0.1", "gamma: 1.0", ["schedule.gamma = 1.0", "less than 1"]),
        ("step_epochs: 7", "step_epochs: 0", ["schedule.step_epochs = 0"]),
        ("patience: 3", "patience: -1", ["schedule.patience = -1"]),
        ("resume: auto", "resume: ''", ["resume = ''"]),
        ("checkpoint_minutes: 5", "checkpoint_minutes: -1", ["checkpoint_minutes = -1"]),
        ("checkpoint_store_gb: 10", "checkpoint_store_gb: ten", ["checkpoint_store_gb = 'ten'", "number"]),
        ("split_seed: 0", "split_seed: a", ["data.split_seed = 'a'"]),
        ("data:", "data: 3\nrest:", ["data = 3", "unknown key rest"]),
        ("lr: 0.001", "lr: 0.001\nlr: 0.002", ["not valid YAML", "duplicate key"]),
        ("lr: 0.001", "lr 0.001", ["not valid YAML"]),
    ],
)
def test_refused(tmp_path, old, new, words):
    with pytest.raises(UserError) as error:
        params.load(changed(tmp_path, old, new))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("text", ["", "3", "- lr"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="should hold `key: value` lines"):
        params.load(tmp_path / "params.yaml")


def test_a_missing_file_is_an_error_that_says_where_to_run(tmp_path):
    with pytest.raises(UserError, match="top folder"):
        params.load(tmp_path / "params.yaml")
