"""One experiment on several devices: the result of one, whatever comes between; here as processes on the CPU."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import helpers
from finetune import backbones, checkpoint, device, distributed, dropout
from helpers import Forked, as_user, clone, copying, dvc, preparing, run_forked, write_params

import psutil
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import stochastic_depth

TINY = helpers.TINY | {
    "backbone__weights": "mine.pth",
    "num_epochs": 2,
    "batch_size": 4,
    "lr": 0.01,
    "momentum": 0.9,
}
PICTURES = {"train/ants": 5, "train/bees": 10, "val/ants": 8, "val/bees": 9}  # batches of 4, 4, 4 and 3
RESNET = {"model_name": "resnet18", "num_epochs": 1, "momentum": 0.5}
# Batch norm makes more of rounding, the fewer values it has.
BATCH_NORM = {"model_name": "resnet18", "num_epochs": 1, "batch_size": 8, "lr": 0.0005, "momentum": 0.0}
LAUNCHED = {"CPU_PROCESSES": "2"}


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return preparing(lambda: tmp_path_factory.mktemp("prepared"), PICTURES, TINY)


@pytest.fixture
def folders(prepared, tmp_path):
    return copying(prepared, tmp_path, TINY)


def train_together(folders: list[Path]) -> None:
    """Train in as many processes as there are folders, each in its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "localhost"}
    group |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # in folders of their own, they do not share the cores
    processes = [Forked(folder, "train", RANK=str(rank), **group) for rank, folder in enumerate(folders)]
    for process, folder in zip(processes, folders, strict=True):
        assert process.wait() == 0, "\n".join((each / "printed.txt").read_text() for each in [folder, folders[0]])


def state(folder: Path) -> dict:
    return checkpoint.load(folder / "models/checkpoint.pt")


def check_close(folder: Path, reference: Path, atol: float) -> None:
    """Check that what was trained in two folders is equal within rounding."""
    found, expected = state(folder), state(reference)
    assert found["run"] == expected["run"]
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=atol)
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert (row["step"], row["lr"]) == (other["step"], other["lr"])
        assert (row["acc"], row["val_acc"]) == (other["acc"], other["val_acc"])
        assert (row["loss"], row["val_loss"]) == pytest.approx((other["loss"], other["val_loss"]), abs=1e-3)
    assert (folder / "models/model.safetensors").exists()
    assert json.loads((folder / "results/train/metrics.json").read_text())["step"] == len(expected["history"]) - 1


# The result of one device ---------------------------------------------------------------------------------------------


def convolutions(model: str) -> list[str]:
    modules = torchvision.models.get_model(model).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Conv2d)]


