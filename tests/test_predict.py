"""Classifying pictures, through the script."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

from finetune import backbones
from helpers import ROOT, TINY, clone, git, make_pictures, run_forked, write_params

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

ODD = ["val/ants/turned.jpg", "val/ants/clear.png", "val/bees/moving.gif", "val/bees/tiny.bmp", "val/bees/wide.png"]


def write_odd_pictures(folder) -> None:
    """Write the pictures of ODD."""
    rng = np.random.default_rng(3)

    def noise(height, width, channels=3):
        return Image.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8))

    turned, clear, moving, tiny, wide = (folder / name for name in ODD)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(300, 200).save(turned, exif=exif)
    noise(50, 40, 4).save(clear)
    noise(40, 40).save(moving, save_all=True, append_images=[noise(40, 40)])
    noise(2, 3).save(tiny)
    noise(7, 2000).save(wide)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder after all stages, with pictures of every kind among those that validate, and files that are none."""
    folder = tmp_path_factory.mktemp("trained")
    make_pictures(folder / "pictures", {"train/ants": 5, "train/bees": 5, "val/ants": 8, "val/bees": 9}, size=44)
    write_odd_pictures(folder / "pictures")
    (folder / "pictures/val/ants/notes.txt").write_text("ants")
    (folder / "pictures/val/ants/cut.jpg").touch()
    (folder / "pictures/val/bees/gone.png").symlink_to("nowhere.png")
    settings = {"num_epochs": 1, "backbone__weights": "none", "data__max_skipped": 0.5, "lr": 0.01}
    write_params(folder, **TINY | settings)
    for script in ("prepare", "backbone", "train", "evaluate"):
        run_forked(folder, script)
    return folder


def predictions(folder) -> dict[str, dict[str, str]]:
    """Return by its path what evaluation made of each picture."""
    with open(folder / "results/evaluate/predictions.csv", newline="", encoding="utf-8") as file:
        return {f"pictures/{row['path']}": row for row in csv.DictReader(file)}


