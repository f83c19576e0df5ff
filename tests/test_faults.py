"""What goes wrong around a run: full disks, damaged files, signals, second processes. Each is said, nothing is lost.

Through the real scripts, on tiny pictures of noise. After the fault is mended, the same command ends as the run that
was never disturbed, to the bit.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from finetune import backbones, checkpoint, runs
from finetune.digests import digest
from finetune.errors import UserError
from finetune.files import sha256_of
from finetune.images import ImageStore
from helpers import ROOT, make_pictures, run, write_params

import pytest
import torch

slow = pytest.mark.slow

KB, MB = 1000, 1000_000
EPOCHS, STEPS = 4, 6  # 13 training pictures, in batches of 2; a batch of 1 joins the one before
SETTINGS = {
    "data__source": "pictures",
    "data__resize": 36,
    "data__image_size": 32,
    "model_name": "squeezenet",
    "backbone__weights": "none",
    "batch_size": 2,
    "num_epochs": EPOCHS,
    "device": "cpu",
}
STORE = ".dvc/tmp/checkpoints"
THREADS = {"OMP_NUM_THREADS": "1"}  # two scripts at a time, on few cores
UNTIL = 120  # seconds that a script may take at most, on a busy machine


# Scripts ------------------------------------------------------------------------------------------------------------


def done(script: str, folder: Path, **variables: str) -> str:
    """Run a script, which must succeed; return what it wrote to the screen."""
    result = run(script, folder, **THREADS, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def failed(script: str, folder: Path, **variables: str) -> str:
    """Run a script, which must fail with an error of a few lines, and with whole files alone; return the error."""
    result = run(script, folder, **THREADS, **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    assert len(message.splitlines()) <= 3
    return message


class Started:
    """A script that runs beside the test, and what it writes to the screen."""

    running: ClassVar[list["Started"]] = []

    def __init__(self, script: str, folder: Path, *, under_a_parent: bool = False, **variables: str):
        command = [sys.executable, str(ROOT / "src" / script)]
        if under_a_parent:
            command = ["sh", "-c", '"$@"; true', "sh", *command]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | THREADS | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
        )
        self.output = ""
        self._guard = threading.Timer(UNTIL, self.process.kill)
        self._guard.daemon = True
        self._guard.start()
        self.running.append(self)

    def wait_for(self, words: str) -> None:
        """Return once a line with the words is on the screen."""
        for line in self.process.stdout:
            self.output += line
            if words in line:
                return
        raise AssertionError(f"no line with {words!r}:\n{self.output}")

    def wait_for_file(self, path: Path) -> None:
        """Return once the file is there."""
        while not path.exists():
            assert self.process.poll() is None, self.output + self.process.stdout.read()
            time.sleep(0.001)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait until the screen is closed and the process has ended; return its status."""
        self.output += self.process.stdout.read()
        status = self.process.wait()
        self._guard.cancel()
        return status


@pytest.fixture(autouse=True)
def _nothing_left_running():
    yield
    while Started.running:
        Started.running.pop().process.kill()


def together(*works: Callable[[], object]) -> list:
    """Return what the functions return, which run two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder after the stages prepare and backbone."""
    folder = tmp_path_factory.mktemp("prepared")
    numbers = {"train/ants": 6, "train/bees": 7, "val/ants": 130, "val/bees": 130}
    make_pictures(folder / "pictures", numbers, size=36)
    write_params(folder, **SETTINGS)
    together(lambda: done("prepare.py", folder), lambda: done("backbone.py", folder))
    return folder


