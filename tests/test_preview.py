"""The sheet of training pictures, through its script, and that it shows what training gets."""

import preview
from finetune import augment, params, training
from helpers import ROOT, make_pictures, run, run_forked, write_params

import numpy as np
import pytest
import torch
from PIL import Image

SIZE = 32  # px
SIDE = preview.TILE // SIZE * SIZE  # px, of such a picture's tile
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = {
    "data__source": "pictures",
    "data__resize": 36,
    "data__image_size": SIZE,
    "backbone__weights": "none",
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the stage prepare."""
    folder = tmp_path_factory.mktemp("prepared")
    make_pictures(folder / "pictures", {"train/ants": 6, "train/bees": 7, "val/ants": 3, "val/bees": 4}, size=36)
    write_params(folder, **SETTINGS)
    run_forked(folder, "prepare")
    return folder


def files(folder) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "printed.txt"}


def sheet(folder, *arguments) -> np.ndarray:
    """Return the pixels of the sheet that the script makes with these arguments."""
    run_forked(folder, "preview", "--output", "sheet.png", *arguments)
    with Image.open(folder / "sheet.png") as picture:
        return np.asarray(picture)


def column(pixels: np.ndarray, number: int) -> np.ndarray:
    """Return the tiles of a column of the sheet, below the lines of text."""
    left = preview.MARGIN + number * (SIDE + preview.GAP)
    return pixels[150:, left : left + SIDE]


@pytest.fixture(scope="module")
def plain(prepared):
    """The sheet as params.yaml has it."""
    return sheet(prepared)


@pytest.mark.slow
def test_the_sheet_is_all_that_is_written_and_the_same_each_time(prepared):
    before = files(prepared)
    result = run("preview.py", prepared, "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert "results/preview.png: 4 pictures; crop random_resized" in result.stdout
    made = (prepared / "results/preview.png").read_bytes()
    assert files(prepared) == before | {"results/preview.png": made}
    with Image.open(prepared / "results/preview.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 2 * preview.MARGIN + 4 * SIDE + 3 * preview.GAP
        assert picture.height > 4 * SIDE
    run_forked(prepared, "preview", "--epochs", "3")
    assert files(prepared) == before | {"results/preview.png": made}


@pytest.mark.slow
def test_another_augmentation_changes_the_epochs_and_not_what_evaluation_sees(prepared, plain):
    rotated = sheet(prepared, "-S", "augment.rotation=30")
    assert np.array_equal(column(plain, 0), column(rotated, 0))
    for number in range(1, 5):
        assert not np.array_equal(column(plain, number), column(rotated, number))
        assert not np.array_equal(column(plain, number), column(plain, number - 1))


@pytest.mark.slow
def test_more_pictures_make_more_rows_and_more_epochs_more_columns(prepared, plain):
    other = sheet(prepared, "--pictures", "3", "--epochs", "5")
    assert other.shape[1] - plain.shape[1] == SIDE + preview.GAP
    assert other.shape[0] - plain.shape[0] == 2 * (SIDE + preview.LINE + preview.GAP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [("augment.rotate=30", "Nearest: augment.rotation"), ("data.val_fraction=0.5", "dvc repro prepare")],
)
def test_a_wrong_setting_is_an_error_in_a_few_lines(prepared, change, words):
    before = files(prepared)
    printed = run_forked(prepared, "preview", "-S", change, status=1)
    assert words in printed
    assert len(printed.splitlines()) <= 3
    assert "Traceback" not in printed
    assert files(prepared) == before


class Store:
    """Pictures of noise of three classes, as an ImageStore has them: nine train, one validates."""

    def __init__(self, classes: int = 3):
        rng = np.random.default_rng(0)
        self.classes = [f"class {i}" for i in range(classes)]
        self.labels = np.sort(np.arange(3 * classes + 1) % classes)
        self.heights, self.widths = np.full(len(self.labels), 40), np.arange(40, 40 + len(self.labels))
        self.pictures = [rng.integers(0, 256, (40, width, 3), dtype=np.uint8) for width in self.widths]
        self.paths = [f"train/class {label}/{i}.jpg" for i, label in enumerate(self.labels)]
        self.manifest = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pictures[index]

    def indices(self, split: str) -> np.ndarray:
        return np.arange(1, len(self.labels)) if split == "train" else np.array([0])


def load(*changes: str) -> params.Params:
    return params.load(ROOT / "params.yaml", ["data.image_size=32", "data.resize=40", "batch_size=4", *changes])


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["augment.crop=random", "augment.rotation=20", "augment.color_jitter=0.4", "augment.rand_augment_ops=2"],
        ["augment.mixup=0.4"],
        ["augment.mixup=0.4", "data.balance=sampler"],
    ],
)
def test_the_views_are_what_training_gets(changes):
    store, settings = Store(), load(*changes)
    positions = list(range(len(store.indices("train"))))
    for epoch in range(2):
        order = training.epoch_order(settings.seed, epoch, store.labels[1:], settings.data.balance == "sampler")
        expected = {}
        batches = training.training_batches(store, settings, epoch)
        inputs = []
        for batch in batches:
            pixels = augment.normalize(batch.inputs, MEAN, STD)
            if batch.mixup is not None:
                pixels, _ = augment.mixup(pixels, torch.eye(len(pixels)), batch.mixup)
            inputs.extend(pixels)
        for position, pixels in zip(order.tolist(), inputs, strict=True):
            expected.setdefault(position, pixels)
        views = list(preview.epoch_views(store, settings, epoch, positions, MEAN, STD))
        assert {i for i, view in enumerate(views) if view} == expected.keys()
        for position, pixels in expected.items():
            assert torch.equal(views[position].pixels, pixels)
            assert bool(views[position].note) == (settings.augment.mixup > 0)


def test_the_note_names_what_mixup_adds_and_its_share():
    store, settings = Store(), load("augment.mixup=0.4")
    order = augment.epoch_order(0, 0, 9)
    weights = augment.epoch_draws(0, 0, 9, settings.augment)["mixup"]
    (view,) = preview.epoch_views(store, settings, 0, [order[2]], MEAN, STD)
    other = store.paths[1 + order[1]].removeprefix("train/")
    assert view.note == f"+ {1 - weights[order[2]]:.0%} {other}"


def test_of_many_classes_some_are_shown():
    assert preview.chosen(Store(2), None) == [0, 1, 3, 4]  # the first picture of class 0 validates
    assert preview.chosen(Store(3), 2) == [0, 1, 3, 4, 6, 7]
    assert len(preview.chosen(Store(12), None)) == preview.MOST_CLASSES


def test_pictures_are_normalised_as_the_settings_say():
    store = Store()
    assert preview.normalization(load("augment.normalize=data"), store) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert preview.normalization(load(), store) == (MEAN, STD)


def test_a_line_says_what_is_switched_on():
    plain = load("augment.flip=0", "augment.crop=center").augment
    assert preview.described(plain) == "crop center"
    busy = load("augment.rotation=20", "augment.rand_augment_ops=2", "augment.mixup=0.2").augment
    assert preview.described(busy) == (
        "crop random_resized (0.25 to 1 of the area), flip 0.5, rotation ±20°, RandAugment 2 of magnitude 9, mixup 0.2"
    )


def test_a_tile_shows_the_pixels():
    pixels = torch.rand(3, SIZE, SIZE)
    tile = preview.tile(pixels, 3 * SIZE + 5)
    assert tile.size == (3 * SIZE, 3 * SIZE)
    shown = torch.from_numpy(np.array(tile)).permute(2, 0, 1)
    assert torch.equal(shown[:, 1::3, 1::3], (pixels * 255).round().to(torch.uint8))
    assert preview.tile(pixels, 20).size == (20, 20)
