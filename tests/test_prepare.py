"""The stage `prepare`, through its script."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from finetune import datasets
from finetune.images import ImageStore
from helpers import ROOT, make_pictures, run, write_params

import pytest
from PIL import Image
from ruamel.yaml import YAML


@pytest.fixture
def project(tmp_path):
    """Return a folder with params.yaml, whose data.source, data/pictures, holds a few pictures of two classes."""
    folder = tmp_path / "project"
    make_pictures(folder / "data/pictures", {"ants": 8, "bees": 6})
    write_params(folder, data__source="data/pictures", data__resize=32, data__image_size=32)
    return folder


def prepared(folder: Path, **variables: str) -> str:
    """Run the stage, which must succeed; return what it wrote to the screen."""
    result = run("prepare.py", folder, **variables)
    assert result.returncode == 0, result.stderr
    assert not (folder / "data/prepared.tmp").exists()
    return result.stdout + result.stderr


def failed(folder: Path, **variables: str) -> str:
    """Run the stage, which must fail without a traceback or anything half-written; return its message."""
    before = contents(folder / "data/prepared")
    result = run("prepare.py", folder, **variables)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "data/prepared.tmp").exists()
    assert contents(folder / "data/prepared") == before
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


def pack(folder: Path, archive: Path, seed: int = 0) -> None:
    """Write a zip of the folder's files, in an order that follows from the seed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    random.Random(seed).shuffle(files)
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in files:
            zipped.write(file, file.relative_to(folder))


def test_a_folder_of_classes(project):
    output = prepared(project)
    assert "prepared 11 train and 3 val pictures of 2 classes (ants, bees) in " in output
    assert output.rstrip().endswith(" s, 0 skipped")
    store = ImageStore(project / "data/prepared")
    assert store.manifest["counts"] == {"train": {"ants": 6, "bees": 5}, "val": {"ants": 2, "bees": 1}}
    assert store.manifest["digest"] == datasets.read(project / "data/pictures", "").digest
    assert store[0].shape == (32, 43, 3)
    assert sorted(os.listdir(project / "data")) == ["pictures", "prepared"]


def test_the_same_pictures_give_the_same_bytes_however_they_come(project):
    prepared(project)
    first = contents(project / "data/prepared")
    prepared(project)
    assert contents(project / "data/prepared") == first

    write_params(project, data__source="data/pictures.zip", data__resize=32, data__image_size=32)
    results = []
    for seed in (1, 2):
        pack(project / "data/pictures", project / "data/pictures.zip", seed)
        prepared(project)
        results.append(contents(project / "data/prepared"))
    assert results[0] == results[1]
    folder, packed = (json.loads(each["manifest.json"]) for each in (first, results[0]))
    assert packed.pop("sha256") != folder.pop("sha256")
    assert packed == folder | {"source": "data/pictures.zip"}
    assert {name: results[0][name] for name in first if name != "manifest.json"} == {
        name: data for name, data in first.items() if name != "manifest.json"
    }


def test_the_split_seed_chooses_other_pictures(project):
    prepared(project)
    first = ImageStore(project / "data/prepared")
    write_params(project, data__source="data/pictures", data__resize=32, data__image_size=32, data__split_seed=1)
    prepared(project)
    second = ImageStore(project / "data/prepared")
    assert first.manifest["digest"] == second.manifest["digest"]
    assert set(zip(first.paths, first.splits, strict=True)) != set(zip(second.paths, second.splits, strict=True))


def in_shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("shard-")}


def test_folds_differ_in_the_list_of_pictures_alone(project):
    (project / "data/pictures/ants/notes.txt").write_text("no picture")
    shards, validating = [], []
    for fold in range(3):
        keys = {"data__source": "data/pictures", "data__folds": 3, "data__fold": fold, "data__limit": 0}
        write_params(project, **keys, data__resize=32, data__image_size=32)
        output = prepared(project)
        assert f"fold {fold} of 3 (0 to 2) validates\n" in output
        assert "aside" not in output
        shards.append(in_shards(project / "data/prepared"))
        store = ImageStore(project / "data/prepared")
        validating += [store.paths[i] for i in store.indices("val")]
        assert store.manifest["split"] == {"val_fraction": 0.2, "folds": 3, "fold": fold, "split_seed": 0, "limit": 0}
    assert shards[0]
    assert shards[0] == shards[1] == shards[2]
    assert sorted(validating) == sorted(store.paths)
    write_params(project, data__source="data/pictures", data__resize=32, data__image_size=32)
    prepared(project)
    assert in_shards(project / "data/prepared") == shards[0]  # a split by val_fraction has the same pictures, too