@pytest.fixture(scope="module")
def _trained(prepared, tmp_path_factory) -> tuple[Path, Path]:
    """A folder after all stages, undisturbed; and one whose training was stopped after two epochs."""
    base = tmp_path_factory.mktemp("trained")

    def undisturbed():
        folder = copied(prepared, base / "undisturbed")
        done("train.py", folder)
        done("evaluate.py", folder)
        return folder

    def stopped():
        folder = copied(prepared, base / "stopped")
        started = Started("train.py", folder)
        started.wait_for("epoch 2/4")
        started.send(signal.SIGTERM)
        assert started.end() == 128 + signal.SIGTERM, started.output
        assert len(checkpoints(folder)) == 2
        return folder

    return tuple(together(undisturbed, stopped))


@pytest.fixture(scope="module")
def undisturbed(_trained) -> Path:
    """A folder after all stages, which nothing disturbed. Not to be changed."""
    return _trained[0]


@pytest.fixture(scope="module")
def stopped(_trained) -> Path:
    """A folder with a run that was stopped in its third epoch, and has two checkpoints. Not to be changed."""
    return _trained[1]


@pytest.fixture
def fresh(prepared, tmp_path) -> Path:
    """A folder before training."""
    return copied(prepared, tmp_path / "fresh")


def copied(folder: Path, target: Path) -> Path:
    """Copy a project's folder, but for its pictures; return the copy."""

    def left_out(inside: str, names: list[str]) -> set[str]:
        return {"pictures", "cache"}.intersection(names) if Path(inside) == folder else set()

    return shutil.copytree(folder, target, ignore=left_out, dirs_exist_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in the store of a folder, the furthest last."""
    return sorted((folder / STORE).glob("*/*.pt"))


def outcome(folder: Path) -> dict:
    """Return all that a run's end follows from and has written, but for its times."""
    state = checkpoint.load(folder / "models/checkpoint.pt")
    plots = (folder / "results/train/plots/metrics").glob("*.tsv")
    return {
        "model": sha256_of(folder / "models/model.safetensors"),
        "checkpoint": {name: digest(state[name]) for name in ("run", "model", "optimizer", "schedule", "sums")},
        "history": untimed(state["history"]),
        "metrics": untimed([json.loads((folder / "results/train/metrics.json").read_text())]),
        "plots": {file.name: file.read_text() for file in plots if file.name != "training_time.tsv"},
    }


def untimed(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "training_time"} for row in rows]