CASES = {
    "head, from features, with dropout": {},
    "concat_pool, weighted classes": {
        "head__kind": "concat_pool",
        "head__hidden": 16,
        "data__balance": "loss",
        "optimizer__label_smoothing": 0.1,
        "optimizer__grad_clip": 0.5,
        "optimizer__l1": 0.001,
    },
    "all but batch norm": RESNET | {"backbone__trainable": convolutions("resnet18")},
    "all, batch norm too": BATCH_NORM | {"backbone__trainable": "all"},
    "head, on statistics that follow": BATCH_NORM | {"backbone__batch_norm": "train"},
    "whole pictures, with dropout, mixup and thawing": {
        "augment__mixup": 0.4,
        "backbone__trainable": "all",
        "backbone__unfreeze_epoch": 1,
    },
    "one picture a batch": {"batch_size": 1, "num_epochs": 1, "lr": 0.001},
    "one picture a batch, whole": {"batch_size": 1, "num_epochs": 1, "lr": 0.001, "backbone__trainable": "all"},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_two_processes_train_what_one_does_and_the_first_alone_writes(settings, folders):
    reference, first, second = (folders(**settings, checkpoint_minutes=0.0) for _ in range(3))
    run_forked(reference)
    before = {path.relative_to(second) for path in second.rglob("*")}
    train_together([first, second])
    check_close(first, reference, atol=2e-4 if settings.items() >= BATCH_NORM.items() else 2e-5)
    start = folders(**settings) / "models/backbone.safetensors"
    moved = max(
        (each - backbones.read(start)[0].get(name, each)).abs().max() for name, each in state(first)["model"].items()
    )
    assert moved > 1e-3 or settings.get("backbone__trainable", "head") == "head"
    after = {path.relative_to(second) for path in second.rglob("*") if ".dvc/tmp/cores" not in path.as_posix()}
    assert after - before <= {Path("printed.txt"), Path(".dvc"), Path(".dvc/tmp")}


@pytest.mark.slow
def test_in_bf16_and_with_more_processes_than_a_batch_has_pictures(folders):
    settings = {"precision": "bf16", "batch_size": 2, "num_epochs": 1, "backbone__trainable": 2}
    reference, *others = (folders(**settings) for _ in range(4))
    run_forked(reference)
    train_together(others)
    torch.testing.assert_close(state(others[0])["model"], state(reference)["model"], rtol=0, atol=0.01)


# What is drawn, and parts of a batch ----------------------------------------------------------------------------------


def drawn(pictures: torch.Tensor) -> torch.Tensor:
    """Return what is left of pictures after each of the ways in which networks draw, [n, …]."""
    values = dropout.Dropout(0.3)(pictures)
    values = nn.Dropout(0.3)(values)
    values = stochastic_depth(values, 0.3, "row")
    windows = dropout.Dropout(0.3)(pictures.repeat_interleave(3, 0))
    return torch.cat([values.flatten(1), windows.reshape(len(pictures), 3 * pictures.shape[1:].numel())], 1)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_parts_of_a_batch_are_drawn_as_the_whole_is(count, order):
    pictures = torch.ones(5, 3, 4, 6).to(memory_format=order)
    device.seed(1)
    whole = drawn(pictures)
    parts = []
    for rank in range(count):
        own = slice(5 * rank // count, 5 * (rank + 1) // count)
        device.seed(1)
        with distributed._WholeBatch(own, 5):
            parts.append(drawn(pictures[own]))
    assert 0 < whole.count_nonzero() < whole.numel()
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_rows_of_all_processes_are_those_of_the_part(count, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: count)
    found, prepared = [], []
    for rank in range(count):
        monkeypatch.setattr(distributed.distributed, "get_rank", lambda rank=rank: rank)
        found += range(100)[distributed.rows(slice(10, 15))]
        prepared.append(len(range(100)[distributed.share(slice(10, 15))]))
    assert found == [10, 11, 12, 13, 14]
    assert min(prepared) >= 1
    assert max(prepared) == -(-5 // count)


# Started by the stage -------------------------------------------------------------------------------------------------


def members(launcher: Forked) -> dict[str, psutil.Process]:
    """Return the processes that a launcher has started, by their rank."""
    return {each.environ()["RANK"]: each for each in psutil.Process(launcher.pid).children()}


def until(condition, process: Forked, folder: Path) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (folder / "printed.txt").read_text()
        assert time.monotonic() < end, (folder / "printed.txt").read_text()
        time.sleep(0.02)


def saved(folder: Path) -> list[Path]:
    """Return the folder's checkpoints within an epoch that is not the first."""
    return [path for path in folder.glob(".dvc/tmp/checkpoints/*/*.pt") if path.stem > "00001-0000000"]


LONG = {"device": "all", "num_epochs": 30, "checkpoint_minutes": 0.0, "backbone__trainable": 1}


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """A folder in which the long run was trained on one device."""
    folder = shutil.copytree(prepared(), tmp_path_factory.mktemp("undisturbed") / "folder")
    write_params(folder, **TINY | LONG | {"device": "cpu"})
    run_forked(folder)
    return folder


@pytest.mark.slow
def test_a_process_killed_ends_the_others_and_the_run_goes_on_in_as_many(folders, undisturbed):
    folder = folders(**LONG)
    process = Forked(folder, "train", **LAUNCHED)
    until(lambda: saved(folder), process, folder)
    members(process)["1"].kill()
    assert process.wait() == 1
    printed = (folder / "printed.txt").read_text()
    assert "error: process 2 of 2 was ended by SIGKILL, and the others with it.\nThe same command goes on" in printed
    assert "Traceback" not in printed

    printed = run_forked(folder, **LAUNCHED)
    assert "device: all: training in 2 processes" in printed
    assert "going on after " in printed
    check_close(folder, undisturbed, atol=1e-4)


@pytest.mark.slow
def test_a_signal_stops_all_after_the_same_step_and_one_process_goes_on(folders, undisturbed):
    folder = folders(**LONG | {"checkpoint_minutes": 5.0})
    process = Forked(folder, "train", **LAUNCHED)
    until(lambda: saved(folder), process, folder)
    psutil.Process(process.pid).terminate()
    assert process.wait() == 128 + signal.SIGTERM
    printed = (folder / "printed.txt").read_text()
    assert printed.count("all of them saved.\nThe same command goes on from there") == 1
    assert "Traceback" not in printed

    write_params(folder, **TINY | LONG | {"device": "cpu"})
    assert "going on after " in run_forked(folder)
    check_close(folder, undisturbed, atol=1e-4)


@pytest.mark.slow
def test_one_process_killed_and_two_go_on_then_two_and_what_started_them_killed(folders, undisturbed):
    folder = folders(**LONG | {"device": "cpu"})
    process = Forked(folder, "train")
    until(lambda: saved(folder), process, folder)
    process.kill()
    process.wait()

    write_params(folder, **TINY | LONG)
    process = Forked(folder, "train", **LAUNCHED)
    until(lambda: "going on after " in (folder / "printed.txt").read_text(), process, folder)
    started = list(members(process).values())
    process.kill()
    process.wait()
    assert psutil.wait_procs(started, timeout=30)[1] == []

    run_forked(folder, **LAUNCHED)
    check_close(folder, undisturbed, atol=1e-4)


@pytest.mark.slow
def test_an_error_is_told_once(folders):
    folder = folders(device="all", lr=1e30, backbone__trainable="all")
    printed = run_forked(folder, status=1, **LAUNCHED)
    assert printed.count("error: ") == printed.count("training diverged") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several GPUs here")
def test_with_less_than_two_gpus_all_is_auto(folders):
    one, other = folders(device="all", num_epochs=1), folders(device="auto", num_epochs=1)
    assert "here: as with auto" in run_forked(one)
    assert "as with auto" not in run_forked(other)
    assert (one / "models/model.safetensors").read_bytes() == (other / "models/model.safetensors").read_bytes()
    assert (one / "models/checkpoint.pt").exists()


@pytest.mark.slow
def test_through_dvc_ctrl_c_saves_and_last_goes_on_top(tmp_path):
    source = {"backbone__weights": "none", "data__source": "data/tiny.yaml"}
    project = clone(tmp_path / "project", **TINY | LONG | source | {"num_epochs": 1000})
    process = subprocess.Popen(
        ["dvc", "exp", "run"], cwd=project, env=as_user(project) | LAUNCHED, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("epoch 2/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to DVC, the stage, and its processes
    assert process.wait() != 0
    assert "".join(printed).count("all of them saved.\nThe same command goes on from there") == 1, "".join(printed)

    printed = dvc(project, "exp", "run", "-S", "num_epochs=6", **LAUNCHED)
    assert "device: all: training in 2 processes" in printed
    assert re.search(r"^going on after [1-6] epochs", printed, re.MULTILINE)
    printed = dvc(project, "exp", "run", "-S", "resume=last", "-S", "num_epochs=2", **LAUNCHED)
    assert re.findall(r"^epoch (\d+)/", printed, re.MULTILINE) == ["7", "8"]
