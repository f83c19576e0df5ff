"""`params.yaml`: what is accepted, and what the error says of the rest."""

import re
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
        ("device: auto", "device: all", "device", "all"),
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
        ("keep: last", "keep: first", ["keep = 'first'", "'last' or 'best'"]),
        ("folds: 0", "folds: 1", ["data.folds = 1 leaves nothing to train on"]),
        ("folds: 0", "folds: -1", ["data.folds = -1"]),
        ("fold: 0", "fold: 2", ["data.fold = 2 says nothing without folds"]),
        ("limit: 0", "limit: -1", ["data.limit = -1"]),
        ("balance: none", "balance: true", ["data.balance = True", "'none', 'loss' or 'sampler'"]),
        ("trainable: head", "trainable: 0", ["backbone.trainable = 0", "a number of last blocks"]),
        ("trainable: head", "trainable: true", ["backbone.trainable = True", "a number of last blocks"]),
        ("trainable: head", "trainable: [layer4, 3]", ["backbone.trainable = ['layer4', 3]", "a list of such"]),
        ("trainable: head", "trainable: []", ["backbone.trainable = []"]),
        ("unfreeze_epoch: 0", "unfreeze_epoch: 2", ["backbone.unfreeze_epoch = 2 is of pretrained layers"]),
        ("unfreeze_every: 0", "unfreeze_every: 2", ["backbone.unfreeze_every = 2 is of pretrained layers"]),
        ("batch_norm: frozen", "batch_norm: eval", ["backbone.batch_norm = 'eval'", "'frozen' or 'train'"]),
        ("kind: linear", "kind: mlp", ["head.kind = 'mlp'", "'linear' or 'concat_pool'"]),
        ("hidden: 512", "hidden: -1", ["head.hidden = -1"]),
        ("dropout: 0.5", "dropout: 1.0", ["head.dropout = 1.0", "less than 1"]),
        ("name: sgd", "name: lbfgs", ["optimizer.name = 'lbfgs'", "'adamw'"]),
        ("weight_decay: 0.0", "weight_decay: -1.0", ["optimizer.weight_decay = -1.0"]),
        ("l1: 0.0", "l1: x", ["optimizer.l1 = 'x'"]),
        ("backbone_lr_scale: 1.0", "backbone_lr_scale: 0.1", ["optimizer.backbone_lr_scale = 0.1 is of pretrained"]),
        ("backbone_lr_scale: 1.0", "backbone_lr_scale: 0", ["optimizer.backbone_lr_scale = 0", "greater than 0"]),
        ("layer_decay: 1.0", "layer_decay: 0.5", ["optimizer.layer_decay = 0.5 is of pretrained layers"]),
        ("layer_decay: 1.0", "layer_decay: 1.5", ["optimizer.layer_decay = 1.5"]),
        ("label_smoothing: 0.0", "label_smoothing: 1.0", ["optimizer.label_smoothing = 1.0"]),
        ("grad_clip: 0.0", "grad_clip: -1", ["optimizer.grad_clip = -1"]),
        ("warmup_epochs: 0.0", "warmup_epochs: 5", ["schedule.warmup_epochs = 5 never ends"]),
        ("warmup_epochs: 0.0", "warmup_epochs: -1", ["schedule.warmup_epochs = -1"]),
        ("cycle_epochs: 2", "cycle_epochs: 0", ["schedule.cycle_epochs = 0"]),
        ("cycle_mult: 1", "cycle_mult: 1.5", ["schedule.cycle_mult = 1.5", "integer"]),
        ("low: 0.04", "low: 1", ["schedule.low = 1", "less than 1"]),
        ("pct_start: 0.3", "pct_start: 0", ["schedule.pct_start = 0"]),
        ("crop: random_resized", "crop: centre", ["augment.crop = 'centre'", "'center'"]),
        ("flip: 0.5", "flip: 2", ["augment.flip = 2"]),
        ("rotation: 0.0", "rotation: 270", ["augment.rotation = 270"]),
        ("color_jitter: 0.0", "color_jitter: 1.1", ["augment.color_jitter = 1.1"]),
        ("rand_augment_ops: 0", "rand_augment_ops: 1.5", ["augment.rand_augment_ops = 1.5"]),
        ("rand_augment_magnitude: 9", "rand_augment_magnitude: 31", ["augment.rand_augment_magnitude = 31"]),
        ("mixup: 0.0", "mixup: -1", ["augment.mixup = -1"]),
        ("normalize: imagenet", "normalize: none", ["augment.normalize = 'none'", "'imagenet' or 'data'"]),
        ("min_delta: 0.0", "min_delta: -1", ["early_stopping.min_delta = -1"]),
        ("tta: none", "tta: five", ["evaluate.tta = 'five'", "'ten_crop'"]),
        ("gallery: 12", "gallery: -1", ["evaluate.gallery = -1"]),
        ("weights: imagenet", "weights: ../x.pth", ["backbone.weights = '../x.pth'", "weights/"]),
        ("image_size: 224", "image_size: 300", ["data.image_size = 300 is larger than data.resize = 256"]),
        ("val_fraction: 0.2", "val_fraction: 1.0", ["data.val_fraction = 1.0"]),
        ("max_skipped: 0.1", "max_skipped: 2", ["data.max_skipped = 2"]),
        ("min_scale: 0.25", "min_scale: 0", ["augment.min_scale = 0", "greater than 0"]),
        ("name: constant", "name: cosin", ["schedule.name = 'cosin'", "'cosine', 'sgdr'"]),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["backbone.trainable=all", "backbone.unfreeze_epoch=5"], "backbone.unfreeze_epoch = 5 never ends"),
        (["schedule.name=one_cycle", "schedule.warmup_epochs=1"], "one_cycle rises from schedule.low by itself"),
        (["augment.mixup=0.2", "batch_size=1"], "augment.mixup mixes the pictures of a batch"),
        (["data.folds=5", "data.fold=5"], "data.fold = 5 is none of 5"),
        (["lr"], "-S lr: it has no ="),
        (["dta.limit=3"], "-S dta.limit=3: there is no group dta"),
        (["lr=[1"], "-S lr=[1: while parsing a flow sequence"),
        (["rl=1"], "unknown key rl"),
    ],
)
def test_changes_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        params.load(DEFAULTS, changes)


def test_changes_are_made_to_the_settings_and_not_to_the_file():
    before = DEFAULTS.read_bytes()
    settings = params.load(DEFAULTS, ["lr=0.5", "data.limit=20", "backbone.trainable=[layer3, layer4]"])
    assert (settings.lr, settings.data.limit, settings.backbone.trainable) == (0.5, 20, ["layer3", "layer4"])
    assert DEFAULTS.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["optimizer.name=adamw"], "momentum"),
        (["augment.crop=center"], "augment.min_scale"),
        ([], "augment.rand_augment_magnitude"),
        ([], "head.hidden"),
        ([], "head.dropout"),
        ([], "early_stopping"),
        ([], "schedule.gamma"),
        (["schedule.name=exp_range"], "schedule.cycle_mult"),
    ],
)
def test_a_setting_that_has_no_say_is_not_used(changes, key):
    values = params.load(DEFAULTS, changes).used()
    for part in key.split("."):
        assert isinstance(values, dict)
        values = values.get(part)
    assert values is None


@pytest.mark.parametrize("text", ["", "3", "- lr"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="should hold `key: value` lines"):
        params.load(tmp_path / "params.yaml")


def test_a_missing_file_is_an_error_that_says_where_to_run(tmp_path):
    with pytest.raises(UserError, match="top folder"):
        params.load(tmp_path / "params.yaml")