def evaluation(folder: Path) -> dict[str, bytes]:
    """Return the files that the stage evaluate writes."""
    return {file.name: file.read_bytes() for file in (folder / "results/evaluate").rglob("*") if file.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_whole(*folders: Path) -> None:
    """Fail where a file in one of the folders is half-written."""
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    for path in files:
        assert path.suffix != ".tmp"
        if path.suffix == ".pt":
            checkpoint.load(path)
        elif path.suffix == ".safetensors":
            backbones.read(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".csv", ".tsv"):
            lines = path.read_text().splitlines(keepends=True)
            assert len(lines) > 1
            assert lines[-1].endswith("\n")


# Disks --------------------------------------------------------------------------------------------------------------


def mount(*arguments: str | Path) -> None:
    """Mount; skip the test where that is not permitted."""
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting needs root here: {result.stderr.strip()}")


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int | None], None]]:
    """Mount a small disk at the folder; yield a function that leaves as many bytes of it free, or all for None."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=40m", "tmpfs", folder)

    def leave(room: int | None) -> None:
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        if room is not None:
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - room)

    try:
        yield leave
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Have the folder be one that can't be written to, for root either."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def pages(size: int) -> int:
    """Return the room that a file of the size takes on the small disk."""
    return -(-size // 4096) * 4096


def test_a_full_disk_stops_prepare_at_any_file_and_leaves_the_store_as_it_was(tmp_path):
    make_pictures(tmp_path / "pictures", {"train/ants": 20, "train/bees": 20, "val/ants": 20, "val/bees": 20}, size=36)
    source = str(tmp_path / "pictures")
    whole = tmp_path / "whole"
    whole.mkdir()
    write_params(whole, data__source=source, data__resize=36, data__image_size=32)
    done("prepare.py", whole)
    expected = contents(whole / "data/prepared")
    with small_disk(tmp_path / "disk") as leave:
        folder = tmp_path / "disk"
        write_params(folder, data__source=source, data__resize=34, data__image_size=32)
        done("prepare.py", folder)
        before = contents(folder / "data/prepared")
        write_params(folder, data__source=source, data__resize=36, data__image_size=32)
        room = 0
        for name in ("shard-000.bin", "pictures.csv", "manifest.json"):
            size = pages(len(expected[name]))
            for part in {0, size // 4096 // 2 * 4096, size - 4096}:
                leave(room + part)
                message = failed("prepare.py", folder)
                assert message.startswith(f"error: the disk is full (data/prepared.tmp/store/{name}).\nFree some")
                assert os.listdir(folder / "data") == ["prepared"]
                assert contents(folder / "data/prepared") == before
            room += size
        leave(None)
        done("prepare.py", folder)
        assert contents(folder / "data/prepared") == expected


@slow
def test_a_full_disk_stops_any_stage_at_any_file_and_the_next_try_goes_on_from_what_is_whole(
    prepared, undisturbed, tmp_path
):
    """One command again and again, with more and more room: it gets further each time, and ends undisturbed."""

    def checkpoints_disk():
        with small_disk(tmp_path / "store") as leave:
            folder = copied(prepared, tmp_path / "a")
            store = tmp_path / "store"

            def tried(room: int) -> str:
                leave(room)
                message = failed("train.py", folder, CHECKPOINTS_DIR=str(store))
                check_whole(folder, store)
                return message

            assert re.match(r"error: the disk is full \(.*/about\.json\)\.\nFree some space", tried(0))
            assert re.match(r"error: the disk is full \(.*/00001-0000000\.pt\)\.\nFree", tried(64 * KB))
            assert re.match(r"error: the disk is full \(.*/00002-0000000\.pt\)\.\nFree", tried(6500 * KB))
            assert [path.name for path in store.glob("*/*.pt")] == ["00001-0000000.pt"]
            leave(None)
            printed = done("train.py", folder, CHECKPOINTS_DIR=str(store))
            assert "going on after 1 epochs and 0 steps" in printed
            assert "epoch 1/4:" not in printed
            assert outcome(folder) == outcome(undisturbed)

    def project_disk():
        with small_disk(tmp_path / "project") as leave:
            folder = copied(prepared, tmp_path / "project/b")
            store = tmp_path / "b-store"
            store.mkdir()

            def tried(room: int) -> str:
                leave(room)
                message = failed("train.py", folder, CHECKPOINTS_DIR=str(store))
                check_whole(folder, store)
                return message

            assert tried(8 * KB).startswith("error: the disk is full (results/train).\nFree some space")
            assert tried(100 * KB).startswith("error: the disk is full (models/checkpoint.pt).\nFree some")
            assert tried(7000 * KB).startswith("error: the disk is full (models/model.safetensors).\nFree")
            leave(None)
            printed = done("train.py", folder, CHECKPOINTS_DIR=str(store))
            assert "this run is finished, nothing to train" in printed
            assert outcome(folder) == outcome(undisturbed)

    def other_stages():
        with small_disk(tmp_path / "other") as leave:
            folder = copied(undisturbed, tmp_path / "other/c")
            (folder / "models/backbone.safetensors").unlink()
            shutil.rmtree(folder / "results/evaluate")
            leave(0)
            message = failed("backbone.py", folder)
            assert message.startswith("error: the disk is full (models/backbone.safetensors).\nFree some space")
            plots = sum(pages(len(plot)) for plot in contents(undisturbed / "results/evaluate/plots").values())
            leave(plots + 4096)
            message = failed("evaluate.py", folder)
            assert message.startswith("error: the disk is full (results/evaluate/predictions.csv).\nFree some space")
            check_whole(folder)
            leave(None)
            together(lambda: done("backbone.py", folder), lambda: done("evaluate.py", folder))
            assert evaluation(folder) == evaluation(undisturbed)
            name = "models/backbone.safetensors"
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()

    together(project_disk, checkpoints_disk, other_stages)


@slow
def test_a_read_only_folder_is_named_and_what_was_trained_is_not_lost(fresh, undisturbed, tmp_path):
    store = tmp_path / "store"
    results = copied(fresh, tmp_path / "results")

    def read_only_results():
        with read_only(results / "results"):
            return failed("train.py", results)

    def read_only_store():
        with read_only(store):
            return failed("train.py", fresh, CHECKPOINTS_DIR=str(store))

    for message, name in zip(together(read_only_results, read_only_store), ("results/train", store), strict=True):
        assert re.match(rf"error: (Read-only file system|Permission denied) \({name}.*\)\.\nMake it", message)
    with read_only(fresh / "models"):
        message = failed("train.py", fresh, CHECKPOINTS_DIR=str(store))
    assert re.match(r"error: (Read-only file system|Permission denied) \(models/checkpoint\.pt.*\)\.\nMake it", message)
    printed = done("train.py", fresh, CHECKPOINTS_DIR=str(store))
    assert "this run is finished, nothing to train" in printed
    assert outcome(fresh) == outcome(undisturbed)


# Damaged files ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file. Not through a link."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"cut": cut, "flipped": flip}


@slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(stopped, undisturbed, tmp_path):
    def damaged(name: str) -> None:
        folder = copied(stopped, tmp_path / name)
        before, newest = checkpoints(folder)
        DAMAGES[name](newest)
        printed = done("train.py", folder)
        newest, before = newest.relative_to(folder), before.relative_to(folder)
        assert re.search(rf"warning: {newest} (is cut or|its digest is).*: taking the checkpoint before it", printed)
        epochs, steps = map(int, re.match(r"(\d+)-(\d+)", before.name).groups())
        assert f"going on after {epochs} epochs and {steps} steps: {before}" in printed
        assert "epoch 1/4:" not in printed
        assert outcome(folder) == outcome(undisturbed)

    together(lambda: damaged("cut"), lambda: damaged("flipped"))


@slow
def test_a_damaged_checkpoint_that_is_the_only_one_stops_the_run_until_the_user_decides(stopped, undisturbed, tmp_path):
    def damaged(name: str) -> Path:
        folder = copied(stopped, tmp_path / name)
        before, newest = checkpoints(folder)
        before.unlink()
        DAMAGES[name](newest)
        message = failed("train.py", folder)
        assert message.startswith(f"error: no checkpoint of this run is whole: {newest.relative_to(folder)} ")
        assert f"train anew: `python src/checkpoints.py remove {newest.parent.name}`" in message
        assert checkpoints(folder) == [newest]
        return folder

    folder, _ = together(lambda: damaged("cut"), lambda: damaged("flipped"))
    removed = run("checkpoints.py", folder, "remove", checkpoints(folder)[0].parent.name)
    assert "removed 1 run" in removed.stdout
    assert "epoch 1/4:" in done("train.py", folder)
    assert outcome(folder) == outcome(undisturbed)


@slow
def test_a_damaged_store_backbone_or_model_is_named_with_what_to_do(undisturbed, tmp_path):
    def damaged(script: str, name: str, damage: str) -> None:
        folder = copied(undisturbed, tmp_path / f"{Path(name).name}-{damage}")
        shutil.rmtree(folder / STORE)
        DAMAGES[damage](folder / name)
        message = failed(script, folder)
        assert message.startswith(f"error: {name} is damaged (")
        assert ("run `dvc repro --force prepare`" in message) or ("Remove it, then run again" in message)
        assert not checkpoints(folder)
        assert evaluation(folder) == evaluation(undisturbed)
        assert sha256_of(folder / "models/checkpoint.pt") == sha256_of(undisturbed / "models/checkpoint.pt")

    together(
        lambda: damaged("train.py", "data/prepared/shard-000.bin", "flipped"),
        lambda: damaged("train.py", "data/prepared/shard-000.bin", "cut"),
        lambda: damaged("train.py", "data/prepared/manifest.json", "flipped"),
        lambda: damaged("evaluate.py", "data/prepared/pictures.csv", "flipped"),
        lambda: damaged("train.py", "models/backbone.safetensors", "flipped"),
        lambda: damaged("evaluate.py", "models/model.safetensors", "flipped"),
    )


@slow
def test_any_changed_byte_and_any_cut_of_a_file_is_found(undisturbed, tmp_path):
    """By the functions that the scripts read them with."""
    store = shutil.copytree(undisturbed / "data/prepared", tmp_path / "prepared")
    backbone = Path(shutil.copy(undisturbed / "models/backbone.safetensors", tmp_path))
    tiny = tmp_path / "checkpoint.pt"
    checkpoint.save(tiny, {"model": {"weight": torch.arange(4.0)}, "history": [{"loss": 1.5}], "run": "run"})
    manifest, state = ImageStore(store).manifest, digest(checkpoint.load(tiny))
    harmless = checkpoint.Damaged("only what is around the content, which is whole")

    def read_store() -> None:
        ImageStore(store)[0]
        assert ImageStore(store).manifest == manifest
        raise harmless

    def read_checkpoint() -> None:
        assert digest(checkpoint.load(tiny)) == state
        raise harmless

    for path, read, every in (
        (store / "manifest.json", read_store, 2),
        (store / "pictures.csv", lambda: ImageStore(store), 97),
        (store / "shard-000.bin", lambda: ImageStore(store)[0], 10007),
        (backbone, lambda: backbones.read(backbone), 3),
        (tiny, read_checkpoint, 7),
    ):
        content = path.read_bytes()
        for place in range(0, len(content), every):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            for damaged in (changed, content[:place]):
                path.write_bytes(damaged)
                with pytest.raises((UserError, checkpoint.Damaged)):
                    read()
        path.write_bytes(content)


def test_a_damaged_picture_is_skipped_and_said(tmp_path):
    make_pictures(tmp_path / "pictures", {"ants": 12, "bees": 12})
    write_params(tmp_path, data__source="pictures", data__resize=32, data__image_size=32, data__max_skipped=0.5)
    done("prepare.py", tmp_path)
    whole = contents(tmp_path / "data/prepared")
    originals = {name: (tmp_path / "pictures/ants" / f"{name}.png").read_bytes() for name in (3, 4)}
    cut(tmp_path / "pictures/ants/3.png")
    flip(tmp_path / "pictures/ants/4.png")
    printed = done("prepare.py", tmp_path)
    assert "skipped ants/3.png: " in printed
    assert "skipped ants/4.png: " in printed
    for name, content in originals.items():
        (tmp_path / "pictures/ants" / f"{name}.png").write_bytes(content)
    done("prepare.py", tmp_path)
    assert contents(tmp_path / "data/prepared") == whole


class Harmful:
    """What runs code where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@slow
