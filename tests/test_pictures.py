"""The pictures that the stage evaluate draws, through its script; what is on them, and what Grad-CAM points at."""

import csv
import functools

import helpers
from finetune import augment, backbones, charts, gallery, gradcam, params, pictures, training
from finetune.canvas import BLUE, INK, PAPER, TILE, font, shortened
from finetune.classifier import Classifier
from finetune.images import ImageStore
from helpers import make_pictures, run_forked, write_params

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer

SETTINGS = helpers.TINY | {"backbone__weights": "none", "num_epochs": 1, "lr": 0.05}
NUMBER = 5  # pictures in a gallery
CHARTS = ("calibration", "confusion", "precision_recall", "roc")
GALLERIES = ("highest_loss", "random")
SIZE = 32  # px
SIDE = TILE // SIZE * SIZE  # px, of such a picture's tile


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder after the stage train."""
    folder = tmp_path_factory.mktemp("trained")
    make_pictures(folder / "pictures", {"train/ants": 4, "train/bees": 4, "val/ants": 5, "val/bees": 6}, size=36)
    write_params(folder, **SETTINGS)
    for script in ("prepare", "backbone", "train"):
        run_forked(folder, script)
    return folder


def evaluated(folder, gallery=NUMBER, **settings) -> tuple[dict[str, bytes], str]:
    """Return the files that the stage evaluate draws with these settings, and what it prints."""
    write_params(folder, **SETTINGS | {"evaluate__gallery": gallery} | settings)
    printed = run_forked(folder, "evaluate")
    return {file.stem: file.read_bytes() for file in (folder / "results/evaluate/pictures").iterdir()}, printed


def pixels_of(folder, name: str) -> np.ndarray:
    with Image.open(folder / f"results/evaluate/pictures/{name}.png") as picture:
        assert picture.format == "PNG"
        assert not picture.info  # no date, no version of a program
        return np.asarray(picture)


def shown(folder, name: str, number: int = NUMBER) -> list[str]:
    """Return the paths of the pictures that are on a gallery, in order, by their pixels."""
    store = ImageStore(folder / "data/prepared")
    known = {training.cropped([store[i]], SIZE)[0].numpy().tobytes(): store.paths[i] for i in range(len(store))}
    sheet, paths = pixels_of(folder, name), []
    for place in range(number):
        left = gallery.MARGIN + place % 3 * (2 * SIDE + 2 + gallery.GAP)
        top = gallery.HEAD + place // 3 * (SIDE + 3 * gallery.LINE + gallery.GAP)
        tile = sheet[top : top + SIDE, left : left + SIDE]
        paths.append(known[tile[:: SIDE // SIZE, :: SIDE // SIZE].transpose(2, 0, 1).tobytes()])
    return paths


def rows_of(folder) -> list[dict[str, str]]:
    with open(folder / "results/evaluate/predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


# Through the script ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pictures_are_charts_and_galleries_and_the_same_each_time(trained):
    first, printed = evaluated(trained)
    assert first.keys() == {*CHARTS, *GALLERIES}
    assert "Grad-CAM" not in printed
    for name in CHARTS:
        height, width, _ = pixels_of(trained, name).shape
        assert 500 < height < 640
        assert 480 < width < 640
    for name in GALLERIES:
        across = 2 * gallery.MARGIN + 3 * (2 * SIDE + 2) + 2 * gallery.GAP
        assert pixels_of(trained, name).shape[1] == across
    (trained / "results/evaluate/pictures/old.png").touch()
    assert evaluated(trained)[0] == first


@pytest.mark.slow
def test_the_highest_losses_are_shown_in_order(trained):
    evaluated(trained)
    by_loss = sorted(rows_of(trained), key=lambda row: -float(row["loss"]))
    assert shown(trained, "highest_loss") == [row["path"] for row in by_loss[:NUMBER]]


@pytest.mark.slow
def test_the_random_ones_follow_from_the_seed_and_more_begin_with_fewer(trained):
    evaluated(trained)
    drawn, of_val = shown(trained, "random"), [row["path"] for row in rows_of(trained)]
    assert len(set(drawn)) == NUMBER
    assert set(drawn) < set(of_val)
    evaluated(trained, evaluate__tta="flip")
    assert shown(trained, "random") == drawn
    evaluated(trained, gallery=30)
    assert shown(trained, "random", 11)[:NUMBER] == drawn
    assert sorted(shown(trained, "random", 11)) == of_val  # all that there are
    evaluated(trained, seed=1)
    assert shown(trained, "random") != drawn


@pytest.mark.slow
def test_a_gallery_of_none_draws_nothing_and_leaves_an_empty_folder(trained):
    expected = evaluated(trained)[0]
    assert evaluated(trained, gallery=0)[0] == {}
    assert evaluated(trained)[0] == expected


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit(trained):
    expected = evaluated(trained, gallery=9)[0]
    run_forked(trained, "evaluate", OMP_NUM_THREADS="1")
    files = (trained / "results/evaluate/pictures").iterdir()
    assert {file.stem: file.read_bytes() for file in files} == expected


# What is chosen, and what decided -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "number", "expected"),
    [([0.1, 3.0, 0.2, 2.0], 2, [1, 3]), ([1.0, 1.0, 2.0, 1.0], 3, [2, 0, 1]), ([0.5, 0.7], 9, [1, 0])],
)
def test_the_highest_losses(losses, number, expected):
    assert gallery.highest_loss(np.array(losses), number) == expected


def corners() -> nn.Module:
    """Return a network whose first class is how red a picture is, the second how green."""
    network = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    network[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
    network[4].weight.data, network[4].bias.data = torch.eye(2), torch.tensor([0.0, 5.0])
    return network.eval().requires_grad_(False)


def test_it_points_at_the_corner_that_decides():
    pixels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0, :4, :4] = 200  # red, above left
    pixels[:, 1, 12:, 8:] = 100  # green, below right
    pixels[5] = 0  # nothing anywhere
    network, inputs_of = corners(), torch.Tensor.float
    assert gradcam.map_layer(network, inputs_of(pixels[:1])) == "1"
    found = gradcam.heat_maps(network, "1", pixels, np.array([0, 1, 0, 1, 0, 1]), inputs_of)
    red, green = np.zeros((2, 16, 16))
    red[:4, :4] = green[12:, 8:] = 1
    assert np.array_equal(found, [red, green, red, green, red, 0 * red])
    assert not any(layer._forward_hooks for layer in network.modules())


def test_what_speaks_against_the_class_is_left_out():
    network = corners()
    network[4].weight.data = torch.tensor([[1.0, -1], [-1, 1]])
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, :4], pixels[:, 1, 4:] = 50, 250
    (found,) = gradcam.heat_maps(network, "1", pixels, np.array([0]), torch.Tensor.float)
    assert np.array_equal(found, np.repeat([1.0, 0.0], 4)[:, None] * np.ones(8))


def test_a_network_of_tokens_is_left_out_and_the_log_says_so(capsys):
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=2).eval()
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    model = Classifier(network, {"model_name": "vit", "mean": [0.5] * 3, "std": [0.5] * 3})
    assert pictures.what_decided(model, pixels, np.array([0, 1])) is None
    assert capsys.readouterr().out == "galleries without Grad-CAM of vit: it has no feature maps before its head\n"


def test_without_what_decided_a_row_has_twice_as_many():
    one = gallery.Prediction(np.zeros((SIZE, SIZE, 3), np.uint8), "val/ants/0.png", "ants", "bees", 0.9, 2.3)
    sheet = gallery.sheet("title", [one] * 7)
    assert sheet.width == 2 * gallery.MARGIN + 6 * SIDE + 5 * gallery.GAP
    assert sheet.height == gallery.HEAD + 2 * (SIDE + 3 * gallery.LINE + gallery.GAP) + gallery.MARGIN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "layer", "side"),
    [
        ("alexnet", "linear", "features.11", 5),
        ("squeezenet", "linear", "classifier.0", 5),
        ("resnet18", "linear", "layer4", 3),
        ("densenet121", "linear", "features", 3),
        ("mobilenet_v3_small", "linear", "features", 3),
        ("efficientnet_b0", "linear", "features", 3),
        ("convnext_tiny", "linear", "features", 3),
        ("swin_t", "linear", "permute", 3),
        ("alexnet", "concat_pool", "features.11", 5),
        ("densenet121", "concat_pool", "features.norm5", 3),
        ("resnet18", "concat_pool", "layer4.1", 3),
    ],
)
def test_the_layer_is_the_last_one_with_maps(name, head, layer, side):
    torch.manual_seed(0)
    network = backbones.build(name, 3, 96, params.Head(kind=head, hidden=8, dropout=0.5)).eval().requires_grad_(False)
    inputs_of = functools.partial(augment.normalize, mean=[0.5] * 3, std=[0.2] * 3)
    pixels = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    assert gradcam.map_layer(network, inputs_of(pixels[:1])) == layer
    maps = gradcam.heat_maps(network, layer, pixels, np.array([0, 2]), inputs_of)
    assert maps.shape == (2, side, side)
    assert (maps >= 0).all()
    assert maps.max() == 1


# Charts ---------------------------------------------------------------------------------------------------------------


def test_the_cells_of_the_confusion_matrix_are_as_dark_as_their_share():
    labels, guesses = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    chart = charts.confusion(labels, guesses, ["ants", "bees"])
    left = next(x for x in range(chart.width) if chart.getpixel((x, charts.TOP + 5)) not in (PAPER, INK)) + 1
    half = charts.SIDE // 2
    colors = [chart.getpixel((left + x, charts.TOP + y)) for y in (5, half + 5) for x in (5, half + 5)]
    middle = tuple(round((a + b) / 2) for a, b in zip(charts.DARK, PAPER, strict=True))
    assert colors == [middle, middle, PAPER, charts.DARK]


@pytest.mark.parametrize("number", [3, 20, 102, 1500])
def test_many_classes_with_long_names_find_room(number):
    classes = [f"a long name of a class, and its number is {i}" for i in range(number)]
    labels = np.arange(number).repeat(2)
    chart = charts.confusion(labels, labels[::-1], classes)
    side = charts.SIDE if number < 1000 else 1000
    assert side < chart.width < side + 220
    assert side < chart.height < side + 300


def test_a_bar_of_the_calibration_is_as_high_as_the_accuracy():
    logits = np.log([[0.9, 0.1]] * 4)  # the last bin but one
    chart = charts.calibration(logits, np.array([0, 0, 0, 1]), 0.15)
    x = charts.LEFT + round(charts.SIDE * 13.5 / 15)
    blue = [y for y in range(charts.TOP, charts.TOP + charts.SIDE) if chart.getpixel((x, y)) == BLUE]
    assert blue[0] == charts.TOP + charts.SIDE // 4
    assert chart.getpixel((x, charts.TOP + round(charts.SIDE * 0.1))) == charts.ORANGE
    assert chart.getpixel((charts.LEFT + 10, charts.TOP + charts.SIDE - 40)) == PAPER  # an empty bin


def test_pictures_of_one_class_alone_make_charts(tmp_path):
    with np.errstate(invalid="ignore"):  # there is no share of none
        done = pictures.Evaluated(np.zeros(3, int), np.eye(3, 2), ["a", "b", "c"], ["ants", "bees"])
        pictures.draw_charts(tmp_path, done)
    assert {file.stem for file in tmp_path.iterdir()} == set(CHARTS)


def test_words_are_shortened_to_their_room():
    text = font(11)
    assert shortened("ants", text, 100) == "ants"
    start, end = (shortened("val/ants/a long name.jpg", text, 80, keep_end) for keep_end in (False, True))
    assert (start[:8], start[-1], end[0], end[-8:]) == ("val/ants", "…", "…", "name.jpg")
    assert max(map(text.getlength, (start, end))) <= 80