def test_a_val_folder_is_set_aside_where_folds_validate(project):
    shutil.rmtree(project / "data/pictures")
    make_pictures(project / "data/pictures", {"train/ants": 4, "train/bees": 4, "val/ants": 2, "val/bees": 1})
    for i in range(30):  # would be far more than data.max_skipped, if the val folder counted
        (project / f"data/pictures/val/ants/{i}.txt").write_text("no picture")
    write_params(project, data__source="data/pictures", data__folds=2, data__fold=1)
    output = prepared(project)
    assert "fold 1 of 2 (0 to 1) validates, 33 val pictures set aside" in output
    assert "prepared 4 train and 4 val pictures" in output
    assert all(path.startswith("train/") for path in ImageStore(project / "data/prepared").paths)


def test_too_many_folds_are_an_error(project):
    write_params(project, data__source="data/pictures", data__folds=7)
    assert "data.folds = 7, but data/pictures has 6 different pictures of bees to train on." in failed(project)


def test_a_limit_takes_a_part_of_each_split_before_decoding(project):
    prepared(project)
    whole = ImageStore(project / "data/prepared")
    for i in range(20):
        (project / f"data/pictures/ants/{i}-gone.png").symlink_to("nowhere")
    write_params(project, data__source="data/pictures", data__resize=32, data__image_size=32, data__limit=4)
    output = prepared(project)
    assert "limited to 7 of 14 pictures: data.limit = 4" in output
    assert "decoding 7 pictures" in output
    store = ImageStore(project / "data/prepared")
    assert store.manifest["counts"] == {"train": {"ants": 2, "bees": 2}, "val": {"ants": 2, "bees": 1}}
    assert set(zip(store.splits, store.paths, strict=True)) <= set(zip(whole.splits, whole.paths, strict=True))


def test_unreadable_files_are_skipped_and_named(project):
    pictures = project / "data/pictures"
    (pictures / "ants/notes.txt").write_text("no picture")
    (pictures / "bees/cut.png").write_bytes((pictures / "bees/0.png").read_bytes()[:700])
    (pictures / "bees/gone.png").symlink_to("nowhere")
    write_params(project, data__source="data/pictures", data__max_skipped=0.5)
    output = prepared(project)
    assert "Warning" not in output
    manifest = ImageStore(project / "data/prepared").manifest
    assert [path for path, _ in manifest["skipped"]] == ["ants/notes.txt", "bees/cut.png", "bees/gone.png"]
    reasons = ["not a picture", "truncated", "broken link"]
    for (path, reason), expected in zip(manifest["skipped"], reasons, strict=True):
        assert expected in reason
        assert f"skipped {path}: {reason}" in output
    assert "3 skipped" in output
    assert sum(sum(counts.values()) for counts in manifest["counts"].values()) == 14


def test_warnings_of_the_decoder_stay_off_the_screen(project):
    damaged = b"Exif\0\0MM\0*\0\0\0\xff\xff\xff"
    Image.new("RGB", (40, 40)).save(project / "data/pictures/ants/exif.jpg", exif=damaged)
    assert "arning" not in prepared(project)


def test_of_many_skipped_files_the_first_are_named(project):
    for i in range(30):
        (project / f"data/pictures/ants/{i:02}.txt").write_text("no picture")
    write_params(project, data__source="data/pictures", data__max_skipped=0.9)
    output = prepared(project)
    assert output.count("skipped ants/") == 20
    assert "and 10 more, see data/prepared/manifest.json" in output


def test_too_many_skipped_files_are_an_error(project):
    prepared(project)
    for i in range(4):
        (project / f"data/pictures/ants/{i}.txt").write_text("no picture")
    message = failed(project)
    assert "4 of 18 files (22.2%) are unreadable, more than data.max_skipped = 0.1 allows" in message
    assert "ants/0.txt (not a picture" in message
    assert "-S data.max_skipped=0.23" in message


def test_a_class_must_not_be_empty(project):
    for file in (project / "data/pictures/bees").iterdir():
        file.write_bytes(b"no picture any more")
    write_params(project, data__source="data/pictures", data__max_skipped=1.0)
    assert "data/pictures: train has no picture of bees." in failed(project)


def test_a_class_with_one_picture_can_not_be_split(project):
    for i in range(1, 6):
        (project / f"data/pictures/bees/{i}.png").unlink()
    assert "data/pictures: val has no picture of bees." in failed(project)


def test_num_classes_must_be_that_of_the_data(project):
    make_pictures(project / "data/pictures", {"wasps": 2})
    message = "num_classes is 2, but data/pictures has 3 classes (ants, bees, wasps): set it with -S num_classes=3"
    assert message in failed(project)


def test_pictures_that_train_and_validate_are_warned_of(project):
    shutil.rmtree(project / "data/pictures")
    make_pictures(project / "data/pictures", {"train/ants": 2, "train/bees": 2, "val/ants": 1, "val/bees": 1})
    shutil.copy(project / "data/pictures/train/bees/0.png", project / "data/pictures/val/bees/0.png")
    assert "warning: 1 of the val and test pictures are in train too" in prepared(project)