def test_no_checkpoint_is_loaded_that_is_old_foreign_or_harmful(stopped, undisturbed, tmp_path):
    marker = tmp_path / "harmed"

    def crafted(name: str) -> Path:
        """Put four such checkpoints into a copy's store, further than its last one by a step, two, three and four."""
        folder = copied(stopped, tmp_path / name)
        last = checkpoints(folder)[-1]
        place = [last.with_name(f"00003-000000{step}.pt") for step in range(1, 5)]
        state = checkpoint.load(last)
        checkpoint.save(place[0], state | {"run": "0123456789abcdef"})
        torch.save(state | {"format": 1}, place[1])
        place[2].write_text("no checkpoint at all\n")
        torch.save(state | {"note": Harmful(marker)}, place[3])
        return folder

    said = [
        r"00003-0000004.pt holds code, which is not run",
        r"00003-0000003.pt is cut or changed",
        r"00003-0000002.pt has format 1, and this version reads \d",
        r"00003-0000001.pt is of another run, 0123456789abcdef",
    ]

    def with_good_ones():
        folder = crafted("good")
        last = checkpoints(folder)[1]
        printed = done("train.py", folder)
        lines = [line for line in printed.splitlines() if line.startswith("warning: ")]
        assert len(lines) == len(said)
        for words, line in zip(said, lines, strict=True):
            assert re.search(words + ": taking the checkpoint before it", line)
        assert f": {last.relative_to(folder)}\n" in printed
        assert outcome(folder) == outcome(undisturbed)

    def alone():
        folder = crafted("alone")
        for good in checkpoints(folder)[:2]:
            good.unlink()
        message = failed("train.py", folder)
        assert message.startswith("error: no checkpoint of this run is whole: ")
        assert all(re.search(words, message) for words in said)
        assert "`python src/checkpoints.py remove " in message

    together(with_good_ones, alone)
    assert not marker.exists()
    torch.load(checkpoints(tmp_path / "alone")[-1], weights_only=False)
    assert marker.exists()  # it would have been harmful