def predicted(folder, *arguments: str) -> dict[str, dict[str, str]]:
    """Return by its path what the script makes of each picture, as CSV."""
    run_forked(folder, "predict", *arguments, "-o", "predicted.csv")
    with open(folder / "predicted.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def assert_as_evaluated(found, expected):
    assert found.keys() == expected.keys()
    for path, row in found.items():
        names = ("prediction", "p_ants", "p_bees")
        assert [row[name] for name in names] == [expected[path][name] for name in names]
        assert row["probability"] == max(row["p_ants"], row["p_bees"])


def test_a_folders_pictures_of_every_kind_are_classified_as_in_evaluation(trained):
    expected = predictions(trained)
    assert expected.keys() > {f"pictures/{name}" for name in ODD}
    assert len({row["p_ants"] for row in expected.values()}) == len(expected) == 22
    assert_as_evaluated(predicted(trained, "pictures/val"), expected)


@pytest.mark.parametrize(("tta", "precision"), [("ten_crop", "fp32"), ("flip", "bf16")])
def test_so_they_are_with_test_time_augmentation_and_in_bfloat16(trained, tmp_path, tta, precision):
    folder = shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    write_params(folder, **TINY, evaluate__tta=tta)
    tensors, about = backbones.read(folder / "models/model.safetensors")
    del about["digest"]
    backbones.write(folder / "models/model.safetensors", tensors, about | {"precision": precision})
    run_forked(folder, "evaluate")
    expected = predictions(folder)
    assert expected != predictions(trained)
    assert_as_evaluated(predicted(folder, "pictures/val", "--tta", tta), expected)


def test_files_patterns_and_lines_of_stdin_mean_their_pictures_each_once(trained):
    command = [
        sys.executable,
        ROOT / "src/predict.py",
        "pictures/val/ants/1.png",
        "./pictures/**/[01].png",
        "-",
        "--csv",
    ]
    lines = os.fsencode(trained / "pictures/val/bees/7.png") + b"\n\npictures/val/ants/0.png\n"
    result = subprocess.run(command, cwd=trained, input=lines, capture_output=True, check=True)
    paths = [row["path"] for row in csv.DictReader(io.StringIO(result.stdout.decode(), newline=""))]
    folders = ("train/ants", "train/bees", "val/ants", "val/bees")
    inside = [f"./pictures/{folder}/{number}.png" for folder in folders for number in (0, 1)]
    inside.remove("./pictures/val/ants/1.png")
    assert paths == ["pictures/val/ants/1.png", *inside, str(trained / "pictures/val/bees/7.png")]
    assert result.stderr == b""


def test_the_table_is_aligned_and_says_what_was_skipped(trained):
    printed = run_forked(trained, "predict", "pictures/val/ants")
    skipped, table = printed.splitlines()[:2], printed.splitlines()[2:]
    assert skipped == [
        "skipped pictures/val/ants/cut.jpg: empty file",
        "skipped pictures/val/ants/notes.txt: not a picture of a known format",
    ]
    assert table[0].split() == ["path", "prediction", "probability", "next", "best"]
    assert len(table) == 11
    expected = predictions(trained)
    for line in table[1:]:
        path, prediction, probability, other, rest = line.split()
        row = expected[path]
        assert {prediction, other} == {"ants", "bees"}
        assert (prediction, probability) == (row["prediction"], f"{float(row[f'p_{prediction}']):.4f}")
        assert float(rest) == pytest.approx(1 - float(probability), abs=1e-4)
        assert line.index(prediction, len(path)) == table[0].index("prediction")
    short = run_forked(trained, "predict", "pictures/val/ants/0.png", "--top", "1")
    assert short.splitlines()[0].split() == ["path", "prediction", "probability"]


def test_json_is_an_array_of_objects(trained):
    found = json.loads(run_forked(trained, "predict", "pictures/val/bees/0.png", "pictures/val/ants/1.png", "--json"))
    assert [each["path"] for each in found] == ["pictures/val/bees/0.png", "pictures/val/ants/1.png"]
    for each in found:
        row = predictions(trained)[each["path"]]
        assert each["prediction"] == row["prediction"] == next(iter(each["probabilities"]))
        assert each["probabilities"] == {name: float(row[f"p_{name}"]) for name in ("ants", "bees")}
        assert each["probability"] == max(each["probabilities"].values())
    run_forked(trained, "predict", "pictures/val/bees/0.png", "--top", "1", "-o", "one.json")
    (one,) = json.loads((trained / "one.json").read_text())
    assert one["probabilities"] == {one["prediction"]: one["probability"]}


def test_a_name_that_is_no_utf_8_and_one_of_two_lines(trained, tmp_path):
    names = [b"\xff.png", b"two\nlines.png", "größe.png".encode()]
    for name in names:
        shutil.copy(trained / "pictures/val/ants/0.png", os.fsencode(tmp_path) + b"/" + name)
    table = run_forked(trained, "predict", str(tmp_path))
    assert len(table.splitlines()) == 4
    for form in ("json", "csv"):
        run_forked(trained, "predict", str(tmp_path), "-o", f"names.{form}")
    as_json = json.loads((trained / "names.json").read_text())
    text = (trained / "names.csv").read_bytes().decode(errors="surrogateescape")
    for rows in (as_json, csv.DictReader(io.StringIO(text, newline=""))):
        assert {os.path.basename(os.fsencode(row["path"])) for row in rows} == set(names)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pictures/val/ants", "no.jpg", "pictures/*.tif"], 1, "error: no.jpg, pictures/*.tif: no such file"),
        (["pictures/val/ants/notes.txt"], 1, "error: there is no picture among 1 file."),
        (["pictures/val", "--model", "no.safetensors"], 1, "error: no.safetensors is missing: `dvc repro`"),
        (
            ["pictures/val", "--model", "other.safetensors"],
            1,
            "other.safetensors is not a file of this project's",
        ),
        (["pictures/val", "--model", "models/backbone.safetensors"], 1, "is no fine-tuned classifier"),
        (["pictures/val", "--model", "x", "--experiment", "x"], 2, "not allowed with"),
        (["pictures/val", "--csv", "--top", "1"], 2, "--csv has all classes"),
        (["pictures/val", "--top", "0"], 2, "--top should be 1 or more"),
        (["pictures/val", "-o", "models"], 2, "--output models is a folder"),
        (["pictures/val", "--device", "gpu"], 2, "invalid device value: 'gpu'"),
    ],
)
def test_what_can_be_mended_is_told_and_nothing_is_written(trained, arguments, status, words):
    save_file({}, trained / "other.safetensors")
    output = [] if "-o" in arguments else ["-o", "nothing.txt"]
    printed = run_forked(trained, "predict", *arguments, *output, status=status)
    assert words in printed
    assert "Traceback" not in printed
    assert not (trained / "nothing.txt").exists()


def test_an_experiments_model_is_taken_from_the_cache(trained, tmp_path):
    folder = clone(tmp_path / "project", **TINY)
    model = (trained / "models/model.safetensors").read_bytes()
    digest = "d" * 32
    place = folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    place.parent.mkdir(parents=True)
    place.write_bytes(model)
    lock = f"schema: '2.0'\nstages:\n  train:\n    outs:\n    - path: models/model.safetensors\n      md5: {digest}\n"
    (folder / "dvc.lock").write_text(lock)
    baseline = git(folder, "rev-parse", "HEAD").strip()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "experiment")
    git(folder, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/great-gnat", "HEAD")
    git(folder, "branch", "best")
    git(folder, "reset", "-q", "--hard", baseline)

    shutil.copytree(trained / "pictures", folder / "pictures", symlinks=True)
    for name in ("great-gnat", "best"):
        assert_as_evaluated(predicted(folder, "pictures/val", "--experiment", name), predictions(trained))
    printed = run_forked(folder, "predict", "pictures/val", "--experiment", "great-gnu", status=1)
    assert printed == (
        "error: 'great-gnu' is neither an experiment nor a revision of this repository. Nearest: great-gnat.\n"
    )
    printed = run_forked(folder, "predict", "pictures/val", "--experiment", "main", status=1)
    assert "main has no models/model.safetensors" in printed
    printed = run_forked(folder, "predict", "pictures/val", status=1)
    assert "models/model.safetensors is missing: `dvc repro`" in printed
    place.unlink()
    printed = run_forked(folder, "predict", "pictures/val", "--experiment", "best", status=1)
    assert "is not in DVC's cache" in printed