def test_drawn_pictures(project):
    keys = {"drawn": ["ants", "bees"], "train": 3, "val": 2, "size": 48, "seed": 0}
    YAML().dump(keys, project / "data/few.yaml")
    write_params(project, data__source="data/few.yaml")
    assert "prepared 6 train and 4 val pictures of 2 classes (ants, bees)" in prepared(project)


def test_what_a_killed_run_left_is_removed(project):
    (project / "data/prepared.tmp/store").mkdir(parents=True)
    (project / "data/prepared.tmp/store/shard-000.bin").write_bytes(b"half")
    prepared(project)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_the_store_as_it_was(project, kill):
    prepared(project)
    before = contents(project / "data/prepared")
    make_pictures(project / "data/pictures", {"ants": 400})
    write_params(project, data__source="data/pictures", data__resize=1000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "src/prepare.py"],
        cwd=project,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    while not (project / "data/prepared.tmp/store/shard-000.bin").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kill)
    _, message = process.communicate(timeout=20)
    assert process.returncode != 0
    assert contents(project / "data/prepared") == before
    if kill == signal.SIGINT:
        assert message == b"stopped. Nothing is half-written: the same command starts this stage again.\n"
        assert not (project / "data/prepared.tmp").exists()
    write_params(project, data__source="data/pictures", data__resize=32, data__image_size=32)
    prepared(project)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    make_pictures(tmp_path / "pictures", {"ants": 8, "bees": 6}, size=64)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk failed: {mounted.stderr.decode().strip()}")
    try:
        write_params(disk, data__source=str(tmp_path / "pictures"))
        message = failed(disk, XDG_CACHE_HOME=str(tmp_path))
        assert message.startswith("error: the disk is full (data/prepared.tmp/store/shard-000.bin)")
        assert os.listdir(disk / "data") == []
    finally:
        subprocess.run(["umount", disk], check=True)


def write_recipe(project: Path, **changes) -> None:
    """Write data/recipe.yaml, for an archive of data/pictures that can't be fetched, and make it the source."""
    digest = datasets.read(project / "data/pictures", "").digest
    recipe = {"url": "http://127.0.0.1:9/pictures.zip", "bytes": 1000, "sha256": "0" * 64, "digest": digest}
    YAML().dump(recipe | changes, project / "data/recipe.yaml")
    write_params(project, data__source="data/recipe.yaml")


def test_without_network_the_ways_out_are_named(project):
    write_recipe(project)
    message = failed(project)
    assert "can't fetch http://127.0.0.1:9/pictures.zip: [Errno 111] Connection refused" in message
    assert "DATA_ARCHIVE=<path or URL of the archive>" in message
    assert "-S data.source=data/sample.yaml" in message


# What DVC does: it is started in the user's folder and keeps PWD, and runs the stage through a shell in another one.
LIKE_DVC = """
import os, subprocess, sys
os.environ["DVC_ROOT"], folder, script = sys.argv[1:]
os.chdir(folder)
sys.exit(subprocess.call(f"{sys.executable} {script}", shell=True, cwd=folder))
"""


@pytest.mark.parametrize("copied", [False, True])
def test_a_relative_path_of_the_archive_is_the_users(project, tmp_path, copied):
    write_recipe(project)
    (project / "notebooks/mine").mkdir(parents=True)
    pack(project / "data/pictures", project / "notebooks/mine.zip")
    shutil.rmtree(project / "data/pictures")
    stage = project
    if copied:
        stage = shutil.copytree(project, tmp_path / "copy")
        shutil.rmtree(stage / "notebooks")
    (tmp_path / "like_dvc.py").write_text(LIKE_DVC)
    command = f"cd notebooks/mine && DATA_ARCHIVE=../mine.zip {sys.executable} {tmp_path}/like_dvc.py"
    command += f" {project} {stage} {ROOT}/src/prepare.py"
    result = subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "prepared 11 train and 3 val pictures" in result.stdout
    assert (stage / "data/prepared/manifest.json").exists()


def test_an_archive_that_is_nowhere_is_an_error(project):
    write_recipe(project)
    message = failed(project, DATA_ARCHIVE="mine.zip", DVC_ROOT=str(project))
    assert "DATA_ARCHIVE=mine.zip is in none of /" in message


@pytest.mark.skipif("DATA_ARCHIVE" not in os.environ, reason="DATA_ARCHIVE is not set: no ants and bees")
def test_the_real_pictures(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("prepared*"))
    write_params(tmp_path)
    archive = os.environ["DATA_ARCHIVE"]
    output = prepared(tmp_path, DATA_ARCHIVE=archive if "://" in archive else os.path.abspath(archive))
    assert "prepared 244 train and 153 val pictures of 2 classes (ants, bees)" in output
    manifest = ImageStore(tmp_path / "data/prepared").manifest
    assert manifest["counts"] == {"train": {"ants": 123, "bees": 121}, "val": {"ants": 70, "bees": 83}}
    assert manifest["digest"] == YAML().load(tmp_path / "data/hymenoptera.yaml")["digest"]
    assert manifest["skipped"] == []