@slow
def test_no_clock_has_a_say_in_which_checkpoint_is_taken(stopped, undisturbed, tmp_path):
    folder = copied(stopped, tmp_path / "project")
    before, newest = checkpoints(folder)
    os.utime(before, (2**32, 2**32))  # in 2106
    os.utime(newest, (0, 0))
    assert newest.name in done("train.py", folder)
    assert outcome(folder) == outcome(undisturbed)


# Divergence ---------------------------------------------------------------------------------------------------------


@slow
def test_a_run_that_diverges_names_its_last_good_checkpoint_and_never_begins_anew(fresh):
    write_params(fresh, **SETTINGS | {"batch_size": 16, "lr": 0.3, "momentum": 0.9, "num_epochs": 12})

    def diverged() -> tuple[str, int]:
        """Return what is on the screen, and the epochs of the checkpoint that the error names, which must be good."""
        result = run("train.py", fresh, **THREADS)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        named = re.search(
            r"error: the loss in .* became NaN or infinite: training diverged\. "
            r"The last good checkpoint is kept: (.*)\n"
            r"Try a smaller lr \(now 0\.3\), for instance -S lr=0\.03, or see what fits: python src/find_lr\.py",
            result.stderr,
        )
        state = checkpoint.load(fresh / named[1])
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
        return result.stdout, len(state["history"])

    printed, epochs = diverged()
    assert epochs == printed.count("val_loss") > 1
    printed, again = diverged()
    assert f"going on after {epochs} epochs" in printed
    assert again == epochs
    assert "val_loss" not in printed
    assert not list((fresh / "models").glob("model.*"))


@slow
def test_weights_that_are_no_numbers_are_said_even_where_the_loss_is_one(stopped, tmp_path):
    folder = copied(stopped, tmp_path / "project")
    last = checkpoints(folder)[-1]
    state = checkpoint.load(last)
    state["model"]["features.0.bias"][0] = -torch.inf  # which the ReLU after it makes zeros of
    checkpoint.save(last, state)
    message = failed("train.py", folder)
    assert message.startswith("error: a weight by epoch 3 became NaN or infinite: training diverged.")
    assert f"The last good checkpoint is kept: {last.relative_to(folder)}\n" in message


# Signals ------------------------------------------------------------------------------------------------------------


@slow
def test_a_run_that_is_stopped_in_any_way_goes_on_from_that_very_step(fresh, undisturbed, monkeypatch):
    """By Ctrl-C, in the validation, by a second Ctrl-C, and by the end of what has started it: one run, to its end."""
    write_params(fresh, **SETTINGS | {"checkpoint_minutes": 0})  # a checkpoint at each step, as what to wait for
    store = fresh / STORE

    def started(**options) -> tuple[Started, Path]:
        process = Started("train.py", fresh, **options)
        process.wait_for("training 723,522 of")
        while not (folders := list(store.glob("[0-9a-f]" * 16))):
            assert process.process.poll() is None
            time.sleep(0.001)
        return process, folders[0]

    def stopped_at(process: Started) -> tuple[int, int]:
        """Return the complete epochs and steps that the process says it has stopped after."""
        assert "Traceback" not in process.output
        said = re.search(
            r"\nstopped in epoch (\d) of 4 after (\d) of 6 steps, all of them saved\.\n"
            r"The same command goes on from there \(a queued experiment: queue it again\)\.\n$",
            process.output,
        )
        assert said, process.output
        return int(said[1]) - 1, int(said[2])

    def signalled(process: Started, number: int) -> tuple[int, int]:
        """Send a signal, upon which the process must end in time, and say where it stopped."""
        process.send(number)
        sent = time.monotonic()
        assert process.end() == 128 + number
        assert time.monotonic() - sent < 5
        return stopped_at(process)

    def goes_on(process: Started, epochs: int, steps: int) -> None:
        process.wait_for(f"going on after {epochs} epochs and {steps} steps: ")

    process, folder = started()
    process.wait_for_file(folder / "00000-0000002.pt")
    place = signalled(process, signal.SIGINT)
    assert place < (0, STEPS)
    assert "SIGINT: finishing the batch and saving; Ctrl-C stops at once" in process.output

    process, folder = started()
    goes_on(process, *place)
    process.wait_for_file(folder / "00000-0000006.pt")  # the validation has begun
    assert signalled(process, signal.SIGTERM) == (0, STEPS)

    process, folder = started()
    goes_on(process, 0, STEPS)
    process.wait_for_file(folder / "00001-0000001.pt")
    curve = fresh / "results/train/plots/metrics/acc.tsv"
    curve.unlink()
    os.mkfifo(curve)  # that nobody reads: the process hangs when it logs the second epoch
    process.wait_for_file(folder / "00002-0000000.pt")
    process.send(signal.SIGINT)
    process.wait_for("SIGINT: finishing the batch and saving; Ctrl-C stops at once")
    process.send(signal.SIGINT)
    assert process.end() == -signal.SIGINT
    assert "Traceback" not in process.output

    process, folder = started(under_a_parent=True, DVC_ROOT=str(fresh))
    goes_on(process, 2, 0)
    process.wait_for_file(folder / "00002-0000001.pt")
    process.send(signal.SIGKILL)  # to what has started it
    process.end()
    place = stopped_at(process)
    assert place[0] < EPOCHS

    process, folder = started()
    goes_on(process, *place)
    assert process.end() == 0
    assert outcome(fresh) == outcome(undisturbed)


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_being_imported_leaves_no_traceback(fresh, number):
    process = Started("train.py", fresh, PYTHONPROFILEIMPORTTIME="1")
    process.wait_for(" torch._C")
    process.send(number)
    assert process.end() == -number
    assert "Traceback" not in process.output
    assert not (fresh / STORE).exists()


# Two processes ------------------------------------------------------------------------------------------------------


@slow
def test_of_two_processes_with_one_run_one_trains_and_the_other_waits_and_takes_over(prepared, undisturbed, tmp_path):
    def two(name: str, number: int) -> tuple[Started, Started]:
        """Run the same in two folders: the first is halted after two epochs, until the second waits for its signal."""
        folders = [copied(prepared, tmp_path / name / each) for each in ("first", "second")]
        write_params(folders[0], **SETTINGS | {"checkpoint_minutes": 0})  # so that it takes its time
        (tmp_path / name / "store").mkdir()
        first = Started("train.py", folders[0], CHECKPOINTS_DIR="../store")
        first.wait_for("epoch 2/4:")
        first.send(signal.SIGSTOP)
        second = Started("train.py", folders[1], CHECKPOINTS_DIR="../store")
        second.wait_for("another process is training this very run (")
        assert second.output.rstrip().endswith("waiting, to take its result")
        first.send(number)
        assert first.end() == (0 if number == signal.SIGCONT else -number)
        assert second.end() == 0
        for folder in folders if number == signal.SIGCONT else folders[1:]:
            assert outcome(folder) == outcome(undisturbed)
        return first, second

    (trained, took), (_, went_on) = together(lambda: two("both", signal.SIGCONT), lambda: two("one", signal.SIGKILL))
    assert trained.output.count("val_loss") == EPOCHS
    assert took.output.count("val_loss") == 0
    assert "this run is finished, nothing to train" in took.output
    assert re.search(r"going on after [12] epochs and \d steps", went_on.output)
    assert "epoch 4/4:" in went_on.output
    assert "epoch 1/4:" not in went_on.output


# The store's bound --------------------------------------------------------------------------------------------------


def stored(store: Path, number: int, age: int, checkpoint_name: str) -> runs.Run:
    """Put a run of 1000 bytes into the store, saved `age` days ago."""
    run = runs.Run(store, f"{number:016x}")
    run.folder.mkdir(parents=True)
    file = run.folder / checkpoint_name
    file.write_bytes(bytes(1000))
    os.utime(file, (time.time() - 86400 * age,) * 2)
    return run


FINISHED, UNFINISHED = "00002-0000000.finished.pt", "00002-0000003.pt"


@pytest.mark.parametrize(
    ("limit", "left"),
    [(6000, [1, 2, 3, 4, 5, 6]), (5999, [1, 2, 3, 5, 6]), (4000, [1, 2, 3, 5]), (3999, [1, 3, 5]), (2000, [1, 5]),
     (1999, [5]), (0, [5])],
)  # fmt: skip
def test_the_oldest_finished_runs_go_first_then_unfinished_ones_and_never_one_in_use(tmp_path, limit, left):
    kinds = {1: (1, UNFINISHED), 2: (2, FINISHED), 3: (9, UNFINISHED), 4: (8, FINISHED), 5: (10, FINISHED),
             6: (3, FINISHED)}  # fmt: skip
    stored_runs = {number: stored(tmp_path, number, *kind) for number, kind in kinds.items()}
    with held(stored_runs[5]):
        runs.make_room(tmp_path, limit)
        assert [number for number, run in stored_runs.items() if run.folder.exists()] == left


@contextmanager
def held(run: runs.Run) -> Iterator[None]:
    """Have another process hold the run, as one that trains it does."""
    program = (
        "import sys; from pathlib import Path; from finetune.runs import Run\n"
        "with Run(Path(sys.argv[1]), sys.argv[2])._lock(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, run.store, run.name],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        process.communicate()


def test_a_run_that_another_process_holds_is_in_use_and_is_not_removed(tmp_path):
    run = stored(tmp_path, 1, 0, FINISHED)
    assert not run.in_use()
    with held(run):
        assert run.in_use()
        assert not run.remove()
        assert [each.path.name for each in run.checkpoints()] == [FINISHED]
    assert not run.in_use()
    assert run.remove()
    assert not run.folder.exists()


@slow
def test_a_store_that_may_hold_nothing_still_holds_the_run_that_trains(fresh, undisturbed):
    write_params(fresh, **SETTINGS | {"checkpoint_store_gb": 0})
    others = [stored(fresh / STORE, 1, 0, FINISHED), stored(fresh / STORE, 2, 0, UNFINISHED)]
    with held(others[1]):
        done("train.py", fresh)
        assert [run.folder.exists() for run in others] == [False, True]
    assert outcome(fresh) == outcome(undisturbed)
    assert checkpoints(fresh)[-1].name == "00004-0000000.finished.pt"
